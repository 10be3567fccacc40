"""The trainer: `command` prepares a run, `train` is the loop, read from top to bottom.

Only the policy is in memory: log π_ref is a column of the dataset. One step is AdamW on Σ weight · loss / groups, over
all groups of the step, so neither packing nor the number of processes changes it. The order of groups, the learning
rate and the seeds are functions of the step, so a checkpoint is weights, optimizer state, running offsets and a number.

Left out: DeepSpeed, and rollouts (`online`), whose loop takes the same `Learner.step`.
"""

import argparse
import dataclasses
import json
import logging
import math
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    FullyShardedDataParallelPlugin,
    gather_object,
    set_seed,
)
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm

from schemas.errors import UsageError, UserError
from schemas.fingerprint import Fingerprint, local_model
from schemas.manifest import Manifest
from una_train import config as settings
from una_train import data, evaluate, parity, policy, rundir, watch
from una_train.config import Config, RewardConfig
from una_train.data import Batch, Split
from una_train.evaluate import Judged
from una_train.objective import Objectives
from una_train.offsets import FROM_REFERENCE

log = logging.getLogger("una_train")

T = TypeVar("T")
C = TypeVar("C", bound=Config | RewardConfig)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dataset", metavar="DIR", help="published dataset with reference log-probs")
    parser.add_argument("--model", required=True, help="the model that was scored: its directory, or a hub id")
    settings.add_arguments(parser)


