"""Dataset directories: where a stage writes, and the one commit that makes its output appear.

A stage writes part files into a staging directory beside its output. `commit` counts that nothing was
lost, names the parts, writes the card and the manifest, and renames the directory into place. A store renames
nothing: there it copies the parts, and they are a dataset once there is a manifest, which goes first and comes last.
"""

import dataclasses
import fcntl
import json
import logging
import os
import shutil
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipelines import io, remote
from schemas.errors import POLICY_REASONS, REASONS, Reject, UsageError, UserError
from schemas.feedback import FEEDBACK, REFERENCE_COLUMNS, SCORED
from schemas.manifest import NAME, Manifest

log = logging.getLogger(__name__)
LOCK = ".lock"
JOURNAL = "commit.json"  # in a store's staging directory: the names that a commit deletes and writes
MOST_PARTS = 20_000  # part files of a stage, as long as their chunks are smaller than a row group
DETAIL = 4_000  # characters of why a row was rejected; a judge's answer is part of it
_locks: list[Any] = []

Result = dict[str, Any]  # what one unit of work reports; see `result`


def staging(output: str) -> str:
    """The directory beside `output` that a stage writes into before it commits."""
    if not io.is_remote(output):
        output = os.path.realpath(output)
    head, _, name = output.rstrip("/").rpartition("/")
    return f"{head}/.{name}.incomplete" if head else f"{'/' if output.startswith('/') else ''}.{name}.incomplete"


def refuse(output: str, inputs: Iterable[str]) -> None:
    """`UsageError` when writing `output` would touch an input, or the output would be read as one."""
    target = _place(output)
    if io.is_remote(output):
        _refuse_in_store(output)
    for path in [Path.cwd(), Path.home(), *map(_place, inputs)]:
        if path == target or target in path.parents:
            raise UsageError(f"--output {output}: cannot be the output, it holds {path}; name another directory")
    for name in inputs:
        if (io.is_remote(name) or os.path.isdir(name)) and _place(name) in target.parents:
            raise UsageError(f"--output {output}: lies inside the input {name}; name a directory outside it")


def _place(path: str) -> Path:
    return Path(path) if io.is_remote(path) else Path(path).resolve()


def _refuse_in_store(output: str) -> None:
    if output.startswith("hf://"):
        raise UsageError(f"--output {output}: hf:// can only be read; write a directory and `hf upload` it")
    if len(Path(output).parts) < 3:
        raise UsageError(f"--output {output}: is a whole bucket; name a directory in it, such as {output}/rows")
    if any(c in output for c in "*?["):
        raise UsageError(f"--output {output}: holds one of * ? [, which stand for others in paths; choose another name")


def prepare(output: str, overwrite: bool) -> str:
    """Make an empty staging directory and return it; `UserError` if `output` is taken and not to be overwritten."""
    stage = staging(output)
    if io.is_remote(output):
        _prepare_in_store(stage, output, overwrite)
        return stage
    target = Path(output)
    if target.is_file() or (target.is_dir() and any(target.iterdir()) and not overwrite):
        raise UserError(f"{output}: exists and is not empty; pass --overwrite to replace it, or another --output")
    Path(stage).mkdir(parents=True, exist_ok=True)
    _lock(stage, output)
    try:
        for left in Path(stage).iterdir():  # by a run that was killed
            if left.name != LOCK:
                shutil.rmtree(left) if left.is_dir() else left.unlink()
    except KeyboardInterrupt:
        _discard(stage)
        raise
    return stage


def _prepare_in_store(stage: str, output: str, overwrite: bool) -> None:
    """Delete what a killed run left: its parts, and of a commit that it did not end the files that it names."""
    left, held, journal = remote.below(stage), remote.below(output), f"{stage}/{JOURNAL}"
    if journal in left and f"{output}/{NAME}" not in held:
        with io.open_raw(journal) as file:
            half = sorted(held.keys() & {f"{output}/{name}" for name in json.loads(file.read())})
        remote.delete(half)
        held = {path: size for path, size in held.items() if path not in half}
    if held and not overwrite:
        raise UserError(f"{output}: holds {io.name(min(held))}; pass --overwrite to replace it, or another --output")
    remote.delete(list(left))
    io.write_whole(journal, b"[]")  # who may not write there is told now


