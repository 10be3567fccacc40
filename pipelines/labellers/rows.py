"""Feedback rows to items that labellers score, and scores to rows with a new label. Knows neither Beam nor labellers.

What gets one label is a unit: a response, or two responses to one prompt that are compared. What is made of a table of
rows depends on those rows alone, so that it can be made again when all scores are there.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations, groupby, pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.labellers.base import Item
from pipelines.labellers.sample import Sample
from schemas.errors import Reject
from schemas.feedback import identify, metadata_text

PAIRS = {
    "adjacent": "each response to a prompt with the next",
    "all": "each response to a prompt with every other",
}
BEFORE, ABOUT = "labels", "labelled"  # metadata: the labels that a row had before, and how it got its own
AGAINST = {"human": "labels whose labeller is human or human:<hash>", "all": "whatever label a row had before"}
Label = dict[str, Any]  # labeller, type, reward, raw_reward, and of a comparison its comparison_id


@dataclass(frozen=True)
class Asking:
    """How items are made of rows."""

    pairs: bool = False  # two responses are compared
    neighbours: str = "adjacent"  # which responses to a prompt are compared where they are no comparison yet
    only_missing: bool = False  # rows that have a label stay as they are
    against: str = "human"  # which earlier labels scores are compared with


@dataclass(frozen=True)
class Unit:
    """What gets one label: one row or two, the same of the item, and for two their single items."""

    rows: tuple[int, ...]
    item: int  # in `Plan.items`
    turned: bool = False  # the item's first response is that of the second row
    singles: tuple[int, ...] = ()  # in `Plan.singles`, of each row


@dataclass
class Plan:
    """What is to be labelled in a table of rows."""

    items: list[Item] = field(default_factory=list)
    singles: list[Item] = field(default_factory=list)  # the responses of compared ones, one by one
    units: list[Unit] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)  # rows that stay as they are
    same_as: dict[int, int] = field(default_factory=dict)  # row → an earlier one with the same response
    alone: list[int] = field(default_factory=list)  # rows without another response to compare with


def plan(rows: pa.Table, asking: Asking) -> Plan:
    """Items and units; two rows with one prompt, response and metadata share an item."""
    made, maker = Plan(), _Maker(rows)
    missing = pc.equal(rows["type"], "unlabelled").to_pylist()
    chosen = [not asking.only_missing or one for one in missing]
    made.kept = [i for i, one in enumerate(chosen) if not one]
    if not asking.pairs:
        made.units = [Unit((i,), maker.single(i)) for i, one in enumerate(chosen) if one]
        made.items = maker.singles
        return made
    compared = pc.equal(rows["type"], "pairwise").to_numpy()
    firsts = np.flatnonzero(compared)[::2].tolist()
    found = [(i, i + 1) for i in firsts if chosen[i]]
    loose = [i for i, one in enumerate(chosen) if one and not compared[i]]
    found += _neighbours(rows, loose, asking.neighbours, made)
    made.units = [maker.pair(*both) for both in sorted(found)]
    made.items, made.singles = maker.items, maker.singles
    return made


def _neighbours(rows: pa.Table, loose: list[int], which: str, made: Plan) -> Iterator[tuple[int, int]]:
    """Pairs of rows that lie together, of one prompt and source; rows that cannot be in one are noted in `made`."""
    prompts = rows["prompt_id"].combine_chunks().dictionary_encode().indices.to_numpy()
    run = np.cumsum(np.diff(prompts, prepend=prompts[:1]) != 0)  # rows that lie together have one number
    sources, responses = rows["source"].to_pylist(), rows["response"].to_pylist()
    for _, members in groupby(sorted(loose, key=lambda i: (run[i], sources[i], i)), lambda i: (run[i], sources[i])):
        first: dict[str, int] = {}
        for i in members:
            if (of := first.setdefault(responses[i], i)) != i:
                made.same_as[i] = of
        if len(first) == 1:
            made.alone += first.values()
        yield from pairwise(first.values()) if which == "adjacent" else combinations(first.values(), 2)


class _Maker:
    """Makes items of rows, each once."""

    def __init__(self, rows: pa.Table):
        self.prompts, self.responses = rows["prompt"].to_pylist(), rows["response"].to_pylist()
        self.prompt_ids, self.metadata = (
            rows["prompt_id"].to_pylist(),
            [*map(metadata_of, rows["metadata"].to_pylist())],
        )
        self.items, self.singles = list[Item](), list[Item]()
        self._known: dict[tuple[str, ...], int] = {}

    def single(self, row: int) -> int:
        return self._put(self.singles, (row,))

    def pair(self, first: int, second: int) -> Unit:
        """The item's first response is the one with the smaller hash: its place tells nothing of which was better."""
        turned = _hash(self.responses[second]) < _hash(self.responses[first])
        order = (second, first) if turned else (first, second)
        singles = self.single(first), self.single(second)
        return Unit((first, second), self._put(self.items, order), turned, singles)

    def _put(self, items: list[Item], of: tuple[int, ...]) -> int:
        about = {k: v for k, v in self.metadata[of[0]].items() if k not in (BEFORE, ABOUT)}
        texts = tuple(self.responses[i] for i in of)
        key = self.prompt_ids[of[0]], metadata_text(about), *texts
        if key not in self._known:
            self._known[key] = len(items)
            items.append(Item(self.prompts[of[0]], texts, about))
        return self._known[key]


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def metadata_of(text: str | None) -> dict[str, Any]:
    return json.loads(text) if text else {}


