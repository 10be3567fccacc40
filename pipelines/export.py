"""Feedback rows as the files that other tools train on or label: one function per target, one dict that names them.

A target holds less than a row does. What will be lost is counted and printed before anything is written, and rows
that a target cannot express are left out with a reason and a count. The rows are read twice, a thousand at a time;
the file appears whole or not at all. No labels are changed here but by `--threshold`; to turn one type of feedback
into another, run `una view` first.
"""

import argparse
import gzip
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import dataset, io, readers
from schemas.command import share
from schemas.errors import UsageError, UserError
from schemas.feedback import FEEDBACK, TYPES, stored
from schemas.manifest import Manifest

BATCH_ROWS = 1_000
Row = dict[str, Any]  # a row of the dataset with its `split`
Group = list[Row]  # one row; or the two rows of a comparison, the better one first


class LeftOut(Exception):  # noqa: N818 - it is an outcome of a row, not a failure of the run
    """The target cannot express a row; the argument is the reason (a key of `REASONS`, or `type_…`)."""


REASONS = {
    "type_…": "the target holds no rows of this type",
    "other_type": "--type names another type",
    "comparison_incomplete": "the other row of the comparison is not there",
    "tie": "neither response is better, and the target needs a better one",
    "soft_label": "the label is neither 0 nor 1; --threshold would say which it is",
    "role": "a turn has a role that the target does not have",
    "turns": "the turns do not follow each other as the target needs them to",
    "tool_calls": "the target cannot hold the tool calls of the prompt",
    "tool_result_without_id": "a tool's result cannot be matched with a call that has an id",
    "tools": "the tools of the metadata are no JSON list",
}


@dataclass(frozen=True)
class Context:
    """What a target's function may need to know beside the rows."""

    threshold: float | None = None  # a scalar reward strictly above it is good
    only: str | None = None  # the one type of rows to write
    reference: bool = False  # whether the rows carry log-probs of the reference model
    tools: bool = False  # whether some row has tools, so that every record needs the field
    parquet: bool = False  # whether the records go to a parquet file


@dataclass(frozen=True)
class Exporter:
    """A target: the row types it holds, the function that makes its records, and what gets lost.

    `make(group, context)` returns a record or raises `LeftOut`. `lost` names what a record does not keep, each with
    the test that tells whether a row has it.
    """

    types: tuple[str, ...]
    make: Callable[[Group, Context], dict[str, Any]]
    lost: Mapping[str, Callable[[Row], bool]]
    array: bool = False  # one JSON array instead of a record per line
    single: bool = False  # a file holds rows of one type only
    reference: bool = False  # can hold log-probs of the reference model
    schema: Callable[[Context], pa.Schema] | None = None  # of a parquet file, where the target can be one


@dataclass
class Tally:
    """What became of the rows; the numbers are rows, but `records`."""

    rows: Counter[str] = field(default_factory=Counter)  # type → rows that were written
    lost: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    records: int = 0
    tools: bool = False


# --- reading -------------------------------------------------------------------------------------


def read(files: Iterable[str], reference: bool) -> Iterator[Row]:
    """The rows of data files, in order, each with the split it is in."""
    names = [*FEEDBACK.names, *(("prompt_ids", "response_ids", "ref_logp") if reference else ())]
    for path in files:
        with io.open_parquet(path) as file:
            for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=names):
                yield from ({**row, "split": _split(path)} for row in batch.to_pylist())


def _split(path: str) -> str:
    return path.rsplit("/", 1)[-1].partition("-")[0]


def groups(rows: Iterable[Row]) -> Iterator[Group]:
    """Rows one by one and comparisons as two, the better row first, wherever in the files the two rows lie.

    Of a comparison without its other half, the one row comes last. What waits for its other half is in memory.
    """
    waiting: dict[str, Group] = {}
    for row in rows:
        if row["type"] != "pairwise":
            yield [row]
            continue
        halves = waiting.setdefault(row["comparison_id"], [])
        partner = next((half for half in halves if half["response"] != row["response"]), None)
        if partner is None:
            halves.append(row)
            continue
        halves.remove(partner)
        if not halves:
            del waiting[row["comparison_id"]]
        yield sorted([partner, row], key=lambda half: -half["reward"])
    yield from ([half] for halves in waiting.values() for half in halves)


