"""Attention over packed rows: every response of a prompt rides behind one copy of it, several prompts in a sequence.

    prompt A | response A1 | response A2 | prompt B | response B1 | ...

Position ids restart at the end of the prompt for each response, and a response attends to its prompt and to itself.
transformers hands every model's attention to a registered function; ours asks the model's own mask rule (causal,
sliding window, chunks) about *positions*, and adds that only tokens of one path see each other. On a GPU it is one
FlexAttention call over a block-sparse mask; elsewhere SDPA calls for each prompt and each response, so that no work
is done between them. Soft-caps are honoured; attention sinks and position biases are refused. What is left out: which
rows are packed together, and which models this fits (who uses it tries it).

Shapes: T tokens of a packed sequence, H heads, D numbers per head.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int64
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

NAME = "una_packed"  # of the attention implementation
SHORT = 256  # tokens of a prompt and its responses, up to which they are one piece of work
BLOCK = 128  # tokens of a side of FlexAttention's blocks
PROMPT = 0  # the branch of a prompt's own tokens; responses count from 1


@dataclass(frozen=True)
class Layout:
    """Where the tokens of a packed sequence belong."""

    positions: Int64[Tensor, " T"]
    prompt: Int64[Tensor, " T"]  # number of the prompt the token stands under
    branch: Int64[Tensor, " T"]  # PROMPT, or the number of the response
    spans: list[list[tuple[int, int]]]  # of each prompt: where its own tokens are, and those of each response

    def to(self, device: torch.device) -> "Layout":
        positions, prompt, branch = (
            x.to(device, non_blocking=True) for x in (self.positions, self.prompt, self.branch)
        )
        return Layout(positions, prompt, branch, self.spans)

    def visible(self, query: Tensor, key: Tensor) -> Tensor:
        """Whether two tokens are on one path, and the key does not come after the query."""
        same = self.prompt[query] == self.prompt[key]
        path = (self.branch[key] == PROMPT) | (self.branch[query] == self.branch[key])
        return same & path & (query >= key)


@dataclass(frozen=True)
class Packed:
    """Prompts and their responses in one sequence. R rows (responses), in the order in which they were given."""

    ids: np.ndarray  # int64 [T]
    ends: list[int]  # of each row, where its prompt's last token is: it predicts the first token of the response
    starts: list[int]  # of each row, where its response starts, whose last token is left out: it predicts nothing
    layout: Layout


def pack(bundles: Sequence[tuple[Sequence[int] | np.ndarray, Sequence[Sequence[int] | np.ndarray]]]) -> Packed:
    """Each prompt's token ids, followed by those of its responses but for their last."""
    ids, positions, branches, numbers = [], [], [], []
    ends: list[int] = []
    starts: list[int] = []
    spans: list[list[tuple[int, int]]] = []
    at = 0
    for number, (prompt, responses) in enumerate(bundles):
        end = at + len(prompt) - 1
        spans.append([])
        for branch, part in enumerate([prompt, *(response[:-1] for response in responses)]):
            ids.append(np.asarray(part, np.int64))
            positions.append(np.arange(len(part)) + (len(prompt) if branch else 0))
            branches.append(np.full(len(part), branch or PROMPT))
            numbers.append(np.full(len(part), number))
            if branch:
                ends.append(end)
                starts.append(at)
            spans[-1].append((at, at + len(part)))
            at += len(part)
    places, prompts, parts_of = (torch.from_numpy(np.concatenate(x)) for x in (positions, numbers, branches))
    return Packed(np.concatenate(ids), ends, starts, Layout(places, prompts, parts_of, spans))


def predicting(ends: Sequence[int], starts: Sequence[int], lengths: Sequence[int]) -> np.ndarray:
    """The places whose logits predict the tokens of responses: a prompt's end, then the tokens before each token."""
    return np.concatenate(
        [np.append(e, np.arange(s, s + n - 1)) for e, s, n in zip(ends, starts, lengths, strict=True)]
    )


@dataclass(frozen=True)
class Piece:
    """Queries of one stretch of a sequence, keys of some, and the additive mask between them."""

    queries: int
    keys: list[int]
    mask: Tensor


