"""Whether an engine's log-probs are those of the model: a sample of rows, computed again by plain transformers.

In float32, one row at a time, by the model's own forward with its own attention: slow, and with nothing in it that an
engine does. What differs is reported per token and per sequence, by length of the response and by position in it. The
check runs before anything else is scored, so that a wrong engine costs nothing but the sample.
"""

import gc
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from schemas.errors import UserError

log = logging.getLogger(__name__)
BOUNDS = (1, 2, 5, 17, 65, 257, 1025)  # where classes of lengths and of positions (from 1) begin
WAY_OUT = "`--no-parity` scores regardless"


def tolerance(dtype: str, quantization: str | None) -> float:
    """Nats of mean |Δ| per token: bfloat16's rounding alone gives about 0.01 to 0.05, quantized weights more."""
    return 0.5 if quantization else 1e-3 if dtype == "float32" else 0.1


def check(
    network: Any, engine: Any, prompts: Sequence[list[int]], responses: Sequence[list[int]], limit: float, name: str
) -> dict[str, Any]:
    """The report on these rows; `UserError` when the mean |Δ| per token is above `limit`, or no number.

    `network()` loads the model in float32 and `engine()` the engine, so that the first is gone when the second comes.
    """
    expected = plain(network, prompts, responses)
    found = engine().score(list(prompts), list(responses))
    pairs = [(a, b) for a, b in zip(found, expected, strict=True) if isinstance(a, np.ndarray)]
    if not pairs:
        raise UserError(f"parity: {name} scored none of {len(found)} rows, the first because of: {found[0]}")
    made = report(*zip(*pairs, strict=True))
    log.info(
        "parity with plain transformers in float32 on %d rows: |Δ| mean %.2g, max %.2g nats per token",
        *(made["rows"], made["mean"], made["max"]),
    )
    if not made["mean"] <= limit:  # NaN too
        worst = max(made["by_position"], key=lambda one: one["mean"])
        raise UserError(
            f"parity: {name} differs from plain transformers in float32 by {made['mean']:.3g} nats per token on "
            f"average over {made['rows']} rows (tolerance {limit:g}; at most {made['max']:.3g}, worst at positions "
            f"{worst['from']} to {worst['to'] or 'the end'} of responses). Nothing was scored. See that the engine has "
            f"this model, dtype and adapter, or raise --parity-tolerance; {WAY_OUT}"
        )
    return {**made, "tolerance": limit}


def plain(network: Any, prompts: Sequence[list[int]], responses: Sequence[list[int]]) -> list[np.ndarray]:
    """Log-probs of responses, in float64 from float32 logits, one row at a time."""
    import torch  # here and below: what only reads rows of a reference does without

    model = network().eval()
    device = _roomy(model)
    try:
        model.to(device)
        return [_row(model, p, r, device) for p, r in zip(prompts, responses, strict=True)]
    except torch.OutOfMemoryError:
        log.warning("parity: too little memory on %s, so it is computed on the CPU", device)
        model.to("cpu")
        return [_row(model, p, r, "cpu") for p, r in zip(prompts, responses, strict=True)]
    finally:
        del model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _roomy(model: Any) -> str:
    """A GPU that the model fits into with something to spare, else the CPU."""
    import torch

    needed = 1.2 * sum(p.numel() * p.element_size() for p in model.parameters())
    return "cuda" if torch.cuda.is_available() and torch.cuda.mem_get_info()[0] > needed else "cpu"


def _row(model: Any, prompt: list[int], response: list[int], device: str) -> np.ndarray:
    import torch

    ids = torch.tensor([prompt + response[:-1]], device=device)
    with torch.inference_mode():
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=len(response)).logits[0, -len(response) :]
    target = torch.tensor(response, device=device)
    some = zip(logits.split(64), target.split(64), strict=True)
    logps = [torch.log_softmax(z.double(), -1).gather(1, t[:, None])[:, 0] for z, t in some]
    return torch.cat(logps).cpu().numpy()


def report(found: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> dict[str, Any]:
    """|Δ| in nats: of tokens and of sums over a sequence, in all, by response length and by position."""
    apart = [np.abs(a.astype(np.float64) - b) for a, b in zip(found, expected, strict=True)]
    sums = [float(abs(a.sum(dtype=np.float64) - b.sum())) for a, b in zip(found, expected, strict=True)]
    lengths = np.array([len(one) for one in apart])
    tokens, positions = np.concatenate(apart), np.concatenate([np.arange(1, n + 1) for n in lengths])
    of_token = np.repeat(lengths, lengths)
    return {
        "rows": len(apart),
        "tokens": len(tokens),
        **_told(tokens),
        "sequence_mean": _short(np.mean(sums)),
        "sequence_max": _short(np.max(sums)),
        "by_length": _classes(tokens, of_token, sums, lengths),
        "by_position": _classes(tokens, positions),
    }


def _classes(apart: np.ndarray, where: np.ndarray, sums: Any = None, rows: Any = None) -> list[dict[str, Any]]:
    made = []
    for low, high in zip(BOUNDS, [*BOUNDS[1:], None], strict=True):
        inside = (where >= low) & (where < (high or np.inf))
        if not inside.any():
            continue
        one = {"from": low, "to": high and high - 1, "tokens": int(inside.sum()), **_told(apart[inside])}
        if sums is not None:
            of = np.array(sums)[(rows >= low) & (rows < (high or np.inf))]
            one |= {"rows": len(of), "sequence_mean": _short(of.mean()), "sequence_max": _short(of.max())}
        made.append(one)
    return made


def _told(apart: np.ndarray) -> dict[str, float]:
    return {"mean": _short(apart.mean()), "max": _short(apart.max())}


def _short(value: Any) -> float:
    return float(f"{value:.2g}")
