"""The trainer: `command` prepares a run, `train` is the loop, read from top to bottom.

Only the policy is in memory: log π_ref is a column of the dataset. One step is AdamW on
Σ type weight · loss / groups, over all groups of the step, so neither packing nor the number of processes
changes it. The order of groups, the learning rate and the seeds are functions of the step, so a checkpoint is the
weights, the optimizer and a number.

Left out: sharded training (FSDP, DeepSpeed), streaming, and rollouts.

Shapes: B rows of a micro-batch, G groups of a micro-batch.
"""

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import json
import logging
import math
import os
import re
import shutil
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, gather_object, set_seed
from torch import Tensor, nn
from tqdm.auto import tqdm

from schemas.errors import UsageError, UserError
from schemas.fingerprint import TEMPLATE_FILE, TOKENIZER_FILES, Fingerprint, local_model
from schemas.manifest import Manifest
from una_train import config as settings
from una_train import data, evaluate, parity, rundir
from una_train.config import Config
from una_train.evaluate import Judged
from una_train.logps import response_logps, row_sums
from una_train.losses import LOSSES

log = logging.getLogger("una_train")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dataset", metavar="DIR", help="published dataset with reference log-probs")
    parser.add_argument("--model", required=True, help="the model that was scored: its directory, or a hub id")
    parser.add_argument("--output", required=True, metavar="DIR", help="run directory to write")
    parser.add_argument("--config", metavar="FILE", help="YAML file of settings")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="one setting, such as beta=0.1; repeatable"
    )
    parser.add_argument("--overwrite", action="store_true", help="remove an earlier run's files from the output first")
    parser.add_argument("--resume", action="store_true", help="continue from the newest checkpoint in the output")


