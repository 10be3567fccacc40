"""What is known of all scores of a run before any row gets its reward: counts, ends, and a sample of each source.

A sample holds the items whose ids are smallest: ids are hashes, so it is a fair one, the same for every order in which
parts are merged, and everything where a source has no more than `SAMPLED` items.

Shapes: n items, s sides (1: a response, or the difference of two; 2: both responses of a comparison), k labellers.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipelines.labellers import agreement, calibration
from pipelines.labellers.calibration import Scale
from pipelines.labellers.combine import combined, disagreement
from schemas.errors import UserError

SAMPLED = 65_536  # items of a source
BINS = 20  # of a histogram of scores
ONE_SIDED = 0.8  # share of rewards on one side of one half from which a run is warned
FAR = 0.15  # of the mean reward from one half, likewise
BETA = 0.03  # the β that the numbers of a warning are for


@dataclass(frozen=True)
class Ensemble:
    """The labellers of a run, and how their scores become one."""

    names: tuple[str, ...]
    scales: tuple[Scale, ...]
    how: str = "mean"
    weights: tuple[float, ...] = ()
    need: str = "all"
    length_control: bool = False

    def combined(self, scores: np.ndarray) -> np.ndarray:
        """Scores [n, k] → [n]."""
        return combined(scores, self.how, np.array(self.weights or [1.0] * len(self.names)), self.need)


@dataclass(frozen=True)
class Sample:
    """Items with their raw scores (NaN: none), lengths in characters, and what people said (NaN: nothing)."""

    keys: np.ndarray  # uint64 [n]
    values: np.ndarray  # [n, s, k]
    lengths: np.ndarray  # [n, s]
    human: np.ndarray  # [n]

    @classmethod
    def empty(cls, sides: int, labellers: int) -> "Sample":
        shapes: list[tuple[int, ...]] = [(0, sides, labellers), (0, sides), (0,)]
        return cls(np.empty(0, np.uint64), *(np.empty(shape) for shape in shapes))

    @classmethod
    def merged(cls, parts: list["Sample"]) -> "Sample":
        """The smallest keys of all parts; what is equal in all is counted as often as it comes."""
        columns = [
            np.concatenate(c) for c in zip(*((p.keys, p.values, p.lengths, p.human) for p in parts), strict=True)
        ]
        n = len(columns[0])
        order = np.lexsort((*(x for c in columns[:0:-1] for x in c.reshape(n, math.prod(c.shape[1:])).T), columns[0]))[
            :SAMPLED
        ]
        return cls(*(c[order] for c in columns))


@dataclass
class Found:
    """Of one source: how many raw scores each labeller gave, the least and the greatest, and samples."""

    counts: np.ndarray  # int64 [k]
    low: np.ndarray  # [k], NaN where there is none
    high: np.ndarray
    points: list[Sample] = field(default_factory=list)  # s = 1: each item, with the reward that people gave
    compared: list[Sample] = field(default_factory=list)  # s = 2: comparisons by people, responses scored one by one


def found_in(points: Sample, compared: Sample) -> Found:
    """What a part of a source's items is like."""
    values = points.values[:, 0]
    there = np.isfinite(values)
    low = np.where(there, values, np.inf).min(axis=0, initial=np.inf)
    high = np.where(there, values, -np.inf).max(axis=0, initial=-np.inf)
    return Found(there.sum(axis=0), low, high, [points], [compared])


def together(parts: Iterable[Mapping[str, Found]]) -> dict[str, Found]:
    """The parts of a run as one; the samples are cut to size where they have grown."""
    whole: dict[str, Found] = {}
    for part in parts:
        for source, one in part.items():
            if source not in whole:
                whole[source] = Found(one.counts, one.low, one.high, [*one.points], [*one.compared])
                continue
            of = whole[source]
            of.counts = of.counts + one.counts
            of.low, of.high = np.minimum(of.low, one.low), np.maximum(of.high, one.high)
            of.points, of.compared = _cut([*of.points, *one.points]), _cut([*of.compared, *one.compared])
    return whole


