"""Raw feedback files to feedback rows.

`convert_range` turns one range of a file into rows and rejected records; `build` is the Beam pipeline that
does so for all files; `inspect` shows what it would do. What rows a record becomes is the converters' work.
"""

import argparse
import dataclasses
import json
import logging
from collections import Counter
from functools import partial
from itertools import islice
from typing import Any

import pyarrow as pa

from pipelines import dataset, io
from pipelines.converters import CONVERTERS, LeftOut, Policy, detect, nearest
from pipelines.converters.base import PAPER_WEIGHTS
from schemas.command import did_you_mean, share, weights
from schemas.errors import Reject, UsageError, UserError
from schemas.feedback import FEEDBACK, REJECTED, Row, check, table
from schemas.manifest import Manifest

log = logging.getLogger(__name__)
BATCH_ROWS = 2_000
SAMPLE = 1_000  # records that `inspect` and the detection look at


@dataclasses.dataclass(frozen=True)
class Source:
    """One input file and how it was understood."""

    path: str
    kind: str
    format: str
    name: str
    asked: bool = False  # the format was given, not detected


# --- understanding a file ------------------------------------------------------------------------


def understand(path: str, format_name: str | None, source: str | None) -> Source:
    """How a file will be read; `UserError` with the nearest formats when its records are of no known one."""
    kind = io.kind_of(path)
    if format_name is not None and format_name not in CONVERTERS:
        raise UsageError(f"--format {format_name}: no such format{did_you_mean(format_name, CONVERTERS)}")
    return Source(path, kind, format_name or _detected(path, kind), source or io.stem(path), bool(format_name))


def _sample(path: str, kind: str, n: int) -> list[io.Raw]:
    return list(islice(io.records(io.Range(path, kind)), n))


def _detected(path: str, kind: str) -> str:
    sample = _sample(path, kind, 200)
    found = [r.value for r in sample if isinstance(r.value, dict)]
    if not found:
        why = next((r.value for r in sample if isinstance(r.value, Reject)), None)
        raise UserError(f"{path}: no records to be read here{f' ({why.detail})' if why else ''}; is it {kind}?")
    name, count = detect(found, CONVERTERS).most_common(1)[0]
    if not name:
        seen = ", ".join(map(str, list(found[0])[:12]))
        raise UserError(
            f"{path}: no known format has records with the fields {seen}; nearest: "
            f"{'; '.join(nearest(found[0], CONVERTERS))}; see `una inspect --help` and pass --format if one is right"
        )
    if count < len(found):
        log.info("%s: %d of the first %d records look like %s", path, count, len(found), name)
    return name


# --- one range -----------------------------------------------------------------------------------


def convert(raw: io.Raw, source: Source, policy: Policy) -> list[Row | LeftOut]:
    """Rows of one record, or `Reject`."""
    if isinstance(raw.value, Reject):
        raise raw.value
    if not isinstance(raw.value, dict):
        raise Reject("wrong_shape", f"the record is a {type(raw.value).__name__}, not an object")
    if not source.asked:
        _refuse_other_format(raw.value, source.format)
    return CONVERTERS[source.format].convert(raw.value, source.name, policy)


def _refuse_other_format(record: dict[str, Any], format_name: str) -> None:
    """A record that another format fits first would lose what that format says of it, such as its label."""
    first = next((c.name for c in CONVERTERS.values() if c.matches(record)), format_name)
    if first != format_name:
        raise Reject("wrong_shape", f"looks like {first} in a file of {format_name}; pass --format to insist")


