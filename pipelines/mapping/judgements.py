"""From a mapping's label to rows: which value judges what, what it means, and who said so.

A value matches one of the mapping's as text, whatever its case, the spaces around it and the form its characters are
written in (Unicode's NFKC: "Ａ" is "A"); numbers match as numbers (1, "1" and "1.0"), true and false as words. A value
the mapping does not know is an `invalid_label`, never a guess.
"""

import dataclasses
import math
import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from pipelines.converters.base import LeftOut, Policy, tell_lower_is_better
from pipelines.converters.labels import annotator, compared, is_missing, preferred, ranked, rated, some
from pipelines.converters.messages import finite, number, show
from pipelines.mapping import paths
from pipelines.mapping.joins import key_text
from schemas.errors import Reject
from schemas.feedback import Message, Row, score, thumb

Label = dict[str, Any]
Scope = dict[str, Any]
Side = tuple[list[Message], str]  # a prompt and the response to it

_SCALES = {"unit": (0.0, 1.0), "percent": (0.0, 100.0)}
# "4/5", "4 out of 5" and "80%", with a point or a comma
_SHARE = re.compile(r"(?P<n>[0-9]+([.,][0-9]+)?)\s*(%|(?:/|out of)\s*(?P<of>[0-9]+([.,][0-9]+)?))", re.IGNORECASE)
_WITH_COMMA = re.compile(r"[+-]?[0-9]+,[0-9]+")
_PERHAPS_THOUSANDS = re.compile(r"[+-]?[1-9][0-9]{0,2},[0-9]{3}")
_NARROW = {wide: wide - 0xFEE0 for wide in range(0xFF01, 0xFF5F)}  # full-width digits and signs
_MODIFIERS = dict.fromkeys([0xFE0E, 0xFE0F, *range(0x1F3FB, 0x1F400)])  # how an emoji looks, not what it means


# --- values ------------------------------------------------------------------------------------


def canonical(value: Any) -> str:
    """The text by which label values are compared; raises `Reject` for lists and objects."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return _of_number(value)
    if not isinstance(value, str):
        raise Reject("wrong_type", f"expected a label, got {show(value)}")
    return _of_text(value) if len(value) < 64 else unicodedata.normalize("NFKC", value).strip().casefold()


@lru_cache(maxsize=4096)  # the same few words in every record of a file
def _of_text(value: str) -> str:
    said = unicodedata.normalize("NFKC", value.translate(_MODIFIERS)).strip().casefold()
    if said[:1] and said[0] in "+-.0123456789":
        try:
            return _of_number(finite(said, ""))
        except Reject:
            pass  # a date, say
    return said


def _of_number(value: float) -> str:
    if isinstance(value, int) and value.bit_length() > 128:
        raise Reject("invalid_label", f"{show(value)} is no label")
    return str(int(value)) if math.isfinite(value) and value == int(value) else repr(value)


def spellings(value: Any) -> list[str]:
    """The texts that a value in the YAML stands for: an unquoted yes or on is true there, and no or off is false."""
    if isinstance(value, bool):
        return ["true", "yes", "on"] if value else ["false", "no", "off"]
    return [canonical(value)]


def known(values: Any) -> set[str]:
    """The texts that one value or a list of them stands for."""
    listed = values if isinstance(values, list) else [values]
    return {text for value in listed for text in spellings(value)}


def value_of(value: Any, label: Label, where: str) -> Any:
    """The label's value, with `map` applied; None if it is missing."""
    if is_missing(value):
        return None
    if isinstance(value, list | dict):
        raise Reject("wrong_type", f"{where}: expected a label, got {show(value)}")
    if "missing" in label and canonical(value) in known(label["missing"]):
        return None
    if "map" not in label:
        return value
    if (said := canonical(value)) not in label["map"]:
        raise Reject("invalid_label", f"{where}: {show(value)} is none of {_listed(label['map'])}")
    return label["map"][said]


def _listed(values: Any) -> str:
    return ", ".join(map(str, list(values)[:12]))


