"""What a mapping must be beyond its shape: paths that can be read, patterns that compile, kinds that fit the responses.

`read` gives the mapping as plain JSON values: keys are text, and label values that YAML takes for true and false
(an unquoted yes, no, on, off) match their words too.
"""

import re
from collections.abc import Iterator
from functools import partial
from typing import Any

from pipelines import io
from pipelines.mapping import paths, shape
from pipelines.mapping.judgements import spellings
from pipelines.mapping.shape import KINDS, fail, told
from pipelines.mapping.values import holes
from schemas.command import did_you_mean
from schemas.errors import Reject
from schemas.settings_file import read as read_yaml

Spec = dict[str, Any]
SIDES = ("response", "demonstration", "chosen", "rejected", "first", "second")
WHOLE = "."  # the record itself, where its members are items
_LABEL_PATHS = ("field", "fields", "annotators", "by", "each", "one_hot")

_NAME_PATHS = ("field", "fields", "first", "second", "tie", "user", "assistant", "count")


def read(file: str) -> Spec:
    """The mapping that a YAML file holds; `UsageError` names the file, the key, the value and the choices."""
    spec = _named(read_yaml(file, "mapping", partial(_remote_text, file) if io.is_remote(file) else None), file, "")
    shape.check(spec, file)
    for where, path in named_paths(spec):
        _check_path(path, file, where)
    _check_responses(spec, file)
    for key in ("prompt", "system", *SIDES):
        _check_text(spec.get(key), file, key)
    for i, given in enumerate(spec["responses"] if isinstance(spec.get("responses"), list) else []):
        _check_text(given, file, f"responses[{i}]")
    if "label" in spec:
        _check_label(spec["label"], spec, file)
    _check_names(spec, file)
    _check_conditions(spec.get("where", {}), file)
    label = spec.get("label", {})
    _check_conditions(label.get("swapped", {}), file, "label.swapped")
    for column, orders in label["annotators"].items() if isinstance(label.get("annotators"), dict) else ():
        _check_conditions(orders, file, f"label.annotators.{column}")
    return spec


def _remote_text(file: str) -> str:
    with io.open_raw(file) as opened:
        return opened.read().decode("utf-8")


def _named(value: Any, file: str, where: str) -> Any:
    """The value with text for keys: YAML takes `on:` for true, and 1 for a number."""
    if isinstance(value, list):
        return [_named(v, file, f"{where}[{i}]") for i, v in enumerate(value)]
    if not isinstance(value, dict):
        return value
    if where == "label.map":
        return {text: v for key, v in value.items() for text in _spelt(key, file, where)}
    in_join = re.fullmatch(r"join\.[^.]+", where)
    made = {"on" if key is True and in_join else key: inner for key, inner in value.items()}
    for key in made:
        if isinstance(key, bool) or not isinstance(key, str | int | float):
            fail(file, where, f"the key {key!r} must be in quotes to be text")
    return {str(k): _named(v, file, f"{where}.{k}" if where else str(k)) for k, v in made.items()}


def _spelt(key: Any, file: str, where: str) -> list[str]:
    if not isinstance(key, str | int | float | bool):
        fail(file, where, f"the key {key!r} must be in quotes to be text")
    return spellings(key)


# --- paths -------------------------------------------------------------------------------------


