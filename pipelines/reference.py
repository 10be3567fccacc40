"""Add token ids and log-probs under the reference model π_ref to feedback rows.

Rows are read in small chunks, rendered to token ids, scored by an engine through Beam's RunInference and written
chunk by chunk, so no text crosses a shuffle. A row that cannot be rendered or scored is rejected with its
reason, and with it the other row of its comparison.
"""

import argparse
import dataclasses
import logging
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa
from apache_beam.ml.inference.base import ModelHandler, RunInference

from pipelines import dataset, engines, io, render
from pipelines.beam import across_processes, count, once, run_stage
from pipelines.beam import check as check_flags
from schemas.command import share
from schemas.errors import Reject, UsageError, UserError
from schemas.feedback import FEEDBACK, REFERENCE_COLUMNS, REJECTED, SCORED, check
from schemas.fingerprint import fingerprint, local_model
from schemas.manifest import Manifest

log = logging.getLogger(__name__)
CHUNK_ROWS = 2_048


@dataclasses.dataclass(frozen=True)
class Address:
    """Where a chunk's rows lie: rows [start, stop) of a row group."""

    index: tuple[int, int, int]
    path: str
    group: int
    start: int
    stop: int
    first: int  # number of the chunk's first row in its file, from 1

    @property
    def split(self) -> str:
        return self.path.rsplit("/", 1)[-1].partition("-")[0]


@dataclasses.dataclass
class Chunk:
    """Rows on their way through the stage; the lists run parallel to `rows`. A rejected row has `why` set."""

    address: Address
    rows: pa.Table
    prompts: list[list[int]]  # token ids
    responses: list[list[int]]  # token ids, end of turn included
    why: list[Reject | None]
    logps: list[np.ndarray] = dataclasses.field(default_factory=list)  # nats, one per response token


# --- reading and rendering -----------------------------------------------------------------------


def addresses(item: tuple[int, str], rows: int = CHUNK_ROWS, together: str = "comparison_id") -> Iterator[Address]:
    """Chunks of about `rows` rows of a data file; rows that follow each other and share `together` are never parted."""
    i, path = item
    first = 1
    with io.open_parquet(path) as file:
        for group in range(file.num_row_groups):
            ids = file.read_row_group(group, columns=[together])[together].to_pylist()
            cuts = _cuts(ids, rows)
            for k, (start, stop) in enumerate(pairwise(cuts)):
                yield Address((i, group, k), path, group, start, stop, first + start)
            first += len(ids)


def _cuts(ids: Sequence[str | None], rows: int) -> list[int]:
    cuts = [0]
    while cuts[-1] < len(ids):
        cut = min(cuts[-1] + rows, len(ids))
        while cut < len(ids) and ids[cut] and ids[cut] == ids[cut - 1]:
            cut += 1
        cuts.append(cut)
    return cuts


def read(address: Address, schema: pa.Schema) -> pa.Table:
    """The rows of a chunk."""
    with io.open_parquet(address.path) as file:
        rows = file.read_row_group(address.group).slice(address.start, address.stop - address.start)
    rows = rows.cast(schema).replace_schema_metadata(None).combine_chunks()
    check(rows, scored="ref_logps" in schema.names)
    return rows


class Render(beam.DoFn):
    """Address → Chunk with token ids; the tokenizer is loaded once per worker."""

    def __init__(self, model: str, max_length: int):
        self.model, self.max_length = model, max_length

    def setup(self) -> None:
        self.renderer = render.load(self.model)

    def process(self, address: Address) -> Iterable[Chunk]:
        rows = read(address, FEEDBACK)
        chunk = Chunk(address, rows, [], [], [None] * rows.num_rows)
        columns = (rows[name].to_pylist() for name in ("prompt", "response", "metadata"))
        for i, row in enumerate(zip(*columns, strict=True)):
            ids: tuple[list[int], list[int]] = ([], [])
            try:
                ids = self._ids(*row)
            except Reject as reject:
                chunk.why[i] = reject
            chunk.prompts.append(ids[0])
            chunk.responses.append(ids[1])
        reject_partners(chunk)
        yield chunk

    def _ids(self, prompt: list, response: str, metadata: str | None) -> tuple[list[int], list[int]]:
        prompt_ids, response_ids = self.renderer.row_ids(prompt, response, metadata)
        if (n := len(prompt_ids) + len(response_ids)) > self.max_length:
            raise Reject("too_long", f"{n} tokens, and --max-length is {self.max_length}")
        return prompt_ids, response_ids


