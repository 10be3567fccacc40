"""Give rows the rewards that labellers say: reward models, judges, rules, one of them or several together.

Rows are read in chunks and scored, and the raw scores go to scratch files; when all are there, their statistics are
taken, and the chunks are read again and written with calibrated rewards. No text crosses a shuffle. A labeller keeps
what it computed or paid for in a cache beside the output: a run that was cut short goes on from there.
"""

import argparse
import json
import logging
import math
import os
import threading
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from apache_beam.utils.multi_process_shared import MultiProcessShared
from apache_beam.utils.shared import Shared

from pipelines import dataset, gpu, io, labellers
from pipelines.beam import across_processes, count, once, run_stage, shares_disk, template_of
from pipelines.beam import check as check_flags
from pipelines.chunks import Address, addresses, read
from pipelines.labellers import calibration, sample
from pipelines.labellers.base import Identity, Item, Labeller, Outcome, Score
from pipelines.labellers.cache import Cache, key_of
from pipelines.labellers.combine import COMBINE, NEED, by_name, disagreement
from pipelines.labellers.combine import check as check_combination
from pipelines.labellers.progress import Done, told
from pipelines.labellers.rows import AGAINST, PAIRS, Asking, Plan, Relabelled, Scored, plan, relabelled, samples
from pipelines.labellers.sample import Ensemble, Found
from schemas.command import did_you_mean, share, weights
from schemas.errors import Reject, UsageError, UserError
from schemas.feedback import REJECTED, check
from schemas.manifest import NAME, Manifest

log = logging.getLogger(__name__)
CHUNK_ROWS = 512  # few enough that a small dataset keeps several workers busy
SCRATCH = pa.schema(
    [
        ("labeller", pa.int32()),
        ("item", pa.int32()),
        ("value", pa.float64()),
        ("facts", pa.string()),
        ("reason", pa.string()),
        ("detail", pa.string()),
    ]
)


@dataclass(frozen=True)
class Voice:
    """A labeller of a run."""

    identity: Identity
    settings: Any
    load: Callable[[Any, Cache], Labeller]
    pairs: bool = False
    shared: bool = False

    @property
    def spends(self) -> bool:
        return {"budget", "budget_calls", "run"} <= {field.name for field in fields(self.settings)}

    def under(self, run: str) -> "Voice":
        """The labeller, its spending counted under a name."""
        return replace(self, settings=replace(self.settings, run=self.settings.run or run)) if self.spends else self


@dataclass(frozen=True)
class Labelling:
    """What a run does with rows: picklable, the same in all workers."""

    voices: tuple[Voice, ...]
    asking: Asking
    ensemble: Ensemble
    labeller: str  # the column's value
    temperature: float  # of probabilities that are made of two scores


@dataclass(frozen=True)
class Given:
    """What a labeller says of a unit: the raw score, or the probability that the first row's response is better."""

    value: float
    raw: tuple[float, ...]  # of each row
    facts: dict[str, Any]


# --- labellers in a worker -------------------------------------------------------------------------


class Shielded:
    """A labeller whose outcomes come as a list, one call at a time: what processes and threads can share."""

    def __init__(self, labeller: Labeller):
        self._labeller, self._lock = labeller, threading.Lock()

    def outcomes(self, items: Sequence[Item]) -> list[tuple[int, Outcome]]:
        with self._lock:
            return list(self._labeller(items))


class Loader:
    """Loads labellers in a worker: heavy ones once for all workers of the machine, others in every one."""

    def __init__(self, voices: Sequence[Voice], cache: str, across: bool):
        self.voices, self.cache, self._across = voices, cache, across
        self.start, self._handles = uuid.uuid4().hex, [Shared() for _ in voices]

    def load(self) -> list[Labeller]:
        return [self._load(j, voice) for j, voice in enumerate(self.voices)]

    def _load(self, j: int, voice: Voice) -> Labeller:
        def own() -> Labeller:
            return voice.load(voice.settings, Cache(self.cache))

        if not voice.shared:
            return own()
        if self._across:
            one: Any = MultiProcessShared(lambda: Shielded(own()), tag=f"una-{self.start}-{j}").acquire()
        else:
            one = self._handles[j].acquire(lambda: Shielded(own()))
        return lambda items: iter(one.outcomes(items))


