"""Files to records: JSON lines, JSON arrays, CSV, Excel workbooks, parquet and Arrow, packed or not.

Every record keeps its position and its bytes, so that a rejected one can be shown as it was: a damaged record is
its own `Reject` and the reader goes on behind it; only a file that cannot be read on is a `UserError`. Nothing is
read ahead and nothing above `RECORD_BYTES` is held, so that a small file that unpacks to a huge one takes time, not
memory. Nothing here knows what a record means.
"""

import codecs
import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from pipelines import io
from pipelines.readers import arrays, base, delimited, lines, tables, workbooks
from pipelines.readers.arrays import like_table
from pipelines.readers.base import HEAD_BYTES, Range, Raw, Texts, parse, twice
from schemas.errors import Reject, UserError

__all__ = [
    "HEAD_BYTES",
    "KINDS",
    "EmptyFileError",
    "Range",
    "Raw",
    "Texts",
    "kind_of",
    "like_table",
    "parse",
    "records",
    "survey",
    "texts",
    "twice",
]

# The layouts and what is a record of each; the endings are those of `io.ENDINGS`, all but the last three also packed.
KINDS = {
    "jsonl": "JSON lines: one value a line; blank lines are counted but are no records",
    "json": "a JSON array, its elements; one object, or several in a row; an object that wraps the array, as "
    '{"data": [...]}, or that is a table, its rows: as pandas writes it (orient columns, index or split), or with a '
    "list for each column (of conversations, or of more than 100 values); for a mapping with `each: .`, the members of "
    "an object",
    "csv": "CSV or TSV with a header, perhaps below a title (rows with one filled cell), in UTF-8 or (with a byte "
    "order mark) UTF-16; every cell is text",
    "xlsx": "an Excel workbook: the rows below each sheet's header, perhaps below a title, one sheet after the other",
    "parquet": "parquet, its rows",
    "arrow": "an Arrow IPC file or stream (also .feather, and what datasets' save_to_disk wrote), its rows",
}
RANGE_BYTES = 32 << 20  # a JSONL file is read in ranges of about this size
_RANDOM_ACCESS = ("parquet", "arrow", "xlsx")
_MAGIC = {b"PAR1": "parquet", b"ARROW1": "arrow", b"\xff\xff\xff\xff": "arrow", b"PK\x03\x04": "xlsx"}
_FOREIGN = {
    b"\xd0\xcf\x11\xe0": "an old .xls or a password-protected workbook; save it as .xlsx without a password",
    b"FEA1": "Feather version 1; write it with pyarrow.feather.write_feather of today",
}


class EmptyFileError(UserError):
    """A file without records, which one of many may be."""


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
    if base.is_utf16(head) and not (by_ending == "csv" and head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))):
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


def _is_blank(path: str, head: bytes) -> bool:
    if head.removeprefix(codecs.BOM_UTF8).strip():
        return False
    raise EmptyFileError(f"{path}: the file is empty")


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
        while chunk := file.read(base.CHUNK_BYTES):
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
            while chunk := file.read(base.CHUNK_BYTES):
                newlines = int(np.count_nonzero(np.frombuffer(chunk, np.uint8) == ord("\n")))  # faster than to count
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


def records(of: Range) -> Iterator[Raw]:
    """The records of a range, in order. A damaged file is a `UserError`; a damaged record is its own `Reject`."""
    try:
        yield from _READ[of.kind](of)
    except io.READ_ERRORS as error:
        raise io.unreadable(of.path, error) from None


def texts(of: Range, names: Sequence[str]) -> Iterator[Raw | Texts]:
    """The records of a range; of lines and tables, those that hold texts under `names` and nothing else by column."""
    read = {"jsonl": lines.read, "parquet": tables.read_parquet, "arrow": tables.read_arrow}.get(of.kind)
    if read is None:
        yield from records(of)
        return
    try:
        yield from read(of, names)
    except io.READ_ERRORS as error:
        raise io.unreadable(of.path, error) from None


_READ: dict[str, Callable[[Range], Iterator[Raw]]] = {
    "jsonl": lines.read,
    "json": arrays.read,
    "members": arrays.read_members,
    "csv": delimited.read,
    "xlsx": workbooks.read,
    "parquet": tables.read_parquet,
    "arrow": tables.read_arrow,
}
