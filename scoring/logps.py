"""Log-probs of the response tokens, without a tensor of logits.

The head of a causal model costs V numbers per position: only positions that predict a response token meet it, a chunk
of them at a time, and the backward pass computes a chunk's logits again instead of keeping them (unless all of them
are few). Without gradients, chunks are of the vocabulary too (`streamed_logps`). The model's own forward, with the head
applied to the same positions at once, is the fallback for heads that are not one plain linear layer. What is left out:
attention over packed rows (`packing`) and the losses.

Shapes: T tokens, D hidden width, V vocabulary, N response tokens of all rows together.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Float64, Int64
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

# Logits computed at once. On a CPU 24 MB of them, which glibc's allocator keeps for the next chunk.
CHUNK = {"cpu": 6 << 20, "cuda": 1 << 26}
# With no more logits than this in all, their softmax waits for the backward pass instead of being computed again.
KEPT = {"cpu": 1 << 25, "cuda": 1 << 28}

# Without gradients: positions and columns of the vocabulary whose logits exist at once. On a CPU they fit its caches.
BLOCK = {"cpu": (256, 4096), "cuda": (2048, 32_768)}


def linear_logps(
    hidden: Float[Tensor, "N D"],
    head: nn.Linear,
    targets: Int64[Tensor, " N"],
    scale: float = 1.0,
    softcap: float | None = None,
) -> Float32[Tensor, " N"]:
    """log softmax(z)[target] of every position in nats, z = scale·(W·h + b), then c·tanh(z/c) where `softcap` is c.

    Matrix products run in autocast's dtype, all else and the sums of gradients in float32. A head of which each process
    holds a part of the vocabulary raises `NotImplementedError`; one that FSDP has gathered is whole.
    """
    if isinstance(head.weight, DTensor):  # a part of the vocabulary has another softmax
        raise NotImplementedError("a head that is sharded over the vocabulary has no chunked log-probs")
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    few = softcap is None and targets.numel() * len(head.weight) <= KEPT.get(device, 0)
    how = _How(dtype, scale, softcap, keep=few and torch.is_grad_enabled())
    return _LinearLogps.apply(hidden, head.weight, head.bias, targets, how)


@dataclass(frozen=True)
class _How:
    dtype: torch.dtype  # of the matrix products
    scale: float
    cap: float | None
    keep: bool  # the softmax, from forward to backward


class _LinearLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, how: _How) -> Tensor:
        logps = hidden.new_empty(len(targets), dtype=torch.float32)
        cast, kept = _cast(weight, bias, how), []
        for rows in _chunks(len(targets), len(weight), hidden.device):
            logits = _logits(hidden[rows], *cast, how)
            target = logits.gather(-1, targets[rows, None])
            logps[rows], softmax = _log_softmax(logits, target)
            if how.keep:
                kept.append(softmax)
            del logits, softmax  # before the next chunk, not after it
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.how, ctx.kept = how, kept
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):  # type: ignore[override, no-untyped-def]
        hidden, weight, bias, targets = ctx.saved_tensors
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        of_hidden = torch.empty_like(hidden) if need_hidden else None
        of_weight: Tensor | None = None
        of_bias: Tensor | None = None
        cast, kept, ctx.kept = _cast(weight, bias, ctx.how), ctx.kept, []
        for rows in _chunks(len(targets), len(weight), hidden.device):
            softmax = kept.pop(0) if kept else None
            d = _grad_of_logits(hidden[rows], *cast, targets[rows], grad[rows].float(), ctx.how, softmax)
            if need_bias:
                of_bias = _plus(of_bias, d.sum(0))
            d = d.to(ctx.how.dtype)
            if of_hidden is not None:
                of_hidden[rows] = d @ cast[0]
            if need_weight:
                of_weight = _plus_product(of_weight, d, hidden[rows].to(ctx.how.dtype))
            del softmax, d
        back = [None if g is None else g.to(w.dtype) for g, w in ((of_weight, weight), (of_bias, bias))]
        return of_hidden, *back, None, None


def _cast(weight: Tensor, bias: Tensor | None, how: _How) -> tuple[Tensor, Tensor | None]:
    return weight.to(how.dtype), None if bias is None else bias.to(how.dtype)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, how: _How) -> Tensor:
    with torch.autocast(hidden.device.type, enabled=False):
        logits = F.linear(hidden.to(how.dtype), weight, bias).float()
    logits = logits if how.scale == 1 else logits.mul_(how.scale)
    return logits if how.cap is None else logits.div_(how.cap).tanh_().mul_(how.cap)


def _log_softmax(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """log softmax of the target logits [n, 1] → [n], and the softmax [n, V], in the memory of the logits."""
    top = logits.amax(-1, keepdim=True)
    odds = logits.sub_(top).exp_()
    total = odds.sum(-1, keepdim=True)
    return (target - top - total.log())[:, 0], odds.div_(total)


def _grad_of_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    grad: Tensor,
    how: _How,
    softmax: Tensor | None,
) -> Tensor:
    """grad · (onehot(target) − softmax) [n, V], through cap and scale to the head's own output."""
    slope = None
    if softmax is None:
        logits = _logits(hidden, weight, bias, how)
        if how.cap is not None:
            slope = (logits / how.cap).square_().neg_().add_(1)
        _, softmax = _log_softmax(logits, logits[:, :1])
    d = softmax.mul_(-grad[:, None]).scatter_add_(-1, targets[:, None], grad[:, None])
    d = d if slope is None else d.mul_(slope)
    return d if how.scale == 1 else d.mul_(how.scale)


