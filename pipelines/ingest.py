"""Raw feedback files to feedback rows.

`convert_range` turns one range of a file into rows and rejected records; `build` is the Beam pipeline that does so for
all files, and settles labels where that is asked for. What rows a record becomes is the converters' work.
"""

import argparse
import dataclasses
import logging
import secrets
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines import dataset, io, readers, settle, understand
from pipelines.converters import LeftOut, Policy
from pipelines.converters.base import lowered, touched
from pipelines.plan import Piece, Pieces, Plan, read
from pipelines.settle import Settling
from pipelines.understand import Source, convert
from schemas import feedback
from schemas.command import share
from schemas.errors import Reject, UsageError, UserError
from schemas.feedback import FEEDBACK, REJECTED, Row, check, text_rows, usable_texts
from schemas.manifest import NAME, Manifest

log = logging.getLogger(__name__)
BATCH_ROWS = 2_000
SHARD_BYTES = 128 << 20  # of input whose labels are settled at a time
MOST_SHARDS = 256
Place = tuple[str, int]  # a file of verdicts, and the batch in it that is about one range


# --- one range -----------------------------------------------------------------------------------


def convert_range(
    work: tuple[list[int], readers.Range, Source],
    *,
    policy: Policy,
    stage: str,
    facts: dict[str, Any],
    how: Settling | None = None,
    shards: int = 0,
    seed: int = 0,
) -> dataset.Result:
    """Convert a range into part files under `stage` and report what became of every record.

    Rows that are to be settled are put by, and their labels go to a piece for each shard, by their prompt.
    """
    index, of, source = work
    report = dataset.result(index)
    path = f"{stage}/parts/{dataset.part_name(index)}"
    out = _Output(source, policy, report, path, facts, how or Settling(), shards, seed)
    counting, gathering = touched.set(report["touched"]), lowered.set(set())
    try:
        for found in understand.records(of, source):
            if isinstance(found, readers.Texts):
                out.texts(found)
            else:
                out.record(found)
        out.write()
    finally:
        touched.reset(counting)
        lowered.reset(gathering)
    report["spreads"] = settle.together(out.spreads)
    if isinstance(out.rows_to, io.PartWriter):
        report["data"] = out.rows_to.close()
    elif waiting := out.rows_to.close():
        report["waiting"] = waiting, of, source
    report["pieces"] = out.labels_to.close() if out.labels_to else []
    report["rejects"] = out.rejects.close()
    lost = report["inputs"] - report["accepted"] - sum(report["rejected"].values())
    assert lost == 0, f"{of.path}: {lost} records are neither accepted nor rejected"
    log.info("%s: %d records, %d rejected", of.path, report["inputs"], sum(report["rejected"].values()))
    return report


