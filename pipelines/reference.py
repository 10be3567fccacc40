"""Add token ids and log-probs under the reference model π_ref to feedback rows.

Rows are read in small chunks, rendered to token ids, scored by an engine through Beam's RunInference and written
chunk by chunk, so no text crosses a shuffle. What the store holds is not computed again; what is computed is in the
store batch by batch. Before all that, a sample is compared with plain transformers (`parity`). A row that cannot be
rendered or scored is rejected with its reason, and with it the other row of its comparison.
"""

import argparse
import dataclasses
import json
import logging
import os
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, partial
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa
from apache_beam.metrics import Metrics
from apache_beam.ml.inference.base import ModelHandler, RunInference
from apache_beam.utils.multi_process_shared import MultiProcessShared
from apache_beam.utils.shared import Shared

from pipelines import dataset, engines, gpu, io, models, parity, render
from pipelines.beam import across_processes, count, once, run_stage, shares_disk
from pipelines.beam import check as check_flags
from pipelines.chunks import Address, addresses, read
from pipelines.pieces import Pieces
from pipelines.store import Store, space_of
from schemas.command import share
from schemas.errors import Reject, UsageError, UserError
from schemas.feedback import FEEDBACK, REFERENCE_COLUMNS, REJECTED, SCORED, check
from schemas.fingerprint import fingerprint
from schemas.manifest import Manifest

log = logging.getLogger(__name__)
CHUNK_ROWS = 2_048
SAMPLE_PLACES = 16  # of the rows for parity, spread over the dataset
HOPELESS = 16  # rows in a row on which the engine fails: then it is not the rows


@dataclasses.dataclass
class Chunk:
    """Rows on their way through the stage; the lists run parallel to `rows`. A rejected row has `why` set."""

    address: Address
    rows: pa.Table
    prompts: list[list[int]]  # token ids
    responses: list[list[int]]  # token ids, end of turn included
    why: list[Reject | None]
    logps: list[np.ndarray] = dataclasses.field(default_factory=list)  # nats, one per response token
    counts: Counter[str] = dataclasses.field(default_factory=Counter)  # rows: reused, computed, repeated


# --- rendering -----------------------------------------------------------------------------------


class Render(beam.DoFn):
    """Address → Chunk with token ids; the tokenizer is loaded once per worker."""

    def __init__(self, model: str, max_length: int, vocabulary: int):
        self.model, self.max_length, self.vocabulary = model, max_length, vocabulary

    def setup(self) -> None:
        self.renderer = render.load(models.local(self.model))

    def process(self, address: Address) -> Iterable[Chunk]:
        yield self.chunk(address, read(address, FEEDBACK))

    def chunk(self, address: Address, rows: pa.Table) -> Chunk:
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
        return chunk

    def _ids(self, prompt: list, response: str, metadata: str | None) -> tuple[list[int], list[int]]:
        prompt_ids, response_ids = self.renderer.row_ids(prompt, response, metadata)
        if (n := len(prompt_ids) + len(response_ids)) > self.max_length:
            raise Reject("too_long", f"{n} tokens, and --max-length is {self.max_length}")
        if not prompt_ids:
            raise Reject("template_error", "the prompt is rendered to no token, so nothing predicts the first one")
        if (worst := max(*prompt_ids, *response_ids)) >= self.vocabulary:
            raise Reject("unknown_token", f"token id {worst}, and the model knows ids below {self.vocabulary}")
        return prompt_ids, response_ids


def reject_partners(chunk: Chunk) -> None:
    """Half a comparison is no comparison: reject the other row as well."""
    comparisons = chunk.rows["comparison_id"].to_pylist()
    broken = {c for c, why in zip(comparisons, chunk.why, strict=True) if c and why}
    for i, c in enumerate(comparisons):
        if c in broken and chunk.why[i] is None:
            chunk.why[i] = Reject("comparison_incomplete", "the other response of this comparison was rejected")


# --- scoring -------------------------------------------------------------------------------------


