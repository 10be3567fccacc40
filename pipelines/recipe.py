"""`una run RECIPE.yaml`: ingest, filter and label, reference, publish, train, online, eval, report.

Filter, label, online and eval are there where the recipe has such sections. Online goes on from the policy that was
trained, and eval compares what came of it with the model.

A recipe names an output directory, a model, input files, and options per stage under the names the
commands use. A stage whose inputs and parameters are those of its last finished run is skipped; what
those were is kept in OUTPUT/stages.json.
"""

import argparse
import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from pipelines import cli, dataset, io, labellers, mapping, models, remote
from schemas import settings_file
from schemas.command import did_you_mean
from schemas.errors import UsageError
from schemas.fingerprint import fingerprint
from schemas.manifest import NAME, Manifest, sha256

log = logging.getLogger(__name__)
STAGES = ("ingest", "filter", "label", "reference", "publish", "train", "online", "eval", "report")
KEYS = ("output", "model", "input", *STAGES)
OPTIONAL = ("filter", "label", "online", "eval")  # left out where the recipe has no such section
RUNS = ("train", "online")  # stages that leave a run directory, and go on from its checkpoint
# of its section; the others are settings
ONLINE = ("prompts", "reward", "held_out_reward", "offline", "server", "server_model", "server_key_env")
OURS = ("output", "model", "overwrite", "resume", "json", "help")  # what a stage's section cannot set
STATE = "stages.json"


@dataclass(frozen=True)
class Stage:
    """One stage: the command line it amounts to, the file whose presence says it finished, what it depends on."""

    name: str
    argv: list[str]
    done: str
    inputs: Callable[[], Any]  # evaluated just before the stage runs


def read(path: str, changes: list[str]) -> dict[str, Any]:
    """The recipe with `--set` changes applied; `UsageError` for what no recipe has."""
    recipe = settings_file.read(path, "recipe")
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals:
            raise UsageError(f"--set {change}: must look like key=value or stage.key=value")
        *stage, last = key.split(".", 1)
        if stage and not isinstance(recipe.get(stage[0]) or {}, dict):
            raise UsageError(f"--set {change}: {stage[0]} is {recipe[stage[0]]!r} and has no entries")
        if stage and not recipe.get(stage[0]):
            recipe[stage[0]] = {}
        section = recipe[stage[0]] if stage else recipe
        section[last] = settings_file.parse(value, f"--set {change}")
    for key in recipe:
        if key not in KEYS:
            raise UsageError(f"{path}: unknown key {key!r}{did_you_mean(str(key), KEYS)}")
    for key in ("output", "input"):
        if not recipe.get(key):
            raise UsageError(f"{path}: the recipe has no {key!r}")
    for key, kinds in (("output", str), ("model", str | None), ("input", str | list)):
        if not isinstance(recipe.get(key), kinds):
            raise UsageError(f"{path}: {key} is {recipe[key]!r}; it must be text{' or a list' * (key == 'input')}")
    if not all(isinstance(item, str) for item in recipe["input"]):
        raise UsageError(f"{path}: input is {recipe['input']!r}; it must be a list of paths")
    return recipe