def reject_partners(chunk: Chunk) -> None:
    """Half a comparison is no comparison: reject the other row as well."""
    comparisons = chunk.rows["comparison_id"].to_pylist()
    broken = {c for c, why in zip(comparisons, chunk.why, strict=True) if c and why}
    for i, c in enumerate(comparisons):
        if c in broken and chunk.why[i] is None:
            chunk.why[i] = Reject("comparison_incomplete", "the other response of this comparison was rejected")


# --- scoring -------------------------------------------------------------------------------------


class Scorer(ModelHandler[Chunk, Chunk, engines.Engine]):
    """RunInference's handler for our engines: one chunk per call, since the engine batches by tokens itself."""

    def __init__(self, load: partial, across_processes: bool):
        super().__init__(min_batch_size=1, max_batch_size=1)
        self._load, self._across = load, across_processes

    def load_model(self) -> engines.Engine:
        return self._load()

    def run_inference(self, batch: Sequence[Chunk], model: engines.Engine, inference_args: Any = None) -> list[Chunk]:
        return [score(chunk, model) for chunk in batch]

    def get_num_bytes(self, batch: Sequence[Chunk]) -> int:
        return sum(chunk.rows.nbytes for chunk in batch)

    def get_metrics_namespace(self) -> str:
        return "una_reference"

    def share_model_across_processes(self) -> bool:
        return self._across


def score(chunk: Chunk, engine: engines.Engine) -> Chunk:
    """Fill in `logps` of every row that is not rejected; a log-prob that is not finite rejects its row."""
    wanted = [i for i, why in enumerate(chunk.why) if why is None]
    start = time.perf_counter()
    found = engine.score([chunk.prompts[i] for i in wanted], [chunk.responses[i] for i in wanted]) if wanted else []
    chunk.logps = [np.empty(0, np.float32)] * len(chunk.why)
    for i, logps in zip(wanted, found, strict=True):
        assert len(logps) == len(chunk.responses[i])
        chunk.logps[i] = logps
        if not np.isfinite(logps).all():
            chunk.why[i] = Reject("invalid_logprob", f"log-prob {logps[~np.isfinite(logps)][0]}")
    reject_partners(chunk)
    tokens = sum(len(chunk.prompts[i]) + len(chunk.responses[i]) for i in wanted)
    log.info("scored %d rows, %.0f tokens/s", len(wanted), tokens / max(1e-9, time.perf_counter() - start))
    return chunk


# --- writing -------------------------------------------------------------------------------------


def write(chunk: Chunk, *, stage: str, facts: dict[str, Any]) -> dataset.Result:
    """Write a chunk's part files and report what became of its rows."""
    name = dataset.part_name(chunk.address.index)
    report = dataset.result(list(chunk.address.index), split=chunk.address.split)
    good = [i for i, why in enumerate(chunk.why) if why is None]
    data = io.PartWriter(f"{stage}/parts/{name}.data.parquet", SCORED, facts)
    rejects = io.PartWriter(f"{stage}/parts/{name}.rejected.parquet", REJECTED)
    if good:
        rows = scored_rows(chunk, good)
        check(rows, scored=True)
        data.write(rows)
        report["rows"].update(Counter(rows["type"].to_pylist()))
    at = chunk.address
    refused = [dataset.refused(chunk.rows, i, w, at.first + i, at.path) for i, w in enumerate(chunk.why) if w]
    if refused:
        rejects.write(pa.Table.from_pylist(refused, schema=REJECTED))
        report["rejected"].update(Counter(r["reason"] for r in refused))
    report["inputs"], report["accepted"] = chunk.rows.num_rows, len(good)
    report["data"], report["rejects"] = data.close(), rejects.close()
    return report


