"""Files to records, and rows to part files: everything that touches bytes.

Reads JSON lines, JSON arrays, CSV and parquet, plain or gzipped. Every record keeps its position and its bytes, so
that a rejected one can be shown as it was. Paths with a scheme (gs://, s3://) go through Beam's
filesystems; everything else is a local path. Nothing here knows what a record means.
"""

import codecs
import csv
import gzip
import hashlib
import io
import json
import logging
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from schemas.errors import Reject, UserError

log = logging.getLogger(__name__)
KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
RANGE_BYTES = 32 << 20  # a JSONL file is read in ranges of about this size
GROUP_BYTES = 64 << 20  # a row group holds about this much uncompressed text
GROUP_ROWS = 16_384
_GZIP_ERRORS = (EOFError, gzip.BadGzipFile, zlib.error)


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
    """A piece of a file that one worker reads: bytes (jsonl), a row group (parquet) or the whole file."""

    path: str
    kind: str  # jsonl, json, csv or parquet
    start: int = 0
    stop: int = -1  # -1: to the end
    first: int = 1  # position of its first record


# --- finding and opening files -------------------------------------------------------------------


def is_remote(path: str) -> bool:
    return "://" in path


def expand(paths: list[str]) -> list[str]:
    """Files named by paths, directories (searched for known endings) and glob patterns, in a stable order."""
    found: list[str] = []
    for path in paths:
        if is_remote(path) or (any(c in path for c in "*?[") and not os.path.exists(path)):
            found += _match(path)
        elif os.path.isdir(path):
            found += _in_directory(path)
        elif os.path.exists(path):
            found.append(path)
        else:
            raise UserError(f"{path}: no such file or directory")
    return list({path if is_remote(path) else os.path.realpath(path): path for path in reversed(found)}.values())[::-1]


def _match(pattern: str) -> list[str]:
    from apache_beam.io.filesystems import FileSystems

    files = sorted(m.path for m in FileSystems.match([pattern])[0].metadata_list)
    if not files:
        raise UserError(f"{pattern}: no file matches")
    return files


def _in_directory(directory: str) -> list[str]:
    seen = [p for p in sorted(Path(directory).rglob("*")) if p.is_file()]
    hidden = {p for p in seen if any(part.startswith(".") for part in p.relative_to(directory).parts)}
    files = [str(p) for p in seen if _ending(str(p)) in KINDS and p not in hidden]
    if skipped := [str(p) for p in seen if str(p) not in files]:
        log.info("%s: %d files not read, such as %s", directory, len(skipped), skipped[0])
    if not files:
        raise UserError(f"{directory}: no data in this directory; looked for {', '.join(sorted(KINDS))} (and .gz)")
    return files


def _ending(path: str) -> str:
    return PurePosixPath(path.lower().removesuffix(".gz")).suffix


def stem(path: str) -> str:
    """The file's name without its endings and shard number: the default name of a source."""
    name = PurePosixPath(path).name
    bare = re.sub(r"(\.gz)?$", "", name, count=1, flags=re.IGNORECASE)
    bare = bare[: len(bare) - len(_ending(path))]
    return re.sub(r"-\d{5}-of-\d{5}$", "", bare) or name


def open_bytes(path: str) -> BinaryIO:
    """Open for reading, gunzipping what starts with gzip's magic number. Errors are `UserError`s."""
    try:
        file = _open_raw(path)
        if file.read(2) == b"\x1f\x8b":
            file.seek(0)
            return io.BufferedReader(gzip.GzipFile(fileobj=file), 1 << 20)  # type: ignore[arg-type]
        file.seek(0)
        return file
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None


def _open_raw(path: str) -> BinaryIO:
    if not is_remote(path):
        return open(path, "rb")
    from apache_beam.io.filesystem import CompressionTypes
    from apache_beam.io.filesystems import FileSystems

    return FileSystems.open(path, compression_type=CompressionTypes.UNCOMPRESSED)


def kind_of(path: str) -> str:
    """How a file is laid out, from its first bytes and, where those do not tell, its ending."""
    with open_bytes(path) as file:
        head = _read(path, file, 1 << 16)
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise UserError(f"{path}: the text is UTF-16; save it as UTF-8")
    if head.startswith(b"PAR1"):
        return "parquet"
    if _ending(path) == ".parquet":
        raise UserError(f"{path}: ends in .parquet but does not start as a parquet file")
    text = head.removeprefix(codecs.BOM_UTF8).lstrip()
    if not text:
        raise UserError(f"{path}: the file is empty")
    if _ending(path) in (".csv", ".tsv"):
        return "csv"
    if text[:1] == b"[":
        return "jsonl" if _ending(path) in (".jsonl", ".ndjson") and _is_lines(text) else "json"
    if text[:1] == b"{":
        return "jsonl" if _first_line_is_object(text) or _ending(path) != ".json" else "json"
    kind = KINDS.get(_ending(path))
    if kind is None:
        raise UserError(f"{path}: neither JSON, JSON lines, CSV nor parquet (starts with {text[:20]!r})")
    return kind


