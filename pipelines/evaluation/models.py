"""Whom an evaluation is about: models and training runs, here or in a store, as directories that every engine loads, or
given outputs.

A training run stands for its policy, and so does a checkpoint of it. An adapter is merged into a copy of its model, and
a policy without a tokenizer gets that of the model it began as.
"""

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines import io, models
from pipelines.evaluation import questions
from schemas.errors import UsageError, UserError
from schemas.fingerprint import TOKENIZER_FILES, copy_tokenizer, local_model

RUN, CONFIG, ADAPTER = "run.json", "config.json", "adapter_config.json"


@dataclass(frozen=True)
class Contestant:
    """A model in a directory, or the responses that one gave elsewhere."""

    name: str
    given: str  # as it was asked for
    directory: str = ""  # none for given outputs
    outputs: dict[str, list[str]] | None = field(default=None, repr=False)
    beta: dict[str, float] | None = None  # type → β of the run that trained it


def named(given: Sequence[str], scratch: Path) -> list[Contestant]:
    """The contestants, each `PATH` or `NAME=PATH`; without a name, as much of the path's end as tells them apart."""
    split = [(text.partition("=")[0], text.partition("=")[2]) if _is_named(text) else ("", text) for text in given]
    short = dict(zip([path for _, path in split], _short([path for _, path in split]), strict=True))
    names = [name or short[path] for name, path in split]
    if twice := [name for i, name in enumerate(names) if name in names[:i]]:
        raise UsageError(f"{twice[0]}: is there twice; leave one out, or give them names: NAME={split[0][1]}")
    return [_contestant(name, path, scratch) for name, (_, path) in zip(names, split, strict=True)]


def _is_named(text: str) -> bool:
    name, equals, _ = text.partition("=")
    return bool(equals) and "/" not in name and not Path(text).exists()


def _short(paths: Sequence[str]) -> list[str]:
    parts = [[p for p in Path(path).parts if p != "/"] or [path] for path in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(of[-depth:]) for of in parts]
        if len(set(names)) == len(set(paths)):
            return names
    return list(paths)


def _contestant(name: str, path: str, scratch: Path) -> Contestant:
    if io.ending(path) in io.ENDINGS:
        return Contestant(name, path, outputs=questions.outputs(path))
    given = path.rstrip("/") if io.is_remote(path) else str(local_model(path).resolve())
    places = [
        where for where in (given, f"{given}/policy") for file in (CONFIG, ADAPTER) if io.exists(f"{where}/{file}")
    ]
    if not places:
        raise UserError(
            f"{path}: neither a model (config.json, weights), nor an adapter, nor a training run with a policy"
        )
    above = (given, given.rpartition("/")[0], given.rpartition("/")[0].rpartition("/")[0])
    facts = next((_json(f"{run}/{RUN}") for run in above if io.exists(f"{run}/{RUN}")), {})
    beta = (facts.get("config") or {}).get("beta")
    made = scratch / f"model-{len(list(scratch.glob('model-*')))}"
    whole = _whole(models.local(places[0]), facts.get("model"), made)
    return Contestant(name, path, str(whole), beta=beta if isinstance(beta, dict) else None)


def _json(path: str) -> dict[str, Any]:
    with io.open_bytes(path) as file, contextlib.suppress(ValueError):
        found = json.loads(file.read())
        return found if isinstance(found, dict) else {}
    return {}


def _whole(directory: Path, began_as: str | None, made: Path) -> Path:
    """The directory, or one in scratch that has what it lacks: the adapter's model, the tokenizer."""
    if (directory / ADAPTER).is_file():
        base = _json(str(directory / ADAPTER)).get("base_model_name_or_path") or began_as
        if not base:
            raise UserError(f"{directory}: the adapter does not name its model; merge it yourself, and give the result")
        model = models.local(base)
        _merge(directory, model, made)
        copy_tokenizer(model, made)
        return made
    if any((directory / name).is_file() for name in TOKENIZER_FILES):
        return directory
    if not began_as:
        return directory  # the renderer says what is missing
    made.mkdir()
    for file in directory.iterdir():
        (made / file.name).symlink_to(file.resolve())
    copy_tokenizer(models.local(began_as), made)
    return made


def _merge(adapter: Path, model: Path, made: Path) -> None:
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    try:
        base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, use_safetensors=True)
        merged: Any = peft.PeftModel.from_pretrained(base, adapter)
        merged.merge_and_unload().save_pretrained(made)
    except Exception as error:  # what damaged directories raise is anything
        raise UserError(f"{adapter}: cannot be merged into {model} ({type(error).__name__}: {error})") from None