class _Output:
    """What a range's records become, gathered in the order of the records and written in batches."""

    def __init__(
        self,
        source: Source,
        policy: Policy,
        report: dataset.Result,
        path: str,
        facts: dict[str, Any],
        how: Settling,
        shards: int,
        seed: int,
    ):
        self.source, self.policy, self.report = source, policy, report
        self.rows_to: io.PartWriter | io.ScratchWriter = io.PartWriter(f"{path}.data.parquet", FEEDBACK, facts)
        if how.needed:
            self.rows_to = io.ScratchWriter(f"{path}.waiting.arrow", settle.WAITING)
        plan = Plan((("train", 1.0),), (shards,)) if how.groups else None
        self.labels_to = Pieces(path, plan, settle.LABELS) if plan else None
        self.rejects = io.PartWriter(f"{path}.rejected.parquet", REJECTED)
        self.how, self.seed, self.put = how, seed, 0
        self.spreads: list[dict[str, settle.Spread]] = []
        self.rows: list[Row] = []
        self.positions: list[int] = []  # of the records of these rows
        self.refused: list[dict[str, Any]] = []

    def record(self, raw: readers.Raw) -> None:
        self._gather(raw)
        if len(self.rows) >= BATCH_ROWS or len(self.refused) >= BATCH_ROWS:
            self.write()

    def texts(self, found: readers.Texts) -> None:
        """Records by column; what those that need a closer look become lies between the others, as in the file."""
        self.write()
        prompts, *responses = found.columns
        usable = usable_texts(prompts, responses)
        which, before = pa.array(usable), np.cumsum(usable) * len(responses)
        table = text_rows(prompts.filter(which), [texts.filter(which) for texts in responses], self.source.name)
        self.report["inputs"] += int(usable.sum())
        self.report["accepted"] += int(usable.sum())
        positions = np.repeat(found.record(0).position + np.flatnonzero(usable), len(responses))
        written = 0
        for i in np.flatnonzero(~usable).tolist():
            self._gather(found.record(i))
            if self.rows:
                self._put(table.slice(written, int(before[i]) - written), positions[written : int(before[i])])
                self._put_gathered()
                written = int(before[i])
        self._put(table.slice(written), positions[written:])

    def write(self) -> None:
        """Write what has gathered."""
        self._put_gathered()
        if self.refused:
            self.rejects.write(pa.Table.from_pylist(self.refused, schema=REJECTED))
            self.report["rejected"].update(Counter(r["reason"] for r in self.refused if r["part"] is None))
            self.report["rejected_parts"].update(Counter(r["reason"] for r in self.refused if r["part"] is not None))
        self.refused = []

    def _gather(self, raw: readers.Raw) -> None:
        rows = self._rows_of(raw)
        self.rows += rows
        self.positions += [raw.position] * len(rows)

    def _put_gathered(self) -> None:
        if self.rows:
            self._put(feedback.table(self.rows), np.array(self.positions))
        self.rows, self.positions = [], []

    def _rows_of(self, raw: readers.Raw) -> list[Row]:
        """The rows of a record; what cannot be used is refused."""
        self.report["inputs"] += 1
        try:
            made = convert(raw.value, self.source, self.policy)
        except Reject as reject:
            self.refused.append(_refused(raw, self.source, reject.reason, reject.detail))
            return []
        self.report["accepted"] += 1
        left_out = [one for one in made if isinstance(one, LeftOut)]
        self.refused += [_refused(raw, self.source, one.reason, one.detail, one.part) for one in left_out]
        return [one for one in made if not isinstance(one, LeftOut)]

    def _put(self, rows: pa.Table, positions: np.ndarray) -> None:
        if not rows.num_rows:
            return
        check(rows)
        self.rows_to.write(rows.append_column("position", pa.array(positions)) if self.how.needed else rows)
        if self.labels_to:
            self.labels_to.write(settle.labels(rows, self.put, self.seed))
        if self.how.scale != "range":
            self.spreads.append(settle.spreads(rows, lowered.get()))
        if not self.how.needed:
            self.report["rows"].update(_types(rows))
        self.put += rows.num_rows


def _types(rows: pa.Table) -> dict[str, int]:
    return {one["values"]: one["counts"] for one in pc.value_counts(rows["type"]).to_pylist()}


def _refused(raw: readers.Raw, source: Source, reason: str, detail: str, part: str | None = None) -> dict[str, Any]:
    detail = detail.encode("utf-8", "backslashreplace").decode()[:500]
    return {
        "reason": reason,
        "detail": detail,
        "source_file": source.retried or source.path,
        "position": raw.position,
        "part": part,
        "payload": raw.payload,
    }


# --- settling -----------------------------------------------------------------------------------


def judge_shard(
    item: tuple[int, Iterable[tuple[list[int], Piece]]], scales: dict[str, dict[str, Any]], *, how: Settling, stage: str
) -> dict[str, Any]:
    """Decide on the labels of some prompts, in the order of the input; where the verdicts on each range are."""
    number, pieces = item
    names, tables = zip(*((dataset.part_name(index), read(piece)) for index, piece in sorted(pieces)), strict=True)
    labels = pa.concat_tables(tables)
    verdicts, touched, agreement = settle.judge(labels, how, scales)
    of_range = np.repeat(np.arange(len(names)), [t.num_rows for t in tables])[verdicts["at"].to_numpy()]
    verdicts = verdicts.set_column(0, "at", labels["row"].take(verdicts["at"]))
    out = io.ScratchWriter(f"{stage}/parts/settled-{number:06d}.verdicts.arrow", settle.VERDICTS)
    places: dict[str, Place] = {}
    for i in np.unique(of_range).tolist():
        places[names[i]] = out.path, len(places)
        out.write(verdicts.filter(pa.array(of_range == i)))
    out.close()
    return {"places": places, "touched": touched, "agreement": agreement}


