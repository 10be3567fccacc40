"""One type of feedback as another: scores or verdicts out of comparisons, comparisons out of scores, and the like.

The rows are gathered by prompt (as `una publish` gathers them), projected, given new ids and written to a new
dataset directory, sorted as a published one is; splits, token ids and reference log-probs stay. Rows that already
have the type asked for stay as they are. What cannot be projected is left out and counted by reason; it is still in
the dataset that was read. The label that a row had is kept under `view` in its metadata.

Demonstrations and unlabelled rows have no projection. Verdicts become comparisons in two steps, by way of scores.
"""

import argparse
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import orjson
import pyarrow as pa

from pipelines import dataset, io, publish
from pipelines.plan import Piece, read
from schemas.command import share
from schemas.errors import UsageError
from schemas.feedback import check, check_comparisons, identify, stored
from schemas.manifest import Manifest

REASONS = {
    "no_projection": "rows of this type cannot become rows of the type asked for",
    "tie": "neither response of the comparison is better",
    "no_other_response": "the prompt has no other response that the same source and labeller scored",
    "equal_rewards": "all other responses of the prompt have the same score",
    "between": "the score is neither the best nor the worst (or has no neighbour that differs)",
}
THRESHOLD = 0.5
_LABEL = ("type", "response", "reward", "raw_reward", "source", "labeller")

Label = dict[str, Any]  # what is judged of a row and how: `_LABEL`, and its number `at` in its table
Pairs = list[tuple[Label, Label]]  # better and worse
LeftOut = dict[int, str]  # number of a row → reason


@dataclass(frozen=True)
class Made:
    """A row of the view: what row it comes from, the rows that it stands for, its label, and a note of the old one."""

    origin: int
    stands_for: tuple[int, ...]
    type: str
    reward: float
    raw_reward: float | None
    note: dict[str, Any] | None = None  # None: the row is as it was


# --- projections: the labels of one prompt's rows in, those of the view out -----------------------


def to_pairwise(labels: list[Label], pairs: Callable[[list[Label]], Pairs]) -> tuple[list[Made], LeftOut]:
    """Scores become comparisons, 1 against 0, of responses that the same source and labeller scored.

    Equal scores and equal responses make no comparison. The difference of the scores is the `margin`.
    """
    made = [_same(label) for label in labels if label["type"] == "pairwise"]
    left: LeftOut = {}
    for judged in _grouped([label for label in labels if label["type"] == "scalar"], "source", "labeller"):
        ranked = sorted(judged, key=lambda label: -label["reward"])
        for better, worse in pairs(ranked):
            if better["reward"] > worse["reward"] and better["response"] != worse["response"]:
                margin = round(_decimal(better["reward"]) - _decimal(worse["reward"]), 9)
                made += [_changed(s, "pairwise", r, margin=margin) for s, r in ((better, 1.0), (worse, 0.0))]
        used = {m.origin for m in made}
        left |= {label["at"]: _unpaired(label, judged) for label in judged if label["at"] not in used}
    return made, left | _without(labels, "pairwise", "scalar")


def best_worst(ranked: list[Label]) -> Pairs:
    """The best against the worst."""
    return [(ranked[0], ranked[-1])]


def adjacent(ranked: list[Label]) -> Pairs:
    """Each against the next best."""
    return list(pairwise(ranked))


def every(ranked: list[Label]) -> Pairs:
    """Each against every other."""
    return list(combinations(ranked, 2))


PAIRS = {"best_worst": best_worst, "adjacent": adjacent, "all": every}


def _unpaired(label: Label, judged: list[Label]) -> str:
    others = [other for other in judged if other["response"] != label["response"]]
    if not others:
        return "no_other_response"
    return "equal_rewards" if all(other["reward"] == label["reward"] for other in others) else "between"


def to_binary(labels: list[Label], threshold: float) -> tuple[list[Made], LeftOut]:
    """Scores strictly above `threshold` are good; of a comparison the better response is good and the worse bad."""
    threshold = stored(threshold)
    made, left = [], _without(labels, "binary", "scalar", "pairwise")
    for label in labels:
        if label["type"] == "binary":
            made.append(_same(label))
        elif label["type"] == "scalar":
            made.append(_changed(label, "binary", float(label["reward"] > threshold)))
        elif label["type"] == "pairwise" and label["reward"] == 0.5:
            left[label["at"]] = "tie"
        elif label["type"] == "pairwise":
            made.append(_changed(label, "binary", float(label["reward"] > 0.5)))
    return made, left