def outcomes(label: Labeller, items: Sequence[Item], voice: Voice, done: Callable[[], None]) -> list[Outcome]:
    """The outcome of every item; a score that is not finite or outside the labeller's scale is none.

    `done` is called with every outcome that comes.
    """
    found: list[Outcome | None] = [None] * len(items)
    for i, outcome in label(items) if items else ():
        assert found[i] is None, f"{voice.identity.labeller}: two outcomes of item {i}"
        found[i] = _checked(outcome, voice)
        done()
    assert None not in found, f"{voice.identity.labeller}: no outcome of item {found.index(None)}"
    return found  # type: ignore[return-value]


def _checked(outcome: Outcome, voice: Voice) -> Outcome:
    low, high = (0.0, 1.0) if voice.pairs else voice.identity.ends or (-np.inf, np.inf)
    if isinstance(outcome, Score) and not (np.isfinite(outcome.value) and low <= outcome.value <= high):
        return Reject("invalid_score", f"the score is {outcome.value:g}, and the scale is {low:g} to {high:g}")
    return outcome


# --- first pass: raw scores --------------------------------------------------------------------------


class Ask(beam.DoFn):
    """Address → raw scores in a scratch file, and what they are like."""

    def __init__(self, how: Labelling, loader: Loader, schema: pa.Schema, stage: str):
        self.how, self.loader, self.schema, self.stage = how, loader, schema, stage

    def setup(self) -> None:
        self.labellers = self.loader.load()
        self.done = Done(Cache(self.loader.cache), self.loader.start)

    def process(self, address: Address) -> Iterable[dict[str, Any]]:
        rows = read(address, self.schema)
        made = plan(rows, self.how.asking)
        asked = [_items(made, voice, self.how) for voice in self.how.voices]
        each = rows.num_rows / max(1, sum(map(len, asked)))  # rows that an outcome stands for
        found = [
            outcomes(label, items, voice, lambda: self.done.add(each))
            for label, items, voice in zip(self.labellers, asked, self.how.voices, strict=True)
        ]
        self.done.add(0 if any(asked) else rows.num_rows)
        self.done.flush()
        path = f"{self.stage}/parts/{dataset.part_name(address.index)}.scores.arrow"
        _write_scores(path, found)
        given = [by_unit(made, of, voice, self.how) for of, voice in zip(found, self.how.voices, strict=True)]
        parts = samples(rows, made, raw_scores(given), self.how.asking.pairs, self.how.asking.against)
        lost = sum(isinstance(outcome, Reject) for of in found for outcome in of)
        where = f"{io.name(address.path)} from row {address.first}"
        log.info("%s: %d rows, %d labellers, %d scores lacking", where, rows.num_rows, len(found), lost)
        yield {
            "address": address,
            "scores": path,
            "found": {source: sample.found_in(*both) for source, both in parts.items()},
        }


def _items(made: Plan, voice: Voice, how: Labelling) -> list[Item]:
    """What a labeller is asked about: for probabilities out of single scores, the responses one by one."""
    return made.singles if how.asking.pairs and not voice.pairs else made.items


def _write_scores(path: str, found: Sequence[Sequence[Outcome]]) -> None:
    rows = [
        {"labeller": j, "item": i, "value": one.value, "facts": json.dumps(dict(one.facts), default=str)}
        if isinstance(one, Score)
        else {"labeller": j, "item": i, "reason": one.reason, "detail": one.detail}
        for j, of in enumerate(found)
        for i, one in enumerate(of)
    ]
    writer = io.ScratchWriter(path, SCRATCH)
    writer.write(pa.Table.from_pylist(rows, schema=SCRATCH))
    writer.close()


def _read_scores(path: str, labellers: int) -> list[list[Outcome]]:
    found: list[list[Outcome]] = [[] for _ in range(labellers)]
    for one in io.read_scratch(path).to_pylist():
        score = Reject(one["reason"], one["detail"]) if one["reason"] else Score(one["value"], json.loads(one["facts"]))
        found[one["labeller"]].append(score)
    return found


def by_unit(made: Plan, found: Sequence[Outcome], voice: Voice, how: Labelling) -> list[Given | Reject]:
    """What a labeller says of each unit."""
    return [_of_unit(unit, found, voice, how) for unit in made.units]


