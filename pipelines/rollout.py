"""Sample responses to prompts: prompts in, a dataset of rows out that wait for their rewards.

The distinct prompts are written to scratch files of a few hundred each, whose addresses go through Beam: a worker reads
one, renders it, samples from its engine and writes rows. A prompt's samples depend on the seed and on the prompt alone,
so the number of workers changes nothing but the last digits of log-probs. The token ids that were sampled stay in the
row's metadata, and `una reference` scores those: what is trained on is what was sampled, not its text tokenised anew.
"""

import argparse
import dataclasses
import hashlib
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import apache_beam as beam
import pyarrow as pa
from apache_beam.ml.inference.base import ModelHandler, RunInference

from pipelines import dataset, engines, io, models, prompts, render
from pipelines.beam import across_processes, count, once, run_stage, shares_disk
from pipelines.beam import check as check_flags
from pipelines.engines import Sampled
from pipelines.labellers.rows import metadata_of
from pipelines.prompts import Prompt, Refused
from pipelines.reference import max_length
from schemas import feedback
from schemas.command import share
from schemas.errors import Reject, UsageError, UserError
from schemas.feedback import FEEDBACK, REJECTED, Row
from schemas.fingerprint import fingerprint
from schemas.manifest import Manifest

log = logging.getLogger(__name__)
MISSING_EOS = {
    "keep": "rows like the others",
    "penalize": "rows of type scalar with reward 0, labelled `rule:missing_eos`",
    "drop": "rejected",
}
PROMPTS = pa.schema([FEEDBACK.field("prompt"), pa.field("metadata", pa.string()), pa.field("place", pa.int64())])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked(engines.Decoding):
    """What is sampled of each prompt, and what becomes of it."""

    seed: int
    missing_eos: str
    longest: int  # prompt plus room for a response, in tokens
    source: str
    weights: str  # of the fingerprint, what tells them

    @property
    def facts(self) -> dict[str, Any]:
        """What a row says of how it was sampled."""
        return {"temperature": self.temperature, "top_p": self.top_p, "weights": self.weights}


@dataclasses.dataclass
class Chunk:
    """Prompts on their way; the lists run parallel."""

    number: int
    path: str  # what the prompts were read from
    prompts: list[Prompt]
    sampled: list[list[Sampled] | Reject]


# --- workers -------------------------------------------------------------------------------------


class Sample(ModelHandler[tuple[int, str], Chunk, engines.Sampler]):
    """RunInference's handler: the address of a scratch file → its prompts with their samples."""

    def __init__(self, load: partial, model: str, asked: Asked, source: str, across: bool):
        super().__init__(min_batch_size=1, max_batch_size=1)
        self._load, self._model, self._asked, self._path, self._across = load, model, asked, source, across
        self._renderer: render.Renderer | None = None

    def load_model(self) -> engines.Sampler:
        return self._load()

    def run_inference(
        self, batch: Sequence[tuple[int, str]], model: engines.Sampler, inference_args: Any = None
    ) -> list[Chunk]:
        self._renderer = self._renderer or render.load(models.local(self._model))
        return [
            sampled(Chunk(number, self._path, _read(path), []), self._renderer, model, self._asked)
            for number, path in batch
        ]

    def get_num_bytes(self, batch: Sequence[tuple[int, str]]) -> int:
        return 64 * len(batch)

    def get_metrics_namespace(self) -> str:
        return "una_rollout"

    def share_model_across_processes(self) -> bool:
        return self._across


