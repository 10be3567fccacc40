"""A round's responses: what is sampled, rewarded and scored, as a file that people read and runs continue from.

Shapes: R responses of a round.
"""

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.engines import Sampled
from una_train import data
from una_train.config import OnlineConfig
from una_train.data import Flat, Split

SOURCE = "online"
_tokens = pa.list_(pa.int32())
_logps = pa.list_(pa.float32())
SAMPLES = pa.schema(
    [
        ("round", pa.int32()),
        ("prompt", pa.string()),  # its messages, as JSON
        ("prompt_place", pa.int64()),  # its place among the run's prompts
        ("response", pa.string()),
        ("reward", pa.float64()),  # null: none, and `why` says why
        ("raw_reward", pa.float64()),
        ("held_out_reward", pa.float64()),
        ("kl", pa.float64()),  # log π(y|x) when it was sampled − log π_ref(y|x), nats
        ("finished", pa.bool_()),
        ("why", pa.string()),
        ("response_ids", _tokens),
        ("sampled_logps", _logps),  # nats
        ("ref_logps", _logps),  # nats
        ("ref_rewards", pa.list_(pa.float64())),
    ]
)


@dataclass
class Round:
    """Lists of R entries; what is not known yet is empty."""

    number: int
    places: list[int] = field(default_factory=list)  # of each response's prompt among the run's
    sampled: list[Sampled] = field(default_factory=list)
    responses: list[str] = field(default_factory=list)
    raw: np.ndarray = field(default_factory=lambda: np.empty(0))  # NaN: none
    rewards: np.ndarray = field(default_factory=lambda: np.empty(0))  # in [0, 1]; NaN: not trained on
    held_out: np.ndarray = field(default_factory=lambda: np.empty(0))
    why: list[str | None] = field(default_factory=list)  # what was decided about the response, if anything
    ref_logps: list[np.ndarray] = field(default_factory=list)
    ref_rewards: list[np.ndarray] = field(default_factory=list)  # of reference samples of the response's prompt

    @property
    def kl(self) -> np.ndarray:
        """log π(y|x) as sampled − log π_ref(y|x), nats [R]."""
        return np.array([_sum(s.logps) - _sum(ref) for s, ref in zip(self.sampled, self.ref_logps, strict=True)])


def _sum(logps: np.ndarray) -> float:
    return float(logps.astype(np.float64).sum())


# --- files ---------------------------------------------------------------------------------------


def write(path: Path, of: Round, prompts: Sequence[str]) -> None:
    """The round as parquet, renamed into its place when it is whole; `prompts`: JSON texts of the run's prompts."""
    n = len(of.places)
    none: list[Any] = [None] * n
    columns: dict[str, Any] = {
        "round": [of.number] * n,
        "prompt": [prompts[i] for i in of.places],
        "prompt_place": of.places,
        "response": of.responses,
        "reward": _nullable(of.rewards, n),
        "raw_reward": _nullable(of.raw, n),
        "held_out_reward": _nullable(of.held_out, n),
        "kl": of.kl.tolist() if of.ref_logps else none,
        "finished": [s.finished for s in of.sampled],
        "why": of.why or none,
        "response_ids": [s.ids for s in of.sampled],
        "sampled_logps": [s.logps for s in of.sampled],
        "ref_logps": of.ref_logps or none,
        "ref_rewards": of.ref_rewards or none,
    }
    arrays = [pa.array(columns[f.name], f.type) for f in SAMPLES]
    temp = path.with_name(f".{path.name}")
    pq.write_table(pa.Table.from_arrays(arrays, schema=SAMPLES), temp, compression="zstd")
    os.replace(temp, path)


def _nullable(values: np.ndarray, n: int) -> pa.Array | list[None]:
    return pa.array(values, from_pandas=True) if len(values) else [None] * n


def read(path: Path) -> Round:
    """The round that `write` wrote, to the last bit."""
    rows = pq.read_table(path)
    columns = {name: rows[name].to_pylist() for name in ("prompt_place", "response", "finished", "why")}
    ids, logps = _lists(rows["response_ids"]), _lists(rows["sampled_logps"])
    sampled = [Sampled(i.tolist(), of, end) for i, of, end in zip(ids, logps, columns["finished"], strict=True)]
    known = not rows["ref_logps"].null_count
    return Round(
        number=rows["round"][0].as_py() if rows.num_rows else 0,
        places=columns["prompt_place"],
        sampled=sampled,
        responses=columns["response"],
        raw=rows["raw_reward"].to_numpy(),
        rewards=rows["reward"].to_numpy(),
        held_out=rows["held_out_reward"].to_numpy(),
        why=columns["why"],
        ref_logps=_lists(rows["ref_logps"]) if known else [],
        ref_rewards=[] if rows["ref_rewards"].null_count else _lists(rows["ref_rewards"]),
    )


