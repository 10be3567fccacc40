"""Responses sampled from a model, with their log-probs: transformers with a KV cache, and vLLM in this process.

Every sample has random numbers of its own, made of its seed and nothing else, so what it is does not depend on what is
sampled beside it but for the last digits of logits. Log-probs are those of the model at temperature 1, before top-p.

Shapes: B samples of a batch, V vocabulary.
"""

import hashlib
import http.client
import inspect
import json
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import InvalidStateError, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipelines.engines import Sampled, device_of, vllm
from pipelines.engines.transformers import batches, network
from schemas.errors import UserError


class TransformersSampler:
    """See `pipelines.engines.Sampler`. The model may be one that is trained between calls."""

    def __init__(self, model: Any, end_of_turn: int, batch_tokens: int):
        import transformers

        self.model, self.end, self.budget = model, end_of_turn, batch_tokens
        self.version = f"transformers {transformers.__version__}"
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        short = "logits_to_keep" in inspect.signature(base.forward).parameters
        self._last_only = {"logits_to_keep": 1} if short else {}

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
        found: list[list[Sampled]] = [[] for _ in prompts]
        with _evaluating(self.model), torch.no_grad():
            for batch in batches([n * (len(p) + max_new_tokens) for p in prompts], self.budget):
                u = np.stack([draws(seeds[i], j, max_new_tokens) for i in batch for j in range(n)])
                sampled = self._batch([prompts[i] for i in batch], n, torch.from_numpy(u), temperature, top_p)
                for k, i in enumerate(batch):
                    found[i] = sampled[k * n : (k + 1) * n]
        return found

    def _batch(self, prompts: list[list[int]], n: int, u: Tensor, temperature: float, top_p: float) -> list[Sampled]:
        """`n` samples of each prompt; a prompt is read once. `u` [B, most]: the random numbers."""
        device = next(self.model.parameters()).device
        ids, mask = _padded_left(prompts, device)
        out = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            use_cache=True,
            **self._last_only,
        )
        cache, logits = out.past_key_values, out.logits[:, -1]
        cuts = all(hasattr(layer, "batch_select_indices") for layer in cache.layers)
        if n > 1 and not cuts:
            return self._batch([prompt for prompt in prompts for _ in range(n)], 1, u, temperature, top_p)
        if n > 1:
            cache.batch_repeat_interleave(n)
            logits, mask = logits.repeat_interleave(n, 0), mask.repeat_interleave(n, 0)
        u, rows = u.to(device), torch.arange(len(u), device=device)
        position = mask.sum(1, keepdim=True)
        tokens = torch.full(u.shape, self.end, dtype=torch.long, device=device)
        logps = torch.zeros(u.shape, dtype=torch.float32, device=device)
        for t in range(u.shape[1]):
            of_all = logits.float().log_softmax(-1)
            token = choose(of_all, u[rows, t], temperature, top_p)
            tokens[rows, t], logps[rows, t] = token, of_all.gather(1, token[:, None])[:, 0]
            going = token != self.end
            if t == u.shape[1] - 1 or not going.any():
                break
            if cuts and not going.all():  # those that have ended leave the batch
                keep = going.nonzero()[:, 0]
                cache.batch_select_indices(keep)
                rows, token, mask, position = rows[keep], token[keep], mask[keep], position[keep]
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            out = self.model(
                input_ids=token[:, None],
                attention_mask=mask,
                position_ids=position,
                past_key_values=cache,
                use_cache=True,
            )
            logits, cache, position = out.logits[:, -1], out.past_key_values, position + 1
        return [_cut(one, of, self.end) for one, of in zip(tokens.tolist(), logps.cpu().numpy(), strict=True)]


def _cut(ids: list[int], logps: np.ndarray, end: int) -> Sampled:
    """A sample up to its end of turn, if there is one."""
    length = ids.index(end) + 1 if end in ids else len(ids)
    return Sampled(ids[:length], logps[:length], end in ids)


