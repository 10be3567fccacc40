"""What a source says more than once is settled: one scale for its scores, one label for what several people judged.

Rows of a prompt come together in one shard, in the order of the input. A `Settling` says what to do; `shard` does it
to one shard's rows. Which records become which rows is the converters' work; nothing here knows formats.

Shapes: n rows; u units, where a unit is one row, or the two adjacent rows of a comparison.
"""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from statistics import median, multimode
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from schemas.errors import UserError
from schemas.feedback import identify

ANNOTATORS = ("keep_all", "majority", "mean", "median", "bradley_terry")
DUPLICATES = ("keep_all", "keep_first", "merge_mean", "reject")
SCALES = ("range", "minmax", "quantile", "sigmoid", "zscore")
POINTS = 4096  # a distribution is kept as at most so many values
Spread = dict[str, Any]  # of a source's raw rewards: n, sum, squares, low, high, values, counts


@dataclass(frozen=True)
class Settling:
    """The policies for what is said more than once, and for scores."""

    annotators: str = "keep_all"  # one label from several people's: majority, mean, median, bradley_terry
    duplicates: str = "keep_all"  # of one labeller's labels of one response: keep_first, merge_mean, reject
    scale: str = "range"  # range: by the ends of the scale; or by the distribution of the source's raw rewards
    ties: str = "drop"  # what becomes of a majority that is none

    @property
    def groups(self) -> bool:
        return (self.annotators, self.duplicates) != ("keep_all", "keep_all")

    @property
    def needed(self) -> bool:
        return self.groups or self.scale != "range"


# --- scales ------------------------------------------------------------------------------------


def spreads(rows: pa.Table) -> dict[str, Spread]:
    """What the raw rewards of each source's scalar rows are like."""
    chosen = rows.filter(pc.and_(pc.equal(rows["type"], "scalar"), pc.is_valid(rows["raw_reward"])))
    found = {}
    for source in pc.unique(chosen["source"]).to_pylist():
        of_source = chosen.filter(pc.equal(chosen["source"], source))
        raw, reward = of_source["raw_reward"].to_numpy(), of_source["reward"].to_numpy()
        values, counts = np.unique(raw, return_counts=True)
        first, last = raw.argmin(), raw.argmax()
        ends = [[raw[first], reward[first]], [raw[last], reward[last]]]
        found[source] = spread_of(len(raw), [raw.sum()], [(raw**2).sum()], ends, values, counts)
    return found


def spread_of(n: int, sums: Any, squares: Any, ends: Any, values: np.ndarray, counts: np.ndarray) -> Spread:
    """A spread from its sums, the pairs (raw, reward) at its ends, and its distinct values with their counts."""
    if len(values) > POINTS:  # the values at evenly spaced places in their order, each for those around it
        upto = np.cumsum(counts)
        at = np.searchsorted(upto, np.linspace(1, upto[-1], POINTS))
        at = np.unique(at)
        values, counts = values[at], np.diff(upto[at], prepend=0)
    low, high = (tuple(map(float, end)) for end in (min(ends), max(ends)))
    return {
        "n": int(n),
        "sum": math.fsum(sums),
        "squares": math.fsum(squares),
        "low": low,
        "high": high,
        "values": values.tolist(),
        "counts": counts.tolist(),
    }


def together(parts: Iterable[dict[str, Spread]]) -> dict[str, Spread]:
    """The spreads of a whole run; the same whenever the parts come in the same order."""
    by_source = defaultdict(list)
    for part in parts:
        for source, spread in part.items():
            by_source[source].append(spread)
    whole = {}
    for source, of in sorted(by_source.items()):
        values, where = np.unique(np.concatenate([s["values"] for s in of]), return_inverse=True)
        counts = np.bincount(where, np.concatenate([s["counts"] for s in of])).astype(np.int64)
        ends = [end for s in of for end in (s["low"], s["high"])]
        sums, squares = [s["sum"] for s in of], [s["squares"] for s in of]
        whole[source] = spread_of(sum(s["n"] for s in of), sums, squares, ends, values, counts)
    return whole