class Loader:
    """The engine in a worker: loaded when something is to be computed, once for all its steps and threads.

    With `across`, once for all worker processes of the machine.
    """

    def __init__(self, load: partial, across: bool):
        self._load, self._across = load, across
        self._handle, self._tag = Shared(), f"una-reference-{uuid.uuid4().hex}"
        self._acquired: Any = None

    def __call__(self) -> engines.Engine:
        if not self._across:
            return self._handle.acquire(self._load)
        self._acquired = self._acquired or MultiProcessShared(self._load, tag=self._tag).acquire()
        return self._acquired


@dataclasses.dataclass(frozen=True)
class Kept:
    """The store of a run, as it travels to workers; `directory` None is none."""

    directory: str | None
    facts: str  # of the space, in JSON
    run: str
    one_disk: bool = True  # all workers have it: a database, and pieces otherwise

    def open(self) -> Store | Pieces | None:
        with _opening:
            return _opened(self) if self.directory else None


_opening = threading.Lock()


@cache
def _opened(kept: Kept) -> Store | Pieces:
    """The one store object of this process and a run."""
    assert kept.directory
    made = Store if kept.one_disk else Pieces
    return made(kept.directory, json.loads(kept.facts), kept.run)


class Scorer(ModelHandler[Chunk, Chunk, Loader]):
    """RunInference's handler for our engines: one chunk per call, since the engine batches by tokens itself.

    Its model is the loader: where the store holds every row, no engine is loaded.
    """

    def __init__(self, loader: Loader, kept: Kept):
        super().__init__(min_batch_size=1, max_batch_size=1)
        self._loader, self._kept = loader, kept

    def load_model(self) -> Loader:
        return self._loader

    def run_inference(self, batch: Sequence[Chunk], model: Loader, inference_args: Any = None) -> list[Chunk]:
        return [score(chunk, model, self._kept.open()) for chunk in batch]

    def get_num_bytes(self, batch: Sequence[Chunk]) -> int:
        return sum(chunk.rows.nbytes for chunk in batch)

    def get_metrics_namespace(self) -> str:
        return "una_reference"


def score(chunk: Chunk, engine: Callable[[], engines.Engine], store: Store | Pieces | None = None) -> Chunk:
    """Fill in `logps` of every row that is not rejected; a log-prob that is not finite rejects its row."""
    wanted = [i for i, why in enumerate(chunk.why) if why is None]
    part, start = dataset.part_name(chunk.address.index), time.perf_counter()
    rows = {i: (tuple(chunk.prompts[i]), tuple(chunk.responses[i])) for i in wanted}
    first = {ids: i for i, ids in reversed(rows.items())}  # rows with the same tokens are computed once
    keys = {i: store.key(*ids) for ids, i in first.items()} if store else {}
    held = store.get(list(keys.values()), part) if store else {}
    outcome: dict[int, np.ndarray | Reject] = {i: held[key] for i, key in keys.items() if key in held}
    missing = sorted(i for i in first.values() if i not in outcome)
    chunk.counts.update(reused=len(outcome), computed=len(missing), repeated=len(wanted) - len(first))
    if missing:
        batches = computed(chunk, missing, engine())
        for batch in keeping(batches, store, keys, part) if store else batches:
            outcome |= batch
    chunk.logps = [np.empty(0, np.float32)] * len(chunk.why)
    for i in wanted:
        found = outcome[first[rows[i]]]
        if isinstance(found, Reject):
            chunk.why[i] = found
        else:
            assert len(found) == len(chunk.responses[i])
            chunk.logps[i] = found
    reject_partners(chunk)
    tokens = sum(len(chunk.prompts[i]) + len(chunk.responses[i]) for i in missing)
    rate = tokens / max(1e-9, time.perf_counter() - start)
    log.info("%s: %d rows scored, %d reused, %.0f tokens/s", part, len(missing), len(held), rate)
    return chunk


def computed(chunk: Chunk, rows: list[int], engine: engines.Engine) -> Iterator[dict[int, np.ndarray | Reject]]:
    """Log-probs of some rows, batch by batch, or why there are none; `UserError` when the engine fails throughout."""
    prompts, responses = [chunk.prompts[i] for i in rows], [chunk.responses[i] for i in rows]
    failures = 0
    for batch in engine.cut(prompts, responses):
        found = isolated(engine, [prompts[k] for k in batch], [responses[k] for k in batch])
        for one in found:
            failed = isinstance(one, Reject) and one.reason == "engine_failed"
            failures = failures + 1 if failed else 0
            if failures == HOPELESS:
                assert isinstance(one, Reject)
                raise UserError(
                    f"the engine failed on {failures} rows one after the other, the last time with: {one.detail}; "
                    "see to it and run again: what was scored is in the store"
                )
        yield {rows[k]: one for k, one in zip(batch, found, strict=True)}


