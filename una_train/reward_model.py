"""A reward model from comparisons: Bradley–Terry, −log σ(r_w − r_l), on a classification head with one output.

The texts of pairwise rows are rendered whole by the model's chat template, which is how `una label` reads them with the
reward-model labeller. A head that the model lacks starts at zero, so the first loss is log 2. A step is Σ loss
over its comparisons, divided by their number, whatever the micro-batches and the processes. Comparisons, learning rate
and seed of a step are functions of its number, so a checkpoint is weights, optimizer state and a number.

Left out: sharded weights, and responses that share their prompt's tokens.
`accelerate launch -m una_train.reward_model train DIR --model M --output DIR` runs it on several processes.
"""

import argparse
import json
import logging
import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from torch import Tensor
from tqdm.auto import tqdm

from schemas import conversation, feedback
from schemas.conversation import Conversation
from schemas.errors import Reject, UserError
from schemas.fingerprint import local_model
from schemas.manifest import Manifest
from scoring import agreement
from una_train import config as settings
from una_train import data, evaluate, losses, policy, rundir
from una_train.config import RewardConfig
from una_train.train import learning_rate, with_dtype

log = logging.getLogger("una_train")

COLUMNS = ["type", "prompt_id", "comparison_id", "prompt", "response", "reward"]


@dataclass(frozen=True)
class Pair:
    """A comparison: token ids of both conversations, and the probability that the first response is better."""

    first: np.ndarray  # int32
    second: np.ndarray  # int32
    p: float
    prompt_id: str

    @property
    def longest(self) -> int:
        return max(len(self.first), len(self.second))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=["train"])
    parser.add_argument("dataset", metavar="DIR", help="dataset with comparisons; only their texts are read")
    parser.add_argument(
        "--model", required=True, help="where to start: a causal or a reward model, directory or hub id"
    )
    settings.add_arguments(parser)


def command(args: argparse.Namespace) -> dict[str, Any]:
    """Train, and return the summary: reward_model, steps, loss, test, comparisons, seconds."""
    dataset, output, model_dir = Path(args.dataset), Path(args.output), local_model(args.model)
    config = with_dtype(settings.of_run(partial(settings.read, RewardConfig), args, output))
    if config.lora:
        policy.require("peft", "lora")
    Manifest.read(dataset)  # or say that it is no dataset
    rundir.check(output, args.overwrite, args.resume, [dataset, model_dir])
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(), mixed_precision="bf16" if config.dtype == "bfloat16" else "no"
    )
    facts = rundir.facts_of(args.model, args.dataset, config, model_dir)
    checkpoint = rundir.newest_checkpoint(output) if args.resume else None
    if args.resume:
        rundir.check_same_run(output, facts)
        if checkpoint is None:
            log.warning("%s holds no checkpoint to continue from: starting at the first step", output)
    with rundir.locked(output) if accelerator.is_main_process else nullcontext():
        tokenizer = transformers.AutoTokenizer.from_pretrained(model_dir)
        set_seed(config.seed)
        model = load(model_dir, tokenizer, config, checkpoint)
        longest = conversation.longest(config.max_length, model.config, tokenizer)
        pairs, left_out = read(dataset, conversation.of(tokenizer, str(model_dir)), longest, config.held_out)
        facts["comparisons"] = {name: len(some) for name, some in pairs.items()} | {"left_out": left_out}
        result = train(accelerator, config, pairs, model, model_dir, output, checkpoint, facts)
    rundir.finish(accelerator)
    return result


# --- the data ----------------------------------------------------------------------------------


def read(
    dataset: Path, rendered: Conversation, longest: int, held_out: float
) -> tuple[dict[str, list[Pair]], dict[str, int]]:
    """The comparisons of `train` and `test`, and how many were left out for which reason.

    Without a test split, `held_out` of the prompts are it: those whose hash comes first, on every machine the same.
    """
    left_out: Counter[str] = Counter()
    train, test = (list(_pairs(dataset, split, rendered, longest, left_out)) for split in ("train", "test"))
    if not test:
        of_prompt = [int(pair.prompt_id[:8], 16) < held_out * 2**32 for pair in train]
        test = [pair for pair, kept in zip(train, of_prompt, strict=True) if kept]
        train = [pair for pair, kept in zip(train, of_prompt, strict=True) if not kept]
    if not train:
        why = f"; left out: {dict(left_out)}" if left_out else "; `una view DIR --as pairwise` makes them from scores"
        raise UserError(f"{dataset}: no comparisons to train on in split train{why}")
    if left_out:
        log.warning("left out of %d comparisons: %s", len(train) + len(test) + left_out.total(), dict(left_out))
    return {"train": train, "test": test}, dict(left_out)


