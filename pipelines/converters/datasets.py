"""Public datasets of rankings, comparisons and ratings: Nectar and OpenHermesPreferences, PKU-SafeRLHF, WebGPT,
summaries with human feedback, RewardBench.

Each converter says where its shape was confirmed. Left out are web pages that were quoted, and everything that tells
who a person is: a person becomes a hash. Skywork-Reward is TRL's preference format.
"""

from collections.abc import Callable, Iterable
from itertools import product
from typing import Any, TypeVar

from pipelines.converters.base import Converter, LeftOut, Policy, Record
from pipelines.converters.labels import (
    Made,
    compared,
    each_objective,
    is_missing,
    objectives,
    person,
    preferred,
    ranked,
    rated,
    some,
    thumbed,
    yes,
)
from pipelines.converters.messages import (
    aligned,
    asked,
    conversation,
    facts,
    has,
    judged,
    listed,
    needed,
    pair,
    scaled,
    show,
    side,
    structure,
    text,
    texts,
    verdict,
)
from pipelines.converters.public import transcript_turns
from schemas.errors import Reject
from schemas.feedback import Message, Row

T = TypeVar("T")


# --- Nectar and other rankings -----------------------------------------------------------------


def _is_nectar(record: Record) -> bool:
    answers = record.get("answers")
    first = answers[0] if isinstance(answers, list) and answers else None
    ranks = isinstance(first, dict) and has(first, "answer", "rank")
    return has(record, "prompt", "answers") and (ranks or has(record, "num_responses", "turns"))


def _each(values: Iterable[T], where: str, read: Callable[[T, str], Any]) -> tuple[list[Any], list[LeftOut]]:
    """What `read(value, where)` makes of each value, and what of them could not be read."""
    found: list[Any] = []
    out: list[LeftOut] = []
    for i, value in enumerate(values):
        try:
            found.append(read(value, f"{where}[{i}]"))
        except Reject as error:
            out.append(LeftOut(f"{where}[{i}]", error.reason, error.detail))
    return found, out


def _nectar(record: Record, source: str, policy: Policy) -> list[Row | LeftOut]:
    """Seven answers ranked by GPT-4, 1 is best (https://huggingface.co/datasets/berkeley-nest/Nectar).

    The prompt is a transcript in the manner of HH-RLHF that ends with "Assistant:". Which model gave an answer is
    left out.
    """
    prompt = _open_transcript(text(needed(record, "prompt"), "prompt"))
    entries, out = _each(listed(needed(record, "answers"), "answers"), "answers", _ranked_answer)
    sources = record.get("source")
    plain = isinstance(sources, list) and all(isinstance(s, str) for s in sources) and bool(sources)
    metadata = facts(record, "turns", "num_responses", "good_natured") | ({"source": sources} if plain else {})
    return _with(out, prompt, entries, policy, source=source, labeller="judge:gpt-4", metadata=metadata)


def _open_transcript(prompt: str) -> list[Message]:
    """The turns of a transcript, without the "Assistant:" at its end that waits for the answer."""
    if "\n\nHuman:" not in prompt and not prompt.startswith("Human:"):
        return conversation(prompt, "prompt")
    turns = transcript_turns(prompt, "prompt")
    if turns[-1]["role"] == "assistant":
        if turns[-1]["content"].strip():
            raise Reject("wrong_shape", f"prompt ends in an answer of its own: {show(turns[-1]['content'])}")
        turns.pop()
    return turns


def _ranked_answer(value: Any, where: str) -> tuple[str, Any]:
    given = structure(value, where)
    return text(needed(given, "answer", f"{where}."), f"{where}.answer"), given.get("rank")


