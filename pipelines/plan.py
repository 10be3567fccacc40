"""Which shard a row belongs to, by its prompt, and the pieces of files that a shard is put together from."""

import dataclasses
from itertools import pairwise

import numpy as np
import pyarrow as pa

from pipelines import io

PIECE_BYTES = 256 << 10  # of rows for one shard that are written together, on average
WAITING_BYTES = (32 << 20, 256 << 20)  # of rows that wait to be cut: least, for few shards, and most, for many
Shard = tuple[str, int]  # split, number within it
Piece = tuple[str, list[int]]  # a scratch file, and the numbers of its batches that are of one shard


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
    """One scratch file with batches of rows for every shard; within a shard, rows keep their order.

    A file for each shard would be millions of them in all, thousands open at once, and of a few kilobytes.
    """

    def __init__(self, path: str, plan: Plan, schema: pa.Schema):
        self.plan, self._file = plan, io.ScratchWriter(f"{path}.pieces.arrow", schema)
        least, most = WAITING_BYTES
        self._enough = min(max(least, sum(plan.shards) * PIECE_BYTES), most)
        self._waiting: list[pa.Table] = []
        self._bytes = self._batches = 0
        self._of_shard: dict[int, list[int]] = {}

    def write(self, rows: pa.Table) -> None:
        self._waiting.append(rows)
        self._bytes += rows.nbytes
        if self._bytes >= self._enough:
            self._cut()

    def _cut(self) -> None:
        rows = pa.concat_tables(self._waiting)
        self._waiting, self._bytes = [], 0
        shard = self.plan.assign(rows["prompt_id"])
        rows = rows.take(pa.array(np.argsort(shard, kind="stable")))
        numbers, firsts = np.unique(np.sort(shard), return_index=True)
        for s, (start, stop) in zip(numbers.tolist(), pairwise([*firsts.tolist(), len(shard)]), strict=True):
            self._file.write(rows.slice(start, stop - start))
            self._of_shard.setdefault(s, []).append(self._batches)
            self._batches += 1

    def close(self) -> list[tuple[int, Piece]]:
        """The shard and place of each piece."""
        if self._waiting:
            self._cut()
        self._file.close()
        return [(s, (self._file.path, batches)) for s, batches in sorted(self._of_shard.items())]


def read(piece: Piece) -> pa.Table:
    """The rows of a piece."""
    path, batches = piece
    with io.open_scratch(path) as file:
        return pa.Table.from_batches([file.get_batch(i) for i in batches])
