"""What a source says more than once is settled: one scale for its scores, one label for what several people judged.

A `Settling` says what to do. `labels` takes what there is to decide on out of rows: a unit is one row, or the two
adjacent rows of a comparison, and its texts are hashes. `judge` decides on the units of some prompts, in the order of
the input, and `apply` does to the rows what was decided. So texts stay where they are, and labels alone are gathered by
prompt. Which records become which rows is the converters' work; nothing here knows formats.
"""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median, multimode
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from schemas.errors import UserError
from schemas.feedback import FEEDBACK, identify

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


def spreads(rows: pa.Table, lowered: Collection[str] = ()) -> dict[str, Spread]:
    """What the raw rewards of each source's scalar rows are like; of `lowered` sources, the lower are the better."""
    chosen = rows.filter(pc.and_(pc.equal(rows["type"], "scalar"), pc.is_valid(rows["raw_reward"])))
    found = {}
    for source in pc.unique(chosen["source"]).to_pylist():
        of_source = chosen.filter(pc.equal(chosen["source"], source))
        raw = of_source["raw_reward"].to_numpy()
        values, counts = np.unique(raw, return_counts=True)
        of = {"lower_is_better": source in lowered, "low": float(raw.min()), "high": float(raw.max())}
        found[source] = of | spread_of(np.ones(len(raw)), raw, np.zeros(len(raw)), values, counts)
    return found