def statistics(method: str, spread: Spread) -> dict[str, Any]:
    """What of a source's spread its new rewards are made from; stored, and used again with `--calibration`."""
    mean = spread["sum"] / spread["n"]
    deviation = math.sqrt(max(0.0, spread["squares"] / spread["n"] - mean**2))
    (low, of_low), (high, of_high) = spread["low"], spread["high"]
    facts = {"n": spread["n"], "lower_is_better": of_low > of_high}
    if method == "minmax":
        return facts | {"low": low, "high": high}
    if method == "zscore":
        return facts | {"mean": mean, "deviation": deviation}
    if method == "quantile":
        counts = np.array(spread["counts"])
        places = (np.cumsum(counts) - counts / 2) / counts.sum()
        return facts | {"values": spread["values"], "quantiles": places.round(12).tolist()}
    return facts


def rescaled(raw: np.ndarray, method: str, of: dict[str, Any]) -> np.ndarray:
    """Rewards in [0, 1] of raw rewards [n].

    `minmax`: the place between the smallest and the largest; `zscore`: ½ + z/6, so that ±3 deviations are the ends;
    `sigmoid`: σ(raw); `quantile`: the share of raw rewards below, equal ones counted half. What lies outside is at the
    end; equal raw rewards are ½.
    """
    if method == "minmax":
        width = of["high"] - of["low"]
        reward = (raw - of["low"]) / width if width else np.full(len(raw), 0.5)
    elif method == "zscore":
        reward = 0.5 + (raw - of["mean"]) / of["deviation"] / 6 if of["deviation"] else np.full(len(raw), 0.5)
    elif method == "sigmoid":
        reward = 0.5 + 0.5 * np.tanh(raw / 2)
    else:
        reward = np.interp(raw, of["values"], of["quantiles"])
    reward = np.clip(reward, 0, 1)
    return 1 - reward if of["lower_is_better"] else reward


def _scale(rows: pa.Table, method: str, of: dict[str, dict[str, Any]]) -> tuple[pa.Table, int]:
    """The rows with new rewards, and how many have one."""
    reward, scalar = rows["reward"].to_numpy().copy(), pc.equal(rows["type"], "scalar")
    usable = pc.and_(scalar, pc.is_valid(rows["raw_reward"])).to_numpy()
    raw, sources = rows["raw_reward"].to_numpy(), rows["source"].to_numpy()
    for source in pc.unique(rows["source"].filter(pa.array(usable))).to_pylist():
        if source not in of:
            raise UserError(f"--calibration: no statistics of source {source!r}; there are {', '.join(of) or 'none'}")
        mine = usable & (sources == source)
        reward[mine] = rescaled(raw[mine], method, of[source])
    return _with(rows, "reward", pa.array(reward, pa.float32(), from_pandas=True)), int(usable.sum())


def _with(rows: pa.Table, name: str, values: pa.Array) -> pa.Table:
    at = rows.schema.get_field_index(name)
    return rows.set_column(at, rows.schema.field(at), values)


# --- labels of one thing -----------------------------------------------------------------------


@dataclass(frozen=True)
class Unit:
    """A label: its first row, whether it is a comparison, who gave it, its value, and all labels it stands for.

    A comparison's value is the probability that its first response in the order of their text is better.
    """

    row: int
    pair: bool
    turned: bool  # the comparison's second row is the first in order
    labeller: str | None
    value: float
    raws: tuple[float | None, ...]  # of the one response, or of both in their order
    values: tuple[float, ...]  # of the labels it stands for
    of: tuple[int, ...]  # and their first rows


@dataclass
class Verdicts:
    """What becomes of the units of a shard."""

    dropped: dict[int, str]  # first row → policy, merged into another unit
    refused: dict[int, tuple[str, str]]  # first row → reason, detail
    changed: dict[int, Unit]  # first row → the unit that is there now
    agreement: dict[str, list[float]]  # source → sums; see `_agree`


