"""A mapping says in YAML how a file that no built-in format fits becomes rows: which fields, and what a label means.

`load` reads and checks one, `Mapping.convert` does what a converter does, and `draft` guesses one from records. It
imports neither Beam nor a model. Reference with examples: docs/mapping.md; what YAML may hold: `shape`.
"""

import os
import re
from dataclasses import dataclass
from typing import Any

from pipelines.converters.base import LeftOut, Policy
from pipelines.converters.labels import annotator, compared, is_missing, some
from pipelines.converters.messages import answer, as_json, facts, show, text
from pipelines.mapping import check, paths, values
from pipelines.mapping.described import feedback_of, fields_of, labels_of
from pipelines.mapping.drafting import draft
from pipelines.mapping.joins import Join, index, joined, key_text, resolve
from pipelines.mapping.judgements import (
    Judgement,
    canonical,
    judge_many,
    judge_one,
    judge_two,
    judgements,
    known,
    read_number,
)
from schemas.errors import POLICY_REASONS, Reject, UsageError, UserError
from schemas.feedback import Message, Row, demonstration

__all__ = ["Mapping", "draft", "load"]

Scope = dict[str, Any]


@dataclass(frozen=True)
class Mapping:
    """A checked mapping: plain data that goes to workers; joined files are read where they are first needed."""

    path: str
    spec: dict[str, Any]  # what the YAML holds
    feedback: str  # the row type(s) it makes, for people
    fields: dict[str, str]  # field of the record → what it becomes
    labels: str  # what the labels mean, and their sign
    joins: tuple[Join, ...] = ()

    @property
    def files(self) -> list[str]:
        """The joined files, on whose bytes the rows depend too."""
        return sorted({file for join in self.joins for file in join.files})

    @property
    def of_members(self) -> bool:
        """Whether the members of a record are items, so that a file of one object holds as many records as members."""
        return "each" in self.spec and check.each_path(self.spec) == check.WHOLE

    def labels_in(self) -> list[tuple[str, str]]:
        """Where the mapping names a field of the record that holds labels or annotators, and that field."""
        if "each" in self.spec:  # a path may lead into the element
            return []
        others = {join.name for join in self.joins}
        others |= {"annotation", "key"} if "each" in self.spec.get("label", {}) else set()
        found = [(where, paths.parse(path)[0]) for where, path in check.named_paths(self.spec)]
        of_labels = [(where, str(key)) for where, key in found if where.startswith("label")]
        return [(where, key) for where, key in of_labels if key not in others]

    def convert(self, record: dict[str, Any], source: str, policy: Policy) -> list[Row | LeftOut]:
        """The rows of a record, as a converter makes them; raises `Reject` if there are none."""
        for path in check.listed(self.spec.get("json", [])):
            record = paths.opened(record, paths.parse(path), path)
        if "each" not in self.spec:
            return _convert(self, record, source, policy)
        return _exploded(self, record, source, policy)


def load(path: str) -> Mapping:
    """The mapping in a YAML file, checked, its joined files read once. Errors are `UsageError` and `UserError`."""
    spec = check.read(path)
    found = tuple(_join(name, given, spec, path) for name, given in spec.get("join", {}).items())
    for join in found:
        index(*join[1:2], *join[3:])
    return Mapping(path, spec, feedback_of(spec), fields_of(spec), labels_of(spec), found)


def _join(join: str, given: dict[str, Any], spec: dict[str, Any], path: str) -> Join:
    on = check.listed(given["on"])
    key, json = (check.listed(given.get(k, default)) for k, default in (("key", on), ("json", [])))
    name = given.get("as", join)
    steps = [paths.parse(named) for _, named in check.named_paths(spec)]
    used = [own for own in steps if own[0] == name]
    keep = frozenset(str(own[1]) for own in used) if all(len(own) > 1 for own in used) else None
    try:
        files = resolve(os.path.dirname(path), given["file"])
    except UserError as error:
        raise UsageError(f"{path}: join.{join}.file: {error}") from None
    return Join(name, files, tuple(on), tuple(key), tuple(json), keep)


# --- records, items and filters ------------------------------------------------------------------


