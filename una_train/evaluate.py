"""What a set of judged groups says, by type; numpy on Python numbers, no model.

`implicit reward` is β·h, with h = log π_θ(y|x) − log π_ref(y|x) in nats, summed over the response.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

BINS = 10


@dataclass(frozen=True)
class Judged:
    """One group after a forward pass; `rows`, `logratios` and `rewards` have one entry per row."""

    rows: tuple[int, ...]
    type: str
    loss: float  # unweighted
    logratios: tuple[float, ...]  # h, nats
    rewards: tuple[float, ...]  # explicit, in [0, 1]
    tokens: int  # response tokens of all rows


def weighted_loss(judged: Sequence[Judged], weights: dict[str, float]) -> float:
    """Σ type weight · loss / number of groups: what a step minimises."""
    return math.fsum(weights[j.type] * j.loss for j in judged) / len(judged)


def by_type(judged: Iterable[Judged], beta: dict[str, float]) -> dict[str, dict[str, Any]]:
    """Metrics of each type present: count (groups), loss, implicit_reward, accuracy, calibration_error, kl.

    `accuracy`: share of comparisons whose better row has the higher implicit reward; a half for equal ones,
    ties left out; null for other types. `calibration_error`: see that function. `kl`: mean of h per response
    token, in nats, on the dataset's own responses; it says how far the policy has moved on them and is no
    estimate of KL(π_θ‖π_ref), which needs responses sampled from the policy.
    """
    kinds: dict[str, list[Judged]] = {}
    for one in judged:
        kinds.setdefault(one.type, []).append(one)
    return {kind: _metrics(kind, kinds[kind], beta[kind]) for kind in sorted(kinds)}


def _metrics(kind: str, judged: list[Judged], beta: float) -> dict[str, Any]:
    logratios = np.concatenate([j.logratios for j in judged])
    implicit = beta * logratios
    if kind == "pairwise":
        margin = beta * np.array([j.logratios[0] - j.logratios[1] for j in judged])
        first = np.array([j.rewards[0] for j in judged])
        # either row may come first, so both orders count
        logits, targets = np.concatenate([margin, -margin]), np.concatenate([first, 1 - first])
    else:
        logits, targets = implicit, np.concatenate([j.rewards for j in judged])
    return {
        "count": len(judged),
        "loss": math.fsum(j.loss for j in judged) / len(judged),
        "implicit_reward": float(implicit.mean()),
        "accuracy": accuracy(margin, first) if kind == "pairwise" else None,
        "calibration_error": calibration_error(_sigmoid(logits), targets),
        "kl": float(logratios.sum() / sum(j.tokens for j in judged)),
    }


def accuracy(margin: np.ndarray, first: np.ndarray) -> float | None:
    """Share of comparisons where r₁ − r₂ has the sign of p − ½; equal rewards count a half, ties (p = ½) not at all."""
    right = np.sign(margin) * np.sign(first - 0.5)
    decided = right[first != 0.5]
    return float(((decided + 1) / 2).mean()) if len(decided) else None


def calibration_error(scores: np.ndarray, targets: np.ndarray) -> float:
    """Expected calibration error over 10 equal bins of the implicit score: Σ share of bin · |mean score − mean target|.

    The score is σ(β·h) against the explicit reward, or σ(r₁ − r₂) against p for a comparison.
    """
    bins = np.minimum((scores * BINS).astype(int), BINS - 1)
    gaps = np.abs(np.bincount(bins, scores, BINS) - np.bincount(bins, targets, BINS))
    return float(gaps.sum() / len(scores))


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(x / 2))


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
