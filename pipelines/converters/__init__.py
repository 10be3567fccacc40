"""Converters: one pure function per format, record in, feedback rows out; one dict that names them all.

A converter imports neither Beam nor a model. To add one: write `matches` and `convert`, add a
`Converter` line to its module's `CONVERTERS`, and a golden test with a hand-written fixture.
"""

import re
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache

from pipelines.converters import (
    chat_apis,
    columns,
    datasets,
    judges,
    llama_factory,
    model_feedback,
    oasst,
    open_webui,
    preferences,
    public,
    tools,
    traces,
    trainers,
    trl,
)
from pipelines.converters.base import Converter, LeftOut, Policy, Record
from pipelines.converters.messages import NUMBER, SYSTEM, judgements, without

__all__ = ["CONVERTERS", "Converter", "LeftOut", "Policy", "detect", "doubt", "first_match", "judging", "nearest"]

# The most specific shapes first: the first converter that matches a record names its format.
_FAMILIES = (
    *(tools, traces, oasst, open_webui, judges, preferences, datasets, model_feedback, public),
    *(trainers, chat_apis, columns, llama_factory, trl),
)
_TOOLS = frozenset((*tools.CONVERTERS, *traces.CONVERTERS))
CONVERTERS: dict[str, Converter] = {c.name: c for family in _FAMILIES for c in family.CONVERTERS}


# Columns that hold a part of the prompt, by their names: a format that does not read them would leave it out.
_PROMPT_PARTS = frozenset(
    ("context", "contexts", "passage", "passages", "document", "documents", "article", "post", "background")
) | {"history", "chat_history", "conversation_history", "dialogue_history", *SYSTEM}


def first_match(record: Record) -> str:
    """The name of the first converter that a record fits; '' if none does, or it would lose a part of the prompt."""
    keys = tuple(record)
    for converter, unread in _possible(keys) if len(keys) < 100 else _fitting(keys):
        if converter.matches(record):
            return "" if unread and _told(record, unread) else converter.name
    return ""


@lru_cache(maxsize=4096)  # the same few sets of fields in every record of a file
def _possible(keys: tuple[str, ...]) -> tuple[tuple[Converter, tuple[str, ...]], ...]:
    return _fitting(keys)


def _fitting(keys: tuple[str, ...]) -> tuple[tuple[Converter, tuple[str, ...]], ...]:
    """The converters whose required fields are among `keys`, each with the parts of a prompt it would not read."""
    return tuple((c, _unread(c, keys)) for c in CONVERTERS.values() if not lacking(c, keys))


def _unread(converter: Converter, keys: Iterable[str]) -> tuple[str, ...]:
    """Parts of the prompt that a format does not name; tools' formats look for the prompt among all fields."""
    if converter in _TOOLS:
        return ()
    read = _read(converter)
    return tuple(key for key in keys if key in _PROMPT_PARTS and key not in read)


def _read(converter: Converter) -> set[str]:
    return set(re.findall(r"\w+", " ".join(converter.fields)))


def _told(record: Record, names: Iterable[str]) -> list[str]:
    """Those of the fields that say something."""
    return [name for name in names if (record[name].strip() if isinstance(record[name], str) else record[name])]


def lacking(converter: Converter, keys: Iterable[str]) -> list[str]:
    """The required fields that are not among `keys`."""
    has = set(keys)
    needed = [(one,) if isinstance(one, str) else one for one in converter.required]
    return [" or ".join(names) for names in needed if has.isdisjoint(names)]


def detect(records: Iterable[Record]) -> Counter[str]:
    """Name → number of records whose first matching converter it is; what matches none is counted under ''."""
    return Counter(first_match(record) for record in records)


def doubt(name: str, records: Iterable[Record]) -> str:
    """Why the labels of records that look like a format may be coded in another way than the format's; '' if not."""
    field, tells = CONVERTERS[name].telling or ("", bool)
    found = {float(text) for record in records if NUMBER.fullmatch(text := str(record.get(field)).strip())}
    if len(found) < 2 or any(map(tells, found)):
        return ""
    values = ", ".join(f"{value:g}" for value in sorted(found)[:9])
    return f"{field} holds only {values}, which {name} would read as {CONVERTERS[name].labels!r}"


def judging(record: Record) -> tuple[str, list[str]]:
    """The format that a record of none would be of without fields that judge, and their paths; '', [] if there is none.

    A format's own fields are left in, since it reads them.
    """
    found = [] if first_match(record) else list(dict.fromkeys(judgements(record)))
    for converter in CONVERTERS.values() if found else ():
        read = _read(converter)
        paths = [path for path in found if path.rpartition(".")[2] not in read]
        rest = without(record, paths)
        fits = paths and not lacking(converter, rest) and converter.matches(rest)
        if fits and not _told(rest, _unread(converter, rest)):
            return converter.name, paths
    return "", []


def nearest(record: Record, n: int = 3) -> list[str]:
    """The formats whose required fields a record comes closest to having, with what it lacks or they do not read."""
    missing = {c: lacking(c, record) for c in CONVERTERS.values() if c.required}
    unread = {c: _told(record, _unread(c, record)) for c, lacks in missing.items() if not lacks and c.matches(record)}
    ranked = sorted(missing, key=lambda c: (c not in unread, len(missing[c]) / len(c.required), len(missing[c])))
    return [f"{c.name} ({_apart(missing[c], unread.get(c, []))})" for c in ranked[:n]]


def _apart(missing: list[str], unread: list[str]) -> str:
    return f"does not read {', '.join(unread)}" if unread else f"lacks {', '.join(missing) or 'the right types'}"