def records(rows: Iterable[Row], target: Exporter, context: Context, tally: Tally) -> Iterator[dict[str, Any]]:
    """The target's records; `tally` is filled in on the way."""
    for group in groups(rows):
        try:
            _refuse(group, target, context)
            record = target.make(group, context)
        except LeftOut as why:
            tally.left_out[str(why)] += len(group)
            continue
        tally.records += 1
        tally.rows[group[0]["type"]] += len(group)
        tally.lost.update(name for name, has in target.lost.items() for row in group if has(row))
        tally.tools = tally.tools or tools_of(group[0]) is not None
        yield record


def _refuse(group: Group, target: Exporter, context: Context) -> None:
    kind = group[0]["type"]
    held = (*target.types, "scalar") if context.threshold is not None else target.types
    if kind not in held:
        raise LeftOut(f"type_{kind}")
    if context.only not in (None, kind):
        raise LeftOut("other_type")
    if kind == "pairwise" and len(group) < 2:
        raise LeftOut("comparison_incomplete")
    if kind == "pairwise" and group[0]["reward"] == group[1]["reward"]:
        raise LeftOut("tie")


# --- parts of a record ---------------------------------------------------------------------------


def _turns(row: Row) -> list[dict[str, Any]]:
    """The prompt's messages, tool calls as the objects that their JSON says."""
    turns = []
    for message in row["prompt"]:
        turn: dict[str, Any] = {"role": message["role"], "content": message["content"]}
        if message["tool_calls"]:
            turn["tool_calls"] = _calls(message["tool_calls"])
        turns.append(turn)
    return turns


def _calls(text: str) -> list[Any]:
    calls = _json(text)
    if not isinstance(calls, list):
        raise LeftOut("tool_calls")
    return calls


def _json(text: str) -> Any:
    """What a text says as JSON that can be written again; None if it is none."""
    try:
        value = json.loads(text, parse_constant=_no_number)
        orjson.dumps(value)
    except (ValueError, TypeError, RecursionError):
        return None
    return value


def _no_number(name: str) -> None:
    raise ValueError(name)


def _plain(row: Row) -> list[dict[str, Any]]:
    """The prompt's messages for a target without tool calls."""
    if any(message["tool_calls"] for message in row["prompt"]):
        raise LeftOut("tool_calls")
    return _turns(row)


def _said(row: Row) -> dict[str, str]:
    return {"role": "assistant", "content": row["response"]}


def tools_of(row: Row) -> str | None:
    """The tools that the model could call, as the JSON text that ingest keeps in the metadata."""
    if not row["metadata"] or '"tools"' not in row["metadata"]:
        return None
    tools = orjson.loads(row["metadata"]).get("tools")
    return tools if isinstance(tools, str) else None


def _good(row: Row, context: Context) -> bool:
    threshold = 0.5 if row["type"] == "binary" and row["reward"] in (0.0, 1.0) else context.threshold
    if threshold is None:
        raise LeftOut("soft_label")
    return bool(row["reward"] > stored(threshold))


def _either_side(group: Group) -> Group:
    """The two rows in an order that does not tell which is better: by id."""
    return sorted(group, key=lambda row: row["id"])


# --- what a row has that a record may not keep ---------------------------------------------------


def _lost(*, tools: bool = False, reference: bool = False, calls: bool = True) -> dict[str, Callable[[Row], bool]]:
    """The losses of a target that keeps the tools, the reference log-probs, or tool calls with their ids."""
    lost: dict[str, Callable[[Row], bool]] = {
        "soft_label": _soft,
        "raw_reward": lambda row: row["raw_reward"] is not None,
        "source": lambda row: True,
        "labeller": lambda row: row["labeller"] is not None,
        "metadata": _has_more_than_tools if tools else lambda row: row["metadata"] is not None,
    }
    if not reference:
        lost["reference"] = lambda row: "ref_logp" in row
    if not calls:
        lost["tool_call_id"] = lambda row: any('"id"' in (m["tool_calls"] or "") for m in row["prompt"])
    return lost


def _soft(row: Row) -> bool:
    return row["reward"] not in (0.0, 1.0)


