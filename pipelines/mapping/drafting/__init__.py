"""A first mapping for a file, guessed from the names, types and values of a sample of its records.

A guess is a proposal: comments in the YAML say what was seen and what to check. Above all the meaning of a label
cannot be seen in a file: which end of a scale is good, or which side "1" means.
"""

import re
from typing import Any

from pipelines.converters.messages import SYSTEM, judged
from pipelines.mapping import paths
from pipelines.mapping.drafting import fields, labels

_SAMPLE = 1_000
_CHOSEN = r"chosen|preferred|better|accepted|winning|good_response"
_REJECTED = r"rejected|dispreferred|worse|losing|bad_response"
_ANNOTATOR = r"annotator|user_id|worker|evaluator|rater|labeler|labeller|reviewer|completed_by"
_ID = re.compile(
    r"(^|[^a-z])(ids?|uuid|hash|sha256|is)(?![a-z])|^[a-z]{1,2}ids?$|(^|[^a-z])models?([ _-]?(name|[a-z]|[0-9]+))?$",
    re.IGNORECASE,
)
_CONTENT_KEYS = ("content", "value", "text", "message", "said", "body")
_MARKERS = [("\n\nHuman:", "\n\nAssistant:"), ("\nUser:", "\nAssistant:"), ("\nHuman:", "\nAI:"), ("\nQ:", "\nA:")]


def draft(records: list[dict[str, Any]], path: str) -> str:
    """YAML of a mapping guessed from `records` of the file `path`; it loads whatever the records are."""
    sample = [r for r in records[:_SAMPLE] if isinstance(r, dict)]
    cells = fields.json_cells(sample)
    columns = fields.columns(sample, cells)
    lines = [
        f"# Drafted from {len(records)} records of {fields.comment(path)}. A guess: check every line, labels above all."
    ]
    lines += [*_seen(columns), ""]
    if cells:
        lines.append(f"json: {fields.yaml([paths.quoted(key) for key in cells])}")
    used: list[str] = []
    lines += _conversation(columns, used)
    lines += _rest(columns, used)
    lines += _left_over(columns, used)
    return "\n".join(lines) + "\n"


def _seen(columns: dict[str, fields.Column]) -> list[str]:
    return ["# Fields: " + fields.comment(", ".join(list(columns)[:40]) or "none")]


def _texts(columns: dict[str, fields.Column], names: list[str]) -> list[str]:
    return [n for n in names if any(isinstance(v, str) for v in columns[n])]


def _spoken(columns: dict[str, fields.Column], names: list[str]) -> list[str]:
    """Those that hold text, or messages."""
    return [n for n in names if n in _texts(columns, names) or fields.messages_in(columns[n])]


def _longest(columns: dict[str, fields.Column], used: list[str]) -> list[str]:
    """The fields of prose, the longest texts first."""
    texts = [n for n in _texts(columns, [n for n in columns if n not in used]) if fields.is_prose(n, columns)]
    return sorted(texts, key=lambda n: -sum(len(v) for v in columns[n] if isinstance(v, str)) / len(columns[n]))


def _in_order(columns: dict[str, fields.Column], used: list[str], needed: int) -> list[str]:
    """The fields of prose as they stand, but what may be labels last where as many others as needed are left."""
    prose = [n for n in columns if n in _longest(columns, used)]
    sure = [n for n in prose if not labels.come_again(columns[n])]
    return sure + [n for n in prose if n not in sure] if len(sure) >= needed else prose


def _sides(columns: dict[str, fields.Column], used: list[str]) -> tuple[str, str] | None:
    """Two text fields whose names differ in a side only, such as answer_a and answer_b."""
    texts = [n for n in _spoken(columns, [n for n in columns if n not in used]) if _can_be_side(n, columns)]
    ranked = sorted(texts, key=lambda n: n not in fields.named(columns, fields.RESPONSE, used))
    return next(fields.paired(ranked, texts), None)