def _exploded(mapping: Mapping, record: Scope, source: str, policy: Policy) -> list[Row | LeftOut]:
    """The rows of every element of a list or an object; an element that cannot be used is left out."""
    where = check.each_path(mapping.spec)
    if mapping.of_members:
        items, where, record = paths.elements(record, "record", "items"), "the record", {}
    else:
        items = paths.elements(paths.needed(record, where), where, "items")
    if not items:
        raise Reject("missing_field", f"{where} is empty")
    name, before = check.item_name(mapping.spec), check.before_name(mapping.spec)
    made: list[Row | LeftOut] = []
    for i, (place, key, item) in enumerate(items):
        earlier = {before: [one for _, _, one in items[:i]]} if before else {}
        try:
            made += _convert(mapping, {**record, **paths.under(key), **earlier, name: item}, source, policy)
        except Reject as error:
            made.append(LeftOut(place, error.reason, error.detail))
    return _some(made)


def _some(made: list[Row | LeftOut]) -> list[Row | LeftOut]:
    """What was made; if nothing was, `Reject` with what is wrong, before what a policy or a filter dropped."""
    made.sort(key=lambda m: isinstance(m, LeftOut) and (m.reason in POLICY_REASONS) + (m.reason == "filtered"))
    return some(made)


def _convert(mapping: Mapping, scope: Scope, source: str, policy: Policy) -> list[Row | LeftOut]:
    """The rows of a record, or of an element of it; filters that need no joined file come first."""
    where, names = mapping.spec.get("where", {}), [join.name for join in mapping.joins]
    late = [path for path in where if paths.parse(path)[0] in names]
    for path in where:
        if path not in late:
            _require(scope, path, where[path])
    for join in mapping.joins:
        scope = {**scope, join.name: joined(scope, join)}
    for path in late:
        _require(scope, path, where[path])
    return _rows(mapping.spec, scope, policy, source=source, **_facts(mapping.spec, scope))


def _require(scope: Scope, path: str, condition: Any) -> None:
    value = paths.find(scope, path)
    if not _meets(value, condition, path):
        raise Reject("filtered", f"{path} is {show(value)}")


def _meets(value: Any, condition: Any, path: str) -> bool:
    if not isinstance(condition, dict):
        return _is_among(value, condition)
    blank = is_missing(value)
    if condition.get("present", not blank) == blank:
        return False
    if "not" in condition and _is_among(value, condition["not"]):
        return False
    if "matches" in condition and not (isinstance(value, str) and re.search(condition["matches"], value)):
        return False
    bounds = [(name, bound) for name, bound in condition.items() if name in _COMPARED]
    if not bounds or blank:
        return not bounds
    try:
        given = read_number(value, path)
    except Reject as error:
        raise Reject("wrong_type", f"{error.detail}; a filter compares it with numbers") from None
    return all(_COMPARED[name](given, bound) for name, bound in bounds)


_COMPARED = {
    "above": lambda value, bound: value > bound,
    "below": lambda value, bound: value < bound,
    "at_least": lambda value, bound: value >= bound,
    "at_most": lambda value, bound: value <= bound,
}


def _is_among(value: Any, wanted: Any) -> bool:
    return value is not None and not isinstance(value, list | dict) and canonical(value) in known(wanted)


# --- facts of a row ----------------------------------------------------------------------------


def _facts(spec: dict[str, Any], scope: Scope) -> dict[str, Any]:
    made: dict[str, Any] = {"metadata": _metadata(scope, spec.get("metadata", []))}
    if "labeller" in spec:
        made["labeller"] = _labeller(scope, spec["labeller"])
    return made


def _labeller(scope: Scope, given: str | dict[str, str]) -> str | None:
    """Who judged; None where the record does not say."""
    if isinstance(given, str):
        return given
    path = given["annotator"] if "annotator" in given else given["field"]
    value = paths.find(scope, path)
    if is_missing(value):
        return None
    return annotator(key_text(value, path)) if "annotator" in given else given["prefix"] + text(value, path).strip()


def _metadata(scope: Scope, given: list[str] | dict[str, Any]) -> dict[str, Any]:
    named = given if isinstance(given, dict) else {path: path for path in given}
    made: dict[str, Any] = {}
    for name, what in named.items():
        value = what["text"] if isinstance(what, dict) else paths.find(scope, what)
        if isinstance(value, bytes):
            raise Reject("wrong_type", f"metadata.{name}: {show(value)}, which no text can hold; leave it out")
        if isinstance(value, bool | list | dict):
            made[name] = value if isinstance(value, bool) else as_json(value, name)
        else:
            made |= facts({name: value}, name)
    return made