def scored_rows(chunk: Chunk, good: list[int]) -> pa.Table:
    """The rows at `good` with the four reference columns."""
    rows = chunk.rows.take(pa.array(good, pa.int64()))
    columns = [
        [chunk.prompts[i] for i in good],
        [chunk.responses[i] for i in good],
        [chunk.logps[i] for i in good],
        [float(chunk.logps[i].astype(np.float64).sum()) for i in good],
    ]
    extra = [pa.array(c, f.type) for c, f in zip(columns, REFERENCE_COLUMNS, strict=True)]
    return pa.table([*rows.columns, *extra], schema=SCORED)


# --- the pipeline --------------------------------------------------------------------------------


def build(
    pipeline: beam.Pipeline,
    files: list[str],
    renderer: Render,
    scorer: Scorer,
    manifest: Manifest,
    stage: str,
    output: str,
) -> Any:
    """Addresses → one chain of render, score and write → one commit."""
    facts = {"stage": "reference", "policies": manifest.policies, "reference": manifest.reference}
    results = (
        pipeline
        | "files" >> beam.Create(list(enumerate(files)))
        | "addresses" >> beam.FlatMap(addresses)
        | "spread" >> beam.Reshuffle()
        | "render" >> beam.ParDo(renderer)
        | "score" >> RunInference(scorer)
        | "write" >> beam.Map(write, stage=stage, facts=facts)
        | "count" >> beam.Map(count)
    )
    return once(pipeline, dataset.commit_all, results, manifest=manifest, stage=stage, output=output)


# --- command -------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `una reference`."""
    parser.add_argument("directory", metavar="DIR", help="a dataset directory made by `una ingest`")
    parser.add_argument("--model", required=True, help="the reference model: a directory, or a hub id")
    parser.add_argument("--output", required=True, metavar="DIR", help="the dataset directory to write")
    parser.add_argument("--engine", choices=tuple(engines.ENGINES), default="transformers")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--batch-tokens", type=int, default=8192, metavar="N", help="tokens in one batch (8192)")
    parser.add_argument(
        "--max-length", type=int, metavar="N", help="reject rows of more tokens (default: 2048, or the model's limit)"
    )
    parser.add_argument("--max-rejected", type=share, default=0.01, metavar="SHARE")
    parser.add_argument("--overwrite", action="store_true", help="replace what --output holds")


def command(args: argparse.Namespace) -> dict[str, Any]:
    """`una reference`: returns the summary that `--json` prints."""
    before = dataset.read_manifest(args.directory)
    if before.reference:
        raise UserError(f"{args.directory}: already scored; give the directory that `una ingest` wrote")
    if args.batch_tokens < 1:
        raise UsageError(f"--batch-tokens {args.batch_tokens}: must be positive")
    files = dataset.data_files(args.directory, before)
    model = str(local_model(args.model))
    mark = fingerprint(model, dtype=args.dtype, engine=args.engine, engine_version=engines.version(args.engine))
    longest = max_length(model, args.max_length, args.engine)
    render.load(model)  # a template that cannot work fails here, before any worker starts
    output = args.output.rstrip("/")
    check_flags(args.beam)
    dataset.refuse(output, [args.directory, model])
    stage = dataset.prepare(output, args.overwrite)
    manifest = before.next(
        "reference",
        policies={**before.policies, "max_length": longest},
        reference={"model": args.model, **mark},
    )
    load = partial(
        engines.load, args.engine, model, dtype=args.dtype, batch_tokens=args.batch_tokens, max_length=longest
    )
    scorer = Scorer(load, across_processes=across_processes(args.beam))
    return run_stage(
        lambda p: build(p, files, Render(model, longest), scorer, manifest, stage, output),
        args.beam,
        stage,
        output,
        args.max_rejected,
    )


def max_length(model: str, asked: int | None, engine: str) -> int:
    """The longest row in tokens: what was asked for, or 2048, within the model's context. vLLM needs one token more."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model).get_text_config()
    except Exception as error:
        raise UserError(f"{model}: config.json cannot be read ({error})") from None
    context = getattr(config, "max_position_embeddings", None) or asked or 2048
    context -= engine == "vllm"
    if asked is not None and not 2 <= asked <= context:
        raise UsageError(f"--max-length {asked}: must lie between 2 and {context}, the context of {model} ({engine})")
    return asked or min(2048, context)