def settle_range(
    item: tuple[str, dict[str, Iterable[Any]]],
    scales: dict[str, dict[str, Any]],
    *,
    how: Settling,
    stage: str,
    facts: dict[str, Any],
) -> dataset.Result:
    """Do what was decided to the rows of a range that wait for it, write part files and report."""
    name, found = item
    ((path, of, source),) = found["waiting"]
    report = dataset.result([*map(int, name.split("-")), 0])
    data = io.PartWriter(f"{stage}/parts/{name}-settled.data.parquet", FEEDBACK, facts)
    rejects = io.PartWriter(f"{stage}/parts/{name}-settled.rejected.parquet", REJECTED)
    verdicts = _verdicts(sorted(found["verdicts"]))
    numbers = verdicts["at"].to_numpy()
    read = merged = 0
    gone = _Gone()
    with io.open_scratch(path) as file:
        for batch in map(file.get_batch, range(file.num_record_batches)):
            first, last = np.searchsorted(numbers, [read, read + batch.num_rows])
            mine = verdicts.slice(first, last - first)
            mine = mine.set_column(0, "at", pa.array(numbers[first:last] - read))
            waiting = pa.Table.from_batches([batch], settle.WAITING)
            positions = waiting["position"].to_numpy()
            rows, left_out, scaled = settle.apply(waiting.drop_columns("position"), mine, how, scales)
            gone.add(positions, left_out)
            read, merged = read + batch.num_rows, merged + batch.num_rows - rows.num_rows - len(left_out)
            if rows.num_rows:
                check(rows)
                data.write(rows)
            report["rows"].update(_types(rows))
            report["touched"]["scale"] += scaled
    refused = gone.refused(of, source)
    while some := list(islice(refused, BATCH_ROWS)):
        rejects.write(pa.Table.from_pylist(some, schema=REJECTED))
        whole = Counter(one["reason"] for one in some if one["part"] is None)
        report["rejected"].update(whole)
        report["accepted"] -= whole.total()  # they were, when the range was read
        report["rejected_parts"].update(one["reason"] for one in some if one["part"] is not None)
    report["data"], report["rejects"], report["merged"] = data.close(), rejects.close(), merged
    return report


def _verdicts(places: list[Place]) -> pa.Table:
    """The verdicts on one range, in the order of its rows."""
    found = []
    for path, batch in places:
        with io.open_scratch(path) as file:
            found.append(pa.Table.from_batches([file.get_batch(batch)]))
    return pa.concat_tables([settle.VERDICTS.empty_table(), *found]).sort_by("at").combine_chunks()


class _Gone:
    """Rows of a range that were left out, and the records that they are of."""

    def __init__(self) -> None:
        self.of: dict[int, list[tuple[str, str, str]]] = {}  # position of the record → reason, detail, id of each row
        self.alive: set[int] = set()  # of these, the records of which a row is left, or was merged into another
        self.last = self.last_gone = np.array([], np.int64)  # a record's rows may go on in the next batch

    def add(self, positions: np.ndarray, left_out: list[dict[str, Any]]) -> None:
        """A batch, by the position of each row's record, and what `settle.apply` left out of it."""
        gone = np.array([one["at"] for one in left_out], np.int64)
        for position, one in zip(positions[gone].tolist(), left_out, strict=True):
            self.of.setdefault(position, []).append((one["reason"], one["detail"], one["row"]["id"]))
        left = np.concatenate([self.last, np.delete(positions, gone)])
        those = np.concatenate([self.last_gone, positions[gone]])
        self.alive.update(np.intersect1d(left, those).tolist())
        self.last, self.last_gone = left[-1:], those[-1:]

    def refused(self, of: readers.Range, source: Source) -> Iterator[dict[str, Any]]:
        """Records of which nothing is left, and rows of others, as they are kept; the range is read again for it."""
        for raw in understand.raws(of, source) if self.of else ():
            gone = self.of.get(raw.position, [])
            for reason, detail, row in gone if raw.position in self.alive else gone[:1]:
                yield _refused(raw, source, reason, detail, f"row {row}" if raw.position in self.alive else None)


# --- the pipeline --------------------------------------------------------------------------------