def _of_unit(unit: Any, found: Sequence[Outcome], voice: Voice, how: Labelling) -> Given | Reject:
    if how.asking.pairs and not voice.pairs:
        both = [found[i] for i in unit.singles]
        for one in both:
            if isinstance(one, Reject):
                return one
        a, b = (one.value for one in both)  # type: ignore[union-attr]
        p = float(calibration.sigmoid(np.array((a - b) / how.temperature)))
        facts = [dict(one.facts) for one in both]  # type: ignore[union-attr]
        return Given(p, (a, b), {"responses": facts} if any(facts) else {})
    one = found[unit.item]
    if isinstance(one, Reject):
        return one
    if not how.asking.pairs:
        return Given(one.value, (one.value,), dict(one.facts))
    p = 1 - one.value if unit.turned else one.value
    return Given(p, (p, 1 - p), dict(one.facts) | ({"asked_in_reverse": True} if unit.turned and one.facts else {}))


def raw_scores(given: Sequence[Sequence[Given | Reject]]) -> np.ndarray:
    """Raw scores [u, k] of units and labellers; NaN where there is none."""
    return np.array([[g.value if isinstance(g, Given) else np.nan for g in of] for of in given], float).T


class Together(beam.CombineFn):
    """What all chunks' scores are like; the same whatever the order in which they come."""

    def create_accumulator(self) -> dict[str, Found]:
        return {}

    def add_input(self, whole: dict[str, Found], part: dict[str, Found]) -> dict[str, Found]:
        return sample.together([whole, part])

    def merge_accumulators(self, parts: Iterable[dict[str, Found]]) -> dict[str, Found]:
        return sample.together(parts)

    def extract_output(self, whole: dict[str, Found]) -> dict[str, Found]:
        return whole


# --- second pass: rewards ----------------------------------------------------------------------------


def write(
    report: dict[str, Any],
    statistics: dict[str, Any],
    *,
    how: Labelling,
    schema: pa.Schema,
    stage: str,
    facts: dict[str, Any],
) -> dataset.Result:
    """Read a chunk again, write its rows with their rewards and those that got none, and report."""
    address: Address = report["address"]
    rows = read(address, schema)
    made = plan(rows, how.asking)
    found = _read_scores(report["scores"], len(how.voices))
    given = [by_unit(made, of, voice, how) for of, voice in zip(found, how.voices, strict=True)]
    new = relabelled(rows, made, rewarded(rows, made, given, statistics, how), how.labeller)
    result = dataset.result(list(address.index), split=address.split)
    result["inputs"], result["accepted"], result["duplicates"] = rows.num_rows, new.accepted, new.duplicates
    result["touched"] = _touched(rows, made, new)
    result["told"] = told_of(rows, made, given, how)
    data = io.PartWriter(f"{stage}/parts/{dataset.part_name(address.index)}.data.parquet", schema, facts)
    rejects = io.PartWriter(f"{stage}/parts/{dataset.part_name(address.index)}.rejected.parquet", REJECTED)
    if new.rows.num_rows:
        check(new.rows, scored="ref_logps" in schema.names)
        data.write(new.rows)
        result["rows"].update(new.rows["type"].to_pylist())
    refused = [dataset.refused(rows, i, why, address.first + i, address.path) for i, why in new.rejected]
    parts = [dataset.refused(rows, i, why, address.first + i, address.path, part) for i, part, why in new.left_out]
    if refused or parts:
        rejects.write(pa.Table.from_pylist(refused + parts, schema=REJECTED))
    result["rejected"].update(one["reason"] for one in refused)
    result["rejected_parts"].update(one["reason"] for one in parts)
    result["data"], result["rejects"] = data.close(), rejects.close()
    return result


def told_of(
    rows: pa.Table, made: Plan, given: Sequence[Sequence[Given | Reject]], how: Labelling
) -> dict[tuple[str, str], dict[str, list[float]]]:
    """Labeller and source → the numbers that came with the scores, by name; such as a judge's position."""
    found: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    sources = rows["source"].to_pylist()
    for name, of in zip(how.ensemble.names, given, strict=True):
        for unit, one in zip(made.units, of, strict=True):
            for fact, value in one.facts.items() if isinstance(one, Given) else ():
                if isinstance(value, int | float) and not isinstance(value, bool) and np.isfinite(value):
                    found[name, sources[unit.rows[0]]][fact].append(float(value))
    return {key: {fact: [len(x), math.fsum(x)] for fact, x in facts.items()} for key, facts in found.items()}


