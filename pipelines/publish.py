"""A dataset ready to share and to train on: split by prompt, without exact duplicates, in sorted shards.

Rows go to the shard their prompt's id names, so no prompt is in two splits, equal rows meet in one
shard, and the rows of a prompt lie side by side. Files are cut into pieces by shard (part files, not a
shuffle), a group of files at a time, then each shard is put together from its pieces.
"""

import argparse
import dataclasses
import logging
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines import dataset, io
from pipelines.beam import check as check_flags
from pipelines.beam import count, once, run_stage
from pipelines.plan import Piece, Pieces, Plan, read
from schemas.command import weights
from schemas.errors import UsageError, UserError
from schemas.feedback import check, check_comparisons
from schemas.fingerprint import differences
from schemas.manifest import Manifest

log = logging.getLogger(__name__)
SHARD_BYTES = 256 << 20  # of compressed input per shard
MOST_SHARDS = 2_048  # above half a terabyte shards grow: each reads of every group, and that is groups × shards reads
GROUP_BYTES = 256 << 20  # of small files that are cut together


def plan(splits: dict[str, float], input_bytes: int) -> Plan:
    """Shards in proportion to each split's share of the input."""
    of_shard = max(SHARD_BYTES, input_bytes / MOST_SHARDS)
    shards = tuple(max(1, math.ceil(share * input_bytes / of_shard)) for share in splits.values())
    return Plan(tuple(splits.items()), shards)


def groups(files: list[str], sizes: list[int]) -> list[list[str]]:
    """Neighbours of at most `GROUP_BYTES` together, or one file alone."""
    made: list[list[str]] = []
    room = 0
    for path, size in zip(files, sizes, strict=True):
        if size > room:
            made.append([])
            room = GROUP_BYTES
        made[-1].append(path)
        room -= size
    return made


# --- cutting and putting together ----------------------------------------------------------------


def cut(
    item: tuple[int, list[str]], *, of: Plan, schema: pa.Schema, stage: str
) -> Iterator[tuple[int, tuple[int, Piece]]]:
    """Split a group of files into a piece per shard; yields (shard, (group's number, piece))."""
    i, paths = item
    pieces = Pieces(f"{stage}/parts/{i:06d}", of, schema)
    for path in paths:
        with io.open_parquet(path) as file:
            for group in range(file.num_row_groups):
                pieces.write(file.read_row_group(group).cast(schema).replace_schema_metadata(None))
    for s, piece in pieces.close():
        yield s, (i, piece)