def stages(recipe: dict[str, Any]) -> list[Stage]:
    """The stages a recipe asks for, in order; a section set to false leaves its stage out."""
    wanted = [name for name in STAGES if recipe.get(name) is not False and (name not in OPTIONAL or recipe.get(name))]
    if {"reference", "eval", *RUNS} & set(wanted) and not recipe.get("model"):
        raise UsageError("the recipe has no 'model'; give one, or set reference: false and train: false")
    output, model = str(recipe["output"]).rstrip("/"), str(recipe.get("model"))
    if io.is_remote(output) and (local := [name for name in (*RUNS, "eval") if name in wanted]):
        raise UsageError(f"output {output}: {local[0]} writes to a local directory; name one, or set {local[0]}: false")
    paths = [recipe["input"]] if isinstance(recipe["input"], str) else list(recipe["input"])
    out = {name: f"{output}/{name}" for name in STAGES}
    clean = out["filter"] if "filter" in wanted else out["ingest"]
    rows = out["label"] if "label" in wanted else clean
    scored = out["reference"] if "reference" in wanted else rows
    last = out["publish"] if "publish" in wanted else scored

    def same(directory: str) -> Callable[[], Any]:
        return lambda: _digest(_lasting(dataset.read_manifest(directory)))

    def with_model(directory: str) -> Callable[[], Any]:
        return lambda: [same(directory)(), _model(model)]

    policy = f"{out['train']}/policy" if "train" in wanted else model
    runs = [out[name] for name in RUNS if name in wanted]
    sections = {name: recipe.get(name) for name in wanted if name not in RUNS}
    if "eval" in wanted:
        sections["eval"] = _eval(recipe["eval"], model if runs else None, last if "publish" in wanted else None)
    of = {name: options(section, name) for name, section in sections.items()}

    def online() -> Stage:
        section, given = _online(recipe, paths, last if "publish" in wanted else None)
        return Stage(
            "online",
            [section.pop("prompts"), "--model", policy, "--output", out["online"], *given, *_settings(section)],
            f"{out['online']}/run.json",
            lambda: [_model(policy), _online_inputs(recipe, paths)],
        )

    def named(stage: str) -> list[str]:
        """Files that a stage's options name."""
        section = recipe.get(stage) if isinstance(recipe.get(stage), dict) else {}
        given = [section.get(key) for key in ("decontaminate", "calibration")]  # type: ignore[union-attr]
        found = [str(one) for value in given if value for one in (value if isinstance(value, list) else [value])]
        return [f"{one}/{NAME}" if Path(one).is_dir() else one for one in found]

    table = {
        "ingest": lambda: Stage(
            "ingest",
            [*paths, "--output", out["ingest"], *of["ingest"]],
            f"{out['ingest']}/manifest.json",
            lambda: _hashes([*io.expand(paths), *_mapping(recipe.get("ingest")), *named("ingest")]),
        ),
        "filter": lambda: Stage(
            "filter",
            [out["ingest"], "--output", out["filter"], *of["filter"]],
            f"{out['filter']}/manifest.json",
            lambda: [same(out["ingest"])(), _hashes(named("filter"))],
        ),
        "label": lambda: Stage(
            "label",
            [clean, "--output", out["label"], *of["label"]],
            f"{out['label']}/manifest.json",
            lambda: [same(clean)(), _labellers(of["label"]), _hashes(named("label"))],
        ),
        "reference": lambda: Stage(
            "reference",
            [rows, "--model", model, "--output", out["reference"], *of["reference"]],
            f"{out['reference']}/manifest.json",
            with_model(rows),
        ),
        "publish": lambda: Stage(
            "publish",
            [scored, "--output", out["publish"], *of["publish"]],
            f"{out['publish']}/manifest.json",
            same(scored),
        ),
        "train": lambda: Stage(
            "train",
            [last, "--model", model, "--output", out["train"], *_settings(recipe.get("train"))],
            f"{out['train']}/run.json",
            with_model(last),
        ),
        "online": online,
        "eval": lambda: Stage(
            "eval",
            [runs[-1] if runs else model, "--output", out["eval"], *of["eval"]],
            f"{out['eval']}/evaluation.json",
            lambda: [_contestant(runs[-1] if runs else model), _eval_inputs(sections["eval"] or {})],
        ),
        "report": lambda: Stage(
            "report",
            [runs[-1] if runs else last, "--output", f"{output}/report.html", *of["report"]],
            f"{output}/report.html",
            lambda: sha256(f"{runs[-1]}/run.json") if runs else same(last)(),
        ),
    }
    return [table[name]() for name in wanted]


def _lasting(manifest: Manifest) -> dict[str, Any]:
    """The manifest without what a run had to compute, and how exactly: the same rows again are the same rows."""
    facts = asdict(manifest)
    for name in ("scoring", "parity"):
        facts["statistics"].pop(name, None)
    return facts


def _hashes(paths: list[str]) -> list[list[str]]:
    return [[path, remote.version(path) if io.is_remote(path) else sha256(path)] for path in paths]


def _mapping(section: Any) -> list[str]:
    """The file of an ingest stage's mapping and the files it joins."""
    path = section.get("mapping") if isinstance(section, dict) else None
    return [str(path), *mapping.load(str(path)).files] if path else []