def _first_line_is_object(text: bytes) -> bool:
    """Tell JSON lines from one pretty-printed object; a first line longer than what was read counts as a line."""
    line, newline, _ = text.partition(b"\n")
    return not newline or isinstance(_parse(line), dict)


def _is_lines(text: bytes) -> bool:
    """Whether text that starts with a list is one value per line, and not one array over all lines."""
    line, _, rest = text.partition(b"\n")
    return bool(rest.strip()) and not isinstance(_parse(line), Reject)


def _read(path: str, file: BinaryIO, size: int) -> bytes:
    try:
        return file.read(size)
    except _GZIP_ERRORS as error:
        raise UserError(f"{path}: damaged or truncated gzip ({error}); fetch the file again") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None


def survey(path: str, kind: str) -> tuple[dict[str, Any], list[Range]]:
    """Read a file once: its facts (name, bytes, sha256) and the ranges it is best read in.

    Plain JSON lines are cut behind newlines, so that each range knows its first line number; parquet is cut
    into its row groups; everything else is one range.
    """
    with _open_raw(path) as file:
        zipped = file.read(2) == b"\x1f\x8b"
    cut_every = RANGE_BYTES if kind == "jsonl" and not zipped else float("inf")
    sha, size, lines, cuts = hashlib.sha256(), 0, 0, [(0, 1)]  # cuts: byte offset, number of the line there
    with _open_raw(path) as file:
        while chunk := file.read(1 << 20):
            if size + len(chunk) - cuts[-1][0] > cut_every and (end := chunk.rfind(b"\n") + 1):
                cuts.append((size + end, lines + chunk.count(b"\n", 0, end) + 1))
            lines += chunk.count(b"\n")
            size += len(chunk)
            sha.update(chunk)
    facts = {"file": PurePosixPath(path).name, "bytes": size, "sha256": sha.hexdigest()}
    if kind == "parquet":
        return facts, _row_groups(path)
    stops = [offset for offset, _ in cuts[1:]] + [-1]
    return facts, [Range(path, kind, start, stop, line) for (start, line), stop in zip(cuts, stops, strict=True)]


def _row_groups(path: str) -> list[Range]:
    with open_parquet(path) as file:
        sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    return [Range(path, "parquet", i, i + 1, 1 + sum(sizes[:i])) for i in range(len(sizes))]


# --- reading records -----------------------------------------------------------------------------


def records(of: Range) -> Iterator[Raw]:
    """The records of a range, in order. A damaged file is a `UserError`; a damaged record is its own `Reject`."""
    read = {"jsonl": _lines, "json": _array, "csv": _csv, "parquet": _parquet}[of.kind]
    try:
        yield from read(of)
    except _GZIP_ERRORS as error:
        raise UserError(f"{of.path}: damaged or truncated gzip ({error}); fetch the file again") from None


def _parse(line: bytes) -> Any:
    """The JSON value of `line`, or a `Reject`. orjson is fast and strict; json takes NaN and huge integers."""
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


def _lines(of: Range) -> Iterator[Raw]:
    with open_bytes(of.path) as file:
        if of.start:
            file.seek(of.start)
        at, position = of.start, of.first
        while (of.stop < 0 or at < of.stop) and (line := file.readline()):
            at += len(line)
            text = (line.removeprefix(codecs.BOM_UTF8) if position == 1 else line).rstrip(b"\r\n")
            if text.strip():
                yield Raw(position, text, _parse(text))
            position += 1


def _array(of: Range) -> Iterator[Raw]:
    """The elements of a JSON array, one at a time: the array is never in memory whole."""
    with open_bytes(of.path) as file:
        reader = codecs.getreader("utf-8-sig")(file, "surrogateescape")
        text, position, done = reader.read(1 << 20).lstrip(), 1, False
        if not text.startswith("["):
            text, done = "[" + text + reader.read() + "]", True  # one object is an array of one
        decoder, at = json.JSONDecoder(), 1
        while True:
            while at < len(text) and text[at] in " \t\r\n,":
                at += 1
            if text[at : at + 1] == "]":
                if text[at + 1 :].strip() or reader.read(1 << 20).strip():
                    raise UserError(f"{of.path}: more follows the JSON array; write one array, or one record per line")
                return
            try:
                value, end = decoder.raw_decode(text, at)
                if end == len(text) and not done:
                    raise ValueError("the buffer ends here")  # a number may go on in the next one
            except (ValueError, RecursionError) as error:
                more = reader.read(max(1 << 20, len(text) - at))
                if not more:
                    raise UserError(
                        f"{of.path}: the JSON array breaks off or is invalid after record {position - 1} ({error})"
                    ) from None
                text, at = text[at:] + more, 0
                continue
            payload = text[at:end].encode("utf-8", "surrogateescape")
            yield Raw(position, payload, value if isinstance(value, dict) else _parse(payload))
            position, at = position + 1, end