def keeping(
    batches: Iterator[dict[int, np.ndarray | Reject]], store: Store | Pieces, keys: dict[int, bytes], part: str
) -> Iterator[dict[int, np.ndarray | Reject]]:
    """Batches as they come, put into the store as often as it likes to be asked, and when there are no more."""
    waiting: dict[bytes, np.ndarray] = {}
    last = time.monotonic()
    try:
        for batch in batches:
            waiting |= {keys[i]: one for i, one in batch.items() if not isinstance(one, Reject)}
            if (now := time.monotonic()) - last >= store.every:
                store.put(waiting, part)
                waiting, last = {}, now
            yield batch
    finally:
        if waiting:
            store.put(waiting, part)


def isolated(engine: engines.Engine, prompts: list[list[int]], responses: list[list[int]]) -> list[np.ndarray | Reject]:
    """Log-probs of rows; where the engine fails on them together, halves are tried, down to the row to blame."""
    try:
        return [_finite(logps) for logps in engine.score(prompts, responses)]
    except UserError:
        raise
    except Exception as error:
        said = f"{type(error).__name__}: {str(error)[:300]}"
        if len(prompts) == 1:
            log.warning("the engine fails on a row of %d tokens: %s", len(prompts[0]) + len(responses[0]), said)
            return [Reject("engine_failed", said)]
        log.warning("the engine fails on a batch of %d rows, which is tried in halves: %s", len(prompts), said)
    half = len(prompts) // 2
    return isolated(engine, prompts[:half], responses[:half]) + isolated(engine, prompts[half:], responses[half:])


def _finite(logps: Any) -> np.ndarray | Reject:
    if isinstance(logps, Reject):
        return logps
    bad = np.flatnonzero(~np.isfinite(logps))
    return Reject("invalid_logprob", f"log-prob {logps[bad[0]]} of token {bad[0] + 1}") if len(bad) else logps


# --- parity --------------------------------------------------------------------------------------


class Parity(beam.DoFn):
    """Files → the report of `parity.check` on a sample of their rows, or None when it is switched off."""

    def __init__(self, loader: Loader, network: partial, renderer: Render, kept: Kept, asked: "Asked"):
        self.loader, self.network, self.renderer, self.kept, self.asked = loader, network, renderer, kept, asked

    def process(self, files: list[str]) -> Iterable[dict[str, Any] | None]:
        if not self.asked.rows:
            yield None
            return
        prompts, responses = self._sample(files)
        store, kept_as = self.kept.open(), b""
        if store:
            kept_as = store.key(
                [len(r) for r in responses], [t for p, r in zip(prompts, responses, strict=True) for t in p + r]
            )
        report = store.report(kept_as) if store else None
        if not responses or (report and report["of"] == self.asked.of and report["mean"] <= self.asked.tolerance):
            yield report and {**report, "tolerance": self.asked.tolerance}
            return
        report = parity.check(
            self.network, self.loader, prompts, responses, self.asked.tolerance, f"engine {self.asked.of}"
        )
        if store:
            store.keep_report(kept_as, {**report, "of": self.asked.of})
        yield {**report, "of": self.asked.of}

    def _sample(self, files: list[str]) -> tuple[list[list[int]], list[list[int]]]:
        """Token ids of rows from places all over the dataset; those that are rejected are left out."""
        self.renderer.setup()
        prompts, responses = [], []
        for address in sampled(files, self.asked.rows):
            chunk = self.renderer.chunk(address, read(address, FEEDBACK))
            for prompt, response, why in zip(chunk.prompts, chunk.responses, chunk.why, strict=True):
                if why is None:
                    prompts.append(prompt)
                    responses.append(response)
        return prompts[: self.asked.rows], responses[: self.asked.rows]