def build(
    pipeline: Any,
    sources: list[Source],
    policy: Policy,
    policies: dict[str, Any],
    stage: str,
    output: str,
    how: Settling | None = None,
    calibration: dict[str, Any] | None = None,
):
    """Files → ranges → part files → one commit. Only addresses, counts and statistics pass between workers.

    Where labels are settled, rows wait in their range's file, labels go to shards by prompt, and verdicts come back.
    """
    import apache_beam as beam

    from pipelines.beam import count, once

    how = how or Settling()
    facts = {"stage": "ingest", "policies": policies}
    shards, seed = _shards(sources), secrets.randbits(64)
    converting = partial(convert_range, policy=policy, stage=stage, facts=facts, how=how, shards=shards, seed=seed)
    surveyed = (
        pipeline
        | "files" >> beam.Create(list(enumerate(sources)))
        | "survey" >> beam.Map(_survey).with_output_types(dict)
    )
    converted = (
        surveyed
        | "ranges" >> beam.FlatMap(lambda s: s["ranges"])
        | "spread" >> beam.Reshuffle()
        | "convert" >> beam.Map(converting)
        | "count" >> beam.Map(count)
    )
    gathered = [surveyed, converted]
    if how.needed:
        parts = converted | "spreads" >> beam.Map(lambda r: (r["index"], r["spreads"]))
        scales = (
            pipeline
            | "scales" >> beam.Create([(how.scale, calibration)])
            | "statistics" >> beam.Map(_statistics, beam.pvalue.AsList(parts))
        )
        of = beam.pvalue.AsSingleton(scales)
        judged = (
            converted
            | "pieces" >> beam.FlatMap(_pieces).with_output_types(tuple[int, tuple[list[int], Piece]])
            | "gather" >> beam.GroupByKey()
            | "judge" >> beam.Map(judge_shard, of, how=how, stage=stage).with_output_types(dict)
        )
        waiting = converted | "waiting" >> beam.FlatMap(_waiting).with_output_types(tuple[str, Any])
        verdicts = judged | "verdicts" >> beam.FlatMap(_places).with_output_types(tuple[str, Place])
        settled = (
            {"waiting": waiting, "verdicts": verdicts}
            | "bring together" >> beam.CoGroupByKey()
            | "settle" >> beam.Map(settle_range, of, how=how, stage=stage, facts=facts)
        )
        gathered += [judged, settled, scales]
    return once(pipeline, _commit, *gathered, policies=policies, stage=stage, output=output)


