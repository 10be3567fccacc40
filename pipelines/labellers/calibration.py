"""From raw scores to scores in [0, 1]: what is fitted once, stored in the manifest, and applied again to later data.

Shapes: n scores of one labeller and one source. Nothing here knows rows, files or Beam.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipelines import settle
from schemas.errors import UsageError, UserError

METHODS = {
    "none": "the raw score, which lies between 0 and 1 already",
    "range": "the place between the ends of the labeller's scale",
    "minmax": "the place between the source's smallest and largest raw score",
    "sigmoid": "σ(raw / temperature)",
    "zscore_sigmoid": "σ(z / temperature), z in deviations from the source's mean",
    "quantile": "the share of the source's raw scores below, equal ones counted half",
    "isotonic": "the best non-decreasing fit to the labels that people gave",
    "platt": "σ(slope · raw + intercept), fitted to the labels that people gave",
}
FITTED = ("isotonic", "platt")  # need labels to be fitted to
FEWEST = 10  # labels that a fit needs
_SURE = 1e-6  # a probability is kept this far from 0 and 1 where its logit is taken
Fitted = dict[str, Any]  # JSON values; `method` and what it needs


@dataclass(frozen=True)
class Scale:
    """How a labeller's raw scores become scores in [0, 1]."""

    method: str
    temperature: float = 1.0
    ends: tuple[float, float] | None = None  # the least and the greatest raw score
    pairs: bool = False  # raw scores are probabilities that the first of two responses is better


def choose(asked: str, name: str, ends: tuple[float, float] | None, pairs: bool, temperature: float) -> Scale:
    """The method for a labeller: what was asked for, or by its scale; `UsageError` for what cannot be."""
    method = asked
    if asked == "auto":
        method = "none" if pairs or ends == (0, 1) else "range" if ends else "sigmoid"
    if pairs and method not in ("none", *FITTED):
        raise UsageError(f"--calibrate {method}: {name} gives probabilities of pairs; use none, isotonic or platt")
    if method == "none" and not pairs and not (ends and ends[0] >= 0 and ends[1] <= 1):
        scale = f"lie between {ends[0]:g} and {ends[1]:g}" if ends else "have no ends"
        raise UsageError(f"--calibrate none: the scores of {name} {scale}, and rewards lie between 0 and 1")
    if method == "range" and not ends:
        raise UsageError(f"--calibrate range: the scores of {name} have no ends; use sigmoid or quantile, say")
    return Scale(method, temperature, ends, pairs)


# --- fitting -----------------------------------------------------------------------------------


def fit(
    scale: Scale,
    raw: np.ndarray,
    human: np.ndarray,
    extremes: tuple[float, float],
    compared: tuple[np.ndarray, np.ndarray] | None = None,
) -> Fitted:
    """What new scores are made from. `raw` and `human` [n]: a human label is NaN where there is none.

    `extremes`: the smallest and the largest raw score of all, of which `raw` may be a sample. `compared`: differences
    of the raw scores of two responses and the probability that people found the first better, for `platt` where
    nobody gave scores.
    """
    facts: Fitted = {"method": scale.method}
    if scale.method == "range":
        assert scale.ends
        return facts | {"low": scale.ends[0], "high": scale.ends[1]}
    if scale.method == "sigmoid":
        return facts | {"temperature": scale.temperature}
    if scale.method in ("minmax", "quantile"):
        return facts | _of_spread(scale.method, raw, extremes)
    if scale.method == "zscore_sigmoid":
        return facts | _of_spread("zscore", raw, extremes) | {"temperature": scale.temperature}
    if scale.method == "isotonic":
        return facts | _isotonic(raw, human, scale.pairs)
    if scale.method == "platt":
        return facts | _platt(raw, human, scale.pairs, compared)
    return facts


def can_fit(scale: Scale, human: np.ndarray, compared: tuple[np.ndarray, np.ndarray]) -> bool:
    """Whether there are labels enough."""
    given = human[np.isfinite(human)]
    if scale.pairs:
        return int((given != 0.5).sum()) >= FEWEST
    enough = len(given) >= FEWEST and len(np.unique(given)) > 1
    return enough or (scale.method == "platt" and int((compared[1] != 0.5).sum()) >= FEWEST)


def too_few(method: str, name: str) -> UserError:
    return UserError(
        f"--calibrate {method}: {name} cannot be fitted, fewer than {FEWEST} of the rows it scored have labels by "
        "people, or all say the same; use another method (the scores are in the cache, so that costs no calls), or "
        "--calibration DIR with statistics of a dataset that has such labels"
    )


def _of_spread(method: str, raw: np.ndarray, extremes: tuple[float, float]) -> Fitted:
    values, counts = np.unique(raw, return_counts=True)
    spread = settle.spread_of(np.ones(len(raw)), raw, np.zeros(len(raw)), values, counts)
    return settle.statistics(method, spread | {"low": extremes[0], "high": extremes[1], "lower_is_better": False})


def _isotonic(raw: np.ndarray, human: np.ndarray, pairs: bool) -> Fitted:
    known = np.isfinite(human)
    raw, human = raw[known], human[known]
    if pairs:  # a comparison counts in both directions
        raw, human = np.concatenate([raw, 1 - raw]), np.concatenate([human, 1 - human])
    values, rewards = isotonic(raw, human)
    return {"labels": int(known.sum()), "values": values.tolist(), "rewards": rewards.tolist(), "pairs": pairs}


