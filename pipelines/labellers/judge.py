"""A language model as the judge: one response by a rubric, alone or beside a reference, or two responses compared.

What is judged was written by others and may speak to the judge. It stands between lines that hold a hash of itself,
which it cannot know; what spells a chat template's tokens in it is broken up; and the answer must be exactly in the
form that was asked for. What a judge can still be talked into is in docs/judging.md.
"""

import dataclasses
import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pipelines import engines
from pipelines.labellers.base import Identity, Item, Kind, Labeller, Outcome, Score
from pipelines.labellers.cache import Cache, key_of
from pipelines.labellers.endpoint import Body, Endpoint, Keep, Known, Meter, Reply, checked, probe
from pipelines.labellers.judge_answer import SHOWN, Form, form_of, shares, top
from pipelines.labellers.judge_prompt import Breaker, Template, variables
from pipelines.labellers.judge_settings import MANNER, Settings, check, read_key
from schemas.errors import Reject
from schemas.fingerprint import fingerprint, local_model

_VERSION = 1  # of the protocol: fences, forms, what a call's key holds
_TOP = 20  # tokens whose probabilities are asked for; more than OpenAI and vLLM give by default is refused


# --- calls and what they say -------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """One question to the judge: its body, and the key under which its answer is kept."""

    body: Body
    key: str
    broken: int  # special tokens that were broken up in what it shows


@dataclass(frozen=True)
class Judge:
    """Items to calls, and answers to scores; it knows no engine. `who`: what answers depend on beside the call."""

    settings: Settings
    form: Form
    template: Template
    breaker: Breaker
    who: Any

    def calls(self, item: Item) -> list[Call]:
        """One call, or one for each order of a pair; `Reject` when the item cannot be judged."""
        wanted = 2 if self.settings.mode == "pairwise" else 1
        assert len(item.responses) == wanted, f"a {self.settings.mode} judge of {len(item.responses)} responses"
        if not all(text.strip() for text in item.responses):
            raise Reject("empty_response", "there is nothing to judge")
        orders = [item.responses, item.responses[::-1]][:wanted]
        return [self._call(dataclasses.replace(item, responses=order)) for order in orders]

    def _call(self, item: Item) -> Call:
        shown = variables(self.settings, item, self.breaker)
        body = {"model": self.settings.model, "messages": self.template.messages(shown), **_options(self.settings)}
        content = {name: value for name, value in body.items() if name != "model"}
        return Call(body, key_of(["judge", _VERSION, self.who, content]), shown["fenced"].broken)

    def kept(self, reply: Reply) -> dict[str, Any]:
        """What the cache holds of an answer: its text, and the probabilities where the label stands."""
        kept: dict[str, Any] = {"text": reply.text, "used": list(reply.used or ())}
        if self.settings.expected:
            kept["top"] = top(reply, self.form.place(reply.text))
        return kept

    def outcome(self, calls: Sequence[Call], answers: Sequence[dict[str, Any] | Reject]) -> Outcome:
        """The score that all of an item's answers give together."""
        try:
            found = [self._verdict(answer) for answer in answers]
        except Reject as no:
            return no
        facts = {"broken_up": n} if (n := sum(call.broken for call in calls)) else {}
        return self._compared(found, facts) if len(found) == 2 else self._scored(found[0], facts)

    def _verdict(self, answer: dict[str, Any] | Reject) -> "Verdict":
        if isinstance(answer, Reject):
            raise answer
        label, explanation = self.form.read(answer["text"])
        if not self.settings.expected:
            return Verdict(label, explanation, {label: 1.0}, None)
        found = shares(answer["top"] or [], self.form.labels)
        mass = sum(found.values())
        if label not in found or not mass > 0:
            detail = "the server gave no probability of the score's token; it must return logprobs"
            raise Reject("unparsable_judgement", f"{detail}: {answer['text'][:SHOWN]!r}")
        return Verdict(label, explanation, {one: share / mass for one, share in found.items()}, min(1.0, mass))

    def _scored(self, found: "Verdict", facts: dict[str, Any]) -> Score:
        facts |= {"mass": found.mass} if found.mass is not None else {}
        facts |= {"explanation": found.explanation} if self.settings.explain else {}
        return Score(sum(int(label) * share for label, share in found.shares.items()), facts)

    def _compared(self, found: "list[Verdict]", facts: dict[str, Any]) -> Score:
        """The mean of both orders when they agree, one half when they do not."""
        shares = [found[0].shares.get("A", 0.0), found[1].shares.get("B", 0.0)]  # of the item's first response
        facts |= {"orders": shares, "first_slot": sum(one.label == "A" for one in found)}
        facts |= {"mass": [one.mass for one in found]} if found[0].mass is not None else {}
        facts |= {"explanations": [one.explanation for one in found]} if self.settings.explain else {}
        agree = found[0].label != found[1].label
        return Score(sum(shares) / 2 if agree else 0.5, facts)