def assemble(
    item: tuple[int, Iterable[tuple[int, Piece]]], *, of: Plan, schema: pa.Schema, stage: str, facts: dict[str, Any]
) -> dataset.Result:
    """Read a shard's pieces, drop exact duplicates, sort by prompt, write one file and report."""
    number, pieces = item
    split, within = of.name(number)
    rows = pa.concat_tables([read(piece) for _, piece in sorted(pieces)]).cast(schema).replace_schema_metadata(None)
    report = dataset.result([within], split=split)
    report["inputs"] = rows.num_rows
    rows = ordered(rows)
    report["duplicates"] = report["inputs"] - rows.num_rows
    report["accepted"] = rows.num_rows
    report["rows"] = Counter(rows["type"].to_pylist())
    check(rows, scored="ref_logps" in schema.names)
    check_comparisons(rows)
    writer = io.PartWriter(f"{stage}/parts/{split}-{within:06d}.data.parquet", schema, facts)
    for start, stop in prompt_runs(rows["prompt_id"], io.GROUP_ROWS // 8):
        writer.write(rows.slice(start, stop - start))
    report["data"] = writer.close()
    return report


def ordered(rows: pa.Table) -> pa.Table:
    """Rows with distinct ids, sorted by prompt, then comparison, then id: the order does not depend on the input's."""
    keys = rows.select(["prompt_id", "comparison_id", "id"])
    order = pc.sort_indices(keys, [("prompt_id", "ascending"), ("comparison_id", "ascending"), ("id", "ascending")])
    ids = keys["id"].take(order).to_numpy(zero_copy_only=False)
    first = np.concatenate([[True], ids[1:] != ids[:-1]]) if len(ids) else np.array([], bool)
    return rows.take(pa.array(order.to_numpy()[first]))


def prompt_runs(prompt_ids: pa.ChunkedArray, rows: int) -> Iterator[tuple[int, int]]:
    """[start, stop) pieces of at least `rows` rows that part no prompt."""
    encoded = prompt_ids.combine_chunks().dictionary_encode().indices.to_numpy()
    edges = [0, *(np.flatnonzero(np.diff(encoded)) + 1).tolist(), len(encoded)]
    start = 0
    for edge in edges:
        if edge - start >= rows or (edge == len(encoded) and edge > start):
            yield start, edge
            start = edge


# --- the pipeline --------------------------------------------------------------------------------


def build(
    pipeline: beam.Pipeline,
    files: list[list[str]],
    of: Plan,
    schema: pa.Schema,
    manifest: Manifest,
    stage: str,
    output: str,
) -> Any:
    """Groups of files → pieces by shard → shards → one commit. Only the pieces' paths are shuffled."""
    facts = {"stage": "publish", "policies": manifest.policies, "reference": manifest.reference}
    results = (
        pipeline
        | "files" >> beam.Create(list(enumerate(files)))
        | "spread" >> beam.Reshuffle()
        | "cut" >> beam.FlatMap(cut, of=of, schema=schema, stage=stage).with_output_types(tuple[int, tuple[int, Piece]])
        | "gather" >> beam.GroupByKey()
        | "assemble" >> beam.Map(assemble, of=of, schema=schema, stage=stage, facts=facts)
        | "count" >> beam.Map(count)
    )
    return once(pipeline, dataset.commit_all, results, manifest=manifest, stage=stage, output=output)


# --- command -------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `una publish`."""
    parser.add_argument(
        "directories", nargs="+", metavar="DIR", help="datasets made by `una reference` or `una ingest`, to be one"
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="the dataset directory to write")
    parser.add_argument(
        "--split",
        type=weights,
        default={"train": 0.95, "test": 0.05},
        metavar="NAME=SHARE,…",
        help="shares of the prompts, which sum to 1 (train=0.95,test=0.05)",
    )
    parser.add_argument("--license", metavar="ID", help="licence id for the dataset card")
    parser.add_argument("--overwrite", action="store_true", help="replace what --output holds")


def check_split(splits: dict[str, float]) -> None:
    """`UsageError` unless the shares are positive and sum to 1, under names that `datasets` takes."""
    text = ",".join(f"{name}={share:g}" for name, share in splits.items())
    if not all(share > 0 for share in splits.values()) or abs(sum(splits.values()) - 1) > 1e-9:
        raise UsageError(f"--split {text}: the shares must be positive and sum to 1")
    if bad := next((name for name in splits if not re.fullmatch(r"\w+", name, re.ASCII) or name == "all"), None):
        raise UsageError(f"--split {text}: {bad!r} is no name for a split; use letters, digits and _, and not all")


def together(manifests: dict[str, Manifest]) -> Manifest:
    """The manifest of several datasets as one; `UserError` unless all or none are scored, by the same reference.

    Policies on which they differ are lists, in the order of the datasets.
    """
    (first, one), *others = manifests.items()
    if not others:
        return one
    for directory, other in others:
        if bool(one.reference) != bool(other.reference):
            scored, bare = (first, directory) if one.reference else (directory, first)
            raise UserError(f"{scored} has reference log-probs and {bare} has none; run `una reference` on it first")
        if one.reference and (differing := differences(one.reference, other.reference or {})):
            raise UserError(f"{first} and {directory}: their references differ: {'; '.join(differing)}")
    every = list(manifests.values())
    names = sorted({name for manifest in every for name in manifest.policies})
    policies = {name: [manifest.policies.get(name) for manifest in every] for name in names}
    return dataclasses.replace(
        one,
        inputs=sum(manifest.inputs for manifest in every),
        accepted=sum(manifest.accepted for manifest in every),
        rejected=_sum(manifest.rejected for manifest in every),
        rejected_parts=_sum(manifest.rejected_parts for manifest in every),
        rows=_sum(manifest.rows for manifest in every),
        duplicates=sum(manifest.duplicates for manifest in every),
        touched=_sum(manifest.touched for manifest in every),
        sources=[source for manifest in every for source in manifest.sources],
        policies={name: of[0] if all(x == of[0] for x in of) else of for name, of in policies.items()},
        statistics={"datasets": [manifest.statistics for manifest in every]},
        history=[{"stage": "datasets", "of": [manifest.history for manifest in every]}],
    )


def _sum(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    return dict(sum(map(Counter, counts), Counter()))


def command(args: argparse.Namespace) -> dict[str, Any]:
    """`una publish`: returns the summary that `--json` prints."""
    splits = args.split
    check_split(splits)
    manifests = {directory: dataset.read_manifest(directory) for directory in args.directories}
    for directory, manifest in manifests.items():
        if manifest.policies.get("split", splits) != splits:
            raise UserError(
                f"{directory}: already split as {manifest.policies['split']}, and other shares would move prompts "
                "between splits; publish what it was made from, or give the same --split"
            )
    before = together(manifests)
    files = [path for directory, manifest in manifests.items() for path in dataset.data_files(directory, manifest)]
    sizes = [facts["bytes"] for manifest in manifests.values() for facts in dataset.shards(manifest)]
    of, grouped = plan(splits, sum(sizes)), groups(files, sizes)
    output = args.output.rstrip("/")
    check_flags(args.beam, *args.directories, output)
    dataset.refuse(output, args.directories)
    stage = dataset.prepare(output, args.overwrite)
    policies = {**before.policies, "split": splits, "exact_duplicates": "remove"}
    if args.license:
        policies["license"] = args.license
    manifest = before.next("publish", policies=policies)
    schema = dataset.schema_of(before)
    report = run_stage(lambda p: build(p, grouped, of, schema, manifest, stage, output), args.beam, stage, output)
    if "template" not in report and (empty := set(splits) - set(report["splits"])):
        log.warning("%s: too few prompts, nothing fell into split %s", output, ", ".join(sorted(empty)))
    return report