def convert_range(
    work: tuple[list[int], io.Range, Source], *, policy: Policy, stage: str, facts: dict[str, Any]
) -> dataset.Result:
    """Convert a range into part files under `stage` and report what became of every record."""
    index, of, source = work
    name = "-".join(f"{i:06d}" for i in index)
    report = dataset.result(index)
    data = io.PartWriter(f"{stage}/parts/{name}.data.parquet", FEEDBACK, facts)
    rejects = io.PartWriter(f"{stage}/parts/{name}.rejected.parquet", REJECTED)
    rows: list[Row] = []
    refused: list[dict[str, Any]] = []
    for raw in io.records(of):
        report["inputs"] += 1
        try:
            made = convert(raw, source, policy)
            rows += [r for r in made if not isinstance(r, LeftOut)]
            refused += [_refused(raw, source, x.reason, x.detail, x.part) for x in made if isinstance(x, LeftOut)]
            report["accepted"] += 1
        except Reject as reject:
            refused.append(_refused(raw, source, reject.reason, reject.detail))
        if len(rows) >= BATCH_ROWS or len(refused) >= BATCH_ROWS:
            _write(rows, refused, data, rejects, report)
            rows, refused = [], []
    _write(rows, refused, data, rejects, report)
    report["data"], report["rejects"] = data.close(), rejects.close()
    lost = report["inputs"] - report["accepted"] - sum(report["rejected"].values())
    assert lost == 0, f"{of.path}: {lost} records are neither accepted nor rejected"
    log.info("%s: %d records, %d rejected", of.path, report["inputs"], sum(report["rejected"].values()))
    return report


def _refused(raw: io.Raw, source: Source, reason: str, detail: str, part: str | None = None) -> dict[str, Any]:
    detail = detail.encode("utf-8", "backslashreplace").decode()[:500]
    return {
        "reason": reason,
        "detail": detail,
        "source_file": source.path,
        "position": raw.position,
        "part": part,
        "payload": raw.payload,
    }


def _write(
    rows: list[Row],
    refused: list[dict[str, Any]],
    data: io.PartWriter,
    rejects: io.PartWriter,
    report: dataset.Result,
) -> None:
    if rows:
        batch = table(rows)
        check(batch)
        data.write(batch)
        report["rows"].update(Counter(r["type"] for r in rows))
    if refused:
        rejects.write(pa.Table.from_pylist(refused, schema=REJECTED))
        report["rejected"].update(Counter(r["reason"] for r in refused if r["part"] is None))
        report["rejected_parts"].update(Counter(r["reason"] for r in refused if r["part"] is not None))


# --- the pipeline --------------------------------------------------------------------------------


def build(pipeline: Any, sources: list[Source], policy: Policy, policies: dict[str, Any], stage: str, output: str):
    """Files → ranges → part files → one commit. Only addresses and counts pass between workers."""
    import apache_beam as beam

    from pipelines.beam import count, once

    facts = {"stage": "ingest", "policies": policies}
    surveyed = (
        pipeline
        | "files" >> beam.Create(list(enumerate(sources)))
        | "survey" >> beam.Map(_survey).with_output_types(dict)
    )
    results = (
        surveyed
        | "ranges" >> beam.FlatMap(lambda s: s["ranges"])
        | "spread" >> beam.Reshuffle()
        | "convert" >> beam.Map(partial(convert_range, policy=policy, stage=stage, facts=facts))
        | "count" >> beam.Map(count)
    )
    return once(pipeline, _commit, surveyed, results, policies=policies, stage=stage, output=output)


def _survey(item: tuple[int, Source]) -> dict[str, Any]:
    i, source = item
    facts, ranges = io.survey(source.path, source.kind)
    facts.update(source=source.name, format=source.format)
    return {"file": i, "facts": facts, "ranges": [([i, j], of, source) for j, of in enumerate(ranges)]}


def _commit(
    surveyed: list[dict[str, Any]],
    results: list[dataset.Result],
    *,
    policies: dict[str, Any],
    stage: str,
    output: str,
) -> None:
    surveyed = sorted(surveyed, key=lambda s: s["file"])
    expected = sum(len(s["ranges"]) for s in surveyed)
    assert len(results) == expected, f"{len(results)} of {expected} ranges were read"
    records: Counter[int] = Counter()
    for r in results:
        records[r["index"][0]] += r["inputs"]
    sources = [{**s["facts"], "records": records[s["file"]]} for s in surveyed]
    manifest = Manifest(stage="ingest", inputs=0, accepted=0, sources=sources, policies=policies)
    dataset.commit(results, manifest, stage, output)


# --- commands ------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `una ingest`."""
    _add_policy(parser)
    parser.add_argument("--output", required=True, metavar="DIR", help="the dataset directory to write")
    parser.add_argument("--overwrite", action="store_true", help="replace what --output holds")
    parser.add_argument(
        "--max-rejected", type=share, default=0.01, metavar="SHARE", help="fail above this share of rejected records"
    )
    parser.add_argument("--license", default="unknown", metavar="ID", help="licence id for the dataset card")