def _among(value: Any, groups: dict[str, Any], where: str) -> str:
    """The name of the group that has the value."""
    said = canonical(value)
    found = [name for name, values in groups.items() if said in known(values)]
    if len(found) == 1:
        return found[0]
    if found:
        raise Reject(
            "invalid_label", f"{where}: {show(value)} means {' and '.join(found)}, which the record calls alike"
        )
    every = [v for values in groups.values() for v in (values if isinstance(values, list) else [values])]
    raise Reject("invalid_label", f"{where}: {show(value)} is none of {_listed(every)}")


def _named_in(scope: Scope, groups: dict[str, Any]) -> dict[str, Any]:
    """The groups with the record's own words where they name a field: a verdict may say which model won."""
    return {k: paths.needed(scope, v["field"]) if isinstance(v, dict) else v for k, v in groups.items()}


def numeral(value: Any, where: str, most: float | None = None) -> Any:
    """A text with its number as `number` reads it, from one in full-width digits or with a decimal comma.

    A comma before three digits may part thousands too: it is decimal only on a scale that ends, at `most`, below 1000.
    """
    if not isinstance(value, str):
        return value
    said = value.translate(_NARROW).strip()
    if _PERHAPS_THOUSANDS.fullmatch(said) and (most is None or most >= 1000):
        told = f"{said.replace(',', '')} or {said.replace(',', '.')}"
        raise Reject("invalid_reward", f"{where}: {show(value)} may be {told}; write it as one of them, or use map")
    return said.replace(",", ".") if _WITH_COMMA.fullmatch(said) else said


def read_number(value: Any, where: str, most: float | None = None) -> float:
    """The number of a label, counted where it is text."""
    return number(numeral(value, where, most), where)


def _share(value: Any, where: str, least: float, most: float | None) -> Any:
    """A number that a text gives as a share, on the scale from `least` to `most`; any other value as it is.

    "80%" and "4/5" are 0.8 of a scale from 0 to 1 or 0 to 100, and 4/5 is 4 on one that ends at 5; without `most` they
    are shares of 1. Of a scale that begins below 0 there are none: 80% of [-1, 1] may be .8 or .6.
    """
    found = _SHARE.fullmatch(value.translate(_NARROW).strip()) if isinstance(value, str) else None
    if not found:
        return value
    if least < 0:
        raise Reject("invalid_label", f"{where}: {show(value)} is a share, and the scale begins at {least:g}; use map")
    of = float(numeral(found["of"] or "100", where))
    n = float(numeral(found["n"], where, of))
    if of == most:
        return n
    if most not in (None, 1, 100) or not of:
        raise Reject("invalid_label", f"{where}: {show(value)} is of {of:g}, and the scale ends at {most or 0:g}")
    return n / of * (most or 1)


# --- who said it, and where ----------------------------------------------------------------------


class Judgement(NamedTuple):
    """Where a label is, its value as given, its labeller if it has one of its own, and what else is said with it."""

    where: str
    value: Any
    labeller: str | None
    scope: Scope
    swapped: dict[str, Any] | None  # conditions under which the two responses were shown in the other order


def judgements(scope: Scope, label: Label) -> list[Judgement]:
    """The judgements of a record."""
    swapped = label.get("swapped")
    if "annotators" in label:
        given = label["annotators"]
        orders = given if isinstance(given, dict) else dict.fromkeys(given, swapped)
        return [Judgement(p, paths.find(scope, p), annotator(p), scope, orders[p]) for p in orders]
    if "each" in label:
        return _annotations(scope, label)
    if "fields" in label:
        values = [paths.find(scope, path) for path in label["fields"]]
        return [Judgement(", ".join(label["fields"]), values, None, scope, swapped)]
    if "field" in label:
        return [Judgement(label["field"], paths.find(scope, label["field"]), None, scope, swapped)]
    return [Judgement(", ".join(label["one_hot"].values()), None, None, scope, swapped)]


def _annotations(scope: Scope, label: Label) -> list[Judgement]:
    found = paths.find(scope, label["each"])
    made = []
    for where, key, one in paths.elements([] if found is None else found, label["each"], "annotations"):
        inner = {**scope, **paths.under(key), "annotation": one}
        by = paths.find(inner, label["by"]) if "by" in label else None
        who = None if is_missing(by) else annotator(key_text(by, label["by"]))
        made.append(Judgement(where, paths.find(inner, label["field"]), who, inner, label.get("swapped")))
    return made