def sampled(chunk: Chunk, renderer: render.Renderer, sampler: engines.Sampler, asked: Asked) -> Chunk:
    """Fill in the samples of every prompt, or why there are none."""
    ids: list[list[int]] = []
    chunk.sampled = []
    for prompt in chunk.prompts:
        try:
            rendered = renderer.prompt_ids(prompt.messages)
            if (n := len(rendered) + asked.max_new_tokens) > asked.longest:
                raise Reject("too_long", f"{n} tokens with room for a response, and the limit is {asked.longest}")
            ids.append(rendered)
            chunk.sampled.append([])
        except Reject as why:
            ids.append([])
            chunk.sampled.append(why)
    wanted = [i for i, one in enumerate(chunk.sampled) if not isinstance(one, Reject)]
    seeds = [seed_of(asked.seed, chunk.prompts[i].id) for i in wanted]
    found = sampler.sample([ids[i] for i in wanted], asked, seeds)
    for i, of in zip(wanted, found, strict=True):
        chunk.sampled[i] = of
    log.info("sampled %d responses to prompts from %d", asked.n * len(wanted), chunk.prompts[0].place)
    return chunk


def seed_of(seed: int, prompt_id: str) -> int:
    """What a prompt's samples depend on."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {prompt_id}".encode(), digest_size=4).digest())


def write(chunk: Chunk, *, model: str, asked: Asked, stage: str, facts: dict[str, Any]) -> dataset.Result:
    """Write a chunk's rows and what was left out, and report."""
    renderer = render.load(models.local(model))
    name = dataset.part_name([1, chunk.number])
    report = dataset.result([1, chunk.number])
    rows: list[Row] = []
    refused: list[dict[str, Any]] = []
    for prompt, of in zip(chunk.prompts, chunk.sampled, strict=True):
        made, left_out = rows_of(prompt, of, renderer, asked) if not isinstance(of, Reject) else ([], [(None, of)])
        whole = [(None, left_out[0][1])] if not made else left_out  # a prompt without any row is rejected itself
        refused += [_refused(chunk.path, prompt.place, why, _payload(prompt), part) for part, why in whole]
        report["accepted"] += bool(made)
        report["rejected"].update([whole[0][1].reason] if not made else [])
        report["rejected_parts"].update(why.reason for _, why in whole if made)
        rows += made
    data = io.PartWriter(f"{stage}/parts/{name}.data.parquet", FEEDBACK, facts)
    rejects = io.PartWriter(f"{stage}/parts/{name}.rejected.parquet", REJECTED)
    if rows:
        table = feedback.table(rows)
        feedback.check(table)
        data.write(table)
        report["rows"].update(row["type"] for row in rows)
    if refused:
        rejects.write(pa.Table.from_pylist(refused, schema=REJECTED))
    report["inputs"] = len(chunk.prompts)
    report["data"], report["rejects"] = data.close(), rejects.close()
    return report


def rows_of(
    prompt: Prompt, found: list[Sampled], renderer: render.Renderer, asked: Asked
) -> tuple[list[Row], list[tuple[str | None, Reject]]]:
    """A prompt's rows, equal samples once, and its samples that became none."""
    times = Counter(tuple(one.ids) for one in found)
    texts: set[str] = set()
    rows: list[Row] = []
    left_out: list[tuple[str | None, Reject]] = []
    for i, one in enumerate(found):
        copies = times.pop(tuple(one.ids), 0)
        text = renderer.words(one.ids)
        try:
            if not copies or text in texts:
                continue
            if not one.finished and asked.missing_eos == "drop":
                raise Reject("unfinished", f"no end of turn within {asked.max_new_tokens} tokens")
            told = {"ids": one.ids, "logp": float(one.logps.astype(float).sum()), "finished": one.finished}
            metadata = {**prompt.metadata, "sampled": told | asked.facts | ({"times": copies} if copies > 1 else {})}
            if one.finished or asked.missing_eos != "penalize":
                rows += feedback.unlabelled(prompt.messages, text, source=asked.source, metadata=metadata)
            else:
                labeller = "rule:missing_eos"
                rows += feedback.score(
                    prompt.messages, text, 0.0, source=asked.source, labeller=labeller, metadata=metadata
                )
            texts.add(text)
        except Reject as why:
            left_out.append((f"sample {i + 1}", why))
    return rows, left_out


def _payload(prompt: Prompt) -> bytes:
    return feedback.metadata_text({"prompt": prompt.messages, **prompt.metadata}).encode()


