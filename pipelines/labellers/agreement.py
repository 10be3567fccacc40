"""How scores agree with labels that people gave, and with length. Shapes: n scores in [0, 1], n labels in [0, 1]."""

from bisect import bisect_right, insort
from typing import Any

import numpy as np

from scoring.agreement import accuracy, calibration_error, reliability

_DIGITS = 6


def rounded(value: float | None) -> float | None:
    return None if value is None or not np.isfinite(value) else round(float(value), _DIGITS)


def pearson(x: np.ndarray, y: np.ndarray) -> float | None:
    """The linear correlation; None where one of them does not vary."""
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    return float(np.corrcoef(x, y)[0, 1])


def spearman(x: np.ndarray, y: np.ndarray) -> float | None:
    """The correlation of ranks, equal values sharing their mean rank."""
    return pearson(_ranks(x), _ranks(y))


def _ranks(x: np.ndarray) -> np.ndarray:
    _, where, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[where]


def kendall(x: np.ndarray, y: np.ndarray) -> float | None:
    """Kendall's tau-b: of all pairs, those in the same order less those in the opposite, ties taken into account.

    By Knight's method: sorted by x and then y, the opposite pairs are the inversions of y.
    """
    order = np.lexsort((y, x))
    inversions, seen = 0, list[float]()
    for value in y[order].tolist():
        inversions += len(seen) - bisect_right(seen, value)
        insort(seen, value)
    pairs = len(x) * (len(x) - 1) // 2
    same_x, same_y, same_both = _tied(x), _tied(y), _tied(np.stack([x, y], axis=1))
    if same_x == pairs or same_y == pairs:
        return None
    concordant = pairs - same_x - same_y + same_both - inversions
    return float((concordant - inversions) / np.sqrt((pairs - same_x) * (pairs - same_y)))


def _tied(values: np.ndarray) -> int:
    _, counts = np.unique(values, axis=0, return_counts=True)
    return int((counts.astype(np.int64) * (counts - 1) // 2).sum())


def with_people(
    score: np.ndarray, human: np.ndarray, first_better: np.ndarray, compared: np.ndarray, pairs: bool
) -> dict[str, Any]:
    """What is told of scores [n] and labels [n], and of comparisons [m]; empty where there are neither."""
    facts: dict[str, Any] = {}
    if len(score):
        if pairs:  # a comparison counts in both directions, so that its order does not matter
            score, human = np.concatenate([score, 1 - score]), np.concatenate([human, 1 - human])
        bins = reliability(score, human)
        facts |= {"items": len(score) // (1 + pairs), "kendall": rounded(kendall(score, human))}
        facts |= {"ece": rounded(calibration_error(bins)), "bins": [[n, rounded(s), rounded(h)] for n, s, h in bins]}
    if decided := int((compared != 0.5).sum()):
        facts |= {"comparisons": decided, "accuracy": rounded(accuracy(first_better, compared))}
    return facts
