"""Where a model's files are on this machine: a directory, a hub id's snapshot, or a copy of a store's objects.

Workers of a job on other machines each find their own; those of one machine share the copy.
"""

import fcntl
import fnmatch
import hashlib
import json
import logging
import os
import shutil
import tempfile
from pathlib import Path

from pipelines import remote
from schemas.errors import UserError
from schemas.fingerprint import MODEL_FILES, local_model

log = logging.getLogger(__name__)


def local(name: str | Path) -> Path:
    """The directory of a model on this machine, copied there from s3:// or gs:// if need be."""
    return _copied(str(name).rstrip("/")) if remote.is_remote(str(name)) else local_model(name)


def _copied(directory: str) -> Path:
    """A store's objects as a directory, named by what they are, so that a model that changed is another one."""
    objects = {
        path: size
        for path, size in remote.below(directory).items()
        if "/" not in (file := path[len(directory) + 1 :]) and any(fnmatch.fnmatch(file, p) for p in MODEL_FILES)
    }
    if not objects:
        raise UserError(f"{directory}: no model here; give a directory with config.json and weights")
    marks = [[path, size, remote.version(path)] for path, size in objects.items()]
    root = Path(os.environ.get("UNA_MODELS") or Path(tempfile.gettempdir()) / "una-models")
    where = root / hashlib.sha256(json.dumps(marks).encode()).hexdigest()[:32]
    root.mkdir(parents=True, exist_ok=True)
    with open(f"{where}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the others wait for the first
        if not where.is_dir():
            _copy(objects, where)
    return where


def _copy(objects: dict[str, int], where: Path) -> None:
    log.info("%s: copying %.1f GB to %s", min(objects), sum(objects.values()) / 1e9, where)
    partial = Path(f"{where}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    partial.mkdir()
    for path, size in objects.items():
        to = partial / path.rpartition("/")[2]
        with remote.open_raw(path) as file, open(to, "wb") as out:
            shutil.copyfileobj(file, out, 16 << 20)
        if to.stat().st_size != size:
            raise UserError(f"{path}: {to.stat().st_size} of {size} bytes were read; run again")
    partial.rename(where)
