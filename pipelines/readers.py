"""Files to records: JSON lines, JSON arrays, CSV, Excel workbooks, parquet and Arrow, packed or not.

Every record keeps its position and its bytes, so that a rejected one can be shown as it was: a damaged record is
its own `Reject` and the reader goes on behind it; only a file that cannot be read on is a `UserError`. Nothing is
read ahead and nothing above `RECORD_BYTES` is held, so that a small file that unpacks to a huge one takes time, not
memory. Nothing here knows what a record means.
"""

import codecs
import csv
import datetime
import hashlib
import io as streams
import json
import logging
import re
import sys
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import dropwhile, zip_longest
from pathlib import PurePosixPath
from typing import Any, BinaryIO, NamedTuple
from xml.parsers import expat

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.json as pa_json

from pipelines import io
from schemas.errors import Reject, UserError

log = logging.getLogger(__name__)
# The layouts and what is a record of each; the endings are those of `io.ENDINGS`, all but the last three also packed.
KINDS = {
    "jsonl": "JSON lines: one value a line; blank lines are counted but are no records",
    "json": "a JSON array, its elements; one object, or several in a row; an object that wraps the array, as "
    '{"data": [...]}, or that is a table, its rows: as pandas writes it (orient columns, index or split), or with a '
    "list for each column (of conversations, or of more than 100 values)",
    "csv": "CSV or TSV with a header, perhaps below a title (rows with one filled cell), in UTF-8 or (with a byte "
    "order mark) UTF-16; every cell is text",
    "xlsx": "an Excel workbook: the rows below each sheet's header, perhaps below a title, one sheet after the other",
    "parquet": "parquet, its rows",
    "arrow": "an Arrow IPC file or stream (also .feather, and what datasets' save_to_disk wrote), its rows",
}
RANGE_BYTES = 32 << 20  # a JSONL file is read in ranges of about this size
CHUNK_BYTES = 1 << 18  # read at a time: lines that are still in the cache are parsed faster
TEXTS_BYTES = 4 << 20  # and where records are read by column
_OPEN, _CLOSE, _NEWLINE, _RETURN = b"{}\n\r"
TEXTS_LINES = 16  # fewer are quicker read one by one
RECORD_BYTES = 256 << 20  # a longer record is rejected with its first `HEAD_BYTES`
HEAD_BYTES = 1 << 20
BATCH_ROWS = 1_000  # rows of a table that are Python values at a time
WORKBOOK_BYTES = 1 << 30  # what a workbook may unpack to
WORKBOOK_RATIO = 200  # and how much that may be of the file, above 100 MiB
SHEET_ROWS = 1 << 20  # Excel's limit
COLUMN_VALUES = 100  # lists of no more, side by side in an object, may be what one record holds, such as its turns
TITLE_ROWS = 10  # at most, above the header of a table
_RANDOM_ACCESS = ("parquet", "arrow", "xlsx")
_MAGIC = {b"PAR1": "parquet", b"ARROW1": "arrow", b"\xff\xff\xff\xff": "arrow", b"PK\x03\x04": "xlsx"}
_FOREIGN = {
    b"\xd0\xcf\x11\xe0": "an old .xls or a password-protected workbook; save it as .xlsx without a password",
    b"FEA1": "Feather version 1; write it with pyarrow.feather.write_feather of today",
}


class Raw(NamedTuple):
    """One record as it lies in its file; `value` is what it parsed to, or the `Reject` that says why it did not.

    `text` is the record's bytes, or None for a row of a table, which has none of its own.
    """

    position: int
    text: bytes | None
    value: Any

    @property
    def payload(self) -> bytes:
        """The record as it is kept when it is rejected: its bytes, or a row's JSON."""
        return json.dumps(self.value, default=str).encode() if self.text is None else self.text


@dataclass(frozen=True)
class Range:
    """A piece of a file that one worker reads: bytes (jsonl), row groups (parquet) or the whole file."""

    path: str
    kind: str  # one of KINDS
    start: int = 0
    stop: int = -1  # -1: to the end
    first: int = 1  # position of its first record


def records(of: Range) -> Iterator[Raw]:
    """The records of a range, in order. A damaged file is a `UserError`; a damaged record is its own `Reject`."""
    try:
        yield from _READ[of.kind](of)
    except io.READ_ERRORS as error:
        raise io.unreadable(of.path, error) from None


# --- what a file is ------------------------------------------------------------------------------


def kind_of(path: str) -> str:
    """How a file is laid out (a key of `KINDS`), from its first bytes and, where those do not tell, its ending."""
    head, by_ending = _head(path), io.ENDINGS.get(io.ending(path))
    if by_ending != "csv" or b"\0" in head:  # a column may be called PAR1
        if kind := next((kind for magic, kind in _MAGIC.items() if head.startswith(magic)), None):
            return _binary(path, kind, head)
        if told := next((told for magic, told in _FOREIGN.items() if head.startswith(magic)), None):
            raise UserError(f"{path}: {told}")
    if by_ending in _RANDOM_ACCESS:
        article = "a" if by_ending == "parquet" else "an"
        raise UserError(f"{path}: ends in {io.ending(path)} but does not start as {article} {by_ending} file")
    if _is_utf16(head) and not (by_ending == "csv" and head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))):
        raise UserError(f"{path}: the text is UTF-16; save it as UTF-8")
    return "csv" if by_ending == "csv" and not _is_blank(path, head) else _text_kind(path, head)