def _can_be_side(name: str, columns: dict[str, fields.Column]) -> bool:
    """No id, no column of a rater's labels, and no scores, unless the name says that it is a response."""
    if re.search(_ID, name) or re.fullmatch(fields.RATERS, name, re.IGNORECASE):
        return False
    return not fields.numbers(columns[name]) or name in fields.named(columns, fields.RESPONSE, [])


def _conversation(columns: dict[str, fields.Column], used: list[str]) -> list[str]:
    """Prompt, responses and label."""
    chosen = _spoken(columns, fields.named(columns, _CHOSEN, used))
    rejected = _spoken(columns, fields.named(columns, _REJECTED, used))
    if chosen and rejected and chosen[0] != rejected[0]:
        used += [chosen[0], rejected[0]]
        lines = [
            f"chosen: {_said(chosen[0], columns)}",
            f"rejected: {_said(rejected[0], columns)}  # check: this side is the worse one",
        ]
        return _prompt(columns, used, chosen[0], rejected[0]) + lines
    if sides := _sides(columns, used):
        used += sides
        lines = [f"first: {_said(sides[0], columns)}", f"second: {_said(sides[1], columns)}"]
        return (
            _prompt(columns, used, *sides)
            + lines
            + labels.label_of_two(columns, used, fields.differ(*sides) or fields.SIDES[0])
        )
    return _list_of_texts(columns, used) or _single(columns, used)


def _list_of_texts(columns: dict[str, fields.Column], used: list[str]) -> list[str]:
    """The lines for a list of two responses, or of several and as many ranks or scores; none where there is no such."""
    lists = {n: values for n, values in columns.items() if n not in used and all(isinstance(v, list) for v in values)}
    texts = [n for n, values in lists.items() if all(len(v) > 1 and all(isinstance(t, str) for t in v) for v in values)]
    for name in texts[:1]:
        numbers = [n for n in lists if n != name and _fit(lists[name], lists[n])]
        used += [name, *numbers[:1]]
        if numbers:
            asked = [*_prompt(columns, used, name), f"responses: {fields.yaml(name)}"]
            return [*asked, *labels.where_lines(numbers[0]), *labels.of_several(numbers[0], lists[numbers[0]])]
        if all(len(v) == 2 for v in lists[name]):
            sides = [f"first: {fields.yaml(f'{name}[0]')}", f"second: {fields.yaml(f'{name}[1]')}"]
            return [*_prompt(columns, used, name), *sides, *labels.label_of_two(columns, used, ("0", "1"))]
        used.remove(name)
    return []


def _fit(texts: fields.Column, lists: fields.Column) -> bool:
    """Whether there is a list of numbers for every list of texts, as long as it."""
    return [*map(len, texts)] == [*map(len, lists)] and all(fields.number(n) is not None for v in lists for n in v)


def _said(name: str, columns: dict[str, fields.Column]) -> str:
    """A prompt or response as the mapping says it: a path, and how a transcript or messages are read."""
    if markers := _markers(columns[name]):
        roles = ", ".join(f"{fields.in_quotes(m)}: {r}" for m, r in zip(markers, ("user", "assistant"), strict=True))
        return f"{{field: {fields.yaml(name)}, split: {{{roles}}}}}"
    if found := fields.messages_in(columns[name]):
        return f"{{field: {fields.yaml(name)}, messages: {{{_names_in(found)}}}}}"
    return fields.yaml(name)


def _markers(values: fields.Column) -> tuple[str, str] | None:
    """What stands before the turns of the user and the assistant where all texts are transcripts."""
    texts = [v for v in values if isinstance(v, str)]
    fitting = (markers for markers in _MARKERS if all(marker.strip() in v for marker in markers for v in texts))
    return next(fitting, None) if texts else None


