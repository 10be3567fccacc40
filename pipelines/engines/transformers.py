"""Reference log-probs with plain transformers: length-sorted batches under a token budget.

B batch, T tokens of the longest row, N response tokens in the batch, V vocabulary. Logits exist only for
the positions that predict response tokens, so a batch needs N×V floats and not B×T×V.
"""

import threading
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from schemas.errors import UserError


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


class TransformersEngine:
    """See `pipelines.engines.Engine`."""

    def __init__(self, model: torch.nn.Module, budget: int):
        import transformers

        self.model, self.budget = model.eval(), budget
        self.version = f"transformers {transformers.__version__}"
        self._keep: torch.Tensor | None = None  # [B, T] positions whose logits are wanted
        self._lock = threading.Lock()  # threads of a worker share the model, and with it what is kept
        model.get_output_embeddings().register_forward_pre_hook(self._select)  # type: ignore[operator]

    def _select(self, _: torch.nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        """Hand the output head only the wanted positions: [B, T, d] → [1, N, d]. Its bias and soft-cap still apply."""
        return (args[0][self._keep].unsqueeze(0),)

    @torch.inference_mode()
    def score(self, prompts: Sequence[list[int]], responses: Sequence[list[int]]) -> list[np.ndarray]:
        scored: list[np.ndarray] = [np.empty(0, np.float32)] * len(prompts)
        for batch in batches([len(p) + len(r) for p, r in zip(prompts, responses, strict=True)], self.budget):
            with self._lock:
                logps = self._batch([prompts[i] for i in batch], [responses[i] for i in batch])
            for i, values in zip(batch, logps, strict=True):
                scored[i] = values
        return scored

    def _batch(self, prompts: list[list[int]], responses: list[list[int]]) -> list[np.ndarray]:
        rows = [p + r for p, r in zip(prompts, responses, strict=True)]
        size = (len(rows), max(map(len, rows)))
        ids, mask, self._keep = torch.zeros(size, dtype=torch.long), torch.zeros(size, dtype=torch.long), None
        keep = torch.zeros(size, dtype=torch.bool)
        for i, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
            ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
            keep[i, len(prompt) - 1 : len(row) - 1] = True
        device = next(self.model.parameters()).device
        self._keep = keep.to(device)
        logits = self.model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False).logits[0]
        targets = torch.tensor([t for r in responses for t in r], device=device)
        logps = torch.cat([_logps(x, t) for x, t in zip(logits.split(1024), targets.split(1024), strict=True)])
        return np.split(logps.cpu().numpy(), np.cumsum([len(r) for r in responses])[:-1])


def _logps(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """float32 log-softmax of [n, V] logits at [n] targets, whatever the model's dtype."""
    return torch.log_softmax(logits.float(), -1).gather(1, targets[:, None])[:, 0]


def load(model: str, *, dtype: str, batch_tokens: int, max_length: int) -> TransformersEngine:
    """Load a local model directory onto the GPU if there is one, else the CPU."""
    from transformers import AutoConfig, AutoModelForCausalLM, logging

    logging.disable_progress_bar()
    try:
        text = AutoConfig.from_pretrained(model).get_text_config()
        # transformers' SDPA leaves out the soft-cap of attention (Gemma 2)
        attention = {"attn_implementation": "eager"} if getattr(text, "attn_logit_softcapping", None) else {}
        net = AutoModelForCausalLM.from_pretrained(
            model, dtype=getattr(torch, dtype), use_safetensors=True, **attention
        )
    except Exception as error:
        raise UserError(f"{model}: the model cannot be loaded ({type(error).__name__}: {error})") from None
    net.to("cuda" if torch.cuda.is_available() else "cpu")  # type: ignore[arg-type]
    return TransformersEngine(net, batch_tokens)
