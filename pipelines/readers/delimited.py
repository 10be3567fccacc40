"""CSV and TSV: the rows below a header."""

import csv
import io as streams
import json
import logging
import re
from collections import Counter
from collections.abc import Iterator
from itertools import dropwhile, zip_longest
from typing import Any, BinaryIO, NamedTuple

from pipelines import io
from pipelines.readers import base
from pipelines.readers.base import Range, Raw
from schemas.errors import Reject, UserError

log = logging.getLogger(__name__)


class _Layout(NamedTuple):
    encoding: str
    delimiter: str
    named: bool = False  # the first line names the delimiter, as Excel writes it: "sep=;"
    quoting: Any = csv.QUOTE_MINIMAL


def read(of: Range) -> Iterator[Raw]:
    """One record a row; missing cells are null. Cells in Windows-1252 or Latin-1 reject their row.

    Rows of a title, padded with empty cells, may stand above the header (`below_title`).
    A quote that is left open, or text behind a closing one, ends the run: what follows may be text or rows. A record
    has the number of its row, header and blank rows not counted.
    """
    position = 0
    try:
        rows = base.below_title(
            of.path, _rows(of.path, _layout(of.path)), lambda row: sum(map(bool, map(str.strip, row)))
        )
        header = _csv_header(of.path, next(rows, []))
        for position, row in enumerate(rows, 1):
            yield _csv_row(position, header, row)
    except csv.Error as error:
        raise UserError(f"{of.path}: not valid CSV after record {position} ({error}); is a quote left open?") from None


def _csv_header(path: str, names: list[str]) -> list[str]:
    while names and not names[-1].strip():
        names.pop()
    base.require_distinct(names, path)
    if not _is_unicode(names):
        raise UserError(f"{path}: the header is not valid UTF-8; save the file as UTF-8 (iconv -f cp1252 -t utf-8)")
    return names


def _layout(path: str) -> _Layout:
    """How a file is laid out, by its first line that is not blank."""
    with io.open_bytes(path) as file:
        utf16 = base.is_utf16(file.read(2))
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
        if not any(b'"' in chunk for chunk in iter(lambda: file.read(base.CHUNK_BYTES), b"")):
            return csv.QUOTE_NONE
    quoting = min((csv.QUOTE_MINIMAL, csv.QUOTE_NONE), key=misfit)
    if quoting == csv.QUOTE_NONE:
        log.info("%s: tab-separated text whose quotes are read as text", path)
    return quoting


def _rows(path: str, layout: _Layout) -> Iterator[list[str]]:
    csv.field_size_limit(base.RECORD_BYTES)
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
        if self.line > base.RECORD_BYTES:
            raise csv.Error(f"a line is longer than {base.RECORD_BYTES} bytes")
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