def command(args: argparse.Namespace) -> dict[str, Any]:
    """Train, and return the summary: policy, steps, loss, test, seconds."""
    if "://" in args.output:
        raise UsageError(f"--output {args.output}: training writes to a local directory; name one, and copy it there")
    output = Path(args.output)
    config = _settings(args, output)
    dataset, manifest = Path(args.dataset), Manifest.read(args.dataset)
    rundir.check(output, args.overwrite, args.resume, [dataset, Path(args.model)])
    accelerator = accelerator_of(config, output)
    accelerator.gradient_accumulation_steps = 1  # its environment variable would scale our gradients
    if not accelerator.is_main_process:
        log.setLevel(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()  # there is one of our own
    model_dir = _first(accelerator.is_main_process, accelerator, lambda: local_model(args.model))  # one download
    facts = rundir.facts_of(args.model, args.dataset, config, model_dir)
    checkpoint = rundir.newest_checkpoint(output) if args.resume else None
    if args.resume:
        rundir.check_same_run(output, facts)
        if checkpoint is None:
            log.warning("%s holds no checkpoint to continue from: starting at the first step", output)
    cache = _cache(accelerator, config, dataset, output)
    try:
        with rundir.locked(output) if accelerator.is_main_process else nullcontext():
            splits = {split: _read(accelerator, config, dataset, split, cache) for split in ("train", "test")}
            _check_dataset(dataset, manifest, splits, model_dir)
            result = train(accelerator, config, splits, model_dir, output, checkpoint, facts, manifest.reference or {})
        rundir.finish(accelerator)
        return result
    except KeyboardInterrupt:
        last = rundir.newest_checkpoint(output)
        saved = f"{last.name} is intact; continue with --resume" if last else "there was no checkpoint yet"
        raise UserError(f"interrupted; {saved}") from None
    finally:
        if cache is not None and accelerator.is_local_main_process:
            shutil.rmtree(cache, ignore_errors=True)


# --- a step ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """What one process does in one step: its micro-batches, and those of others that it runs along with weight 0."""

    number: int
    micros: list[tuple[Batch, float]]
    groups: int  # of all processes
    tokens: int  # of all processes, each row's prompt counted


@dataclass
class Learner:
    """The policy and its optimizer, which a step moves."""

    accelerator: Accelerator
    model: nn.Module  # a wrapped `policy.Scorer`
    optimizer: Any
    config: Config
    output: Path  # where checkpoints are, for what is said of bad steps
    sharded: bool = False
    skipped: int = 0  # steps
    bad_in_a_row: int = 0

    def step(
        self, step: Step, number: int, shape: float, objectives: Objectives, split: Split
    ) -> tuple[list[Judged], float]:
        """Forward, loss, backward, clipping and AdamW at `shape` of the peak rates; `number` seeds the dropout.

        Gives this process's groups as they were judged before the step, none of a step that was skipped because its
        loss or gradient is not finite, and the norm of the gradient.
        """
        accelerator, config, model, device = self.accelerator, self.config, self.model, self.accelerator.device
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = parameters["peak"] * shape
        seed = np.random.SeedSequence([config.seed, number, accelerator.process_index])
        torch.manual_seed(int(seed.generate_state(1)[0]))  # dropout
        model.train()
        outcomes = []
        with _memory_advice([batch for batch, _ in step.micros], config):
            for i, (batch, counts) in enumerate(step.micros):
                last_micro = i == len(step.micros) - 1
                with nullcontext() if last_micro or self.sharded else accelerator.no_sync(model):
                    batch = batch.to(device)
                    logps, values = model(batch)
                    outcome = objectives(logps, values, batch)
                    # wrappers average over processes
                    loss_of_micro = outcome.total() * (counts * accelerator.num_processes / step.groups)
                    if values is not None:  # so that every process has a gradient for the learned offset, if of 0
                        loss_of_micro = loss_of_micro + 0 * values.sum()
                    accelerator.backward(loss_of_micro)
                if counts:
                    outcomes.append(outcome)
        norm = _clip(model, config.max_grad_norm)
        judged = [one for outcome in outcomes for one in outcome.judged()]
        if _any(accelerator, not (math.isfinite(norm) and all(math.isfinite(one.loss) for one in judged))):
            self.bad_in_a_row += 1
            self.skipped += 1
            _report_bad(gather_object(judged), norm, number, self.bad_in_a_row, split, config, self.output)
            judged = []
        else:
            self.bad_in_a_row = 0
            self.optimizer.step()
            if objectives.running:
                objectives.update(gather_object(judged))
        self.optimizer.zero_grad()
        return judged, norm


# --- the loop ----------------------------------------------------------------------------------


def train(
    accelerator: Accelerator,
    config: Config,
    splits: dict[str, Split | None],
    model_dir: Path,
    output: Path,
    checkpoint: Path | None,
    facts: dict[str, Any],
    reference: Fingerprint,
) -> dict[str, Any]:
    world, main, device = accelerator.num_processes, accelerator.is_main_process, accelerator.device
    train_split, test_split = splits["train"], splits["test"]
    assert train_split is not None
    started = time.perf_counter()
    objectives = Objectives(config, *filter(None, (train_split, test_split)))

    # the policy, from the model or from the checkpoint
    set_seed(config.seed)
    scorer = policy.Scorer(policy.load(model_dir, config, checkpoint), objectives.learns)
    optimizer = policy.optimizer_of(scorer, config)
    model, optimizer = accelerator.prepare(scorer, optimizer)
    scorer = accelerator.unwrap_model(model)
    sharded = isinstance(model, FSDPModule)
    layout = policy.settle(scorer, config, device, sharded)
    done = 0
    if checkpoint is not None:
        state = rundir.checkpoint_facts(checkpoint)
        done, started = state["step"], started - state["seconds"]
        rundir.load_optimizer(scorer, optimizer.optimizer, checkpoint)
        objectives.load_state(state["offsets"])
        log.info("continuing after step %d, from %s", done, checkpoint)
    elif config.parity_check:  # a run that is continued has passed it
        parity.check(accelerator, model, layout, train_split, config, reference, facts["model_fingerprint"])
    accelerator.wait_for_everyone()
    if main:  # only now: a run that cannot start leaves an earlier one alone
        rundir.prepare(output, config, facts, checkpoint)
    accelerator.wait_for_everyone()

    order = data.Order(train_split, config.batch_size, config.seed)
    total = order.total(config.epochs, config.max_steps)
    facts |= {
        "steps": total,
        "processes": world,
        "parameters": sum(p.numel() for p in scorer.policy.parameters()),
        "trainable_parameters": sum(p.numel() for p in scorer.policy.parameters() if p.requires_grad),
        "layout": layout,
    }
    skipped = state["skipped_steps"] if checkpoint else 0
    learner = Learner(accelerator, model, optimizer, config, output, sharded, skipped)
    record = rundir.recorder(accelerator, config, output, done, watch.Watch(total, config))
    for words in watch.one_sided(train_split, config) if main else []:
        log.warning("%s", words)

    def test(step: int) -> list[Judged]:
        """Evaluate on the test split and record it; the judged groups are the same on every process."""
        if test_split is None:
            return []
        judged = judge_all(accelerator, model, objectives, test_split, layout, config)
        if bad := [one for one in judged if not math.isfinite(one.loss)]:
            log.warning("after step %d the test loss is not finite in rows %s", step, _ids(bad, test_split))
        record(step, order.epochs_done(step), "test", judged, dict.fromkeys(STEP_FACTS))
        return judged

    tested = test(0) if done == 0 else []
    recent: list[Judged] = []  # this rank's groups since the last line of metrics
    fed, busy, waited, loss = 0, 0.0, 0.0, math.nan
    bar = tqdm(total=total, initial=done, unit="step", disable=None if main else True)
    ahead = range(done + 1, total + 1)
    planned = planned_steps(accelerator, train_split, order, ahead, objectives, layout, sharded, config)
    for step, wait in planned:
        began = time.perf_counter()
        shape = learning_rate(step.number, total, config) / config.learning_rate
        judged, norm = learner.step(step, step.number, shape, objectives, train_split)
        bar.update()
        busy, waited, fed = busy + time.perf_counter() - began, waited + wait, fed + step.tokens

        recent += judged
        last = step.number == total
        saving = bool(config.save_every) and step.number % config.save_every == 0
        if last or saving or step.number % config.log_every == 0:
            everyone = gather_object(recent)
            if everyone:
                loss = evaluate.weighted_loss(everyone)
                numbers = (shape * config.learning_rate, norm, fed / (busy + waited), waited / (busy + waited))
                step_facts = dict(zip(STEP_FACTS, numbers, strict=True))
                record(step.number, order.epochs_done(step.number), "train", everyone, step_facts)
            bar.set_postfix(loss=f"{loss:.4f}")
            recent, fed, busy, waited = [], 0, 0.0, 0.0
        if last or (config.eval_every and step.number % config.eval_every == 0):
            tested = test(step.number)
        if saving:
            weights = rundir.gathered(scorer.policy.state_dict())
            state = rundir.gathered(rundir.optimizer_state(scorer, optimizer.optimizer))
            if main:
                beside = {
                    "seconds": time.perf_counter() - started,
                    "offsets": objectives.state(),
                    "skipped_steps": learner.skipped,
                }
                rundir.save_checkpoint(
                    output, step.number, scorer.policy, weights, state, beside, config.keep_checkpoints
                )
            accelerator.wait_for_everyone()
    bar.close()
    if done >= total:  # killed between its last checkpoint and its end: only the results are missing
        tested = judge_all(accelerator, model, objectives, test_split, layout, config) if test_split else []
        loss = rundir.last_loss(output)

    final = evaluate.by_type(tested) if test_split else None
    test_loss = evaluate.weighted_loss(tested) if test_split else None
    outcome_of_test = None if final is None else evaluate.finite({"loss": test_loss, "by_type": final})
    facts |= {"skipped_steps": learner.skipped, "seconds": time.perf_counter() - started}
    facts |= {"final": {"test": outcome_of_test}}
    weights = rundir.gathered(scorer.policy.state_dict())
    if main:
        if test_split is not None:
            rundir.write_predictions(output / "predictions.parquet", test_split, tested)
        policy.save(output / "policy", scorer.policy, weights, facts["model"], model_dir, config)
        rundir.write(output / "run.json", json.dumps(facts, indent=2) + "\n")  # last: now the run is complete
        _print_result(facts, loss, output)
    return {
        "policy": str(output / "policy"),
        "steps": facts["steps"],
        "loss": evaluate.finite(loss),
        "test": outcome_of_test,
        "seconds": round(facts["seconds"], 3),
    }


STEP_FACTS = ("lr", "grad_norm", "tokens_per_second", "data_wait")


def learning_rate(step: int, total: int, config: Config | RewardConfig) -> float:
    """Rate at `step` (from 1): linear warm-up to the peak, then the scheduler's shape; never 0."""
    warmup = round(config.warmup_ratio * total)
    if step <= warmup:
        return config.learning_rate * step / (warmup + 1)
    progress = (step - 1 - warmup) / (total - warmup)
    shape = {"cosine": (1 + math.cos(math.pi * progress)) / 2, "linear": 1 - progress, "constant": 1.0}
    return config.learning_rate * shape[config.scheduler]


def planned_steps(
    accelerator: Accelerator,
    split: Split,
    order: data.Order,
    steps: Iterable[int],
    objectives: Objectives,
    layout: str,
    sharded: bool,
    config: Config,
) -> Iterator[tuple[Step, float]]:
    """Steps, each packed in a thread while the one before it runs, and the seconds that were waited for them."""
    rank, world = accelerator.process_index, accelerator.num_processes
    pin = accelerator.device.type == "cuda"

    def plan(number: int) -> Step:
        bundles = order.bundles(number)
        micros = [
            data.micro_batches(split, part, config.micro_batch_tokens, layout, objectives.whole)
            for part in data.share(split, bundles, world)
        ]
        # every process takes part in the averaging of gradients, and with sharded weights in every forward pass
        count = max(map(len, micros)) if sharded else max(1, len(micros[rank]))
        along = next(part[0] for part in micros if part)
        weighted = [(m, 1.0) for m in micros[rank]] + [(along, 0.0)] * (count - len(micros[rank]))
        batches = [(data.collate(split, micro, layout), counts) for micro, counts in weighted]
        rows = [row for bundle in bundles for group in bundle for row in group]
        return Step(
            number,
            [(batch.pinned() if pin else batch, counts) for batch, counts in batches],
            sum(map(len, bundles)),
            int(split.lengths[rows].sum()),
        )

    with ThreadPoolExecutor(1) as worker:
        numbers = iter(steps)
        coming = [worker.submit(plan, number) for number in [next(numbers, None)] if number is not None]
        while coming:
            began = time.perf_counter()
            step = coming.pop().result()
            waited = time.perf_counter() - began
            coming = [worker.submit(plan, number) for number in [next(numbers, None)] if number is not None]
            yield step, waited


@torch.no_grad()
def judge_all(
    accelerator: Accelerator, model: nn.Module, objectives: Objectives, split: Split, layout: str, config: Config
) -> list[Judged]:
    """All groups of a split under the policy, in the order of their rows, on every process."""
    model.eval()
    shares = data.share(split, split.bundles(), accelerator.num_processes)
    micros = [data.micro_batches(split, part, config.micro_batch_tokens, layout, objectives.whole) for part in shares]
    mine, judged = micros[accelerator.process_index], list[Judged]()
    for i in range(max(map(len, micros))):  # every process as often: sharded weights are gathered by all
        batch = data.collate(split, mine[i] if i < len(mine) else micros[0][0], layout)
        with _memory_advice([batch], config):
            batch = batch.to(accelerator.device)
            logps, values = model(batch)
            outcome = objectives(logps, values, batch)
        judged += outcome.judged() if i < len(mine) else []
    return sorted(gather_object(judged), key=lambda one: one.rows)


def _clip(model: nn.Module, largest: float) -> float:
    """Clip gradients to a norm and return what it was before."""
    norm = torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], largest)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def _any(accelerator: Accelerator, here: bool) -> bool:
    """Whether it holds on any process."""
    flag = torch.tensor(float(here), device=accelerator.device)
    return bool(accelerator.reduce(flag, "sum").item())