def _blank_system(row: Row) -> bool:
    return row["prompt"][0]["role"] == "system" and not row["prompt"][0]["content"].strip()


def _has_more_than_tools(row: Row) -> bool:
    return row["metadata"] is not None and bool(orjson.loads(row["metadata"]).keys() - {"tools"})


# --- TRL -----------------------------------------------------------------------------------------
# https://huggingface.co/docs/trl/dataset_formats and the collators of trl 1.16's dpo_trainer.py and kto_trainer.py.


def _trl_preference(group: Group, context: Context) -> dict[str, Any]:
    """Preference, conversational, explicit prompt. Scored rows bring their tokens and log-probs as well.

    `ref_chosen_logps` and `ref_rejected_logps`, in nats, are the columns that TRL's collator reads. DPOTrainer (1.16)
    takes them in place of a reference model with `precompute_ref_log_probs=True` if its `_precompute_ref_logps` is
    overridden to return the dataset as it is; by itself it computes them anew, and fails where they are there.

    They are sums over `chosen_ids` and `rejected_ids`. TRL tokenises the messages anew. Its tokens are the same if
    the chat template writes nothing behind the end-of-turn token and no token spans the end of the prompt; otherwise
    override `_prepare_dataset` in the same way, and TRL takes the tokens of this file. `max_length` must cut no row,
    `ld_alpha` must not be set.
    """
    better, worse = group
    record = {"prompt": _trl_turns(better, context), "chosen": [_said(better)], "rejected": [_said(worse)]}
    record |= _trl_tools(better, context)
    if not context.reference:
        return record
    record |= {"prompt_ids": better["prompt_ids"]}
    record |= {"chosen_ids": better["response_ids"], "rejected_ids": worse["response_ids"]}
    return record | {"ref_chosen_logps": better["ref_logp"], "ref_rejected_logps": worse["ref_logp"]}


def _trl_kto(group: Group, context: Context) -> dict[str, Any]:
    """Unpaired preference. Scored rows bring `ref_logps`, in nats, under the same conditions as for DPO.

    Only `loss_type="apo_zero_unpaired"` does without a reference model: the loss `kto` also needs `ref_KL_logps`, of
    completions that TRL pairs with other prompts, which are not in the dataset.
    """
    row = group[0]
    record = {"prompt": _trl_turns(row, context), "completion": [_said(row)], "label": _good(row, context)}
    record |= _trl_tools(row, context)
    if not context.reference:
        return record
    return record | {
        "prompt_ids": row["prompt_ids"],
        "completion_ids": row["response_ids"],
        "ref_logps": row["ref_logp"],
    }


def _trl_prompt_completion(group: Group, context: Context) -> dict[str, Any]:
    """Prompt-completion, conversational."""
    row = group[0]
    return {"prompt": _trl_turns(row, context), "completion": [_said(row)], **_trl_tools(row, context)}


def _trl_turns(row: Row, context: Context) -> list[dict[str, Any]]:
    """Tool calls are objects of any shape, for which parquet has no type."""
    return _plain(row) if context.parquet else _turns(row)


def _trl_tools(row: Row, context: Context) -> dict[str, Any]:
    tools = tools_of(row)
    return {"tools": tools} if tools is not None or context.tools else {}


_TURNS = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
_IDS = pa.list_(pa.int32())


def _trl_schema(sides: Iterable[str], label: bool, ids: Iterable[str], logps: Iterable[str]) -> Any:
    def schema(context: Context) -> pa.Schema:
        fields = [(name, _TURNS) for name in ("prompt", *sides)] + [("label", pa.bool_())] * label
        fields += [("tools", pa.string())] * context.tools
        if context.reference:
            fields += [(name, _IDS) for name in ids] + [(name, pa.float64()) for name in logps]
        return pa.schema(fields)

    return schema


# --- OpenAI and Vertex ---------------------------------------------------------------------------