def _touched(rows: pa.Table, made: Plan, new: Relabelled) -> Counter[str]:
    """Rows that each policy decided."""
    replaced = new.accepted - len(made.kept) - sum(rows["type"][u.rows[0]].as_py() == "unlabelled" for u in made.units)
    counts = {"only_missing": len(made.kept), "previous_labels": max(0, replaced)}
    return Counter({name: n for name, n in counts.items() if n})


def rewarded(
    rows: pa.Table, made: Plan, given: Sequence[Sequence[Given | Reject]], statistics: dict[str, Any], how: Labelling
) -> list[Scored | Reject]:
    """The reward of every unit, or why it has none."""
    raw, of = raw_scores(given), how.ensemble
    if not made.units:
        return []
    firsts, seconds = (np.array([unit.rows[side] for unit in made.units]) for side in (0, -1))
    lengths = pc.utf8_length(rows["response"]).to_numpy().astype(float)
    length = lengths[firsts] - lengths[seconds] if how.asking.pairs else lengths[firsts]
    sources = np.array(rows["source"].to_pylist(), object)[firsts]
    scores = np.full(raw.shape, np.nan)
    for source in sorted(set(sources)):
        for j, name in enumerate(of.names):
            here = (sources == source) & np.isfinite(raw[:, j])
            if here.any():
                scores[here, j] = sample.scored(raw[here, j], length[here], statistics["labellers"][name][source])
    rewards, apart = of.combined(scores), disagreement(scores)
    return [
        _scored([one[u] for one in given], scores[u], float(rewards[u]), float(apart[u]), how)
        for u in range(len(made.units))
    ]


def _scored(
    given: Sequence[Given | Reject], scores: np.ndarray, reward: float, apart: float, how: Labelling
) -> Scored | Reject:
    names = how.ensemble.names
    if np.isnan(reward):
        name, why = next((n, g) for n, g in zip(names, given, strict=True) if isinstance(g, Reject))
        return Reject(why.reason, f"{name}: {why.detail}")
    sides = 2 if how.asking.pairs else 1
    rewards = tuple(float(np.float32(r)) for r in (reward, 1 - reward)[:sides])
    if len(given) == 1:
        assert isinstance(given[0], Given)
        about = ({"facts": given[0].facts} if given[0].facts else {},) * sides
        return Scored(rewards, given[0].raw, about)
    told = tuple(
        {
            "scores": {
                name: {"raw": g.raw[side], "score": round(float(abs(side - s)), 6)}
                | ({"facts": g.facts} if g.facts else {})
                for name, g, s in zip(names, given, scores, strict=True)
                if isinstance(g, Given)
            }
        }
        | ({"disagreement": round(apart, 6)} if np.isfinite(apart) else {})
        for side in range(sides)
    )
    return Scored(rewards, (None,) * sides, told)


# --- the pipeline --------------------------------------------------------------------------------


def build(
    pipeline: beam.Pipeline,
    files: list[str],
    how: Labelling,
    loader: Loader,
    stored: dict[str, Any] | None,
    schema: pa.Schema,
    manifest: Manifest,
    stage: str,
    output: str,
    hints: dict[str, str] | None = None,
) -> Any:
    """Addresses → scratch files of raw scores → statistics → rows with rewards → one commit."""
    chunk = dataset.chunk_rows(CHUNK_ROWS, manifest.inputs)
    facts = {"stage": "label", "policies": manifest.policies, "reference": manifest.reference}
    asked = (
        pipeline
        | "files" >> beam.Create(list(enumerate(files)))
        | "addresses" >> beam.FlatMap(addresses, rows=chunk, together="prompt_id")
        | "spread" >> beam.Reshuffle()
        | "ask" >> beam.ParDo(Ask(how, loader, schema, stage)).with_resource_hints(**hints or {})
    )
    statistics = (
        asked
        | "found" >> beam.Map(lambda report: report["found"])
        | "together" >> beam.CombineGlobally(Together())
        | "statistics" >> beam.Map(sample.statistics, how.ensemble, stored)
    )
    results = (
        asked
        | "scores" >> beam.Map(lambda report: {name: report[name] for name in ("address", "scores")})
        | "write"
        >> beam.Map(write, beam.pvalue.AsSingleton(statistics), how=how, schema=schema, stage=stage, facts=facts)
        | "count" >> beam.Map(count)
    )
    return once(pipeline, commit, results, statistics, manifest=manifest, stage=stage, output=output)