def _head(path: str) -> bytes:
    try:
        with io.open_bytes(path) as file:
            return file.read(1 << 16)
    except io.READ_ERRORS as error:
        raise io.unreadable(path, error) from None


def _binary(path: str, kind: str, head: bytes) -> str:
    if how := io.packing(path):
        raise UserError(f"{path}: a {kind} file inside {how} cannot be read in parts; unpack it first")
    if kind == "xlsx" and io.ENDINGS.get(io.ending(path)) != "xlsx" and b"[Content_Types].xml" not in head:
        raise UserError(f"{path}: a zip archive; unpack it first")
    return kind


def _is_utf16(head: bytes) -> bool:
    """With its byte order mark, or without by every second byte's being zero."""
    return bool(re.match(rb"\xff\xfe|\xfe\xff|(?:[\t-~]\x00){2}|(?:\x00[\t-~]){2}", head))


def _is_blank(path: str, head: bytes) -> bool:
    if head.removeprefix(codecs.BOM_UTF8).strip():
        return False
    raise UserError(f"{path}: the file is empty")


def _text_kind(path: str, head: bytes) -> str:
    text = b"" if _is_blank(path, head) else head.removeprefix(codecs.BOM_UTF8).lstrip()
    ending = io.ending(path)
    if text[:1] == b"[":
        return "jsonl" if ending in (".jsonl", ".ndjson") and _is_lines(text) else "json"
    if text[:1] == b"{":
        return "jsonl" if ending != ".json" or _is_objects(path, text) else "json"
    if kind := io.ENDINGS.get(ending):
        return kind
    raise UserError(f"{path}: neither JSON, JSON lines, CSV nor parquet (starts with {text[:20]!r})")


def _is_lines(text: bytes) -> bool:
    """Whether text that starts with a list is one value per line, and not one array over all lines."""
    line, _, rest = text.partition(b"\n")
    return bool(rest.strip()) and not isinstance(parse(line), Reject)


def _is_objects(path: str, text: bytes) -> bool:
    """Whether a .json file that starts with an object holds one object a line, and more than one line."""
    line, newline, rest = text.partition(b"\n")
    if newline and not isinstance(parse(line), dict):
        return False
    return bool(rest.strip()) or _goes_on(path)


def _goes_on(path: str) -> bool:
    """Whether anything follows the first line that is not blank."""
    began = ended = False
    with io.open_bytes(path) as file:
        while chunk := file.read(CHUNK_BYTES):
            if ended and chunk.strip():
                return True
            text = chunk if began else chunk.removeprefix(codecs.BOM_UTF8).lstrip()
            began = began or bool(text)
            _, newline, rest = text.partition(b"\n")
            if not ended and newline and rest.strip():
                return True
            ended = ended or bool(newline)
    return False


def survey(path: str, kind: str) -> tuple[dict[str, Any], list[Range]]:
    """Read a file once: its facts (name, bytes, sha256) and the ranges it is best read in.

    Plain JSON lines are cut behind newlines, so that each range knows its first line number; parquet is cut
    into its row groups; everything else is one range.
    """
    try:
        cut_every = RANGE_BYTES if kind == "jsonl" and not io.packing(path) else float("inf")
        sha, size, lines, cuts = hashlib.sha256(), 0, 0, [(0, 1)]  # cuts: byte offset, number of the line there
        with io.open_raw(path) as file:
            while chunk := file.read(CHUNK_BYTES):
                newlines = int(np.count_nonzero(np.frombuffer(chunk, np.uint8) == _NEWLINE))  # faster than to count
                if size + len(chunk) - cuts[-1][0] > cut_every and (end := chunk.rfind(b"\n") + 1):
                    cuts.append((size + end, lines + newlines + 1))
                lines += newlines
                size += len(chunk)
                sha.update(chunk)
    except io.READ_ERRORS as error:
        raise io.unreadable(path, error) from None
    facts = {"file": PurePosixPath(path).name, "bytes": size, "sha256": sha.hexdigest()}
    if kind == "parquet":
        return facts, _row_groups(path)
    stops = [offset for offset, _ in cuts[1:]] + [-1]
    return facts, [Range(path, kind, start, stop, line) for (start, line), stop in zip(cuts, stops, strict=True)]


def _row_groups(path: str) -> list[Range]:
    with io.open_parquet(path) as file:
        sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    return [Range(path, "parquet", i, i + 1, 1 + sum(sizes[:i])) for i in range(len(sizes))]


# --- JSON lines ----------------------------------------------------------------------------------


def parse(line: bytes) -> Any:
    """The JSON value of `line`, or a `Reject`. orjson is fast and strict; json takes NaN, 1e400 and lone surrogates.

    Both keep the last of a key that an object holds twice: to look for such keys in every record would cost up to a
    third of its conversion, so that `twice` looks for them in the first. An integer beyond 64 bits is a float.
    """
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError:
        pass
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Reject("invalid_unicode", f"not valid UTF-8 at byte {error.start} of the record")
    except (ValueError, RecursionError) as error:
        return Reject("invalid_json", str(error))


