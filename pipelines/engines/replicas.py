"""Several copies of an engine, each in a process of its own that sees GPUs of its own."""

import multiprocessing
import os
import traceback
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from schemas.errors import UserError


class Replicas:
    """See `pipelines.engines.Engine`. A batch is shared out by tokens, in order, and each copy scores its part."""

    def __init__(self, name: str, model: str, copies: int, gpus: int, given: dict[str, Any]):
        visible = [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
        visible = visible or [str(i) for i in range(copies * gpus)]
        if len(visible) < copies * gpus:
            raise UserError(
                f"--data-parallel {copies}: needs {copies * gpus} GPUs, and CUDA_VISIBLE_DEVICES names {len(visible)}"
            )
        self._workers = [
            _Worker(name, model, given, ",".join(visible[i * gpus : (i + 1) * gpus])) for i in range(copies)
        ]
        self._threads = ThreadPoolExecutor(copies)
        self.version: str = list(self._threads.map(_Worker.answer, self._workers)).pop()

    def cut(self, prompts: Sequence[list[int]], responses: Sequence[list[int]]) -> list[list[int]]:
        batches = self._workers[0].ask("cut", prompts, responses)
        k = len(self._workers)
        return [[i for batch in batches[at : at + k] for i in batch] for at in range(0, len(batches), k)]

    def score(self, prompts: Sequence[list[int]], responses: Sequence[list[int]]) -> list[np.ndarray]:
        ends = np.cumsum([len(p) + len(r) for p, r in zip(prompts, responses, strict=True)])
        shares = np.linspace(0, ends[-1], len(self._workers) + 1)[1:-1]
        cuts = [0, *np.searchsorted(ends, shares).tolist(), len(prompts)]

        def part(worker: _Worker, start: int, stop: int) -> list[np.ndarray]:
            return worker.ask("score", prompts[start:stop], responses[start:stop]) if start < stop else []

        parts = self._threads.map(part, self._workers, cuts[:-1], cuts[1:])
        return [one for part in parts for one in part]


class _Worker:
    def __init__(self, name: str, model: str, given: dict[str, Any], gpus: str):
        context = multiprocessing.get_context("spawn")  # a fork would inherit CUDA's state, which is not allowed
        self._pipe, there = context.Pipe()
        # not a daemon: vLLM has processes of its own. It ends when the pipe closes
        self._process = context.Process(target=_serve, args=(there, name, model, given, gpus))
        self._process.start()
        there.close()

    def ask(self, method: str, prompts: Sequence[list[int]], responses: Sequence[list[int]]) -> Any:
        self._pipe.send((method, list(prompts), list(responses)))
        return self.answer()

    def answer(self) -> Any:
        try:
            good, value = self._pipe.recv()
        except EOFError:
            raise UserError("--data-parallel: a copy of the engine has ended; see what it said above") from None
        if not good:
            raise value
        return value

    def __del__(self) -> None:
        self._pipe.close()


def _serve(pipe: Any, name: str, model: str, given: dict[str, Any], gpus: str) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = gpus
    from pipelines import engines

    try:
        engine = engines.load(name, model, **given)
        pipe.send((True, engine.version))
        while True:
            method, prompts, responses = pipe.recv()
            try:
                pipe.send((True, getattr(engine, method)(prompts, responses)))
            except UserError as error:
                pipe.send((False, error))
            except Exception as error:
                pipe.send((False, RuntimeError(f"{type(error).__name__}: {error}")))
    except UserError as error:
        pipe.send((False, error))
    except EOFError:  # nobody asks any more
        pass
    except Exception:
        pipe.send((False, UserError(traceback.format_exc().strip().splitlines()[-1])))