def to_scalar(labels: list[Label]) -> tuple[list[Made], LeftOut]:
    """Verdicts become the scores 0 and 1; a response's score out of comparisons is its mean win rate.

    That is the mean of its p over all its comparisons by one source and labeller, a tie counting half. It ranks the
    responses of a prompt soundly where all met the same opponents; a response that met weak ones only scores too
    high. A single comparison gives p and 1 − p. The row keeps the metadata of the first comparison, and the raw
    reward if all agree on it.
    """
    made = [_same(label) for label in labels if label["type"] == "scalar"]
    made += [_changed(label, "scalar", label["reward"]) for label in labels if label["type"] == "binary"]
    compared = [label for label in labels if label["type"] == "pairwise"]
    made += [_win_rate(met) for met in _grouped(compared, "source", "labeller", "response")]
    return made, _without(labels, "scalar", "binary", "pairwise")


def _win_rate(met: list[Label]) -> Made:
    """One row for all comparisons that a response was in."""
    raw = {label["raw_reward"] for label in met}
    return Made(
        origin=met[0]["at"],
        stands_for=tuple(label["at"] for label in met),
        type="scalar",
        reward=float(np.mean([label["reward"] for label in met])),
        raw_reward=raw.pop() if len(raw) == 1 else None,
        note={"from": "pairwise", "comparisons": len(met)},
    )


def _same(label: Label) -> Made:
    return Made(label["at"], (label["at"],), label["type"], label["reward"], label["raw_reward"])


def _changed(label: Label, kind: str, reward: float, **more: Any) -> Made:
    note = {"from": label["type"], "reward": _decimal(label["reward"]), **more}
    return Made(label["at"], (label["at"],), kind, reward, label["raw_reward"], note)


def _decimal(reward: float) -> float:
    """The shortest number that the column stores as this one: 0.7 for 0.699999988079071."""
    return float(str(np.float32(reward)))


def _without(labels: list[Label], *kinds: str) -> LeftOut:
    return {label["at"]: "no_projection" for label in labels if label["type"] not in kinds}


def _grouped(labels: list[Label], *names: str) -> list[list[Label]]:
    groups: dict[tuple, list[Label]] = {}
    for label in labels:
        groups.setdefault(tuple(label[name] for name in names), []).append(label)
    return list(groups.values())


# --- tables --------------------------------------------------------------------------------------

Projection = Callable[[list[Label]], tuple[list[Made], LeftOut]]


def project(rows: pa.Table, projection: Projection) -> tuple[pa.Table, dataset.Result]:
    """The view of rows that lie prompt by prompt, without rows that became equal, and what became of the input.

    A row is accepted if a row of the view stands for it, and a duplicate if only rows that are there already do.
    """
    made: list[Made] = []
    left: LeftOut = {}
    for labels in _by_prompt(rows):
        of_prompt, not_used = projection(labels)
        made += of_prompt
        left |= not_used
    view = _relabelled(rows, made)
    ids = view["id"].to_numpy(zero_copy_only=False)
    first = np.sort(np.unique(ids, return_index=True)[1]) if len(ids) else np.array([], int)
    accepted = {at for i in first.tolist() for at in made[i].stands_for}
    report = dataset.result([])
    report["inputs"], report["accepted"] = rows.num_rows, len(accepted)
    report["duplicates"] = len({at for m in made for at in m.stands_for} - accepted)
    report["rejected"] = Counter(left.values())
    return publish.ordered(view.take(pa.array(first))), report


def _by_prompt(rows: pa.Table) -> Iterator[list[Label]]:
    columns = [rows[name].to_pylist() for name in _LABEL]
    names = ("at", *_LABEL)
    labels = [dict(zip(names, values, strict=True)) for values in zip(range(rows.num_rows), *columns, strict=True)]
    for start, stop in publish.prompt_runs(rows["prompt_id"], 1):
        yield labels[start:stop]


def _relabelled(rows: pa.Table, made: list[Made]) -> pa.Table:
    """The rows that `made` comes from, with its labels and with new ids."""
    view = rows.take(pa.array([m.origin for m in made], pa.int64()))
    old = view["metadata"].to_pylist()
    new = {
        "type": [m.type for m in made],
        "reward": [m.reward for m in made],
        "raw_reward": [m.raw_reward for m in made],
        "metadata": [_noted(text, m.note) for text, m in zip(old, made, strict=True)],
    }
    for name, values in new.items():
        at = view.schema.get_field_index(name)
        view = view.set_column(at, view.schema.field(at), pa.array(values, view.schema.field(at).type))
    return identify(view)


def _noted(metadata: str | None, note: dict[str, Any] | None) -> str | None:
    """The metadata with the note of the label before; a note that is there already goes into it."""
    if note is None:
        return metadata
    known = orjson.loads(metadata) if metadata else {}
    if "view" in known:
        note = {**note, "before": known["view"]}
    return orjson.dumps({**known, "view": note}, option=orjson.OPT_SORT_KEYS).decode()


