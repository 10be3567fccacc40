"""The losses: an implicit reward is regressed onto an explicit one (UNA, arXiv 2408.15339).

Pure functions, one loss per group, no reduction. What is left out: where the log-probs come from
(`logps`), and how groups are weighted (`train`).

Shapes: n groups. `logit` is the implicit reward r = β·(log π_θ(y|x) − log π_ref(y|x)) of a row, or the
difference r₁ − r₂ of a comparison's two rows; `target` is the explicit reward in [0, 1] of that row, or the
probability p that the first row of the comparison is better.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def logistic(logit: Float[Tensor, " n"], target: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """−p·log σ(r₁ − r₂) − (1 − p)·log σ(r₂ − r₁); DPO when p = 1 (Eq. 10 with log σ)."""
    return -target * F.logsigmoid(logit) - (1 - target) * F.logsigmoid(-logit)


def mse(logit: Float[Tensor, " n"], target: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """(σ(r) − s)² (Eq. 11 and 13)."""
    return (torch.sigmoid(logit) - target) ** 2


def bce(logit: Float[Tensor, " n"], target: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """−s·log σ(r) − (1 − s)·log(1 − σ(r)) (Eq. 12), from the logit."""
    return F.binary_cross_entropy_with_logits(logit, target, reduction="none")


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"logistic": logistic, "mse": mse, "bce": bce}