def _openai_preference(group: Group, context: Context) -> dict[str, Any]:
    """A line of https://developers.openai.com/api/docs/guides/direct-preference-optimization.

    Together and Fireworks read it too. A tool's result needs the id of its call there; results follow their calls.
    """
    better, worse = group
    asked: dict[str, Any] = {"messages": _with_call_ids(_turns(better))}
    if (tools := tools_of(better)) is not None:
        asked["tools"] = _json(tools)
        if not isinstance(asked["tools"], list):
            raise LeftOut("tools")
    return {"input": asked, "preferred_output": [_said(better)], "non_preferred_output": [_said(worse)]}


def _with_call_ids(turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A result has the id of the call at its place; of fewer results than calls nobody knows whose they are."""
    ids: list[Any] = []
    for result, run in groupby(turns, key=lambda turn: turn["role"] == "tool"):
        found = list(run)
        if result and (len(found) != len(ids) or not all(isinstance(one, str) for one in ids)):
            raise LeftOut("tool_result_without_id")
        for turn, one in zip(found, ids, strict=False) if result else ():
            turn["tool_call_id"] = one
        ids = [call.get("id") if isinstance(call, dict) else None for call in found[-1].get("tool_calls", ())]
    return turns


def _vertex(group: Group, context: Context) -> dict[str, Any]:
    """https://docs.cloud.google.com/vertex-ai/generative-ai/docs/models/gemini-preference-tuning-prepare.

    Text only; a system turn comes first or not at all, and the last turn is the user's. A blank system turn is left
    out, as `una ingest` takes a blank instruction for none.
    """
    turns = _plain(group[0])
    record: dict[str, Any] = {}
    if turns[0]["role"] == "system" and (said := turns.pop(0)["content"]).strip():
        record["system_instruction"] = {"parts": [{"text": said}]}
    record["contents"] = [_content(turn["role"], turn["content"]) for turn in turns]
    if not turns or turns[-1]["role"] != "user":
        raise LeftOut("turns")
    scored = zip((1, 0), group, strict=True)
    record["completions"] = [{"score": s, "completion": _content("assistant", row["response"])} for s, row in scored]
    return record


def _content(role: str, text: str) -> dict[str, Any]:
    if role not in ("user", "assistant"):
        raise LeftOut("role")
    return {"role": "user" if role == "user" else "model", "parts": [{"text": text}]}


# --- LLaMA-Factory -------------------------------------------------------------------------------

_SPEAKERS = {"user": "human", "tool": "observation", "assistant": "gpt"}


def _llama_factory(group: Group, context: Context) -> dict[str, Any]:
    """sharegpt, as https://github.com/hiyouga/LLaMA-Factory/blob/main/data/README.md has it.

    Turns must alternate: LLaMA-Factory skips a record whose turns do not (its data/converter.py).
    """
    row = group[0]
    turns = _sharegpt(row)
    record: dict[str, Any] = {"conversations": turns}
    if row["type"] == "pairwise":
        sides = zip(("chosen", "rejected"), group, strict=True)
        record |= {name: {"from": "gpt", "value": side["response"]} for name, side in sides}
    else:
        turns.append({"from": "gpt", "value": row["response"]})
    if row["type"] == "binary":
        record["kto_tag"] = _good(row, context)
    tools = tools_of(row)
    return record | ({"tools": tools or ""} if tools is not None or context.tools else {})


def _sharegpt(row: Row) -> list[dict[str, str]]:
    turns = _turns(row)
    system = [{"from": "system", "value": turns.pop(0)["content"]}] if turns[0]["role"] == "system" else []
    if any(turn["role"] not in _SPEAKERS for turn in turns):
        raise LeftOut("role")
    answers = [turn["role"] == "assistant" for turn in turns]
    if len(turns) % 2 == 0 or answers != [i % 2 == 1 for i in range(len(turns))]:
        raise LeftOut("turns")
    return system + [_spoken(turn) for turn in turns]


def _spoken(turn: dict[str, Any]) -> dict[str, str]:
    if "tool_calls" not in turn:
        return {"from": _SPEAKERS[turn["role"]], "value": turn["content"]}
    if turn["content"] or turn["role"] != "assistant":
        raise LeftOut("tool_calls")
    calls = [_function(call) for call in turn["tool_calls"]]
    value = orjson.dumps(calls[0] if len(calls) == 1 else calls).decode()
    return {"from": "function_call", "value": value}


def _function(call: Any) -> dict[str, Any]:
    """`name` and `arguments` of a call, the arguments as an object."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise LeftOut("tool_calls")
    arguments = function.get("arguments")
    arguments = _json(arguments) if isinstance(arguments, str) else arguments
    if not isinstance(arguments, dict) or function.keys() - {"name", "arguments"}:
        raise LeftOut("tool_calls")
    return {"name": function["name"], "arguments": arguments}


_COLUMNS = {
    "pairwise": {"chosen": "chosen", "rejected": "rejected"},
    "binary": {"kto_tag": "kto_tag"},
    "demonstration": {},
}


def dataset_info(output: Path, kind: str, tools: bool) -> dict[str, Any]:
    """The entry of LLaMA-Factory's dataset_info.json that tells it what `output` holds."""
    columns = {"messages": "conversations", **_COLUMNS[kind], **({"tools": "tools"} if tools else {})}
    entry: dict[str, Any] = {"file_name": output.name, "formatting": "sharegpt", "columns": columns}
    return {output.name.partition(".")[0]: entry | ({"ranking": True} if kind == "pairwise" else {})}


# --- HALOs and Label Studio ----------------------------------------------------------------------


def _halos(group: Group, context: Context) -> dict[str, Any]:
    """What `get_feedback` of https://github.com/ContextualAI/HALOs/blob/main/train/data.py reads."""
    row = group[0]
    record = {"prompt_id": row["prompt_id"], "prompt": _plain(row), "type": f"{row['type']}_feedback"}
    record["split"] = row["split"]
    if row["type"] == "pairwise":
        first, second = _either_side(group)
        record |= {"output_A": [_said(first)], "output_B": [_said(second)]}
        return record | {
            "reward_A": first["reward"],
            "reward_B": second["reward"],
            "label": int(first["reward"] > second["reward"]),
        }
    record |= {"output": [_said(row)], "reward": row["reward"]}
    return record | ({"label": int(_good(row, context))} if row["type"] == "binary" else {})


def _label_studio(group: Group, context: Context) -> dict[str, Any]:
    """A task for the template "Human Preference collection for RLHF": `prompt`, `answer1`, `answer2`, `comparison`.

    The value is as Pairwise.js of https://github.com/HumanSignal/label-studio makes it; `to_name` is one of the two
    texts, as the import of predictions demands (label_studio_sdk's `validate_prediction`). What people chose is an
    annotation; what a model, a judge or nobody known chose is a prediction, which `una ingest` does not read back.
    Which response is on the left does not tell which is better.
    """
    left, right = _either_side(group)
    selected = "left" if left["reward"] > right["reward"] else "right"
    result = [{"from_name": "comparison", "to_name": "answer1", "type": "pairwise", "value": {"selected": selected}}]
    task = {"data": {"prompt": _asked(left), "answer1": left["response"], "answer2": right["response"]}}
    labeller = left["labeller"] or "unknown"
    if labeller.partition(":")[0] == "human":
        return task | {"annotations": [{"result": result}]}
    certainty = max(left["reward"], right["reward"])
    return task | {"predictions": [{"model_version": labeller, "score": certainty, "result": result}]}


def _asked(row: Row) -> Any:
    """The prompt as text where it is one user turn, else its messages."""
    turns = _plain(row)
    return turns[0]["content"] if [turn["role"] for turn in turns] == ["user"] else turns


# --- the targets ---------------------------------------------------------------------------------

EXPORTERS = {
    "trl-preference": Exporter(
        types=("pairwise",),
        make=_trl_preference,
        lost=_lost(tools=True, reference=True),
        reference=True,
        schema=_trl_schema(
            ("chosen", "rejected"),
            False,
            ("prompt_ids", "chosen_ids", "rejected_ids"),
            ("ref_chosen_logps", "ref_rejected_logps"),
        ),
    ),
    "trl-kto": Exporter(
        types=("binary",),
        make=_trl_kto,
        lost=_lost(tools=True, reference=True),
        reference=True,
        schema=_trl_schema(("completion",), True, ("prompt_ids", "completion_ids"), ("ref_logps",)),
    ),
    "trl-prompt-completion": Exporter(
        types=("demonstration",),
        make=_trl_prompt_completion,
        lost=_lost(tools=True),
        schema=_trl_schema(("completion",), False, (), ()),
    ),
    "openai-preference": Exporter(types=("pairwise",), make=_openai_preference, lost=_lost(tools=True)),
    "vertex": Exporter(types=("pairwise",), make=_vertex, lost=_lost() | {"blank_system": _blank_system}),
    "llama-factory": Exporter(
        types=("pairwise", "binary", "demonstration"),
        make=_llama_factory,
        lost=_lost(tools=True, calls=False),
        array=True,
        single=True,
    ),
    "halos": Exporter(
        types=("pairwise", "binary", "scalar"),
        make=_halos,
        lost=_lost() | {"soft_label": lambda row: row["type"] == "pairwise" and _soft(row)},
        array=True,
        single=True,
    ),
    "label-studio": Exporter(types=("pairwise",), make=_label_studio, lost=_lost(), array=True),
}


# --- writing -------------------------------------------------------------------------------------


def write(made: Iterable[dict[str, Any]], target: Exporter, context: Context, path: str, output: str) -> None:
    """Write records to `path` in the layout that `output`, the name it will get, asks for."""
    if context.parquet:
        assert target.schema is not None
        _write_parquet(made, target.schema(context), path)
    elif output.endswith(".gz"):
        with io.create(path) as file, gzip.GzipFile(fileobj=file, mode="wb", filename="", mtime=0) as zipped:
            _write_json(made, target.array, zipped)
    else:
        with io.create(path) as file:
            _write_json(made, target.array, file)


def _write_json(made: Iterable[dict[str, Any]], array: bool, file: BinaryIO | gzip.GzipFile) -> None:
    before = b"[\n" if array else b""
    for record in made:
        file.write(before + orjson.dumps(record))
        before = b",\n" if array else b"\n"
    file.write(b"\n]\n" if array else b"\n")


def _write_parquet(made: Iterable[dict[str, Any]], schema: pa.Schema, path: str) -> None:
    pending: list[dict[str, Any]] = []
    with io.create(path) as file, pq.ParquetWriter(file, schema, compression="zstd") as writer:
        for record in made:
            pending.append(record)
            if len(pending) == BATCH_ROWS:
                writer.write_table(pa.Table.from_pylist(pending, schema=schema))
                pending = []
        writer.write_table(pa.Table.from_pylist(pending, schema=schema))


# --- command -------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `una export`."""
    parser.add_argument("directory", metavar="DIR", help="a dataset directory made by una")
    parser.add_argument("--to", required=True, choices=tuple(EXPORTERS), help="the target")
    parser.add_argument(
        "--output", required=True, metavar="FILE", help="the file to write: .jsonl, .json (either .gz), or .parquet"
    )
    parser.add_argument("--split", metavar="NAME", help="the split to write, or all (needed where there are several)")
    parser.add_argument("--type", choices=TYPES[:4], help="write rows of this type only")
    parser.add_argument(
        "--threshold",
        type=share,
        metavar="REWARD",
        help="trl-kto: take scalar rewards strictly above this for good, the others for bad (no default: left out)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace --output")


def command(args: argparse.Namespace) -> dict[str, Any]:
    """`una export`: returns the summary that `--json` prints."""
    target = EXPORTERS[args.to]
    _check_arguments(args, target)
    manifest = dataset.read_manifest(args.directory)
    files = _files(args.directory, manifest, args.split)
    reference = manifest.reference is not None
    context = Context(
        threshold=args.threshold,
        only=args.type,
        reference=reference and target.reference,
        parquet=args.output.endswith(".parquet"),
    )
    expected = Tally()
    for _ in records(read(files, reference), target, context, expected):
        pass
    rows = sum(expected.rows.values()) + sum(expected.left_out.values())
    assert rows == _number_of_rows(files), f"{rows} rows were seen, {files} hold others"
    report = _report(args, manifest, expected)
    if "failed" in report:
        return report
    if target.single and len(expected.rows) > 1:
        kinds = " and ".join(f"{kind} ({n} rows)" for kind, n in sorted(expected.rows.items()))
        raise UsageError(f"--to {args.to}: a file holds one type, and here are {kinds}; choose with --type")
    info, known = _beside(args.output) if args.to == "llama-factory" else ("", {})
    context = replace(context, tools=expected.tools)
    _write_whole(read(files, reference), target, context, expected, args.output)
    if args.to == "llama-factory":
        entry = dataset_info(Path(args.output), next(iter(expected.rows)), context.tools)
        io.write_whole(info, (json.dumps({**known, **entry}, indent=2, ensure_ascii=False) + "\n").encode())
        report["dataset_info"] = info
    print(args.output)
    return report


def _check_arguments(args: argparse.Namespace, target: Exporter) -> None:
    endings: tuple[str, ...] = (".json", ".json.gz") if target.array else (".jsonl", ".jsonl.gz")
    endings += (".parquet",) if target.schema else ()
    if not args.output.endswith(endings):
        raise UsageError(f"--output {args.output}: {args.to} is written to a file that ends in {' or '.join(endings)}")
    if args.threshold is not None and args.to != "trl-kto":
        raise UsageError(f"--threshold: only for trl-kto; for {args.to}, run `una view --as binary --threshold` first")
    dataset.refuse(args.output, [args.directory])
    if os.path.isdir(args.output) or (io.exists(args.output) and not args.overwrite):
        raise UserError(f"{args.output}: exists; pass --overwrite to replace it, or another --output")


def _files(directory: str, manifest: Manifest, split: str | None) -> list[str]:
    if split is None and len(manifest.splits) > 1:
        held = ", ".join(f"{name} ({n} rows)" for name, n in manifest.splits.items())
        raise UsageError(f"{directory}: has the splits {held}; choose one with --split, or --split all")
    if split not in (None, "all", *manifest.splits):
        raise UsageError(f"--split {split}: {directory} has {', '.join(manifest.splits) or 'no rows'}")
    files = dataset.data_files(directory, manifest)
    return [f for f in files if split in (None, "all") or _split(f) == split]


def _number_of_rows(files: list[str]) -> int:
    found = 0
    for path in files:
        with io.open_parquet(path) as file:
            found += file.metadata.num_rows
    return found


def _report(args: argparse.Namespace, manifest: Manifest, tally: Tally) -> dict[str, Any]:
    """The summary, printed before a byte is written."""
    report: dict[str, Any] = {
        "output": args.output,
        "to": args.to,
        "split": args.split or next(iter(manifest.splits), None),
        "records": tally.records,
        "rows": dict(sorted(tally.rows.items())),
        "lost": dict(tally.lost.most_common()),
        "left_out": dict(sorted(tally.left_out.items())),
    }
    print(f"{args.to}: {tally.records} records of {sum(tally.rows.values())} rows, split {report['split']}")
    if args.threshold is not None:
        print(f"policies: threshold={args.threshold:g} (a scalar reward strictly above it is good)")
    for name, what in (("lost", f"not kept by {args.to}, in rows"), ("left_out", "rows left out")):
        if report[name]:
            print(f"{what}: " + ", ".join(f"{k} {v}" for k, v in report[name].items()))
    if not tally.records:
        held = " and ".join(EXPORTERS[args.to].types)
        report["failed"] = f"no row can be written: {args.to} holds {held} rows; `una view` turns one type into another"
    return report


def _write_whole(rows: Iterable[Row], target: Exporter, context: Context, expected: Tally, output: str) -> None:
    """Write beside the output and rename; what is written is what was announced."""
    partial, found = dataset.staging(output), Tally()
    try:
        write(records(rows, target, context, found), target, context, partial, output)
        assert found == expected, f"{found} was written, {expected} was announced"
        io.move(partial, output)
    except BaseException:
        io.remove(partial)
        raise


def _beside(output: str) -> tuple[str, dict[str, Any]]:
    """The dataset_info.json beside the output, where LLaMA-Factory looks, and the entries that it has."""
    path = f"{output.rpartition('/')[0] or '.'}/dataset_info.json"
    if not io.exists(path):
        return path, {}
    with io.open_raw(path) as file:
        known = readers.parse(file.read())
    if not isinstance(known, dict):
        raise UserError(f"{path}: no JSON object, so {output} cannot be entered in it; mend it and run again")
    return path, known