def _labellers(argv: list[str]) -> list[Any]:
    """What the scores of a label stage depend on beside the rows."""
    asked = [labellers.asked(spec) for flag, spec in pairwise(argv) if flag == "--labeller"]
    return [asdict(one.kind.identify(one.settings)) for one in asked]


def options(section: Any, stage: str) -> list[str]:
    """A section's options as command-line arguments: {batch_tokens: 512} → --batch-tokens 512."""
    known = cli.parser_for(stage)._option_string_actions if section else {}
    many = {flag for flag, action in known.items() if action.nargs == "+"}
    again = {flag for flag, action in known.items() if isinstance(action, argparse._AppendAction)}
    if section is not None and not isinstance(section, dict):
        raise UsageError(f"a stage's section must be a mapping of its options, or false; got {section!r}")
    argv: list[str] = []
    for key, value in (section or {}).items():
        if key in OURS:
            raise UsageError(f"{key} cannot be set for one stage; `una run` sets it")
        name = f"--{str(key).replace('_', '-')}"
        if isinstance(value, dict):
            argv += [name, ",".join(f"{k}={_text(v)}" for k, v in value.items())]
        elif isinstance(value, list) and name in again:
            argv += [word for one in value for word in (name, str(one))]
        elif isinstance(value, list):
            argv += [name, *map(str, value)] if name in many else [name, ",".join(map(str, value))]
        elif value is True:
            argv += [name]
        elif value is not False and value is not None:
            argv += [name, str(value)]
    return argv


def _text(value: Any) -> str:
    return ":".join(map(str, value)) if isinstance(value, list) else str(value)


def _settings(section: Any) -> list[str]:
    """Training settings as --set arguments, in JSON, which YAML reads back as it was."""
    if section is not None and not isinstance(section, dict):
        raise UsageError(f"train: must be a mapping of training settings, or false; got {section!r}")
    return [x for key, value in (section or {}).items() for x in ("--set", f"{key}={json.dumps(value)}")]


def _online(recipe: dict[str, Any], paths: list[str], published: str | None) -> tuple[dict[str, Any], list[str]]:
    """The section's prompts and settings, and the options that are none; `offline: true` is the published dataset."""
    section = dict(recipe["online"]) if isinstance(recipe["online"], dict) else {}
    if not section.get("reward"):
        raise UsageError("online: the section has no 'reward'; give a labeller, as `una online --reward` takes it")
    if not section.get("prompts") and len(paths) != 1:
        raise UsageError("online: the section has no 'prompts', and input names several files; give one of prompts")
    if section.get("offline") is True and published is None:
        raise UsageError("online: offline: true is the dataset that publish writes, and publish is false")
    section["prompts"] = str(section.get("prompts") or paths[0])
    if section.get("offline") is True:
        section["offline"] = published
    given = [(name, section.pop(name, None)) for name in ONLINE if name != "prompts"]
    return section, [word for name, value in given if value for word in (f"--{name.replace('_', '-')}", str(value))]


def _online_inputs(recipe: dict[str, Any], paths: list[str]) -> list[Any]:
    """What an online run depends on beside the model and its settings."""
    section = recipe["online"]
    specs = [section[name] for name in ("reward", "held_out_reward") if section.get(name)]
    prompts = str(section.get("prompts") or paths[0])
    files = [f"{prompts}/{NAME}"] if io.exists(f"{prompts}/{NAME}") else io.expand([prompts])
    return [_hashes(files), _labellers([word for spec in specs for word in ("--labeller", str(spec))])]


def _eval(section: Any, model: str | None, published: str | None) -> Any:
    """The section, with the model to compare a run with, and the published dataset's prompts where it names none."""
    if not isinstance(section, dict):
        return section  # `options` says that it must be one
    section = dict(section)
    if section.get("reward") and not section.get("prompts") and published:
        section["prompts"] = published
    if model and not section.get("against"):
        section["against"] = [model]
    if model and section.get("prompts") and not section.get("reference"):
        section["reference"] = model
    return section