def _cut(parts: list[Sample]) -> list[Sample]:
    return [Sample.merged(parts)] if sum(len(part.keys) for part in parts) > 2 * SAMPLED else parts


# --- statistics --------------------------------------------------------------------------------


def statistics(found: Mapping[str, Found], of: Ensemble, stored: dict[str, Any] | None = None) -> dict[str, Any]:
    """What the manifest says of the labels, calibration included; `stored`: that of an earlier run, applied again."""
    whole = {s: (Sample.merged(one.points), Sample.merged(one.compared)) for s, one in sorted(found.items())}
    labellers: dict[str, dict[str, Any]] = {}
    for j, name in enumerate(of.names):
        labellers[name] = {}
        pooled = [_of_labeller(*both, j) for both in whole.values()]
        for source, both in whole.items():
            if found[source].counts[j]:
                entry = _stored(stored, name, source) or _fitted(j, of, source, found[source], both, pooled)
                labellers[name][source] = entry | _told(j, of, found[source], both, entry)
    return {"labellers": labellers, "combined": {s: _combined(labellers, of, s, *both) for s, both in whole.items()}}


Column = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def _of_labeller(points: Sample, compared: Sample, j: int) -> Column:
    """Raw scores, lengths and labels of one labeller's items; raw scores [m, 2], lengths and labels of comparisons."""
    there = np.isfinite(points.values[:, 0, j])
    both = np.isfinite(compared.values[:, :, j]).all(axis=1)
    one = points.values[there, 0, j], points.lengths[there, 0], points.human[there]
    return *one, compared.values[both, :, j], compared.lengths[both], compared.human[both]


def _stored(stored: dict[str, Any] | None, name: str, source: str) -> dict[str, Any] | None:
    if stored is None:
        return None
    if source not in stored[name]:
        raise UserError(
            f"--calibration: no statistics of {name} for source {source!r}, "
            f"only for {', '.join(stored[name]) or 'none'}; label such rows without --calibration first"
        )
    return {key: stored[name][source][key] for key in ("calibration", "length_control")}


def _fitted(
    j: int, of: Ensemble, source: str, found: Found, both: tuple[Sample, Sample], pooled: list[Column]
) -> dict[str, Any]:
    """The calibration of a labeller's scores of one source; without labels by people there, to those of all sources."""
    scale, column, fitted_to = of.scales[j], _of_labeller(*both, j), source
    if scale.method in calibration.FITTED and not _can_fit(scale, column):
        column, fitted_to = tuple(map(np.concatenate, zip(*pooled, strict=True))), "all sources"  # type: ignore[assignment]
        if not _can_fit(scale, column):
            raise calibration.too_few(scale.method, of.names[j])
    raw, lengths, human, values, sides, compared = column
    line = calibration.length_line(raw, lengths, scale.pairs) if of.length_control else None
    raw, values = (calibration.without_length(v, at, line) for v, at in ((raw, lengths), (values, sides)))
    extremes = (raw.min(), raw.max()) if line else (found.low[j], found.high[j])
    fitted = calibration.fit(scale, raw, human, extremes, (values[:, 0] - values[:, 1], compared))
    told = {"fitted_to": fitted_to} if scale.method in calibration.FITTED else {}
    return {"calibration": fitted | told, "length_control": line}


def _can_fit(scale: Scale, column: Column) -> bool:
    _, _, human, values, _, compared = column
    return calibration.can_fit(scale, human, (values[:, 0] - values[:, 1], compared))


def scored(raw: np.ndarray, lengths: np.ndarray, entry: Mapping[str, Any]) -> np.ndarray:
    """Scores in [0, 1] of raw scores and lengths of one shape, by what the manifest says of the labeller and source."""
    plain = calibration.without_length(raw, lengths, entry["length_control"])
    return calibration.calibrated(plain.ravel(), entry["calibration"]).reshape(raw.shape)