def commit(
    results: list[dataset.Result], statistics: list[dict[str, Any]], *, manifest: Manifest, stage: str, output: str
) -> None:
    """Put the statistics into the manifest, and commit."""
    labels = statistics[0]
    sums: dict[Any, list[tuple[float, float]]] = defaultdict(list)
    for result in sorted(results, key=lambda r: (r["split"], r["index"])):
        for (name, source), facts in result["told"].items():
            for fact, (n, total) in facts.items():
                sums[name, source, fact].append((n, total))
    for (name, source, fact), parts in sums.items():
        mean = math.fsum(total for _, total in parts) / sum(n for n, _ in parts)
        labels["labellers"][name][source].setdefault("facts", {})[fact] = round(mean, 6)
    manifest.statistics = {**manifest.statistics, "labels": labels}
    dataset.commit_all(results, manifest=manifest, stage=stage, output=output)


# --- command -------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `una label`."""
    parser.add_argument("directory", metavar="DIR", help="a dataset directory")
    parser.add_argument("--output", required=True, metavar="DIR", help="the dataset directory to write")
    parser.add_argument(
        "--labeller",
        action="append",
        required=True,
        metavar="SPEC",
        help="KIND, KIND:setting=value,…, or a YAML file; may be given several times; kinds: "
        + ", ".join(labellers.LABELLERS),
    )
    parser.add_argument(
        "--only-missing", action="store_true", help="label rows without a reward, and leave the others as they are"
    )
    parser.add_argument("--combine", choices=tuple(COMBINE), default="mean", help="one reward from several labellers'")
    parser.add_argument("--weights", type=weights, default={}, metavar="NAME=W,…", help="for --combine weighted")
    parser.add_argument(
        "--need", choices=tuple(NEED), default="all", help="whose scores a row needs: all labellers' (all), or any"
    )
    parser.add_argument(
        "--calibrate",
        default="auto",
        metavar="METHOD",
        help=f"raw scores to [0, 1]: {', '.join(calibration.METHODS)}, for all labellers or NAME=METHOD,…; by default "
        "the ends of the labeller's scale, and sigmoid where it has none",
    )
    parser.add_argument("--temperature", type=float, default=1.0, metavar="T", help="of sigmoid and zscore_sigmoid (1)")
    parser.add_argument("--calibration", metavar="DIR", help="a labelled dataset whose calibration to apply again")
    parser.add_argument(
        "--length-control", action="store_true", help="take out of raw scores what the response's length tells of them"
    )
    parser.add_argument(
        "--against", choices=tuple(AGAINST), default="human", help="the earlier labels that scores are compared with"
    )
    parser.add_argument(
        "--pairs", choices=tuple(PAIRS), default="adjacent", help="which responses of a prompt are compared (adjacent)"
    )
    parser.add_argument(
        "--pairwise-from-scores",
        action="store_true",
        help="make comparisons of scores: p = sigmoid((first − second) / temperature)",
    )
    parser.add_argument("--budget", metavar="N", help="the most that labellers may spend: 5usd, 1000calls or both")
    parser.add_argument("--cache", metavar="DIR", help="where scores are kept (default: .NAME.cache beside the output)")
    gpu.add_arguments(parser)
    parser.add_argument("--max-rejected", type=share, default=0.01, metavar="SHARE")
    parser.add_argument("--overwrite", action="store_true", help="replace what --output holds")


def command(args: argparse.Namespace) -> dict[str, Any]:
    """`una label`: returns the summary that `--json` prints."""
    before = dataset.read_manifest(args.directory)
    files = dataset.data_files(args.directory, before)
    output = args.output.rstrip("/")
    hints = gpu.hints(args)
    args.beam = [*args.beam, *gpu.flags(args)]
    check_flags(args.beam, args.directory, output)
    if template_of(args.beam):
        raise UsageError("--template_location: una label tells what its scores are like when they are there; run it")
    how, stored = labelling(args)
    cache = cache_of(args, output)
    dataset.refuse(output, [args.directory])
    stage = dataset.prepare(output, args.overwrite)
    policies = {**before.policies, "labels": [*before.policies.get("labels", []), policy(args, how)]}
    manifest = before.next("label", policies=policies)
    keeper = Cache(cache)
    run = keeper.begin(os.path.realpath(output))
    voices = [voice.under(run if args.budget else f"{run}/{voice.identity.labeller}") for voice in how.voices]
    loader = Loader(voices, cache, across_processes(args.beam))
    schema = dataset.schema_of(before)
    with told(cache, loader.start, manifest.inputs) if shares_disk(args.beam) else nullcontext():
        report = run_stage(
            lambda p: build(p, files, how, loader, stored, schema, manifest, stage, output, hints),
            args.beam,
            stage,
            output,
            args.max_rejected,
        )
    spent = [keeper.spent(name) for name in {voice.settings.run for voice in voices if voice.spends}]
    report["spent"] = {"calls": sum(calls for calls, _ in spent), "usd": math.fsum(usd for _, usd in spent)}
    keeper.finish(os.path.realpath(output))
    report["warnings"] = tell(report)
    return report