def named_paths(spec: Spec) -> Iterator[tuple[str, str]]:
    """Where in the mapping a path stands, and the path; the keys of joined files are not among them."""
    for key in ("prompt", "system", *SIDES, "responses", "json"):
        yield from _paths_in(spec.get(key), key)
    if "each" in spec and each_path(spec) != WHOLE:
        yield from _paths_in(spec["each"], "each")
    kept = spec.get("metadata", [])
    yield from _paths_in(list(kept.values()) if isinstance(kept, dict) else kept, "metadata")
    label = spec.get("label", {})
    for key, inner in label.items():
        if key in _LABEL_PATHS:
            yield from _paths_in(inner, f"label.{key}")
    if isinstance(label.get("names"), str):
        yield "label.names", label["names"]
    for key, side in label.get("winner", {}).items():
        if isinstance(side, dict):
            yield f"label.winner.{key}", side["field"]
    yield from (("label.swapped", path) for path in label.get("swapped", {}))
    if isinstance(label.get("annotators"), dict):
        for column, conditions in label["annotators"].items():
            yield "label.annotators", column
            yield from ((f"label.annotators.{column}", path) for path in conditions)
    for name, join in spec.get("join", {}).items():
        yield from _paths_in(join["on"], f"join.{name}.on")
    for path in spec.get("where", {}):
        yield "where", path
    if isinstance(spec.get("labeller"), dict):
        for key in ("annotator", "field"):
            yield from _paths_in(spec["labeller"].get(key), f"labeller.{key}")


def _paths_in(value: Any, where: str) -> Iterator[tuple[str, str]]:
    """The paths in a text, a list of texts or an object that says how a text is made."""
    if isinstance(value, str):
        yield where, value
    elif isinstance(value, list):
        for i, one in enumerate(value):
            yield from _paths_in(one, f"{where}[{i}]")
    elif isinstance(value, dict):
        yield from _paths_of(value, where)


def _paths_of(value: dict[str, Any], where: str) -> Iterator[tuple[str, str]]:
    for path in holes(value["template"]) if "template" in value else []:
        yield f"{where}.template", path
    for i, turn in enumerate(value.get("turns", [])):
        for role, said in turn.items():
            yield from _paths_in(said, f"{where}.turns[{i}].{role}")
    if "rounds" in value:
        yield from _paths_in(value["rounds"], f"{where}.rounds")
    for key, inner in value.items():
        if key in _NAME_PATHS:
            yield from _paths_in(inner, f"{where}.{key}")


def _check_path(path: str, file: str, where: str) -> None:
    try:
        paths.parse(path)
    except ValueError as error:
        fail(file, where, f"the path {told(path)} {error}")


# --- responses, texts, labels --------------------------------------------------------------------


def _check_responses(spec: Spec, file: str) -> None:
    judged = [k for k in ("response", "first", "responses") if k in spec]
    if judged and "label" not in spec:
        unjudged = {"response": " (without, it is demonstration)", "first": " (without, it is chosen and rejected)"}
        fail(file, "label", f"missing; {judged[0]} needs one{unjudged.get(judged[0], '')}")
    if not judged and "label" in spec:
        fail(file, "label", "demonstration, and chosen with rejected, have none; use response, or first with second")
    if "prompt" not in spec and not all(map(_is_conversation, _sides(spec))):
        fail(
            file,
            "prompt",
            "missing: name its field, join the file that has it, give a constant as {text: …}, or, where responses "
            "are whole conversations, say how they are read: split, messages: {} or rounds",
        )


def _sides(spec: Spec) -> list[Any]:
    several = spec.get("responses", [])
    return [spec[k] for k in SIDES if k in spec] + (several if isinstance(several, list) else [several])


def _is_conversation(given: Any) -> bool:
    return isinstance(given, dict) and bool({"split", "messages", "rounds", "turns"} & given.keys())


def _check_text(given: Any, file: str, where: str) -> None:
    if not isinstance(given, dict):
        return
    for i, turn in enumerate(given.get("turns", [])):
        for who, said in turn.items():
            _check_text(said, file, f"{where}.turns[{i}].{who}")
    if "unwrap" in given and len(_compiled(given["unwrap"], file, f"{where}.unwrap").groupindex) != 1:
        fail(file, f"{where}.unwrap", "the pattern needs exactly one named group, such as (?P<text>.*)")
    for key, needs in (("before", "split"), ("optional", "fields"), ("separator", "fields")):
        if key in given and needs not in given:
            fail(file, f"{where}.{key}", f"only with {needs}")
    for key in ("unwrap", "between", "strip", "split", "messages", "missing"):
        if key in given and ("turns" in given or "rounds" in given):
            fail(file, f"{where}.{key}", "not with turns or rounds")
    if strange := [path for path in given.get("optional", []) if path not in given["fields"]]:
        fail(file, f"{where}.optional", f"{strange[0]!r} is none of fields{did_you_mean(strange[0], given['fields'])}")
    if "messages" in given and {"split", "unwrap", "between", "strip"} & given.keys():
        fail(file, f"{where}.messages", "not with split, unwrap, between or strip, which cut a text")
    if any(not marker.strip() for marker in given.get("split", {})):
        fail(file, f"{where}.split", "a marker is blank")