class Mask:
    """What takes the place of an attention mask between a model and `attention`: layout and the model's own rule."""

    def __init__(self, layout: Layout, rule: Callable[..., Tensor]):
        self.layout, self.rule = layout, rule
        self._pieces: dict[torch.dtype, tuple[list[int], list[Piece]]] = {}
        self._blocks: Any = None

    def allowed(self, query: Tensor, key: Tensor) -> Bool[Tensor, "..."]:
        zero = torch.zeros((), dtype=torch.int64, device=query.device)
        positions = self.layout.positions
        return self.layout.visible(query, key) & self.rule(zero, zero, positions[query], positions[key])

    def pieces(self, dtype: torch.dtype) -> tuple[list[int], list["Piece"]]:
        """Lengths of the stretches that a sequence is split into, and the pieces of work on them.

        A prompt with short responses is one stretch; else the prompt is one and every response is one, so that no work
        is done between responses.
        """
        if dtype not in self._pieces:
            stretches: list[tuple[int, int]] = []
            work: list[tuple[int, list[int]]] = []
            for prompt, *responses in self.layout.spans:
                end, at = max(stop for _, stop in (prompt, *responses)), len(stretches)
                if end - prompt[0] <= SHORT:
                    stretches.append((prompt[0], end))
                    work.append((at, [at]))
                else:
                    stretches += [prompt, *(own for own in responses if own[0] < own[1])]
                    work += [(at, [at])] + [(i, [at, i]) for i in range(at + 1, len(stretches))]
            places = [torch.arange(*span, device=self.layout.positions.device) for span in stretches]
            pieces = [Piece(q, k, self._additive(places[q], torch.cat([places[i] for i in k]), dtype)) for q, k in work]
            self._pieces[dtype] = [len(place) for place in places], pieces
        return self._pieces[dtype]

    def _additive(self, query: Tensor, key: Tensor, dtype: torch.dtype) -> Tensor:
        mask = torch.zeros(len(query), len(key), dtype=dtype, device=query.device)
        return mask.masked_fill_(~self.allowed(query[:, None], key[None, :]), -torch.inf)

    def blocks(self) -> Any:
        """The block-sparse mask of FlexAttention over the whole sequence, padded to whole blocks."""
        if self._blocks is None:
            self._blocks = _find_blocks(self.layout, self.rule)
        return self._blocks