def _names_in(found: list[dict[str, Any]]) -> str:
    """How messages call role and text, where it is not as usual."""
    role = next(key for key in fields.ROLE_KEYS if key in found[0])
    content = next((key for key in _CONTENT_KEYS if key in found[0]), "content")
    roles = sorted({m[role] for m in found if isinstance(m.get(role), str)})[: fields.FEW]
    named = {r: fields.ROLES[r.lower()] for r in roles if r.lower() in fields.ROLES and r != fields.ROLES[r.lower()]}
    if (role, content) in (("role", "content"), ("from", "value")) and set(named) <= {"human", "gpt"}:
        return ""
    listed = ", ".join(f"{fields.in_quotes(given)}: {meant}" for given, meant in named.items())
    return f"role: {fields.yaml(role)}, content: {content}" + (f", roles: {{{listed}}}" if listed else "")


def _is_whole(name: str, columns: dict[str, fields.Column]) -> bool:
    """Whether a field holds a conversation that ends in a response."""
    if _markers(columns[name]):
        return True
    ends = [fields.messages_in([v])[-1] for v in columns[name] if isinstance(v, list) and fields.messages_in([v])]
    spoken = [str(m.get(next(k for k in fields.ROLE_KEYS if k in m))).lower() for m in ends]
    return bool(spoken) and all(fields.ROLES.get(who, who) == "assistant" for who in spoken)


def _prompt(columns: dict[str, fields.Column], used: list[str], *responses: str) -> list[str]:
    """The prompt's line; none where the responses are the ends of conversations that their fields hold whole."""
    named = [n for n in _spoken(columns, fields.named(columns, fields.PROMPT, used)) if _can_be_prompt(n, columns)]
    if not named and all(_is_whole(name, columns) for name in responses):
        return []
    names = named or _in_order(columns, used, 1)
    if not names:
        return ["prompt: prompt  # none was found: name its field, join its file, or give one for all as {text: …}"]
    used.append(names[0])
    guess = "" if named else "  # a guess: check it"
    return [f"prompt: {_said(names[0], columns)}{guess}"]


def _can_be_prompt(name: str, columns: dict[str, fields.Column]) -> bool:
    return (
        not fields.is_label(name, columns)
        and not re.search(_ID, name)
        and name not in fields.named(columns, fields.ABOUT, [])
    )


def _items(columns: dict[str, fields.Column], used: list[str]) -> list[str]:
    """The lines for a list of objects with a response and its label each; none where there is no such list."""
    for name in (n for n in columns if n not in used):
        objects = [o for v in columns[name] if isinstance(v, list) for o in v if isinstance(o, dict)]
        inner = {} if any(map(fields.is_message, objects)) else fields.columns([{"item": o} for o in objects], [])
        said = [n for n in _texts(inner, fields.named(inner, fields.RESPONSE, [])) if _can_be_prompt(n, inner)][:1]
        asked = [n for n in _texts(inner, [*inner]) if re.fullmatch(rf"item\.({fields.PROMPT})s?", n, re.IGNORECASE)]
        asked = [n for n in asked if n not in said and _can_be_prompt(n, inner)][:1]
        if asked == ["item.user"] and fields.named(
            columns, fields.PROMPT, []
        ):  # who wrote an answer to the record's prompt
            asked = []
        if not said or not (label := _label_of_response(inner, [*said, *asked])):
            continue
        used += [name, *said]
        prompt = _prompt({n: inner[n] for n in asked + said} if asked else columns | inner, used, said[0])
        if any(n in inner for n in used if n not in said):
            prompt.append(f"# check: what stands before an item of {fields.comment(name)} is no part of its prompt")
        return [f"each: {fields.yaml(name)}", *prompt, f"response: {fields.yaml(said[0])}", *label]
    return []


