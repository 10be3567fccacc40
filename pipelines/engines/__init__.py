"""Engines that compute response log-probs under the reference model; each module has the same `load`."""

import importlib.metadata
from collections.abc import Sequence
from importlib import import_module
from typing import Protocol

import numpy as np

from pipelines import models
from schemas.errors import UserError

ENGINES = {"transformers": "pipelines.engines.transformers", "vllm": "pipelines.engines.vllm"}


class Engine(Protocol):
    """Scores token ids. `version` names the library and release that does the work."""

    version: str

    def score(self, prompts: Sequence[list[int]], responses: Sequence[list[int]]) -> list[np.ndarray]:
        """log π(response token | what stands before it), in nats: one float32 array per response."""
        ...


def load(name: str, model: str, *, dtype: str, batch_tokens: int, max_length: int) -> Engine:
    """Load an engine by name; `max_length` is the longest prompt plus response it must take, in tokens."""
    model = str(models.local(model))
    return import_module(ENGINES[name]).load(model, dtype=dtype, batch_tokens=batch_tokens, max_length=max_length)


def version(name: str) -> str:
    """`vllm 0.32.0`, without importing it."""
    for package in (name, f"{name}-cpu"):
        try:
            return f"{name} {importlib.metadata.version(package)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    raise UserError(f"--engine {name}: not installed; see Installation in the README")