def _plus(total: Tensor | None, more: Tensor) -> Tensor:
    return more if total is None else total.add_(more)


def _plus_product(total: Tensor | None, d: Tensor, hidden: Tensor) -> Tensor:
    """total + dᵀ·hidden, summed in float32."""
    if total is not None and d.dtype == total.dtype:
        return total.addmm_(d.T, hidden)
    return _plus(total, (d.T @ hidden).float())


def _chunks(positions: int, vocabulary: int, device: torch.device) -> Iterator[slice]:
    size = max(1, CHUNK.get(device.type, 1 << 24) // vocabulary)
    return (slice(start, start + size) for start in range(0, positions, size))


@torch.inference_mode()
def streamed_logps(
    hidden: Float[Tensor, "N D"],
    head: nn.Linear,
    targets: Int64[Tensor, " N"],
    scale: float = 1.0,
    softcap: float | None = None,
) -> Float32[Tensor, " N"]:
    """`linear_logps` without gradients: blocks of positions by blocks of the vocabulary, with a running log-sum-exp.

    No more than `BLOCK` logits exist at a time. They have the dtype that the model's head gives, then float32.
    """
    how = _How(hidden.dtype, scale, softcap, keep=False)
    positions, columns = BLOCK["cuda" if hidden.is_cuda else "cpu"]
    logps = hidden.new_empty(len(targets), dtype=torch.float32)
    for start in range(0, len(targets), positions):
        rows = slice(start, start + positions)
        logps[rows] = _streamed(hidden[rows], head, targets[rows, None], how, columns)
    return logps


def _streamed(hidden: Tensor, head: nn.Linear, targets: Tensor, how: _How, columns: int) -> Tensor:
    vocabulary = len(head.weight)
    top = hidden.new_full(targets.shape, -torch.inf, dtype=torch.float32)
    total, chosen = torch.zeros_like(top), torch.full_like(top, torch.nan)  # of an id beyond the vocabulary
    for first in range(0, vocabulary, columns):
        some = slice(first, min(first + columns, vocabulary))
        bias = None if head.bias is None else head.bias[some]
        logits = _logits(hidden, head.weight[some], bias, how)
        here = (targets >= some.start) & (targets < some.stop)
        chosen = torch.where(here, logits.gather(-1, (targets - first).clamp(0, logits.shape[1] - 1)), chosen)
        higher = torch.maximum(top, logits.amax(-1, keepdim=True))
        total = total * (top - higher).exp() + logits.sub_(higher).exp_().sum(-1, keepdim=True)
        top = higher
    return (chosen - top - total.log())[:, 0]


def row_sums(flat: Float[Tensor, " N"], lengths: Sequence[int]) -> Float64[Tensor, " B"]:
    """Sums of consecutive stretches of `flat`, in float64; `lengths` add up to N."""
    return torch.stack([part.sum() for part in flat.double().split(list(lengths))])
