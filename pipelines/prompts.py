"""Prompts that responses are to be sampled to: out of files of prompts, and out of dataset directories.

A record's prompt is its `prompt` (a text, or messages), its `messages` or `conversations` up to the last turn of the
user, or its `instruction` (and `input`) or `question`; all else that it holds is metadata, which rules may ask for. A
dataset gives each of its prompts once. Nothing here knows Beam or models.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines import dataset, io, readers
from pipelines.converters import messages
from pipelines.labellers.rows import ABOUT, BEFORE, metadata_of
from schemas.errors import Reject, UserError
from schemas.feedback import Message, prompt_id
from schemas.manifest import NAME

NAMES = ("prompt", "messages", "conversations", "instruction", "question")


@dataclass(frozen=True)
class Prompt:
    """A conversation that ends where the assistant is to speak."""

    messages: list[Message]
    metadata: dict[str, Any]
    id: str  # `prompt_id`
    place: int  # its number in the file, from 1


@dataclass(frozen=True)
class Refused:
    """A record without a prompt that could be used."""

    place: int
    why: Reject
    payload: bytes


def read(path: str) -> Iterator[Prompt | Refused]:
    """The distinct prompts of a file or a dataset directory, in order, and what is none."""
    seen: set[str] = set()
    for found in _of_dataset(path) if is_dataset(path) else _of_files(path):
        if isinstance(found, Refused) or found.id not in seen:
            yield found
        if isinstance(found, Prompt):
            seen.add(found.id)


def usable(path: str) -> tuple[list[Prompt], Counter[str]]:
    """The prompts, and how many records were none for which reason; `UserError` where no prompt is left."""
    prompts, reasons, first = [], Counter[str](), ""
    for one in read(path):
        if isinstance(one, Prompt):
            prompts.append(one)
            continue
        reasons[one.why.reason] += 1
        first = first or f"; the first, record {one.place}: {one.why.reason} ({one.why.detail})"
    if not prompts:
        raise UserError(f"{path}: no prompt that could be used, of {reasons.total()} records{first}")
    return prompts, reasons


def is_dataset(path: str) -> bool:
    return io.exists(f"{path.rstrip('/')}/{NAME}")


def _of_dataset(directory: str) -> Iterator[Prompt]:
    place = 0
    for path in dataset.data_files(directory, dataset.read_manifest(directory)):
        with io.open_parquet(path) as file:
            for batch in file.iter_batches(columns=["prompt", "prompt_id", "metadata"]):
                columns = (batch[name].to_pylist() for name in ("prompt", "prompt_id", "metadata"))
                for turns, name, metadata in zip(*columns, strict=True):
                    place += 1
                    about = {k: v for k, v in metadata_of(metadata).items() if k not in (BEFORE, ABOUT, "sampled")}
                    yield Prompt(turns, about, name, place)


def _of_files(path: str) -> Iterator[Prompt | Refused]:
    for place, raw in records(path):
        try:
            yield _prompt(raw, place)
        except Reject as why:
            yield Refused(place, why, raw.payload)


def records(path: str) -> Iterator[tuple[int, readers.Raw]]:
    """The records of a file, or of all files of a directory or a pattern, with their numbers, from 1."""
    before = 0
    for file in io.expand([path]):
        if Path(file).suffix == ".txt":
            found: Iterator[readers.Raw] = _lines(file)
        else:
            _, ranges = readers.survey(file, readers.kind_of(file))
            found = (raw for part in ranges for raw in readers.records(part))
        last = 0
        for raw in found:
            last = raw.position
            yield before + raw.position, raw
        before += last


def _lines(path: str) -> Iterator[readers.Raw]:
    with io.open_bytes(path) as file:
        for i, line in enumerate(file, 1):
            if line.strip():
                text = line.decode("utf-8", "surrogateescape").rstrip("\r\n")
                yield readers.Raw(i, line, {"prompt": text})


def _prompt(raw: readers.Raw, place: int) -> Prompt:
    record = raw.value
    if isinstance(record, Reject):
        raise record
    if isinstance(record, str):
        record = {"prompt": record}
    record = messages.structure(record, "the record")
    name = next((name for name in NAMES if record.get(name) is not None), None)
    if name is None:
        raise Reject("missing_field", f"none of {', '.join(NAMES)} in a record of {', '.join(map(str, record))[:100]}")
    turns = messages.with_system(record, opening(record, name))
    check(turns)
    about = {key: value for key, value in record.items() if key not in (name, *NAMES[:3], *messages.SYSTEM)}
    return Prompt(turns, about, prompt_id(turns), place)


def opening(record: dict[str, Any], name: str) -> list[Message]:
    """The conversation of a record's field up to the last turn of the user."""
    value = record[name]
    if isinstance(value, str) and value.lstrip().startswith("[{"):  # a table's cell
        value = messages.listed(value, name)
    if name == "instruction" and (given := record.get("input")):
        value = "\n".join(messages.text(one, name) for one in (value, given))
    turns = messages.conversation(value, name)
    while turns and turns[-1]["role"] == "assistant":  # what was answered then
        turns = turns[:-1]
    return turns


def check(turns: list[Message]) -> None:
    """`Reject` a prompt without any text, or with text that cannot be written."""
    if not any(turn["content"].strip() or turn.get("tool_calls") for turn in turns):
        raise Reject("empty_prompt", "the prompt has no text")
    for turn in turns:
        try:
            (turn["content"] + (turn.get("tool_calls") or "")).encode()
        except UnicodeEncodeError as error:
            raise Reject("invalid_unicode", f"not UTF-8, or a lone surrogate, at character {error.start}") from None