def twice(text: bytes) -> str | None:
    """The key that an object in a JSON text holds twice, with two values; None if none does."""
    found: list[str] = []

    def paired(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            found.extend(key for key, value in pairs if value != made[key])
        return made

    try:
        json.loads(text, object_pairs_hook=paired)
    except (ValueError, RecursionError):
        return None  # it is rejected as it is
    return found[0] if found else None


def _too_long(size: int) -> Reject:
    return Reject("invalid_json", f"{size} bytes; a record has at most {RECORD_BYTES}, and the first are kept")


def _lines(of: Range, names: Sequence[str] = ()) -> Iterator[Any]:
    """One record a line, or `Texts`. Only a newline ends a line: U+2028 and its like stand within strings."""
    with io.open_bytes(of.path) as file:
        position = of.first
        for size, buffer, end in _blocks(file, of.start, of.stop, TEXTS_BYTES if names else CHUNK_BYTES):
            if size:
                yield Raw(position, bytes(buffer), _too_long(size))
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


# --- columns of texts ----------------------------------------------------------------------------


class Texts(NamedTuple):
    """Records that hold nothing but texts, by column; `record` gives one of them as it lies in the file.

    The next ones are read where these were, so that `record` is for now only.
    """

    columns: list[pa.Array]  # each [n] strings, some perhaps null
    record: Callable[[int], Raw]


def texts(of: Range, names: Sequence[str]) -> Iterator[Raw | Texts]:
    """The records of a range; of lines and tables, those that hold texts under `names` and nothing else by column."""
    read = {"jsonl": _lines, "parquet": _parquet, "arrow": _arrow}.get(of.kind)
    if read is None:
        yield from records(of)
        return
    try:
        yield from read(of, names)
    except io.READ_ERRORS as error:
        raise io.unreadable(of.path, error) from None


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
    buffer = bytearray(min(max(size, 4), RECORD_BYTES + 1))
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
        if long or held > RECORD_BYTES:
            head = head if long else buffer[:HEAD_BYTES]
            long, held = long + held, 0
        elif held == len(buffer):
            buffer = buffer + bytes(min(held, RECORD_BYTES + 1 - held))
    yield (long + held, head, len(head)) if long else (0, buffer, held)


# --- JSON arrays ---------------------------------------------------------------------------------

# What an object may call the array that it wraps.
_WRAPPERS = (b"data", b"rows", b"records", b"examples", b"samples", b"instances", b"items", b"entries", b"results")
_LIST_OF_OBJECTS = re.compile(rb'\s*"(?P<key>[^"\\]*)"\s*:\s*(?P<array>\[)\s*\{')
_TURN = re.compile(rb'[^{}]*"(?:role|from)"\s*:')
_GAP = re.compile(rb"[ \t\r\n,]*+")
_BETWEEN = re.compile(rb"[}\]]\s*,\s*[{\[]")
# Runs over whole strings to the next bracket or comma; `cut` is the quote of a string that goes on behind the buffer.
_STRING = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
_INSIDE, _OUTSIDE = (
    re.compile(
        rb"(?:[^%b]*+%b)*+[^%b]*+(?:(?P<open>[{\[])|(?P<close>[}\]])|(?P<comma>,)|(?P<cut>\")|\Z)"
        % (stops, _STRING, stops),
        re.DOTALL,
    )
    for stops in (rb'"{}\[\]', rb'"{}\[\],')
)


class _BrokenOff(Exception):  # noqa: N818 - it never leaves this module
    """The file ends before its brackets close."""


class _Buffer:
    """The part of an unpacked file that is being scanned: `text`, from `at` on; it begins at `offset` of the file."""

    def __init__(self, file: BinaryIO, skip: int = 0):
        self.file, self.text, self.at, self.offset = file, b"", 0, 0
        while self.offset < skip and (passed := file.read(min(CHUNK_BYTES, skip - self.offset))):
            self.offset += len(passed)
        self.more(0)
        if not skip and self.text.startswith(codecs.BOM_UTF8):
            self.at = len(codecs.BOM_UTF8)

    def more(self, keep: int) -> bool:
        """Read on, and drop what lies before `keep`, which becomes place 0. False at the end of the file."""
        held = self.text[keep:]
        read = self.file.read(min(max(CHUNK_BYTES, len(held)), 64 << 20))
        self.text, self.at, self.offset = held + read, self.at - keep, self.offset + keep
        return bool(read)

    def forget(self, start: int) -> int:
        """Drop what lies behind `start`, but not that it ends within a string; the number of bytes dropped."""
        rest = self.text[self.at :]
        odd = (len(rest) - len(rest.rstrip(b"\\"))) % 2
        kept = b'"' + b"\\" * odd if rest else b""
        self.offset += len(self.text) - len(kept)
        dropped = len(self.text) - start - len(kept)
        self.text, self.at = kept, 0
        return dropped

    def skip(self) -> bytes:
        """Pass white space and commas; the byte that follows, or nothing at the end of the file."""
        while True:
            self.at = _GAP.match(self.text, self.at).end()  # type: ignore[union-attr]
            if self.at < len(self.text) or not self.more(self.at):
                return self.text[self.at : self.at + 1]


class _Element(NamedTuple):
    offset: int  # in the unpacked file
    size: int  # bytes
    text: bytes  # all of it, or its first bytes where it is longer than the limit


def _element(buffer: _Buffer, closer: bytes, limit: int) -> _Element:
    """What stands next in an array (`closer` is "]"), in an object ("}": its members) or in a file ("": to its end).

    It ends where its brackets close; a scalar and a member end before the comma. Strings are passed over and
    nothing is parsed, so that an element which is no JSON is an element all the same.
    """
    offset, start, depth, dropped, head = buffer.offset + buffer.at, buffer.at, 0, 0, b""
    while True:
        match = (_INSIDE if depth else _OUTSIDE).match(buffer.text, buffer.at)
        found, buffer.at = match.lastgroup, match.end()  # type: ignore[union-attr]
        if found == "open":
            depth += 1
        elif found == "close" and depth:
            depth -= 1
            if not depth and closer != b"}":
                break
        elif found == "comma" or (found == "close" and buffer.text[buffer.at - 1 : buffer.at] == closer):
            buffer.at -= 1
            break
        elif found != "close":  # the buffer ends here
            buffer.at -= found == "cut"
            if dropped + len(buffer.text) - start > limit:
                head = head or buffer.text[start : start + HEAD_BYTES]
                dropped, start = dropped + buffer.forget(start), 0
            ended = not buffer.more(start)
            start = 0
            if ended and (closer or depth or found):
                raise _BrokenOff
            if ended:
                break
    size = dropped + buffer.at - start
    return _Element(offset, size, head or buffer.text[start : buffer.at if size <= limit else start + HEAD_BYTES])


def _array(of: Range) -> Iterator[Raw]:
    """The elements of a JSON array, one at a time: the array is never in memory whole.

    A file that starts with an object holds one record or several in a row, unless that object wraps an array.
    """
    with io.open_bytes(of.path) as file:
        buffer = _Buffer(file)
        if buffer.skip() == b"[":
            buffer.at += 1
            yield from _parsed(of, buffer, b"]")
            if buffer.skip():
                raise UserError(f"{of.path}: more follows the JSON array; write one array, or one record per line")
        elif (offset := _wrapped(of.path)) is not None:
            with io.open_bytes(of.path) as again:
                yield from _parsed(of, _Buffer(again, offset + 1), b"]")
        elif (table := _table(of.path)) is not None:
            yield from (Raw(i, None, row) for i, row in enumerate(table, 1))
        else:
            yield from _parsed(of, buffer, b"")


def _parsed(of: Range, buffer: _Buffer, closer: bytes) -> Iterator[Raw]:
    position, between = 1, b""
    while (byte := buffer.skip()) != closer:
        if found := _quick(buffer, between) if between else None:
            yield Raw(position, *found)
        else:
            try:
                if not byte:
                    raise _BrokenOff
                _, size, text = _element(buffer, closer, RECORD_BYTES)
            except _BrokenOff:
                told = f"{of.path}: the JSON breaks off or is invalid after record {position - 1}"
                raise UserError(f"{told}: its brackets or quotes do not close") from None
            yield Raw(position, text, parse(text) if size == len(text) else _too_long(size))
            between = match[0] if (match := _BETWEEN.match(buffer.text, buffer.at - 1)) else between
        position += 1
    buffer.at += len(closer)


def _quick(buffer: _Buffer, between: bytes) -> tuple[bytes, Any] | None:
    """The element at hand and its value, tried where the bytes stand that parted the last two.

    Quicker than to count brackets, and as sure: no beginning of an array or object is one itself.
    """
    end = buffer.at
    for _ in range(8):
        end = buffer.text.find(between, end, buffer.at + CHUNK_BYTES) + 1
        if not end:
            return None
        text = buffer.text[buffer.at : end]
        try:
            value = orjson.loads(text)
        except orjson.JSONDecodeError:
            continue
        buffer.at = end
        return text, value
    return None


def _wrapped(path: str) -> int | None:
    """Where the array lies that the only object of a file wraps, or None.

    It is the only list of objects there, under one of the usual names, or the only member and not a chat's turns.
    """
    lists, members = [], 0
    with io.open_bytes(path) as file:
        buffer = _Buffer(file)
        if buffer.skip() != b"{":
            return None
        buffer.at += 1
        try:
            while buffer.skip() != b"}":
                member, members = _element(buffer, b"}", HEAD_BYTES), members + 1
                if match := _LIST_OF_OBJECTS.match(member.text):
                    lists.append((match, member.offset))
        except _BrokenOff:
            return None
        buffer.at += 1
        if buffer.skip():  # more objects follow
            return None
    if len(lists) != 1:
        return None
    match, offset = lists[0]
    if match["key"] not in _WRAPPERS and (members > 1 or _TURN.match(match.string, match.end())):
        return None
    name, others = match["key"].decode("utf-8", "replace"), members - 1
    log.info("%s: one object; the records are its %r; its %d other fields are not read", path, name, others)
    return offset + match.start("array")


def _table(path: str) -> list[dict[str, Any]] | None:
    """The rows of the table that the only object of a file is, or None; the file is read whole for it."""
    with io.open_bytes(path) as file:
        buffer = _Buffer(file)
        try:
            _, size, text = _element(buffer, b"", RECORD_BYTES) if buffer.skip() == b"{" else _Element(0, 0, b"")
        except _BrokenOff:
            return None
        if size > len(text) or buffer.skip():  # more objects follow
            return None
    value = parse(text)
    rows = _as_table(value, path) if isinstance(value, dict) else None
    if rows is not None:
        log.info("%s: one object, which is a table of %d rows", path, len(rows))
    return rows


def _as_table(value: dict[str, Any], path: str) -> list[dict[str, Any]] | None:
    """The rows, if the object is certainly a table as pandas or `datasets` write it, and no single record."""
    names, columns = list(value), list(value.values())
    if {"columns", "data"} <= value.keys() <= {"columns", "data", "index", "index_names", "column_names"}:
        return _split_rows(value["columns"], value["data"], path)
    if columns and all(isinstance(c, dict) for c in columns):
        inner = list(columns[0])
        if _are_places(names) and not any(map(_are_places, columns)):
            return columns
        if _are_places(inner) and not _are_places(names) and all(list(c) == inner for c in columns):
            return [dict(zip(names, row, strict=True)) for row in zip(*(c.values() for c in columns), strict=True)]
    if _side_by_side(columns) and (len(columns[0]) > COLUMN_VALUES or any(map(_are_conversations, columns))):
        return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
    return None


def _split_rows(names: Any, rows: Any, path: str) -> list[dict[str, Any]] | None:
    if not isinstance(names, list) or not isinstance(rows, list) or not all(isinstance(n, str) for n in names):
        return None
    if not all(isinstance(row, list) and len(row) == len(names) for row in rows):
        return None
    _require_distinct(names, path)
    return [dict(zip(names, row, strict=True)) for row in rows]


def _are_places(keys: Iterable[str]) -> bool:
    """Whether the keys are the index of two rows or more."""
    listed = list(keys)
    return len(listed) > 1 and all(key.isascii() and key.isdigit() for key in listed)


def _side_by_side(columns: list[Any]) -> bool:
    """Whether all are lists of one length, and no turns of one conversation."""
    if not columns or not all(isinstance(c, list) and len(c) == len(columns[0]) > 0 for c in columns):
        return False
    return not any(_is_turn(one) for column in columns for one in column[:2])


def _are_conversations(values: list[Any]) -> bool:
    return all(isinstance(value, list) and value and _is_turn(value[0]) for value in values)


def _is_turn(value: Any) -> bool:
    return isinstance(value, dict) and ("role" in value or "from" in value)


def like_table(value: dict[str, Any]) -> str:
    """How to make rows of an object that may be a table, or one record; '' if it is none."""
    columns = list(value.values())
    if len(columns) > 1 and _side_by_side(columns):
        what, rows = (
            f"{len(columns)} lists of {len(columns[0])} values",
            "[dict(zip(t, row)) for row in zip(*t.values())]",
        )
    elif len(columns) > 1 and all(isinstance(c, dict) and c and list(c) == list(columns[0]) for c in columns):
        what, rows = f"{len(columns)} objects with the same fields", "[{'id': key} | row for key, row in t.items()]"
    else:
        return ""
    write = f"""python -c "import json; t = json.load(open('FILE')); json.dump({rows}, open('rows.json', 'w'))\""""
    return f"one object of {what}, which may be a table or a record; if it is a table, write its rows: {write}"


# --- CSV -----------------------------------------------------------------------------------------


class _Layout(NamedTuple):
    encoding: str
    delimiter: str
    named: bool = False  # the first line names the delimiter, as Excel writes it: "sep=;"
    quoting: Any = csv.QUOTE_MINIMAL


def _csv(of: Range) -> Iterator[Raw]:
    """One record a row; missing cells are null. Cells in Windows-1252 or Latin-1 reject their row.

    Rows of a title, padded with empty cells, may stand above the header (`_below_title`).
    A quote that is left open, or text behind a closing one, ends the run: what follows may be text or rows. A record
    has the number of its row, header and blank rows not counted.
    """
    position = 0
    try:
        rows = _below_title(of.path, _rows(of.path, _layout(of.path)), lambda row: sum(map(bool, map(str.strip, row))))
        header = _csv_header(of.path, next(rows, []))
        for position, row in enumerate(rows, 1):
            yield _csv_row(position, header, row)
    except csv.Error as error:
        raise UserError(f"{of.path}: not valid CSV after record {position} ({error}); is a quote left open?") from None


def _below_title(path: str, rows: Iterator[Any], filled: Callable[[Any], int]) -> Iterator[Any]:
    """The rows from the header on; above it may stand blank rows and some of which one cell alone is filled: a title.

    Where none of the first rows has more, and where they are one cell wide, the first is the header.
    """
    above: list[Any] = []
    for row in rows:
        above.append(row)
        if filled(row) > 1 or len(row) < 2 or len(above) > TITLE_ROWS:
            break
    if len(above) > 1 and filled(above[-1]) > 1:
        log.info("%s: the first %d rows are a title, no header and no records", path, len(above) - 1)
        del above[:-1]
    yield from above
    yield from rows


def _csv_header(path: str, names: list[str]) -> list[str]:
    while names and not names[-1].strip():
        names.pop()
    _require_distinct(names, path)
    if not _is_unicode(names):
        raise UserError(f"{path}: the header is not valid UTF-8; save the file as UTF-8 (iconv -f cp1252 -t utf-8)")
    return names


def _layout(path: str) -> _Layout:
    """How a file is laid out, by its first line that is not blank."""
    with io.open_bytes(path) as file:
        utf16 = _is_utf16(file.read(2))
    layout = _Layout("utf-16" if utf16 else "utf-8-sig", "\t")
    with io.open_bytes(path) as file:
        first = next(_text_lines(path, file, layout.encoding), "").strip("\r\n")
    if told := re.fullmatch(r"sep=(.)", first.strip(" ")):
        return layout._replace(delimiter=told[1], named=True)
    tabs = "\t" in first and (utf16 or io.ending(path) == ".tsv")
    delimiter = "\t" if tabs else max(",\t;|", key=first.count)
    return layout._replace(
        delimiter=delimiter, quoting=_quoting(path, layout) if delimiter == "\t" else csv.QUOTE_MINIMAL
    )


def _quoting(path: str, layout: _Layout) -> int:
    """Whether quotes in tab-separated text delimit cells or are text, as many tools write it.

    They are read the way that gives fewer rows of another width than the header's, then the one that gives more rows.
    """

    def misfit(quoting: int) -> tuple[float, int]:
        rows = _rows(path, layout._replace(quoting=quoting))
        try:
            width = len(next(rows, []))
            odd = Counter(len(row) == width for row in rows)
        except csv.Error:
            return float("inf"), 0
        return odd[False], -odd.total()

    with io.open_bytes(path) as file:
        if not any(b'"' in chunk for chunk in iter(lambda: file.read(CHUNK_BYTES), b"")):
            return csv.QUOTE_NONE
    quoting = min((csv.QUOTE_MINIMAL, csv.QUOTE_NONE), key=misfit)
    if quoting == csv.QUOTE_NONE:
        log.info("%s: tab-separated text whose quotes are read as text", path)
    return quoting


def _rows(path: str, layout: _Layout) -> Iterator[list[str]]:
    csv.field_size_limit(RECORD_BYTES)
    with io.open_bytes(path) as file:
        lines = _text_lines(path, file, layout.encoding)
        if layout.named:
            next(lines)
        yield from filter(None, csv.reader(lines, delimiter=layout.delimiter, quoting=layout.quoting, strict=True))


def _text_lines(path: str, file: BinaryIO, encoding: str) -> Iterator[str]:
    """Lines from the first that is not blank on; bytes that are no UTF-8 become lone surrogates."""
    text = streams.TextIOWrapper(_Bounded(file), encoding, errors="surrogateescape", newline="")  # type: ignore[type-var]
    try:
        yield from dropwhile(lambda line: not line.strip(), text)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not valid {encoding} ({error}); save it as UTF-8") from None


class _Bounded(streams.BufferedIOBase):
    """A file whose lines are at most `RECORD_BYTES` long."""

    def __init__(self, file: BinaryIO):
        self.file, self.line = file, 0

    def readable(self) -> bool:
        return True

    def read1(self, size: int = -1) -> bytes:
        chunk = self.file.read(1 << 16)
        end = max(chunk.rfind(b"\n"), chunk.rfind(b"\r"))
        self.line = len(chunk) - end - 1 if end >= 0 else self.line + len(chunk)
        if self.line > RECORD_BYTES:
            raise csv.Error(f"a line is longer than {RECORD_BYTES} bytes")
        return chunk


def _csv_row(position: int, header: list[str], row: list[str]) -> Raw:
    record = dict(zip_longest(header, row[: len(header)]))
    beyond = row[len(header) :]
    if any(beyond):
        told = Reject("wrong_shape", f"{len(beyond)} more cells than the header has")
        return Raw(position, _as_json({**record, "cells beyond the header": beyond}), told)
    if not _is_unicode(row):
        told = Reject(
            "invalid_unicode", "not valid UTF-8; if it is cp1252, save it as UTF-8 (iconv -f cp1252 -t utf-8)"
        )
        return Raw(position, _as_json(record), told)
    return Raw(position, None, record)


def _as_json(row: dict[str, Any]) -> bytes:
    """A row with the bytes it had, where those are no UTF-8."""
    return json.dumps(row, ensure_ascii=False, default=str).encode("utf-8", "surrogateescape")


def _is_unicode(cells: list[str]) -> bool:
    text = "".join(cells)
    try:
        return text.isascii() or bool(text.encode())
    except UnicodeEncodeError:
        return False


def _require_distinct(names: Sequence[str], path: str) -> None:
    if twice := next((name for name, count in Counter(names).items() if count > 1), None):
        raise UserError(f"{path}: two columns are called {twice!r}; rename one")


# --- Excel workbooks -----------------------------------------------------------------------------

# Excel's escape of a control character (ST_Xstring of ECMA-376 part 1), such as _x000D_ for a carriage return
_CONTROL = re.compile(r"_x00([01][0-9A-Fa-f])_")


def _xlsx(of: Range) -> Iterator[Raw]:
    """The rows of every sheet that has a header and rows below it, in the order of the sheets.

    A sheet's header is its first row that is not blank, or stands below a title (`_below_title`). Blank rows, formatted
    or not, are no records and are not counted: record n is the nth that is not blank, over all sheets. Cells keep
    their type: text, numbers (whole ones as integers), booleans; dates are ISO 8601 text. A formula is the value that
    Excel stored for it, or null where none was stored. #N/A is null; another error rejects the row.
    """
    position = 1
    for title, sheet in _sheets(of.path):
        shown = f"{of.path} (sheet {title!r})"
        rows = _below_title(shown, dropwhile(lambda row: not _filled(row[1]), sheet), lambda row: _filled(row[1]))
        header = next(rows, (0, ()))
        names = [_name(cell) for cell in header[1]]
        while names and not names[-1]:
            names.pop()
        _require_distinct([name for name in names if name], shown)
        first, at = position, header[0]
        for at, row in rows:
            if _filled(row):
                yield _xlsx_row(position, names, row, f"sheet {title!r}, row {at}")
                position += 1
        blank = at - header[0] - (position - first)
        log.info(
            "%s: sheet %r: %d records, the first is %d; %d blank rows", of.path, title, position - first, first, blank
        )


def _sheets(path: str) -> Iterator[tuple[str, Iterator[tuple[int, Any]]]]:
    """(title, its numbered rows of openpyxl's cells) of each worksheet."""
    try:
        import openpyxl
    except ImportError:
        raise UserError(f"{path}: reading Excel workbooks needs the package openpyxl: pip install openpyxl") from None
    warnings.filterwarnings("ignore", category=UserWarning, module="openpyxl")  # of features that hold no values
    with io.open_raw(path) as file:
        _check_workbook(path, file)
        try:
            book = openpyxl.load_workbook(file, read_only=True, data_only=True)
        except Exception as error:  # openpyxl has no error of its own: anything can come of a damaged file
            raise UserError(f"{path}: not a readable workbook ({error!r}); is it whole?") from None
        for sheet in book.worksheets:
            sheet.reset_dimensions()  # what a file says of its size is often wrong
            yield sheet.title, _sheet_rows(path, sheet)


def _sheet_rows(path: str, sheet: Any) -> Iterator[tuple[int, Any]]:
    at = 0
    rows = iter(sheet.iter_rows())
    while True:
        try:
            row = next(rows, None)
        except Exception as error:
            raise UserError(f"{path}: sheet {sheet.title!r} is damaged below row {at} ({error!r})") from None
        if row is None:
            return
        at += 1
        if at > SHEET_ROWS:
            raise UserError(f"{path}: sheet {sheet.title!r} has more than {SHEET_ROWS} rows; save it as CSV")
        yield at, row


def _check_workbook(path: str, file: BinaryIO) -> None:
    """Refuse what unpacks to too much, and XML with a document type (ECMA-376 part 2 allows none)."""
    try:
        with zipfile.ZipFile(file) as archive:
            parts = archive.infolist()
            size, packed = sum(p.file_size for p in parts), sum(p.compress_size for p in parts)
            if size > WORKBOOK_BYTES or (size > 100 << 20 and size > WORKBOOK_RATIO * packed):
                raise UserError(f"{path}: the workbook unpacks from {packed} to {size} bytes; save it as CSV")
            for part in parts:
                _refuse_document_type(path, archive, part)
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError, *io.READ_ERRORS) as error:
        raise UserError(f"{path}: not a readable workbook ({error}); is it whole?") from None


