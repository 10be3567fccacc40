"""The page of a training-run directory, finished or not: run.json, metrics.jsonl and predictions.parquet."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.report.dataset import BINS, batches
from pipelines.report.page import Block, Page, facts_table, in_order, percent, section, shown, table
from pipelines.report.plots import COLOURS, Panel, chart, curves, label, overlaid, reliability, smooth, stacked

Facts = dict[str, Any]
Predictions = dict[str, np.ndarray]

# --- reading -----------------------------------------------------------------------------------


def read_metrics(path: Path) -> tuple[list[Facts], list[str]]:
    """The lines of metrics.jsonl by step, and notes on lines that could not be read.

    A step written twice (a resumed run) counts once, as it was written last.
    """
    if not path.is_file():
        return [], ["There is no metrics.jsonl, so there are no curves."]
    lines: dict[tuple[int, str], Facts] = {}
    bad, number = [], 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if metrics := _metrics(line):
                lines[metrics["step"], metrics["split"]] = metrics
            elif line.strip():
                bad.append(number)
    notes = [f"Line {n} of metrics.jsonl is not metrics and is ignored." for n in bad[:5] if n != number]
    if number in bad:
        notes.append("The last line of metrics.jsonl is cut off, as when a run is killed; it is ignored.")
    return [lines[key] for key in sorted(lines)], notes


def _metrics(line: bytes) -> Facts | None:
    try:
        metrics = _dict(json.loads(line))
    except (ValueError, RecursionError):
        return None
    if not isinstance(metrics.get("step"), int):
        return None
    by_type = {kind: _dict(entry) for kind, entry in _dict(metrics.get("by_type")).items()}
    return {**metrics, "split": str(metrics.get("split", "train")), "by_type": by_type}


def _dict(value: Any) -> Facts:
    return value if isinstance(value, dict) else {}


def read_run(path: Path) -> tuple[Facts, list[str]]:
    """run.json, and a note when it is not there yet."""
    unfinished = ["The run has not finished, or was stopped; this is what it did so far."]
    try:
        run = _dict(json.loads(path.read_bytes())) if path.is_file() else {}
    except ValueError:
        return {}, ["run.json is not valid JSON and is ignored; was the run killed while it was written?"]
    return run, [] if run.get("final") else unfinished


def read_predictions(path: Path) -> tuple[Predictions, list[str]]:
    """The columns of predictions.parquet as arrays, without rows whose numbers are not finite."""
    texts, figures = ["type", "comparison_id"], ["reward", "implicit_reward", "logratio"]
    parts = [batch.to_pydict() for batch in batches(path, texts + figures)] if path.is_file() else []
    columns = {name: [x for part in parts for x in part[name]] for name in texts + figures}
    found = {name: np.array(columns[name], object if name in texts else float) for name in columns}
    finite = np.isfinite([found[name] for name in figures]).all(0)
    lost = int((~finite).sum())
    notes = [f"{lost:,} predictions are missing or not finite and are left out."] if lost else []
    if not path.is_file():
        notes = ["There is no predictions.parquet (no test split, or an unfinished run), so no calibration."]
    return {name: column[finite] for name, column in found.items()}, notes


def series(lines: list[Facts], split: str, name: str, kind: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of one metric; NaN where it is no finite number, so that a gap shows."""
    entries = [
        (line["step"], line["by_type"].get(kind, {}) if kind else line) for line in lines if line["split"] == split
    ]
    steps, found = np.array([(s, number(e[name])) for s, e in entries if name in e], float).reshape(-1, 2).T
    return steps, found


def number(value: Any) -> float:
    """A finite float, or NaN (which the trainer writes as null)."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else math.nan


# --- what the predictions say ------------------------------------------------------------------


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(0.5 * x))


def scores(found: Predictions, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Implicit scores and explicit rewards of one type, both in [0, 1].

    A row's score is σ(r). For comparisons it is σ(r − r_other), the probability that this side wins, as in
    their loss; each comparison gives two points.
    """
    mask = found["type"] == kind
    implicit, explicit = found["implicit_reward"][mask], found["reward"][mask]
    if kind != "pairwise":
        return sigmoid(implicit), explicit
    first, second = _pairs(found["comparison_id"][mask])
    both, other = np.concatenate([first, second]), np.concatenate([second, first])
    return sigmoid(implicit[both] - implicit[other]), explicit[both]


