"""Raw feedback files to feedback rows.

`convert_range` turns one range of a file into rows and rejected records; `build` is the Beam pipeline that does so for
all files, and settles labels where that is asked for. What rows a record becomes is the converters' work.
"""

import argparse
import dataclasses
import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines import dataset, io, readers, settle, understand
from pipelines.converters import LeftOut, Policy
from pipelines.converters.base import touched
from pipelines.plan import Pieces, Plan
from pipelines.settle import Settling
from pipelines.understand import Source, convert
from schemas import feedback
from schemas.command import share
from schemas.errors import Reject, UsageError, UserError
from schemas.feedback import FEEDBACK, REJECTED, Row, check, text_rows, usable_texts
from schemas.manifest import NAME, Manifest

log = logging.getLogger(__name__)
BATCH_ROWS = 2_000
SHARD_BYTES = 16 << 20  # of input whose rows are settled at a time
MOST_SHARDS = 256


# --- one range -----------------------------------------------------------------------------------


def convert_range(
    work: tuple[list[int], readers.Range, Source],
    *,
    policy: Policy,
    stage: str,
    facts: dict[str, Any],
    shards: int = 0,
    how: Settling | None = None,
) -> dataset.Result:
    """Convert a range into part files under `stage` and report what became of every record.

    With `shards`, rows go to a piece for each shard, by their prompt, to be settled there.
    """
    index, of, source = work
    name = "-".join(f"{i:06d}" for i in index)
    report = dataset.result(index)
    out = _Output(source, policy, report, f"{stage}/parts/{name}", facts, shards, how or Settling())
    counting = touched.set(report["touched"])
    try:
        for found in understand.records(of, source):
            if isinstance(found, readers.Texts):
                out.texts(found)
            else:
                out.record(found)
        out.write()
    finally:
        touched.reset(counting)
    report["spreads"] = settle.together(out.spreads)
    report["data"], report["pieces"] = out.whole.close(), out.pieces.close() if out.pieces else []
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
        shards: int,
        how: Settling,
    ):
        self.source, self.policy, self.report = source, policy, report
        plan = Plan((("train", 1.0),), (shards,)) if shards else None
        self.pieces = Pieces(path, plan, FEEDBACK) if plan else None
        self.whole = io.PartWriter(f"{path}.data.parquet", FEEDBACK, facts)
        self.rejects = io.PartWriter(f"{path}.rejected.parquet", REJECTED)
        self.how, self.spreads = how, list[dict[str, settle.Spread]]()
        self.rows: list[Row] = []
        self.refused: list[dict[str, Any]] = []

    def record(self, raw: readers.Raw) -> None:
        self.rows += self._rows_of(raw)
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
        written = 0
        for i in np.flatnonzero(~usable).tolist():
            if rows := self._rows_of(found.record(i)):
                self._put(table.slice(written, int(before[i]) - written))
                self._put(feedback.table(rows))
                written = int(before[i])
        self._put(table.slice(written))

    def write(self) -> None:
        """Write what has gathered."""
        if self.rows:
            self._put(feedback.table(self.rows))
        if self.refused:
            self.rejects.write(pa.Table.from_pylist(self.refused, schema=REJECTED))
            self.report["rejected"].update(Counter(r["reason"] for r in self.refused if r["part"] is None))
            self.report["rejected_parts"].update(Counter(r["reason"] for r in self.refused if r["part"] is not None))
        self.rows, self.refused = [], []

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

    def _put(self, rows: pa.Table) -> None:
        if not rows.num_rows:
            return
        check(rows)
        (self.pieces or self.whole).write(rows)
        counts = pc.value_counts(rows["type"]).to_pylist()
        self.report["rows"].update({one["values"]: one["counts"] for one in counts})
        if self.how.scale != "range":
            self.spreads.append(settle.spreads(rows))


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


# --- one shard ----------------------------------------------------------------------------------


