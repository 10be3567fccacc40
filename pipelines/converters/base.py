"""What a converter is, the policies it is given, and how a file's format is told from its records."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from schemas.errors import UsageError
from schemas.feedback import Row

HELPSTEER_ATTRIBUTES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
# HelpSteer2 attributes as weighed in UNA (arXiv 2408.15339): the score is the weighted sum over its maximum, 4·1.9.
PAPER_WEIGHTS = {"helpfulness": 0.65, "correctness": 0.8, "coherence": 0.45}


@dataclass(frozen=True)
class Policy:
    """Every choice a conversion makes; stored in the manifest and printed in the summary."""

    ties: str = "drop"  # drop: rejected as `tie`; half: kept with rewards .5 and .5
    helpsteer_weights: Mapping[str, float] = field(default_factory=lambda: dict(PAPER_WEIGHTS))
    ultrafeedback_score: str = "fine-grained_score"  # or overall_score, whose 10 is often a misread 1

    def __post_init__(self) -> None:
        if self.ties not in ("drop", "half"):
            raise UsageError(f"--ties {self.ties}: valid are drop and half")
        if self.ultrafeedback_score not in ("fine-grained_score", "overall_score"):
            raise UsageError(
                f"ultrafeedback_score {self.ultrafeedback_score}: valid are fine-grained_score and overall_score"
            )
        unknown = [name for name in self.helpsteer_weights if name not in HELPSTEER_ATTRIBUTES]
        if unknown:
            raise UsageError(f"helpsteer_weights: unknown {unknown[0]}; valid are {', '.join(HELPSTEER_ATTRIBUTES)}")
        weights = self.helpsteer_weights.values()
        if not any(weights) or not all(math.isfinite(w) for w in weights):
            raise UsageError("helpsteer_weights: give finite weights, at least one of them not zero")


@dataclass(frozen=True)
class LeftOut:
    """A part of an accepted record that could not become a row, such as one completion of four."""

    part: str
    reason: str
    detail: str


Record = dict[str, Any]


@dataclass(frozen=True)
class Converter:
    """A format: how to know a record of it, and how to turn one into rows.

    `convert(record, source, policy)` returns the record's rows, or raises `Reject`.
    """

    name: str
    feedback: str  # the row type(s) it makes, for people
    matches: Callable[[Record], bool]
    convert: Callable[[Record, str, Policy], list[Row | LeftOut]]
    fields: Mapping[str, str]  # field of the record → what it becomes, for `una inspect`
    required: tuple[str, ...]  # the fields without which a record is not of this format
    labels: str = ""  # what the labels mean and their sign


def detect(records: Iterable[Record], converters: Mapping[str, Converter]) -> Counter[str]:
    """Name → number of records whose first matching converter it is; what matches none is counted under ''."""
    found: Counter[str] = Counter()
    for record in records:
        found[next((c.name for c in converters.values() if c.matches(record)), "")] += 1
    return found


def nearest(record: Record, converters: Mapping[str, Converter], n: int = 3) -> list[str]:
    """The formats whose required fields a record comes closest to having, with what it lacks."""

    def lacking(c: Converter) -> list[str]:
        return [key for key in c.required if key not in record]

    ranked = sorted(converters.values(), key=lambda c: (len(lacking(c)) / max(1, len(c.required)), len(lacking(c))))
    return [f"{c.name} (lacks {', '.join(lacking(c)) or 'the right types'})" for c in ranked[:n]]
