"""From a mapping's prompts and responses to turns: fields, templates, transcripts, message lists, judge templates.

A text is kept byte for byte unless `strip` says otherwise; no number is taken for a text, except in templates.
"""

import re
from functools import lru_cache
from typing import Any

from pipelines.converters.messages import answered, messages, number, show, text
from pipelines.mapping import paths
from schemas.errors import Reject
from schemas.feedback import Message

Scope = dict[str, Any]
Given = str | list[str] | dict[str, Any]  # a path, several, or the object that says how the text is made

_HOLE = re.compile(r"\{\{|\}\}|\{([^{}]+)\}")


def prompt(scope: Scope, given: Given) -> list[Message]:
    """The turns of a prompt; a text is the user's turn. A blank last one of the assistant, as in transcripts, goes."""
    turns = _turns(scope, given, "user", "prompt")
    if turns and turns[-1]["role"] == "assistant" and not turns[-1]["content"].strip():
        turns.pop()
    return turns


def side(scope: Scope, given: Given, where: str) -> list[Message]:
    """The turns of a response, of which the last is the response itself; a text is the assistant's turn."""
    return _turns(scope, given, "assistant", where)


def several(scope: Scope, given: str | list[Given]) -> list[tuple[str, Any]]:
    """Where each of several responses comes from, and the value there (the turns where it is made, or None)."""
    if isinstance(given, list):
        return [(f"responses[{i}]", one) for i, one in enumerate(given)]
    found = paths.elements(paths.needed(scope, given), given, "responses")
    if not found:
        raise Reject("missing_field", f"{given} is empty")
    return [(where, value) for where, _, value in found]


def names_of(scope: Scope, given: str | list[Given], names: Any) -> list[Any]:
    """What a ranking calls each of several responses: as `names` says, the keys of an object, or the names of fields.

    `names` are constants, the path of a list, or 0 or 1 for places counted from there.
    """
    found = given if isinstance(given, list) else paths.needed(scope, given)
    if isinstance(names, list):
        return names
    if isinstance(names, int):
        return list(range(names, names + len(found)))
    if isinstance(names, str):
        told = paths.needed(scope, names)
        if not isinstance(told, list) or any(isinstance(name, list | dict) for name in told):
            raise Reject("wrong_type", f"{names}: expected a list of names, got {show(told)}")
        return told
    if isinstance(found, list) and found is not given:
        raise Reject("wrong_type", f"{given} is a list: say in label.names what its elements are called")
    return list(found)


def as_side(value: Any, where: str) -> list[Message]:
    """The turns of a response that was found in a list: a text, one message or several."""
    if value is None:
        raise Reject("missing_field", f"{where} is null")
    return _as_turns(value, where, "assistant")


def with_system(scope: Scope, given: Given | None, turns: list[Message]) -> list[Message]:
    """The turns with a system turn before them, if the record has one; one of their own wins."""
    if given is None or (turns and turns[0]["role"] == "system"):
        return turns
    path = given.get("field") if isinstance(given, dict) else given
    if isinstance(path, str) and paths.find(scope, path) is None:
        return turns
    said = text(_made(scope, given, "system"), "system")
    return [Message(role="system", content=said), *turns] if said.strip() else turns


# --- what a text is made of ------------------------------------------------------------------------


def _turns(scope: Scope, given: Given, role: str | None, where: str) -> list[Message]:
    """The turns; a text is one of `role`, or none at all."""
    if isinstance(given, dict) and "turns" in given:
        spoken = [next(iter(turn.items())) for turn in given["turns"]]
        return [turn for who, said in spoken for turn in _spoken(scope, who, said, where)]
    if isinstance(given, dict) and "rounds" in given:
        return _rounds(scope, given["rounds"])
    named = f"{where} ({given})" if isinstance(given, str) and given != where else where
    value = _made(scope, given, named)
    if isinstance(given, dict) and "split" in given:
        return _split(text(value, named), given["split"], given.get("before"), named)
    if isinstance(given, dict) and "messages" in given:
        return _as_turns(_renamed(value, given["messages"]), named, role)
    return _as_turns(value, named, role)


def _spoken(scope: Scope, who: str, said: Given, where: str) -> list[Message]:
    if who == "conversation":
        return _turns(scope, said, None, where)
    return [Message(role=who, content=text(_made(scope, said, where), where))]


def _as_turns(value: Any, where: str, role: str | None) -> list[Message]:
    if isinstance(value, str) and role:
        return [Message(role=role, content=value)]
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise Reject("wrong_type", f"{where}: expected {'text or ' if role else ''}messages, got {show(value)}")
    return answered(value, where) if role == "assistant" else messages(value, where)


def _made(scope: Scope, given: Given, where: str) -> Any:
    """The value of a prompt or response before it is cut into turns."""
    if isinstance(given, str):
        return _no_number(paths.needed(scope, given), given, where)
    if isinstance(given, list):
        return _joined(scope, given, [], "\n\n")
    if "text" in given:
        value: Any = given["text"]
    elif "template" in given:
        value = _filled(scope, given["template"])
    elif "fields" in given:
        value = _joined(scope, given["fields"], given.get("optional", []), given.get("separator", "\n\n"))
    elif "field" in given:
        value = _no_number(paths.needed(scope, given["field"]), given["field"], where)
    else:
        raise Reject("wrong_type", f"{where}: expected one text, got turns")
    return _trimmed(value, given, where)