def _refuse_document_type(path: str, archive: zipfile.ZipFile, part: zipfile.ZipInfo) -> None:
    """Entities are declared in a document type, which stands before the first element."""

    def refuse(*_: Any) -> None:
        raise UserError(f"{path}: {part.filename} declares a document type, which a workbook does not; save it as CSV")

    parser, begun = expat.ParserCreate(), []
    parser.StartDoctypeDeclHandler = refuse
    parser.StartElementHandler = lambda *_: begun.append(True)
    with archive.open(part) as text:
        try:
            while not begun and (chunk := text.read(1 << 14)):
                parser.Parse(chunk)
        except expat.ExpatError:
            return  # a picture, or XML that openpyxl cannot read either


def _filled(row: Any) -> int:
    """How many cells hold something."""
    return sum(cell.value not in (None, "") for cell in row)


def _name(cell: Any) -> str:
    value = cell.value if cell.data_type == "e" else _cell(cell, "header")
    return "" if value is None else str(value).strip()


def _xlsx_row(position: int, names: list[str], row: Any, where: str) -> Raw:
    columns = [*names, *[""] * (len(row) - len(names))]
    try:
        cells = [_cell(cell, f"{where}, {name}") for cell, name in zip(row, columns, strict=False)]
        if nameless := [c for c, name in zip(cells, columns, strict=False) if not name and c not in (None, "")]:
            raise Reject(
                "wrong_shape", f"{where}: {len(nameless)} cells in columns without a name: {nameless[0]!r:.80}"
            )
    except Reject as error:
        return Raw(position, json.dumps([cell.value for cell in row], default=str).encode(), error)
    cells += [None] * (len(columns) - len(cells))
    return Raw(position, None, {name: cell for name, cell in zip(columns, cells, strict=True) if name})


