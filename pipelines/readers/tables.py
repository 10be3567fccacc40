"""Parquet and Arrow IPC files, one record at a time or, where they hold texts alone, by column."""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, BinaryIO

import pyarrow as pa

from pipelines import io
from pipelines.readers import base
from pipelines.readers.base import Range, Raw, Texts
from schemas.errors import Reject, UserError

_NO_JSON = re.compile("date|time|duration|uuid")  # in the name of a type
BATCH_ROWS = 1_000  # rows of a table that are Python values at a time


def read_parquet(of: Range, names: Sequence[str] = ()) -> Iterator[Any]:
    with io.open_parquet(of.path) as file:
        base.require_distinct(file.schema_arrow.names, of.path)
        groups = list(range(of.start, file.num_row_groups if of.stop < 0 else of.stop))
        batches = partial(file.iter_batches, batch_size=BATCH_ROWS, row_groups=groups)
        yield from _table_rows(of, "parquet", batches, names)


def read_arrow(of: Range, names: Sequence[str] = ()) -> Iterator[Any]:
    """An IPC file or stream, told by its first bytes (https://arrow.apache.org/docs/format/Columnar.html)."""
    with io.open_raw(of.path) as file:
        yield from _table_rows(of, "Arrow", lambda: _batches(of.path, file), names)


def _batches(path: str, file: BinaryIO) -> Iterator[pa.RecordBatch]:
    is_stream = file.read(6) != b"ARROW1"
    file.seek(0)
    reader: Any = pa.ipc.open_stream(file) if is_stream else pa.ipc.open_file(file)
    base.require_distinct(reader.schema.names, path)
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
        rows: list[Any] = _values(batch)
    except (ValueError, OverflowError, KeyError):
        rows = [_python_row(batch.slice(i, 1)) for i in range(batch.num_rows)]
    for i, row in enumerate(rows, position):
        text = json.dumps({"unreadable row": row.detail}).encode() if isinstance(row, Reject) else None
        yield Raw(i, text, row)


def _values(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    for i, field in enumerate(batch.schema):
        if (kind := _plain(field.type)) != field.type:
            batch = batch.set_column(i, field.name, batch.column(i).cast(kind, safe=False))
    rows: list[dict[str, Any]] = batch.to_pylist()
    for name in [field.name for field in batch.schema if _NO_JSON.search(str(field.type))]:
        for row in rows:
            row[name] = base.as_text(row[name])
    return rows


def _plain(kind: pa.DataType) -> pa.DataType:
    """The type to read: floats for fixed-point numbers, as databases write them; no nanoseconds, unknown to Python."""
    if pa.types.is_decimal(kind):
        return pa.float64()
    if pa.types.is_struct(kind):
        return pa.struct([kind.field(i).with_type(_plain(kind.field(i).type)) for i in range(kind.num_fields)])
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        inner = kind.value_field.with_type(_plain(kind.value_type))
        return pa.list_(inner) if pa.types.is_list(kind) else pa.large_list(inner)
    if getattr(kind, "unit", None) != "ns":
        return kind
    if pa.types.is_timestamp(kind):
        return pa.timestamp("us", kind.tz)
    return pa.duration("us") if pa.types.is_duration(kind) else pa.time64("us")


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
        return _values(row)[0]
    except (ValueError, OverflowError, KeyError) as error:
        is_text = isinstance(error, UnicodeDecodeError) or "UTF8" in str(error)
        return Reject("invalid_unicode" if is_text else "wrong_type", f"{type(error).__name__}: {error}")
