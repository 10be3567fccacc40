"""The page of a dataset directory: one pass over data/ and rejected/ in batches that keeps counts, never texts."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines import io, remote
from pipelines.dataset import read_manifest
from pipelines.report.labels import labeller_blocks
from pipelines.report.page import SHOWN, Block, Page, facts_table, in_order, percent, section, table
from pipelines.report.plots import COLOURS, PALETTE, chart, label, stacked
from schemas.errors import POLICY_REASONS, REASONS, UserError
from schemas.feedback import FEEDBACK
from schemas.manifest import Manifest

Counts = Counter[tuple[Any, ...]]  # the last part of a key is the value that was counted

BATCH = 1024  # rows read at a time; bounds the text in memory
BINS = np.arange(21) / 20  # of rewards and scores
LOGP_BINS = np.arange(-100.5, 1) / 10  # nats per token, each bin around a tenth; the first holds what is lower
SAMPLES = 3  # per type
SOURCES = 6  # with a colour of their own


# --- reading -----------------------------------------------------------------------------------


def batches(path: str | Path, columns: list[str], optional: Sequence[str] = ()) -> Iterator[pa.RecordBatch]:
    """Columns of a parquet file in batches; `UserError` when it is damaged or lacks one that is not optional."""
    try:
        # pages as they are needed, not whole columns
        with io.open_raw(str(path)) as raw, pq.ParquetFile(raw, buffer_size=2**20, pre_buffer=False) as file:
            names = file.schema_arrow.names
            if missing := sorted(set(columns) - set(names)):
                raise UserError(f"{path}: column {', '.join(missing)} is missing; write it again with this una")
            yield from file.iter_batches(BATCH, columns=columns + [name for name in optional if name in names])
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path}: not a readable parquet file ({error}); write it again") from None


def numbers(column: pa.Array) -> np.ndarray:
    """As float64; what is null or not finite becomes NaN."""
    values = pc.cast(column, pa.float64()).to_numpy(zero_copy_only=False)
    return np.where(np.isfinite(values), values, np.nan)


@dataclass
class Scan:
    """What one pass over the rows keeps: counts, and a few sample rows."""

    rewards: Counts = field(default_factory=Counter)  # (type, source, reward to .001 or None) → rows
    lengths: Counts = field(default_factory=Counter)  # (prompt, response, chosen or rejected; type; length) → rows
    logps: Counts = field(default_factory=Counter)  # (type, nats per token to .1) → rows
    prompt_ids: list[np.ndarray] = field(default_factory=list)  # the first 64 bits
    samples: dict[str, dict[str, list[Any]]] = field(default_factory=dict)  # type → comparison or id → its rows
    unit: str = "characters"


def scan(files: Sequence[str]) -> Scan:
    """Count the rows of the data files, a batch at a time."""
    found = Scan()
    for path in files:
        for batch in batches(path, FEEDBACK.names, ("prompt_ids", "response_ids", "ref_logp")):
            kinds, rewards = np.array(batch["type"].to_pylist(), object), numbers(batch["reward"])
            found.rewards.update(zip(kinds, batch["source"].to_pylist(), _thousandths(rewards), strict=True))
            _count_lengths(found, batch, kinds, rewards)
            ids = pc.utf8_slice_codeunits(batch["prompt_id"], 0, 16)
            found.prompt_ids.append(np.unique(ids.to_numpy(zero_copy_only=False).astype("S16")))
            _keep_samples(found, batch, kinds)
    return found


def _thousandths(rewards: np.ndarray) -> list[float | None]:
    """Rounded, so that they can be counted; never onto .5 from either side. NaN becomes None."""
    near = np.round(rewards, 3)
    near = np.where((near == 0.5) & (rewards != 0.5), 0.5 + np.copysign(0.0005, rewards - 0.5), near)
    return [None if np.isnan(x) else x for x in near.tolist()]


def _count_lengths(found: Scan, batch: pa.RecordBatch, kinds: np.ndarray, rewards: np.ndarray) -> None:
    scored = "ref_logp" in batch.schema.names
    found.unit = "tokens" if scored else "characters"
    prompts, responses = _tokens(batch) if scored else _characters(batch)
    pairs = kinds == "pairwise"
    chosen, rejected = pairs & (rewards > 0.5), pairs & (rewards < 0.5)
    for name, of, lengths in (
        ("prompt", kinds, prompts),
        ("response", kinds, responses),
        ("chosen", kinds[chosen], responses[chosen]),
        ("rejected", kinds[rejected], responses[rejected]),
    ):
        found.lengths.update((name, kind, n) for kind, n in zip(of, lengths.tolist(), strict=True))
    if scored:
        per_token = np.round(numbers(batch["ref_logp"]) / np.maximum(responses, 1), 1)
        found.logps.update((k, x) for k, x in zip(kinds, per_token.tolist(), strict=True) if x == x)


def _tokens(batch: pa.RecordBatch) -> tuple[np.ndarray, np.ndarray]:
    prompts, responses = (pc.fill_null(pc.list_value_length(batch[n]), 0) for n in ("prompt_ids", "response_ids"))
    return prompts.to_numpy(zero_copy_only=False), responses.to_numpy(zero_copy_only=False)


def _characters(batch: pa.RecordBatch) -> tuple[np.ndarray, np.ndarray]:
    turns = pc.utf8_length(pc.struct_field(pc.list_flatten(batch["prompt"]), "content"))
    owner = pc.list_parent_indices(batch["prompt"]).to_numpy(zero_copy_only=False)
    prompts = np.bincount(owner, turns.to_numpy(zero_copy_only=False), minlength=batch.num_rows).astype(int)
    return prompts, pc.utf8_length(batch["response"]).to_numpy(zero_copy_only=False)


def _keep_samples(found: Scan, batch: pa.RecordBatch, kinds: np.ndarray) -> None:
    """Keep the smallest ids of each type: ids are hashes, so that is a fair sample, and always the same one."""
    keys = np.array(pc.coalesce(batch["comparison_id"], batch["id"]).to_pylist(), object)
    for kind in set(kinds):
        kept = found.samples.get(kind, {})
        smallest = sorted({*kept, *keys[kinds == kind]})[:SAMPLES]
        for i in np.flatnonzero((kinds == kind) & np.isin(keys, smallest)).tolist():
            if len(rows := kept.setdefault(keys[i], [])) < 2:
                rows += batch.select(FEEDBACK.names).slice(i, 1).to_pylist()
        found.samples[kind] = {key: kept[key] for key in smallest}


def read_rejected(files: Sequence[str]) -> tuple[Counter[str], dict[str, dict[str, Any]]]:
    """Rejected records and parts by reason, and the first example of each reason."""
    counts: Counter[str] = Counter()
    examples: dict[str, dict[str, Any]] = {}
    for path in files:
        for batch in batches(path, ["reason", "detail", "source_file", "position", "part", "payload"]):
            reasons = batch["reason"].to_pylist()
            counts.update(reasons)
            for reason in set(reasons) - set(examples):
                examples[reason] = batch.slice(reasons.index(reason), 1).to_pylist()[0]
    return counts, examples


# --- counts ------------------------------------------------------------------------------------


def values(counts: Counts, *prefix: str) -> tuple[np.ndarray, np.ndarray]:
    """The values under a key prefix, in order, and how often each occurs; missing values are left out."""
    pairs = [(k[-1], n) for k, n in counts.items() if k[: len(prefix)] == prefix and k[-1] is not None]
    found, rows = np.array(sorted(pairs), float).reshape(-1, 2).T
    return found, rows


def rows_of(counts: Counts, kind: str | None = None, source: str | None = None) -> int:
    """How many rows there are of a type and a source; None is any."""
    return sum(n for (k, s, _), n in counts.items() if kind in (None, k) and source in (None, s))


def histogram(counts: Counts, edges: np.ndarray, *prefix: str) -> np.ndarray:
    found, rows = values(counts, *prefix)
    return np.histogram(np.clip(found, edges[0], edges[-1]), edges, weights=rows)[0]


def _types(found: Scan) -> list[str]:
    return in_order({key[0] for key in found.rewards})


def _sources(found: Scan) -> list[str]:
    """The sources, those with most rows first."""
    return sorted({key[1] for key in found.rewards}, key=lambda s: (-rows_of(found.rewards, None, s), s))


# --- the page ----------------------------------------------------------------------------------


def dataset_page(directory: str) -> Page:
    """The page of a dataset directory; `UserError` when its manifest or parquet cannot be read."""
    manifest = read_manifest(directory)
    found = scan(_parts(directory, "data"))
    rejected = read_rejected(_parts(directory, "rejected"))
    return {
        "kind": "dataset",
        "title": io.name(directory if io.is_remote(directory) else str(Path(directory).resolve())),
        "facts": _facts(manifest, found),
        "warnings": _warnings(manifest, found),
        "notes": [],
        "sections": [
            section("Rows", [_rows_table(found)]),
            section("Explicit rewards", _reward_blocks(found)),
            section("Labellers", labeller_blocks(manifest.statistics.get("labels") or {})),
            section("Lengths", _length_blocks(found)),
            section("Reference", [_logp_chart(found), facts_table("fingerprint", manifest.reference)]),
            section("Parity", _parity_blocks(manifest.statistics)),
            section("Rejected", [_rejected_table(*rejected)]),
            section("Stages", [_stages_table(manifest)]),
            section("Policies", [facts_table("policy", manifest.policies)]),
            section("Labels decided by a policy", [facts_table("policy", _decided(manifest))]),
            section("Statistics", [facts_table("of the labels", _statistics(manifest))]),
            section("Sources", [_sources_table(manifest)]),
            section("Samples", _samples(found)),
        ],
    }


def _parts(directory: str, folder: str) -> list[str]:
    """The parquet files of a folder of the dataset, those that the manifest does not know included."""
    where = f"{directory.rstrip('/')}/{folder}"
    if io.is_remote(where):
        return [path for path in remote.below(where) if path.endswith(".parquet")]
    return sorted(map(str, Path(where).glob("*.parquet")))


def _decided(manifest: Manifest) -> dict[str, int]:
    """How many records or rows each policy kept or changed, in all stages."""
    stages = [*(counts.get("touched") or {} for counts in manifest.history), manifest.touched]
    return dict(sum(map(Counter, stages), Counter()))


def _statistics(manifest: Manifest) -> dict[str, Any]:
    """Scale and agreement, without the long lists that a distribution is stored as."""
    scale = {
        source: {name: value for name, value in of.items() if not isinstance(value, list)}
        for source, of in (manifest.statistics.get("scale") or {}).items()
    }
    return {"agreement": manifest.statistics.get("agreement") or {}, "scale": scale}


def _facts(manifest: Manifest, found: Scan) -> list[tuple[str, Any]]:
    rejected = sum(manifest.rejected.values())
    return [
        ("stage", manifest.stage),
        ("inputs", manifest.inputs),
        ("accepted", manifest.accepted),
        ("rejected", f"{rejected:,} ({percent(rejected, manifest.inputs)})"),
        ("rows", found.rewards.total()),
        ("prompts", len(np.unique(np.concatenate(found.prompt_ids))) if found.prompt_ids else 0),
        ("duplicates removed", manifest.duplicates),
        *((f"split {name}", rows) for name, rows in sorted(manifest.splits.items())),
    ]


def _warnings(manifest: Manifest, found: Scan) -> list[str]:
    said = [] if found.rewards else ["There are no rows. Look at the rejected records below, or at the sources."]
    for kind in _types(found):
        said += _reward_warnings(kind, *values(found.rewards, kind), rows_of(found.rewards, kind))
    hard = sum(rows for reason, rows in manifest.rejected.items() if reason not in POLICY_REASONS)
    if hard > 0.01 * manifest.inputs:
        said.append(f"{percent(hard, manifest.inputs)} of the inputs were rejected; the reasons are below.")
    said_rows, rows = sum(manifest.rows.values()), found.rewards.total()
    if said_rows not in (0, rows):
        said.append(f"The manifest speaks of {said_rows:,} rows, and data/ holds {rows:,}. Write the dataset again.")
    return said


def _reward_warnings(kind: str, rewards: np.ndarray, rows: np.ndarray, total: int) -> list[str]:
    """Missing rewards, and scores that nearly all push one way."""
    if kind == "unlabelled":
        return [f"{total:,} rows have no reward yet; label them before training."]
    rated = int(rows.sum())
    said = [f"{total - rated:,} {kind} rows have a reward that is missing or not a number."] if rated < total else []
    for where, effect, mask in (("above", "up", rewards > 0.5), ("below", "down", rewards < 0.5)):
        if kind in ("scalar", "binary") and rows[mask].sum() > 0.8 * rated:
            said.append(
                f"{percent(rows[mask].sum(), rated)} of the {kind} rewards lie {where} .5. With no offset, .5 means "
                f"“do not move”, so nearly every row pushes its response {effect}, good and bad alike. Train with an "
                "offset (for example group_mean or ema), or change the scale so that an average response gets .5."
            )
    return said


def _rows_table(found: Scan) -> Block:
    kinds = _types(found)
    rows = {source: [rows_of(found.rewards, kind, source) for kind in kinds] for source in _sources(found)}
    total = ["all", *(rows_of(found.rewards, kind) for kind in kinds), found.rewards.total()]
    body = [[source, *counts, sum(counts)] for source, counts in rows.items()]
    return table(["source", *kinds, "all"], body, range(1, len(total)), total)


def _reward_blocks(found: Scan) -> list[Block]:
    rated = {kind: pair for kind in _types(found) if len((pair := values(found.rewards, kind))[0])}
    body = [
        [kind, int(n.sum()), *(percent(n[m].sum(), n.sum()) for m in (s < 0.5, s == 0.5, s > 0.5)), n @ s / n.sum()]
        for kind, (s, n) in rated.items()
    ]
    head = ["type", "rated rows", "below .5", "exactly .5", "above .5", "mean"]
    panels = [_reward_panel(found, kind) for kind in rated]
    return [chart("Explicit reward by type, stacked by source", panels), table(head, body, range(1, 6))]


def _reward_panel(found: Scan, kind: str) -> Any:
    sources = _sources(found)
    stacks = {source: histogram(found.rewards, BINS, kind, source) for source in sources[:SOURCES]}
    if len(sources) > SOURCES:
        stacks["other sources"] = histogram(found.rewards, BINS, kind) - sum(stacks.values())
    colours = dict(zip(stacks, PALETTE, strict=False))
    return stacked(BINS, stacks, colours, title=label(kind), xlabel="explicit reward", xlim=(0, 1))


def _length_blocks(found: Scan) -> list[Block]:
    if not found.lengths:
        return []
    names = [n for n in ("prompt", "response", "chosen", "rejected") if len(values(found.lengths, n)[0])]
    body = [[name, *_summary(*values(found.lengths, name))] for name in names]
    head = ["", "mean", "median", "90 %", "99 %", "longest"]
    panels = [_length_panel(found, name) for name in ("prompt", "response")]
    return [chart(f"Lengths in {found.unit}, stacked by type", panels), table(head, body, range(1, 6))]


def _summary(lengths: np.ndarray, rows: np.ndarray) -> list[Any]:
    below = np.cumsum(rows)
    quantiles = [int(lengths[np.searchsorted(below, q * below[-1])]) for q in (0.5, 0.9, 0.99, 1)]
    return [f"{lengths @ rows / below[-1]:,.1f}", *quantiles]


def _length_panel(found: Scan, name: str) -> Any:
    lengths = values(found.lengths, name)[0]
    edges = np.unique(np.geomspace(max(lengths[0], 1), max(lengths[-1], 1) + 1, 31).round())
    ticks = np.unique([float(f"{edge:.2g}") for edge in edges[:: len(edges) // 7 + 1]])
    stacks = {kind: histogram(found.lengths, edges, name, kind) for kind in _types(found)}
    axes = {"title": name, "xlabel": f"{found.unit} (log scale)", "xscale": "log", "xticks": ticks}
    return stacked(edges, stacks, COLOURS, **axes)


def _logp_chart(found: Scan) -> Block:
    if not found.logps:
        return {}
    stacks = {kind: histogram(found.logps, LOGP_BINS, kind) for kind in _types(found)}
    low = max(min(key[-1] for key in found.logps), -10) - 0.5
    panel = stacked(LOGP_BINS, stacks, COLOURS, xlabel="mean log-prob per token (nats)", xlim=(low, 0.1))
    return chart("Mean log π_ref per response token, by row", [panel])


def _parity_blocks(statistics: dict[str, Any]) -> list[Block]:
    """What the engine's log-probs differ from plain transformers', and how many were computed."""
    blocks = [facts_table("rows", statistics["scoring"])] if statistics.get("scoring") else []
    found = statistics.get("parity")
    if not found:
        return blocks
    names = ("of", "rows", "tokens", "mean", "max", "sequence_mean", "sequence_max", "tolerance")
    blocks.append(facts_table("|Δ| to plain transformers in float32, nats", {n: found[n] for n in names if n in found}))
    for key, what in (("by_length", "response tokens"), ("by_position", "position in the response")):
        body = [
            [f"{one['from']} to {one['to'] or '…'}", one["tokens"], f"{one['mean']:.2g}", f"{one['max']:.2g}"]
            + [f"{one[n]:.2g}" for n in ("sequence_mean", "sequence_max") if n in one]
            for one in found[key]
        ]
        more = ["mean per response", "max per response"] if key == "by_length" else []
        blocks.append(table([what, "tokens", "mean per token", "max", *more], body, range(1, 4 + len(more))))
    return blocks


def _rejected_table(counts: Counter[str], examples: dict[str, dict[str, Any]]) -> Block:
    ranked = sorted(counts, key=lambda reason: (-counts[reason], reason))
    body = [[r, counts[r], REASONS.get(r, "unknown reason"), _example(examples[r])] for r in ranked]
    return table(["reason", "how many", "what it means", "first example"], body, [1])


def _example(first: dict[str, Any]) -> Block:
    where = f"{first['source_file']}:{first['position']}" + (f" ({first['part']})" if first["part"] else "")
    payload = first["payload"] or b""
    more = f" … {len(payload):,} bytes in all" if len(payload) > SHOWN else ""
    return {"lines": [first["detail"] or "", where], "pre": payload[:SHOWN].decode("utf-8", "replace") + more}


def _stages_table(manifest: Manifest) -> Block:
    """What every stage read and kept."""
    body = []
    for stage in [*manifest.history, vars(manifest)]:
        rejected, rows = stage.get("rejected") or {}, stage.get("rows") or {}
        why = ", ".join(f"{reason} {n:,}" for reason, n in sorted(rejected.items()))
        numbers = [stage.get("inputs"), stage.get("accepted"), sum(rejected.values()), stage.get("duplicates")]
        body.append([stage.get("stage"), *numbers, sum(rows.values()), why])
    head = ["stage", "inputs", "accepted", "rejected", "duplicates", "rows", "rejected because"]
    return table(head, body, range(1, 6))


def _sources_table(manifest: Manifest) -> Block:
    names = ["file", "source", "format", "licence", "records", "bytes"]
    body = [[*(s.get(name) for name in names), str(s.get("sha256") or "")[:12]] for s in manifest.sources]
    return table([*names, "sha256"], body, (4, 5))


def _samples(found: Scan) -> list[Block]:
    """Sample rows by type; of a comparison, the chosen response first."""
    blocks: list[Block] = []
    for kind in in_order(found.samples):
        samples = [sorted(rows, key=lambda row: -(row["reward"] or 0)) for rows in found.samples[kind].values()]
        blocks.append({"kind": "samples", "title": kind, "samples": samples})
    return blocks
