"""Public feedback datasets in their own shapes: HH-RLHF, UltraFeedback and its pairs, HelpSteer.

Each converter says where its shape was confirmed. Of what a record holds beside prompt, response and
reward, only small facts go to the metadata; judges' rationales do not.
"""

import re
from collections.abc import Mapping
from fractions import Fraction
from functools import lru_cache
from typing import Any

from pipelines.converters.base import HELPSTEER_ATTRIBUTES, Converter, LeftOut, Policy, Record
from pipelines.converters.labels import compared, some
from pipelines.converters.messages import (
    SYSTEM_FIELD,
    conversation,
    facts,
    has,
    needed,
    number,
    pair,
    scaled,
    show,
    side,
    text,
    with_system,
)
from schemas.errors import Reject
from schemas.feedback import Message, Row, comparison, score

# --- HH-RLHF -----------------------------------------------------------------------------------

_SPEAKERS = {"Human": "user", "User": "user", "Assistant": "assistant"}
_SPEAKER = re.compile(r"(?:\A|\n\n)(Human|Assistant):")


def _is_hh(record: Record) -> bool:
    if "prompt" in record or not has(record, "chosen", "rejected"):
        return False
    return any(isinstance(s, str) and _SPEAKER.match(s) for s in (record["chosen"], record["rejected"]))


def _hh(record: Record, source: str, policy: Policy) -> list[Row | LeftOut]:
    """Two transcripts; the last assistant turn of each is the response (https://github.com/anthropics/hh-rlhf).

    One space after "Human:" or "Assistant:" is taken off, and nothing else is changed; two turns of
    one speaker in a row stay two turns.
    """
    chosen, rejected = (transcript_turns(text(needed(record, name), name), name) for name in ("chosen", "rejected"))
    prompt, first, second = pair([], chosen, rejected)
    return [*comparison(prompt, first, second, 1.0, source=source, labeller="human")]


def transcript_turns(transcript: str, where: str) -> list[Message]:
    before, *spoken = _SPEAKER.split(transcript)
    if before.strip():
        raise Reject("wrong_shape", f"{where}: {show(before)} stands before the first 'Human:' or 'Assistant:'")
    turns = zip(spoken[::2], spoken[1::2], strict=True)
    return [Message(role=_SPEAKERS[who], content=said.removeprefix(" ")) for who, said in turns]


# --- UltraFeedback -----------------------------------------------------------------------------


def _ultrafeedback(record: Record, source: str, policy: Policy) -> list[Row | LeftOut]:
    """One scalar row a completion, rated by GPT-4 (https://github.com/OpenBMB/UltraFeedback).

    `custom_system_prompt` was how the data set got varied completions, not what the user asked: it goes to
    the metadata, so that the completions of an instruction share their prompt.
    """
    prompt = conversation(text(needed(record, "instruction"), "instruction"), "instruction")
    completions = needed(record, "completions")
    if not isinstance(completions, list):
        raise Reject("wrong_type", f"completions: expected a list, got {show(completions)}")
    if not completions:
        raise Reject("missing_field", "completions is empty")
    made: list[Row | LeftOut] = []
    for i, completion in enumerate(completions):
        try:
            made += _rated(prompt, completion, facts(record, "source"), source, policy)
        except Reject as error:
            made.append(LeftOut(f"completions[{i}]", error.reason, error.detail))
    return some(made, "no completion could be used")


def _rated(prompt: list[Message], completion: Any, about: dict[str, Any], source: str, policy: Policy) -> list[Row]:
    if not isinstance(completion, dict):
        raise Reject("wrong_type", f"expected a completion, got {show(completion)}")
    response = text(needed(completion, "response"), "response")
    name = policy.ultrafeedback_score
    given = needed(completion, name)
    if name == "overall_score":
        raw, reward = scaled(given, name, 1, 10)
        reward = _misread_ten(completion) if raw == 10 else reward
    else:
        raw, reward = scaled(given, name, 1, 5)
    told = facts(completion, "model", "principle", "custom_system_prompt", "overall_score", "fine-grained_score")
    metadata = about | told | _ratings(completion.get("annotations"))
    return score(prompt, response, reward, source=source, raw_reward=raw, labeller="judge:gpt-4", metadata=metadata)


def _misread_ten(completion: Record) -> float:
    """The reward for an `overall_score` of 10, which was often a misread 1 (see the repository's "Update").

    Decided as its authors did, by the fine-grained score (1..5): above 4 it is a 10, up to 2 it is a 1.
    Between them they asked the judge again; here it is rejected.
    """
    fine = number(needed(completion, "fine-grained_score"), "fine-grained_score")
    if 2 < fine <= 4:
        raise Reject("invalid_label", f"overall_score 10 with fine-grained_score {fine:g} may be a misread 1")
    return 1.0 if fine > 4 else 0.0