def _lock(stage: str, output: str) -> None:
    """Hold the staging directory until this process ends, so that two runs never write one output."""
    lock = open(f"{stage}/{LOCK}", "w")  # noqa: SIM115 - open as long as the process lives
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UserError(f"{output}: another run is writing it; wait for its end, or name another --output") from None
    _locks.append(lock)


@contextmanager
def staged(stage: str, kept: bool = False) -> Iterator[None]:
    """Around all that writes into a staging directory and commits it: at the end nothing is left of it, unless it is
    `kept` for a job that starts later."""
    try:
        yield
    except BaseException:
        _discard(stage)
        raise
    if io.is_remote(stage) and not kept:  # a local one has become the output
        _discard(stage)


def _discard(stage: str) -> None:
    if not io.is_remote(stage):
        shutil.rmtree(stage, ignore_errors=True)
        return
    try:
        remote.delete(list(remote.below(stage)))
    except UserError as error:
        log.warning("%s; the next run to this output deletes what is left in %s", error, stage)


def chunk_rows(least: int, rows: int) -> int:
    """Rows of a part file: `least`, or so many that a large dataset has no more files than can be listed and copied."""
    return min(max(least, rows // MOST_PARTS), max(least, io.GROUP_ROWS))


def part_name(index: Iterable[int]) -> str:
    """What the part files of a unit of work are called; `index` orders the units."""
    return "-".join(f"{i:06d}" for i in index)


def result(index: list[int], *, split: str = "train") -> Result:
    """An empty report of one unit of work; `index` orders the units."""
    return {
        "index": index,
        "split": split,
        "inputs": 0,
        "accepted": 0,
        "rejected": Counter(),
        "rejected_parts": Counter(),
        "rows": Counter(),
        "duplicates": 0,
        "touched": Counter(),
        "data": None,
        "rejects": None,
        "waiting": None,
        "pieces": [],
        "spreads": {},
    }


def refused(rows: Any, i: int, why: Reject, position: int, path: str, part: str | None = None) -> dict[str, Any]:
    """A row of rejected/ for row `i` of a table, or for a part of it; `position`: its number in its file, from 1."""
    return {
        "reason": why.reason,
        "detail": why.detail.encode("utf-8", "backslashreplace").decode()[:DETAIL],
        "source_file": io.name(path),
        "position": position,
        "part": part,
        "payload": json.dumps(rows.slice(i, 1).to_pylist()[0], ensure_ascii=False).encode(),
    }


def commit(results: list[Result], manifest: Manifest, stage: str, output: str) -> Manifest:
    """Make the staged parts the dataset at `output`; the manifest is filled in from `results` and returned."""
    results = sorted(results, key=lambda r: (r["split"], r["index"]))
    _add_up(results, manifest)
    moves = _names(results)
    manifest.files = [{**facts, "path": name} for facts, name in moves]
    texts = {"README.md": card(manifest), NAME: manifest.to_json()}
    (_commit_in_store if io.is_remote(output) else _commit_local)(moves, texts, stage, output)
    return manifest


def commit_all(results: list[Result], *, manifest: Manifest, stage: str, output: str) -> None:
    """Commit a stage whose inputs are rows, after counting that every one of them was read."""
    found = sum(r["inputs"] for r in results)
    assert found == manifest.inputs, f"{found} of {manifest.inputs} rows were read"
    commit(results, manifest, stage, output)


def _add_up(results: list[Result], manifest: Manifest) -> None:
    for name in ("rejected", "rejected_parts", "rows", "touched"):
        setattr(manifest, name, dict(sorted(sum((Counter(r[name]) for r in results), Counter()).items())))
    manifest.inputs = sum(r["inputs"] for r in results)
    manifest.accepted = sum(r["accepted"] for r in results)
    manifest.duplicates = sum(r["duplicates"] for r in results)
    splits: Counter[str] = Counter()
    for r in results:
        splits[r["split"]] += sum(r["rows"].values())
    manifest.splits = {
        split: splits[split] for split in sorted(splits, key=lambda s: (s != "train", s)) if splits[split]
    }
    lost = manifest.inputs - manifest.accepted - manifest.duplicates - sum(manifest.rejected.values())
    assert lost == 0, f"{lost} of {manifest.inputs} inputs are neither accepted nor rejected"


def _names(results: list[Result]) -> list[tuple[dict[str, Any], str]]:
    """Final name of every part: data/{split}-0000i-of-0000n.parquet and rejected/rejected-….parquet."""
    moves = []
    for folder, key in (("data", "data"), ("rejected", "rejects")):
        groups: dict[str, list[dict[str, Any]]] = {}
        for r in results:
            if r[key]:
                groups.setdefault(r["split"] if key == "data" else "rejected", []).append(r[key])
        for name, parts in groups.items():
            moves += [(p, f"{folder}/{name}-{i:05d}-of-{len(parts):05d}.parquet") for i, p in enumerate(parts)]
    return moves


def _commit_local(moves: list[tuple[dict[str, Any], str]], texts: dict[str, str], stage: str, output: str) -> None:
    for facts, name in moves:
        (Path(stage) / name).parent.mkdir(exist_ok=True)
        os.replace(facts["path"], Path(stage) / name)
    (Path(stage) / "data").mkdir(exist_ok=True)
    shutil.rmtree(Path(stage) / "parts", ignore_errors=True)
    for name, text in texts.items():
        (Path(stage) / name).write_text(text, "utf-8")
    (Path(stage) / LOCK).unlink()
    target = Path(os.path.realpath(output))
    if not target.exists() or not any(target.iterdir()):
        os.rename(stage, target)
        return
    for name in (NAME, "data", "rejected", "README.md", "report.html"):  # the manifest first: now it is no dataset
        old = target / name
        shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
    for new in sorted(Path(stage).iterdir(), key=lambda p: p.name == NAME):  # and last: now it is one again
        os.rename(new, target / new.name)
    os.rmdir(stage)


def _commit_in_store(moves: list[tuple[dict[str, Any], str]], texts: dict[str, str], stage: str, output: str) -> None:
    """Staged parts are copied, so that a worker may do it again; should none do, the next run reads the journal."""
    old = {path.removeprefix(f"{output}/") for path in remote.below(output)}
    old = {name for name in old if name in (NAME, *texts, "report.html") or name.startswith(("data/", "rejected/"))}
    new = {name: facts["path"] for facts, name in moves}
    io.write_whole(f"{stage}/{JOURNAL}", json.dumps(sorted({*old, *new, *texts})).encode())
    remote.delete([f"{output}/{NAME}"] if NAME in old else [])  # now it is no dataset
    remote.delete([f"{output}/{name}" for name in sorted(old - {NAME})])
    remote.copy({path: f"{output}/{name}" for name, path in new.items()})
    for name, text in texts.items():  # the manifest last: now it is one again
        io.write_whole(f"{output}/{name}", text.encode())


def read_manifest(directory: str) -> Manifest:
    """The manifest of a dataset directory, local or remote."""
    if not io.is_remote(directory):
        return Manifest.read(directory)
    path = f"{directory.rstrip('/')}/{NAME}"
    if not remote.exists(path):
        raise UserError(f"{directory}: no {NAME} here, so it is no dataset directory; run `una ingest` first")
    with io.open_bytes(path) as file:
        return Manifest.from_json(file.read().decode(), path)


def shards(manifest: Manifest) -> list[dict[str, Any]]:
    """What the manifest says of the files in data/, in order."""
    return [f for f in manifest.files if f["path"].startswith("data/")]


def data_files(directory: str, manifest: Manifest) -> list[str]:
    """Paths of the data shards, in order; `UserError` if one is missing or has another size than recorded."""
    listed = shards(manifest)
    if not listed:
        raise UserError(f"{directory}: the dataset has no rows")
    root = directory.rstrip("/")
    stored = remote.below(f"{root}/data") if io.is_remote(root) else {}
    for facts in listed:
        path = f"{root}/{facts['path']}"
        size = stored.get(path) if io.is_remote(path) else os.path.getsize(path) if os.path.isfile(path) else None
        if size != facts["bytes"]:
            raise UserError(f"{path}: missing or not as {NAME} recorded it; run the stage that wrote it again")
    return [f"{root}/{f['path']}" for f in listed]


def intact(directory: str) -> bool:
    """Whether the directory holds a whole dataset."""
    try:
        manifest = read_manifest(directory)
        return not manifest.rows or bool(data_files(directory, manifest))
    except UserError:
        return False


def schema_of(manifest: Manifest) -> Any:
    return SCORED if manifest.reference else FEEDBACK


def summary(manifest: Manifest, output: str, max_rejected: float = 1.0) -> dict[str, Any]:
    """What a stage reports; `failed` is set when more than `max_rejected` of the inputs were rejected.

    Drops that a policy asked for, such as ties, do not count against the limit.
    """
    facts = dataclasses.asdict(manifest)
    names = ["inputs", "accepted", "rejected", "rejected_parts", "rows", "splits", "duplicates"]
    names += ["stage", "policies", "touched", "statistics"]
    report: dict[str, Any] = {"output": output, **{name: facts[name] for name in names}}
    counted = {r: n for r, n in manifest.rejected.items() if r not in POLICY_REASONS}
    share = sum(counted.values()) / max(1, manifest.inputs)
    if share > max_rejected:
        worst = max(counted, key=lambda reason: (reason != "comparison_incomplete", counted[reason]))
        report["failed"] = (
            f"{sum(counted.values())} of {manifest.inputs} inputs were rejected ({share:.1%}, mostly {worst}), more "
            f"than --max-rejected {max_rejected:g}; see {output}/rejected, then mend the input or raise the limit"
        )
    elif not manifest.rows:
        report["failed"] = f"no rows came out of {manifest.inputs} inputs{_said(output, manifest)}"
    return report


def _said(output: str, manifest: Manifest) -> str:
    """Why the first rejected record was, and where it is; where none is kept, as of a view, all reasons."""
    path = next((f["path"] for f in manifest.files if f["path"].startswith("rejected/")), None)
    if path is None:
        return "".join(f"; {n} with {reason}: {REASONS[reason]}" for reason, n in manifest.rejected.items())
    with io.open_parquet(f"{output}/{path}") as file:
        first = file.read_row_group(0, columns=["reason", "detail"]).slice(0, 1).to_pylist()[0]
    return f", the first with {first['reason']}: {first['detail']}; see {output}/rejected"


def print_summary(report: dict[str, Any]) -> None:
    """The summary as a short text on stdout."""
    print(f"inputs {report['inputs']}  accepted {report['accepted']}  rejected {sum(report['rejected'].values())}")
    for name in ("rows", "splits", "rejected", "rejected_parts"):
        if report[name]:
            print(f"{name.replace('_', ' ')}: " + ", ".join(f"{k} {v}" for k, v in report[name].items()))
    if report["duplicates"]:
        print(f"duplicates removed: {report['duplicates']}")
    decided = _decided(report)
    told = ", ".join(f"{k}={short(v)}{decided.get(k, '')}" for k, v in report["policies"].items())
    print(
        textwrap.fill(f"policies: {told}", 110, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    )
    if report["stage"] == "ingest":
        for source, one in report["statistics"].get("agreement", {}).items():
            print(f"agreement in {source}: " + ", ".join(f"{k} {v}" for k, v in one.items()))
    print(report["output"])


def _decided(report: dict[str, Any]) -> dict[str, str]:
    """How many records or rows each policy decided: what it kept or changed, and what it dropped."""
    counts = Counter(report["touched"])
    dropped = Counter(report["rejected"]) + Counter(report["rejected_parts"])
    for policy, reason in _DROPS.items():
        counts[policy] += dropped[reason]
    asked = report["policies"].get("duplicates") == "reject"
    counts["duplicates" if asked else "annotators"] += dropped["conflict"]
    return {policy: f" ({n})" for policy, n in counts.items() if n}


_DROPS = {  # policy → the reason of what it drops
    "ties": "tie",
    "missing": "missing_label",
    "identical_responses": "identical_responses",
    "out_of_range": "reward_out_of_range",
    "mapping": "filtered",
}


def short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return text if len(text) <= 100 else f"{text[:99]}…"


# --- the card ------------------------------------------------------------------------------------


def card(manifest: Manifest) -> str:
    """README.md of a dataset directory: a card whose YAML header lets `datasets.load_dataset` find the splits."""
    import yaml

    splits = manifest.splits or {"train": 0}
    sizes = {s: sum(f["bytes"] for f in manifest.files if f["path"].startswith(f"data/{s}-")) for s in splits}
    header = {
        "license": manifest.policies.get("license", "unknown"),
        "tags": ["una", "human-feedback", "alignment"],
        "size_categories": [_size_category(sum(splits.values()))],
        "configs": [
            {
                "config_name": "default",
                "data_files": [{"split": s, "path": f"data/{s}-*.parquet"} for s in splits],
            }
        ],
        "dataset_info": {
            "features": _features(manifest),
            "splits": [{"name": s, "num_bytes": sizes[s], "num_examples": n} for s, n in splits.items()],
            "download_size": sum(sizes.values()),
            "dataset_size": sum(sizes.values()),
        },
    }
    return f"---\n{yaml.safe_dump(header, sort_keys=False, allow_unicode=True)}---\n\n{_card_text(manifest)}"


def _features(manifest: Manifest) -> list[dict[str, Any]]:
    """The columns in the notation of `datasets` dataset cards."""
    import pyarrow as pa

    def feature(field: pa.Field) -> dict[str, Any]:
        if pa.types.is_list(field.type):
            inner = feature(field.type.value_field)
            inner.pop("name")
            return {"name": field.name, "list": inner.get("struct") or inner["dtype"]}
        if pa.types.is_struct(field.type):
            return {"name": field.name, "struct": [feature(field.type.field(i)) for i in range(field.type.num_fields)]}
        return {
            "name": field.name,
            "dtype": {"float": "float32", "double": "float64"}.get(str(field.type), str(field.type)),
        }

    return [feature(f) for f in schema_of(manifest)]


def _size_category(n: int) -> str:
    names = ["n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B", "1B<n<10B"]
    return names[max(0, min(len(str(max(1, n))) - 3, len(names) - 1))]


def _card_text(manifest: Manifest) -> str:
    columns = FEEDBACK if not manifest.reference else [*FEEDBACK, *REFERENCE_COLUMNS]
    table = "\n".join(f"| `{f.name}` | {f.type} | {f.metadata[b'description'].decode()} |" for f in columns)
    counts = "\n".join(f"| {kind} | {n} |" for kind, n in manifest.rows.items())
    sources = "\n".join(
        f"| {_cell(s['file'])} | {_cell(s['source'])} | {s['format']} | {s['sha256'][:12]} |" for s in manifest.sources
    )
    return (
        "# Feedback dataset\n\n"
        "One row per (prompt, response) with an explicit reward in [0, 1], for UNA training (arXiv 2408.15339).\n\n"
        f"| type | rows |\n|---|---|\n{counts}\n\n"
        f"Read {manifest.inputs} inputs, accepted {manifest.accepted}, rejected "
        f"{sum(manifest.rejected.values())}, removed {manifest.duplicates} exact duplicates. "
        "Every policy and file hash is in `manifest.json`.\n\n"
        f"## Columns\n\n| column | type | meaning |\n|---|---|---|\n{table}\n\n"
        f"## Sources\n\n| file | source | format | sha256 |\n|---|---|---|---|\n{sources}\n"
    )


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