def labelling(args: argparse.Namespace) -> tuple[Labelling, dict[str, Any] | None]:
    """What is to be done, and the statistics of `--calibration`; `UsageError` for what does not go together."""
    asked = _within_budget([labellers.asked(spec) for spec in args.labeller], args.budget)
    voices = voices_of(asked)
    names = tuple(voice.identity.labeller for voice in voices)
    if len(set(names)) < len(names):
        raise UsageError(f"--labeller: {Counter(names).most_common(1)[0][0]} is there twice; leave one out")
    if not (np.isfinite(args.temperature) and args.temperature > 0):
        raise UsageError(f"--temperature {args.temperature:g}: must be positive")
    asking = Asking(_pairs(args, voices), args.pairs, args.only_missing, args.against)
    known = [(one.name, name) for one, name in zip(asked, names, strict=True)]
    weight = by_name(args.weights, known, "--weights")
    check_combination(args.combine, asking.pairs, len(voices), args.weights)
    if missing := [name for name in names if weight and name not in weight]:
        raise UsageError(f"--weights: no weight for {missing[0]}; give every labeller one, 0 too")
    stored, methods = _calibrations(args, voices, known)
    scales = tuple(
        calibration.choose(method, voice.identity.labeller, voice.identity.ends, asking.pairs, args.temperature)
        for voice, method in zip(voices, methods, strict=True)
    )
    fitted = next((scale.method for scale in scales if scale.method in calibration.FITTED), None)
    if fitted and args.only_missing and not stored:
        raise UsageError(
            f"--calibrate {fitted}: with --only-missing the rows that people labelled get no scores to fit to; label "
            "them without --only-missing, then give that dataset as --calibration"
        )
    given = tuple(float(weight.get(name, 1.0)) for name in names)  # type: ignore[arg-type]
    ensemble = Ensemble(names, scales, args.combine, given, args.need, args.length_control)
    name = names[0] if len(names) == 1 else f"rule:{args.combine}({','.join(names)})"
    return Labelling(voices, asking, ensemble, name, args.temperature), stored


def _voice(asked: labellers.Asked) -> Voice:
    kind, settings = asked.kind, asked.settings
    return Voice(kind.identify(settings), settings, kind.load, kind.pairs(settings), kind.shared(settings))


def voices_of(asked: Sequence[labellers.Asked]) -> tuple[Voice, ...]:
    """The labellers with their identities; what can be checked cheaply is checked.

    Those of one name, such as two lengths, get the hash of all that their scores depend on.
    """

    def named(voice: Voice) -> Voice:
        name = voice.identity.labeller
        told = f"{name}{'+' if '@' in name else '@'}{key_of(dict(voice.identity.fingerprint))[:8]}"
        return replace(voice, identity=replace(voice.identity, labeller=told)) if often[name] > 1 else voice

    voices = [_voice(one) for one in asked]
    often = Counter(voice.identity.labeller for voice in voices)
    return tuple(map(named, voices))


def _within_budget(asked: list[labellers.Asked], budget: str | None) -> list[labellers.Asked]:
    """The labellers, those that spend with the budget of `--budget`, which is for all of them together."""
    if budget is None:
        return asked
    limits = budget_of(budget)
    spending = [one for one in asked if hasattr(one.settings, "budget_calls")]
    if not spending:
        raise UsageError(f"--budget {budget}: none of the labellers spends anything; leave it out")
    if own := [one.name for one in spending if (one.settings.budget, one.settings.budget_calls) != (None, None)]:
        raise UsageError(f"--budget {budget}: {own[0]} has a budget of its own in its settings; give one of them")
    return [replace(one, settings=replace(one.settings, **limits)) if one in spending else one for one in asked]


