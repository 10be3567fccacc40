"""How predictions agree with labels: what the trainer and the evaluations tell alike; numpy only.

Shapes: n predictions in [0, 1], n labels in [0, 1].
"""

import numpy as np

BINS = 10  # of a reliability diagram


def accuracy(margin: np.ndarray, first: np.ndarray) -> float | None:
    """Share of comparisons told right; an equal margin counts a half, ties (p = ½) not at all. None without any.

    `margin` [n]: positive where the first is predicted to be better. `first` [n]: the probability p that it is.
    """
    decided = first != 0.5
    right = np.sign(margin[decided]) * np.sign(first[decided] - 0.5)
    return float(((right + 1) / 2).mean()) if decided.any() else None


def reliability(predicted: np.ndarray, label: np.ndarray) -> list[list[float]]:
    """(n, mean prediction, mean label) of every one of 10 equal bins of predictions that holds any."""
    where = np.minimum((predicted * BINS).astype(int), BINS - 1)
    bins = ((where == b, int((where == b).sum())) for b in range(BINS))
    return [[n, float(predicted[of].mean()), float(label[of].mean())] for of, n in bins if n]


def calibration_error(bins: list[list[float]]) -> float:
    """The expected calibration error: Σ share of a bin · |mean prediction − mean label|."""
    return sum(n * abs(predicted - label) for n, predicted, label in bins) / sum(n for n, *_ in bins)