def _csv(of: Range) -> Iterator[Raw]:
    csv.field_size_limit(1 << 30)
    with open_bytes(of.path) as file:
        text = io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline="")
        first = next((line for line in text if line.strip()), "")
        told = re.fullmatch(r"sep=(.)", first.strip())  # Excel's way of naming the delimiter
        delimiter = told[1] if told else max(",\t;|", key=first.count)
        rows = csv.DictReader(text if told else chain([first], text), delimiter=delimiter, strict=True)
        try:
            _require_distinct(rows.fieldnames or [], of.path)
            for position, row in enumerate(rows, 1):
                yield _csv_row(position, row)
        except csv.Error as error:
            raise UserError(f"{of.path}: not valid CSV ({error}); is a quote left open?") from None


def _csv_row(position: int, row: dict[Any, Any]) -> Raw:
    if None not in row:
        return Raw(position, None, row)
    more = row.pop(None)
    payload = json.dumps({**row, "cells beyond the header": more}).encode()
    return Raw(position, payload, Reject("wrong_shape", f"{len(more)} more cells than the header has"))


def _require_distinct(names: Sequence[str], path: str) -> None:
    if twice := next((name for name in names if list(names).count(name) > 1), None):
        raise UserError(f"{path}: two columns are called {twice!r}; rename one")


def open_parquet(path: str) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(_open_raw(path))
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path}: not a readable parquet file ({error}); is it whole?") from None


def _parquet(of: Range) -> Iterator[Raw]:
    position = of.first
    with open_parquet(of.path) as file:
        _require_distinct(file.schema_arrow.names, of.path)
        groups = list(range(of.start, file.num_row_groups if of.stop < 0 else of.stop))
        try:
            for batch in file.iter_batches(batch_size=1000, row_groups=groups):
                yield from _python_rows(batch, position)
                position += batch.num_rows
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(f"{of.path}: damaged parquet near record {position} ({error})") from None


def _python_rows(batch: pa.RecordBatch, position: int) -> Iterator[Raw]:
    """Rows as Python values; a row that Python cannot hold (a year 146,000, text that is not UTF-8) is rejected."""
    try:
        rows: list[Any] = batch.to_pylist()
    except (ValueError, OverflowError, KeyError):
        rows = [_python_row(batch.slice(i, 1)) for i in range(batch.num_rows)]
    for i, row in enumerate(rows):
        text = json.dumps({"unreadable row": row.detail}).encode() if isinstance(row, Reject) else None
        yield Raw(position + i, text, row)


def _python_row(row: pa.RecordBatch) -> Any:
    try:
        return row.to_pylist()[0]
    except UnicodeDecodeError as error:
        return Reject("invalid_unicode", str(error))
    except (ValueError, OverflowError, KeyError) as error:
        return Reject("wrong_type", f"{type(error).__name__}: {error}")


# --- writing part files --------------------------------------------------------------------------


class PartWriter:
    """Writes Arrow tables to one zstd parquet file, a row group each time enough text has gathered.

    A `write` is never split over two row groups, so what must stay together goes in one call. Without rows
    there is no file.
    """

    def __init__(
        self, path: str, schema: pa.Schema, facts: dict[str, Any] | None = None, group_bytes: int = GROUP_BYTES
    ):
        metadata = {**(schema.metadata or {}), "una": json.dumps(facts or {}, sort_keys=True)}
        self.path, self.schema = path, schema.with_metadata(metadata)
        self.rows, self._bytes, self._group_bytes = 0, 0, group_bytes
        self._pending: list[pa.Table] = []
        self._file: Any = None
        self._writer: pq.ParquetWriter | None = None

    def write(self, table: pa.Table) -> None:
        self._pending.append(table)
        self.rows += table.num_rows
        self._bytes += table.nbytes
        if self._bytes >= self._group_bytes or sum(t.num_rows for t in self._pending) >= GROUP_ROWS:
            self._flush()

    def _flush(self) -> None:
        if self._writer is None:
            self._file = create(self.path)
            repeated = [c for c in ("type", "source", "labeller", "reason", "source_file") if c in self.schema.names]
            self._writer = pq.ParquetWriter(self._file, self.schema, compression="zstd", use_dictionary=repeated)
        table = pa.concat_tables(self._pending).combine_chunks().replace_schema_metadata(self.schema.metadata)
        self._writer.write_table(table, row_group_size=max(1, table.num_rows))
        self._pending, self._bytes = [], 0

    def close(self) -> dict[str, Any] | None:
        """Finish the file; its facts (path, rows, bytes, sha256), or None when nothing was written."""
        if self._pending:
            self._flush()
        if self._writer is None:
            return None
        self._writer.close()
        self._file.close()
        return {"path": self.path, "rows": self.rows, **_size_and_hash(self.path)}


def _size_and_hash(path: str) -> dict[str, Any]:
    sha, size = hashlib.sha256(), 0
    with _open_raw(path) as file:
        while chunk := file.read(1 << 20):
            sha.update(chunk)
            size += len(chunk)
    return {"bytes": size, "sha256": sha.hexdigest()}


def create(path: str) -> BinaryIO:
    """Open a new file for writing, making its directory."""
    if is_remote(path):
        from apache_beam.io.filesystem import CompressionTypes
        from apache_beam.io.filesystems import FileSystems

        return FileSystems.create(path, compression_type=CompressionTypes.UNCOMPRESSED)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    return open(path, "wb")