def _report_bad(
    judged: list[Judged], norm: float, step: int, in_a_row: int, split: Split, config: Config, output: Path
) -> None:
    """Name the rows of a step that is skipped; `UserError` after `max_bad_steps` in a row."""
    bad = [one for one in judged if not math.isfinite(one.loss)]
    what = f"the loss is {bad[0].loss}" if bad else f"the gradient's norm is {norm}"
    where = f"at step {step}, in rows {_ids(bad or judged, split)}"
    if in_a_row < config.max_bad_steps:
        log.warning("%s %s; the step is skipped", what, where)
        return
    last = rundir.newest_checkpoint(output)
    raise UserError(
        f"{what} {where}, and {in_a_row} steps in a row were skipped for that; lower learning_rate or beta, or train "
        f"with dtype float32 ({f'{last.name} is intact' if last else 'there is no checkpoint yet'})"
    )


def _ids(judged: list[Judged], split: Split) -> str:
    rows = [row for one in judged for row in one.rows]
    if not split.files:  # sampled rows have no ids
        return f"{rows[:8]} of the round"
    names = split.columns(["id"], rows[:8])["id"].to_pylist()
    return ", ".join(names) + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")


@contextmanager
def _memory_advice(batches: list[Batch], config: Config) -> Iterator[None]:
    """Out of memory becomes a `UserError` that says which setting to lower, and to what."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        largest = max(batches, key=lambda batch: batch.tokens)
        if len(largest.groups) > 1:
            advice = f"set micro_batch_tokens={largest.tokens // 2}"
        elif not config.activation_checkpointing:
            advice = "it is one group, which no smaller micro-batch holds: set activation_checkpointing=true"
        else:
            advice = (
                f"it is one group, which no smaller micro-batch holds: score with --max-length {largest.tokens // 2}"
            )
        raise UserError(
            f"out of memory in a micro-batch of {largest.tokens} tokens (micro_batch_tokens is "
            f"{config.micro_batch_tokens}); {advice}. --resume goes on from the newest checkpoint"
        ) from error


def _print_result(facts: dict[str, Any], loss: float, output: Path) -> None:
    def shown(number: float | None) -> str:
        return "not finite" if number is None else f"{number:.4f}"

    print(f"trained {facts['steps']} steps in {facts['seconds']:.1f} s; last training loss {loss:.4f}")
    test = facts["final"]["test"]
    for kind, found in (test["by_type"] if test else {}).items():
        right = "" if found["accuracy"] is None else f", accuracy {found['accuracy']:.3f}"
        print(f"test {kind}: {found['count']} groups, loss {shown(found['loss'])}{right}")
    print(f"policy: {output / 'policy'}", flush=True)


# --- before training ---------------------------------------------------------------------------


def _first(first: bool, accelerator: Accelerator, call: Callable[[], T]) -> T:
    """The result of a call that some processes make before the others; all of them meet its `UserError`."""
    if not first:
        accelerator.wait_for_everyone()
        return call()
    try:
        return call()
    finally:
        accelerator.wait_for_everyone()


def _cache(accelerator: Accelerator, config: Config, dataset: Path, output: Path) -> Path | None:
    """Where this machine's processes map token files; None when tokens stay in memory."""
    on_disk = config.token_store == "disk" or (
        config.token_store == "auto" and data.larger_than_memory(dataset, accelerator.num_processes)
    )
    return output / f".tokens-{socket.gethostname()}" if on_disk else None