def _refused(path: str, place: int, why: Reject, payload: bytes, part: str | None = None) -> dict[str, Any]:
    return {
        "reason": why.reason,
        "detail": why.detail.encode("utf-8", "backslashreplace").decode()[: dataset.DETAIL],
        "source_file": io.name(path),
        "position": place,
        "part": part,
        "payload": payload,
    }


# --- the launcher --------------------------------------------------------------------------------


def spread(path: str, stage: str, size: int) -> tuple[list[tuple[int, str]], dataset.Result]:
    """Write the distinct prompts to scratch files of `size`, and those that are none as rejected; their addresses."""
    report, refused = dataset.result([0]), list[dict[str, Any]]()
    addresses, waiting = list[tuple[int, str]](), list[Prompt]()

    def flush() -> None:
        where = f"{stage}/parts/prompts-{len(addresses):06d}.arrow"
        writer = io.ScratchWriter(where, PROMPTS)
        columns = ([p.messages for p in waiting], [feedback.metadata_text(p.metadata) for p in waiting])
        arrays = [pa.array(c, f.type) for c, f in zip((*columns, [p.place for p in waiting]), PROMPTS, strict=True)]
        writer.write(pa.Table.from_arrays(arrays, schema=PROMPTS))
        writer.close()
        addresses.append((len(addresses), where))
        waiting.clear()

    for one in prompts.read(path):
        if isinstance(one, Refused):
            refused.append(_refused(path, one.place, one.why, one.payload))
            continue
        waiting.append(one)
        if len(waiting) == size:
            flush()
    if waiting:
        flush()
    report["inputs"] = len(refused)
    report["rejected"].update(one["reason"] for one in refused)
    rejects = io.PartWriter(f"{stage}/parts/{dataset.part_name([0])}.rejected.parquet", REJECTED)
    if refused:
        rejects.write(pa.Table.from_pylist(refused, schema=REJECTED))
    report["rejects"] = rejects.close()
    return addresses, report


def _read(path: str) -> list[Prompt]:
    rows = io.read_scratch(path)
    return [
        Prompt(turns, metadata_of(metadata), feedback.prompt_id(turns), place)
        for turns, metadata, place in zip(*(rows[name].to_pylist() for name in rows.column_names), strict=True)
    ]


def build(
    pipeline: beam.Pipeline,
    addresses: list[tuple[int, str]],
    refused: dataset.Result,
    handler: Sample,
    model: str,
    asked: Asked,
    manifest: Manifest,
    stage: str,
    output: str,
) -> Any:
    """Addresses → one chain of sample and write → one commit."""
    facts = {"stage": "rollout", "policies": manifest.policies, "reference": None}
    results = (
        pipeline
        | "files" >> beam.Create(addresses)
        | "spread" >> beam.Reshuffle()
        | "sample" >> RunInference(handler)
        | "write" >> beam.Map(write, model=model, asked=asked, stage=stage, facts=facts)
        | "count" >> beam.Map(count)
    )
    return once(pipeline, commit, results, refused=refused, manifest=manifest, stage=stage, output=output)


def commit(
    results: list[dataset.Result], *, refused: dataset.Result, manifest: Manifest, stage: str, output: str
) -> None:
    dataset.commit([refused, *results], manifest, stage, output)


