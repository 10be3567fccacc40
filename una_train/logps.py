"""Log-probs of the response tokens, with the output head applied only where a response token is predicted.

The head of a causal model costs V numbers per position, and prompts are most of the positions; so a hook hands
the head only the hidden states that matter, and the model's own forward finishes the logits, with its bias,
scale and soft-cap, whatever they are. What is left out: gradients' reduction and the losses.

Shapes: B rows, T tokens (padded on the right), V vocabulary, N response tokens of all rows together.
No attention mask is passed: with padding on the right, a causal model never looks at it, and attention keeps
its fast path.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float32, Float64, Int64
from torch import Tensor, nn


def response_logps(
    model: nn.Module,
    head: nn.Module,
    input_ids: Int64[Tensor, "B T"],
    predicts: Bool[Tensor, "B T"],
    targets: Int64[Tensor, " N"],
) -> Float32[Tensor, " N"]:
    """log π(token) in nats of every response token, row after row.

    `predicts` marks the positions whose logits predict a response token, which `targets` names; `head` is the
    model's `get_output_embeddings()`.
    """
    with head.register_forward_pre_hook(lambda _, args: (args[0][predicts].unsqueeze(0),)):
        logits = model(input_ids=input_ids, use_cache=False).logits[0]
    return -F.cross_entropy(logits.float(), targets, reduction="none")


def row_sums(flat: Float[Tensor, " N"], lengths: Sequence[int]) -> Float64[Tensor, " B"]:
    """Sums of consecutive stretches of `flat`, in float64; `lengths` add up to N."""
    return torch.stack([part.sum() for part in flat.double().split(list(lengths))])