def _openhermes(record: Record, source: str, policy: Policy) -> list[Row | LeftOut]:
    """Responses ranked by PairRM, 1 is best (https://huggingface.co/datasets/argilla/OpenHermesPreferences).

    All that were ranked are read; `chosen` and `rejected` are two of them.
    """
    responses, ranks = aligned(record, "candidates_completions", "ranks")
    entries, out = _each(zip(responses, ranks, strict=True), "candidates_completions", _entry)
    metadata = facts(record, "source", "category")
    labeller = "model:llm-blender/PairRM"
    return _with(out, asked(record, "prompt"), entries, policy, source=source, labeller=labeller, metadata=metadata)


def _entry(value: tuple[Any, Any], where: str) -> tuple[str, Any]:
    return text(value[0], where), value[1]


def _with(
    out: list[LeftOut], prompt: list[Message], entries: list[tuple[str, Any]], policy: Policy, **facts: Any
) -> list[Row | LeftOut]:
    """The rows of ranked responses and what was left out before; `Reject` where nothing could be used."""
    if not entries:
        return some([*out], "there is no response")
    return [*out, *ranked(prompt, entries, policy, lower_is_better=True, **facts)]


# --- PKU-SafeRLHF ------------------------------------------------------------------------------

_PKU = {"helpful": "better_response_id", "safe": "safer_response_id"}


def _pku(record: Record, source: str, policy: Policy) -> list[Row | LeftOut]:
    """Two comparisons of one pair: which response is more helpful, and which is safer.

    Shape: https://huggingface.co/datasets/PKU-Alignment/PKU-SafeRLHF; with `better_response_id` alone, which weighs
    both, PKU-SafeRLHF-single-dimension. The two often contradict each other, so that each has a source of its own
    unless one is asked for. Whether each response is safe by itself is a binary label, read only if the objective is
    `is_safe`, and metadata otherwise. Derived files have ids of -1, for neither.
    """
    prompt, (first, second) = asked(record, "prompt"), texts(record, "response_0", "response_1")
    if policy.objective == "is_safe":
        return _safe_each(record, prompt, (first, second), source, policy)
    names = [name for name, key in _PKU.items() if key in record]
    metadata = facts(record, *(f"is_response_{k}_safe" for k in (0, 1)))
    metadata |= facts(record, *(f"response_{k}_{what}" for k in (0, 1) for what in ("severity_level", "source")))
    made: list[Row | LeftOut] = []
    for name in objectives(names, policy):
        own = f"{source}:{name}" if policy.objective == "all" and len(names) > 1 else source
        try:
            p = _first_by_id(record[_PKU[name]], _PKU[name])
            made += compared(prompt, first, second, p, policy, source=own, labeller="human", metadata=metadata)
        except Reject as error:
            made.append(LeftOut(name, error.reason, error.detail))
    return some(made)


def _first_by_id(value: Any, where: str) -> float | None:
    return None if is_missing(value, (-1,)) else 1.0 - verdict(value, where)


def _safe_each(
    record: Record, prompt: list[Message], responses: tuple[str, str], source: str, policy: Policy
) -> list[Row | LeftOut]:
    made: list[Row | LeftOut] = []
    for k, response in enumerate(responses):
        name = f"is_response_{k}_safe"
        try:
            metadata = facts(record, f"response_{k}_severity_level", f"response_{k}_source")
            made += thumbed(prompt, response, record.get(name), name, policy, source=source, metadata=metadata)
        except Reject as error:
            made.append(LeftOut(name, error.reason, error.detail))
    return some(made)


def _safety(record: Record, source: str, policy: Policy) -> list[Row | LeftOut]:
    """A response and whether it is safe (https://huggingface.co/datasets/PKU-Alignment/PKU-SafeRLHF-QA).

    People and models labelled together: no labeller.
    """
    metadata = facts(record, "severity_level", "prompt_source", "response_source")
    prompt, (response,) = asked(record, "prompt"), texts(record, "response")
    return [*thumbed(prompt, response, record.get("is_safe"), "is_safe", policy, source=source, metadata=metadata)]


# --- WebGPT ------------------------------------------------------------------------------------