def _lists(column: pa.ChunkedArray) -> list[np.ndarray]:
    lists = column.combine_chunks()
    values, starts = lists.values.to_numpy(zero_copy_only=False), lists.offsets.to_numpy()
    return [values[a:b] for a, b in pairwise(starts)]


def merged(parts: Sequence[Round]) -> Round:
    """Parts of a round that were sampled one after the other."""
    return Round(
        parts[0].number,
        [place for part in parts for place in part.places],
        [one for part in parts for one in part.sampled],
        [text for part in parts for text in part.responses],
    )


# --- what is trained on --------------------------------------------------------------------------


def split_of(of: Round, prompt_ids: Sequence[list[int]], config: OnlineConfig) -> Split:
    """The rewarded responses as scalar rows, those of a prompt adjacent; log π_ref is 0 where it is not known yet."""
    rows = np.flatnonzero(np.isfinite(of.rewards)).tolist()
    prompts = [prompt_ids[of.places[i]] for i in rows]
    responses = [of.sampled[i].ids for i in rows]
    logps = [of.ref_logps[i] if of.ref_logps else np.zeros(len(of.sampled[i].ids), np.float32) for i in rows]
    index = pa.table(
        {
            "prompt_id": pa.array([str(of.places[i]) for i in rows], pa.string()),
            "comparison_id": pa.nulls(len(rows), pa.string()),
        }
    )
    groups, starts = data.groups_of(index, max(config.bundle_rows, config.samples_per_prompt))
    return Split(
        files=[],
        prompts=_flat(prompts, np.int32),
        responses=_flat(responses, np.int32),
        ref_logps=_flat(logps, np.float32),
        rewards=of.rewards[rows],
        types=np.full(len(rows), data.TYPES.index("scalar"), np.int8),
        sources=np.zeros(len(rows), np.int32),
        source_names=[SOURCE],
        group_rows=groups,
        bundle_starts=starts,
        ref_rewards=_flat([of.ref_rewards[i] for i in rows], np.float64) if of.ref_rewards else None,
        lone=lone(groups[:, 0], starts, responses),
    )


def rewarded(of: Round) -> np.ndarray:
    """Which responses become rows of `split_of`, in its order."""
    return np.flatnonzero(np.isfinite(of.rewards))


def lone(first: np.ndarray, starts: np.ndarray, responses: Sequence[list[int]]) -> np.ndarray:
    """Rows [R] whose prompt has no other response that differs, so that no offset can be made of its group."""
    found = np.zeros(len(responses), bool)
    for a, b in pairwise(starts):
        rows = first[a:b]
        found[rows] = len({tuple(responses[row]) for row in rows}) < 2
    return found


def _flat(rows: Sequence[Any], kind: Any) -> Flat:
    values = np.concatenate([np.zeros(0, kind), *(np.asarray(row, kind) for row in rows)])
    return Flat(values, np.array([len(row) for row in rows], np.int64))


# --- what is told of a round ---------------------------------------------------------------------


def facts(of: Round) -> dict[str, Any]:
    """Means over the round's responses; `kl` in nats per response, `repetition` the share of 4-grams that came before
    in their response, `distinct` the share of different responses."""
    known, tokens = of.rewards[np.isfinite(of.rewards)], np.array([len(s.ids) for s in of.sampled])
    kl, held_out = of.kl, of.held_out[np.isfinite(of.held_out)]
    raw = of.raw[np.isfinite(of.raw)]
    return {
        "responses": len(of.places),
        "reward": _mean(known),
        "reward_deviation": float(known.std()) if len(known) else None,
        "reward_error": float(known.std() / np.sqrt(len(known))) if len(known) else None,
        "raw_reward": _mean(raw),
        "held_out_reward": _mean(held_out),
        "held_out_error": float(held_out.std() / np.sqrt(len(held_out))) if len(held_out) else None,
        "kl": float(kl.mean()),
        "kl_per_token": float(kl.sum() / tokens.sum()),
        "length": float(tokens.mean()),
        "finished": float(np.mean([s.finished for s in of.sampled])),
        "repetition": float(np.mean([repetition(s.ids) for s in of.sampled])),
        "distinct": len({(p, tuple(s.ids)) for p, s in zip(of.places, of.sampled, strict=True)}) / len(of.places),
        "decided": dict(sorted(Counter(why for why in of.why if why).items())),
    }


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None


def repetition(ids: Sequence[int], n: int = 4) -> float:
    """Share of a response's n-grams that it has held before."""
    grams = list(zip(*(ids[i:] for i in range(n)), strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def prompt_texts(prompts: Sequence[Any]) -> list[str]:
    """Each prompt's messages as JSON."""
    return [json.dumps(one.messages, ensure_ascii=False) for one in prompts]
