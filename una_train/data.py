"""A published dataset as steps of micro-batches: parquet → groups → order → ranks → padded tensors.

A group is what one loss is computed on: the two rows of a comparison, or one other row. Which groups make up a
step depends on the seed and the step alone, so a run continues by counting. Token ids stay in Arrow, a few bytes
per token, in every process's memory; streaming is left out.

Shapes: B rows, T tokens, N response tokens, G groups of a micro-batch.
"""

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from jaxtyping import Bool, Float32, Float64, Int64
from torch import Tensor

from schemas import feedback
from schemas.errors import UserError

Group = tuple[int, ...]  # row numbers: two of a comparison, or one
COLUMNS = [
    "id", "type", "source", "prompt_id", "comparison_id", "reward",
    "prompt_ids", "response_ids", "ref_logps", "ref_logp",
]  # fmt: skip


@dataclass(frozen=True)
class Split:
    """One split in memory: the columns the trainer uses, and the groups its rows form."""

    rows: pa.Table
    groups: list[Group]
    lengths: np.ndarray  # int64, tokens of prompt and response
    types: list[str]
    rewards: np.ndarray  # float64


@dataclass(frozen=True)
class Batch:
    """A padded micro-batch; the rows of a group stand next to each other."""

    input_ids: Int64[Tensor, "B T"]
    predicts: Bool[Tensor, "B T"]  # positions whose logits predict a response token
    targets: Int64[Tensor, " N"]
    lengths: list[int]  # response tokens of each row
    ref_logps: Float32[Tensor, " N"]
    rewards: Float64[Tensor, " B"]
    first: Int64[Tensor, " G"]  # the first row of each group
    types: list[str]  # of each group

    def to(self, device: torch.device) -> "Batch":
        moved = {k: v.to(device, non_blocking=True) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return Batch(**{**vars(self), **moved})


# --- reading -----------------------------------------------------------------------------------


def read(dataset: Path, split: str) -> Split | None:
    """The split's checked rows; None without such files; `UserError` when the rows cannot be trained on."""
    named = re.compile(rf"{re.escape(split)}-\d{{5}}-of-(\d{{5}})\.parquet")
    files = sorted(p for p in (dataset / "data").glob(f"{split}-*.parquet") if named.fullmatch(p.name))
    if not files:
        return None
    if {int(named.fullmatch(p.name)[1]) for p in files} != {len(files)}:  # type: ignore[index]
        raise UserError(
            f"{dataset}/data: {len(files)} files of split {split}, not the number in their names; copy it anew"
        )
    rows = pa.concat_tables([_read_file(file) for file in files])
    try:
        feedback.check_comparisons(rows)
    except ValueError as error:
        raise UserError(f"{dataset} ({split} split): {error}; publish the dataset again") from None
    tokens = [pc.list_value_length(rows[name]).to_numpy() for name in ("prompt_ids", "response_ids")]
    lengths = (tokens[0] + tokens[1]).astype(np.int64)
    rewards = rows["reward"].to_numpy().astype(np.float64)
    return Split(rows, _groups(rows), lengths, rows["type"].to_pylist(), rewards)


def _read_file(path: Path) -> pa.Table:
    """Read and check in batches, so that the texts are never in memory together."""
    try:
        file = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise UserError(f"{path}: not readable as parquet ({error}); publish the dataset again") from None
    missing = [field.name for field in feedback.REFERENCE_COLUMNS if field.name not in file.schema_arrow.names]
    if missing:
        raise UserError(f"{path}: no reference log-probs (missing {', '.join(missing)}); run `una reference` first")
    kept = [feedback.SCORED.empty_table().select(COLUMNS)]
    for batch in file.iter_batches(batch_size=16384):
        kept.append(_checked(pa.Table.from_batches([batch]), path))
    return pa.concat_tables(kept)


def _checked(rows: pa.Table, path: Path) -> pa.Table:
    if unlabelled := pc.sum(pc.equal(rows["type"], "unlabelled")).as_py():
        raise UserError(f"{path}: {unlabelled} rows have no reward (type unlabelled); run `una label` first")
    try:
        feedback.check(rows, scored=True)
    except ValueError as error:
        raise UserError(f"{path}: {error}; publish the dataset again") from None
    return rows.select(COLUMNS)


def _groups(rows: pa.Table) -> list[Group]:
    """Groups in the order of their first row; `check_comparisons` has seen to it that pairs are pairs."""
    waiting: dict[str, int] = {}
    groups: list[Group] = []
    for row, comparison in enumerate(rows["comparison_id"].to_pylist()):
        if comparison is None:
            groups.append((row,))
        elif comparison in waiting:
            groups.append((waiting.pop(comparison), row))
        else:
            waiting[comparison] = row
    return groups


# --- order and packing -------------------------------------------------------------------------


def steps_per_epoch(groups: int, batch_size: int) -> int:
    """The last step of an epoch may be smaller."""
    return -(-groups // batch_size)


def step_groups(groups: Sequence[Group], batch_size: int, seed: int, step: int) -> list[Group]:
    """The groups of `step` (counted from 1): a function of the seed and the step, so nothing needs saving."""
    epoch, position = divmod(step - 1, steps_per_epoch(len(groups), batch_size))
    return [groups[i] for i in _order(len(groups), seed, epoch)[position * batch_size : (position + 1) * batch_size]]


@functools.lru_cache(maxsize=2)
def _order(groups: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(groups)


def micro_batches(groups: Sequence[Group], lengths: np.ndarray, budget: int) -> list[list[Group]]:
    """Groups of similar length together, so that rows × longest row is at most `budget` tokens.

    A group longer than the budget is alone.
    """
    packed: list[list[Group]] = []
    rows, longest = 0, 0
    for group in sorted(groups, key=lambda g: (-max(lengths[i] for i in g), g)):
        if not packed or (rows + len(group)) * longest > budget:
            packed.append([])
            rows, longest = 0, max(lengths[i] for i in group)
        packed[-1].append(group)
        rows += len(group)
    return packed


def share(groups: Sequence[Group], lengths: np.ndarray, rank: int, world: int) -> list[Group]:
    """This rank's part of a step, dealt out by length so that every rank has about as many tokens."""
    return sorted(groups, key=lambda g: (-max(lengths[i] for i in g), g))[rank::world]


def collate(split: Split, groups: Sequence[Group]) -> Batch:
    """Right-padded tensors of some groups; the last token of a row is predicted but never fed."""
    order = [row for group in groups for row in group]
    prompts = [_ints(split.rows["prompt_ids"], row) for row in order]
    responses = [_ints(split.rows["response_ids"], row) for row in order]
    width = max(split.lengths[row] for row in order) - 1
    input_ids = torch.zeros(len(order), width, dtype=torch.int64)
    predicts = torch.zeros(len(order), width, dtype=torch.bool)
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        fed = np.concatenate([prompt, response])[:-1]
        input_ids[i, : len(fed)] = torch.from_numpy(fed)
        predicts[i, len(prompt) - 1 : len(fed)] = True
    starts = np.cumsum([0] + [len(group) for group in groups])[:-1]
    return Batch(
        input_ids=input_ids,
        predicts=predicts,
        targets=torch.from_numpy(np.concatenate(responses)),
        lengths=[len(response) for response in responses],
        ref_logps=torch.from_numpy(np.concatenate([split.rows["ref_logps"][row].values.to_numpy() for row in order])),
        rewards=torch.from_numpy(split.rewards[order]),
        first=torch.from_numpy(starts),
        types=[split.types[group[0]] for group in groups],
    )


def _ints(column: pa.ChunkedArray, row: int) -> np.ndarray:
    return column[row].values.to_numpy().astype(np.int64)