def _webgpt(record: Record, source: str, policy: Policy) -> list[Row | LeftOut]:
    """Two answers with scores from -1 to 1 that sum to 0 (https://huggingface.co/datasets/openai/webgpt_comparisons).

    The numbers in brackets in an answer point to quotes of web pages, which the prompt does not hold.
    """
    question = needed(record, "question")
    about = question if isinstance(question, dict) else {"full_text": question}
    prompt = conversation(text(needed(about, "full_text", "question."), "question.full_text"), "question")
    first, second = texts(record, "answer_0", "answer_1")
    p, raw = _opposed(record, policy)
    metadata = facts(about, "dataset", "id")
    return [*compared(prompt, first, second, p, policy, raw=raw, source=source, labeller="human", metadata=metadata)]


def _opposed(record: Record, policy: Policy) -> tuple[float | None, tuple[float | None, float | None]]:
    names = ("score_0", "score_1")
    if any(is_missing(record.get(name)) for name in names):
        return None, (None, None)
    first, second = (scaled(record[name], name, -1, 1)[0] for name in names)
    if abs(first + second) > 1e-6:
        raise Reject("invalid_label", f"score_0 {first:g} and score_1 {second:g} do not sum to 0")
    return preferred(first, 1, -1, policy), (first, second)


# --- summaries with human feedback -------------------------------------------------------------

_AXES = ("overall", "accuracy", "coverage", "coherence")


def _summaries(record: Record, source: str, policy: Policy) -> list[Row | LeftOut]:
    """Two summaries and which is better (https://github.com/openai/summarize-from-feedback, "Comparisons").

    How sure the worker was is metadata: the published scale does not say which end is which summary.
    """
    info = structure(needed(record, "info"), "info")
    summaries = [structure(s, "summaries[]") for s in listed(needed(record, "summaries"), "summaries")]
    if len(summaries) != 2:
        raise Reject("wrong_shape", f"summaries holds {len(summaries)} summaries, not two")
    first, second = (text(needed(s, "text", "summaries[]."), "summaries[].text") for s in summaries)
    chosen, extra = yes(record.get("choice"), "choice"), record.get("extra")
    metadata = _about(record, info) | (facts(extra, "confidence") if isinstance(extra, dict) else {})
    models = [s.get("policy") for s in summaries]
    metadata |= {"policies": models} if all(isinstance(m, str) for m in models) else {}
    p = None if chosen is None else 1 - chosen
    told: dict[str, Any] = {"source": source, "labeller": person(record.get("worker")), "metadata": metadata}
    return [*compared(_document(info), first, second, p, policy, **told)]


def _about(record: Record, info: Record) -> dict[str, Any]:
    return facts(info, "id", "subreddit", "site") | facts(record, "batch", "split")


def _document(info: Record) -> list[Message]:
    """What the models were asked: the query formats of `tldr_task` and `cnndm_task` in
    https://github.com/openai/summarize-from-feedback/blob/master/summarize_from_feedback/utils/experiment_helpers.py.
    """
    name = "post" if info.get("article") is None else "article"
    body = text(needed(info, name, "info."), f"info.{name}")
    if not body.strip():
        raise Reject("empty_prompt", f"info.{name} is blank")
    if name == "article":
        return conversation(f"Article:\n{body}\n\nTL;DR:\n", "info")
    heads = {"SUBREDDIT: r/": info.get("subreddit"), "TITLE: ": info.get("title"), "POST: ": body}
    lines = [f"{head}{text(told, 'info')}\n\n" for head, told in heads.items() if told is not None]
    return conversation("".join(lines) + "TL;DR:", "info")


def _is_axes(record: Record) -> bool:
    summary = record.get("summary")
    return has(record, "info", "summary") and (summary is None or (isinstance(summary, dict) and "axes" in summary))