def _shards(sources: list[Source]) -> int:
    return min(MOST_SHARDS, 1 + sum(io.size(s.path) for s in sources) // SHARD_BYTES)


def _pieces(report: dataset.Result) -> Iterator[tuple[int, tuple[list[int], Piece]]]:
    for shard, piece in report["pieces"]:
        yield shard, (report["index"], piece)


def _waiting(report: dataset.Result) -> Iterator[tuple[str, Any]]:
    if report["waiting"]:
        yield dataset.part_name(report["index"]), report["waiting"]


def _places(judged: dict[str, Any]) -> Iterator[tuple[str, Place]]:
    yield from judged["places"].items()


def _statistics(
    asked: tuple[str, dict[str, Any] | None], parts: list[tuple[list[int], dict[str, settle.Spread]]]
) -> dict[str, dict[str, Any]]:
    """What new rewards are made from, per source: as stored by an earlier run, or of all ranges in their order."""
    method, calibration = asked
    if method == "range":
        return {}
    whole = settle.together(spreads for _, spreads in sorted(parts, key=lambda part: part[0]))
    if calibration is not None:
        settle.require_direction(calibration, whole)
        return calibration
    return {source: settle.statistics(method, spread) for source, spread in whole.items()}


def _survey(item: tuple[int, Source]) -> dict[str, Any]:
    i, source = item
    facts, ranges = readers.survey(source.path, "parquet" if source.retried else source.kind)
    if source.retried:
        facts["file"], ranges = io.name(source.retried), [readers.Range(source.path, source.kind)]
    facts.update(source=source.name, format=source.format)
    if source.columns:
        facts["columns"] = dict(source.columns)
    return {
        "file": i,
        "path": source.path,
        "facts": facts,
        "ranges": [([i, j], of, source) for j, of in enumerate(ranges)],
    }


def _commit(
    surveyed: list[dict[str, Any]],
    results: list[dataset.Result],
    judged: list[dict[str, Any]] | None = None,
    settled: list[dataset.Result] | None = None,
    scales: list[dict[str, Any]] | None = None,
    *,
    policies: dict[str, Any],
    stage: str,
    output: str,
) -> None:
    surveyed = sorted(surveyed, key=lambda s: s["file"])
    expected = sum(len(s["ranges"]) for s in surveyed)
    assert len(results) == expected, f"{len(results)} of {expected} ranges were read"
    for path, size in ((s["path"], s["facts"]["bytes"]) for s in surveyed):
        if (now := io.size(path)) != size:  # what was read is not what the manifest would name
            raise UserError(f"{path}: had {size} bytes and now has {now}; run again when nothing writes to it")
    records: Counter[int] = Counter()
    for r in results:
        records[r["index"][0]] += r["inputs"]
    sources = [{**s["facts"], "records": records[s["file"]]} for s in surveyed]
    manifest = Manifest(stage="ingest", inputs=0, accepted=0, sources=sources, policies=policies)
    if judged is not None and settled is not None and scales is not None:
        decided = {**dataset.result([]), "touched": sum((j["touched"] for j in judged), Counter())}
        merged = sum(r["merged"] for r in settled)
        assert merged == decided["touched"].total(), f"{merged} rows were merged into others, and not as decided"
        results = [*results, *settled, decided]
        manifest.statistics = {"scale": scales[0], "agreement": settle.agreement(j["agreement"] for j in judged)}
    dataset.commit(results, manifest, stage, output)


# --- command -------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `una ingest`."""
    understand.add_arguments(parser)
    parser.add_argument("--output", required=True, metavar="DIR", help="the dataset directory to write")
    parser.add_argument("--overwrite", action="store_true", help="replace what --output holds")
    parser.add_argument(
        "--annotators", choices=settle.ANNOTATORS, default="keep_all", help="one label from several people's"
    )
    parser.add_argument(
        "--duplicates",
        choices=settle.DUPLICATES,
        default="keep_all",
        help="of one labeller's labels of the same prompt and response",
    )
    parser.add_argument(
        "--scale",
        choices=settle.SCALES,
        default="range",
        help="scores to [0, 1] by the ends of their scale, or by each source's distribution",
    )
    parser.add_argument("--calibration", metavar="DIR", help="a dataset whose scale statistics to apply again")
    parser.add_argument(
        "--max-rejected", type=share, default=0.01, metavar="SHARE", help="fail above this share of rejected records"
    )
    parser.add_argument("--license", default="unknown", metavar="ID", help="licence id for the dataset card")


ALWAYS = {  # decided the same for everybody, and counted
    "identical_responses": "reject",
    "out_of_range": "reject",
    "numbers_as_text": "parse",
    "booleans_as_text": "parse",
}


def command(args: argparse.Namespace) -> dict[str, Any]:
    """`una ingest`: returns the summary that `--json` prints."""
    from pipelines import beam

    output = args.output.rstrip("/") or "/"
    dataset.refuse(output, args.paths)
    policy = understand.policy_of(args)
    scale, calibration = _calibration(args)
    how = Settling(args.annotators, args.duplicates, scale, args.ties)
    converting = policy if how.annotators == "keep_all" else dataclasses.replace(policy, ties="settle")
    sources = understand.sources_of(args)
    policies = {**dataclasses.asdict(policy), **dataclasses.asdict(how), **ALWAYS, "license": args.license}
    if sources[0].mapping:
        policies["mapping"] = sources[0].mapping.spec
        policies["joined"] = [[io.name(path), io.sha256(path)] for path in sources[0].mapping.files]
    if calibration:
        policies["calibration"] = {"from": io.name(args.calibration.rstrip("/")), "sources": sorted(calibration)}
    _tell_shared_names(sources)
    beam.check(args.beam, *args.paths, output)
    for source in sources:
        understand.tell_unread(source, policy)
    stage = dataset.prepare(output, args.overwrite)
    return beam.run_stage(
        lambda p: build(p, sources, converting, policies, stage, output, how, calibration),
        args.beam,
        stage,
        output,
        args.max_rejected,
    )


def _calibration(args: argparse.Namespace) -> tuple[str, dict[str, Any] | None]:
    """The method and, with `--calibration`, the statistics of each source."""
    if not args.calibration:
        return args.scale, None
    manifest = dataset.read_manifest(args.calibration.removesuffix(NAME).rstrip("/") or ".")
    method = manifest.policies.get("scale", "range")
    if method == "range" or not manifest.statistics.get("scale"):
        raise UserError(f"{args.calibration}: no statistics of a scale here; make it with --scale minmax, say")
    if args.scale not in ("range", method):
        raise UsageError(f"--scale {args.scale}: {args.calibration} was made with {method}")
    return method, manifest.statistics["scale"]


def _tell_shared_names(sources: list[Source]) -> None:
    paths: dict[str, list[str]] = {}
    for source in sources:
        paths.setdefault(source.name, []).append(source.path)
    for name, files in paths.items():
        if len(files) > 1:
            log.info("%d files are one source, %r: %s and %s", len(files), name, files[0], files[-1])