# --- one response ------------------------------------------------------------------------------


def judge_one(side: Side, value: Any, where: str, label: Label, policy: Policy, **facts: Any) -> list[Row]:
    """The row of one response with its label."""
    given, value = value, value_of(value, label, where)
    if value is None:
        return rated(*side, given, where, 0, 1, policy, sentinels=[given], **facts)
    if "map" in label:
        facts = _noted(facts, given)
    if "thumbs" in label:
        return thumb(*side, _among(value, label["thumbs"], where) == "good", **facts)
    if "order" in label:
        return _ordered(side, value, where, label["order"], facts)
    if label.get("scale") == "sigmoid":
        raw = read_number(value, where)
        if label.get("better") == "lower":
            tell_lower_is_better(facts["source"])
            return score(*side, _sigmoid(-raw), raw_reward=raw, **facts)
        return score(*side, _sigmoid(raw), raw_reward=raw, **facts)
    low, high = _range(label)
    if (share := _share(value, where, low, high)) is not value:
        value, facts = share, _noted(facts, given)
    value = numeral(value, where, max(abs(low), abs(high)))
    return rated(*side, value, where, low, high, policy, lower_is_better=label.get("better") == "lower", **facts)


def _range(label: Label) -> tuple[float, float]:
    if "score" in label:
        return label["score"][0], label["score"][1]
    return (1, label["stars"]) if "stars" in label else _SCALES[label["scale"]]


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def _ordered(side: Side, value: Any, where: str, words: list[Any], facts: dict[str, Any]) -> list[Row]:
    """Words have no number: the reward is the word's place, and the word stays in the metadata."""
    places = {text: i for i, word in enumerate(words) for text in spellings(word)}
    said = canonical(value)
    if said not in places:
        raise Reject("invalid_label", f"{where}: {show(value)} is none of {_listed(words)}")
    return score(*side, places[said] / (len(words) - 1), **_noted(facts, value))


def _noted(facts: dict[str, Any], value: Any) -> dict[str, Any]:
    """The facts with the label as it was given in the metadata."""
    if not isinstance(value, str | int | float):
        return facts
    return facts | {"metadata": {"label": value} | facts.get("metadata", {})}


# --- two responses -----------------------------------------------------------------------------


def judge_two(
    prompt: list[Message],
    sides: tuple[str, str],
    value: Any,
    where: str,
    label: Label,
    policy: Policy,
    scope: Scope,
    **facts: Any,
) -> list[Row]:
    """The rows of a comparison with its label."""
    if "strength" in label:
        policy = dataclasses.replace(policy, strength=label["strength"])
    if "compare" in label:
        first, second = _two_numbers(value, label, where)
        if first is None or second is None:
            return compared(prompt, *sides, None, policy, **facts)
        better = first - second if label["compare"] == "higher" else second - first
        p = 0.5 if first == second else float(better > 0)
        return compared(prompt, *sides, p, policy, raw=(first, second), **facts)
    given = _hot(scope, label) if "one_hot" in label else value_of(value, label, where)
    if given is None and policy.missing == "drop":
        raise Reject("missing_label", f"{where} is {show(value)}" if value is not None else f"{where} says nothing")
    p_first = None if given is None else _p_first(given, where, label, policy, scope)
    return compared(prompt, *sides, p_first, policy, **(facts if "one_hot" in label else _noted(facts, value)))


def _p_first(value: Any, where: str, label: Label, policy: Policy, scope: Scope) -> float:
    if "preference" in label:
        ends = label["preference"]
        place = _place(value, where, ends["first"], ends["second"])
        return preferred(place, ends["first"], ends["second"], policy)
    if "sign" in label:
        size = read_number(value, where)
        return 0.5 if not size else float((size > 0) == (label["sign"] == "positive"))
    name = value if "one_hot" in label else _among(value, _named_in(scope, label["winner"]), where)
    return {"first": 1.0, "second": 0.0, "tie": 0.5}[name]