def _no_number(value: Any, path: str, where: str) -> Any:
    """The value, which must be no number: those become text where a template asks for it."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        told = f'{where}: expected text, got {show(value)}; to take numbers as text write {{template: "{{{path}}}"}}'
        raise Reject("wrong_type", told)
    return value


def _trimmed(value: Any, given: dict[str, Any], where: str) -> Any:
    """The text that a judge's template is wrapped round; `Reject` for one that stands for none."""
    if isinstance(value, str) and value.strip() in given.get("missing", []):
        raise Reject("missing_field", f"{where} is {show(value)}")
    if "unwrap" in given:
        value = _unwrapped(text(value, where), given["unwrap"], where)
    if "between" in given:
        value = _between(text(value, where), given["between"], where)
    return text(value, where).strip() if given.get("strip") else value


def _unwrapped(wrapped: str, pattern: str, where: str) -> str:
    found = re.search(pattern, wrapped)
    (group,) = re.compile(pattern).groupindex
    if not found or found[group] is None:
        raise Reject("wrong_shape", f"{where}: {show(wrapped)} does not match {pattern!r}")
    return found[group]


def _between(wrapped: str, markers: list[str], where: str) -> str:
    start, end = markers
    _, opened, after = wrapped.partition(start)
    inside, closed, _ = after.partition(end)
    if not opened or not closed:
        raise Reject("wrong_shape", f"{where}: no {end if opened else start!r} in {show(wrapped)}")
    return inside


def _joined(scope: Scope, fields: list[str], optional: list[str], separator: str) -> str:
    parts = [_optional(scope, path) if path in optional else _inserted(scope, path) for path in fields]
    return separator.join(part for part, path in zip(parts, fields, strict=True) if part or path not in optional)


def _optional(scope: Scope, path: str) -> str:
    said = "" if paths.find(scope, path) is None else _inserted(scope, path)
    return said if said.strip() else ""


def _filled(scope: Scope, template: str) -> str:
    return _HOLE.sub(lambda hole: _inserted(scope, hole[1]) if hole[1] else hole[0][0], template)


def holes(template: str) -> list[str]:
    """The paths that a template names."""
    return [hole[1] for hole in _HOLE.finditer(template) if hole[1]]


def _inserted(scope: Scope, path: str) -> str:
    value = paths.needed(scope, path)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return _as_written(value, number(value, path))
    return text(value, path)


def _as_written(given: float, value: float) -> str:
    """A number as text; from 1e16 on a float has not every whole number."""
    whole = isinstance(given, int) or (value.is_integer() and abs(value) < 1e16)
    return str(int(given)) if whole else repr(value)


# --- transcripts, rounds and message lists ---------------------------------------------------------


def _rounds(scope: Scope, given: dict[str, Any]) -> list[Message]:
    """User and assistant in turn, up to the assistant's turn of the last round that is asked for."""
    asked, said = (_texts(scope, given[who]) for who in ("user", "assistant"))
    count = given.get("count", min(len(asked), len(said)))
    if isinstance(count, str):
        wanted = number(paths.needed(scope, count), count)
        if not wanted.is_integer() or wanted < 1:
            raise Reject("wrong_type", f"{count}: expected the number of rounds, got {wanted:g}")
        count = int(wanted)
    if "count" not in given and len(asked) != len(said):
        raise Reject("wrong_shape", f"{len(asked)} texts in {given['user']} and {len(said)} in {given['assistant']}")
    if count > min(len(asked), len(said)):
        raise Reject("missing_field", f"round {count} is absent: there are {len(asked)} and {len(said)} texts")
    rounds = zip(asked[:count], said[:count], strict=True)
    pairs = [(Message(role="user", content=a), Message(role="assistant", content=b)) for a, b in rounds]
    return [turn for pair in pairs for turn in pair]


def _texts(scope: Scope, path: str) -> list[str]:
    found = paths.needed(scope, path)
    if not isinstance(found, list):
        raise Reject("wrong_type", f"{path}: expected a list of texts, got {show(found)}")
    return [text(value, f"{path}[{i}]") for i, value in enumerate(found)]


@lru_cache(maxsize=64)
def _markers(markers: tuple[str, ...]) -> re.Pattern[str]:
    """Any of the markers; at the very start of a text the white space before a marker may be missing."""
    longest = sorted(markers, key=len, reverse=True)
    inside, start = ("|".join(re.escape(cut(m)) for m in longest) for cut in (str, str.lstrip))
    return re.compile(rf"(\A(?:{start})|{inside})")


def _split(transcript: str, roles: dict[str, str], before: str | None, where: str) -> list[Message]:
    """The turns between markers; one space after a marker is taken off."""
    lead, *spoken = _markers(tuple(roles)).split(transcript)
    of = {marker.lstrip(): role for marker, role in roles.items()} | roles
    turns = [
        Message(role=of[mark], content=said.removeprefix(" "))
        for mark, said in zip(spoken[::2], spoken[1::2], strict=True)
    ]
    if not lead.strip():
        return turns
    if before is None:
        raise Reject("wrong_shape", f"{where}: {show(lead)} stands before the first of {', '.join(map(repr, roles))}")
    return [Message(role=before, content=lead), *turns]


def _renamed(value: Any, names: dict[str, Any]) -> Any:
    """A list of messages with the keys and roles that everybody knows; what is no message is left to `messages`."""
    if not isinstance(value, list):
        return [_standard(value, names)] if isinstance(value, dict) else value
    return [_standard(turn, names) if isinstance(turn, dict) else turn for turn in value]


def _standard(turn: dict[str, Any], names: dict[str, Any]) -> dict[str, Any]:
    if not names:
        return turn
    role, content = names.get("role", "role"), names.get("content", "content")
    said = turn.get(role)
    others = {k: v for k, v in turn.items() if k not in (role, content, "from", "value")}
    return others | {
        "role": names.get("roles", {}).get(said, said) if isinstance(said, str) else said,
        "content": turn.get(content),
    }