@dataclasses.dataclass(frozen=True)
class Asked:
    """How parity is checked: rows (0: not at all), the largest mean |Δ| in nats per token, and of what."""

    rows: int
    tolerance: float
    of: str  # the engine and its version


def sampled(files: list[str], rows: int) -> list[Address]:
    """About `rows` rows: a few at each of some places that lie evenly over files and their rows."""
    found = []
    places = min(SAMPLE_PLACES, rows)
    each = -(-rows // places)
    for k in range(places):
        at = k / places * len(files)
        path = files[int(at)]
        with io.open_parquet(path) as file:
            sizes = [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
        start = int(at % 1 * sum(sizes))
        group = next(g for g in range(len(sizes)) if start < sum(sizes[: g + 1]))
        start -= sum(sizes[:group])
        found.append(Address((int(at), group, k), path, group, start, min(start + each, sizes[group]), start + 1))
    return _apart(found)


def _apart(found: list[Address]) -> list[Address]:
    """No row twice: in a small dataset, places overlap."""
    kept: list[Address] = []
    for one in found:
        last = kept[-1] if kept and (kept[-1].path, kept[-1].group) == (one.path, one.group) else None
        start = max(one.start, last.stop) if last else one.start
        if start < one.stop:
            kept.append(dataclasses.replace(one, start=start, first=start + 1))
    return kept


# --- writing -------------------------------------------------------------------------------------


def write(chunk: Chunk, *, stage: str, facts: dict[str, Any]) -> dataset.Result:
    """Write a chunk's part files and report what became of its rows."""
    # a worker that was thought lost may write a chunk again, with other rounding: each has names of its own
    name = f"{dataset.part_name(chunk.address.index)}-{uuid.uuid4().hex[:8]}"
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
    report["scoring"] = chunk.counts
    for what, n in chunk.counts.items():
        Metrics.counter("una", what).inc(n)
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
    check: Parity,
    manifest: Manifest,
    stage: str,
    output: str,
    hints: dict[str, str] | None = None,
) -> Any:
    """Parity; then addresses → one chain of render, score and write, on machines with what `hints` say → one commit."""
    facts = {"stage": "reference", "policies": manifest.policies, "reference": manifest.reference}
    asked = hints or {}
    chunk = dataset.chunk_rows(CHUNK_ROWS, manifest.inputs)
    checked = pipeline | "sample" >> beam.Create([files]) | "parity" >> beam.ParDo(check).with_resource_hints(**asked)
    chain = (
        "render" >> beam.ParDo(renderer)
        | "score" >> RunInference(scorer)
        | "write" >> beam.Map(write, stage=stage, facts=facts)
    )
    results = (
        pipeline
        | "files" >> beam.Create(list(enumerate(files)))
        # waits until the check has passed
        | "addresses" >> beam.FlatMap(lambda item, _: addresses(item, chunk), beam.pvalue.AsSingleton(checked))
        | "spread" >> beam.Reshuffle()
        | "scoring" >> chain.with_resource_hints(**asked)
        | "count" >> beam.Map(count)
    )
    return once(pipeline, commit, results, checked, manifest=manifest, stage=stage, output=output)


def commit(results: list[dataset.Result], checked: list[Any], *, manifest: Manifest, stage: str, output: str) -> None:
    """Commit the stage, with what became of rows in scoring and what parity said in the manifest's statistics."""
    counts: Counter[str] = sum((r["scoring"] for r in results), Counter())
    names = ("computed", "reused", "repeated")
    statistics = {**manifest.statistics, "scoring": {n: counts[n] for n in names}, "parity": checked[0]}
    manifest.statistics = statistics
    dataset.commit_all(results, manifest=manifest, stage=stage, output=output)


# --- command -------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `una reference`."""
    parser.add_argument("directory", metavar="DIR", help="a dataset directory made by `una ingest`")
    parser.add_argument("--model", required=True, help="the reference model: a directory, a hub id, s3:// or gs://")
    parser.add_argument("--output", required=True, metavar="DIR", help="the dataset directory to write")
    parser.add_argument("--engine", choices=tuple(engines.ENGINES), default="transformers")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--adapter", metavar="DIR", help="a LoRA adapter that is part of the reference")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="cuda: fail without a GPU")
    parser.add_argument(
        "--batch-tokens",
        type=int,
        metavar="N",
        help="tokens in one batch (8192 on GPUs, 1024 on CPUs; vllm: what fits)",
    )
    parser.add_argument(
        "--max-length", type=int, metavar="N", help="reject rows of more tokens (default: 2048, or the model's limit)"
    )
    parser.add_argument("--quantization", metavar="METHOD", help="vllm: quantize the weights, such as fp8")
    for name, what in (("tensor", "split every layer over N GPUs"), ("pipeline", "split the layers over N GPUs")):
        parser.add_argument(f"--{name}-parallel", type=int, default=1, metavar="N", help=f"vllm: {what}")
    parser.add_argument("--data-parallel", type=int, default=1, metavar="N", help="N engines, each on GPUs of its own")
    parser.add_argument("--server", metavar="URL", help="server: its address, such as http://localhost:8000/v1")
    parser.add_argument("--server-model", metavar="NAME", help="server: the name it serves the model under (--model)")
    parser.add_argument("--server-key-env", default="OPENAI_API_KEY", metavar="NAME", help="where the key is, if any")
    parser.add_argument("--concurrency", type=int, default=16, metavar="N", help="server: requests at a time (16)")
    parser.add_argument(
        "--store",
        metavar="DIR",
        help="where log-probs are kept, s3:// and gs:// too (default: .NAME.store beside the output)",
    )
    parser.add_argument("--no-store", action="store_true", help="keep no log-probs, and use none that were kept")
    parser.add_argument("--parity-rows", type=int, default=64, metavar="N", help="rows that parity is checked on (64)")
    parser.add_argument(
        "--parity-tolerance",
        type=float,
        metavar="NATS",
        help="of mean |Δ| per token (float32 .001, else .1, quantized .5)",
    )
    parser.add_argument("--no-parity", action="store_true", help="do not compare the engine with plain transformers")
    gpu.add_arguments(parser)
    parser.add_argument("--max-rejected", type=share, default=0.01, metavar="SHARE")
    parser.add_argument("--overwrite", action="store_true", help="replace what --output holds")


def command(args: argparse.Namespace) -> dict[str, Any]:
    """`una reference`: returns the summary that `--json` prints."""
    before = dataset.read_manifest(args.directory)
    if before.reference:
        raise UserError(f"{args.directory}: already scored; give the directory that `una ingest` wrote")
    _check(args)
    files = dataset.data_files(args.directory, before)
    hints = gpu.hints(args)
    args.beam = [*args.beam, *gpu.flags(args)]
    output = args.output.rstrip("/")
    store = store_of(args, output)
    check_flags(args.beam, args.directory, output, *([store] if store else []))
    model = str(models.local(args.model))
    how = engines.options(args.engine, vars(args))
    mark = fingerprint(
        model,
        dtype=args.dtype,
        engine=args.engine,
        engine_version=engines.version(args.engine),
        adapter=args.adapter,
        quantization=args.quantization,
    )
    longest = max_length(model, args.max_length, args.engine)
    vocabulary = check_vocabulary(model)
    dataset.refuse(output, [args.directory, model])
    one_disk = shares_disk(args.beam) and not io.is_remote(store or "")
    kept = Kept(store, json.dumps(space_of(mark), sort_keys=True), uuid.uuid4().hex, one_disk)
    stage = dataset.prepare(output, args.overwrite)
    tell_others(kept)
    manifest = before.next(
        "reference",
        policies={**before.policies, "max_length": longest},
        reference={"model": args.model, **mark},
    )
    theirs = model if shares_disk(args.beam) else args.model  # workers elsewhere fetch their own
    load = partial(
        engines.load, args.engine, theirs, dtype=args.dtype, batch_tokens=args.batch_tokens, max_length=longest, **how
    )
    loader = Loader(load, across_processes(args.beam))
    renderer, scorer = Render(theirs, longest, vocabulary), Scorer(loader, kept)
    limit = args.parity_tolerance
    limit = parity.tolerance(args.dtype, args.quantization) if limit is None else limit
    asked = Asked(0 if args.no_parity else args.parity_rows, limit, mark["engine_version"])
    plain = partial(engines.plain, theirs, args.adapter)
    check = Parity(loader, plain, renderer, kept, asked)
    report = run_stage(
        lambda p: build(p, files, renderer, scorer, check, manifest, stage, output, hints),
        args.beam,
        stage,
        output,
        args.max_rejected,
    )
    if "template" not in report:
        tell(report)
    return report


def _check(args: argparse.Namespace) -> None:
    """`UsageError` for options that no engine can run with."""
    for name in ("batch_tokens", "tensor_parallel", "pipeline_parallel", "data_parallel", "parity_rows", "concurrency"):
        if (value := getattr(args, name)) is not None and value < 1:
            other = "; --no-parity switches parity off" if name == "parity_rows" else ""
            raise UsageError(f"--{name.replace('_', '-')} {value}: must be positive{other}")
    if args.parity_tolerance is not None and not 0 <= args.parity_tolerance < np.inf:
        raise UsageError(f"--parity-tolerance {args.parity_tolerance:g}: must be a number of nats, such as 0.05")
    if args.store and args.no_store:
        raise UsageError("--no-store: goes against --store; give one of them")


def check_vocabulary(model: str) -> int:
    """How many token ids the model has; `UserError` when its tokenizer renders what it does not know."""
    renderer = render.load(model)  # a template that cannot work fails here, before any worker starts
    known, size = _text_config(model).vocab_size, len(renderer.tokenizer)
    prompt, response = renderer.ids([{"role": "user", "content": "a question"}], "an answer")
    if (worst := max(*prompt, *response)) >= known:
        raise UserError(
            f"{model}: tokenizer and model do not match: a plain question has token id {worst}, and the model knows "
            f"ids below {known}; give the tokenizer that the model was trained with"
        )
    if size > known:
        log.warning("%s: the tokenizer has %d ids and the model %d; rows with others are rejected", model, size, known)
    elif size < 0.9 * known:
        log.warning("%s: the tokenizer has %d ids and the model %d; are they of one model?", model, size, known)
    return known


def store_of(args: argparse.Namespace, output: str) -> str | None:
    """The directory of the store, None without one; `UsageError` where there can be none."""
    if args.no_store:
        return None
    store = (args.store or dataset.staging(output).removesuffix(".incomplete") + ".store").rstrip("/")
    if store.startswith("hf://") or any(c in store for c in "*?["):
        raise UsageError(f"--store {store}: must be a directory, here or in a bucket (s3://, gs://)")
    return store if io.is_remote(store) else os.path.abspath(store)


def tell_others(kept: Kept) -> None:
    """Say when the store holds log-probs of other references: none of them is used."""
    if not (store := kept.open()):
        return
    here = json.loads(kept.facts)
    for facts, n in store.others():
        differing = sorted(name for name in {*facts, *here} if facts.get(name) != here.get(name))
        log.info("%s: %d log-probs of another reference (%s differ) are not used", store.path, n, ", ".join(differing))


def tell(report: dict[str, Any]) -> None:
    """What became of the rows in scoring, and what parity said."""
    counts, checked = report["statistics"]["scoring"], report["statistics"]["parity"]
    print("scored: " + ", ".join(f"{name} {n}" for name, n in counts.items()))
    if checked:
        print(
            f"parity on {checked['rows']} rows: |Δ| mean {checked['mean']:g}, max {checked['max']:g} nats per token "
            f"(tolerance {checked['tolerance']:g}), per response {checked['sequence_mean']:g} and "
            f"{checked['sequence_max']:g}"
        )


def _text_config(model: str) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(model).get_text_config()
    except Exception as error:
        raise UserError(f"{model}: config.json cannot be read ({error})") from None


def max_length(model: str, asked: int | None, engine: str) -> int:
    """The longest row in tokens: what was asked for, or 2048, within the model's context. vLLM needs one token more."""
    context = getattr(_text_config(model), "max_position_embeddings", None) or asked or 2048
    context -= engine in ("vllm", "server")
    if asked is not None and not 2 <= asked <= context:
        raise UsageError(f"--max-length {asked}: must lie between 2 and {context}, the context of {model} ({engine})")
    return asked or min(2048, context)