def _cell(cell: Any, where: str) -> Any:
    value = cell.value
    if cell.data_type == "e":
        if value != "#N/A":
            raise Reject("wrong_type", f"{where}: the cell holds the error {value}")
        return None
    if isinstance(value, str):
        return _CONTROL.sub(lambda match: chr(int(match[1], 16)), value)
    if isinstance(value, float) and value.is_integer() and abs(value) < 1 << 53:
        return int(value)
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    return str(value) if isinstance(value, datetime.timedelta) else value


# --- parquet and Arrow ---------------------------------------------------------------------------


def _parquet(of: Range, names: Sequence[str] = ()) -> Iterator[Any]:
    with io.open_parquet(of.path) as file:
        _require_distinct(file.schema_arrow.names, of.path)
        groups = list(range(of.start, file.num_row_groups if of.stop < 0 else of.stop))
        batches = partial(file.iter_batches, batch_size=BATCH_ROWS, row_groups=groups)
        yield from _table_rows(of, "parquet", batches, names)


def _arrow(of: Range, names: Sequence[str] = ()) -> Iterator[Any]:
    """An IPC file or stream, told by its first bytes (https://arrow.apache.org/docs/format/Columnar.html)."""
    with io.open_raw(of.path) as file:
        yield from _table_rows(of, "Arrow", lambda: _batches(of.path, file), names)