def shard(
    rows: pa.Table, how: Settling, scales: dict[str, dict[str, Any]]
) -> tuple[pa.Table, list[dict[str, Any]], Counter[str], dict[str, list[float]]]:
    """Settled rows, rows left out (as dicts with `reason` and `detail`), rows per policy, and sums of agreement."""
    touched: Counter[str] = Counter()
    if how.scale != "range":
        rows, touched["scale"] = _scale(rows, how.scale, scales)
    done = Verdicts({}, {}, {}, {})
    if how.groups:
        _judge(rows, how, done)
    keep = np.ones(rows.num_rows, bool)
    pairs = pc.equal(rows["type"], "pairwise").to_numpy()
    left_out = []
    for row, policy in done.dropped.items():
        touched[policy] += 2 if pairs[row] else 1
        keep[row : row + 1 + pairs[row]] = False
    for row, (reason, detail) in done.refused.items():
        keep[row : row + 1 + pairs[row]] = False
        for one in rows.slice(row, 1 + pairs[row]).to_pylist():
            left_out.append({"reason": reason, "detail": detail, "row": one})
    rows = _relabel(rows, done.changed)
    if done.changed or how.scale != "range":
        rows = identify(rows)
    rows = rows if keep.all() else rows.filter(pa.array(keep))
    return rows, left_out, touched, done.agreement


def _judge(rows: pa.Table, how: Settling, done: Verdicts) -> None:
    """Decide on every group of units with one source, type, prompt and response (or two)."""
    for source, kind, units in _groups(rows):
        if kind in ("demonstration", "unlabelled"):
            if how.duplicates != "keep_all":
                done.dropped.update((unit.row, "duplicates") for unit in units[1:])
            continue
        _agree(done.agreement.setdefault(source, [0.0] * 7), units)
        left = _without_duplicates(units, how, done)
        alone = how.annotators == "bradley_terry" and kind == "pairwise"  # a model of all the prompt's comparisons
        if how.annotators != "keep_all" and len(left) > 1 and not alone:
            _merge(left, _central(left, how.annotators, kind), how, done, "annotators")
    if how.annotators == "bradley_terry":
        _bradley_terry(rows, how, done)
    if how.annotators != "keep_all" and how.ties == "drop":
        _drop_ties(rows, done)


def _drop_ties(rows: pa.Table, done: Verdicts) -> None:
    """Ties that nobody's verdict outweighed; they were kept so that they count among the others."""
    rewards, pairs = rows["reward"].to_numpy(), pc.equal(rows["type"], "pairwise").to_numpy()
    for row in starts(rows).tolist():
        if pairs[row] and rewards[row] == 0.5 and row not in done.changed and row not in done.dropped:
            done.refused.setdefault(row, ("tie", "neither response was preferred"))


def _groups(rows: pa.Table) -> Iterable[tuple[str, str, list[Unit]]]:
    """(source, type, units) of what was labelled more than once, in the order of the rows."""
    codes = [rows[name].combine_chunks().dictionary_encode() for name in ("source", "type", "prompt_id", "response")]
    source, kind, prompt, response = (c.indices.to_numpy() for c in codes)
    pairs = pc.equal(rows["type"], "pairwise").to_numpy()
    first = starts(rows)
    other = np.where(pairs[first], response[np.minimum(first + 1, len(response) - 1)], response[first])
    both = np.sort(np.stack([response[first], other]), axis=0)
    keys = np.stack([source[first], kind[first], prompt[first], *both], axis=1)
    _, group, size = np.unique(keys, axis=0, return_inverse=True, return_counts=True)
    group = group.reshape(-1)
    members: dict[int, list[int]] = defaultdict(list)
    for i in np.flatnonzero(size[group] > 1).tolist():
        members[group[i]].append(int(first[i]))
    for firsts in members.values():
        at = firsts[0]
        yield (
            rows["source"][at].as_py(),
            rows["type"][at].as_py(),
            [_unit(rows, row, bool(pairs[at])) for row in firsts],
        )


def starts(rows: pa.Table) -> np.ndarray:
    """The first row of every unit: pairwise rows go two by two."""
    pairs = pc.equal(rows["type"], "pairwise").to_numpy()
    return np.flatnonzero(~pairs | (np.cumsum(pairs) % 2 == 1))


def _unit(rows: pa.Table, row: int, pair: bool) -> Unit:
    turned = pair and rows["response"][row].as_py() > rows["response"][row + 1].as_py()
    order = ((row + 1, row) if turned else (row, row + 1)) if pair else (row,)
    value = rows["reward"][order[0]].as_py()
    raws = tuple(rows["raw_reward"][at].as_py() for at in order)
    return Unit(row, pair, turned, rows["labeller"][row].as_py(), value, raws, (value,), (row,))