def _read(accelerator: Accelerator, config: Config, dataset: Path, split: str, cache: Path | None) -> Split | None:
    def read(write: bool) -> Split | None:
        return data.read(
            dataset,
            split,
            cache=cache,
            write=write,
            bundle_rows=config.bundle_rows,
            ref_rewards=any(offset in FROM_REFERENCE for offset in config.offset.values()),
        )

    if cache is None:
        return read(True)
    writes = accelerator.is_local_main_process
    return _first(writes, accelerator, lambda: read(writes))


def _settings(args: argparse.Namespace, output: Path) -> Config:
    config = settings.of_run(settings.load, args, output)
    required(config)
    return with_dtype(config)


def required(config: Config) -> None:
    """`UsageError` when a package that a setting needs is not installed."""
    if config.tracker != "none":
        policy.require(config.tracker, f"tracker={config.tracker}")
    if config.lora:
        policy.require("peft", "lora")
    if config.quantization != "none":
        policy.require("bitsandbytes", f"quantization={config.quantization}")


def with_dtype(config: C) -> C:
    """The settings with `dtype=auto` settled for this machine."""
    if config.dtype != "auto":
        return config
    on_gpu = torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "").lower() not in ("1", "true")
    bf16 = on_gpu and torch.cuda.is_bf16_supported()
    return dataclasses.replace(config, dtype="bfloat16" if bf16 else "float32")


