"""Reference log-probs with plain transformers, on a GPU if there is one.

Responses of a prompt ride behind one copy of it and several prompts in one sequence, without padding, and the head
meets only the positions that predict response tokens, a block of them and of the vocabulary at a time. A model for
which either gives other log-probs than its own forward on a few made-up rows is run the plain way: rows of similar
length, padded, and the head once over the wanted positions.

Shapes: B batch, T tokens, N response tokens in the batch, D hidden width, V vocabulary.
"""

import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from pipelines import models
from pipelines.engines import device_of
from schemas.errors import UserError
from scoring import packing
from scoring.logps import streamed_logps
from scoring.models import after_head, decoder_of, soft_capped_attention

log = logging.getLogger(__name__)
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")  # what a device says, in lower case
BATCH_TOKENS = {"cuda": 8192, "cpu": 1024}  # a CPU is quickest with what fits its caches
FITS = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.05}  # nats, of mean |Δ| between two ways


def batches(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Indices in order of length, cut so that rows × longest row stays within `budget` tokens (or is one row)."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batch and (len(batch) + 1) * lengths[i] > budget:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def bundles(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], budget: int) -> Iterator[list[int]]:
    """Indices, those of one prompt together, cut so that prompts and responses stay within `budget` tokens.

    Responses of one prompt may exceed it by the prompt, which they would read twice otherwise; one row may be longer.
    """
    of_prompt: dict[tuple[int, ...], list[int]] = {}
    for i, prompt in enumerate(prompts):
        of_prompt.setdefault(tuple(prompt), []).append(i)
    batch: list[int] = []
    used = 0
    for prompt_ids, rows in of_prompt.items():
        whole = len(prompt_ids) + sum(len(responses[i]) for i in rows)
        if batch and used + whole > budget:
            yield batch
            batch, used = [], 0
        alone = True  # whether the prompt is not in the batch yet
        for i in rows:
            cost = len(prompt_ids) * alone + len(responses[i])
            if batch and used + cost > budget + len(prompt_ids):
                yield batch
                batch, used, cost = [], 0, len(prompt_ids) + len(responses[i])
            batch.append(i)
            used, alone = used + cost, False
    if batch:
        yield batch


class TransformersEngine:
    """See `pipelines.engines.Engine`."""

    def __init__(self, model: Any, budget: int):
        import transformers

        self.model, self.budget = model.eval(), budget
        self.version = f"transformers {transformers.__version__}"
        self.device = next(model.parameters()).device
        self.vocabulary = model.config.get_text_config().vocab_size
        self._plain_attention = model.config._attn_implementation
        self._lock = threading.Lock()  # a model's hooks are everybody's
        self.packed = self.streamed = False
        self.sharing = True  # of prompts between responses, where rows are packed
        self._settle()

    def cut(self, prompts: Sequence[list[int]], responses: Sequence[list[int]]) -> list[list[int]]:
        if self.packed:
            return list(bundles(prompts, responses, self.budget))
        return list(batches([len(p) + len(r) for p, r in zip(prompts, responses, strict=True)], self.budget))

    def score(self, prompts: Sequence[list[int]], responses: Sequence[list[int]]) -> list[np.ndarray]:
        scored: list[np.ndarray] = [np.empty(0, np.float32)] * len(prompts)
        todo = self.cut(prompts, responses)[::-1]
        while todo:
            batch = todo.pop()
            with self._lock:
                found = self._within_memory([prompts[i] for i in batch], [responses[i] for i in batch])
            if found is None:
                todo += [batch[len(batch) // 2 :], batch[: len(batch) // 2]]
                continue
            for i, values in zip(batch, found, strict=True):
                scored[i] = values
        return scored

    def _within_memory(self, prompts: list[list[int]], responses: list[list[int]]) -> list[np.ndarray] | None:
        """Log-probs of a batch; None when the device has too little memory for it, and batches are halved."""
        try:
            return self._batch(prompts, responses)
        except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError, as is a CPU's
            if not out_of_memory(error) or len(prompts) == 1:
                raise
        tokens = sum(map(len, prompts)) + sum(map(len, responses))
        self.budget = max(1, min(self.budget, tokens) // 2)
        log.warning(
            "%s: out of memory in a batch of %d tokens; batches have %d now", *(self.device, tokens, self.budget)
        )
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return None

    @torch.inference_mode()
    def _batch(self, prompts: list[list[int]], responses: list[list[int]]) -> list[np.ndarray]:
        """Log-probs of rows in one forward pass; rows of one prompt must be adjacent to share it."""
        inputs, predicts, layout = (self._pack if self.packed else self._pad)(prompts, responses)
        given: dict[str, Any] = {name: value.to(self.device) for name, value in inputs.items()} | {"use_cache": False}
        where = torch.from_numpy(predicts).to(self.device)
        targets = torch.tensor([token for response in responses for token in response], device=self.device)
        with packing.packed(layout) if layout else _as_it_is():
            logps = self._streamed(given, where, targets) if self.streamed else self._plain(given, where, targets)
        return np.split(logps.cpu().numpy(), np.cumsum([len(r) for r in responses])[:-1])

    def _pack(self, prompts: list[list[int]], responses: list[list[int]]) -> tuple[dict[str, torch.Tensor], Any, Any]:
        together: list[tuple[list[int], list[list[int]]]] = []
        for prompt, response in zip(prompts, responses, strict=True):
            if self.sharing and together and together[-1][0] == prompt:
                together[-1][1].append(response)
            else:
                together.append((prompt, [response]))
        made = packing.pack(together)
        ids = torch.from_numpy(made.ids)[None]
        # the mask of ones keeps transformers from guessing where rows begin
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": made.layout.positions[None]}
        predicts = packing.predicting(made.ends, made.starts, [len(r) for r in responses])
        return inputs, predicts, made.layout.to(self.device)

    def _pad(self, prompts: list[list[int]], responses: list[list[int]]) -> tuple[dict[str, torch.Tensor], Any, Any]:
        rows = [p + r[:-1] for p, r in zip(prompts, responses, strict=True)]
        width = max(map(len, rows))
        ids, mask = torch.zeros((len(rows), width), dtype=torch.long), torch.zeros((len(rows), width), dtype=torch.long)
        for i, row in enumerate(rows):
            ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
        starts = [i * width + len(prompt) for i, prompt in enumerate(prompts)]
        predicts = packing.predicting([start - 1 for start in starts], starts, [len(r) for r in responses])
        return {"input_ids": ids, "attention_mask": mask}, predicts, None

    def _streamed(self, inputs: dict[str, Any], where: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        hidden = decoder_of(self.model)(**inputs).last_hidden_state.flatten(0, 1)[where]
        return streamed_logps(hidden, self.model.get_output_embeddings(), targets, *after_head(self.model.config))

    def _plain(self, inputs: dict[str, Any], where: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """By the model's own forward; a hook hands its head the wanted positions, [B, T, D] → [1, N, D]."""

        def keep(_: torch.nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
            return (args[0].flatten(0, 1)[where].unsqueeze(0),)

        with self.model.get_output_embeddings().register_forward_pre_hook(keep):
            logits = self.model(**inputs).logits[0]
        some = zip(logits.split(256), targets.split(256), strict=True)
        return torch.cat([torch.log_softmax(z.float(), -1).gather(1, t[:, None])[:, 0] for z, t in some])

    # --- how this model may be run ---

    def _settle(self) -> None:
        """Choose packed rows and the streamed head where they give what the model's own forward gives."""
        expected = np.concatenate(self._made_up())
        head = self.model.get_output_embeddings()
        self.streamed = type(head) is torch.nn.Linear and self._gives(expected, packed=False, streamed=True)
        self.packed = self._gives(expected, packed=True, streamed=self.streamed)
        self._use(self.packed, self.streamed)
        log.info(
            "%s; %s",
            "responses of a prompt share it, no padding" if self.packed else "rows are padded and prompts not shared",
            "the head in blocks of the vocabulary" if self.streamed else "the head by the model's own forward",
        )

    def _use(self, packed: bool, streamed: bool) -> None:
        self.model.set_attn_implementation(packing.NAME if packed else self._plain_attention)
        self.packed, self.streamed = packed, streamed

    def _made_up(self) -> list[np.ndarray]:
        """Log-probs of two prompts with three responses and one."""
        rng = np.random.default_rng(0)
        prompts = [rng.integers(0, self.vocabulary, n).tolist() for n in (9, 4)]
        responses = [rng.integers(0, self.vocabulary, n).tolist() for n in (5, 1, 7, 6)]
        return self._batch([prompts[0]] * 3 + prompts[1:], responses)

    def _gives(self, expected: np.ndarray, *, packed: bool, streamed: bool) -> bool:
        text = self.model.config.get_text_config()
        if packed and getattr(text, "attn_temperature_tuning", False):  # depends on the place in the sequence
            return False
        try:
            self._use(packed, streamed)
            found = np.concatenate(self._made_up())
        except (NotImplementedError, AttributeError, TypeError, ValueError, KeyError, IndexError) as error:
            log.info("%s", error)
            return False
        return bool(np.abs(found - expected).mean() < FITS[self.model.dtype])


@contextmanager
def _as_it_is() -> Iterator[None]:
    yield


def out_of_memory(error: BaseException) -> bool:
    """Whether a device had too little memory; a CPU's allocator says so in a plain RuntimeError."""
    said = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(words in said for words in OUT_OF_MEMORY)


def load(
    model: str,
    *,
    dtype: str,
    batch_tokens: int | None,
    max_length: int,
    adapter: str | None = None,
    device: str = "auto",
) -> TransformersEngine:
    """Load a model directory, here or in a store, onto the GPU if there is one, else the CPU."""
    where = device_of(device)
    return TransformersEngine(network(model, dtype, adapter).to(where), batch_tokens or BATCH_TOKENS[where])


def network(model: str, dtype: str, adapter: str | None = None) -> Any:
    """A causal model from a directory, here or in a store, with a LoRA adapter in it; else `UserError`."""
    from transformers import AutoConfig, AutoModelForCausalLM, logging

    logging.disable_progress_bar()
    model = str(models.local(model))
    try:
        attention = soft_capped_attention(AutoConfig.from_pretrained(model))
        net = AutoModelForCausalLM.from_pretrained(
            model, dtype=getattr(torch, dtype), use_safetensors=True, **attention
        )
    except Exception as error:
        raise UserError(f"{model}: the model cannot be loaded ({type(error).__name__}: {error})") from None
    return net if adapter is None else _adapted(net, adapter)


def _adapted(net: Any, adapter: str) -> Any:
    """The model with the adapter's layers in their places, which is the model itself."""
    try:
        import peft
    except ImportError:
        raise UserError("--adapter: needs peft; `pip install peft`") from None
    try:
        return peft.PeftModel.from_pretrained(net, adapter).get_base_model()
    except Exception as error:
        raise UserError(f"{adapter}: the adapter does not fit the model ({type(error).__name__}: {error})") from None