# --- datasets ------------------------------------------------------------------------------------


def write(directory: str, before: Manifest, projection: Projection, stage: str, facts: dict[str, Any]) -> list[Any]:
    """Gather each split's rows by prompt and write their view, shard by shard; the results to commit."""
    files = dataset.data_files(directory, before)
    sizes = {f"{directory.rstrip('/')}/{f['path']}": f["bytes"] for f in before.files}
    results = []
    for split in before.splits:
        mine = [path for path in files if path.rsplit("/", 1)[-1].partition("-")[0] == split]
        of = publish.plan({split: 1.0}, sum(sizes[path] for path in mine))
        pieces: dict[int, list[Piece]] = {}
        for item in enumerate(publish.groups(mine, [sizes[path] for path in mine])):
            for shard, (_, piece) in publish.cut(item, of=of, schema=dataset.schema_of(before), stage=stage):
                pieces.setdefault(shard, []).append(piece)
        results += [_shard(split, shard, pieces[shard], projection, stage, facts) for shard in sorted(pieces)]
    return results


def _shard(
    split: str, number: int, pieces: list[Piece], projection: Projection, stage: str, facts: dict[str, Any]
) -> dataset.Result:
    """Read a shard's pieces, write their view, a few prompts at a time, and report."""
    gathered = pa.concat_tables([read(piece) for piece in pieces]).replace_schema_metadata(None)
    rows = publish.ordered(gathered)
    report = dataset.result([number], split=split)
    report["inputs"], report["duplicates"] = gathered.num_rows, gathered.num_rows - rows.num_rows
    writer = io.PartWriter(f"{stage}/parts/{split}-{number:06d}.data.parquet", rows.schema, facts)
    for start, stop in publish.prompt_runs(rows["prompt_id"], io.GROUP_ROWS // 8):
        view, of_run = project(rows.slice(start, stop - start), projection)
        check(view, scored="ref_logps" in view.schema.names)
        check_comparisons(view)
        report["accepted"] += of_run["accepted"]
        report["duplicates"] += of_run["duplicates"]
        report["rejected"] += of_run["rejected"]
        report["rows"] += Counter(view["type"].to_pylist())
        if view.num_rows:
            writer.write(view)
    report["data"] = writer.close()
    return report


# --- command -------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `una view`."""
    parser.add_argument("directory", metavar="DIR", help="a dataset directory made by una")
    parser.add_argument("--as", required=True, dest="kind", choices=("pairwise", "binary", "scalar"))
    parser.add_argument("--output", required=True, metavar="DIR", help="the dataset directory to write")
    parser.add_argument(
        "--pairs",
        choices=tuple(PAIRS),
        help="which scored responses of a prompt to compare: the best with the worst, each with the next best, "
        "or all (best_worst)",
    )
    parser.add_argument(
        "--threshold", type=share, metavar="REWARD", help=f"scores strictly above it are good ({THRESHOLD:g})"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what --output holds")


def command(args: argparse.Namespace) -> dict[str, Any]:
    """`una view`: returns the summary that `--json` prints."""
    projection, policy = _chosen(args)
    before = dataset.read_manifest(args.directory)
    dataset.data_files(args.directory, before)
    output = args.output.rstrip("/")
    dataset.refuse(output, [args.directory])
    stage = dataset.prepare(output, args.overwrite)
    policies = {
        **before.policies,
        "view": [*before.policies.get("view", []), policy],
        "exact_duplicates": "remove",
    }
    manifest = before.next("view", policies=policies)
    facts = {"stage": "view", "policies": policies, "reference": before.reference}
    with dataset.staged(stage):
        results = write(args.directory, before, projection, stage, facts)
        dataset.commit_all(results, manifest=manifest, stage=stage, output=output)
    report = dataset.summary(dataset.read_manifest(output), output)
    dataset.print_summary(report)
    return report


def _chosen(args: argparse.Namespace) -> tuple[Projection, dict[str, Any]]:
    """The projection that the arguments ask for, and how it is named in the manifest."""
    for option, kind in (("pairs", "pairwise"), ("threshold", "binary")):
        if getattr(args, option) is not None and args.kind != kind:
            raise UsageError(f"--{option}: only with --as {kind}")
    if args.kind == "pairwise":
        how = args.pairs or "best_worst"
        policy = {"as": "pairwise", "pairs": how, "within": "one prompt, source and labeller"}
        return lambda labels: to_pairwise(labels, PAIRS[how]), policy
    if args.kind == "binary":
        threshold = THRESHOLD if args.threshold is None else args.threshold
        return lambda labels: to_binary(labels, threshold), {"as": "binary", "good": f"strictly above {threshold:g}"}
    return to_scalar, {"as": "scalar", "comparisons": "mean win rate of a response"}