# --- labels that were there before ---------------------------------------------------------------


def labels(rows: pa.Table) -> list[list[Label]]:
    """The labels of each row: those that it had before, and its own."""
    names = ("labeller", "type", "reward", "raw_reward", "comparison_id")
    columns = zip(*(rows[name].to_pylist() for name in names), rows["metadata"].to_pylist(), strict=True)
    found = []
    for *own, metadata in columns:
        label = {k: v for k, v in zip(names, own, strict=True) if k != "comparison_id" or v is not None}
        before = [*_before(metadata_of(metadata))]
        found.append(before if label["type"] == "unlabelled" else [*before, label])
    return found


def _before(metadata: dict[str, Any]) -> list[Label]:
    """The labels in a row's metadata; what a source calls by that name is none."""
    given = metadata.get(BEFORE)
    ours = isinstance(given, list) and all(
        isinstance(one, dict) and {"labeller", "type", "reward"} <= set(one) for one in given
    )
    return given if ours else []  # type: ignore[return-value]


def truths(rows: pa.Table, against: str) -> tuple[np.ndarray, list[dict[str, float]]]:
    """Of each row: the mean score that was given before (NaN: none) [n], and its reward in each comparison."""
    scores = np.full(rows.num_rows, np.nan)
    comparisons: list[dict[str, float]] = []
    for i, of in enumerate(labels(rows)):
        of = [one for one in of if against == "all" or (one["labeller"] or "").startswith("human")]
        given = [one["reward"] for one in of if one["type"] in ("scalar", "binary")]
        scores[i] = np.mean(given) if given else np.nan
        comparisons.append({one.get("comparison_id", ""): one["reward"] for one in of if one["type"] == "pairwise"})
    return scores, comparisons


def _verdict(a: int, b: int, scores: np.ndarray, comparisons: Sequence[dict[str, float]]) -> float:
    """The probability that row a is better than row b, by what was said before; NaN where nothing was."""
    shared = [p for of, p in comparisons[a].items() if of in comparisons[b]]
    return float(np.mean(shared)) if shared else float(0.5 + np.sign(scores[a] - scores[b]) / 2)