def _without_duplicates(units: list[Unit], how: Settling, done: Verdicts) -> list[Unit]:
    """The units that are left when each labeller's several labels are one, or none."""
    if how.duplicates == "keep_all":
        return units
    left: list[Unit | None] = []
    by_labeller: dict[str | None, list[Unit]] = defaultdict(list)
    for unit in units:
        by_labeller[unit.labeller].append(unit)
    for same in by_labeller.values():
        if len({unit.value for unit in same}) == 1 or how.duplicates == "keep_first":
            done.dropped.update((unit.row, "duplicates") for unit in same[1:])
            left.append(same[0])
        elif how.duplicates == "reject":
            values = ", ".join(f"{unit.value:g}" for unit in same)
            done.refused.update((unit.row, ("conflict", f"one labeller gave it {values}")) for unit in same)
        else:
            left.append(_merge(same, sum(u.value for u in same) / len(same), how, done, "duplicates"))
    return [unit for unit in left if unit]


def _central(units: list[Unit], annotators: str, kind: str) -> float | None:
    """The value that stands for all; None for a majority that is none."""
    values = [unit.value for unit in units]
    if annotators == "mean" or annotators == "bradley_terry":
        return sum(values) / len(values)
    if annotators == "median" or kind == "scalar":
        return median(values) if annotators == "median" else median(multimode(values))
    above, below = sum(v > 0.5 for v in values), sum(v < 0.5 for v in values)
    return None if above == below else float(above > below)


def _merge(units: list[Unit], value: float | None, how: Settling, done: Verdicts, policy: str) -> Unit | None:
    """One unit that stands for all; None where they even out, and are left out or kept as one half."""
    tie = value is None or (value == 0.5 and units[0].pair)
    if tie and (how.ties == "drop" or not units[0].pair):
        reason = ("tie" if units[0].pair else "conflict", f"{len(units)} labels that even out")
        done.refused.update((unit.row, reason) for unit in units)
        return None
    first = units[0]
    merged = replace(
        first,
        labeller=_labeller([unit.labeller for unit in units]),
        value=0.5 if value is None else value,
        raws=tuple(_mean(each) for each in zip(*(unit.raws for unit in units), strict=True)),
        values=tuple(value for unit in units for value in unit.values),
        of=tuple(row for unit in units for row in unit.of),
    )
    done.changed[first.row] = merged
    done.dropped.update((unit.row, policy) for unit in units[1:])
    return merged


def _mean(raws: tuple[float | None, ...]) -> float | None:
    given = [raw for raw in raws if raw is not None]
    return math.fsum(given) / len(given) if len(given) == len(raws) else None


def _labeller(labellers: list[str | None]) -> str | None:
    if len(set(labellers)) == 1:
        return labellers[0]
    return "human" if all((one or "").startswith("human") for one in labellers) else None


def _relabel(rows: pa.Table, changed: dict[int, Unit]) -> pa.Table:
    """The rows with the labels that stand for several."""
    if not changed:
        return rows
    columns = {name: rows[name].to_pylist() for name in ("reward", "raw_reward", "labeller", "metadata")}
    metadata = rows["metadata"].to_pylist()
    for unit in changed.values():
        told = _told([metadata[row] for row in unit.of], unit)
        at = range(unit.row, unit.row + len(unit.raws))
        for row, raw, value in zip(
            reversed(at) if unit.turned else at, unit.raws, (unit.value, 1 - unit.value), strict=False
        ):
            columns["reward"][row], columns["raw_reward"][row] = value, raw
            columns["labeller"][row], columns["metadata"][row] = unit.labeller, told
    for name, values in columns.items():
        rows = _with(rows, name, pa.array(values, rows.schema.field(name).type))
    return rows


def _told(metadata: list[str | None], unit: Unit) -> str:
    """What the labels' metadata agree on, how many there are, and the share that agrees with what became of them."""
    first, *others = ([*json.loads(text or "{}").items()] for text in metadata)
    side = _side(unit.value)
    agree = sum(_side(value) == side for value in unit.values) / len(unit.values)
    facts = {k: v for k, v in first if all((k, v) in other for other in others)}
    facts |= {"annotations": len(unit.values), "agreement": round(agree, 4)}
    return json.dumps(facts, ensure_ascii=False, sort_keys=True, separators=(",", ":"))


