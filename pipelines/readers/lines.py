"""JSON lines, one record at a time or, where they hold texts alone, by column."""

import codecs
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, BinaryIO

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.json as pa_json

from pipelines import io
from pipelines.readers import base
from pipelines.readers.base import Range, Raw, Texts, parse

TEXTS_BYTES = 4 << 20  # read at a time where records are read by column
TEXTS_LINES = 16  # fewer are quicker read one by one
_OPEN, _CLOSE, _RETURN = b"{}\r"


def read(of: Range, names: Sequence[str] = ()) -> Iterator[Any]:
    """One record a line, or `Texts`. Only a newline ends a line: U+2028 and its like stand within strings."""
    with io.open_bytes(of.path) as file:
        position = of.first
        for size, buffer, end in _blocks(file, of.start, of.stop, TEXTS_BYTES if names else base.CHUNK_BYTES):
            if size:
                yield Raw(position, bytes(buffer), base.too_long(size))
                position += 1
            elif names and (found := _columns(buffer, end, names)):
                columns, ends = found
                yield Texts(columns, partial(_line, buffer, ends, position))
                position += len(ends)
            else:
                lines = bytes(memoryview(buffer)[:end]).split(b"\n")
                yield from _records(lines, position)
                position += len(lines)


def _records(lines: list[bytes], position: int) -> Iterator[Raw]:
    loads = orjson.loads
    for at, line in enumerate(lines, position):
        if text := line.rstrip(b"\r"):
            try:
                yield Raw(at, text, loads(text))
            except orjson.JSONDecodeError:
                if text.strip():
                    yield Raw(at, text, parse(text))


def _line(buffer: bytearray, ends: list[int], position: int, i: int) -> Raw:
    text = bytes(buffer[ends[i - 1] + 1 if i else 0 : ends[i]].rstrip(b"\r"))
    return Raw(position + i, text, parse(text))


def _columns(buffer: bytearray, end: int, names: Sequence[str]) -> tuple[list[pa.Array], list[int]] | None:
    """The columns of lines that each hold one object with texts under `names` and nothing else, and the lines' ends.

    None for others. The parser would also take two objects on a line, or one on two lines. Where every line begins and
    ends as an object does, and there are as many objects as lines, there is one on each: an object of texts has no
    brace inside.
    """
    ends = _objects(buffer, end)
    if len(ends) < TEXTS_LINES:
        return None
    schema = pa.schema([(name, pa.string()) for name in names])
    reading = pa_json.ReadOptions(use_threads=False, block_size=end + 1)
    parsing = pa_json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="error")
    try:
        lines = pa.BufferReader(memoryview(buffer)[:end])
        table = pa_json.read_json(lines, read_options=reading, parse_options=parsing)
        table.validate(full=True)  # that text is UTF-8
    except pa.ArrowInvalid:
        return None
    if table.num_rows != len(ends) or table.schema.names != list(names):
        return None
    return [column.chunk(0) for column in table.columns], ends  # it was read as one block


def _objects(buffer: bytearray, end: int) -> list[int]:
    """Where the lines end, if each begins and ends as an object does; else nothing."""
    if not buffer.startswith(b"{") or not buffer.endswith((b"}", b"}\r"), 0, end):
        return []
    found, at = list[int](), buffer.find(b"\n", 0, end)
    while at >= 0:  # several times faster than to compare every byte
        found.append(at)
        at = buffer.find(b"\n", at + 1, end)
    bytes_, ends = np.frombuffer(buffer, np.uint8), np.array(found, np.intp)
    last = bytes_[ends - 1]
    last = np.where(last == _RETURN, bytes_[ends - 2], last)
    if (bytes_[ends + 1] != _OPEN).any() or (last != _CLOSE).any():
        return []
    return [*found, end]


def _blocks(file: BinaryIO, start: int, stop: int, size: int) -> Iterator[tuple[int, bytearray, int]]:
    """(0, a buffer, where the whole lines at its start end), or (its size, its first bytes, …) of a line above
    `RECORD_BYTES`.

    There is one buffer, which the next lines overwrite: memory that is given back and asked for again, block by block,
    would cost a tenth of the time.
    """
    buffer = bytearray(min(max(size, 4), base.RECORD_BYTES + 1))
    held = 0  # bytes of the line that the last read broke off
    long, head = 0, bytearray()  # bytes of a line above `RECORD_BYTES` that were let go, and the first of them
    if start:
        file.seek(start)
    else:
        begun = file.read(3 if stop < 0 else min(3, stop)).removeprefix(codecs.BOM_UTF8)
        buffer[: (held := len(begun))] = begun
        start = 3
    left = max(stop - start, 0) if stop >= 0 else sys.maxsize
    while got := file.readinto(memoryview(buffer)[held:][:left]):  # type: ignore[attr-defined]
        left, end = left - got, held + got
        if long and (first := buffer.find(b"\n", 0, end)) >= 0:
            yield long + first, head, len(head)
            long, end = 0, end - first - 1
            buffer[:end] = buffer[first + 1 : first + 1 + end]
        last = -1 if long else buffer.rfind(b"\n", 0, end)
        held = end - last - 1
        if last >= 0:
            yield 0, buffer, last
            buffer[:held] = buffer[last + 1 : end]
        if long or held > base.RECORD_BYTES:
            head = head if long else buffer[: base.HEAD_BYTES]
            long, held = long + held, 0
        elif held == len(buffer):
            buffer = buffer + bytes(min(held, base.RECORD_BYTES + 1 - held))
    yield (long + held, head, len(head)) if long else (0, buffer, held)