def _add_policy(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("paths", nargs="+", metavar="PATH", help="files, directories or glob patterns; gs:// and s3://")
    parser.add_argument("--format", metavar="NAME", help=f"do not detect: {', '.join(CONVERTERS)}")
    parser.add_argument("--source", metavar="NAME", help="name of the source (default: each file's name)")
    parser.add_argument("--ties", choices=("drop", "half"), default="drop", help="half: keep with rewards .5 and .5")
    parser.add_argument(
        "--helpsteer-weights",
        type=weights,
        default=PAPER_WEIGHTS,
        metavar="NAME=W,…",
        help="default: helpfulness=0.65,correctness=0.8,coherence=0.45, the paper's",
    )
    parser.add_argument(
        "--ultrafeedback-score", choices=("fine-grained_score", "overall_score"), default="fine-grained_score"
    )


def _tell_shared_names(sources: list[Source]) -> None:
    paths: dict[str, list[str]] = {}
    for source in sources:
        paths.setdefault(source.name, []).append(source.path)
    for name, files in paths.items():
        if len(files) > 1:
            log.info("%d files are one source, %r: %s and %s", len(files), name, files[0], files[-1])


def _policy(args: argparse.Namespace) -> Policy:
    return Policy(args.ties, dict(args.helpsteer_weights), args.ultrafeedback_score)


def command(args: argparse.Namespace) -> dict[str, Any]:
    """`una ingest`: returns the summary that `--json` prints."""
    from pipelines import beam

    output = args.output.rstrip("/") or "/"
    dataset.refuse(output, args.paths)
    paths = io.expand(args.paths)
    sources = [understand(path, args.format, args.source) for path in paths]
    policy = _policy(args)
    policies = {**dataclasses.asdict(policy), "license": args.license}
    _tell_shared_names(sources)
    beam.check(args.beam)
    stage = dataset.prepare(output, args.overwrite)
    return beam.run_stage(
        lambda p: build(p, sources, policy, policies, stage, output), args.beam, stage, output, args.max_rejected
    )


def add_inspect_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `una inspect`."""
    _add_policy(parser)


def inspect(args: argparse.Namespace) -> dict[str, Any]:
    """`una inspect`: how each file is understood, and three rows as they would come out."""
    policy = _policy(args)
    files = [_inspect_file(path, args, policy) for path in io.expand(args.paths)]
    for facts in files:
        _print_inspection(facts)
    return {"files": files}


def _inspect_file(path: str, args: argparse.Namespace, policy: Policy) -> dict[str, Any]:
    source = understand(path, args.format, args.source)
    converter = CONVERTERS[source.format]
    rows: list[Row] = []
    rejected: Counter[str] = Counter()
    sample = _sample(path, source.kind, SAMPLE)
    for raw in sample:
        try:
            rows += [r for r in convert(raw, source, policy) if not isinstance(r, LeftOut)][: 3 - min(3, len(rows))]
        except Reject as reject:
            rejected[reject.reason] += 1
    return {
        "path": path,
        "kind": source.kind,
        "format": source.format,
        "feedback": converter.feedback,
        "fields": dict(converter.fields),
        "labels": converter.labels,
        "policies": dataclasses.asdict(policy),
        "sampled": len(sample),
        "rejected": dict(rejected),
        "rows": rows,
    }


def _print_inspection(facts: dict[str, Any]) -> None:
    print(f"{facts['path']}: {facts['format']} ({facts['kind']}), {facts['feedback']} feedback")
    for field, column in facts["fields"].items():
        print(f"  {field:24} → {column}")
    print(f"  labels: {facts['labels'] or 'none'}")
    print("  policies: " + ", ".join(f"{k}={v}" for k, v in facts["policies"].items()))
    refused = ", ".join(f"{k} {v}" for k, v in facts["rejected"].items()) or "none"
    print(f"  of the first {facts['sampled']} records, rejected: {refused}")
    for row in facts["rows"]:
        print("  " + _printable(json.dumps(_shortened(row), ensure_ascii=False)))
    print()


def _shortened(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _shortened(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_shortened(v) for v in value]
    return f"{value[:160]}… ({len(value)} characters)" if isinstance(value, str) and len(value) > 200 else value


def _printable(text: str) -> str:
    """Control characters of untrusted text could drive a terminal; lone surrogates cannot be printed."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)
