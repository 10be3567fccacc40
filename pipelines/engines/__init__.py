"""Engines that compute response log-probs under the reference model, or sample responses from a model."""

import importlib.metadata
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol

import numpy as np

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
    return import_module(ENGINES[name]).load(model, dtype=dtype, batch_tokens=batch_tokens, max_length=max_length)


def version(name: str) -> str:
    """`vllm 0.32.0`, without importing it."""
    for package in (name, f"{name}-cpu"):
        try:
            return f"{name} {importlib.metadata.version(package)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    raise UserError(f"--engine {name}: not installed; see Installation in the README")


# --- sampling ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sampled:
    """A response as a model wrote it."""

    ids: list[int]  # the end-of-turn token included, if it was written
    logps: np.ndarray  # float32, one per token, nats; of the model at temperature 1
    finished: bool  # ended with the end-of-turn token, not because there was no room for more


class Sampler(Protocol):
    """Samples responses. `version` names the library and release that does the work."""

    version: str

    def sample(
        self,
        prompts: Sequence[list[int]],
        *,
        n: int,
        temperature: float,
        top_p: float,
        max_new_tokens: int,
        seeds: Sequence[int],
    ) -> list[list[Sampled]]:
        """`n` responses to each prompt's token ids. `seeds`: one for each prompt; its samples have their own from it.

        A prompt with its seed gives the same samples beside whatever others, but for the rounding of logits.
        """
        ...


def load_sampler(
    name: str,
    model: str,
    *,
    dtype: str,
    batch_tokens: int,
    max_length: int,
    end_of_turn: int,
    adapter: str | None = None,
) -> Sampler:
    """Load what samples by the engine's name. `max_length`: the longest prompt plus response, in tokens; `adapter`: the
    directory of a LoRA adapter to the model."""
    from pipelines.engines.sampling import LOADERS

    load_one: Any = LOADERS[name]
    return load_one(
        model,
        dtype=dtype,
        batch_tokens=batch_tokens,
        max_length=max_length,
        end_of_turn=end_of_turn,
        adapter=adapter,
    )
