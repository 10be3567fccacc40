"""Reference log-probs that were computed once: a content-addressed store in one SQLite file that processes share.

Where they share no disk, `pieces` has the same.

A key is a hash of a row's token ids and of all that its log-probs depend on (the space: weights, adapter, dtype,
engine, …), so that nothing is found that another reference said, and nothing is computed again because a row moved,
another dataset holds it, or a setting changed that changes no log-prob. What `put` was given is on the disk when it
returns: a process that is killed loses nothing of it, and several may write at once. Values carry a checksum.

What another part of the same run puts is not seen by `get`: a row that two chunks hold is computed in both, and the
output does not depend on which worker was faster.
"""

import hashlib
import json
import sqlite3
import threading
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from schemas.errors import UserError

NAME = "logps.sqlite"
_VERSION = 1
_AT_A_TIME = 500  # keys in one query
_TABLES = """
CREATE TABLE IF NOT EXISTS entries (key BLOB PRIMARY KEY, logps BLOB NOT NULL, run BLOB NOT NULL, part TEXT NOT NULL,
    space BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS spaces (space BLOB PRIMARY KEY, facts TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS reports (key BLOB PRIMARY KEY, report TEXT NOT NULL);
"""
# what log-probs depend on, of a reference's fingerprint; tokenizer and template are in the token ids
VALUES = ("weights", "config", "adapter", "dtype", "quantization", "engine")


def space_of(reference: Mapping[str, Any]) -> dict[str, Any]:
    """What decides a row's log-probs beside its token ids."""
    return {name: reference[name] for name in VALUES if reference.get(name) is not None}


def _hash(*parts: bytes) -> bytes:
    made = hashlib.blake2b(digest_size=16)
    for part in parts:
        made.update(len(part).to_bytes(8, "little") + part)
    return made.digest()


class Keyed:
    """Names the entries of one space."""

    def __init__(self, space: Mapping[str, Any]):
        self.facts = dict(space)
        self.space = _hash(json.dumps(self.facts, sort_keys=True).encode())

    def key(self, prompt: Sequence[int], response: Sequence[int]) -> bytes:
        """128 bits over the space and the token ids."""
        return _hash(self.space, np.asarray(prompt, np.int64).tobytes(), np.asarray(response, np.int64).tobytes())


class Store(Keyed):
    """The entries of one space in a directory, as one run sees them. For any number of threads."""

    every = 0.0  # seconds between two calls of `put`: none

    def __init__(self, directory: str | Path, space: Mapping[str, Any], run: str):
        super().__init__(space)
        self.path = Path(directory) / NAME
        self._run, self._lock = _hash(run.encode())[:8], threading.Lock()
        with self._told():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(self.path, timeout=120, isolation_level=None, check_same_thread=False)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
            (version,) = self._db.execute("PRAGMA user_version").fetchone()
            if version not in (0, _VERSION):
                raise UserError(f"{self.path}: written by another una (version {version}); name another --store")
            self._db.executescript(f"{_TABLES}PRAGMA user_version = {_VERSION};")
            facts = json.dumps(self.facts, sort_keys=True)
            self._db.execute("INSERT OR IGNORE INTO spaces VALUES (?, ?)", (self.space, facts))

    def get(self, keys: Sequence[bytes], part: str = "") -> dict[bytes, np.ndarray]:
        """The log-probs of those keys that are there, but for what other parts of this run have put."""
        found: dict[bytes, np.ndarray] = {}
        for start in range(0, len(keys), _AT_A_TIME):
            some = keys[start : start + _AT_A_TIME]
            query = f"SELECT key, logps FROM entries WHERE key IN ({','.join('?' * len(some))}) "
            with self._lock, self._told():
                rows = self._db.execute(f"{query} AND (run != ? OR part = ?)", [*some, self._run, part]).fetchall()
            found.update({key: self._logps(value) for key, value in rows})
        return found

    def put(self, entries: Mapping[bytes, np.ndarray], part: str = "") -> None:
        """Keep log-probs, in one transaction; an entry that is there already stays."""
        rows = []
        for key, logps in entries.items():
            data = np.asarray(logps, np.float32).tobytes()
            rows.append((key, data + zlib.crc32(data).to_bytes(4, "little"), self._run, part, self.space))
        with self._lock, self._told():
            self._db.execute("BEGIN IMMEDIATE")
            self._db.executemany("INSERT OR IGNORE INTO entries VALUES (?, ?, ?, ?, ?)", rows)
            self._db.execute("COMMIT")

    def report(self, key: bytes) -> dict[str, Any] | None:
        """What `keep_report` was given under this key."""
        with self._lock, self._told():
            found = self._db.execute("SELECT report FROM reports WHERE key = ?", (key,)).fetchone()
        return found and json.loads(found[0])

    def keep_report(self, key: bytes, report: dict[str, Any]) -> None:
        with self._lock, self._told():
            self._db.execute("INSERT OR REPLACE INTO reports VALUES (?, ?)", (key, json.dumps(report)))

    def others(self) -> list[tuple[dict[str, Any], int]]:
        """The facts of the other spaces that the store holds, and how many entries of each."""
        with self._lock, self._told():
            query = "SELECT facts, (SELECT count(*) FROM entries e WHERE e.space = s.space) FROM spaces s"
            rows = self._db.execute(f"{query} WHERE space != ?", (self.space,)).fetchall()
        return [(json.loads(facts), n) for facts, n in rows if n]

    def _logps(self, value: bytes) -> np.ndarray:
        data, sum_ = value[:-4], value[-4:]
        if zlib.crc32(data).to_bytes(4, "little") != sum_:
            raise UserError(f"{self.path}: is damaged (an entry has another checksum); {_CURE}")
        return np.frombuffer(data, np.float32)

    @contextmanager
    def _told(self) -> Iterator[None]:
        """What SQLite and the disk say, as `UserError`."""
        try:
            yield
        except sqlite3.OperationalError as error:
            if "malformed" in str(error) or "disk I/O" in str(error):
                raise UserError(f"{self.path}: is damaged ({error}); {_CURE}") from None
            raise UserError(f"{self.path}: cannot be used ({error}); see to it, or name another --store") from None
        except sqlite3.DatabaseError as error:
            raise UserError(f"{self.path}: is damaged or no store ({error}); {_CURE}") from None
        except OSError as error:
            raise UserError(f"{self.path}: cannot be used ({error}); name another --store") from None


_CURE = "move it away, and its rows are scored again"