def samples(
    rows: pa.Table, made: Plan, values: np.ndarray, pairs: bool, against: str
) -> dict[str, tuple[Sample, Sample]]:
    """By source: the units with their raw scores [u, k], and the comparisons by people whose responses have scores."""
    scores, comparisons = truths(rows, against)
    sources, keys = rows["source"].to_pylist(), [int(i[:16], 16) for i in rows["id"].to_pylist()]
    lengths = pc.utf8_length(rows["response"]).to_numpy().astype(float)
    of_row = {unit.rows[0]: u for u, unit in enumerate(made.units)}
    points, compared = defaultdict(list), defaultdict(list)
    seen = set()
    for u, unit in enumerate(made.units):
        a, b = unit.rows[0], unit.rows[-1]
        if (same := (sources[a], unit.item)) in seen:
            continue
        seen.add(same)
        human = _verdict(a, b, scores, comparisons) if pairs else scores[a]
        length = lengths[a] - lengths[b] if pairs else lengths[a]
        points[sources[a]].append((keys[a], values[u][None], [length], human))
    for a, b in () if pairs else _met(rows, made, comparisons):
        if not np.isnan(human := _verdict(a, b, scores, comparisons)):
            sides = values[[of_row[a], of_row[b]]]
            compared[sources[a]].append((keys[a] ^ keys[b], sides, lengths[[a, b]], human))
    k = values.shape[1]
    return {source: (_sample(points[source], 1, k), _sample(compared[source], 2, k)) for source in points}


def _met(rows: pa.Table, made: Plan, comparisons: list[dict[str, float]]) -> Iterable[tuple[int, int]]:
    """Pairs of labelled rows that people compared, and neighbours that answer one prompt."""
    chosen = [unit.rows[0] for unit in made.units]
    sides: dict[str, list[int]] = defaultdict(list)
    for i in chosen:
        for of in comparisons[i]:
            sides[of].append(i)
    prompts, sources = rows["prompt_id"].to_pylist(), rows["source"].to_pylist()
    found = {(both[0], both[1]) for both in sides.values() if len(both) == 2}
    found |= {(a, b) for a, b in pairwise(chosen) if (prompts[a], sources[a]) == (prompts[b], sources[b])}
    responses = rows["response"].to_pylist()
    return sorted((a, b) for a, b in found if responses[a] != responses[b])


def _sample(of: list[Any], sides: int, labellers: int) -> Sample:
    if not of:
        return Sample.empty(sides, labellers)
    keys, values, lengths, human = zip(*of, strict=True)
    return Sample(np.array(keys, np.uint64), np.array(values), np.array(lengths, float), np.array(human, float))


# --- rows with new labels ------------------------------------------------------------------------


@dataclass(frozen=True)
class Scored:
    """What became of a unit: the reward and raw score of each row, and what is told of how they came about."""

    rewards: tuple[float, ...]
    raw: tuple[float | None, ...]
    about: tuple[dict[str, Any], ...]


@dataclass
class Relabelled:
    """A table of rows with new labels, and what became of the rows that were read."""

    rows: pa.Table
    accepted: int
    duplicates: int  # rows whose response, with the same label, is in another one
    rejected: list[tuple[int, Reject]]
    left_out: list[tuple[int, str, Reject]]  # pairs of accepted rows without a score: row, the part, why


