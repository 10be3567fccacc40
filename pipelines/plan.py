"""Which shard a row belongs to, by its prompt, and the pieces of files that a shard is put together from."""

import dataclasses
from itertools import pairwise

import numpy as np
import pyarrow as pa

from pipelines import io

PIECES_BYTES = 32 << 20  # of rows that wait to be written to all pieces of a file
Shard = tuple[str, int]  # split, number within it


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which share of the prompts each split gets, and how many shards it has."""

    splits: tuple[tuple[str, float], ...]
    shards: tuple[int, ...]

    def assign(self, prompt_ids: pa.ChunkedArray) -> np.ndarray:
        """The shard of every row, numbered over all splits: the id's first 64 bits say where it falls in [0, 1)."""
        high, low = _numbers(prompt_ids).T
        bounds = np.cumsum([share for _, share in self.splits])
        split = np.minimum(np.searchsorted(bounds, high / 2.0**64, side="right"), len(self.splits) - 1)
        count = np.array(self.shards, dtype=np.uint64)[split]
        return np.concatenate([[0], np.cumsum(self.shards)])[split] + (low % count).astype(np.int64)

    def name(self, shard: int) -> Shard:
        split = int(np.searchsorted(np.cumsum(self.shards), shard, side="right"))
        return self.splits[split][0], shard - sum(self.shards[:split])


_VALUES = np.zeros(256, np.uint8)
_VALUES[np.frombuffer(b"0123456789abcdef", np.uint8)] = np.arange(16)


def _numbers(ids: pa.ChunkedArray) -> np.ndarray:
    """Ids of 32 hex digits as two 64-bit numbers [n, 2]."""
    text = np.frombuffer(b"".join(ids.cast(pa.binary()).to_pylist()), np.uint8)
    digits = _VALUES[text].reshape(-1, 2)
    return (digits[:, 0] << 4 | digits[:, 1]).reshape(-1, 16).view(">u8").astype(np.uint64)


class Pieces:
    """A part file for each shard, for this run only; within one, rows keep their order."""

    def __init__(self, path: str, plan: Plan, schema: pa.Schema):
        self.path, self.plan, self.schema = path, plan, schema
        self._pieces: dict[int, io.ScratchWriter] = {}

    def write(self, rows: pa.Table) -> None:
        shard = self.plan.assign(rows["prompt_id"])
        rows = rows.take(pa.array(np.argsort(shard, kind="stable")))
        numbers, firsts = np.unique(np.sort(shard), return_index=True)
        for s, (start, stop) in zip(numbers.tolist(), pairwise([*firsts.tolist(), len(shard)]), strict=True):
            if s not in self._pieces:
                path, small = f"{self.path}-{s:06d}.piece.arrow", PIECES_BYTES // sum(self.plan.shards)
                self._pieces[s] = io.ScratchWriter(path, self.schema, small)
            self._pieces[s].write(rows.slice(start, stop - start))

    def close(self) -> list[tuple[int, str]]:
        """The shard and path of each piece."""
        for piece in self._pieces.values():
            piece.close()
        return [(s, piece.path) for s, piece in sorted(self._pieces.items())]