def _pairs(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the two rows of every complete comparison."""
    _, inverse, counts = np.unique(ids.astype(str), return_inverse=True, return_counts=True)
    order = np.argsort(inverse, kind="stable")
    order = order[counts[inverse[order]] == 2]
    return order[::2], order[1::2]


def pair_accuracy(found: Predictions) -> tuple[float, int]:
    """Share of comparisons whose better side has the higher implicit reward, and how many; ties left out."""
    mask = found["type"] == "pairwise"
    first, second = _pairs(found["comparison_id"][mask])
    explicit, implicit = (
        np.sign(x[first] - x[second]) for x in (found["reward"][mask], found["implicit_reward"][mask])
    )
    right = (explicit * implicit)[explicit != 0]
    return (float((right + 1).mean() / 2), len(right)) if len(right) else (math.nan, 0)


def bins(score: np.ndarray, reward: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows, mean score and mean reward of the ten score bins that hold any."""
    which = np.minimum((score * 10).astype(int), 9)
    rows = np.bincount(which, minlength=10)
    some = rows > 0
    x, y = (np.bincount(which, weights, minlength=10)[some] / rows[some] for weights in (score, reward))
    return rows[some], x, y


def calibration_error(score: np.ndarray, reward: np.ndarray) -> float:
    """ECE over ten bins: the mean distance between score and reward, weighted by rows."""
    rows, x, y = bins(score, reward)
    return float(np.average(np.abs(x - y), weights=rows))


def pearson(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.corrcoef(x, y)[0, 1]) if len(x) > 1 and x.std() and y.std() else math.nan


# --- the page ----------------------------------------------------------------------------------


def run_page(directory: Path) -> Page:
    """The page of a training-run directory; `UserError` when its predictions cannot be read."""
    run, run_notes = read_run(directory / "run.json")
    lines, line_notes = read_metrics(directory / "metrics.jsonl")
    found, found_notes = read_predictions(directory / "predictions.parquet")
    losses = [p for kind in _kinds(lines, "loss") for p in _panel(lines, "loss", [kind], title=label(kind))]
    movement = _panel(lines, "implicit_reward", title="mean implicit reward", ylabel="β·h")
    movement += _panel(lines, "kl", title="drift", ylabel="nats per token")
    accuracy = _panel(lines, "accuracy", ylabel="pairs ranked right", ylim=(0, 1.02))
    optimiser = _plain_panel(lines, "lr", "learning rate") + _plain_panel(lines, "grad_norm", "gradient norm")
    return {
        "kind": "training run",
        "title": directory.resolve().name,
        "facts": [(name, value) for name, value in _facts(run, lines, found) if shown(value) != "–"],
        "warnings": _warnings(lines, found),
        "notes": run_notes + line_notes + found_notes,
        "sections": [
            section("Rounds", _round_blocks(directory, lines)),
            section("Loss", [chart("Loss by type", losses)]),
            section("Implicit reward and drift", [chart("Mean implicit reward and drift by type", movement)]),
            section("Pair accuracy", [chart("Pair accuracy; .5 is chance", accuracy)]),
            section("Optimiser", [chart("Learning rate, and gradient norm before clipping", optimiser)]),
            section("Test after training", [_final_table(run, lines)]),
            section("Calibration", _calibration_blocks(found)),
            section("Log-ratios", _logratio_blocks(found)),
            section("Configuration", [facts_table("option", {k: v for k, v in run.items() if k != "final"})]),
        ],
    }


def _facts(run: Facts, lines: list[Facts], found: Predictions) -> list[tuple[str, Any]]:
    loss, speed = (series(lines, "train", name)[1] for name in ("loss", "tokens_per_second"))
    loss, speed = loss[np.isfinite(loss)], speed[np.isfinite(speed)]
    end, done = max(len(loss) // 20, 1), max((line["step"] for line in lines), default=0)
    accuracy, pairs = pair_accuracy(found)
    some, every = run.get("trainable_parameters"), run.get("parameters")
    whole = isinstance(some, int) and isinstance(every, int)
    return [
        ("model", run.get("model")),
        ("dataset", run.get("dataset")),
        (
            "rounds" if any(line.get("online") for line in lines) else "steps",
            f"{done:,}" if run.get("steps") in (None, done) else f"{done:,} of {shown(run['steps'])}",
        ),
        ("train loss, first → last", f"{loss[:end].mean():.4g} → {loss[-end:].mean():.4g}" if len(loss) else None),
        ("pair accuracy (test)", percent(accuracy) if pairs else None),
        ("time", _duration(number(run.get("seconds")))),
        ("tokens per second", round(np.median(speed)) if len(speed) else None),
        ("trainable parameters", f"{some:,} of {every:,} ({percent(some, every)})" if whole else None),
    ]


def _duration(seconds: float) -> str | None:
    if math.isnan(seconds):
        return None
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min" if minutes else f"{seconds:.0f} s"


def _kinds(lines: list[Facts], name: str) -> list[str]:
    """Types that have a metric, in order; eight at most, since each may get a panel."""
    return in_order({k for line in lines for k, entry in line["by_type"].items() if entry.get(name) is not None})[:8]


def _panel(lines: list[Facts], name: str, kinds: list[str] | None = None, **axes: Any) -> list[Panel]:
    """Train and test curves of a metric, of all types that have it unless told; no panel without any."""
    of = _kinds(lines, name) if kinds is None else kinds
    entries = [(split, kind, *series(lines, split, name, kind)) for kind in of for split in ("train", "test")]
    return [curves(entries, **axes)] if entries else []


def _plain_panel(lines: list[Facts], name: str, title: str) -> list[Panel]:
    steps, found = series(lines, "train", name)
    return [curves([("train", None, steps, found)], title=title, ylim=(0, None))] if np.isfinite(found).any() else []


def _round_blocks(directory: Path, lines: list[Facts]) -> list[Block]:
    """Of an online run: how reward, KL and responses went, and the best and the worst of the newest round."""
    told = [{**line, **_dict(line.get("online"))} for line in lines if line.get("online")]
    names = {
        "reward": "mean reward",
        "held_out_reward": "mean held-out reward",
        "kl": "KL from the reference (nats per response)",
        "length": "tokens per response",
        "repetition": "share of 4-grams that are repeated",
        "beta": "β",
    }
    panels = [panel for name, title in names.items() for panel in _plain_panel(told, name, title)]
    blocks = [chart("The round's own samples", panels)] if panels else []
    newest = max((directory / "rounds").glob("round-*.parquet"), default=None)
    if newest is None:
        return blocks
    columns = ["prompt", "response", "reward", "kl", "why"]
    rows = [row for batch in batches(newest, columns) for row in batch.to_pylist()]
    rows.sort(key=lambda row: -number(row["reward"]) if row["reward"] is not None else math.inf)
    few = rows if len(rows) <= 10 else [*rows[:5], *rows[-5:]]
    body = [[row[name] for name in columns] for row in few]
    return [*blocks, table(["prompt", "response", "reward", "KL (nats)", "decided"], body, (2, 3))]


def _final_table(run: Facts, lines: list[Facts]) -> Block:
    """Test metrics by type after training: from run.json, else the last test line."""
    test = _dict(_dict(run.get("final")).get("test")) or next((x for x in lines[::-1] if x["split"] == "test"), {})
    by_type = {kind: _dict(entry) for kind, entry in _dict(test.get("by_type")).items()}
    names = ["count", "loss", "accuracy", "calibration_error", "implicit_reward", "kl"]
    head = ["type", "rows or pairs", "loss", "pair accuracy", "calibration error", "mean implicit reward", "drift"]
    return table(head, [[kind, *map(by_type[kind].get, names)] for kind in in_order(by_type)], range(1, 7))


def _calibration_blocks(found: Predictions) -> list[Block]:
    by_kind = {kind: pair for kind in in_order(set(found["type"])) if len((pair := scores(found, kind))[0])}
    if not by_kind:
        return []
    body = [[k, len(x), x.mean(), y.mean(), calibration_error(x, y), pearson(x, y)] for k, (x, y) in by_kind.items()]
    head = ["type", "points", "mean implicit score", "mean explicit reward", "ECE", "Pearson correlation"]
    stacks = {kind: np.histogram(score, BINS)[0] for kind, (score, _) in by_kind.items()}
    panels = [
        reliability({kind: bins(*pair) for kind, pair in by_kind.items()}),
        stacked(BINS, stacks, COLOURS, xlabel="implicit score", xlim=(0, 1)),
    ]
    return [chart("Reliability, and where the scores lie", panels), table(head, body, range(1, 6))]


def _logratio_blocks(found: Predictions) -> list[Block]:
    h, reward = found["logratio"], found["reward"]
    if not len(h):
        return []
    sides = {"above .5 (chosen)": h[reward > 0.5], "below .5 (rejected)": h[reward < 0.5]}
    low, high = np.quantile(h, [0.005, 0.995])
    edges = np.linspace(min(low, -0.5), max(high, 0.5), 50)
    counts = {name: np.histogram(np.clip(x, edges[0], edges[-1]), edges)[0] for name, x in sides.items()}
    panel = overlaid(edges, counts, xlabel="log-ratio h (nats; the outermost 0.5 % are drawn at the edges)")
    body = [[name, len(x), f"{x.mean():+.2f}", f"{np.median(x):+.2f}"] for name, x in sides.items() if len(x)]
    head = ["explicit reward", "rows", "mean log-ratio (nats)", "median (nats)"]
    return [chart("Log-ratios of good and bad test responses", [panel]), table(head, body, range(1, 4))]


# --- warnings ----------------------------------------------------------------------------------


def _warnings(lines: list[Facts], found: Predictions) -> list[str]:
    if not lines:
        return ["Nothing was logged, so there is nothing to show. Did the run start?"]
    said = _loss_warnings(lines) + _drift_warnings(lines)
    return said + (_prediction_warnings(found) if len(found["reward"]) else [])


def _loss_warnings(lines: list[Facts]) -> list[str]:
    steps, loss = series(lines, "train", "loss")
    said = []
    if len(lost := steps[np.isnan(loss)]):
        said.append(
            f"The loss is not a number from step {lost[0]:.0f} on, at {len(lost)} steps. Lower the learning rate."
        )
    if len(loss) >= 20 and _rises(loss[np.isfinite(loss)]):
        said.append("The training loss rose over the run. The learning rate may be too high.")
    for kind in _kinds(lines, "loss"):
        test = series(lines, "test", "loss", kind)[1]
        if len(test) > 1 and test[-1] > 1.02 * test[0]:
            said.append(
                f"The test loss of {kind} rows got worse, from {test[0]:.4g} to {test[-1]:.4g}: training did not help "
                "on rows it has not seen. Use fewer epochs, a lower learning rate or more rows."
            )
    return said


def _rises(loss: np.ndarray) -> bool:
    """Is the last quarter above the first by more than noise (two standard errors)?"""
    first, *_, last = np.array_split(loss, 4)
    return len(last) > 0 and bool(last.mean() - first.mean() > 2 * np.sqrt((first.var() + last.var()) / len(first)))


def _drift_warnings(lines: list[Facts]) -> list[str]:
    said = []
    for kind in _kinds(lines, "kl"):
        drift = smooth(*series(lines, "train", "kl", kind), points=20)[1]
        # fewer points are too short to speak of a trend
        if len(drift) == 20 and abs(drift[-1]) > max(0.5, 1.5 * abs(drift[10])):
            said.append(
                f"The policy runs away from the reference on {kind} rows: {drift[-1]:+.2f} nats per token at the end, "
                f"{drift[10]:+.2f} half way. Use a larger β, a lower learning rate or fewer steps."
            )
    return said


def _prediction_warnings(found: Predictions) -> list[str]:
    said = []
    extreme = np.mean(np.abs(sigmoid(found["implicit_reward"]) - 0.5) > 0.48)
    if extreme > 0.5:
        said.append(
            f"The implicit reward saturates: {percent(extreme)} of the test scores σ(β·h) are below .02 or above .98, "
            "where the loss has hardly any slope left. Use a smaller β or stop earlier."
        )
    accuracy, pairs = pair_accuracy(found)
    if pairs and accuracy <= 0.5 + (noise := 1.96 * math.sqrt(0.25 / pairs)):
        said.append(
            f"Pair accuracy is at chance: {percent(accuracy)} of {pairs:,} test comparisons, where guessing gives "
            f"50 % ± {percent(noise)}. The policy has not learned which side is better, or there are too few to tell."
        )
    good = found["logratio"][found["reward"] > 0.5]
    if len(good) and good.mean() < 0:
        said.append(
            f"Good responses became less likely: test rows with a reward above .5 have a mean log-ratio of "
            f"{good.mean():.2f} nats. Adding demonstrations or scores, or a larger β, holds them up."
        )
    return said