# --- command -------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `una rollout`."""
    parser.add_argument("prompts", metavar="PROMPTS", help="a file of prompts, or a dataset directory")
    parser.add_argument(
        "--model", required=True, help="what samples: a model's directory, here or in a store, or a hub id"
    )
    parser.add_argument("--adapter", metavar="DIR", help="a LoRA adapter to it")
    parser.add_argument("--output", required=True, metavar="DIR", help="the dataset directory to write")
    parser.add_argument("--samples", type=int, default=4, metavar="N", help="responses to each prompt (4)")
    parser.add_argument("--temperature", type=float, default=1.0, metavar="T", help="0: always the likeliest token (1)")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="sample among the likeliest tokens (1)")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="most tokens of a response (256)")
    parser.add_argument(
        "--max-length", type=int, metavar="N", help="most tokens with the prompt (2048, or the context)"
    )
    parser.add_argument(
        "--missing-eos",
        choices=tuple(MISSING_EOS),
        default="keep",
        help="; ".join(f"{name}: responses that were cut off are {what}" for name, what in MISSING_EOS.items()),
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--source", metavar="NAME", help="the rows' source (default: rollout-NAME of the prompts)")
    parser.add_argument("--engine", choices=tuple(engines.ENGINES), default="transformers")
    engines.add_server_arguments(parser)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--batch-tokens", type=int, default=65536, metavar="N", help="tokens in memory at once (65536)")
    parser.add_argument("--chunk-prompts", type=int, default=256, metavar="N", help="prompts of a unit of work (256)")
    parser.add_argument("--max-rejected", type=share, default=0.01, metavar="SHARE")
    parser.add_argument("--overwrite", action="store_true", help="replace what --output holds")


def command(args: argparse.Namespace) -> dict[str, Any]:
    """`una rollout`: returns the summary that `--json` prints."""
    for name, least in (("samples", 1), ("batch_tokens", 1), ("chunk_prompts", 1), ("seed", 0)):
        if getattr(args, name) < least:
            raise UsageError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least {least}")
    decoding = engines.Decoding(args.max_new_tokens, args.samples, args.temperature, args.top_p)
    how = engines.options(args.engine, {**engines.DEFAULTS, **vars(args)})
    model, adapter = str(models.local(args.model)), args.adapter and str(models.local(args.adapter))
    renderer = render.load(model)
    mark = fingerprint(
        model,
        dtype=args.dtype,
        engine=args.engine,
        engine_version=engines.version(args.engine),
        adapter=adapter,
    )
    longest = max_length(model, args.max_length, args.engine)
    output, source = args.output.rstrip("/"), args.source or f"rollout-{io.stem(args.prompts.rstrip('/'))}"
    check_flags(args.beam)
    dataset.refuse(output, [args.prompts, model])
    stage = dataset.prepare(output, args.overwrite)
    asked = Asked(
        **dataclasses.asdict(decoding),
        seed=args.seed,
        missing_eos=args.missing_eos,
        longest=longest,
        source=source,
        weights=mark["adapter" if adapter else "weights"][:16],
    )
    with dataset.staged(stage):
        addresses, refused = spread(args.prompts, stage, args.chunk_prompts)
        if not addresses:
            raise UserError(f"{args.prompts}: no prompt that could be used, of {refused['inputs']} records")
    names = ("temperature", "top_p", "max_new_tokens", "seed", "missing_eos", "longest")
    policies = {"samples": asked.n, **{name: getattr(asked, name) for name in names}}
    manifest = Manifest(
        stage="rollout",
        inputs=0,
        accepted=0,
        sources=_dataset_facts(args.prompts),
        policies={"rollout": policies | {"model": args.model, "adapter": args.adapter, "fingerprint": mark}},
    )
    if shares_disk(args.beam):  # workers elsewhere fetch their own
        how |= {"adapter": adapter}
    theirs = model if shares_disk(args.beam) else args.model
    load = partial(
        engines.load_sampler,
        args.engine,
        args.model if args.engine == "server" else theirs,
        dtype=args.dtype,
        batch_tokens=args.batch_tokens,
        max_length=longest,
        end_of_turn=renderer.end_of_turn,
        **how,
    )
    handler = Sample(load, theirs, asked, args.prompts, across_processes(args.beam))
    return run_stage(
        lambda p: build(p, addresses, refused, handler, theirs, asked, manifest, stage, output),
        args.beam,
        stage,
        output,
        args.max_rejected,
    )


def _dataset_facts(path: str) -> list[dict[str, Any]]:
    """The sources of the manifest: those of the dataset, or the files."""
    if prompts.is_dataset(path):
        return dataset.read_manifest(path).sources

    def of_files() -> Iterator[dict[str, Any]]:
        for file in io.expand([path]):
            facts = {"file": io.name(file), "bytes": io.size(file), "sha256": io.sha256(file)}
            yield facts | {"format": "prompts", "source": io.stem(file)}

    return list(of_files())