def _ratings(annotations: Any) -> dict[str, int]:
    """Aspect → rating from 1 to 5, of the aspects that have one; "N/A" is left out."""
    told = annotations if isinstance(annotations, dict) else {}
    aspects = ("instruction_following", "honesty", "truthfulness", "helpfulness")
    ratings = {name: told[name].get("Rating") for name in aspects if isinstance(told.get(name), dict)}
    return {name: int(given) for name, given in ratings.items() if given in ("1", "2", "3", "4", "5", 1, 2, 3, 4, 5)}


# --- pairs made from UltraFeedback -------------------------------------------------------------

_RATINGS = (
    ("score_chosen", "score_rejected"),
    ("chosen-rating", "rejected-rating"),
    ("chosen_rating", "rejected_rating"),
    ("rating_chosen", "rating_rejected"),
    ("chosen_avg_rating", "rejected_avg_rating"),
)


def _ratings_of(record: Record) -> tuple[str, str] | None:
    return next((names for names in _RATINGS if has(record, *names)), None)


def _binarized(record: Record, source: str, policy: Policy) -> list[Row | LeftOut]:
    """Whole conversations with the judge's score of each side.

    Shape: https://huggingface.co/datasets/HuggingFaceH4/ultrafeedback_binarized; with `chosen-rating` and
    `rejected-rating`: https://huggingface.co/datasets/argilla/ultrafeedback-binarized-preferences-cleaned.
    """
    prompt = conversation(needed(record, "prompt"), "prompt") if "prompt" in record else []
    chosen, rejected = (side(needed(record, name), name) for name in ("chosen", "rejected"))
    turns, first, second = pair(prompt, chosen, rejected)
    return _judged(record, with_system(record, turns), first, second, source, policy)


def _argilla(record: Record, source: str, policy: Policy) -> list[Row | LeftOut]:
    """One instruction and two texts; ratings are used where the file has them.

    Shape: https://huggingface.co/datasets/argilla/ultrafeedback-binarized-preferences.
    """
    prompt = conversation(text(needed(record, "instruction"), "instruction"), "instruction")
    first, second = (text(needed(record, name), name) for name in ("chosen_response", "rejected_response"))
    return _judged(record, with_system(record, prompt), first, second, source, policy)


def _judged(
    record: Record, prompt: list[Message], first: str, second: str, source: str, policy: Policy
) -> list[Row | LeftOut]:
    names = _ratings_of(record)
    chosen, rejected = (number(needed(record, name), name) for name in names) if names else (None, None)
    metadata = facts(record, "prompt_id", "source", "chosen_model", "chosen-model", "rejected_model", "rejected-model")
    p_first, raw = _p_chosen(chosen, rejected), (chosen, rejected)
    about: dict[str, Any] = {"source": source, "labeller": "judge:gpt-4", "metadata": metadata}
    return [*compared(prompt, first, second, p_first, policy, raw=raw, **about)]


def _p_chosen(chosen: float | None, rejected: float | None) -> float:
    """The probability that chosen is better: 1, or .5 for equal ratings."""
    if chosen is None or rejected is None or chosen > rejected:
        return 1.0
    if chosen < rejected:
        raise Reject("invalid_label", f"chosen is rated {chosen:g} and rejected {rejected:g}")
    return 0.5


# --- HelpSteer ---------------------------------------------------------------------------------

_MARKER = re.compile(r"(?:\A|\n)<extra_id_1>(User|Assistant)(?:\n|\Z)")


def _helpsteer(record: Record, source: str, policy: Policy) -> list[Row | LeftOut]:
    """Five attributes from 0 to 4, weighed into one score (https://huggingface.co/datasets/nvidia/HelpSteer2).

    The reward is Σ weight·attribute, mapped from the range that the weights allow to [0, 1]; with the weights
    of UNA (arXiv 2408.15339) that is (.65·helpfulness + .8·correctness + .45·coherence) / 7.6. A weight
    below zero says that less is better, as it may for verbosity.
    """
    prompt = marked(text(needed(record, "prompt"), "prompt"))
    response = text(needed(record, "response"), "response")
    attributes = {name: _attribute(needed(record, name), name) for name in HELPSTEER_ATTRIBUTES}
    raw, reward = weighed(attributes, policy.helpsteer_weights)
    return [*score(prompt, response, reward, source=source, raw_reward=raw, labeller="human", metadata=attributes)]