def _padded_left(prompts: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and mask, both [B, longest]."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    return ids, mask


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


# --- randomness ----------------------------------------------------------------------------------


def draws(seed: int, sample: int, count: int) -> np.ndarray:
    """The random numbers in [0, 1) of a prompt's sample, float64 [count]."""
    return np.random.default_rng([seed, sample]).random(count)


def choose(logps: Tensor, u: Tensor, temperature: float, top_p: float) -> Tensor:
    """A token of each line of log-probs [B, V], by the numbers u in [0, 1) [B]: the one where the sum of probabilities
    passes u. The likeliest at temperature 0; with `top_p` below 1, among the fewest tokens that reach it together."""
    if temperature == 0:
        return logps.argmax(-1)
    p = (logps / temperature).softmax(-1) if temperature != 1 else logps.exp()
    if top_p < 1:
        ordered, places = p.sort(-1, descending=True)
        ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= top_p, 0)
        p = torch.zeros_like(p).scatter_(-1, places, ordered)
    total = p.double().cumsum(-1)
    return torch.searchsorted(total, u[:, None] * total[:, -1:], right=True)[:, 0].clamp(max=logps.shape[1] - 1)


# --- vLLM ----------------------------------------------------------------------------------------


class EngineDied(RuntimeError):  # noqa: N818 - it says what happened
    """The engine's process is gone; what it had not given back is lost, and a new engine can be started."""


class Reloading:
    """What vLLM's workers can do in addition."""

    def take_weights(self: Any, directory: str) -> None:
        """Go on with the weights in a directory."""
        self.reload_weights(weights_path=directory)
        head: Any = getattr(self.model_runner.get_model(), "lm_head", None)
        if hasattr(head, "cpu_linear"):  # on a CPU, a head that is the embedding keeps a packed copy, which stays old
            from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

            dispatch_cpu_unquantized_gemm(head, remove_weight=False)


class VllmSampler:
    """See `pipelines.engines.Sampler`. The engine stays up while its weights, or its adapter, change.

    vLLM makes its own random numbers of a sample's seed: samples are not those of the other engine.
    """

    def __init__(self, llm: Any, end_of_turn: int, lora: bool = False):
        import vllm as library

        self.llm, self.end, self.version = llm, end_of_turn, f"vllm {library.__version__}"
        self._lora, self._updates = lora, 0
        self._adapter: Any = None
        self._lock = threading.Lock()  # two threads inside `LLM.generate` hang
        threading.Thread(target=_watch, args=(llm.llm_engine.engine_core,), daemon=True).start()

    def update(self, directory: str | Path | None) -> None:
        """Sample from now on from the weights in a directory: a whole model's, or an adapter's (None: without one)."""
        self._updates += 1
        if self._lora:
            from vllm.lora.request import LoRARequest

            name = f"update-{self._updates}"
            self._adapter = LoRARequest(name, self._updates, str(directory)) if directory else None
        else:
            with self._lock, _telling():
                self.llm.collective_rpc("take_weights", args=(str(directory),))
                self.llm.reset_prefix_cache()  # what it holds was computed by the weights before

    def close(self) -> None:
        """End the engine's process."""
        with suppress(Exception):  # it may be gone already
            self.llm.llm_engine.engine_core.shutdown()

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
        from vllm import SamplingParams, TokensPrompt

        def params(seed: int, j: int) -> Any:
            return SamplingParams(
                temperature=temperature,
                top_p=top_p,
                max_tokens=max_new_tokens,
                seed=_seed(seed, j),
                logprobs=0,  # of the token that was sampled alone; by default those before temperature and top-p
                stop_token_ids=[self.end],
                ignore_eos=True,
                detokenize=False,
            )

        asked = [(p, params(seed, j)) for p, seed in zip(prompts, seeds, strict=True) for j in range(n)]
        inputs = [TokensPrompt(prompt_token_ids=prompt) for prompt, _ in asked]
        with self._lock, _telling():
            outputs = self.llm.generate(inputs, [p for _, p in asked], use_tqdm=False, lora_request=self._adapter)
        sampled = [self._sampled(output.outputs[0]) for output in outputs]
        return [sampled[i : i + n] for i in range(0, len(sampled), n)]

    def _sampled(self, output: Any) -> Sampled:
        ids = list(output.token_ids)
        logps = [of[token].logprob for of, token in zip(output.logprobs, ids, strict=True)]
        return Sampled(ids, np.array(logps, np.float32), ids[-1] == self.end)