def _told(j: int, of: Ensemble, found: Found, both: tuple[Sample, Sample], entry: Mapping[str, Any]) -> dict[str, Any]:
    """What is worth knowing of a labeller's scores of one source."""
    raw, lengths, human, values, sides, compared = _of_labeller(*both, j)
    line, pairs = entry["length_control"], of.scales[j].pairs
    score, known = scored(raw, lengths, entry), np.isfinite(human)
    plain = calibration.without_length(values, sides, line)
    first = np.where(known, score - 0.5, 0)[known] if pairs else plain[:, 0] - plain[:, 1]
    met = human[known] if pairs else compared
    length = {
        "pearson": agreement.rounded(agreement.pearson(raw, lengths)),
        "spearman": agreement.rounded(agreement.spearman(raw, lengths)),
    }
    if line:
        after = calibration.without_length(raw, lengths, line)
        length["pearson_controlled"] = agreement.rounded(agreement.pearson(after, lengths))
    return {
        "items": int(found.counts[j]),
        "sampled": len(raw),
        "raw": {"low": float(found.low[j]), "high": float(found.high[j]), "mean": agreement.rounded(raw.mean())},
        "mean": agreement.rounded(score.mean()),
        "histogram": histogram(score),
        "length": length,
        "agreement": agreement.with_people(score[known], human[known], first, met, pairs),
    }


def histogram(score: np.ndarray) -> list[int]:
    return np.histogram(score, BINS, (0, 1))[0].tolist()


def _combined(
    labellers: Mapping[str, Any], of: Ensemble, source: str, points: Sample, compared: Sample
) -> dict[str, Any]:
    """What is worth knowing of the rewards of one source."""
    pairs = any(scale.pairs for scale in of.scales)
    matrices = []
    for sample in (points, compared):
        scores = np.full(sample.values.shape, np.nan)
        for j, name in enumerate(of.names):
            if entry := labellers[name].get(source):
                scores[:, :, j] = scored(sample.values[:, :, j], sample.lengths, entry)
        matrices.append(scores)
    rewards = of.combined(matrices[0][:, 0])
    sides = of.combined(matrices[1].reshape(-1, len(of.names))).reshape(-1, 2)
    there, both, known = np.isfinite(rewards), np.isfinite(sides).all(axis=1), np.isfinite(points.human)
    told = there & known
    first, met = (
        (rewards[told] - 0.5, points.human[told]) if pairs else (sides[both, 0] - sides[both, 1], compared.human[both])
    )
    facts: dict[str, Any] = {"items": int(there.sum())}
    if there.any():
        facts |= {
            "mean": agreement.rounded(rewards[there].mean()),
            "below": agreement.rounded((rewards[there] < 0.5).mean()),
            "above": agreement.rounded((rewards[there] > 0.5).mean()),
            "histogram": histogram(rewards[there]),
            "agreement": agreement.with_people(rewards[told], points.human[told], first, met, pairs),
        }
    if len(of.names) > 1:
        apart = disagreement(matrices[0][:, 0])
        facts["disagreement"] = agreement.rounded(np.nanmean(apart)) if np.isfinite(apart).any() else None
    return facts


def one_sided(labels: Mapping[str, Any]) -> list[str]:
    """Warnings for sources whose rewards nearly all push the same way; rewards of comparisons never do."""
    said = []
    for source, of in labels["combined"].items():
        if not of["items"] or (max(of["below"], of["above"]) <= ONE_SIDED and abs(of["mean"] - 0.5) <= FAR):
            continue
        mean = min(max(of["mean"], 1e-4), 1 - 1e-4)
        way, nats = ("up" if mean > 0.5 else "down"), float(calibration.logit(np.array(mean))) / BETA
        said.append(
            f"{source}: the mean reward is {of['mean']:.3f}, {of['above']:.1%} lie above one half and "
            f"{of['below']:.1%} below. Without an offset training pushes nearly every response {way}: at beta = {BETA} "
            f"the mean reward asks for log-probs {nats:+.0f} nats from the reference's. Train with an offset "
            "(group_mean or ema, say), or calibrate by the distribution: quantile or zscore_sigmoid"
        )
    return said