def _compiled(pattern: str, file: str, where: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        fail(file, where, f"{told(pattern)} is no regular expression ({error})")
        raise


def _check_label(label: Spec, spec: Spec, file: str) -> None:
    (kind,) = (k for k in KINDS if k in label)
    responses = 3 if "responses" in spec else 2 if "first" in spec else 1
    if responses not in KINDS[kind]:
        fitting = ", ".join(k for k, counts in KINDS.items() if responses in counts)
        what = {1: "one response is", 2: "two responses are", 3: "several responses are"}[responses]
        fail(file, f"label.{kind}", f"does not say how {what} judged; use {fitting}")
    _check_where_it_is(label, spec, file, kind)
    _check_order(label, spec, file, kind)
    _check_scale(label, file, kind)
    _check_values(label, file, kind)


def _check_order(label: Spec, spec: Spec, file: str, kind: str) -> None:
    """Only two responses have an order in which they were shown, and several have names."""
    orders = [label[k] for k in ("swapped", "annotators") if isinstance(label.get(k), dict)]
    if orders and "first" not in spec:
        fail(file, "label", "swapped, and orders of annotators, are for first and second only")
    if "swapped" in label and isinstance(label.get("annotators"), dict):
        fail(file, "label.swapped", "not with orders of annotators: say there when each saw the other order")
    several, names = spec.get("responses"), label.get("names")
    named = isinstance(several, list) and all(isinstance(one, str) for one in several)
    if names is not None and ("field" not in label or several is None):
        fail(file, "label.names", "only with field, where several responses are judged by their names")
    if isinstance(names, list) and isinstance(several, list) and len(names) != len(several):
        fail(file, "label.names", f"{len(names)} names for {len(several)} responses")
    if kind == "ranking" and "field" not in label:
        fail(file, "label", "ranking needs field: where the names are")
    if kind == "ranking" and names is None and isinstance(several, list) and not named:
        fail(file, "label.names", "missing: what the ranking calls each response")


def _check_where_it_is(label: Spec, spec: Spec, file: str, kind: str) -> None:
    places = [k for k in ("field", "fields", "annotators") if k in label]
    if kind == "one_hot":
        if places or "each" in label:
            fail(file, "label.one_hot", f"names the columns itself; leave out {(*places, 'each')[0]}")
        return
    if len(places) != 1:
        given = " and ".join(places) or "none"
        fail(file, "label", f"say where it is, by exactly one of field, fields, annotators; got {given}")
    if "each" in label and "field" not in label:
        fail(file, "label.each", "needs field: where the label of an `annotation` is, such as annotation.value")
    if "by" in label and "each" not in label:
        fail(file, "label.by", "only with each; for a column of annotators write labeller: {annotator: column}")
    if "fields" in label:
        several = spec.get("responses")
        wanted = 2 if kind == "compare" else len(several) if isinstance(several, list) else 0
        if len(label["fields"]) != wanted:
            why = f"{wanted} are needed, one for each response" if wanted else "one response has one label: use field"
            fail(file, "label.fields", f"{len(label['fields'])} fields given, and {why}")
    if "responses" in spec and ("annotators" in label or "each" in label):
        fail(file, "label", "annotators and each judge one or two responses; explode the list with a top-level each")
    if kind == "compare" and "annotators" in label:
        fail(file, "label.annotators", "compare needs two numbers: use field (a list) or fields")


def _check_scale(label: Spec, file: str, kind: str) -> None:
    if kind == "score" and not label["score"][0] < label["score"][1]:
        fail(file, "label.score", f"{label['score']}: low must be below high; say `better: lower` if less is better")
    if kind == "preference" and label["preference"]["first"] == label["preference"]["second"]:
        fail(file, "label.preference", "first and second are the same number")
    if "better" in label and kind not in ("score", "stars", "scale"):
        fail(file, "label.better", f"only with score, stars or scale, not with {kind}")
    if "strength" in label and kind != "preference":
        fail(file, "label.strength", f"only with preference, not with {kind}")


def _check_values(label: Spec, file: str, kind: str) -> None:
    """Every label value means one thing."""
    groups = label[kind] if kind in ("thumbs", "winner") else {}
    groups = {f"label.{kind}.{name}": values for name, values in groups.items()}
    if kind == "order":
        groups = {f"label.order[{i}]": word for i, word in enumerate(label["order"])}
    if "missing" in label:
        groups["label.missing"] = label["missing"]
    said: dict[str, str] = {}
    for where, values in groups.items():
        if isinstance(values, dict):  # a field of the record
            continue
        for value in values if isinstance(values, list) else [values]:
            for text in _safe_spellings(value, file, where):
                if said.setdefault(text, where) != where:
                    fail(file, where, f"{told(value)} is also in {said[text]}")


def _safe_spellings(value: Any, file: str, where: str) -> list[str]:
    try:
        return spellings(value)
    except Reject as error:
        fail(file, where, error.detail)
        raise


# --- names and conditions ------------------------------------------------------------------------


def _check_names(spec: Spec, file: str) -> None:
    names = ["annotation", *([item_name(spec)] if "each" in spec else [])]
    names += ["key"] if "each" in spec or "each" in spec.get("label", {}) else []
    if (before := before_name(spec)) in names:
        fail(file, "each.before", f"the name {before!r} is taken; give another")
    names += [before] if before else []
    _check_each(spec.get("each"), file)
    for join, given in spec.get("join", {}).items():
        name = given.get("as", join)
        if "each" in spec and each_path(spec) != WHOLE and paths.parse(each_path(spec))[0] == name:
            fail(file, "each", f"a list of the record itself is exploded, before {join} is joined")
        if name in names:
            fail(file, f"join.{join}", f"the name {name!r} is taken; give another with `as`")
        names.append(name)
        on, key = (len(listed(given.get(k, given["on"]))) for k in ("on", "key"))
        if on != key:
            fail(file, f"join.{join}.key", f"{key} fields, but `on` has {on}")
        for path in (*listed(given.get("key", given["on"])), *listed(given.get("json", []))):
            _check_path(path, file, f"join.{join}")


def _check_each(each: Any, file: str) -> None:
    """Names that paths find as they stand: `t.u` in a path is a key in `t`."""
    for key in ("as", "before") if isinstance(each, dict) else ():
        if (name := each.get(key, "")) != paths.quoted(name):
            fail(file, f"each.{key}", f"paths do not find {told(name)}; leave out dots, brackets and quotes")


def each_path(spec: Spec) -> str:
    """The path of the list that is exploded."""
    return spec["each"]["field"] if isinstance(spec["each"], dict) else spec["each"]


def item_name(spec: Spec) -> str:
    """The name under which paths find an element of `each`."""
    return spec["each"].get("as", "item") if isinstance(spec["each"], dict) else "item"


def before_name(spec: Spec) -> str | None:
    """The name under which paths find the list of the elements before it, if the mapping gives one."""
    return spec["each"].get("before") if isinstance(spec.get("each"), dict) else None


def listed(value: str | list[str]) -> list[str]:
    """One path or several, as a list."""
    return [value] if isinstance(value, str) else value


def _check_conditions(conditions: Spec, file: str, where: str = "where") -> None:
    for path, condition in conditions.items():
        if isinstance(condition, dict) and "matches" in condition:
            _compiled(condition["matches"], file, f"{where}.{path}.matches")
