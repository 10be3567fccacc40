"""How far a run is, over all workers of the machine, and how long it will take yet."""

import logging
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from pipelines.labellers.cache import Cache

log = logging.getLogger(__name__)
EVERY = 5.0  # seconds between two lines
_LINES = 24  # the rate is that since the line before so many, so that what was in the cache soon drops out of it


class Done:
    """A worker's count of rows, parts of them too, which is added to that of all about once a second."""

    def __init__(self, cache: Cache, start: str):
        self._cache, self._start, self._rows, self._at = cache, start, 0.0, time.monotonic()

    def add(self, rows: float) -> None:
        self._rows += rows
        if time.monotonic() - self._at > 1:
            self.flush()

    def flush(self) -> None:
        self._cache.advance(self._start, self._rows)
        self._rows, self._at = 0.0, time.monotonic()


@contextmanager
def told(cache: str, start: str, total: int) -> Iterator[None]:
    """Tell every few seconds, until the block ends, how many rows are done and the time left."""
    over = threading.Event()
    thread = threading.Thread(target=_tell, args=(cache, start, total, over), daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _tell(where: str, start: str, total: int, over: threading.Event) -> None:
    cache = Cache(where)
    seen = deque([(time.monotonic(), 0.0)], maxlen=_LINES)
    while not over.wait(EVERY):
        now, done, (then, before) = time.monotonic(), cache.advance(start, 0.0), seen[0]
        seen.append((now, done))
        rate = (done - before) / (now - then)
        left = timedelta(seconds=round(max(0.0, total - done) / rate)) if rate > 0 else "unknown time"
        log.info("%.0f of %d rows have scores (%.1f/s), %s left", done, total, rate, left)
    cache.forget(start)
    cache.close()