@dataclass(frozen=True)
class Verdict:
    label: str
    explanation: str
    shares: Mapping[str, float]  # label → probability; they add up to one
    mass: float | None  # what the labels had of all probability, where probabilities were asked for


def _options(settings: Settings) -> dict[str, Any]:
    """A call's body beside model and messages."""
    form = form_of(settings)
    options: dict[str, Any] = {
        "temperature": settings.temperature,
        "max_tokens": settings.max_tokens,
        "seed": settings.seed,
    }
    if settings.structured == "json_schema":
        schema = {"name": form.field, "strict": True, "schema": form.schema()}
        options["response_format"] = {"type": "json_schema", "json_schema": schema}
    elif settings.structured == "choices":
        options["structured_outputs"] = {"choice": list(form.labels)}
    if settings.expected:
        options |= {"logprobs": True, "top_logprobs": _TOP}
    return {name: value for name, value in {**options, **settings.extra}.items() if value is not None}


# --- engines -----------------------------------------------------------------------------------


class Asks(Protocol):
    """What answers calls: an endpoint, or an engine of this process.

    `known(i)` is asked right before the i-th call: what it gives in place of None is its answer.
    """

    def ask(self, bodies: Sequence[Body], keep: Keep, known: Known) -> Iterator[tuple[int, Any]]: ...


class Local:
    """vLLM in this process, asked with the same bodies as an endpoint."""

    _AT_A_TIME = 256

    def __init__(self, engine: Any):
        self._engine = engine

    def ask(self, bodies: Sequence[Body], keep: Keep, known: Known) -> Iterator[tuple[int, Any]]:
        for start in range(0, len(bodies), self._AT_A_TIME):  # one process asks for all workers: `known` adds nothing
            answers = self._answers(bodies[start : start + self._AT_A_TIME])
            for i, answer in enumerate(answers, start):
                if isinstance(answer, Reply):
                    keep(i, answer)
            yield from enumerate(answers, start)

    def _answers(self, bodies: Sequence[Body]) -> list[Reply | Reject]:
        """vLLM refuses all when one is too long or its template fails: then each is asked alone."""
        try:
            outputs = self._engine.chat([body["messages"] for body in bodies], [_sampling(body) for body in bodies])
        except ValueError as error:
            if len(bodies) > 1:
                return [answer for body in bodies for answer in self._answers([body])]
            return [Reject("labeller_failed", f"vLLM: {str(error)[:300]}")]
        return [_local_reply(output) for output in outputs]


def _sampling(body: Body) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    held: Any = None
    if schema := body.get("response_format"):
        held = StructuredOutputsParams(json=schema["json_schema"]["schema"])
    elif choices := body.get("structured_outputs"):
        held = StructuredOutputsParams(choice=choices["choice"])
    given = {name: body[name] for name in ("temperature", "max_tokens", "seed") if name in body}
    return SamplingParams(**given, logprobs=body.get("top_logprobs"), structured_outputs=held)


def _local_reply(output: Any) -> Reply:
    made = output.outputs[0]
    tokens = made.logprobs and [
        ((top[token].decoded_token or "").encode(), [(one.decoded_token or "", one.logprob) for one in top.values()])
        for token, top in zip(made.token_ids, made.logprobs, strict=True)
    ]
    return Reply(made.text, tokens, (len(output.prompt_token_ids), len(made.token_ids)))


_loading = threading.Lock()


@functools.cache
def _loaded(model: str, dtype: str, max_length: int) -> Local:
    from pipelines.engines import vllm

    return Local(vllm.load(model, dtype=dtype, batch_tokens=8192, max_length=max_length, prefix_caching=True))


def _local(settings: Settings) -> Local:
    """The one engine of this process for a model."""
    from transformers import AutoConfig

    model = str(local_model(settings.model))
    context = getattr(AutoConfig.from_pretrained(model).get_text_config(), "max_position_embeddings", None)
    longest = min(settings.max_length, context - 1) if context else settings.max_length
    with _loading:
        return _loaded(model, settings.dtype, longest)


