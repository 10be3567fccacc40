"""What samples and comparisons say, as numbers with intervals: no models, no files.

Prompts are what is drawn from the world, so intervals come from drawing prompts anew, with all that belongs to one.
Shapes: P prompts, m comparisons, B replicates of the bootstrap.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

REPLICATES = 2000
LEVEL = 0.95
RIDGE = 0.01  # keeps the regression finite where one side wins all
REPEATED = 4  # words of the n-grams that count as repetition
_AT_ONCE = 1 << 22  # numbers drawn at a time
_CJK = r"\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"  # written without blanks, so each sign is a word
_WORD = re.compile(rf"[{_CJK}]|[^\W_{_CJK}]+|[^\w\s]|_")


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts and its 95 % interval."""

    value: float
    low: float
    high: float
    prompts: int

    def facts(self) -> dict[str, Any]:
        return asdict(self)


# --- means over prompts --------------------------------------------------------------------------


def by_prompt(values: np.ndarray, prompts: np.ndarray) -> np.ndarray:
    """The mean of each prompt's values, [P]: every prompt counts alike, however many samples of it there are."""
    _, where, counts = np.unique(prompts, return_inverse=True, return_counts=True)
    return np.bincount(where, values) / counts


def mean(values: np.ndarray, seed: int = 0) -> Estimate:
    """The mean of [P] values of prompts, with the percentile interval of the bootstrap."""
    low, high = interval(lambda counts: counts @ values / len(values), len(values), seed)
    return Estimate(float(values.mean()), low, high, len(values))


def interval(statistic: Callable[[np.ndarray], np.ndarray], prompts: int, seed: int) -> tuple[float, float]:
    """The percentile interval of a statistic of how often each prompt was drawn: [b, P] → [b]."""
    rng, size, found = np.random.default_rng(seed), max(1, _AT_ONCE // prompts), []
    for start in range(0, REPLICATES, size):
        drawn = rng.multinomial(prompts, np.full(prompts, 1 / prompts), min(size, REPLICATES - start))
        found.append(statistic(drawn.astype(float)))
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(np.concatenate(found), [tail, 1 - tail])
    return float(low), float(high)


def standard_error(values: np.ndarray) -> float | None:
    """Of the mean of [P] values of prompts; None for one prompt."""
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None


# --- comparisons ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparisons:
    """Who was better in each of m comparisons: `p`, 1, ½ or 0, or a probability between, and by how many characters
    the first response is longer. `prompts`: whose."""

    p: np.ndarray
    longer: np.ndarray
    prompts: np.ndarray


def all_pairs(first: Sequence[tuple[Any, float, int]], second: Sequence[tuple[Any, float, int]]) -> Comparisons:
    """Every response of the first model with every one of the second to its prompt: (prompt, reward, characters)."""
    p, longer, prompts = [], [], []
    others: dict[Any, list[tuple[float, int]]] = {}
    for prompt, reward, length in second:
        others.setdefault(prompt, []).append((reward, length))
    for prompt, reward, length in first:
        for other, other_length in others.get(prompt, ()):
            p.append((1 + (reward > other) - (reward < other)) / 2)
            longer.append(length - other_length)
            prompts.append(prompt)
    number = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    return Comparisons(np.array(p, float), np.array(longer, float), np.array([number[one] for one in prompts], int))


def win_rate(of: Comparisons, seed: int = 0) -> Estimate:
    """The mean of p, every prompt counting alike.

    Where all prompts say the same the bootstrap sees no spread: then the interval is that of what P prompts in a row
    can hide, a share of at most 1 − 0.025^(1/P) of other prompts (Clopper and Pearson's for 0 and 1).
    """
    values = by_prompt(of.p, of.prompts)
    if np.ptp(values) > 0:
        return mean(values, seed)
    value, hidden = float(values[0]), 1 - ((1 - LEVEL) / 2) ** (1 / len(values))
    return Estimate(value, value * (1 - hidden), value * (1 - hidden) + hidden, len(values))


def length_controlled(of: Comparisons, seed: int = 0) -> tuple[Estimate, float]:
    """The win rate that is left when length is taken out of it, and what length counts for (φ).

    P(first is better) = σ(θ + φ·tanh(Δ/s)), with Δ the difference of lengths in characters and s its standard
    deviation, fitted by maximum likelihood with a ridge of 0.01·(θ² + φ²)/2; the rate is σ(θ), that is, at Δ = 0. This
    is AlpacaEval 2's regression without its term for how hard an instruction is, which takes other models' results.
    Where all comparisons say the same, length tells nothing of them, and it is the win rate.
    """
    if np.ptp(of.p) == 0:
        return win_rate(of, seed), 0.0
    _, where, counts = np.unique(of.prompts, return_inverse=True, return_counts=True)
    spread = of.longer.std()
    x = np.tanh(of.longer / spread) if spread > 0 else np.zeros(len(of.p))
    weight = 1 / counts[where]  # every prompt counts alike

    def fitted(drawn: np.ndarray) -> np.ndarray:
        return _logistic(x, of.p, drawn[:, where] * weight)

    whole = fitted(np.ones((1, len(counts))))[0]
    size = max(1, len(of.p) // len(counts))  # of the bootstrap's arrays, in prompts
    low, high = interval(lambda drawn: _in_parts(fitted, drawn, size)[:, 0], len(counts), seed)
    rate, low, high = (float(1 / (1 + np.exp(-one))) for one in (whole[0], low, high))
    return Estimate(rate, low, high, len(counts)), float(whole[1])


def _in_parts(fitted: Callable[[np.ndarray], np.ndarray], drawn: np.ndarray, size: int) -> np.ndarray:
    return np.concatenate([fitted(part) for part in np.array_split(drawn, min(size, len(drawn)))])


def _logistic(x: np.ndarray, p: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """(θ, φ) of p ~ σ(θ + φ·x) for each line of weights [b, m], by Newton's method: [b, 2]."""
    at = np.zeros((len(weight), 2))
    for _ in range(100):
        mu = 1 / (1 + np.exp(-(at[:, :1] + at[:, 1:] * x)))
        error, slope = weight * (p - mu), weight * mu * (1 - mu)
        gradient = np.stack([error.sum(1), (error * x).sum(1)], 1) - RIDGE * at
        a, b, c = slope.sum(1) + RIDGE, (slope * x).sum(1), (slope * x * x).sum(1) + RIDGE
        step = np.stack([c * gradient[:, 0] - b * gradient[:, 1], a * gradient[:, 1] - b * gradient[:, 0]], 1)
        step /= (a * c - b * b)[:, None]
        at += np.clip(step, -2, 2)  # far from the solution the parabola that it steps on is too flat
        if np.abs(step).max() < 1e-9:
            break
    return at


# --- texts ---------------------------------------------------------------------------------------


def words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def ngrams(of: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(of[i : i + n]) for i in range(len(of) - n + 1)]


def distinct(responses: Sequence[Sequence[str]], n: int, most: int) -> float | None:
    """Different n-grams over all n-grams of the responses' words, of the first `most` words in turn.

    The share falls with the amount of text, so models are compared on the same number of words. None without any.
    """
    found: list[tuple[str, ...]] = []
    for response in responses:
        found += ngrams(response[: max(0, most)], n)
        most -= len(response)
    return len(set(found)) / len(found) if found else None


def repetition(response: Sequence[str]) -> float:
    """The share of a response's 4-grams that stood in it before; 0 for one that has none."""
    found = ngrams(response, REPEATED)
    return 1 - len(set(found)) / len(found) if found else 0.0