def relabelled(rows: pa.Table, made: Plan, outcomes: Sequence[Scored | Reject], labeller: str) -> Relabelled:
    """Rows with their new labels, in the order of those that they come from; what is the same twice is one row."""
    before = labels(rows)
    for i, of in made.same_as.items():
        before[of] = before[of] + before[i]
    units = _distinct(rows, made, outcomes)
    written = {i for first in units for i in made.units[first].rows}
    merged = {i for of in units.values() for u in of for i in made.units[u].rows} | set(made.same_as)
    failed = [
        (unit, outcome) for unit, outcome in zip(made.units, outcomes, strict=True) if isinstance(outcome, Reject)
    ]
    refused = {i: Reject("no_other_response", "no other response to its prompt lies beside it") for i in made.alone}
    left_out = []
    ids = rows["id"].to_pylist()
    for unit, why in failed:
        lost = [i for i in unit.rows if i not in written | merged]
        if not lost:
            left_out.append((unit.rows[0], f"compared with row {ids[unit.rows[1]]}", why))
        for i in lost:
            refused.setdefault(i, why)
    # a copy of a response that got no label has none either
    refused |= {i: refused[of] for i, of in made.same_as.items() if of in refused and i not in refused}
    duplicates = merged - written - set(refused)
    pieces: list[tuple[tuple[int, ...], Any, list[list[Label]]]] = [((i,), None, []) for i in made.kept]
    for first, alike in units.items():
        sides = made.units[first].rows
        prior = [[one for u in alike for one in before[_like(side, made.units[u].rows, rows)]] for side in sides]
        pieces.append((sides, outcomes[first], prior))
    pieces.sort(key=lambda piece: piece[0])
    table = _table(rows, pieces, labeller)
    accepted = rows.num_rows - len(duplicates) - len(refused)
    return Relabelled(table, accepted, len(duplicates), sorted(refused.items(), key=lambda r: r[0]), left_out)


def _distinct(rows: pa.Table, made: Plan, outcomes: Sequence[Scored | Reject]) -> dict[int, list[int]]:
    """Units that got a label: the first of each kind → all that say the same of the same responses."""
    prompts, sources, responses = (rows[name].to_pylist() for name in ("prompt_id", "source", "response"))
    firsts: dict[Any, int] = {}
    found: dict[int, list[int]] = defaultdict(list)
    for u, (unit, outcome) in enumerate(zip(made.units, outcomes, strict=True)):
        if isinstance(outcome, Scored):
            said = sorted(zip((responses[i] for i in unit.rows), outcome.rewards, map(str, outcome.raw), strict=True))
            key = sources[unit.rows[0]], prompts[unit.rows[0]], tuple(said)
            found[firsts.setdefault(key, u)].append(u)
    return dict(found)


def _like(row: int, others: tuple[int, ...], rows: pa.Table) -> int:
    """Of the other rows that with the same response."""
    response = rows["response"][row].as_py()
    return next(i for i in others if rows["response"][i].as_py() == response)


def _table(rows: pa.Table, pieces: list[Any], labeller: str) -> pa.Table:
    """The rows of the pieces, with the labels of those that have a new one."""
    taken = rows.take(pa.array([i for of, _, _ in pieces for i in of], pa.int64()))
    names = ("type", "reward", "raw_reward", "labeller", "metadata", "comparison_id")
    columns = {name: taken[name].to_pylist() for name in names}
    at = 0
    for of, scored, prior in pieces:
        for side in range(len(of)):
            if scored is not None:
                metadata = _metadata(metadata_of(columns["metadata"][at]), prior[side], scored.about[side])
                kind = "pairwise" if len(of) == 2 else "scalar"
                new = (kind, scored.rewards[side], scored.raw[side], labeller, metadata, None)
                for name, value in zip(names, new, strict=True):
                    columns[name][at] = value
            at += 1
    for name, values in columns.items():
        where = taken.schema.get_field_index(name)
        taken = taken.set_column(where, taken.schema.field(where), pa.array(values, taken.schema.field(where).type))
    return identify(taken)


def _metadata(metadata: dict[str, Any], prior: list[Label], about: dict[str, Any]) -> str | None:
    """A row's metadata with the labels that it had before, each once; a source's own `labels` get another name."""
    if BEFORE in metadata and not _before(metadata):
        metadata[f"source_{BEFORE}"] = metadata[BEFORE]
    metadata = {k: v for k, v in metadata.items() if k not in (BEFORE, ABOUT)}
    once = {json.dumps(one, sort_keys=True): one for one in prior}
    if once:
        metadata[BEFORE] = list(once.values())
    if about:
        metadata[ABOUT] = about
    return metadata_text(metadata) if metadata else None
