"""Responses sampled by a vLLM server on other GPUs, whose weights, or adapter, change between rounds.

What is left out: other servers, which give no token ids, and a server that does not see this machine's directories.
"""

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from pipelines.engines import Decoding, Sampled
from pipelines.engines import server as scoring
from pipelines.engines.sampling import sample_seeds
from pipelines.engines.server import RETRIES, TIMEOUT, Counted
from pipelines.labellers.endpoint import Body, Endpoint, Reply, checked
from schemas.errors import Reject, UserError

AT_A_TIME = 64  # requests
# what a server must have been started with to take a call
NEEDS = {
    "collective_rpc": f"VLLM_SERVER_DEV_MODE=1 and --worker-extension-cls {__package__}.sampling.Reloading",
    "reset_prefix_cache": "VLLM_SERVER_DEV_MODE=1",
    "load_lora_adapter": "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 and --enable-lora",
    "unload_lora_adapter": "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 and --enable-lora",
}


@dataclass(frozen=True)
class Answer(Reply):
    """A response; the text is not read."""

    sampled: Sampled | None = None


class ServerSampler:
    """See `pipelines.engines.Sampler`. `UserError` when the server does not answer, after some tries."""

    version = "server"

    def __init__(self, url: str, key: str, model: str, end_of_turn: int, lora: bool):
        self._url, self._key, self._model, self._end, self._lora = url, key, model, end_of_turn, lora
        self._named, self._adapters = model, 0
        self._completions = self._endpoint(url, "completions", self._answer)

    def _endpoint(self, url: str, path: str, parse: Any) -> Endpoint:
        how: dict[str, Any] = {"concurrency": AT_A_TIME, "retries": RETRIES, "timeout": TIMEOUT}
        return Endpoint(url, self._key, Counted(), path=path, parse=parse, **how)

    def update(self, directory: str | Path | None) -> None:
        """Sample from now on from the weights in a directory: a whole model's, or an adapter's (None: without one)."""
        where = directory and str(Path(directory).resolve())
        if not self._lora:
            root = self._url.removesuffix("/v1")
            self._tell(root, "collective_rpc", {"method": "take_weights", "args": [where]})
            self._tell(root, "reset_prefix_cache", {})
            return
        if self._named != self._model:
            self._tell(self._url, "unload_lora_adapter", {"lora_name": self._named})
        self._named, self._adapters = self._model, self._adapters + 1
        if where:
            name = f"una-{os.getpid()}-{self._adapters}"
            self._tell(self._url, "load_lora_adapter", {"lora_name": name, "lora_path": where})
            self._named = name

    def _tell(self, url: str, path: str, body: Body) -> None:
        try:
            self._ask(self._endpoint(url, path, lambda content: Reply("")), [body])
        except UserError as error:
            raise UserError(f"{error}; /{path} is there in a server that was started with {NEEDS[path]}") from None

    def close(self) -> None:
        """The server goes on without what this run put there."""
        if self._named != self._model:
            with suppress(UserError):
                self.update(None)

    def sample(self, prompts: Sequence[list[int]], how: Decoding, seeds: Sequence[int]) -> list[list[Sampled]]:
        asked: Body = {"model": self._named, "temperature": how.temperature, "top_p": how.top_p}
        asked |= {"max_tokens": how.max_new_tokens, "logprobs": 0, "return_token_ids": True}
        asked |= {"stop_token_ids": [self._end], "ignore_eos": True}
        each = zip((p for p in prompts for _ in range(how.n)), sample_seeds(seeds, how.n), strict=True)
        answers = self._ask(self._completions, [{**asked, "prompt": prompt, "seed": seed} for prompt, seed in each])
        found = [answer.sampled for answer in answers]
        return [found[i : i + how.n] for i in range(0, len(found), how.n)]

    def _ask(self, endpoint: Endpoint, bodies: Sequence[Body]) -> list[Any]:
        """The answers in the order of the bodies."""
        found: list[Any] = [None] * len(bodies)
        for i, answer in endpoint.ask(bodies, keep=lambda *_: None, known=lambda _: None):
            if isinstance(answer, Reject):
                raise UserError(f"{self._url}: {answer.detail}")
            found[i] = answer
        return found

    def _answer(self, content: bytes) -> Answer:
        try:
            choice = orjson.loads(content)["choices"][0]
            ids, logps = choice["token_ids"], np.array(choice["logprobs"]["token_logprobs"], np.float32)
            return Answer("", sampled=Sampled(ids, logps, ids[-1] == self._end))
        except (ValueError, KeyError, IndexError, TypeError):
            said = f"the answer of {len(content)} bytes has no token ids with their log-probs"
            raise ValueError(f"{said}; it must be a vLLM server: {content[:100]!r}") from None


def load(
    model: str,
    *,
    dtype: str,
    batch_tokens: int,
    max_length: int,
    end_of_turn: int,
    adapter: str | None,
    server: str,
    server_model: str | None = None,
    server_key_env: str = "OPENAI_API_KEY",
) -> ServerSampler:
    """A client of a server that is there, lists the model and takes prompts and responses of `max_length` tokens."""
    asked: dict[str, Any] = {"server": server, "server_model": server_model, "server_key_env": server_key_env}
    scoring.load(model, dtype=dtype, batch_tokens=None, max_length=max_length - 1, **asked)  # which checks all that
    url, key = checked(server), os.environ.get(server_key_env, "")
    sampler = ServerSampler(url, key, server_model or model, end_of_turn, adapter is not None)
    if adapter:
        sampler.update(adapter)
    return sampler