def weighed(attributes: Mapping[str, float], weights: Mapping[str, float]) -> tuple[float, float]:
    """The weighted sum of attributes from 0 to 4, and its place in [0, 1]; exact: .65, .8 and .45 add up to 1.9."""
    return _weighed(tuple((attributes[name], weight) for name, weight in weights.items()))


@lru_cache(maxsize=8192)  # few ratings differ, and fractions are slow
def _weighed(given: tuple[tuple[float, float], ...]) -> tuple[float, float]:
    exact = [(Fraction(str(value)), Fraction(str(weight))) for value, weight in given]
    raw = sum((value * weight for value, weight in exact), Fraction())
    low = 4 * sum((weight for _, weight in exact if weight < 0), Fraction())
    high = 4 * sum((weight for _, weight in exact if weight > 0), Fraction())
    return float(raw), float((raw - low) / (high - low))


def _attribute(value: Any, name: str) -> int:
    given, _ = scaled(value, name, 0, 4)
    if not given.is_integer():
        raise Reject("invalid_label", f"{name}: {show(value)} is not a whole number")
    return int(given)


def marked(prompt: str) -> list[Message]:
    """The turns of a prompt; a line `<extra_id_1>User` or `<extra_id_1>Assistant` begins the next turn.

    The first turn is the user's and has no marker. Confirmed by the turn templates in
    https://github.com/NVIDIA/NeMo-Aligner/blob/main/examples/nlp/data/steerlm/common.py, into
    which preprocess_helpsteer2_data.py puts the prompt as one turn.
    """
    first, *rest = _MARKER.split(prompt) if "<extra_id_1>" in prompt else [prompt]
    turns = [("User", first), *zip(rest[::2], rest[1::2], strict=True)]
    return [Message(role=_SPEAKERS[who], content=said) for who, said in turns if said]


_BETTER = {"chosen": "response with reward 1", "rejected": "response with reward 0"}
_RATED = "equal ratings are a tie (dropped, or .5 by --ties half)"

CONVERTERS = [
    Converter(
        name="helpsteer",
        feedback="scalar",
        matches=lambda r: has(r, "prompt", "response", *HELPSTEER_ATTRIBUTES),
        convert=_helpsteer,
        fields={
            "prompt": "prompt, split into turns at <extra_id_1>",
            "response": "response",
            **dict.fromkeys(HELPSTEER_ATTRIBUTES, "reward, by its weight; metadata"),
        },
        required=("prompt", "response", *HELPSTEER_ATTRIBUTES),
        labels="each attribute from 0 to 4; weighed by helpsteer_weights, whose sign says if more is better",
    ),
    Converter(
        name="ultrafeedback",
        feedback="scalar",
        matches=lambda r: has(r, "instruction", "completions"),
        convert=_ultrafeedback,
        fields={
            "instruction": "prompt",
            "completions[].response": "response",
            "completions[].fine-grained_score": "reward, from 1..5; or metadata",
            "completions[].overall_score": "metadata; or reward, from 1..10",
            "completions[].model, principle, custom_system_prompt": "metadata",
            "completions[].annotations": "metadata: the rating of each aspect",
            "source": "metadata",
        },
        required=("instruction", "completions"),
        labels="more is better; ultrafeedback_score chooses the score",
    ),
    Converter(
        name="ultrafeedback_binarized",
        feedback="pairwise",
        matches=lambda r: has(r, "chosen", "rejected") and _ratings_of(r) is not None,
        convert=_binarized,
        fields={
            "prompt": "prompt; if absent, the turns before the last of chosen and rejected",
            **_BETTER,
            **SYSTEM_FIELD,
            "score_chosen, score_rejected": "raw_reward of each side",
            "prompt_id": "metadata",
        },
        required=("chosen", "rejected", tuple(names[0] for names in _RATINGS)),
        labels=f"chosen is better than rejected; {_RATED}",
    ),
    Converter(
        name="argilla_ultrafeedback",
        feedback="pairwise",
        matches=lambda r: has(r, "instruction", "chosen_response", "rejected_response"),
        convert=_argilla,
        fields={
            "instruction": "prompt",
            "chosen_response": "response with reward 1",
            "rejected_response": "response with reward 0",
            **SYSTEM_FIELD,
            "chosen_avg_rating, rejected_avg_rating": "raw_reward of each side, also without avg_",
            "source, chosen_model": "metadata",
        },
        required=("instruction", "chosen_response", "rejected_response"),
        labels=f"chosen is better than rejected; {_RATED}",
    ),
    Converter(
        name="hh_rlhf",
        feedback="pairwise",
        matches=_is_hh,
        convert=_hh,
        fields={name: f"prompt: the turns before the last; {what}" for name, what in _BETTER.items()},
        required=("chosen", "rejected"),
        labels="chosen is better than rejected",
    ),
]
