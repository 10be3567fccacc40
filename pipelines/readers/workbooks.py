"""Excel workbooks: the rows below the header of each sheet."""

import json
import logging
import re
import warnings
import zipfile
from collections.abc import Iterator
from itertools import dropwhile
from typing import Any, BinaryIO
from xml.parsers import expat

from pipelines import io
from pipelines.readers import base
from pipelines.readers.base import Range, Raw
from schemas.errors import Reject, UserError

log = logging.getLogger(__name__)
WORKBOOK_BYTES = 1 << 30  # what a workbook may unpack to
WORKBOOK_RATIO = 200  # and how much that may be of the file, above 100 MiB
SHEET_ROWS = 1 << 20  # Excel's limit
# Excel's escape of a control character (ST_Xstring of ECMA-376 part 1), such as _x000D_ for a carriage return
_CONTROL = re.compile(r"_x00([01][0-9A-Fa-f])_")


def read(of: Range) -> Iterator[Raw]:
    """The rows of every sheet that has a header and rows below it, in the order of the sheets.

    A sheet's header is its first row that is not blank, or stands below a title (`below_title`). Blank rows, formatted
    or not, are no records and are not counted: record n is the nth that is not blank, over all sheets. Cells keep
    their type: text, numbers (whole ones as integers), booleans; dates are ISO 8601 text. A formula is the value that
    Excel stored for it, or null where none was stored. #N/A is null; another error rejects the row.
    """
    position = 1
    for title, sheet in _sheets(of.path):
        shown = f"{of.path} (sheet {title!r})"
        rows = base.below_title(shown, dropwhile(lambda row: not _filled(row[1]), sheet), lambda row: _filled(row[1]))
        header = next(rows, (0, ()))
        names = [_name(cell) for cell in header[1]]
        while names and not names[-1]:
            names.pop()
        base.require_distinct([name for name in names if name], shown)
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
    return base.as_text(value)
