"""What a set of judged groups says, by type; numpy on Python numbers, no model.

`implicit reward` is β·h, with h = log π_θ(y|x) − log π_ref(y|x) in nats, summed over the response.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from scoring import agreement


@dataclass(frozen=True)
class Judged:
    """One group after a forward pass; `rows`, `logratios`, `implicit` and `rewards` have one entry per row."""

    rows: tuple[int, ...]
    type: str
    weight: float  # of its type and source
    loss: float  # unweighted
    logratios: tuple[float, ...]  # h, nats
    implicit: tuple[float, ...]  # β·h
    rewards: tuple[float, ...]  # explicit, in [0, 1]
    predicted: float  # what the loss compares with the (first row's) explicit reward: σ(β·h + offset), σ(r₁ − r₂)
    target: float  # the (first row's) explicit reward as the loss takes it: qrpo's is a quantile
    tokens: int  # response tokens of all rows


def weighted_loss(judged: Sequence[Judged]) -> float:
    """Σ weight · loss / number of groups: what a step minimises."""
    return math.fsum(j.weight * j.loss for j in judged) / len(judged)


def by_type(judged: Iterable[Judged]) -> dict[str, dict[str, Any]]:
    """Metrics of each type present: count (groups), loss, implicit_reward, accuracy, calibration_error, kl, and more.

    `accuracy`: share of comparisons whose better row has the higher implicit reward; a half for equal ones, ties left
    out; null for other types. `decided`: comparisons that are no tie; 0 for other types. `calibration_error`: see that
    function. `kl`: mean of h per response token, in nats, on the dataset's own responses; it says how far the policy
    has moved on them and is no estimate of KL(π_θ‖π_ref), which needs responses sampled from the policy.
    `logratio_good`, `logratio_bad`: mean of h over rows with an explicit reward above, and below, one half; null
    without any. `saturation`: mean of |2·p − 1| over the predicted rewards p; near 1, σ is flat and little is learned.
    """
    kinds: dict[str, list[Judged]] = {}
    for one in judged:
        kinds.setdefault(one.type, []).append(one)
    return {kind: _metrics(kind, kinds[kind]) for kind in sorted(kinds)}


def _metrics(kind: str, judged: list[Judged]) -> dict[str, Any]:
    logratios = np.concatenate([j.logratios for j in judged])
    explicit = np.concatenate([j.rewards for j in judged])
    first = np.array([j.rewards[0] for j in judged])
    scores, targets = np.clip([j.predicted for j in judged], 0, 1), np.array([j.target for j in judged])
    if kind == "pairwise":
        margin = np.array([j.implicit[0] - j.implicit[1] for j in judged])
        # either row may come first, so both orders count
        scores, targets = np.concatenate([scores, 1 - scores]), np.concatenate([targets, 1 - targets])
    return {
        "count": len(judged),
        "loss": math.fsum(j.loss for j in judged) / len(judged),
        "implicit_reward": float(np.concatenate([j.implicit for j in judged]).mean()),
        "accuracy": agreement.accuracy(margin, first) if kind == "pairwise" else None,
        "decided": int((first != 0.5).sum()) if kind == "pairwise" else 0,
        "calibration_error": calibration_error(scores, targets),
        "kl": float(logratios.sum() / sum(j.tokens for j in judged)),
        "logratio_good": _mean(logratios[explicit > 0.5]),
        "logratio_bad": _mean(logratios[explicit < 0.5]),
        "saturation": float(np.abs(2 * scores - 1).mean()),
    }


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None


def calibration_error(scores: np.ndarray, targets: np.ndarray) -> float:
    """Expected calibration error of the implicit score; NaN where one is not finite.

    The score is σ(β·h) against the explicit reward, or σ(r₁ − r₂) against p for a comparison.
    """
    return (
        agreement.calibration_error(agreement.reliability(scores, targets)) if np.isfinite(scores).all() else math.nan
    )


def finite(value: Any) -> Any:
    """NaN and infinities become null: JSON has no such numbers."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def flat(value: dict[str, Any], name: Callable[[str], str] = str) -> dict[str, float]:
    """Nested numbers as one level of `a/b` names, for trackers."""
    out: dict[str, float] = {}
    for key, one in value.items():
        if isinstance(one, dict):
            out |= flat(one, lambda inner, key=key: name(f"{key}/{inner}"))  # type: ignore[misc]
        elif isinstance(one, int | float):
            out[name(key)] = one
    return out
