"""What a converter is, and the policies it is given."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from schemas.errors import UsageError
from schemas.feedback import Row

HELPSTEER_ATTRIBUTES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
# HelpSteer2 attributes as weighed in UNA (arXiv 2408.15339): the score is the weighted sum over its maximum, 4·1.9.
PAPER_WEIGHTS = {"helpfulness": 0.65, "correctness": 0.8, "coherence": 0.45}


CHOICES = {
    "ties": ("drop", "half", "settle"),
    "missing": ("drop", "unlabelled"),
    "strength": ("hard", "soft"),
    "rank_as": ("scores", "adjacent", "all", "best_vs_rest"),
    "ultrafeedback_score": ("fine-grained_score", "overall_score"),
}


@dataclass(frozen=True)
class Policy:
    """Every choice a conversion makes; stored in the manifest and printed in the summary."""

    ties: str = "drop"  # drop: rejected as `tie`; half: kept with .5 and .5; settle: so until several people's are one
    missing: str = "drop"  # drop: rejected as `missing_label`; unlabelled: kept, to be labelled later
    strength: str = "hard"  # hard: a preference of any strength is 1 to 0; soft: the share of the scale it reaches
    rank_as: str = "scores"  # what k ranked responses become: k scores, or comparisons
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)  # question → ends of its scale; * for any
    objective: str = "all"  # of several judgements in a record, the one to read; all: each under a source of its own
    helpsteer_weights: Mapping[str, float] = field(default_factory=lambda: dict(PAPER_WEIGHTS))
    ultrafeedback_score: str = "fine-grained_score"  # or overall_score, whose 10 is often a misread 1

    def __post_init__(self) -> None:
        for name, valid in CHOICES.items():
            if getattr(self, name) not in valid:
                raise UsageError(f"{name} {getattr(self, name)}: valid are {', '.join(valid)}")
        for name, (low, high) in self.ranges.items():
            if not (math.isfinite(low) and math.isfinite(high) and low < high):
                raise UsageError(f"ranges: {name} from {low:g} to {high:g}; give a smaller and a larger number")
        unknown = [name for name in self.helpsteer_weights if name not in HELPSTEER_ATTRIBUTES]
        if unknown:
            raise UsageError(f"helpsteer_weights: unknown {unknown[0]}; valid are {', '.join(HELPSTEER_ATTRIBUTES)}")
        weights = self.helpsteer_weights.values()
        if not any(weights) or not all(math.isfinite(w) for w in weights):
            raise UsageError("helpsteer_weights: give finite weights, at least one of them not zero")

    def __hash__(self) -> int:
        """Of the choices that are words: equal policies have equal ones."""
        return hash((self.objective, *(getattr(self, name) for name in CHOICES)))


@dataclass(frozen=True)
class LeftOut:
    """A part of an accepted record that could not become a row, such as one completion of four."""

    part: str
    reason: str
    detail: str


touched: ContextVar[Counter[str]] = ContextVar("touched")  # policy → how often it decided something, while counted


def note(policy: str) -> None:
    """Count that a policy decided something that no rejection tells of."""
    if (counts := touched.get(None)) is not None:
        counts[policy] += 1


lowered: ContextVar[set[str]] = ContextVar("lowered")  # sources whose lower scores are the better ones, while gathered


def tell_lower_is_better(source: str) -> None:
    """Tell that a source's raw rewards are better the lower they are, which rewards that are equal do not show."""
    if (sources := lowered.get(None)) is not None:
        sources.add(source)


Record = dict[str, Any]


@dataclass(frozen=True)
class Texts:
    """Records of exactly these fields, all of them texts: most of many a file, and read without a closer look.

    One user turn, and two responses, the first better, or one that is a demonstration.
    """

    prompt: str
    responses: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return (self.prompt, *self.responses)


@dataclass(frozen=True, eq=False)
class Converter:
    """A format: how to know a record of it, and how to turn one into rows.

    `convert(record, source, policy)` returns the record's rows, or raises `Reject`. Where a record is nothing without
    the others of its file, `of_file(records, source, policy)` is given all of them once per process, and returns what
    converts one of them.
    """

    name: str
    feedback: str  # the row type(s) it makes, for people
    matches: Callable[[Record], bool]
    convert: Callable[[Record, str, Policy], list[Row | LeftOut]]
    fields: Mapping[str, str]  # field of the record → what it becomes, for `una inspect`
    required: tuple[str | tuple[str, ...], ...]  # fields it cannot be without; a tuple: one of them, whatever `matches`
    labels: str = ""  # what the labels mean and their sign
    telling: tuple[str, Callable[[float], bool]] | None = None  # a field, and numbers that labels coded otherwise lack
    texts: Texts | None = (
        None  # for such records, `convert` makes the rows of `schemas.feedback.text_rows`, only slower
    )
    of_file: Callable[[Iterable[Record], str, Policy], Callable[[Record], list[Row | LeftOut]]] | None = None
