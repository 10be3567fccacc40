"""Labellers: who gives a response its explicit reward; one dict that names the kinds, and how one is asked for.

To add one: a function from items to scores in a module here, a `Kind` line in its `KINDS`, and a test.
"""

import dataclasses
from importlib import import_module
from pathlib import Path
from typing import Any

from pipelines.labellers.base import Kind
from schemas import settings_file
from schemas.command import did_you_mean
from schemas.errors import UsageError

# kind → the module whose `KINDS` holds it; imported only when it is asked for
LABELLERS = {
    "reward-model": "pipelines.labellers.reward_model",
    "judge": "pipelines.labellers.judge",
    "exact-match": "pipelines.labellers.rules",
    "regex": "pipelines.labellers.rules",
    "math": "pipelines.labellers.rules",
    "json-schema": "pipelines.labellers.rules",
    "length": "pipelines.labellers.rules",
    "code": "pipelines.labellers.rules",
    "python": "pipelines.labellers.rules",
    "attributes": "pipelines.labellers.rules",
}


@dataclasses.dataclass(frozen=True)
class Asked:
    """A labeller as it was asked for: its kind, and that kind's settings."""

    name: str
    settings: Any

    @property
    def kind(self) -> Kind:
        return import_module(LABELLERS[self.name]).KINDS[self.name]


def asked(spec: str) -> Asked:
    """The labeller of `--labeller SPEC`: `kind`, `kind:name=value,name=value`, or a YAML file with `kind` and settings.

    `UsageError` for a kind or a setting that there is not.
    """
    if Path(spec).suffix in (".yaml", ".yml"):
        given = settings_file.read(spec, "labeller")
        name = str(given.pop("kind", ""))
    else:
        name, _, rest = spec.partition(":")
        parts = [part.partition("=") for part in rest.split(",") if part]
        if wrong := [key for key, equals, _ in parts if not equals]:
            raise UsageError(f"--labeller {spec}: {wrong[0]!r} has no value; write {name}:name=value,name=value")
        given = {key.strip(): settings_file.parse(value, f"--labeller {spec}") for key, _, value in parts}
    if name not in LABELLERS:
        raise UsageError(f"--labeller {spec}: no kind {name!r}{did_you_mean(name, LABELLERS)}; {', '.join(LABELLERS)}")
    settings = import_module(LABELLERS[name]).KINDS[name].settings
    fields = [field.name for field in dataclasses.fields(settings)]
    for key in given:
        if key not in fields:
            raise UsageError(f"--labeller {name}: no setting {key!r}{did_you_mean(str(key), fields)}")
    needed = [f.name for f in dataclasses.fields(settings) if f.default is f.default_factory is dataclasses.MISSING]
    if lacking := [one for one in needed if one not in given]:
        raise UsageError(f"--labeller {name}: give {', '.join(f'{one}=…' for one in lacking)}")
    return Asked(name, settings(**given))
