"""The page of an evaluation: rewards, win rates, the frontier of reward and KL, lengths, calibration, benchmarks."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from pipelines.report.page import Block, Page, facts_table, percent, section, table
from pipelines.report.plots import DASHED, PALETTE, Panel, chart, intervals, label, reliability
from schemas.errors import UserError

FILE = "evaluation.json"
SAMPLED = 8  # questions whose answers are shown
Facts = Mapping[str, Any]


def evaluation_page(directory: Path) -> Page:
    """The page of an evaluation's directory; `UserError` when its summary cannot be read."""
    try:
        found = json.loads((directory / FILE).read_text("utf-8"))
    except ValueError:
        raise UserError(f"{directory}/{FILE}: not valid JSON; run `una eval` again") from None
    names = list(found["models"])
    return {
        "kind": "evaluation",
        "title": Path(found["output"]).resolve().name,
        "facts": _facts(found),
        "warnings": [found["failed"][0].upper() + found["failed"][1:] + "."] if found.get("failed") else [],
        "notes": found.get("notes", []),
        "sections": [
            section("Rewards", [_reward_chart(found), _reward_table(found), *_parts(found)]),
            section("Wins", [_win_chart(found), _win_table(found)]),
            section("Reward and KL", [_frontier(found), _kl_table(found)]),
            section("Responses", [_texts_table(found)]),
            section("Calibration", _calibration(found)),
            section("Benchmarks", _benchmarks(found)),
            section("Samples", [_samples(directory, names)] if found.get("answers") else []),
            section("Settings", [facts_table("setting", {"models": found["models"], **found["settings"]})]),
        ],
    }


def _facts(found: Facts) -> list[tuple[str, Any]]:
    facts: list[tuple[str, Any]] = [("models", len(found["models"]))]
    if "prompts" in found:
        facts += [("prompts", found["prompts"]["asked"]), ("samples per prompt", found["settings"]["n"])]
    main = next(iter(found["models"]))
    for labeller, by_model in found.get("rewards", {}).items():
        if by_model[main]["mean"]:
            facts.append((f"mean reward of {main}, {labeller}", by_model[main]["mean"]["value"]))
    for labeller, by_model in found.get("wins", {}).items():
        for other, of in by_model.items():
            if of["win_rate"]:
                facts.append((f"wins against {other}, {labeller}", percent(of["win_rate"]["value"])))
    return facts[:10]


def _colours(found: Facts) -> dict[str, str]:
    return {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(found["models"])}


def _reward_chart(found: Facts) -> Block:
    colours = _colours(found)
    panels = []
    for labeller, by_model in found.get("rewards", {}).items():
        entries = [(name, of["mean"], colours[name]) for name, of in by_model.items() if of["mean"]]
        panels += [intervals(entries, title=label(labeller), xlabel="mean reward")] if entries else []
    return chart("Mean reward and its 95 % interval", panels)


def _reward_table(found: Facts) -> Block:
    body = [
        [labeller, name, of["answers"], *_interval(of["mean"]), of["mean"] and of["mean"]["prompts"], _lost(of)]
        for labeller, by_model in found.get("rewards", {}).items()
        for name, of in by_model.items()
    ]
    return table(["labeller", "model", "answers", "mean", "from", "to", "prompts", "lost"], body, range(2, 8))


def _lost(of: Facts) -> str | int:
    return ", ".join(f"{reason} {n}" for reason, n in of.get("rejected", {}).items()) or 0


def _interval(of: Facts | None) -> list[float | None]:
    return [of[name] if of else None for name in ("value", "low", "high")]


def _parts(found: Facts) -> list[Block]:
    """By turn and by category, where there are several."""
    blocks = []
    for part, one in (("turns", "turn"), ("categories", "category")):
        body = [
            [labeller, name, key or "none", *_interval(mean), mean["prompts"]]
            for labeller, by_model in found.get("rewards", {}).items()
            for name, of in by_model.items()
            for key, mean in of.get(part, {}).items()
        ]
        blocks.append(table(["labeller", "model", one, "mean", "from", "to", "prompts"], body, range(3, 7)))
    return blocks


def _win_chart(found: Facts) -> Block:
    colours, main = _colours(found), next(iter(found["models"]))
    panels = []
    for labeller, by_model in found.get("wins", {}).items():
        entries = []
        for other, of in by_model.items():
            if of["win_rate"]:
                entries += [(f"against {other}", of["win_rate"], colours[other])]
                entries += [("at equal length", of["length_controlled"], colours[other])]
        told = {"title": label(labeller), "xlabel": "win rate", "xlim": (-0.02, 1.02)}
        panels += [intervals(entries, 0.5, **told)] if entries else []
    return chart(f"How often {main} is better, ties counting half, with 95 % intervals", panels)


def _win_table(found: Facts) -> Block:
    main, body = next(iter(found["models"])), []
    for labeller, by_model in found.get("wins", {}).items():
        for other, of in by_model.items():
            rates = [*_interval(of["win_rate"]), of["ties"], *_interval(of["length_controlled"])]
            body.append([labeller, f"{main} against {other}", of["prompts"], *rates, of.get("longer_by"), _lost(of)])
    head = ["labeller", "models", "prompts", "win rate", "from", "to", "ties", "at equal length", "from", "to"]
    return table([*head, "longer by", "lost"], body, range(2, 12))