def accelerator_of(config: Config, output: Path) -> Accelerator:
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # else several processes on CPUs would not know of each other
        mixed_precision="bf16" if config.dtype == "bfloat16" else "no",
        log_with=None if config.tracker == "none" else config.tracker,
        project_dir=output,
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
    )
    if (
        accelerator.distributed_type == DistributedType.MULTI_CPU
        and os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    ):
        # accelerate shards on accelerators only; its FSDP2 path is the same on CPUs
        accelerator.state._shared_state["distributed_type"] = DistributedType.FSDP
        accelerator.state._shared_state["fsdp_plugin"] = FullyShardedDataParallelPlugin()
    kind = accelerator.distributed_type
    if kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise UsageError(f"{kind.value} is not supported; FSDP2 shards weights and optimizer too (docs/training.md)")
    if kind == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise UsageError("FSDP version 1 is not supported; set fsdp_version: 2 in accelerate's configuration")
    if kind == DistributedType.FSDP and config.optimizer != "adamw":
        raise UsageError(f"optimizer={config.optimizer} does not step weights that FSDP shards; use optimizer=adamw")
    if kind == DistributedType.FSDP and config.quantization == "int8":
        raise UsageError("quantization=int8 does not go with FSDP; use quantization=nf4, or DDP")
    return accelerator