def _place(value: Any, where: str, first: float, second: float) -> float:
    """A number between two ends. "1,2" is none between 1 and 2: where several can be ticked, it means both."""
    both = (f"{first:g},{second:g}", f"{second:g},{first:g}")
    if isinstance(value, str) and value.translate(_NARROW).strip() in both and 0 not in (first, second):
        raise Reject("invalid_label", f"{where}: {show(value)} may be one number or both ends; use map")
    share = _share(value, where, min(first, second), max(first, second))
    return read_number(share, where, max(abs(first), abs(second)))


def _hot(scope: Scope, label: Label) -> str | None:
    """Which of the columns is 1; None where none is."""
    marked = []
    for name, path in label["one_hot"].items():
        value = value_of(paths.find(scope, path), label, path)
        if value is not None and _among(value, {"yes": [True, 1], "no": [False, 0]}, path) == "yes":
            marked.append(name)
    if len(marked) > 1:
        raise Reject("invalid_label", f"{' and '.join(label['one_hot'][name] for name in marked)} are both 1")
    return marked[0] if marked else None


def _two_numbers(value: Any, label: Label, where: str) -> tuple[float | None, float | None]:
    if value is None:
        return None, None
    if not isinstance(value, list) or len(value) != 2:
        raise Reject("wrong_type", f"{where}: expected two labels, got {show(value)}")
    first, second = (value_of(v, label, f"{where}[{i}]") for i, v in enumerate(value))
    shares = [_share(v, where, 0, None) for v in (first, second)]
    if shares[0] is not first and shares[1] is not second:  # both are shares
        first, second = shares
    return (
        None if first is None else read_number(first, f"{where}[0]"),
        None if second is None else read_number(second, f"{where}[1]"),
    )


# --- several responses -------------------------------------------------------------------------


def judge_many(
    sides: list[tuple[str, Side | Reject]],
    value: Any,
    where: str,
    label: Label,
    policy: Policy,
    names: Sequence[Any] = (),
    **facts: Any,
) -> list[Row | LeftOut]:
    """The rows of several responses, with their labels in a list in the same order, or by their `names`."""
    if len(names) == len(sides):
        sides = [_called(*side, name) for side, name in zip(sides, names, strict=True)]
    made: list[Row | LeftOut] = [LeftOut(at, s.reason, s.detail) for at, s in sides if isinstance(s, Reject)]
    if "ranking" in label:
        values = _places_of(value, names, where, label)
        if label["ranking"] == "best_only" and policy.rank_as != "scores":  # of the others, none is said to be better
            policy = dataclasses.replace(policy, rank_as="best_vs_rest")
    elif names:
        values, nobody = _labels_of(value, names, where)
        made += nobody
    else:
        values = value if isinstance(value, list) else [None] * len(sides) if value is None else value
    if not isinstance(values, list):
        raise Reject("wrong_type", f"{where}: expected a list of labels, got {show(value)}")
    if len(values) != len(sides):
        raise Reject("wrong_shape", f"{where}: {len(values)} labels for {len(sides)} responses")
    usable = [(at, s, v) for (at, s), v in zip(sides, values, strict=True) if not isinstance(s, Reject)]
    if "rank" in label or "ranking" in label:
        return some(made + (_ranked(usable, where, label, policy, facts) if usable else []))
    for at, side, one in usable:
        try:
            made += judge_one(side, one, f"the label of {at} ({where})", label, policy, **facts)
        except Reject as error:
            made.append(LeftOut(at, error.reason, error.detail))
    return some(made)


def _called(at: str, side: Side | Reject, name: Any) -> tuple[str, Side | Reject]:
    """A response by its name; one whose name is null or blank cannot be used."""
    if is_missing(name) and not isinstance(side, Reject):
        return at, Reject("missing_field", f"the name of {at} is {show(name)}")
    return at, side


def _distinct(names: Sequence[Any], where: str) -> list[str | None]:
    """The names of the responses as they are compared, None for one that has none."""
    said = [None if is_missing(name) else canonical(name) for name in names]
    if twice := next((name for name in said if name is not None and said.count(name) > 1), None):
        raise Reject("wrong_shape", f"two responses are called {show(twice)}, so that {where} can judge neither")
    return said