def _pairs(args: argparse.Namespace, voices: Sequence[Voice]) -> bool:
    """Whether comparisons are made; `UsageError` for labellers that do not go together."""
    single = [voice.identity.labeller for voice in voices if not voice.pairs]
    compare = [voice.identity.labeller for voice in voices if voice.pairs]
    if single and compare and not args.pairwise_from_scores:
        raise UsageError(
            f"--labeller: {compare[0]} compares two responses and {single[0]} scores one; label in two runs, or make "
            "comparisons of its scores with --pairwise-from-scores"
        )
    if args.pairwise_from_scores and not single:
        raise UsageError(f"--pairwise-from-scores: {compare[0]} compares responses itself; leave the option out")
    return bool(compare) or args.pairwise_from_scores


def _calibrations(
    args: argparse.Namespace, voices: Sequence[Voice], known: list[tuple[str, str]]
) -> tuple[dict[str, Any] | None, list[str]]:
    """The stored statistics, if any, and each labeller's method."""
    if args.calibration:
        return _stored(args, voices)
    if "=" not in args.calibrate:
        methods = [args.calibrate] * len(voices)
    else:
        pairs = dict(part.partition("=")[::2] for part in args.calibrate.split(","))
        told = by_name(pairs, known, "--calibrate")
        methods = [str(told.get(name, "auto")) for _, name in known]
    for method in methods:
        if method not in ("auto", *calibration.METHODS):
            raise UsageError(
                f"--calibrate {args.calibrate}: no method {method!r}{did_you_mean(method, calibration.METHODS)}"
            )
    return None, methods


def _stored(args: argparse.Namespace, voices: Sequence[Voice]) -> tuple[dict[str, Any], list[str]]:
    """What an earlier run made rewards from; it must have been made by the same labellers."""
    manifest = dataset.read_manifest(args.calibration.removesuffix(NAME).rstrip("/") or ".")
    stored = manifest.statistics.get("labels", {}).get("labellers")
    if not stored:
        raise UserError(f"{args.calibration}: no statistics of labellers here; give a dataset that `una label` wrote")
    then = manifest.policies["labels"][-1]
    if args.calibrate != "auto" or args.length_control:
        raise UsageError("--calibration: brings its methods along; leave --calibrate and --length-control out")
    for voice in voices:
        name = voice.identity.labeller
        if name not in stored:
            raise UserError(f"{args.calibration}: no statistics of {name}, only of {', '.join(stored)}")
        was = then["labellers"][name]["fingerprint"]
        now = json.loads(json.dumps(dict(voice.identity.fingerprint)))
        if differing := sorted(key for key in {*was, *now} if was.get(key) != now.get(key)):
            raise UserError(
                f"{args.calibration}: {name} was another then, its {', '.join(differing)} differ; its scores are not "
                "comparable: label that dataset again, or calibrate anew"
            )
    for option in ("pairwise_from_scores", "temperature"):
        if then[option] != (now := getattr(args, option)):
            name = option.replace("_", "-")
            raise UsageError(f"{args.calibration}: was made with --{name} {then[option]}, not {now}; give the same")
    return stored, [then["labellers"][voice.identity.labeller]["calibrate"] for voice in voices]


def policy(args: argparse.Namespace, how: Labelling) -> dict[str, Any]:
    """What the manifest says of a run's choices."""
    told = {
        voice.identity.labeller: {
            "fingerprint": dict(voice.identity.fingerprint),
            "ends": (0, 1) if how.asking.pairs else voice.identity.ends,
            "calibrate": scale.method,
            "weight": weight,
        }
        for voice, scale, weight in zip(how.voices, how.ensemble.scales, how.ensemble.weights, strict=True)
    }
    names = ("only_missing", "combine", "need", "temperature", "length_control", "against", "pairwise_from_scores")
    facts = {name: getattr(args, name) for name in names}
    facts["pairs"] = args.pairs if how.asking.pairs else None
    facts["calibration"] = None
    if args.calibration:  # it tells of the length too
        facts |= {"calibration": io.name(args.calibration.rstrip("/")), "length_control": None}
    return json.loads(json.dumps({"labellers": told, **facts}))