def _pairs(dataset: Path, split: str, rendered: Conversation, longest: int, left_out: Counter[str]) -> Iterator[Pair]:
    for path in data.shards(dataset, split):
        try:
            rows = pq.read_table(path, columns=COLUMNS, filters=[("type", "=", "pairwise")])
            feedback.check_comparisons(rows)
        except ValueError as error:  # pyarrow's among them
            raise UserError(f"{path}: {error}; publish the dataset again") from None
        first_of: dict[str, dict[str, Any]] = {}
        for row in rows.to_pylist():
            first = first_of.pop(row["comparison_id"], None)
            if first is None:
                first_of[row["comparison_id"]] = row
                continue
            try:
                yield _pair(first, row, rendered, longest)
            except Reject as rejected:
                left_out[rejected.reason] += 1


def _pair(first: dict[str, Any], second: dict[str, Any], rendered: Conversation, longest: int) -> Pair:
    a, b = (
        np.array(rendered.whole([*row["prompt"], {"role": "assistant", "content": row["response"]}]), np.int32)
        for row in (first, second)
    )
    pair = Pair(a, b, first["reward"], first["prompt_id"])
    if pair.longest > longest:
        raise Reject("too_long", f"{pair.longest} tokens")
    return pair


def micro_batches(pairs: Sequence[Pair], budget: int) -> list[list[Pair]]:
    """Pairs of similar length, both sides of a pair together, within `budget` padded tokens or alone."""
    cut: list[list[Pair]] = []
    for pair in sorted(pairs, key=lambda pair: pair.longest):
        if not cut or 2 * (len(cut[-1]) + 1) * pair.longest > budget:
            cut.append([])
        cut[-1].append(pair)
    return cut


# --- the model ---------------------------------------------------------------------------------


def load(model_dir: Path, tokenizer: Any, config: RewardConfig, checkpoint: Path | None = None) -> Any:
    """The model, or a checkpoint of it, with one output and float32 weights; `UserError` when there is none."""
    source = model_dir if checkpoint is None or config.lora else checkpoint / "policy"
    try:
        model, found = transformers.AutoModelForSequenceClassification.from_pretrained(
            source,
            num_labels=1,
            dtype=torch.float32,
            use_safetensors=True,
            output_loading_info=True,
            **policy.attention(model_dir),
        )
    except Exception as error:  # what a damaged directory raises is anything
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        raise UserError(
            f"{model_dir}: transformers cannot load this as a reward model of one output: {reason}"
        ) from None
    missing = set(found["missing_keys"])
    if lost := sorted(name for name in missing if name.startswith(f"{model.base_model_prefix}.")):
        raise UserError(f"{model_dir}: the weights lack {', '.join(lost[:3])}; download the model again")
    model.config.id2label, model.config.label2id = {0: "reward"}, {"reward": 0}
    for name, parameter in model.named_parameters():
        if name in missing and len(parameter) == 1:  # the last layer of the head
            torch.nn.init.zeros_(parameter)
    text = model.config.get_text_config()
    if text.pad_token_id is None:
        text.pad_token_id = _padding(tokenizer)
    if config.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return _with_lora(model, config, checkpoint) if config.lora else model


def _padding(tokenizer: Any) -> int:
    """A token to pad with that no conversation ends with: a reward is read at the last token that is not padding."""
    talk = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    last = tokenizer(tokenizer.apply_chat_template(talk, tokenize=False), add_special_tokens=False)["input_ids"][-1]
    some = [tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id, *tokenizer.all_special_ids]
    return next((i for i in some if i is not None and i != last), 0 if last else 1)