def _batches(path: str, file: BinaryIO) -> Iterator[pa.RecordBatch]:
    is_stream = file.read(6) != b"ARROW1"
    file.seek(0)
    reader: Any = pa.ipc.open_stream(file) if is_stream else pa.ipc.open_file(file)
    _require_distinct(reader.schema.names, path)
    for whole in reader if is_stream else map(reader.get_batch, range(reader.num_record_batches)):
        for start in range(0, whole.num_rows, BATCH_ROWS):
            yield whole.slice(start, BATCH_ROWS)


def _table_rows(
    of: Range, name: str, batches: Callable[[], Iterable[pa.RecordBatch]], names: Sequence[str]
) -> Iterator[Any]:
    position = of.first
    try:
        for batch in batches():
            if names and _holds_texts(batch, names):
                yield Texts([batch[name].cast(pa.string()) for name in names], partial(_row, batch, position))
            else:
                yield from _python_rows(batch, position)
            position += batch.num_rows
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{of.path}: damaged {name} near record {position} ({error})") from None


def _python_rows(batch: pa.RecordBatch, position: int) -> Iterator[Raw]:
    """Rows as Python values; a row that Python cannot hold (a year 146,000, text that is not UTF-8) is rejected."""
    try:
        batch.validate(full=True)
        rows: list[Any] = _without_decimals(batch).to_pylist()
    except (ValueError, OverflowError, KeyError):
        rows = [_python_row(batch.slice(i, 1)) for i in range(batch.num_rows)]
    for i, row in enumerate(rows, position):
        text = json.dumps({"unreadable row": row.detail}).encode() if isinstance(row, Reject) else None
        yield Raw(i, text, row)