def command(args: argparse.Namespace) -> dict[str, Any]:
    """Train, and return the summary: policy, steps, loss, test, seconds."""
    output = Path(args.output)
    config = _settings(args, output)
    dataset, manifest = Path(args.dataset), Manifest.read(args.dataset)
    rundir.check(output, args.overwrite, args.resume, [dataset, Path(args.model)])
    accelerator = _accelerator(config, output)
    accelerator.gradient_accumulation_steps = 1  # its environment variable would scale our gradients
    if not accelerator.is_main_process:
        log.setLevel(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()  # there is one of our own
    with accelerator.main_process_first():  # one download
        model_dir = local_model(args.model)
    splits = {split: data.read(dataset, split) for split in ("train", "test")}
    _check_dataset(dataset, splits, model_dir)
    facts = rundir.facts_of(args.model, args.dataset, config, model_dir)
    checkpoint = rundir.newest_checkpoint(output) if args.resume else None
    if args.resume:
        rundir.check_same_run(output, facts)
    try:
        return train(accelerator, config, splits, model_dir, output, checkpoint, facts, manifest.reference or {})
    except KeyboardInterrupt:
        last = rundir.newest_checkpoint(output)
        saved = f"{last.name} is intact; continue with --resume" if last else "there was no checkpoint yet"
        raise UserError(f"interrupted; {saved}") from None


# --- the loop ----------------------------------------------------------------------------------


def train(
    accelerator: Accelerator,
    config: Config,
    splits: dict[str, data.Split | None],
    model_dir: Path,
    output: Path,
    checkpoint: Path | None,
    facts: dict[str, Any],
    reference: Fingerprint,
) -> dict[str, Any]:
    rank, world, main = accelerator.process_index, accelerator.num_processes, accelerator.is_main_process
    train_split, test_split = splits["train"], splits["test"]
    assert train_split is not None
    started = time.perf_counter()

    # the policy, from the model or from the checkpoint
    set_seed(config.seed)
    policy = load_policy(model_dir, config, checkpoint)
    optimizer = _optimizer(policy, config)
    model, optimizer = accelerator.prepare(policy, optimizer)
    policy = accelerator.unwrap_model(model)
    head = policy.get_output_embeddings()
    done = 0
    if checkpoint is not None:
        state = json.loads((checkpoint / "checkpoint.json").read_text())
        done, started = state["step"], started - state["seconds"]
        optimizer.load_state_dict(torch.load(checkpoint / "optimizer.pt", map_location="cpu", weights_only=True))
        log.info("continuing after step %d, from %s", done, checkpoint)
    elif config.parity_check:  # a run that is continued has passed it
        parity.check(accelerator, policy, head, train_split, config, reference, facts["model_fingerprint"])
    accelerator.wait_for_everyone()
    if main:  # only now: a run that cannot start leaves an earlier one alone
        rundir.prepare(output, config, facts, checkpoint)
    accelerator.wait_for_everyone()

    per_epoch = data.steps_per_epoch(len(train_split.groups), config.batch_size)
    total = config.epochs * per_epoch
    if config.max_steps is not None:
        total = min(total, config.max_steps)
    facts |= {
        "steps": total,
        "processes": world,
        "parameters": sum(p.numel() for p in policy.parameters()),
        "trainable_parameters": sum(p.numel() for p in policy.parameters() if p.requires_grad),
    }
    record = rundir.recorder(accelerator, config, output, done)

    def test(step: int) -> list[Judged]:
        """Evaluate on the test split and record it; the judged groups are the same on every process."""
        if test_split is None:
            return []
        judged = judge_all(accelerator, policy, head, test_split, config)
        _require_finite(judged, test_split, f"on the test split after step {step}")
        record(step, step / per_epoch, "test", judged, dict.fromkeys(("lr", "grad_norm", "tokens_per_second")))
        return judged

    tested = test(0) if done == 0 else []
    recent: list[Judged] = []  # this rank's groups since the last line of metrics
    tokens, busy, loss = 0, 0.0, math.nan
    bar = tqdm(total=total, initial=done, unit="step", disable=None if main else True)
    for step in range(done + 1, total + 1):
        began = time.perf_counter()
        groups = data.step_groups(train_split.groups, config.batch_size, config.seed, step)
        mine = data.share(groups, train_split.lengths, rank, world)
        # DDP averages gradients over ranks; a rank with no group takes part in that with weight 0
        scale = world / len(groups) if mine else 0.0
        micros = data.micro_batches(mine or groups[:1], train_split.lengths, config.micro_batch_tokens)
        lr = learning_rate(step, total, config)
        for parameters in optimizer.param_groups:
            parameters["lr"] = lr
        torch.manual_seed(int(np.random.SeedSequence([config.seed, step, rank]).generate_state(1)[0]))  # dropout
        model.train()
        results = []
        for i, micro in enumerate(micros):
            with accelerator.no_sync(model) if i < len(micros) - 1 else nullcontext():
                batch = data.collate(train_split, micro).to(accelerator.device)
                logratios, losses = group_losses(model, head, batch, config)
                weights = losses.new_tensor([config.type_weights[kind] for kind in batch.types])
                accelerator.backward(scale * (weights * losses).sum())
            results.append((micro, batch, logratios.detach(), losses.detach()))
        norm = accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        judged = [one for result in results for one in _judged(*result)] if mine else []
        if _any(accelerator, not (math.isfinite(norm) and all(math.isfinite(j.loss) for j in judged))):
            everyone = gather_object(judged)
            _require_finite(everyone, train_split, f"at step {step}")
            raise UserError(
                f"the gradient is {float(norm)} at step {step}, in rows {_ids(everyone, train_split)}; "
                "lower learning_rate or beta, or train with dtype float32"
            )
        optimizer.step()
        optimizer.zero_grad()
        bar.update()
        busy += time.perf_counter() - began

        recent += judged
        tokens += int(sum(train_split.lengths[row] for group in groups for row in group))
        last = step == total
        saving = bool(config.save_every) and step % config.save_every == 0
        if last or saving or step % config.log_every == 0:
            everyone = gather_object(recent)
            loss = evaluate.weighted_loss(everyone, config.type_weights)
            facts_of_step = {"lr": lr, "grad_norm": float(norm), "tokens_per_second": tokens / busy}
            record(step, step / per_epoch, "train", everyone, facts_of_step)
            bar.set_postfix(loss=f"{loss:.4f}")
            recent, tokens, busy = [], 0, 0.0
        if last or (config.eval_every and step % config.eval_every == 0):
            tested = test(step)
        if saving and main:
            rundir.save_checkpoint(
                output, step, policy, optimizer, time.perf_counter() - started, config.keep_checkpoints
            )
        if saving:
            accelerator.wait_for_everyone()
    bar.close()
    if done >= total:  # killed between its last checkpoint and its end: only the results are missing
        tested = judge_all(accelerator, policy, head, test_split, config) if test_split else []
        loss = rundir.last_loss(output)

    final = evaluate.by_type(tested, config.beta) if test_split else None
    test_loss = evaluate.weighted_loss(tested, config.type_weights) if test_split else None
    outcome = None if final is None else evaluate.finite({"loss": test_loss, "by_type": final})
    facts |= {"seconds": time.perf_counter() - started, "final": {"test": outcome}}
    if main:
        if test_split is not None:
            rundir.write_predictions(output / "predictions.parquet", test_split, tested, config)
        save_policy(output / "policy", policy, facts["model"], model_dir, config)
        rundir.write(output / "run.json", json.dumps(facts, indent=2) + "\n")  # last: now the run is complete
        _print_result(facts, loss, output)
    accelerator.end_training()
    return {
        "policy": str(output / "policy"),
        "steps": facts["steps"],
        "loss": evaluate.finite(loss),
        "test": outcome,
        "seconds": round(facts["seconds"], 3),
    }


def learning_rate(step: int, total: int, config: Config) -> float:
    """Rate at `step` (from 1): linear warm-up to the peak, then the scheduler's shape; never 0."""
    warmup = round(config.warmup_ratio * total)
    if step <= warmup:
        return config.learning_rate * step / (warmup + 1)
    progress = (step - 1 - warmup) / (total - warmup)
    shape = {"cosine": (1 + math.cos(math.pi * progress)) / 2, "linear": 1 - progress, "constant": 1.0}
    return config.learning_rate * shape[config.scheduler]


def log_ratios(model: nn.Module, head: nn.Module, batch: data.Batch) -> Tensor:
    """h = log π_θ(y|x) − log π_ref(y|x) of each row [B], nats, float64; subtracted per token, then summed."""
    logps = response_logps(model, head, batch.input_ids, batch.predicts, batch.targets)
    return row_sums(logps.double() - batch.ref_logps.double(), batch.lengths)


def group_losses(model: nn.Module, head: nn.Module, batch: data.Batch, config: Config) -> tuple[Tensor, Tensor]:
    """Log-ratios of the rows [B] and unweighted losses of the groups [G], float64."""
    h = log_ratios(model, head, batch)
    losses = h.new_zeros(len(batch.types))
    for kind in sorted(set(batch.types)):
        of_kind = [group for group, its in enumerate(batch.types) if its == kind]
        first = batch.first[of_kind]
        logit = config.beta[kind] * (h[first] - h[first + 1] if kind == "pairwise" else h[first])
        losses[of_kind] = LOSSES[config.loss[kind]](logit, batch.rewards[first])
    return h, losses


@torch.no_grad()
def judge_all(
    accelerator: Accelerator, policy: nn.Module, head: nn.Module, split: data.Split, config: Config
) -> list[Judged]:
    """All groups of a split under the policy, in the split's order, on every process."""
    policy.eval()
    mine = data.share(split.groups, split.lengths, accelerator.process_index, accelerator.num_processes)
    judged: list[Judged] = []
    for micro in data.micro_batches(mine, split.lengths, config.micro_batch_tokens):
        batch = data.collate(split, micro).to(accelerator.device)
        judged += _judged(micro, batch, *group_losses(policy, head, batch, config))
    return sorted(gather_object(judged), key=lambda one: one.rows)


def _judged(micro: list[data.Group], batch: data.Batch, logratios: Tensor, losses: Tensor) -> list[Judged]:
    h, explicit = logratios.tolist(), batch.rewards.tolist()
    out, row = [], 0
    for group, kind, loss in zip(micro, batch.types, losses.tolist(), strict=True):
        end = row + len(group)
        tokens = sum(batch.lengths[row:end])
        out.append(Judged(group, kind, loss, tuple(h[row:end]), tuple(explicit[row:end]), tokens))
        row = end
    return out


def _any(accelerator: Accelerator, here: bool) -> bool:
    """Whether it holds on any process."""
    flag = torch.tensor(float(here), device=accelerator.device)
    return bool(accelerator.reduce(flag, "sum").item())


def _require_finite(judged: list[Judged], split: data.Split, where: str) -> None:
    if bad := [one for one in judged if not math.isfinite(one.loss)]:
        raise UserError(
            f"the loss is {bad[0].loss} {where}, in rows {_ids(bad, split)}; "
            "lower learning_rate or beta, or train with dtype float32"
        )


def _ids(judged: list[Judged], split: data.Split) -> str:
    rows = [row for one in judged for row in one.rows]
    names = [split.rows["id"][row].as_py() for row in rows[:8]]
    return ", ".join(names) + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")


# --- the policy --------------------------------------------------------------------------------


def load_policy(model_dir: Path, config: Config, checkpoint: Path | None = None) -> Any:
    """The policy with float32 weights, from the model or from a checkpoint of it."""
    source = model_dir if checkpoint is None or config.lora else checkpoint / "policy"
    try:
        policy = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    except Exception as error:  # what a damaged directory raises is anything: safetensors', pickle's, torch's errors
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        raise UserError(f"{source}: transformers cannot load this as a causal language model: {reason}") from None
    if config.activation_checkpointing:
        policy.gradient_checkpointing_enable({"use_reentrant": False})
        if config.lora:
            policy.enable_input_require_grads()
    return _with_lora(policy, config, checkpoint) if config.lora else policy


def _with_lora(policy: Any, config: Config, checkpoint: Path | None) -> Any:
    import peft

    if checkpoint is not None:
        return peft.PeftModel.from_pretrained(policy, checkpoint / "policy", is_trainable=True)
    assert config.lora is not None
    lora = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=config.lora["r"],
        lora_alpha=config.lora["alpha"],
        lora_dropout=config.lora["dropout"],
        target_modules=config.lora["target"],
    )
    try:
        return peft.get_peft_model(policy, lora)
    except (ValueError, re.error) as error:
        raise UserError(f"lora.target {config.lora['target']!r} does not fit this model: {error}") from None