def _watch(core: Any) -> None:
    """Wait for the end of an engine's processes, and tell whoever waits for them: vLLM's own calls would wait on."""
    from vllm.v1.engine.exceptions import EngineDeadError

    manager = getattr(getattr(core, "resources", None), "engine_manager", None)
    if manager is None:  # it runs in this process
        return
    wait([process.sentinel for process in manager.processes])
    core.resources.engine_dead = True  # from now on calls raise
    core.outputs_queue.put(EngineDeadError())
    for future in list(core.utility_results.values()):
        with suppress(InvalidStateError):
            future.set_exception(EngineDeadError())


@contextmanager
def _telling() -> Iterator[None]:
    """vLLM's word for a dead engine as ours."""
    from vllm.v1.engine.exceptions import EngineDeadError

    try:
        yield
    except EngineDeadError as error:
        raise EngineDied("the process of vLLM's engine is gone") from error


def _seed(seed: int, sample: int) -> int:
    """The seed of a prompt's sample, 63 bits."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {sample}".encode(), digest_size=8).digest()) >> 1


# --- a server ------------------------------------------------------------------------------------

TRIES, AT_A_TIME, TIMEOUT = 5, 64, 600.0  # of a request; requests at once; seconds


class ServerSampler:
    """See `pipelines.engines.Sampler`: an OpenAI-compatible vLLM server, which sees this machine's directories.

    Weights are exchanged in a server that was started with VLLM_SERVER_DEV_MODE=1 and `--worker-extension-cls
    pipelines.engines.sampling.Reloading`; adapters in one with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 and `--enable-lora`.
    """

    version = "server"

    def __init__(self, url: str, model: str, end_of_turn: int, lora: bool = False, key: str = ""):
        self.url, self.model, self.end, self._lora, self._key = url.rstrip("/"), model, end_of_turn, lora, key
        self._named, self._adapters = model, 0

    def update(self, directory: str | Path | None) -> None:
        """Sample from now on from the weights in a directory: a whole model's, or an adapter's (None: without one)."""
        if not self._lora:
            root = self.url.removesuffix("/v1")
            where = str(Path(str(directory)).resolve())
            self._post(f"{root}/collective_rpc", {"method": "take_weights", "args": [where]})
            self._post(f"{root}/reset_prefix_cache", {})
            return
        if self._named != self.model:
            self._post(f"{self.url}/unload_lora_adapter", {"lora_name": self._named})
        self._named, self._adapters = self.model, self._adapters + 1
        if directory:
            name = f"una-{os.getpid()}-{self._adapters}"
            asked = {"lora_name": name, "lora_path": str(Path(directory).resolve())}
            self._post(f"{self.url}/load_lora_adapter", asked)
            self._named = name

    def close(self) -> None:
        """The server goes on without what this run put there."""
        if self._named != self.model:
            with suppress(EngineDied, UserError):
                self.update(None)

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
        def one(prompt: list[int], seed: int) -> Sampled:
            asked = {"model": self._named, "prompt": prompt, "temperature": temperature, "top_p": top_p, "seed": seed}
            asked |= {"max_tokens": max_new_tokens, "logprobs": 0, "return_token_ids": True}
            asked |= {"stop_token_ids": [self.end], "ignore_eos": True}
            choice = json.loads(self._post(f"{self.url}/completions", asked))["choices"][0]
            ids, logps = choice["token_ids"], np.array(choice["logprobs"]["token_logprobs"], np.float32)
            return Sampled(ids, logps, ids[-1] == self.end)

        asked = [(p, _seed(seed, j)) for p, seed in zip(prompts, seeds, strict=True) for j in range(n)]
        with ThreadPoolExecutor(AT_A_TIME) as pool:
            found = list(pool.map(lambda each: one(*each), asked))
        return [found[i : i + n] for i in range(0, len(found), n)]

    def _post(self, url: str, content: dict[str, Any]) -> bytes:
        """The answer's body; `EngineDied` when there is none after some tries, `UserError` when it is refused."""
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self._key}"}
        for attempt in range(TRIES):
            try:
                request = urllib.request.Request(url, json.dumps(content).encode(), headers)
                with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
                    return answer.read()
            except urllib.error.HTTPError as error:
                if error.code < 500 and error.code != 429:
                    said = error.read()[:300].decode(errors="replace")
                    raise UserError(f"{url}: the server refuses this ({error.code}): {said}") from None
                problem: Exception = error
            except (OSError, http.client.HTTPException) as error:
                problem = error
            time.sleep(2**attempt)
        raise EngineDied(f"{url}: no answer after {TRIES} tries ({problem})")