def spread_of(n: Any, means: Any, squares: Any, values: np.ndarray, counts: np.ndarray) -> Spread:
    """What a spread says of parts, and of the distinct values with their counts.

    Of each part: how many there are, their mean, and the sum of the squares of what they are away from it.
    """
    n, means = np.asarray(n, float), np.asarray(means, float)
    with np.errstate(over="ignore", invalid="ignore"):  # `statistics` refuses what is too large
        mean = math.fsum(n * (means / n.sum()))
        around = math.fsum([*squares, *(n * (means - mean) ** 2)])
    if len(values) > POINTS:  # the values at evenly spaced places in their order, each for those around it
        upto = np.cumsum(counts)
        at = np.searchsorted(upto, np.linspace(1, upto[-1], POINTS))
        at = np.unique(at)
        values, counts = values[at], np.diff(upto[at], prepend=0)
    return {
        "n": int(n.sum()),
        "mean": mean,
        "squares": around,
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
        if len({s["lower_is_better"] for s in of}) > 1:
            raise UserError(
                f"{source}: higher scores are better in some of its files, lower ones in others; name each "
                "kind by a --source of its own, in runs of their own"
            )
        ends = {"low": min(s["low"] for s in of), "high": max(s["high"] for s in of)}
        n, means, squares = ([s[name] for s in of] for name in ("n", "mean", "squares"))
        spread = spread_of(n, means, squares, values, counts)
        whole[source] = {"lower_is_better": of[0]["lower_is_better"], **ends, **spread}
    return whole


def statistics(method: str, spread: Spread) -> dict[str, Any]:
    """What of a source's spread its new rewards are made from; stored, and used again with `--calibration`."""
    facts = {name: spread[name] for name in ("n", "lower_is_better")}
    if method == "minmax":
        return facts | {name: spread[name] for name in ("low", "high")}
    if method == "zscore":
        deviation = math.sqrt(spread["squares"] / spread["n"])
        if not math.isfinite(deviation):
            raise UserError(f"raw rewards up to {max(-spread['low'], spread['high']):g} are too large for zscore")
        return facts | {"mean": spread["mean"], "deviation": deviation}
    if method == "quantile":
        counts = np.array(spread["counts"])
        places = (np.cumsum(counts) - counts / 2) / counts.sum()
        return facts | {"values": spread["values"], "quantiles": places.round(12).tolist()}
    return facts


def require_direction(stored: dict[str, dict[str, Any]], spreads: dict[str, Spread]) -> None:
    """`UserError` where one end of a source's scores is better in stored statistics, and the other one here."""
    for source, spread in spreads.items():
        if source in stored and stored[source]["lower_is_better"] != spread["lower_is_better"]:
            here, there = ("lower", "higher") if spread["lower_is_better"] else ("higher", "lower")
            told = f"{here} scores of {source} are better here, and {there} ones in these statistics"
            raise UserError(f"--calibration: {told}; make new ones")


def rescaled(raw: np.ndarray, method: str, of: dict[str, Any]) -> np.ndarray:
    """Rewards in [0, 1] of raw rewards [n].

    `minmax`: the place between the smallest and the largest; `zscore`: ½ + z/6, so that ±3 deviations are the ends;
    `sigmoid`: σ(raw); `quantile`: the share of raw rewards below, equal ones counted half. What lies outside is at the
    end; equal raw rewards are ½.
    """
    if method == "minmax":
        low, width = of["low"] / 2, of["high"] / 2 - of["low"] / 2  # halves: the whole may be too large
        reward = (raw / 2 - low) / width if width else np.full(len(raw), 0.5)
    elif method == "zscore":
        reward = 0.5 + (raw - of["mean"]) / of["deviation"] / 6 if of["deviation"] else np.full(len(raw), 0.5)
    elif method == "sigmoid":
        reward = 0.5 + 0.5 * np.tanh(raw / 2)
    else:
        reward = np.interp(raw, of["values"], of["quantiles"])
    reward = np.clip(reward, 0, 1)
    return 1 - reward if of["lower_is_better"] else reward


def _scale(
    rows: pa.Table, method: str, of: dict[str, dict[str, Any]], name: str = "reward", raw_name: str = "raw_reward"
) -> tuple[pa.Table, int]:
    """The rows (or labels) with new rewards, and how many have one."""
    reward, scalar = rows[name].to_numpy().copy(), pc.equal(rows["type"], "scalar")
    usable = pc.and_(scalar, pc.is_valid(rows[raw_name])).to_numpy()
    raw, sources = rows[raw_name].to_numpy(), rows["source"].to_numpy()
    for source in pc.unique(rows["source"].filter(pa.array(usable))).to_pylist():
        if source not in of:
            raise UserError(f"--calibration: no statistics of source {source!r}; there are {', '.join(of) or 'none'}")
        mine = usable & (sources == source)
        reward[mine] = rescaled(raw[mine], method, of[source])
    return _with(rows, name, pa.array(reward, pa.float32(), from_pandas=True)), int(usable.sum())


def _with(rows: pa.Table, name: str, values: pa.Array) -> pa.Table:
    at = rows.schema.get_field_index(name)
    return rows.set_column(at, rows.schema.field(at), values)


# --- labels of one thing -----------------------------------------------------------------------

_OF_RESPONSES = {"response": pa.binary(), "reward": pa.float32(), "raw_reward": pa.float64()}
# One entry a unit. A response is its hash; a comparison has two, with two rewards and raw rewards.
LABELS = pa.schema(
    [
        ("row", pa.int64()),  # the unit's first
        *((name, pa.string()) for name in ("type", "source", "labeller", "prompt_id", "metadata")),
        *((f"{name}_{i}", kind) for name, kind in _OF_RESPONSES.items() for i in (1, 2)),
    ]
)
WAITING = FEEDBACK.append(pa.field("position", pa.int64()))  # rows to be settled, and which records they are of
# What becomes of a unit: it is kept with new labels, or it goes, refused for a reason or merged into another.
VERDICTS = pa.schema(
    [
        ("at", pa.int64()),  # its place among the labels
        ("kept", pa.bool_()),
        ("rows", pa.int8()),
        *((name, pa.string()) for name in ("reason", "detail", "type", "labeller", "metadata")),
        *((f"{name}_{i}", pa.float64()) for name in ("reward", "raw_reward") for i in (1, 2)),
    ]
)


def labels(rows: pa.Table, before: int, seed: int) -> pa.Table:
    """The labels of rows, the first of which has the number `before`.

    `seed` is drawn anew for each run: nobody can prepare two responses with one hash.
    """
    first = starts(rows)
    pair = pc.equal(rows["type"], "pairwise").to_numpy()[first]
    responses = rows["response"].combine_chunks().cast(pa.binary()).to_pylist()
    hashed = pa.array([xxhash.xxh3_128_digest(text, seed) for text in responses], pa.binary())
    one, other = pa.array(first), pa.array(first + 1, mask=~pair)
    columns: dict[str, Any] = {"row": pa.array(first + before)}
    for name in ("type", "source", "labeller", "prompt_id", "metadata"):
        columns[name] = rows[name].take(one)
    for name, values in (("response", hashed), ("reward", rows["reward"]), ("raw_reward", rows["raw_reward"])):
        columns |= {f"{name}_1": values.take(one), f"{name}_2": values.take(other)}
    return pa.table(columns, schema=LABELS)


def starts(rows: pa.Table) -> np.ndarray:
    """The first row of every unit: pairwise rows go two by two."""
    pairs = pc.equal(rows["type"], "pairwise").to_numpy()
    return np.flatnonzero(~pairs | (np.cumsum(pairs) % 2 == 1))


@dataclass(frozen=True)
class Unit:
    """A label: its place, whether it is a comparison, who gave it, its value, and all labels it stands for.

    A comparison's value is the probability that the response which is first in the first unit of both is better.
    """

    at: int
    type: str
    turned: bool  # that response is its second
    labeller: str | None
    value: float
    raws: tuple[float | None, ...]  # of the one response, or of both in their order
    values: tuple[float, ...]  # of the labels it stands for
    of: tuple[int, ...]  # and their places
    metadata: tuple[str | None, ...]  # and their metadata

    @property
    def pair(self) -> bool:
        return self.type == "pairwise"


@dataclass
class Decided:
    """What becomes of the units of some prompts."""

    dropped: dict[int, str]  # place → policy, merged into another unit
    refused: dict[int, tuple[str, str]]  # place → reason, detail
    changed: dict[int, Unit]  # place → the unit that is there now
    agreement: dict[str, list[float]]  # source → sums; see `_agree`


def judge(
    of: pa.Table, how: Settling, scales: dict[str, dict[str, Any]]
) -> tuple[pa.Table, Counter[str], dict[str, list[float]]]:
    """Verdicts on the `labels` of some prompts, rows that each policy merged away or changed, and sums of agreement."""
    of = of.combine_chunks()
    if how.scale != "range":
        of, _ = _scale(of, how.scale, scales, "reward_1", "raw_reward_1")
    done = Decided({}, {}, {}, {})
    for source, kind, units in _groups(of):
        _settle(source, kind, units, how, done)
    if how.annotators == "bradley_terry":
        _bradley_terry(of, how, done)
    if how.annotators != "keep_all" and how.ties == "drop":
        _drop_ties(of, done)
    pairs = pc.equal(of["type"], "pairwise").to_numpy()
    touched: Counter[str] = Counter()
    for at, policy in done.dropped.items():
        touched[policy] += 1 + int(pairs[at])
    return _verdicts(done, pairs), touched, done.agreement


def _verdicts(done: Decided, pairs: np.ndarray) -> pa.Table:
    found = []
    for at in sorted(done.dropped.keys() | done.refused.keys() | done.changed.keys()):
        one: dict[str, Any] = {"at": at, "rows": 1 + int(pairs[at]), "kept": False}
        if at in done.refused:
            one["reason"], one["detail"] = done.refused[at]
        elif at not in done.dropped:
            unit = done.changed[at]
            one |= {"kept": True, "type": unit.type, "labeller": unit.labeller, "metadata": _told(unit)}
            rewards, raws = (unit.value, 1 - unit.value)[: len(unit.raws)], unit.raws
            if unit.turned:
                rewards, raws = rewards[::-1], raws[::-1]
            one |= {f"reward_{i}": reward for i, reward in enumerate(rewards, 1)}
            one |= {f"raw_reward_{i}": raw for i, raw in enumerate(raws, 1)}
        found.append(one)
    return pa.Table.from_pylist(found, schema=VERDICTS)


def _settle(source: str, kind: str, units: list[Unit], how: Settling, done: Decided) -> None:
    """Decide on units with one source, type, prompt and response (or two)."""
    if kind in ("demonstration", "unlabelled"):
        if how.duplicates != "keep_all":
            done.dropped.update((unit.at, "duplicates") for unit in units[1:])
        return
    _agree(done.agreement.setdefault(source, [0.0] * 7), units)
    left = _without_duplicates(units, how, done)
    alone = how.annotators == "bradley_terry" and kind == "pairwise"  # a model of all the prompt's comparisons
    if how.annotators != "keep_all" and len(left) > 1 and not alone:
        _merge(left, _central(left, how.annotators, kind), how, done, "annotators", kind)


def _drop_ties(of: pa.Table, done: Decided) -> None:
    """Ties that nobody's verdict outweighed; they were kept so that they count among the others."""
    ties = pc.and_(pc.equal(of["type"], "pairwise"), pc.equal(of["reward_1"], 0.5)).to_numpy()
    for at in np.flatnonzero(ties).tolist():
        if at not in done.changed and at not in done.dropped:
            done.refused.setdefault(at, ("tie", "neither response was preferred"))


def _groups(of: pa.Table) -> Iterable[tuple[str, str, list[Unit]]]:
    """(source, type, units) of what was labelled more than once, in the order of the labels."""
    both = of["response_1"], of["response_2"]
    keys = {name: of[name] for name in ("source", "type", "prompt_id")}
    keys |= {"low": pc.min_element_wise(*both), "high": pc.max_element_wise(*both)}
    grouped = pa.table({**keys, "at": np.arange(of.num_rows)}).group_by([*keys], use_threads=False)
    found = grouped.aggregate([("at", "list")])
    several = found.filter(pc.greater(pc.list_value_length(found["at_list"]), 1))
    entries = iter(of.take(several["at_list"].combine_chunks().flatten()).to_pylist())
    for group in several["at_list"].to_pylist():
        members = [(at, next(entries)) for at in group]
        first = members[0][1]
        yield first["source"], first["type"], [_unit(at, entry, first["response_1"]) for at, entry in members]


def _unit(at: int, entry: dict[str, Any], first: bytes) -> Unit:
    pair = entry["type"] == "pairwise"
    turned = pair and entry["response_1"] != first
    order = ((2, 1) if turned else (1, 2)) if pair else (1,)
    value, raws = _exact(entry[f"reward_{order[0]}"]), tuple(entry[f"raw_reward_{i}"] for i in order)
    return Unit(at, entry["type"], turned, entry["labeller"], value, raws, (value,), (at,), (entry["metadata"],))


def _exact(reward: float) -> float:
    """The decimal that a reward of 32 bits, or a sum of decimals, stands for: .4 and .6 even out."""
    return round(reward, 7)


def _without_duplicates(units: list[Unit], how: Settling, done: Decided) -> list[Unit]:
    """The units that are left when each labeller's several labels are one, or none."""
    if how.duplicates == "keep_all":
        return units
    left: list[Unit | None] = []
    by_labeller: dict[str | None, list[Unit]] = defaultdict(list)
    for unit in units:
        by_labeller[unit.labeller].append(unit)
    for same in by_labeller.values():
        if len({unit.value for unit in same}) == 1 or how.duplicates == "keep_first":
            done.dropped.update((unit.at, "duplicates") for unit in same[1:])
            left.append(same[0])
        elif how.duplicates == "reject":
            values = ", ".join(f"{unit.value:g}" for unit in same)
            done.refused.update((unit.at, ("conflict", f"one labeller gave it {values}")) for unit in same)
        else:
            left.append(_merge(same, fmean(u.value for u in same), how, done, "duplicates"))
    return [unit for unit in left if unit]


def _central(units: list[Unit], annotators: str, kind: str) -> float | None:
    """The value that stands for all; None for a majority that is none."""
    values = [unit.value for unit in units]
    if annotators != "majority" or kind == "scalar":
        return _middle(annotators)(values)
    above, below = sum(v > 0.5 for v in values), sum(v < 0.5 for v in values)
    return None if above == below else float(above > below)


def _middle(annotators: str) -> Callable[[Sequence[float]], float]:
    """What numbers have in common: their median, the most frequent one (the middle of several), or their mean."""
    named = {"median": median, "majority": lambda values: median(multimode(values))}
    return named.get(annotators, fmean)


def _merge(
    units: list[Unit], value: float | None, how: Settling, done: Decided, policy: str, kind: str = ""
) -> Unit | None:
    """One unit that stands for all; None where they even out, and are left out or kept as one half.

    A vote on thumbs is a thumb; their mean or median is a score.
    """
    value = None if value is None else _exact(value)
    tie = value is None or (value == 0.5 and units[0].pair)
    if tie and (how.ties == "drop" or not units[0].pair):
        reason = ("tie" if units[0].pair else "conflict", f"{len(units)} labels that even out")
        done.refused.update((unit.at, reason) for unit in units)
        return None
    first = units[0]
    voted = policy == "annotators" and how.annotators == "majority"
    middle = _middle(how.annotators if policy == "annotators" and (kind == "scalar" or not voted) else "mean")
    merged = replace(
        first,
        type=kind if voted else "pairwise" if first.pair else "scalar",
        labeller=_labeller([unit.labeller for unit in units]),
        value=0.5 if value is None else value,
        raws=tuple(
            None if None in each else middle(each)  # type: ignore[arg-type]
            for each in zip(*(unit.raws for unit in units), strict=True)
        ),
        values=tuple(value for unit in units for value in unit.values),
        of=tuple(at for unit in units for at in unit.of),
        metadata=tuple(one for unit in units for one in unit.metadata),
    )
    done.changed[first.at] = merged
    done.dropped.update((unit.at, policy) for unit in units[1:])
    return merged


def _labeller(labellers: list[str | None]) -> str | None:
    if len(set(labellers)) == 1:
        return labellers[0]
    return "human" if all((one or "").startswith("human") for one in labellers) else None


def _told(unit: Unit) -> str:
    """What the labels' metadata agree on, how many there are, and the share that agrees with what became of them."""
    first, *others = ([*json.loads(text or "{}").items()] for text in unit.metadata)
    side = _side(unit.value)
    agree = sum(_side(value) == side for value in unit.values) / len(unit.values)
    facts = {k: v for k, v in first if all((k, v) in other for other in others)}
    facts |= {"annotations": len(unit.values), "agreement": round(agree, 4)}
    return json.dumps(facts, ensure_ascii=False, sort_keys=True, separators=(",", ":"))


def _side(value: float) -> int:
    return (value > 0.5) - (value < 0.5)


# --- what was decided, done --------------------------------------------------------------------


def apply(
    rows: pa.Table, verdicts: pa.Table, how: Settling, scales: dict[str, dict[str, Any]]
) -> tuple[pa.Table, list[dict[str, Any]], int]:
    """Settled rows, rows left out (dicts with `reason`, `detail`, the row and its place), and how many were scaled.

    `verdicts` are those on these rows; their `at` is the number of the unit's first row.
    """
    before, scaled = rows, 0
    if how.scale != "range":
        rows, scaled = _scale(rows, how.scale, scales)
        rows = identify(rows)
    rows = _relabelled(rows, verdicts.filter(verdicts["kept"]))
    gone = verdicts.filter(pc.invert(verdicts["kept"]))
    keep = np.ones(rows.num_rows, bool)
    keep[_rows_of(gone)[0]] = False
    refused = gone.filter(pc.is_valid(gone["reason"])).select(["at", "rows", "reason", "detail"]).to_pylist()
    left_out = [
        {"reason": one["reason"], "detail": one["detail"], "at": at, "row": row}
        for one in refused
        for at, row in enumerate(before.slice(one["at"], one["rows"]).to_pylist(), one["at"])
    ]
    return rows if keep.all() else rows.filter(pa.array(keep)), left_out, scaled


def _rows_of(verdicts: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """The rows that verdicts are on, and for each its verdict and whether it is the unit's second row [n, 2]."""
    rows = verdicts["rows"].to_numpy()
    which = np.repeat(np.arange(len(rows)), rows)
    second = np.concatenate([[0], np.diff(which) == 0])[: len(which)].astype(int)
    return verdicts["at"].to_numpy()[which] + second, np.stack([which, second], axis=1)


def _relabelled(rows: pa.Table, verdicts: pa.Table) -> pa.Table:
    """The rows with the labels that stand for several, and the ids that go with them."""
    if not verdicts.num_rows:
        return rows
    at, of = _rows_of(verdicts)
    changed = rows.take(pa.array(at))
    for name in ("reward", "raw_reward"):
        both = np.stack([verdicts[f"{name}_{i}"].to_numpy() for i in (1, 2)], axis=1)
        values = pa.array(both[of[:, 0], of[:, 1]], from_pandas=True)
        changed = _with(changed, name, values.cast(rows.schema.field(name).type))
    for name in ("type", "labeller", "metadata"):
        changed = _with(changed, name, verdicts[name].take(pa.array(of[:, 0])))
    order = np.arange(rows.num_rows)
    order[at] = rows.num_rows + np.arange(len(at))
    return pa.concat_tables([rows, identify(changed)]).take(pa.array(order)).combine_chunks()


# --- Bradley and Terry -------------------------------------------------------------------------


def _bradley_terry(of: pa.Table, how: Settling, done: Decided) -> None:
    """All comparisons of a source's prompt get the probability that a Bradley-Terry model of them gives."""
    by_prompt: dict[tuple[str, str], list[tuple[int, dict[str, Any]]]] = defaultdict(list)
    for at, entry in enumerate(of.to_pylist()):
        if entry["type"] == "pairwise":
            by_prompt[entry["source"], entry["prompt_id"]].append((at, entry))
    for entries in by_prompt.values():
        number: dict[bytes, int] = {}
        first: dict[frozenset[bytes], bytes] = {}  # as in `_groups`, where the unit may have been merged
        of_sides: dict[tuple[int, ...], list[Unit]] = defaultdict(list)
        for at, entry in entries:
            both = entry["response_1"], entry["response_2"]
            ahead = first.setdefault(frozenset(both), both[0])
            if at not in done.dropped and at not in done.refused:
                unit = done.changed.get(at) or _unit(at, entry, ahead)
                texts = reversed(both) if unit.turned else both
                of_sides[tuple(number.setdefault(text, len(number)) for text in texts)].append(unit)
        met = [(i, j, unit.value) for (i, j), units in of_sides.items() for unit in units]
        if len(met) > 1:
            strength = strengths(met)
            for (i, j), units in of_sides.items():
                _merge(units, float(strength[i] / (strength[i] + strength[j])), how, done, "annotators")


def strengths(comparisons: list[tuple[int, int, float]], prior: float = 0.1, rounds: int = 20_000) -> np.ndarray:
    """Bradley-Terry strengths, from (i, j, probability that i is better), by Hunter's (2004) MM updates.

    They end after `rounds`, or once none changes a strength by more than 1e-9 of it.

    `prior`: so many wins and losses of each against an average response keep what always won finite.
    """
    i, j, p = (np.array(column) for column in zip(*comparisons, strict=True))
    n = 1 + max(i.max(), j.max())
    wins = prior + np.bincount(i, p, n) + np.bincount(j, 1 - p, n)
    strength = np.ones(n)
    for _ in range(rounds):
        met, before = 1 / (strength[i] + strength[j]), strength
        strength = wins / (np.bincount(i, met, n) + np.bincount(j, met, n) + 2 * prior / (strength + 1))
        if (np.abs(strength - before) < 1e-9 * before).all():
            break
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