def settle_shard(
    item: tuple[int, Iterable[tuple[list[int], str]]],
    scales: dict[str, dict[str, Any]],
    *,
    how: Settling,
    stage: str,
    facts: dict[str, Any],
) -> dataset.Result:
    """Settle the rows of a shard, in the order of the input, write one part file and report."""
    number, pieces = item
    read = [io.open_parquet(path).read() for _, path in sorted(pieces)]
    before = pa.concat_tables(read).cast(FEEDBACK).replace_schema_metadata(None).combine_chunks()
    del read
    rows, left_out, policies, agreement = settle.shard(before, how, scales)
    report = dataset.result([number])
    report["touched"], report["agreement"] = policies, agreement
    check(rows)
    data = io.PartWriter(f"{stage}/parts/settled-{number:06d}.data.parquet", FEEDBACK, facts)
    cuts = [*settle.starts(rows)[::BATCH_ROWS].tolist(), rows.num_rows]  # none inside a comparison
    for start, stop in pairwise(cuts):
        data.write(rows.slice(start, stop - start))
    rejects = io.PartWriter(f"{stage}/parts/settled-{number:06d}.rejected.parquet", REJECTED)
    refused = [_unsettled(one["row"], one["reason"], one["detail"]) for one in left_out]
    if refused:
        rejects.write(pa.Table.from_pylist(refused, schema=REJECTED))
    report["rows"].update(Counter(rows["type"].to_pylist()))
    report["rejected_parts"].update(Counter(one["reason"] for one in refused))
    report["data"], report["rejects"] = data.close(), rejects.close()
    merged = sum(n for name, n in policies.items() if name != "scale")
    lost = before.num_rows - rows.num_rows - merged - len(refused)
    assert lost == 0, f"{lost} of {before.num_rows} rows are neither kept, merged nor left out"
    return report


def _unsettled(row: dict[str, Any], reason: str, detail: str) -> dict[str, Any]:
    payload = json.dumps(row, ensure_ascii=False).encode()
    about = {"source_file": row["source"], "position": 0, "part": f"row {row['id']}"}
    return {"reason": reason, "detail": detail, **about, "payload": payload}


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
    """Files → ranges → part files (→ shards, where labels are settled) → one commit.

    Only addresses, counts and statistics pass between workers.
    """
    import apache_beam as beam

    from pipelines.beam import count, once

    how = how or Settling()
    shards = _shards(sources) if how.needed else 0
    facts = {"stage": "ingest", "policies": policies}
    surveyed = (
        pipeline
        | "files" >> beam.Create(list(enumerate(sources)))
        | "survey" >> beam.Map(_survey).with_output_types(dict)
    )
    converted = (
        surveyed
        | "ranges" >> beam.FlatMap(lambda s: s["ranges"])
        | "spread" >> beam.Reshuffle()
        | "convert" >> beam.Map(partial(convert_range, policy=policy, stage=stage, facts=facts, shards=shards, how=how))
        | "count" >> beam.Map(count)
    )
    gathered = [surveyed, converted]
    if shards:
        parts = converted | "spreads" >> beam.Map(lambda r: (r["index"], r["spreads"]))
        scales = (
            pipeline
            | "scales" >> beam.Create([(how.scale, calibration)])
            | "statistics" >> beam.Map(_statistics, beam.pvalue.AsList(parts))
        )
        settled = (
            converted
            | "pieces" >> beam.FlatMap(_pieces).with_output_types(tuple[int, tuple[list[int], str]])
            | "gather" >> beam.GroupByKey()
            | "settle" >> beam.Map(settle_shard, beam.pvalue.AsSingleton(scales), how=how, stage=stage, facts=facts)
        )
        gathered += [settled, scales]
    return once(pipeline, _commit, *gathered, policies=policies, stage=stage, output=output)


def _shards(sources: list[Source]) -> int:
    return min(MOST_SHARDS, 1 + sum(io.size(s.path) for s in sources) // SHARD_BYTES)


def _pieces(report: dataset.Result) -> Iterator[tuple[int, tuple[list[int], str]]]:
    for shard, path in report["pieces"]:
        yield shard, (report["index"], path)


def _statistics(
    asked: tuple[str, dict[str, Any] | None], parts: list[tuple[list[int], dict[str, settle.Spread]]]
) -> dict[str, dict[str, Any]]:
    """What new rewards are made from, per source: as stored by an earlier run, or of all ranges in their order."""
    method, calibration = asked
    if calibration is not None or method == "range":
        return calibration or {}
    whole = settle.together(spreads for _, spreads in sorted(parts, key=lambda part: part[0]))
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
    if settled is not None:
        results = [{**r, "rows": Counter()} for r in results] + settled  # the rows are those of the shards
        in_order = sorted(settled, key=lambda r: r["index"])
        manifest.statistics = {
            "scale": (scales or [{}])[0],
            "agreement": settle.agreement(r["agreement"] for r in in_order),
        }
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
    beam.check(args.beam)
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