# --- loading -------------------------------------------------------------------------------------


def load_transformers(
    model: str, *, dtype: str, batch_tokens: int, max_length: int, end_of_turn: int, adapter: str | None
) -> TransformersSampler:
    """A model directory with a LoRA adapter's directory in it, onto the GPU if there is one, else the CPU."""
    return TransformersSampler(network(model, dtype, adapter).to(device_of("auto")), end_of_turn, batch_tokens)


def load_vllm(
    model: str, *, dtype: str, batch_tokens: int, max_length: int, end_of_turn: int, adapter: str | None
) -> VllmSampler:
    """vLLM on a local model directory; with an adapter, that adapter, which `update` exchanges."""
    options: dict[str, Any] = {}
    if adapter:
        options = {"enable_lora": True, "max_lora_rank": vllm.rank(adapter)}
    llm = vllm.start(
        model,
        dtype=dtype,
        max_model_len=max_length,
        max_num_batched_tokens=max(batch_tokens, max_length),
        enable_prefix_caching=True,  # the samples of a prompt share it
        generation_config="vllm",
        enforce_eager=not torch.cuda.is_available(),  # on a CPU, to compile takes a minute
        worker_extension_cls=f"{__name__}.{Reloading.__name__}",
        **options,
    )
    sampler = VllmSampler(llm, end_of_turn, lora=adapter is not None)
    if adapter:
        sampler.update(adapter)
    return sampler


def load_server(
    model: str, *, dtype: str, batch_tokens: int, max_length: int, end_of_turn: int, adapter: str | None
) -> ServerSampler:
    """The server of UNA_SERVER (http://HOST:PORT/v1), its key in UNA_SERVER_KEY; it samples the first of its models."""
    url, key = os.environ.get("UNA_SERVER", ""), os.environ.get("UNA_SERVER_KEY", "")
    if not url:
        raise UserError("engine server: set UNA_SERVER to the server's address, http://HOST:PORT/v1")
    asked = urllib.request.Request(f"{url.rstrip('/')}/models", headers={"Authorization": f"Bearer {key}"})
    try:
        with urllib.request.urlopen(asked, timeout=TIMEOUT) as answer:
            name = json.load(answer)["data"][0]["id"]
    except (OSError, ValueError, LookupError) as error:
        raise UserError(f"{url}: no OpenAI-compatible server answers here ({error})") from None
    sampler = ServerSampler(url, name, end_of_turn, adapter is not None, key)
    if adapter:
        sampler.update(adapter)
    return sampler


LOADERS = {"transformers": load_transformers, "vllm": load_vllm, "server": load_server}
