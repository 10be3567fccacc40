"""Engines that compute response log-probs under the reference model, or sample responses from a model."""

import importlib.metadata
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol

import numpy as np

from schemas.errors import UsageError, UserError

ENGINES = {
    "transformers": "pipelines.engines.transformers",
    "vllm": "pipelines.engines.vllm",
    "server": "pipelines.engines.server",
}
# options of `una reference` that not every engine takes, as they are when nobody asks
DEFAULTS: dict[str, Any] = {
    "adapter": None,
    "device": "auto",
    "quantization": None,
    "tensor_parallel": 1,
    "pipeline_parallel": 1,
    "data_parallel": 1,
    "server": None,
    "server_model": None,
    "server_key_env": "OPENAI_API_KEY",
    "concurrency": 16,
}
_PARALLEL = ("tensor_parallel", "pipeline_parallel", "data_parallel")
TAKES = {
    "transformers": ("adapter", "device", "data_parallel"),
    "vllm": ("adapter", "device", "quantization", *_PARALLEL),
    "server": ("adapter", "quantization", "server", "server_model", "server_key_env", "concurrency"),
}


class Engine(Protocol):
    """Scores token ids. `version` names the library and release that does the work."""

    version: str

    def cut(self, prompts: Sequence[list[int]], responses: Sequence[list[int]]) -> list[list[int]]:
        """The rows' places, in batches that are best scored together: what a killed process loses is one of them."""
        ...

    def score(self, prompts: Sequence[list[int]], responses: Sequence[list[int]]) -> list[np.ndarray]:
        """log π(response token | what stands before it), in nats: one float32 array per response.

        `UserError` when it cannot go on with any row; any other exception may be one row's fault.
        """
        ...


def load(name: str, model: str, *, dtype: str, batch_tokens: int | None, max_length: int, **options: Any) -> Engine:
    """Load an engine by name; `max_length` is the longest prompt plus response it must take, in tokens."""
    if (copies := options.pop("data_parallel", 1)) > 1:
        from pipelines.engines.replicas import Replicas

        gpus = options.get("tensor_parallel", 1) * options.get("pipeline_parallel", 1)
        given = {"dtype": dtype, "batch_tokens": batch_tokens, "max_length": max_length, **options}
        return Replicas(name, model, copies, gpus, given)
    made = import_module(ENGINES[name])
    return made.load(model, dtype=dtype, batch_tokens=batch_tokens, max_length=max_length, **options)


def options(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options that were asked for and this engine takes; `UsageError` for those it does not take."""
    asked = {key: given[key] for key, default in DEFAULTS.items() if given[key] != default}
    for key in asked:
        if key not in TAKES[name]:
            others = ", ".join(engine for engine, takes in TAKES.items() if key in takes)
            raise UsageError(f"--{key.replace('_', '-')}: engine {name} has no such option; it goes with {others}")
    if name == "server" and not given["server"]:
        raise UsageError("--engine server: give the server's address with --server http://HOST:PORT/v1")
    if name == "server" and not importlib.util.find_spec("aiohttp"):
        raise UserError("--engine server: needs aiohttp, of the extra `judge`; see Installation in the README")
    return asked


def version(name: str) -> str:
    """`vllm 0.32.0`, without importing it."""
    if name == "server":
        return name
    for package in (name, f"{name}-cpu"):
        try:
            return f"{name} {importlib.metadata.version(package)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    raise UserError(f"--engine {name}: not installed; see Installation in the README")


def plain(model: str, adapter: str | None) -> Any:
    """The reference as transformers loads it, in float32, for `parity`."""
    from pipelines.engines.transformers import network

    return network(model, "float32", adapter)


def device_of(asked: str) -> str:
    """cuda or cpu; `UserError` when a GPU is asked for and there is none."""
    import torch

    if asked == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no GPU that PyTorch can use is here; see `nvidia-smi`, or leave it to auto")
    return "cuda" if torch.cuda.is_available() and asked != "cpu" else "cpu"


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