def _check_dataset(dataset: Path, manifest: Manifest, splits: dict[str, Split | None], model_dir: Path) -> None:
    for split in filter(None, splits.values()):
        of_name = {file["path"]: file for file in manifest.files}
        for path in split.files:
            listed = of_name.get(f"data/{path.name}")
            if listed and listed["bytes"] != path.stat().st_size:
                raise UserError(f"{path}: is not the file of {listed['bytes']:,} bytes in the manifest; copy it anew")
    if splits["train"] is None or not len(splits["train"].rewards):
        found = sorted({path.name.partition("-")[0] for path in (dataset / "data").glob("*-*.parquet")})
        raise UserError(f"{dataset}: no rows of split train in data/ (splits: {', '.join(found) or 'none'})")
    if splits["test"] is not None and not len(splits["test"].rewards):
        splits["test"] = None
    try:
        text = transformers.AutoConfig.from_pretrained(model_dir).get_text_config()
    except Exception as error:
        raise UserError(f"{model_dir}: config.json cannot be read ({str(error).splitlines()[0][:300]})") from None
    vocabulary = getattr(text, "vocab_size", math.inf)
    for split in filter(None, splits.values()):
        for name, ids in (("prompt_ids", split.prompts.values), ("response_ids", split.responses.values)):
            if wrong := next((int(i) for i in (ids.min(), ids.max()) if not 0 <= i < vocabulary), None):
                raise UserError(
                    f"{dataset}: {name} holds token {wrong}, and {model_dir} has {vocabulary}; "
                    "give the model that `una reference` scored"
                )