def _find_blocks(layout: Layout, rule: Callable[..., Tensor]) -> Any:
    """A FlexAttention BlockMask, found a few lines of blocks at a time: no tensor is T×T.

    Padding stands under a prompt of its own, so that no line is without a key.
    """
    from torch.nn.attention.flex_attention import BlockMask

    length, device = len(layout.positions), layout.positions.device
    positions, branch = (F.pad(x, (0, _padding(length))) for x in (layout.positions, layout.branch))
    prompt = F.pad(layout.prompt, (0, _padding(length)), value=-1)

    def allowed(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        path = (branch[key] == PROMPT) | (branch[query] == branch[key])
        seen = (prompt[query] == prompt[key]) & path & (query >= key)
        return seen & rule(batch, head, positions[query], positions[key])

    count = len(positions) // BLOCK
    some = torch.zeros(count, count, dtype=torch.bool, device=device)
    every = some.clone()
    zero = torch.zeros((), dtype=torch.int64, device=device)
    starts = [spans[0][0] for spans in layout.spans] + [length]
    for first in range(0, count, 8):
        last = min(first + 8, count)
        near = max(start for start in starts if start <= first * BLOCK) // BLOCK  # what is before is other prompts'
        query, key = (torch.arange(a * BLOCK, last * BLOCK, device=device) for a in (first, near))
        tiles = allowed(zero, zero, query[:, None], key[None, :]).view(last - first, BLOCK, last - near, BLOCK)
        some[first:last, near:last] = tiles.any(3).any(1)
        every[first:last, near:last] = tiles.all(3).all(1)
    return BlockMask.from_kv_blocks(
        *_ordered(some & ~every),
        *_ordered(every),
        BLOCK_SIZE=BLOCK,
        mask_mod=allowed,
        seq_lengths=(len(positions), len(positions)),
    )


def _ordered(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of each line are chosen, and their numbers, with those of the others after them."""
    order = torch.argsort(chosen.to(torch.int8), dim=-1, descending=True, stable=True)
    return chosen.sum(-1, dtype=torch.int32)[None, None], order.to(torch.int32)[None, None]


def _padding(length: int) -> int:
    """Tokens that make whole blocks, and two of them at least: one alone would be compiled apart."""
    return max(2 * BLOCK - length, -length % BLOCK)


@torch.compiler.disable  # lengths differ from batch to batch: traced, it would be compiled again for each
def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    **other: Any,
) -> tuple[Tensor, None]:
    """The function models call: query [1, H, T, D], key and value [1, H', T, D] → [1, T, H, D]."""
    for name in ("s_aux", "position_bias", "cache"):
        if other.get(name) is not None:
            raise NotImplementedError(f"attention with {name} is not supported over packed rows")
    if not isinstance(attention_mask, Mask):
        raise NotImplementedError(f"{type(module).__name__} does not pass its attention mask on")
    run = _flex if query.is_cuda else _dense
    out = run(query, key, value, attention_mask, dropout, scaling, softcap)
    return out.transpose(1, 2), None


def _dense(query: Tensor, key: Tensor, value: Tensor, mask: Mask, dropout: float, scaling: Any, softcap: Any) -> Tensor:
    lengths, pieces = mask.pieces(query.dtype)
    q, k, v = (x.split(lengths, 2) for x in (query, key, value))  # split, whose backward is one cat
    run = _sdpa if softcap is None else _softcapped(softcap)
    outs = []
    for piece in pieces:
        keys, values = (
            x[piece.keys[0]] if len(piece.keys) == 1 else torch.cat([x[i] for i in piece.keys], 2) for x in (k, v)
        )
        outs.append(run(q[piece.queries], keys, values, piece.mask, dropout, scaling))
    return outs[0] if len(outs) == 1 else torch.cat(outs, 2)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, dropout: float, scale: float | None) -> Tensor:
    gqa = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=scale, enable_gqa=gqa)


def _softcapped(cap: float) -> Callable[..., Tensor]:
    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, dropout: float, scale: float | None) -> Tensor:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        scores = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scale is None else scale)
        scores = cap * torch.tanh(scores / cap) + mask
        weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
        return F.dropout(weights, dropout) @ v

    return run


def _flex(query: Tensor, key: Tensor, value: Tensor, mask: Mask, dropout: float, scaling: Any, softcap: Any) -> Tensor:
    if dropout:
        raise NotImplementedError("FlexAttention has no attention dropout")
    score = None if softcap is None else (lambda s, b, h, q, k: softcap * torch.tanh(s / softcap))
    length = query.shape[2]
    query, key, value = (F.pad(x, (0, 0, 0, _padding(length))) for x in (query, key, value))
    run = _flex_attention(query.is_cuda)
    out = run(query, key, value, score_mod=score, block_mask=mask.blocks(), scale=scaling, enable_gqa=True)
    return out[:, :, :length]


@functools.cache
def _flex_attention(on_gpu: bool) -> Any:
    """FlexAttention, compiled once where it is fast only so."""
    from torch.nn.attention.flex_attention import flex_attention

    compiled: Any = torch.compile  # whose stub does not know the limit
    # one compilation for each rule, soft-cap and mode of grad; past the limit it would run without a kernel
    return compiled(flex_attention, recompile_limit=64) if on_gpu else flex_attention


# --- the way through a model -------------------------------------------------------------------

_layout: ContextVar[Layout | None] = ContextVar("layout", default=None)


@contextmanager
def packed(layout: Layout) -> Iterator[None]:
    """Within it, models with this attention implementation take their one sequence to be packed like this."""
    token = _layout.set(layout)
    try:
        yield
    finally:
        _layout.reset(token)


def _mask(mask_function: Callable[..., Tensor], **_: Any) -> Mask:
    layout = _layout.get()
    assert layout is not None, "a model with packed attention runs inside packing.packed"
    return Mask(layout, mask_function)


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, _mask)