def budget_of(text: str) -> dict[str, Any]:
    """The settings `budget` and `budget_calls` of `5usd`, `1000calls` or `5usd,1000calls`."""
    limits: dict[str, Any] = {"budget": None, "budget_calls": None}
    for part in text.lower().replace(" ", "").split(","):
        unit = next((unit for unit in ("usd", "calls") if part.endswith(unit)), "")
        try:
            number = float(part.removesuffix(unit))
        except ValueError:
            number = -1.0
        if not unit or not 0 <= number < np.inf or (unit == "calls" and number != int(number)):
            raise UsageError(f"--budget {text}: must look like 5usd, 1000calls or 5usd,1000calls")
        limits |= {"budget": number} if unit == "usd" else {"budget_calls": int(number)}
    return limits


def cache_of(args: argparse.Namespace, output: str) -> str:
    """The directory of the cache; `UsageError` where there can be none, a warning where it is not shared."""
    if args.cache is None and io.is_remote(output):
        raise UsageError(f"--output {output}: is not on this machine, so name a directory that is with --cache")
    cache = args.cache or dataset.staging(output).removesuffix(".incomplete") + ".cache"
    if io.is_remote(cache):
        raise UsageError(f"--cache {cache}: must be a directory of this machine")
    if not shares_disk(args.beam):
        if args.budget is not None:
            raise UsageError("--budget: cannot be kept by workers on other machines, which share no cache; run locally")
        log.warning("%s: workers on other machines each have a cache of their own, which ends with them", cache)
    return os.path.abspath(cache)


# --- what is told --------------------------------------------------------------------------------


def tell(report: dict[str, Any]) -> list[str]:
    """Print what the scores are like; returns the warnings, which are printed too."""
    labels, chosen = report["statistics"]["labels"], report["policies"]["labels"][-1]
    told = {k: v for k, v in chosen.items() if k != "labellers" and v is not None}
    print("labels: " + ", ".join(f"{k}={dataset.short(v)}" for k, v in told.items()))
    for name, of in chosen["labellers"].items():
        method, ends = of["calibrate"], of["ends"]
        scale = f"{ends[0]:g} to {ends[1]:g}" if ends else "without ends"
        print(f"{name}: scale {scale}; calibrate={method}: {calibration.METHODS[method]}")
    for name, by_source in labels["labellers"].items():
        for source, of in by_source.items():
            print(f"{name} on {source}: {_line(of)}")
    for source, of in labels["combined"].items():
        if len(labels["labellers"]) > 1 and of["items"]:
            apart = f", disagreement {of['disagreement']:.3f}" if of["disagreement"] is not None else ""
            print(f"together on {source}: {of['items']} items, mean reward {of['mean']:.3f}{apart}{_agreement(of)}")
    if report["spent"]["calls"]:
        print(f"spent: {report['spent']['calls']} calls, {report['spent']['usd']:.4f} USD")
    pointwise = not any(kind == "pairwise" for kind in report["rows"])
    warnings = sample.one_sided(labels) if pointwise else []
    for warning in warnings:
        print(f"warning: {warning}")
    return warnings


def _line(of: dict[str, Any]) -> str:
    raw, length = of["raw"], of["length"]
    told = [f"{of['items']} items", f"raw {raw['low']:.4g} to {raw['high']:.4g}, mean {raw['mean']:.4g}"]
    told += [f"{of['calibration']['method']} → mean {of['mean']:.3f}"]
    if length["pearson"] is not None:
        told += [f"with length r {length['pearson']:.2f}, rank {length['spearman']:.2f}"]
    if length.get("pearson_controlled") is not None:
        told += [f"r {length['pearson_controlled']:.2f} once controlled"]
    told += [f"mean {fact} {mean:.4g}" for fact, mean in of.get("facts", {}).items()]
    return ", ".join(told) + _agreement(of)


def _agreement(of: dict[str, Any]) -> str:
    """Agreement with the labels that scores are compared with, where there are any."""
    agreement = of.get("agreement") or {}
    names = {"accuracy": "accuracy on {comparisons} comparisons", "kendall": "Kendall {items} items", "ece": "ECE"}
    told = [
        f"{label.format(**agreement)} {agreement[key]:.3f}"
        for key, label in names.items()
        if agreement.get(key) is not None
    ]
    return f"; against earlier labels: {', '.join(told)}" if told else ""