def _without_decimals(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Fixed-point columns, as databases write them, as floats."""
    for i, field in enumerate(batch.schema):
        if pa.types.is_decimal(field.type):
            batch = batch.set_column(i, field.name, batch.column(i).cast(pa.float64()))
    return batch


def _holds_texts(batch: pa.RecordBatch, names: Sequence[str]) -> bool:
    if sorted(batch.schema.names) != sorted(names):
        return False
    if not all(pa.types.is_string(t) or pa.types.is_large_string(t) for t in batch.schema.types):
        return False
    try:
        batch.validate(full=True)
    except pa.ArrowInvalid:
        return False
    return True


def _row(batch: pa.RecordBatch, position: int, i: int) -> Raw:
    return Raw(position + i, None, batch.slice(i, 1).to_pylist()[0])


def _python_row(row: pa.RecordBatch) -> Any:
    try:
        row.validate(full=True)
        return row.to_pylist()[0]
    except (ValueError, OverflowError, KeyError) as error:
        is_text = isinstance(error, UnicodeDecodeError) or "UTF8" in str(error)
        return Reject("invalid_unicode" if is_text else "wrong_type", f"{type(error).__name__}: {error}")


_READ: dict[str, Callable[[Range], Iterator[Raw]]] = {
    "jsonl": _lines,
    "json": _array,
    "csv": _csv,
    "xlsx": _xlsx,
    "parquet": _parquet,
    "arrow": _arrow,
}