def _axes(record: Record, source: str, policy: Policy) -> list[Row | LeftOut]:
    """A summary rated from 1 to 7 on several axes (https://github.com/openai/summarize-from-feedback, "Axis evals").

    Each axis that has a rating is an objective with a source of its own, unless one is asked for; the ratings of all
    are metadata.
    """
    info, summary = (structure(needed(record, name), name) for name in ("info", "summary"))
    axes = structure(needed(summary, "axes", "summary."), "summary.axes")
    response = text(needed(summary, "text", "summary."), "summary.text")
    names = [name for name in _AXES if name == "overall" or not is_missing(axes.get(name))]
    metadata = _about(record, info) | facts(summary, "policy") | facts(axes, *_AXES)
    told: dict[str, Any] = {"labeller": person(record.get("worker")), "metadata": metadata}

    def make(name: str, source: str) -> Made:
        where = f"axes.{name}"
        return [*rated(_document(info), response, axes.get(name), where, 1, 7, policy, source=source, **told)]

    return each_objective(names, source, policy, make)


# --- RewardBench -------------------------------------------------------------------------------

_MODELS = ("chosen_model", "rejected_model")


def _is_bench(record: Record) -> bool:
    known = has(record, "prompt", "chosen", "rejected", "subset", *_MODELS)
    return known and not judged(record, "chosen", "rejected", *_MODELS)


def _bench(record: Record, source: str, policy: Policy) -> list[Row | LeftOut]:
    """A pair of a benchmark for reward models (https://huggingface.co/datasets/allenai/reward-bench).

    Its subsets were labelled in many ways: no labeller.
    """
    prompt = conversation(needed(record, "prompt"), "prompt")
    chosen, rejected = (side(needed(record, name), name) for name in ("chosen", "rejected"))
    metadata = facts(record, "id", "subset", *_MODELS)
    return [*compared(*pair(prompt, chosen, rejected), 1.0, policy, source=source, metadata=metadata)]


def _bench2(record: Record, source: str, policy: Policy) -> list[Row | LeftOut]:
    """Right and wrong completions of a prompt (https://huggingface.co/datasets/allenai/reward-bench-2).

    Each right one is compared with each wrong one. The right ones of the subset Ties are not compared with each
    other: that they are equally good is not what the records say of each pair.
    """
    prompt = conversation(needed(record, "prompt"), "prompt")
    right, wrong = (listed(needed(record, name), name) for name in ("chosen", "rejected"))
    if not right or not wrong:
        raise Reject("missing_field", f"chosen holds {len(right)} completions and rejected {len(wrong)}")
    metadata = facts(record, "id", "subset", "num_correct")
    made: list[Row | LeftOut] = []
    for (i, better), (j, worse) in product(enumerate(right), enumerate(wrong)):
        try:
            first, second = text(better, f"chosen[{i}]"), text(worse, f"rejected[{j}]")
            made += compared(prompt, first, second, 1.0, policy, source=source, metadata=metadata)
        except Reject as error:
            made.append(LeftOut(f"chosen[{i}] against rejected[{j}]", error.reason, error.detail))
    return some(made)


# --- all ---------------------------------------------------------------------------------------

_RANKS = "1 is best; rank_as says whether ranks become scores or comparisons"

