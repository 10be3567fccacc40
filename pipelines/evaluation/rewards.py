"""What labellers say of answers: a reward for each, or who is better of two.

A labeller of `una label`; its scores are raw, before any calibration. Its cache is that of the evaluation.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa

from pipelines.evaluation.answers import Answer
from pipelines.evaluation.statistics import Comparisons
from pipelines.label import Voice, outcomes
from pipelines.labellers.base import Item, Outcome, Score
from pipelines.labellers.cache import Cache
from schemas.errors import Reject

log = logging.getLogger(__name__)
REWARDS = pa.schema(
    [
        ("labeller", pa.string()),
        ("model", pa.string()),
        ("question", pa.string()),
        ("turn", pa.int32()),
        ("sample", pa.int32()),
        ("reward", pa.float64()),
        ("facts", pa.string()),
        ("reason", pa.string()),
        ("detail", pa.string()),
    ]
)
COMPARED = pa.schema(
    [
        *[REWARDS.field(name) for name in ("labeller", "model")],
        ("against", pa.string()),
        *[REWARDS.field(name) for name in ("question", "turn", "sample")],
        ("p", pa.float64()),  # that the model's response is better than the other's
        *[REWARDS.field(name) for name in ("facts", "reason", "detail")],
    ]
)


@dataclass(frozen=True)
class Rewarded:
    """An answer, or two that were compared, and what a labeller said."""

    answer: Answer
    other: Answer | None
    outcome: Score | Reject

    def row(self, **names: str) -> dict[str, Any]:
        question, turn, sample = self.answer.place
        told: dict[str, Any] = {"question": question, "turn": turn, "sample": sample}
        if isinstance(self.outcome, Reject):
            return {**names, **told, "reason": self.outcome.reason, "detail": self.outcome.detail}
        facts = orjson.dumps(dict(self.outcome.facts), default=str).decode()
        return {**names, **told, ("p" if self.other else "reward"): self.outcome.value, "facts": facts}


def load(voice: Voice, cache: Path) -> Any:
    return voice.load(voice.settings, Cache(cache))


def _outcomes(label: Any, items: Sequence[Item], voice: Voice) -> list[Outcome]:
    done = iter(range(1, len(items) + 1))

    def tell() -> None:
        if (n := next(done)) % 100 == 0 or n == len(items):
            log.info("%s: %d of %d", voice.identity.labeller, n, len(items))

    return outcomes(label, items, voice, tell)


def of_answers(label: Any, voice: Voice, answers: Sequence[Answer]) -> list[Rewarded]:
    """The reward of every answer; one that there is not has none, for its reason."""
    there = [answer for answer in answers if answer.response is not None]
    items = [Item(answer.prompt, (answer.response or "",), answer.question.about(answer.turn)) for answer in there]
    found = dict(zip(map(id, there), _outcomes(label, items, voice), strict=True))
    return [Rewarded(answer, None, found.get(id(answer)) or _lacking(answer)) for answer in answers]


def compared(label: Any, voice: Voice, first: Sequence[Answer], second: Sequence[Answer]) -> list[Rewarded]:
    """Who is better, the first model or the second: sample by sample, on the first turns, where prompts are equal."""
    others = {answer.place: answer for answer in second}
    pairs = [(a, others[a.place]) for a in first if a.turn == 0 and a.place in others]
    there = [(a, b) for a, b in pairs if a.response is not None and b.response is not None]
    items = [Item(a.prompt, (a.response or "", b.response or ""), a.question.about(0)) for a, b in there]
    found = dict(zip([id(a) for a, _ in there], _outcomes(label, items, voice), strict=True))
    return [Rewarded(a, b, found.get(id(a)) or _lacking(a if a.why else b)) for a, b in pairs]


def _lacking(answer: Answer) -> Reject:
    assert answer.why is not None
    return answer.why


def comparisons(found: Sequence[Rewarded]) -> Comparisons:
    """Those that were judged, as numbers."""
    judged = [one for one in found if isinstance(one.outcome, Score) and one.other]
    longer = [len(one.answer.response or "") - len(one.other.response or "") for one in judged if one.other]
    number = {q: i for i, q in enumerate(dict.fromkeys(one.answer.question.id for one in judged))}
    return Comparisons(
        np.array([one.outcome.value for one in judged if isinstance(one.outcome, Score)], float),
        np.array(longer, float),
        np.array([number[one.answer.question.id] for one in judged], int),
    )