def _optimizer(policy: nn.Module, config: Config) -> torch.optim.Optimizer:
    trained = [p for p in policy.parameters() if p.requires_grad]
    return torch.optim.AdamW(
        [
            {"params": [p for p in trained if p.dim() >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
        ],
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
    )


def save_policy(path: Path, policy: Any, model: str, model_dir: Path, config: Config) -> None:
    """The trained model in `path`, in the dtype it was run in, with the tokenizer's files; or the adapter."""
    if config.lora and config.merge_lora:
        policy = policy.merge_and_unload()
    if not config.lora or config.merge_lora:
        policy = policy.to(DTYPES[config.dtype])
    for adapter in getattr(policy, "peft_config", {}).values():  # so that the adapter finds its base from anywhere
        adapter.base_model_name_or_path = str(Path(model).resolve()) if Path(model).exists() else model
    with rundir.written_whole(path) as temp:
        policy.save_pretrained(temp)
        for file in model_dir.iterdir():
            if file.name in (*TOKENIZER_FILES, TEMPLATE_FILE) or file.suffix == ".tiktoken":
                shutil.copyfile(file, temp / file.name)


def _print_result(facts: dict[str, Any], loss: float, output: Path) -> None:
    print(f"trained {facts['steps']} steps in {facts['seconds']:.1f} s; last training loss {loss:.4f}")
    test = facts["final"]["test"]
    for kind, found in (test["by_type"] if test else {}).items():
        right = "" if found["accuracy"] is None else f", accuracy {found['accuracy']:.3f}"
        print(f"test {kind}: {found['count']} groups, loss {found['loss']:.4f}{right}")
    print(f"policy: {output / 'policy'}", flush=True)


# --- before training ---------------------------------------------------------------------------


def _settings(args: argparse.Namespace, output: Path) -> Config:
    """The run's settings; a run that is continued without any given keeps its own."""
    if args.resume and not args.config and not args.set and (output / "config.yaml").is_file():
        config = settings.load(output / "config.yaml")
    else:
        config = settings.load(args.config, args.set)
    if config.tracker != "none" and importlib.util.find_spec(config.tracker) is None:
        raise UsageError(f"tracker {config.tracker} is not installed; `pip install {config.tracker}`, or tracker=none")
    if config.lora and importlib.util.find_spec("peft") is None:
        raise UsageError("lora needs peft; `pip install peft`")
    if config.dtype == "auto":
        on_gpu = torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "").lower() not in ("1", "true")
        bf16 = on_gpu and torch.cuda.is_bf16_supported()
        config = dataclasses.replace(config, dtype="bfloat16" if bf16 else "float32")
    return config


def _accelerator(config: Config, output: Path) -> Accelerator:
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # else several processes on CPUs would not know of each other
        mixed_precision="bf16" if config.dtype == "bfloat16" else "no",
        log_with=None if config.tracker == "none" else config.tracker,
        project_dir=output,
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
    )
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise UsageError(f"{accelerator.distributed_type.value} is not supported; launch with --multi_gpu (DDP)")
    return accelerator


def _check_dataset(dataset: Path, splits: dict[str, data.Split | None], model_dir: Path) -> None:
    if splits["train"] is None or not splits["train"].groups:
        found = sorted({path.name.partition("-")[0] for path in (dataset / "data").glob("*-*.parquet")})
        raise UserError(f"{dataset}: no rows of split train in data/ (splits: {', '.join(found) or 'none'})")
    if splits["test"] is not None and not splits["test"].groups:
        splits["test"] = None
    try:
        text = transformers.AutoConfig.from_pretrained(model_dir).get_text_config()
    except Exception as error:
        raise UserError(f"{model_dir}: config.json cannot be read ({str(error).splitlines()[0][:300]})") from None
    vocabulary = getattr(text, "vocab_size", math.inf)
    for split in splits.values():
        for name in ("prompt_ids", "response_ids") if split else ():
            largest = max(pc.max(pc.list_flatten(chunk)).as_py() or 0 for chunk in split.rows[name].chunks)  # type: ignore[union-attr]
            if largest >= vocabulary:
                raise UserError(
                    f"{dataset}: {name} holds token {largest}, and {model_dir} has {vocabulary}; "
                    "give the model that `una reference` scored"
                )