def _side(value: float) -> int:
    return (value > 0.5) - (value < 0.5)


# --- Bradley and Terry -------------------------------------------------------------------------


def _bradley_terry(rows: pa.Table, how: Settling, done: Verdicts) -> None:
    """All comparisons of a source's prompt get the probability that a Bradley-Terry model of them gives."""
    by_prompt: dict[tuple[str, str], list[Unit]] = defaultdict(list)
    pairs = pc.equal(rows["type"], "pairwise").to_numpy()
    prompts, sources = rows["prompt_id"].to_pylist(), rows["source"].to_pylist()
    for row in starts(rows).tolist():
        if pairs[row] and row not in done.dropped and row not in done.refused:
            by_prompt[sources[row], prompts[row]].append(done.changed.get(row) or _unit(rows, row, True))
    for units in by_prompt.values():
        if len(units) < 2:
            continue
        number: dict[str, int] = {}
        sides = []
        for unit in units:
            texts = sorted(rows["response"][row].as_py() for row in (unit.row, unit.row + 1))
            sides.append(tuple(number.setdefault(text, len(number)) for text in texts))
        strength = strengths([(i, j, unit.value) for (i, j), unit in zip(sides, units, strict=True)])
        of: dict[tuple[int, ...], list[Unit]] = defaultdict(list)
        for both, unit in zip(sides, units, strict=True):
            of[both].append(unit)
        for (i, j), same in of.items():
            _merge(same, float(strength[i] / (strength[i] + strength[j])), how, done, "annotators")


def strengths(comparisons: list[tuple[int, int, float]], prior: float = 0.1, rounds: int = 200) -> np.ndarray:
    """Bradley-Terry strengths, from (i, j, probability that i is better), by Hunter's (2004) MM updates.

    `prior`: so many wins and losses of each against an average response keep what always won finite.
    """
    i, j, p = (np.array(column) for column in zip(*comparisons, strict=True))
    n = 1 + max(i.max(), j.max())
    wins = prior + np.bincount(i, p, n) + np.bincount(j, 1 - p, n)
    strength = np.ones(n)
    for _ in range(rounds):
        met = 1 / (strength[i] + strength[j])
        strength = wins / (np.bincount(i, met, n) + np.bincount(j, met, n) + 2 * prior / (strength + 1))
    return strength


# --- agreement ---------------------------------------------------------------------------------


def _agree(sums: list[float], units: list[Unit]) -> None:
    """Add a group to (items, values, Σv, Σv², Σ_items Σ_{i≠j}(vᵢ − vⱼ)²/(m − 1), pairs, pairs that agree).

    Only where at least two labellers judged, each counted with the first label. A comparison counts in both
    directions, so that its order does not matter.
    """
    values = list({unit.labeller: unit.value for unit in reversed(units) if unit.labeller}.values())
    m = len(values)
    if m < 2:
        return
    pairs = m * (m - 1) // 2
    sums[0] += 1
    sums[5] += pairs
    sums[6] += sum(values[i] == values[j] for i in range(m) for j in range(i))
    for v in (values, [1 - x for x in values]) if units[0].pair else (values,):
        squares, total = math.fsum(x * x for x in v), math.fsum(v)
        for i, more in enumerate((m, total, squares, 2 * (m * squares - total**2) / (m - 1)), 1):
            sums[i] += more


def agreement(parts: Iterable[dict[str, list[float]]]) -> dict[str, dict[str, Any]]:
    """Per source: items that several judged, the share of pairs of labels that agree, Krippendorff's interval alpha."""
    sums: dict[str, list[list[float]]] = defaultdict(list)
    for part in parts:
        for source, one in part.items():
            sums[source].append(one)
    found = {}
    for source, of in sorted(sums.items()):
        items, n, total, squares, within, pairs, equal = (math.fsum(x) for x in zip(*of, strict=True))
        if not pairs:
            continue
        expected = 2 * (n * squares - total**2) / (n - 1)
        alpha = round(1 - within / expected, 6) if expected > 0 else None
        found[source] = {"items": int(items), "raw_agreement": round(equal / pairs, 6), "krippendorff_alpha": alpha}
    return found