def _single(columns: dict[str, fields.Column], used: list[str]) -> list[str]:
    """One response, with a label if there is one; a demonstration where nothing can be one."""
    whole = [n for n in columns if n not in used and _is_whole(n, columns)]
    named = whole or [
        n for n in _spoken(columns, fields.named(columns, fields.RESPONSE, used)) if _can_be_prompt(n, columns)
    ]
    if not named and (items := _items(columns, used)):
        return items
    prompts = [n for n in _spoken(columns, fields.named(columns, fields.PROMPT, used)) if _can_be_prompt(n, columns)]
    prose = [n for n in _longest(columns, used) if n not in prompts[:1]] if prompts else _in_order(columns, used, 2)[1:]
    names = named or sorted(prose, key=lambda n: labels.come_again(columns[n])) or ["response"]
    used.append(names[0])
    guess = "" if named else "  # a guess: check it"
    if names[0] not in columns:
        guess = "  # no response was found: name its field"
    found = names[0] in columns
    said = _said(names[0], columns) if found else names[0]
    asked = _prompt(columns if found else columns | {"response": []}, used, names[0])
    of_turns = _turns(names[0], columns)
    if label := _label_of_response(columns, used):
        unread = ["# check: turns are judged too, which is not read"] if labels.label_field(of_turns, []) else []
        return [*asked, f"response: {said}{guess}", *label, *unread]
    if label := _label_of_response(of_turns, []):
        told = [
            f"# check: only what is said of the last turn of {fields.comment(names[0])} is read, not of those before it"
        ]
        return [*asked, f"response: {said}{guess}", *label, *told]
    return [
        *asked,
        f"demonstration: {said}{guess}",
        "# check: no label was found, so every response is an example to follow, with reward 1. With one: response"
        " instead, and label.",
    ]


def _label_of_response(columns: dict[str, fields.Column], used: list[str]) -> list[str]:
    """The lines of the label of one response; none where no field can be one."""
    if raters := labels.raters(columns, used):
        return labels.label_of_one(raters, fields.all_of(columns, raters))
    if label := labels.label_field(columns, used):
        used.append(label)
        return labels.label_of_one(label, columns[label])
    return labels.unknown(likely, columns, used) if (likely := labels.may_judge(columns, used)) else []


def _turns(name: str, columns: dict[str, fields.Column]) -> dict[str, fields.Column]:
    """What is said of the turns of conversations beside role and text, as fields of the last turn."""
    lists = [v for v in columns.get(name, []) if isinstance(v, list)]
    inner = fields.columns(fields.messages_in(lists), [])
    return {f"{name}[-1].{path}": v for path, v in inner.items() if path not in (*fields.ROLE_KEYS, *_CONTENT_KEYS)}


def _rest(columns: dict[str, fields.Column], used: list[str]) -> list[str]:
    """System turn, annotator and metadata."""
    lines = []
    if system := [n for n in SYSTEM if n in columns and n not in used and _texts(columns, [n])]:
        lines.append(f"system: {system[0]}")
        used.append(system[0])
    if people := [
        n for n in fields.named(columns, _ANNOTATOR, used) if not any(fields.is_nested(v) for v in columns[n])
    ]:
        used.append(people[0])
        lines.append(f"labeller: {{annotator: {fields.yaml(people[0])}}}  # published as a hash only")
    else:
        lines.append("# labeller: human  # who judged? human, model:…, judge:…, rule:…, or {annotator: FIELD}")
    kept = [n for n in columns if n not in used and re.fullmatch(fields.KEPT, n, re.IGNORECASE)]
    if kept := [n for n in kept if not any(fields.is_nested(v) for v in columns[n])]:
        lines.append(f"metadata: {fields.yaml(kept[:8])}")
        used += kept[:8]
    return lines


def _left_over(columns: dict[str, fields.Column], used: list[str]) -> list[str]:
    """What the draft does not read, above all what may belong to the prompt."""
    others = [n for n in columns if n not in used]
    parts = [n for n in others if re.fullmatch(fields.PARTS, n, re.IGNORECASE)]
    lines = [
        f"# check: {fields.comment(n)} may belong to the prompt; then prompt: {{fields: [this, …]}}" for n in parts
    ]
    if judging := [
        n for n in others if judged({n: None}) or (fields.numbers(columns[n]) and not re.search(fields.KEY, n))
    ]:
        lines.append(f"# check: {fields.comment(', '.join(judging))} may say how good a response is")
    return [*lines, f"# Not used: {fields.comment(', '.join(others))}"] if others else lines