def _eval_inputs(section: dict[str, Any]) -> list[Any]:
    """What an evaluation depends on beside its first model and its options."""
    others = [one for name in ("against", "reference") for one in _listed(section.get(name))]
    datasets = [one for name in ("prompts", "dataset") for one in _listed(section.get(name))]
    rewards = [word for spec in _listed(section.get("reward")) for word in ("--labeller", spec)]
    files = [f"{one}/{NAME}" if io.exists(f"{one}/{NAME}") else one for one in datasets]
    return [[_contestant(one) for one in others], _hashes(io.expand(files) if files else []), _labellers(rewards)]


def _listed(value: Any) -> list[str]:
    return [str(one) for one in value] if isinstance(value, list) else [str(value)] if value else []


def _contestant(given: str) -> Any:
    """What tells a model, a training run or a file of outputs, perhaps named, from what was there before."""
    path = given if io.exists(given) else given.partition("=")[2] or given
    run = f"{path.rstrip('/')}/run.json"
    if io.exists(run) or io.ending(path) in io.ENDINGS:
        return _hashes([run if io.exists(run) else path])
    return _hashes(
        sorted(str(file) for file in models.local(path).iterdir() if file.suffix in (".json", ".safetensors"))
    )


def _model(name: str) -> dict[str, Any]:
    return fingerprint(models.local(name), dtype="", engine="", engine_version="")


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


# --- command -------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `una run`."""
    parser.add_argument("recipe", metavar="RECIPE.yaml", help="see examples/ for recipes")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change the recipe: model=…, train.beta=0.1"
    )


def command(args: argparse.Namespace) -> dict[str, Any]:
    """`una run`: returns what every stage returned, and whether it was skipped."""
    if any(flag.startswith("--template_location") for flag in args.beam):
        raise UsageError("--template_location: a template is of one stage; name it instead of a recipe")
    recipe = read(args.recipe, args.set)
    planned = [(stage, cli.parse(stage.name, stage.argv)) for stage in stages(recipe)]  # bad options fail here
    output = str(recipe["output"]).rstrip("/")
    state = _read_state(output)
    summary: dict[str, Any] = {"output": output, "stages": {}}
    for stage, parsed in planned:
        parsed.beam = parsed.beam + args.beam
        summary["stages"][stage.name] = result = _run(stage, parsed, state, output)
        if result.get("failed"):
            summary["failed"] = f"{stage.name}: {result['failed']}"
            break
    return summary


def _run(stage: Stage, args: argparse.Namespace, state: dict[str, Any], output: str) -> dict[str, Any]:
    key = _digest([stage.name, stage.argv, stage.inputs()])
    before = state.get(stage.name, {})
    if before.get("key") == key and before.get("summary") and _done(stage):
        log.info("%s: unchanged, skipped", stage.name)
        return {**before["summary"], "skipped": True}
    log.info("%s: una %s %s", stage.name, stage.name, " ".join(stage.argv))
    args.resume = before.get("key") == key and _cut_short(stage)  # a run goes on from its checkpoint
    args.overwrite = stage.name in state and not args.resume  # what lies there is this recipe's own, from before
    state[stage.name] = {"key": key}
    _write_state(output, state)
    print(f"── {stage.name}")
    result = cli.call(stage.name, args)
    if not result.get("failed"):
        state[stage.name] = {"key": key, "summary": result}
        _write_state(output, state)
    return {**result, "skipped": False}


def _cut_short(stage: Stage) -> bool:
    """Whether a run was started here and not finished."""
    if stage.name not in RUNS or not io.exists(stage.done):
        return False
    return json.loads(Path(stage.done).read_text("utf-8")).get("final") is None


def _done(stage: Stage) -> bool:
    directory, _, name = stage.done.rpartition("/")
    return dataset.intact(directory) if name == NAME else io.exists(stage.done)


def _read_state(output: str) -> dict[str, Any]:
    path = f"{output}/{STATE}"
    if not io.exists(path):
        return {}
    with io.open_bytes(path) as file:
        try:
            return json.loads(file.read())
        except ValueError:
            log.warning("%s: not readable, every stage runs again", path)
            return {}


def _write_state(output: str, state: dict[str, Any]) -> None:
    path = f"{output}/{STATE}"
    if not io.is_remote(path):
        Path(output).mkdir(parents=True, exist_ok=True)
    io.write_whole(path, json.dumps(state, indent=2, sort_keys=True, default=str).encode())
