"""What the page of a dataset says of its labellers: their scores, and how these agree with people and with length."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from pipelines.report.page import Block, table
from pipelines.report.plots import PALETTE, Panel, chart, reliability, stacked

SHOWN = 6  # sources with a colour of their own


def labeller_blocks(labels: Mapping[str, Any]) -> list[Block]:
    """`labels`: what the manifest's statistics say of them."""
    by_labeller = {name: of for name, of in (labels.get("labellers") or {}).items() if of}
    together = {source: of for source, of in (labels.get("combined") or {}).items() if of.get("items")}
    several = {"together": together} if len(by_labeller) > 1 and together else {}
    everyone = {**by_labeller, **several}
    return [
        chart("Calibrated scores by labeller, stacked by source", [_histogram(*one) for one in everyone.items()]),
        _scores_table(by_labeller),
        chart("Reliability: what people said of rows with such scores", _reliabilities(everyone)),
        _agreement_table(everyone),
    ]


def _histogram(name: str, by_source: Mapping[str, Any]) -> Panel:
    counts = {source: np.array(of["histogram"]) for source, of in list(by_source.items())[:SHOWN]}
    if rest := list(by_source.values())[SHOWN:]:
        counts["other sources"] = np.sum([of["histogram"] for of in rest], axis=0)
    edges = np.linspace(0, 1, 1 + len(next(iter(counts.values()))))
    return stacked(edges, counts, _colours(counts), title=name[:60], xlabel="score", xlim=(0, 1))


def _colours(names: Mapping[str, Any]) -> dict[str, str]:
    return dict(zip(names, PALETTE, strict=False))


def _reliabilities(everyone: Mapping[str, Any]) -> list[Panel]:
    panels = []
    for name, by_source in everyone.items():
        bins = {source: (of.get("agreement") or {}).get("bins") for source, of in list(by_source.items())[:SHOWN]}
        points = {source: np.array(of, float).T for source, of in bins.items() if of}
        if points:
            what = {"xlabel": f"score by {name[:50]}", "ylabel": "mean label by people"}
            panels.append(reliability({s: (p[0], p[1], p[2]) for s, p in points.items()}, _colours(points), **what))
    return panels


def _scores_table(by_labeller: Mapping[str, Any]) -> Block:
    body = []
    for name, by_source in by_labeller.items():
        for source, of in by_source.items():
            raw, length = of["raw"], of["length"]
            numbers = [of["items"], raw["low"], raw["mean"], raw["high"], of["mean"], length["pearson"]]
            numbers += [length["spearman"], length.get("pearson_controlled")]
            body.append([name, source, of["calibration"]["method"], *numbers])
    head = ["labeller", "source", "calibration", "items", "lowest", "mean raw", "highest", "mean score"]
    head += ["with length: r", "rank r", "r once controlled"]
    return table(head, body, range(3, len(head)))


def _agreement_table(everyone: Mapping[str, Any]) -> Block:
    keys = ("comparisons", "accuracy", "items", "kendall", "ece")
    body = [
        [name, source, *(agreement.get(key) for key in keys), of.get("disagreement")]
        for name, by_source in everyone.items()
        for source, of in by_source.items()
        if (agreement := of.get("agreement") or {})
    ]
    head = ["labeller", "source", "comparisons", "accuracy", "rows", "Kendall's tau", "ECE", "disagreement"]
    return table(head, body, range(2, len(head)))