def isotonic(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The non-decreasing function with the least squared error: its knots, to be joined by straight lines.

    Pool adjacent violators: neighbours in the wrong order become one block with their mean. A block's knots are its
    first and last x.
    """
    values, where = np.unique(x, return_inverse=True)
    counts = np.bincount(where)
    blocks: list[list[float]] = []  # sum, count, first value's number, last value's number
    for i, (total, count) in enumerate(zip(np.bincount(where, y), counts, strict=True)):
        blocks.append([total, count, i, i])
        while len(blocks) > 1 and blocks[-2][0] * blocks[-1][1] >= blocks[-1][0] * blocks[-2][1]:
            total, count, _, last = blocks.pop()
            blocks[-1] = [blocks[-1][0] + total, blocks[-1][1] + count, blocks[-1][2], last]
    knots = {int(end): total / count for total, count, first, last in blocks for end in (first, last)}
    return values[list(knots)], np.array(list(knots.values()))


def _platt(raw: np.ndarray, human: np.ndarray, pairs: bool, compared: tuple[np.ndarray, np.ndarray] | None) -> Fitted:
    known = np.isfinite(human)
    if pairs:
        slope, _ = logistic(logit(raw[known]), human[known], intercept=False)
        return {"labels": int(known.sum()), "slope": slope, "intercept": 0.0, "pairs": True}
    if known.sum() >= FEWEST and (len(np.unique(human[known])) > 1 or compared is None or not len(compared[1])):
        slope, intercept = logistic(raw[known], human[known])
        return {"labels": int(known.sum()), "slope": slope, "intercept": intercept, "pairs": False}
    assert compared is not None
    difference, p = compared
    slope, _ = logistic(difference, p, intercept=False)  # comparisons tell nothing of the middle: half lie below it
    return {"comparisons": len(p), "slope": slope, "intercept": -slope * float(np.median(raw)), "pairs": False}


def logistic(x: np.ndarray, y: np.ndarray, intercept: bool = True) -> tuple[float, float]:
    """Slope and intercept of y ≈ σ(slope·x + intercept), by Newton's method on the cross-entropy.

    Targets are drawn in as Platt did, by what a count of one more of each would say, so that scores that part the
    labels perfectly have a finite slope. Without an intercept, y and 1 − y are alike, and so are their targets.
    """
    good, bad = (y.sum(), (1 - y).sum()) if intercept else (len(y) / 2, len(y) / 2)
    target = y * (good + 1) / (good + 2) + (1 - y) / (bad + 2)
    width = float(np.std(x) if intercept else np.sqrt(np.mean(x**2))) or 1.0
    middle = float(np.mean(x)) if intercept else 0.0
    columns = np.stack([(x - middle) / width, np.full(len(x), float(intercept))], axis=1)
    w = np.zeros(2)
    for _ in range(100):
        p = sigmoid(columns @ w)
        slope = columns.T @ (p - target)
        curve = (columns.T * (p * (1 - p))) @ columns + 1e-9 * np.eye(2)
        step = np.linalg.solve(curve, slope)
        while _entropy(columns @ (w - step), target) > _entropy(columns @ w, target) + 1e-12:
            step /= 2
        w -= step
        if np.abs(step).max() < 1e-10:
            break
    return float(w[0] / width), float(w[1] - w[0] * middle / width)


def _entropy(z: np.ndarray, target: np.ndarray) -> float:
    return float((np.logaddexp(0, z) - target * z).sum())


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 + 0.5 * np.tanh(np.asarray(x) / 2)


def logit(p: np.ndarray) -> np.ndarray:
    p = np.clip(p, _SURE, 1 - _SURE)
    return np.log(p) - np.log1p(-p)


# --- applying ----------------------------------------------------------------------------------


def calibrated(raw: np.ndarray, of: Fitted) -> np.ndarray:
    """Scores in [0, 1] of raw scores [n]; NaN stays NaN. What lies outside the ends is at the end."""
    return np.where(np.isnan(raw), np.nan, _calibrated(raw, of))


def _calibrated(raw: np.ndarray, of: Fitted) -> np.ndarray:
    method = of["method"]
    if method in ("none", "range"):
        low, high = of.get("low", 0.0), of.get("high", 1.0)
        return np.clip((raw - low) / (high - low), 0, 1)
    if method in ("minmax", "quantile"):
        return settle.rescaled(raw, method, of)
    if method == "sigmoid":
        return sigmoid(raw / of["temperature"])
    if method == "zscore_sigmoid":
        width = of["deviation"] * of["temperature"]
        return sigmoid((raw - of["mean"]) / width) if width else np.full(len(raw), 0.5)
    if method == "isotonic":
        found = np.interp(raw, of["values"], of["rewards"])
        return (found + 1 - np.interp(1 - raw, of["values"], of["rewards"])) / 2 if of["pairs"] else found
    assert method == "platt", method
    return sigmoid(of["slope"] * (logit(raw) if of["pairs"] else raw) + of["intercept"])


# --- length ------------------------------------------------------------------------------------


def length_line(raw: np.ndarray, length: np.ndarray, pairs: bool) -> dict[str, float]:
    """The straight line that tells raw scores from lengths in characters, by least squares.

    Of pairs, that of (p − ½) over the difference of the lengths, through the origin.
    """
    middle = 0.0 if pairs or not len(length) else float(np.mean(length))
    x, y = length - middle, raw - (0.5 if pairs else raw.mean() if len(raw) else 0.0)
    squares = math.fsum(x * x)
    return {"slope": math.fsum(x * y) / squares if squares else 0.0, "mean": middle}


def without_length(raw: np.ndarray, length: np.ndarray, line: dict[str, float] | None) -> np.ndarray:
    """Raw scores as they would be at the mean length."""
    return raw - line["slope"] * (length - line["mean"]) if line else raw