def _labels_of(value: Any, names: Sequence[Any], where: str) -> tuple[list[Any], list[LeftOut]]:
    """The label of each of `names` in an object of them, and those in it that no response has."""
    if value is None:
        return [None] * len(names), []
    if not isinstance(value, dict):
        raise Reject("wrong_type", f"{where}: expected the labels by the responses' names, got {show(value)}")
    known_names = _distinct(names, where)
    found: dict[str | None, Any] = {}
    strange: list[LeftOut] = []
    for key, one in value.items():
        if (name := canonical(key)) in found:
            raise Reject("wrong_shape", f"{where}: {show(key)} is there twice")
        found[name] = one
        if name not in known_names and not is_missing(one):
            at = f"{where}.{paths.quoted(key)}"
            strange.append(LeftOut(at, "missing_field", f"no response is called {show(key)}"))
    return [found.get(name) for name in known_names], strange


def _places_of(value: Any, names: Sequence[Any], where: str, label: Label) -> list[int | None]:
    """The place of each of `names`, 1 for the best, in a ranking that lists them; None for one it leaves out.

    Where only the best is named, the others share the place behind it.
    """
    known_names = _distinct(names, where)
    groups = _groups(value, label)
    if label["ranking"] == "worst_first":
        groups.reverse()
    places: dict[str | None, int] = {}
    for group in groups:
        place = len(places) + 1  # behind equal ones as many places are free
        for name in map(canonical, group):
            if name not in known_names or name in places:
                why = (
                    "is there twice"
                    if name in places
                    else f"is none of {_listed(n for n in names if not is_missing(n))}"
                )
                raise Reject("invalid_label", f"{where}: {show(name)} {why}")
            places[name] = place
    behind = len(places) + 1 if label["ranking"] == "best_only" and places else None
    return [places.get(name, behind) for name in known_names]


def _groups(value: Any, label: Label) -> list[list[Any]]:
    """The names of a ranking, those of one place together: from a list of names and lists, or a text as A > B = C."""
    scalar = not isinstance(value, list | dict)
    if scalar and (is_missing(value) or ("missing" in label and canonical(value) in known(label["missing"]))):
        return []
    if label["ranking"] == "best_only":
        return [value if isinstance(value, list) else [value]]
    if isinstance(value, str):
        return [re.split(r"[=~≈]", part) for part in re.split(">" if ">" in value else r"[,;\n]", value)]
    return [one if isinstance(one, list) else [one] for one in (value if isinstance(value, list) else [value])]


def _ranked(
    usable: list[tuple[str, Side, Any]], where: str, label: Label, policy: Policy, facts: dict[str, Any]
) -> list[Row | LeftOut]:
    made: list[Row | LeftOut] = []
    entries: list[tuple[str, Any]] = []
    prompt = usable[0][1][0]
    for at, (asked, response), value in usable:
        try:
            if asked != prompt:
                raise Reject("histories_differ", f"{at} answers another prompt than the one before it")
            entries.append((response, _rank(value, where, label)))
        except Reject as error:
            made.append(LeftOut(at, error.reason, error.detail))
    if label.get("ranking") == "best_only":
        entries = _with_best(entries, where, policy)
    try:
        return made + ranked(prompt, entries, policy, lower_is_better=True, where=where, **facts)
    except Reject as error:
        return [*made, LeftOut("responses", error.reason, error.detail)]


def _with_best(entries: list[tuple[str, Any]], where: str, policy: Policy) -> list[tuple[str, Any]]:
    """The responses and their places, or none where the best is not among them: of the others none is known as better.

    `Reject` for those that the policy does not keep, and for ties that it drops.
    """
    places = {place for _, place in entries}
    if places == {1} and len(entries) > 1 and policy.ties == "drop":
        raise Reject("tie", f"{where} names all responses as the best")
    if not places or places & {1, None}:
        return entries
    if policy.missing == "drop":
        raise Reject("missing_label", f"{where}: the best response cannot be used, and none of the others is better")
    return [(response, None) for response, _ in entries]


def _rank(value: Any, where: str, label: Label) -> float | None:
    if "ranking" in label:
        return value  # a place already
    value = value_of(value, label, where)
    if value is None:
        return None
    place = read_number(value, where)
    if place < label["rank"] or not place.is_integer():
        raise Reject("invalid_label", f"{where}: {show(value)} is no rank; the best is {label['rank']}")
    return place