def _with_lora(model: Any, config: RewardConfig, checkpoint: Path | None) -> Any:
    import peft

    assert config.lora is not None
    if config.activation_checkpointing:
        model.enable_input_require_grads()
    if checkpoint is not None:
        return peft.PeftModel.from_pretrained(model, checkpoint / "policy", is_trainable=True)
    of = config.lora
    lora = peft.LoraConfig(  # peft trains the head of such a model as a whole
        task_type="SEQ_CLS",
        r=of["r"],
        lora_alpha=of["alpha"],
        lora_dropout=of["dropout"],
        target_modules=of["target"],
    )
    try:
        return peft.get_peft_model(model, lora)
    except ValueError as error:
        raise UserError(f"lora.target {of['target']!r} does not fit this model: {error}") from None


def rewards(model: Any, pairs: Sequence[Pair], pad: int, device: Any) -> tuple[Tensor, Tensor]:
    """Rewards of the first and of the second responses [n], float32."""
    rows = [torch.from_numpy(row) for row in (*(p.first for p in pairs), *(p.second for p in pairs))]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad).long().to(device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    mask = (torch.arange(ids.shape[1], device=device) < lengths[:, None]).long()
    first, second = model(input_ids=ids, attention_mask=mask).logits[:, 0].float().chunk(2)
    return first, second


def loss_of(first: Tensor, second: Tensor, pairs: Sequence[Pair], config: RewardConfig) -> Tensor:
    """The loss of each comparison [n]: `pairwise` of `losses`, with rewards for implicit rewards."""
    p = torch.tensor([pair.p for pair in pairs], device=first.device)
    return losses.pairwise(
        first, second, p, losses.Options(label_smoothing=config.label_smoothing, margin=config.margin)
    )


# --- the loop ----------------------------------------------------------------------------------


def train(
    accelerator: Accelerator,
    config: RewardConfig,
    pairs: dict[str, list[Pair]],
    model: Any,
    model_dir: Path,
    output: Path,
    checkpoint: Path | None,
    facts: dict[str, Any],
) -> dict[str, Any]:
    world, rank, main, device = (
        accelerator.num_processes,
        accelerator.process_index,
        accelerator.is_main_process,
        accelerator.device,
    )
    started, pad = time.perf_counter(), model.config.get_text_config().pad_token_id
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    whole = model
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW([g for g in groups if g["params"]]))
    done = 0
    if checkpoint is not None:
        state = rundir.checkpoint_facts(checkpoint)
        done, started = state["step"], started - state["seconds"]
        rundir.load_optimizer(whole, optimizer.optimizer, checkpoint)
        log.info("continuing after step %d, from %s", done, checkpoint)
    per_epoch = math.ceil(len(pairs["train"]) / config.batch_size)
    total = min(config.epochs * per_epoch, config.max_steps or config.epochs * per_epoch)
    facts |= {"steps": total, "processes": world, "trainable_parameters": sum(p.numel() for p in trained)}
    if main:
        rundir.prepare(output, config, facts, checkpoint)
    accelerator.wait_for_everyone()

    def record(step: int, split: str, found: dict[str, Any], **more: float) -> None:
        line = {"step": step, "epoch": step / per_epoch, "split": split, "loss": found["loss"], **more}
        if main:
            with (output / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(evaluate.finite({**line, "by_type": {"pairwise": found}})) + "\n")
        if main and split == "test":
            log.info("step %d: test loss %.4f, accuracy %s", step, found["loss"], found["accuracy"])

    @torch.no_grad()
    def test(step: int, keep: bool = True) -> dict[str, Any] | None:
        if not pairs["test"]:
            return None
        model.eval()
        judged = []
        for micro in micro_batches(pairs["test"][rank::world], config.micro_batch_tokens):
            first, second = rewards(accelerator.unwrap_model(model), micro, pad, device)
            judged += _judged(first, second, micro, loss_of(first, second, micro, config))
        found = _metrics(gather_object(judged))
        if keep:
            record(step, "test", found)
        return found

    recent: list[tuple[float, float, float]] = []
    tested, loss = test(0) if done == 0 else None, math.nan
    for step in tqdm(
        range(done + 1, total + 1), initial=done, total=total, unit="step", disable=None if main else True
    ):
        batch = _batch(pairs["train"], step - 1, per_epoch, config)
        mine = micro_batches(batch[rank::world], config.micro_batch_tokens)
        weight = world / len(batch)  # gradients are averaged over processes
        if not mine:  # every process takes part in the averaging
            mine, weight = [batch[:1]], 0.0
        rate = learning_rate(step, total, config)
        for group in optimizer.param_groups:
            group["lr"] = rate
        seed = np.random.SeedSequence([config.seed, step, rank])
        torch.manual_seed(int(seed.generate_state(1)[0]))  # dropout
        model.train()
        for i, micro in enumerate(mine):
            with nullcontext() if i == len(mine) - 1 else accelerator.no_sync(model):
                first, second = rewards(model, micro, pad, device)
                each = loss_of(first, second, micro, config)
                accelerator.backward(each.sum() * weight)
            recent += _judged(first, second, micro, each) if weight else []
        norm = float(torch.nn.utils.clip_grad_norm_(trained, config.max_grad_norm))
        if not math.isfinite(norm):  # the same on every process, and not finite when a loss is not
            raise UserError(
                f"the gradient's norm is {norm} at step {step}; lower learning_rate, or train with dtype=float32"
            )
        optimizer.step()
        optimizer.zero_grad()
        saving = bool(config.save_every) and step % config.save_every == 0
        if step == total or saving or step % config.log_every == 0:
            found = _metrics(gather_object(recent))
            record(step, "train", found, lr=rate, grad_norm=norm)
            recent, loss = [], found["loss"]
        if step == total or (config.eval_every and step % config.eval_every == 0):
            tested = test(step)
        if saving and main:
            weights = rundir.gathered(whole.state_dict())
            moments = rundir.gathered(rundir.optimizer_state(whole, optimizer.optimizer))
            beside = {"seconds": time.perf_counter() - started}
            rundir.save_checkpoint(output, step, whole, weights, moments, beside, config.keep_checkpoints)
    if done >= total:  # killed between its last checkpoint and its end: only the results are missing
        tested, loss = test(total, keep=False), rundir.last_loss(output)

    facts |= {"seconds": time.perf_counter() - started, "final": {"test": tested}}
    if main:
        save(output / "reward_model", accelerator.unwrap_model(model), model_dir, config)
        rundir.write(
            output / "run.json", json.dumps(evaluate.finite(facts), indent=2) + "\n"
        )  # last: now it is complete
        print(f"trained {total} steps in {facts['seconds']:.1f} s; last training loss {loss:.4f}")
        if tested:
            print(f"test: {tested['count']} comparisons, loss {tested['loss']:.4f}, accuracy {tested['accuracy']}")
        print(f"reward model: {output / 'reward_model'}", flush=True)
    return {
        "reward_model": str(output / "reward_model"),
        "steps": total,
        "loss": loss,
        "test": tested,
        "comparisons": facts["comparisons"],
        "seconds": round(facts["seconds"], 3),
    }


