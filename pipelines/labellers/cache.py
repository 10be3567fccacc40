"""What was computed or paid for once: a content-addressed store in one SQLite file that several processes share.

An entry is on the disk when `put` returns from its transaction: a process that is killed loses nothing it has put.
"""

import hashlib
import json
import sqlite3
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

NAME = "cache.sqlite"
_AT_A_TIME = 500  # keys in one query


def key_of(content: Any) -> str:
    """256-bit hex over JSON values; the same for the same content on every machine."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=32).hexdigest()


class Cache:
    """Key → JSON value, and what has been spent. Opened anew in every process and thread that uses it."""

    def __init__(self, directory: str | Path):
        Path(directory).mkdir(parents=True, exist_ok=True)
        self._db = sqlite3.connect(Path(directory) / NAME, timeout=60, isolation_level=None, check_same_thread=False)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=NORMAL")
        self._db.execute("CREATE TABLE IF NOT EXISTS entries (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID")
        self._db.execute(
            "CREATE TABLE IF NOT EXISTS spent (run TEXT PRIMARY KEY, calls INTEGER NOT NULL, usd REAL NOT NULL)"
        )
        self._db.execute("CREATE TABLE IF NOT EXISTS unfinished (output TEXT PRIMARY KEY, run TEXT NOT NULL)")
        self._db.execute("CREATE TABLE IF NOT EXISTS progress (start TEXT PRIMARY KEY, rows REAL NOT NULL)")

    def get(self, keys: Iterable[str]) -> dict[str, Any]:
        """The entries of those keys that are there."""
        wanted, found = list(dict.fromkeys(keys)), {}
        for start in range(0, len(wanted), _AT_A_TIME):
            some = wanted[start : start + _AT_A_TIME]
            rows = self._db.execute(f"SELECT key, value FROM entries WHERE key IN ({','.join('?' * len(some))})", some)
            found.update({key: json.loads(value) for key, value in rows})
        return found

    def put(self, key: str, value: Any) -> None:
        """Keep an entry; one that is there already stays."""
        self.put_all({key: value})

    def put_all(self, entries: Mapping[str, Any]) -> None:
        """Keep entries, all of them or none; those that are there already stay."""
        rows = [(key, json.dumps(value)) for key, value in entries.items()]
        with self._db:
            self._db.execute("BEGIN IMMEDIATE")
            self._db.executemany("INSERT OR IGNORE INTO entries VALUES (?, ?)", rows)

    def spend(self, run: str, calls: int, usd: float) -> tuple[int, float]:
        """Add to what a run has spent, over all its processes; gives calls and USD with this."""
        added = self._db.execute(
            "INSERT INTO spent VALUES (?, ?, ?) ON CONFLICT (run) DO UPDATE SET calls = calls + ?, usd = usd + ? "
            "RETURNING calls, usd",
            (run, calls, usd, calls, usd),
        )
        return added.fetchall()[0]

    def spent(self, run: str) -> tuple[int, float]:
        """Calls and USD that a run has spent."""
        return self._db.execute("SELECT calls, usd FROM spent WHERE run = ?", (run,)).fetchone() or (0, 0.0)

    def advance(self, start: str, rows: float) -> float:
        """Add to the rows that the workers of one start of a run have done; gives those of all."""
        added = self._db.execute(
            "INSERT INTO progress VALUES (?, ?) ON CONFLICT (start) DO UPDATE SET rows = rows + ? RETURNING rows",
            (start, rows, rows),
        )
        return added.fetchall()[0][0]

    def begin(self, output: str) -> str:
        """The name of the run that writes an output: that of one which was cut short, so that what it spent counts."""
        self._db.execute("INSERT OR IGNORE INTO unfinished VALUES (?, ?)", (output, uuid.uuid4().hex))
        return self._db.execute("SELECT run FROM unfinished WHERE output = ?", (output,)).fetchone()[0]

    def finish(self, output: str) -> None:
        """The output is there: the next run that writes it has a budget of its own."""
        self._db.execute("DELETE FROM unfinished WHERE output = ?", (output,))

    def forget(self, start: str) -> None:
        """That start of a run is over: nobody asks for its progress any more."""
        self._db.execute("DELETE FROM progress WHERE start = ?", (start,))

    def close(self) -> None:
        self._db.close()
