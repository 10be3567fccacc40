"""Datasets that models judged with distilabel and Prometheus: pairs rated again, generations with ratings, rubrics.

Each converter says where its shape was confirmed. The reasons that the judges wrote are left out.
"""

from typing import Any

from pipelines.converters.base import Converter, LeftOut, Policy, Record
from pipelines.converters.labels import compared, is_missing, judge, numbers_of, rated, some
from pipelines.converters.messages import (
    SYSTEM_FIELD,
    aligned,
    asked,
    facts,
    has,
    listed,
    number,
    show,
    text,
    texts,
    with_system,
)
from schemas.errors import Reject
from schemas.feedback import Row

# --- distilabel and Prometheus -----------------------------------------------------------------

_STATUS = {"tie": 0.5, "unchanged": 1.0, "swapped": 1.0}


def _orca(record: Record, source: str, policy: Policy) -> list[Row | LeftOut]:
    """Pairs that were rated again (https://huggingface.co/datasets/argilla/distilabel-intel-orca-dpo-pairs).

    `chosen` and `rejected` are in the order of the new ratings, of which the higher is chosen's; `status` says whether
    that order is new, or a tie. A pair without ratings has no label.
    """
    prompt = with_system(record, asked(record, "input"))
    first, second = texts(record, "chosen", "rejected")
    p, raw = _rated_again(record.get("status"), record.get("rating"))
    labeller, metadata = judge(record.get("labelling_model")), facts(record, "status", "in_gsm8k_train")
    return [*compared(prompt, first, second, p, policy, raw=raw, source=source, labeller=labeller, metadata=metadata)]


def _rated_again(status: Any, ratings: Any) -> tuple[float | None, tuple[float | None, float | None]]:
    if is_missing(status) or is_missing(ratings):
        return None, (None, None)
    given = listed(ratings, "rating")
    if len(given) != 2 or any(is_missing(value) for value in given):
        return None, (None, None)
    if not isinstance(status, str) or status not in _STATUS:
        raise Reject("invalid_label", f"status: {show(status)} is none of {', '.join(_STATUS)}")
    low, high = sorted(number(value, "rating[]") for value in given)
    if (low == high) != (status == "tie"):
        raise Reject("invalid_label", f"status is {status}, and the ratings are {high:g} and {low:g}")
    return _STATUS[status], (high, low)


def _generations(record: Record, source: str, policy: Policy) -> list[Row | LeftOut]:
    """Generations with ratings from 1 to 5, as distilabel's task UltraFeedback writes them
    (https://github.com/argilla-io/distilabel, `steps/tasks/ultrafeedback.py`).
    """
    prompt = asked(record, "instruction")
    responses, ratings = aligned(record, "generations", "ratings")
    models = record.get("generation_models") or record.get("model_names")
    names = models if isinstance(models, list) and len(models) == len(responses) else [None] * len(responses)
    labeller = judge(record.get("ultrafeedback_model") or record.get("model_name"))
    made: list[Row | LeftOut] = []
    for i, (response, rating) in enumerate(zip(responses, ratings, strict=True)):
        told: dict[str, Any] = {"source": source, "labeller": labeller, "metadata": facts({"model": names[i]}, "model")}
        try:
            said, where = text(response, f"generations[{i}]"), f"ratings[{i}]"
            made += rated(prompt, said, rating, where, 1, 5, policy, sentinels=("N/A",), **told)
        except Reject as error:
            made.append(LeftOut(f"generations[{i}]", error.reason, error.detail))
    return some(made, "there is no rating")


def _preference_collection(record: Record, source: str, policy: Policy) -> list[Row | LeftOut]:
    """Two responses, and GPT-4's preference for A or B under a rubric
    (https://huggingface.co/datasets/prometheus-eval/Preference-Collection).
    """
    prompt = asked(record, "orig_instruction")
    first, second = texts(record, "orig_response_A", "orig_response_B")
    said = record.get("orig_preference")
    if not is_missing(said) and said not in ("A", "B"):
        raise Reject("invalid_label", f"orig_preference: {show(said)} is neither A nor B")
    p = None if is_missing(said) else float(said == "A")
    raw = numbers_of(record, "orig_score_A", "orig_score_B")
    return [*compared(prompt, first, second, p, policy, raw=raw, source=source, labeller="judge:gpt-4")]


def _feedback_collection(record: Record, source: str, policy: Policy) -> list[Row | LeftOut]:
    """A response with GPT-4's score from 1 to 5 under a rubric
    (https://huggingface.co/datasets/prometheus-eval/Feedback-Collection).
    """
    prompt, (response,) = asked(record, "orig_instruction"), texts(record, "orig_response")
    given = record.get("orig_score")
    return [*rated(prompt, response, given, "orig_score", 1, 5, policy, source=source, labeller="judge:gpt-4")]


# --- all ---------------------------------------------------------------------------------------

CONVERTERS = [
    Converter(
        name="distilabel_orca",
        feedback="pairwise",
        matches=lambda r: has(r, "input", "chosen", "rejected", "status", "rating"),
        convert=_orca,
        fields={
            **SYSTEM_FIELD,
            "input": "prompt",
            "chosen, rejected": "responses",
            "status": "rewards: tie, or chosen is better; metadata",
            "rating": "raw_reward of each side, the higher is chosen's",
            "labelling_model": "labeller",
        },
        required=("input", "chosen", "rejected", "status"),
        labels="unchanged and swapped: chosen is better; tie: neither; without a rating there is no label",
    ),
    Converter(
        name="distilabel_ratings",
        feedback="scalar",
        matches=lambda r: has(r, "instruction", "generations", "ratings") and "chosen" not in r,
        convert=_generations,
        fields={
            "instruction": "prompt",
            "generations": "responses",
            "ratings": "rewards, from 1..5; raw_reward",
            "generation_models, model_names": "metadata: the model of each",
            "model_name, ultrafeedback_model": "labeller",
        },
        required=("instruction", "generations", "ratings"),
        labels="each from 1 to 5, more is better",
    ),
    Converter(
        name="preference_collection",
        feedback="pairwise",
        matches=lambda r: has(r, "orig_instruction", "orig_response_A", "orig_response_B", "orig_preference"),
        convert=_preference_collection,
        fields={
            "orig_instruction": "prompt",
            "orig_response_A, orig_response_B": "responses",
            "orig_preference": "rewards",
            "orig_score_A, orig_score_B": "raw_reward of each side",
        },
        required=("orig_instruction", "orig_response_A", "orig_response_B", "orig_preference"),
        labels="A or B is better",
    ),
    Converter(
        name="feedback_collection",
        feedback="scalar",
        matches=lambda r: has(r, "orig_instruction", "orig_response", "orig_score"),
        convert=_feedback_collection,
        fields={
            "orig_instruction": "prompt",
            "orig_response": "response",
            "orig_score": "reward, from 1..5; raw_reward",
        },
        required=("orig_instruction", "orig_response", "orig_score"),
        labels="from 1 to 5, more is better",
    ),
]