def _frontier(found: Facts) -> Block:
    kl = found.get("kl", {})
    panels = []
    for labeller, by_model in found.get("rewards", {}).items():
        points = {name: (kl[name], of["mean"]) for name, of in by_model.items() if name in kl and of["mean"]}
        panels += [_points(points, _colours(found), label(labeller))] if points else []
    return chart("Reward and KL to the reference; the line joins models that none beats at no more KL", panels)


def frontier(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """Names of those (KL, reward) with less reward at no more KL nowhere else, in order of KL."""
    best, chosen = -np.inf, []
    for name, (_, reward) in sorted(points.items(), key=lambda item: (item[1][0], -item[1][1])):
        if reward > best:
            best = reward
            chosen.append(name)
    return chosen


def _points(points: Mapping[str, tuple[Facts, Facts]], colours: Mapping[str, str], title: str) -> Panel:
    def draw(axis: Any) -> None:
        line = frontier({name: (kl["nats"], reward["value"]) for name, (kl, reward) in points.items()})
        axis.plot([points[n][0]["nats"] for n in line], [points[n][1]["value"] for n in line], **DASHED)
        for name, (kl, reward) in points.items():
            apart = [[reward["value"] - reward["low"]], [reward["high"] - reward["value"]]]
            across = 1.96 * (kl["standard_error"] or 0)
            axis.errorbar(kl["nats"], reward["value"], apart, across, "o", color=colours[name], label=label(name))
        axis.set(title=title, xlabel="KL to the reference (nats per response)", ylabel="mean reward")

    return draw


def _kl_table(found: Facts) -> Block:
    body = [[name, of["nats"], of["standard_error"], of["per_token"]] for name, of in found.get("kl", {}).items()]
    return table(["model", "KL (nats per response)", "standard error", "per token"], body, range(1, 4))


def _texts_table(found: Facts) -> Block:
    keys = ["answers", "finished", "tokens", "words", "characters"]
    keys += ["distinct_1", "distinct_2", "distinct_4", "repetition"]
    head = ["model", *(key.replace("_", "-") for key in keys), "lost"]
    body = [[name, *map(of.get, keys), _lost(of)] for name, of in found.get("answers", {}).items()]
    return table(head, body, range(1, len(head)))


def _calibration(found: Facts) -> list[Block]:
    of = found.get("calibration")
    if not of:
        return []
    panels, body = [], []
    colours = _colours(found)
    for kind in dict.fromkeys(kind for by_type in of["models"].values() for kind in by_type):
        bins = {name: np.array(by_type[kind]["bins"], float).T for name, by_type in of["models"].items()}
        panels.append(_titled(reliability({n: (b[0], b[1], b[2]) for n, b in bins.items()}, colours), kind))
    keys = ["beta", "rows", "mean_logratio", "pearson", "kendall", "comparisons", "accuracy", "ece"]
    for name, by_type in of["models"].items():
        body += [[name, kind, *map(one.get, keys)] for kind, one in by_type.items()]
    head = [
        "model",
        "type",
        "β",
        "rows",
        "mean log-ratio",
        "Pearson",
        "Kendall's tau",
        "comparisons",
        "accuracy",
        "ECE",
    ]
    return [chart(f"Reliability on {of['rows']:,} rows of {of['dataset']}", panels), table(head, body, range(2, 10))]


def _titled(panel: Panel, title: str) -> Panel:
    def draw(axis: Any) -> None:
        panel(axis)
        axis.set_title(title)

    return draw


def _benchmarks(found: Facts) -> list[Block]:
    suite = found.get("suite")
    if not suite:
        return []
    tasks = list(next(iter(suite["models"].values())))
    body = [
        [name, *(of[t]["score"] for t in tasks), sum(of[t]["score"] for t in tasks) / len(tasks)]
        for name, of in suite["models"].items()
    ]
    body += [[f"{name} (paper)", *[None] * len(tasks), value] for name, value in suite["paper"].items()]
    shots = next(iter(suite["models"].values()))
    told = [[t, shots[t]["shots"], ", ".join(shots[t]["metrics"])] for t in tasks]
    blocks = [table([suite["name"], *tasks, "average"], body, range(1, len(tasks) + 2))]
    about = [[suite["about_paper"]]] if suite["paper"] else []
    return [*blocks, table(["task", "shots", "metric"], told, [1]), table(["the paper's numbers"], about)]


def _samples(directory: Path, names: Sequence[str]) -> Block:
    """The answers of all models to the same questions, which are picked by their hashes."""
    columns = ["model", "question", "turn", "sample", "prompt", "response"]
    rows = [r for r in pq.read_table(directory / "samples.parquet", columns=columns).to_pylist() if r["response"]]
    first = [row for row in rows if row["turn"] == 0 and row["sample"] == 0]
    rewards: dict[Any, dict[str, Any]] = {}
    for one in pq.read_table(directory / "rewards.parquet").to_pylist():
        if one["reward"] is not None:
            rewards.setdefault((one["model"], one["question"], one["turn"], one["sample"]), one)
    shown = []
    for question in sorted({row["question"] for row in first})[:SAMPLED]:
        group = []
        for row in sorted((r for r in first if r["question"] == question), key=lambda r: names.index(r["model"])):
            reward = rewards.get((row["model"], question, 0, 0), {})
            group.append({**row, "source": "", "labeller": reward.get("labeller"), "reward": reward.get("reward"),
                          "raw_reward": None, "metadata": None})  # fmt: skip
        shown.append(group)
    return {"kind": "samples", "title": "Answers to the same prompts", "samples": shown} if shown else {}