def _batch(pairs: list[Pair], step: int, per_epoch: int, config: RewardConfig) -> list[Pair]:
    """The comparisons of a step (from 0), over all processes."""
    epoch, place = divmod(step, per_epoch)
    order = np.random.default_rng([config.seed, epoch]).permutation(len(pairs))
    return [pairs[i] for i in order[place * config.batch_size : (place + 1) * config.batch_size]]


def _judged(first: Tensor, second: Tensor, pairs: Sequence[Pair], loss: Tensor) -> list[tuple[float, float, float]]:
    """Margin, p and loss of each comparison."""
    margins, each = (first - second).tolist(), loss.tolist()
    return [(margin, pair.p, one) for margin, pair, one in zip(margins, pairs, each, strict=True)]


def _metrics(judged: list[tuple[float, float, float]]) -> dict[str, Any]:
    margins, p, each = np.array(sorted(judged)).T  # sorted, so that sums do not depend on the processes
    return {"count": len(each), "loss": float(each.mean()), "accuracy": agreement.accuracy(margins, p)}


def save(path: Path, model: Any, model_dir: Path, config: RewardConfig) -> None:
    """The model, an adapter merged into it, in the dtype it was run in, with the tokenizer's files."""
    whole = model.merge_and_unload() if config.lora else model
    with rundir.written_whole(path) as temp:
        whole.to(policy.DTYPES[config.dtype]).save_pretrained(temp)
        policy.copy_tokenizer(model_dir, temp)


if __name__ == "__main__":
    import sys

    from una_train.__main__ import main

    sys.exit(main(add_arguments, command))