# --- rows --------------------------------------------------------------------------------------


def _rows(spec: dict[str, Any], scope: Scope, policy: Policy, **facts: Any) -> list[Row | LeftOut]:
    prompt = values.prompt(scope, spec["prompt"]) if "prompt" in spec else []
    if "demonstration" in spec:
        return [*demonstration(*_side(spec, scope, prompt, "demonstration"), **facts)]
    if "response" in spec:
        side = _side(spec, scope, prompt, "response")
        label = spec["label"]
        return _by_everyone(
            spec, scope, facts, lambda said, own: judge_one(side, said.value, said.where, label, policy, **own)
        )
    if "responses" in spec:
        return _of_several(spec, scope, prompt, policy, facts)
    asked, first, second = _pair(spec, scope, prompt)
    if "chosen" in spec:
        return [*compared(asked, first, second, 1.0, policy, **facts)]

    def judge(said: Judgement, own: dict[str, Any]) -> list[Row]:
        shown = (second, first) if _is_swapped(said) else (first, second)
        return judge_two(asked, shown, said.value, said.where, spec["label"], policy, said.scope, **own)

    return _by_everyone(spec, scope, facts, judge)


def _is_swapped(said: Judgement) -> bool:
    """Whether the responses were shown in the other order, so that its label calls the second one first."""
    conditions = said.swapped or {}
    for path, condition in conditions.items():
        told = isinstance(condition, dict) and "present" in condition
        if not told and is_missing(paths.find(said.scope, path)):
            raise Reject("missing_field", f"{path} is absent or null: in which order were the responses shown?")
    return bool(conditions) and all(_meets(paths.find(said.scope, p), c, p) for p, c in conditions.items())


def _side(spec: dict[str, Any], scope: Scope, prompt: list[Message], where: str) -> tuple[list[Message], str]:
    asked, response = answer(prompt, values.side(scope, spec[where], where), where)
    return values.with_system(scope, spec.get("system"), asked), response


def _pair(spec: dict[str, Any], scope: Scope, prompt: list[Message]) -> tuple[list[Message], str, str]:
    one, other = ("chosen", "rejected") if "chosen" in spec else ("first", "second")
    of_one, first = _side(spec, scope, prompt, one)
    of_other, second = _side(spec, scope, prompt, other)
    if of_one != of_other:
        raise Reject("histories_differ", f"the conversations before the last turn differ in {one} and {other}")
    return of_one, first, second


def _by_everyone(spec: dict[str, Any], scope: Scope, facts: dict[str, Any], judge: Any) -> list[Row | LeftOut]:
    """The rows of every judgement of the record; one of several that cannot be used is left out."""
    found = judgements(scope, spec["label"])
    if "each" not in spec["label"] and "annotators" not in spec["label"]:
        return [*judge(found[0], facts)]
    made: list[Row | LeftOut] = []
    for one in found:
        try:
            made += judge(one, facts | ({"labeller": one.labeller} if one.labeller else {}))
        except Reject as error:
            made.append(LeftOut(one.where, error.reason, error.detail))
    return _some(made) if made else [*judge(Judgement(spec["label"]["each"], None, None, scope, None), facts)]


def _of_several(
    spec: dict[str, Any], scope: Scope, prompt: list[Message], policy: Policy, facts: dict[str, Any]
) -> list[Row | LeftOut]:
    sides: list[tuple[str, tuple[list[Message], str] | Reject]] = []
    for where, given in values.several(scope, spec["responses"]):
        try:
            one = isinstance(spec["responses"], list)
            turns = values.side(scope, given, where) if one else values.as_side(given, where)
            asked, response = answer(prompt, turns, where)
            if not response.strip():  # as a null, it takes no place among others
                raise Reject("empty_response", f"{where} is {response!r}")
            sides.append((where, (values.with_system(scope, spec.get("system"), asked), response)))
        except Reject as error:
            sides.append((where, error))
    label = spec["label"]
    (said,) = judgements(scope, label)
    by_name = "ranking" in label or "names" in label or isinstance(said.value, dict)
    names = values.names_of(scope, spec["responses"], label.get("names")) if by_name else ()
    return judge_many(sides, said.value, said.where, label, policy, names, **facts)