# --- the kind ----------------------------------------------------------------------------------


def _who(settings: Settings) -> Any:
    """The model as the answers depend on it: by name at an endpoint, by its weights here."""
    if settings.engine == "endpoint":
        return settings.model
    version = engines.version("vllm")
    return fingerprint(local_model(settings.model), dtype=settings.dtype, engine="vllm", engine_version=version)


def _special(settings: Settings) -> list[str]:
    if settings.engine == "endpoint":
        return list(settings.special)
    from pipelines import render

    return [*settings.special, *sorted(render.load(local_model(settings.model)).special)]


def _fingerprint(settings: Settings, template: Template) -> dict[str, Any]:
    facts = {name: value for name, value in dataclasses.asdict(settings).items() if name not in MANNER}
    return {**facts, "template": key_of(template.source), "model": _who(settings), "version": _VERSION}


def identify(settings: Settings) -> Identity:
    """Who judges; checks settings, template and key, and asks the server once whether it is there."""
    check(settings)
    template = Template(settings)
    facts = _fingerprint(settings, template)
    if settings.engine == "endpoint":
        url, key = checked(settings.base_url), read_key(settings)
        if settings.budget_calls != 0 and settings.budget != 0:
            probe(url, key, settings.model)
    name = settings.name or Path(settings.model).name
    ends = (0.0, 1.0) if settings.mode == "pairwise" else (float(settings.low), float(settings.high))
    return Identity(f"judge:{name}@{key_of(facts)[:8]}", facts, ends)


def load(settings: Settings, cache: Cache) -> Labeller:
    judge = Judge(settings, form_of(settings), Template(settings), Breaker(_special(settings)), _who(settings))
    return labeller(judge, _asks(settings, cache), cache)


def _asks(settings: Settings, cache: Cache) -> Asks:
    if settings.engine == "vllm":
        return _local(settings)
    meter = Meter(
        cache,
        settings.run or f"judge:{settings.name or settings.model}",
        price_in=settings.price_in,
        price_out=settings.price_out,
        usd=settings.budget,
        calls=settings.budget_calls,
    )
    return Endpoint(
        settings.base_url,
        read_key(settings),
        meter,
        concurrency=settings.concurrency,
        retries=settings.retries,
        timeout=settings.timeout,
    )


def labeller(judge: Judge, asks: Asks, cache: Cache) -> Labeller:
    """Calls that are in the cache are not made; an item's outcome is given as soon as its last answer is there."""

    def label(items: Sequence[Item]) -> Iterator[tuple[int, Outcome]]:
        calls: dict[int, list[Call]] = {}
        users: dict[str, list[int]] = {}  # a call's key → the items that wait for it
        for i, item in enumerate(items):
            try:
                calls[i] = judge.calls(item)
            except Reject as no:
                yield i, no
                continue
            for call in calls[i]:
                users.setdefault(call.key, []).append(i)
        answers: dict[str, dict[str, Any] | Reject] = {}
        for key, answer in _answered(calls, answers_of=judge.kept, asks=asks, cache=cache):
            answers[key] = answer
            for i in users[key]:
                if i in calls and all(call.key in answers for call in calls[i]):
                    mine = calls.pop(i)
                    yield i, judge.outcome(mine, [answers[call.key] for call in mine])

    return label


def _answered(
    calls: Mapping[int, list[Call]], *, answers_of: Callable[[Reply], dict[str, Any]], asks: Asks, cache: Cache
) -> Iterator[tuple[str, dict[str, Any] | Reject]]:
    """(key, answer) of every call, each once: first what the cache has, then the others as they come."""
    bodies = {call.key: call.body for some in calls.values() for call in some}
    known = cache.get(bodies)
    yield from known.items()
    missing = [key for key in bodies if key not in known]

    def keep(i: int, reply: Reply) -> None:
        cache.put(missing[i], answers_of(reply))

    def since(i: int) -> Any:  # another worker or run may have asked it by now
        return cache.get([missing[i]]).get(missing[i])

    for i, answer in asks.ask([bodies[key] for key in missing], keep, since):
        yield missing[i], answers_of(answer) if isinstance(answer, Reply) else answer


KINDS = {
    "judge": Kind(
        Settings,
        identify,
        load,
        pairs=lambda settings: settings.mode == "pairwise",
        shared=lambda settings: settings.engine == "vllm",
        help="a language model as the judge: pointwise, pairwise in both orders, or beside a reference",
    )
}