CONVERTERS = [
    Converter(
        name="nectar",
        feedback="scalar",
        matches=_is_nectar,
        convert=_nectar,
        fields={
            "prompt": "prompt, a transcript",
            "answers[].answer": "response",
            "answers[].rank": "reward; raw_reward",
            "turns, num_responses, good_natured, source": "metadata",
        },
        required=("prompt", "answers"),
        labels=_RANKS,
    ),
    Converter(
        name="openhermes_preferences",
        feedback="scalar",
        matches=lambda r: has(r, "prompt", "candidates_completions", "ranks"),
        convert=_openhermes,
        fields={
            "prompt": "prompt",
            "candidates_completions": "responses",
            "ranks": "rewards; raw_reward",
            "source, category": "metadata",
        },
        required=("prompt", "candidates_completions", "ranks"),
        labels=_RANKS,
    ),
    Converter(
        name="pku_safe_rlhf",
        feedback="pairwise",
        matches=lambda r: has(r, "prompt", "response_0", "response_1") and any(key in r for key in _PKU.values()),
        convert=_pku,
        fields={
            "prompt": "prompt",
            "response_0, response_1": "responses",
            "better_response_id": "rewards of the objective helpful",
            "safer_response_id": "rewards of the objective safe",
            "is_response_0_safe, is_response_1_safe": "metadata; binary rewards if the objective is is_safe",
        },
        required=("prompt", "response_0", "response_1"),
        telling=("better_response_id", lambda n: n == 0),
        labels="the id of the better response, 0 or 1; -1 is no label; objectives: helpful, safe, and apart is_safe",
    ),
    Converter(
        name="safety_labels",
        feedback="binary",
        matches=lambda r: has(r, "prompt", "response", "is_safe") and not judged(r, "is_safe"),
        convert=_safety,
        fields={
            "prompt": "prompt",
            "response": "response",
            "is_safe": "reward: 1 or 0",
            "severity_level, prompt_source, response_source": "metadata",
        },
        required=("prompt", "response", "is_safe"),
        telling=("is_safe", lambda n: n == 0),
        labels="true is safe",
    ),
    Converter(
        name="webgpt",
        feedback="pairwise",
        matches=lambda r: has(r, "question", "answer_0", "answer_1", "score_0", "score_1"),
        convert=_webgpt,
        fields={
            "question.full_text": "prompt",
            "answer_0, answer_1": "responses",
            "score_0, score_1": "rewards; raw_reward of each side",
            "question.dataset, question.id": "metadata",
        },
        required=("question", "answer_0", "answer_1", "score_0", "score_1"),
        labels="from -1 to 1, opposite; the higher is better, 0 is a tie; strength decides if degrees count",
    ),
    Converter(
        name="summary_comparisons",
        feedback="pairwise",
        matches=lambda r: has(r, "info", "summaries", "choice"),
        convert=_summaries,
        fields={
            "info.post, info.article, info.title, info.subreddit": "prompt",
            "summaries[].text": "responses",
            "choice": "rewards",
            "worker": "labeller, as a hash",
            "info.id, summaries[].policy, batch, split, extra.confidence": "metadata",
        },
        required=("info", "summaries", "choice"),
        telling=("choice", lambda n: n == 0),
        labels="the index of the better summary, 0 or 1",
    ),
    Converter(
        name="summary_axes",
        feedback="scalar",
        matches=_is_axes,
        convert=_axes,
        fields={
            "info.post, info.article, info.title, info.subreddit": "prompt",
            "summary.text": "response",
            "summary.axes": "reward of the objectives overall, accuracy, coverage and coherence; metadata",
            "worker": "labeller, as a hash",
            "info.id, summary.policy, batch, split": "metadata",
        },
        required=("info", "summary"),
        labels="each from 1 to 7, more is better",
    ),
    Converter(
        name="rewardbench2",
        feedback="pairwise",
        matches=lambda r: has(r, "prompt", "chosen", "rejected", "num_correct"),
        convert=_bench2,
        fields={
            "prompt": "prompt",
            "chosen": "responses with reward 1",
            "rejected": "responses with reward 0",
            "id, subset, num_correct": "metadata",
        },
        required=("prompt", "chosen", "rejected"),
        labels="each of chosen is better than each of rejected",
    ),
    Converter(
        name="rewardbench",
        feedback="pairwise",
        matches=_is_bench,
        convert=_bench,
        fields={
            "prompt": "prompt",
            "chosen": "response with reward 1",
            "rejected": "response with reward 0",
            "id, subset, chosen_model, rejected_model": "metadata",
        },
        required=("prompt", "chosen", "rejected"),
        labels="chosen is better than rejected",
    ),
]
