"""A first mapping for a file, guessed from the names, types and values of a sample of its records.

A guess is a proposal: comments in the YAML say what was seen and what to check. Above all the meaning of a label
cannot be seen in a file: which end of a scale is good, or which side "1" means.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from pipelines.converters.messages import SYSTEM, judged
from pipelines.mapping import paths

Column = list[Any]  # the values of a field that are there

_SAMPLE = 1_000
_DEPTH = 3  # how deep fields are looked for within a field
_FEW = 12  # a label has no more distinct values than this
_SIDES = [("a", "b"), ("1", "2"), ("0", "1"), ("left", "right"), ("first", "second"), ("one", "two"), ("x", "y")]
_PROMPT = (
    r"prompt|question|instruction|query|input|user|asked|context|conversation|messages|history|post|request|task"
    r"|frage|pregunta|pergunta|domanda|вопрос|问题|問題|提问|指令|質問|질문|(ال)?سؤال"
)
_RESPONSE = (
    r"response|answer|completion|output|reply|generation|generated|assistant|bot|model_output|text|summary"
    r"|antwort|respuesta|resposta|réponse|risposta|ответ|回答|答案|回复|応答|답변|(ال)?(إجابة|جواب)"
)
_CHOSEN = r"chosen|preferred|better|accepted|winning|good_response"
_REJECTED = r"rejected|dispreferred|worse|losing|bad_response"
_LABEL = (
    r"label|score|rating|rate|stars?|preference|preferred|winner|choice|vote|verdict|feedback|thumbs?|reward|grade|quality"
    r"|rank|like|liked|good|correct|acceptable|helpful|which|better|best|prefer|overall|opinion|evaluation"
    r"|bewertung|gewinner|besser|ganador|preferencia|puntuación|calificación|valoración|vencedor|avaliação|gagnant"
    r"|préférence|vincitore|valutazione|оценка|评分|得分|评价|偏好|評価|평가|(ال)?تقييم"
)
_ANNOTATOR = r"annotator|user_id|worker|evaluator|rater|labeler|labeller|reviewer|completed_by"
_RATERS = r"(rater|annotator|judge|evaluator|reviewer|labell?er|grader|expert|human)[ _-]?[0-9]+"
_KEPT = r"id|model|model_.*|.*_model|language|lang|category|domain|source|timestamp|date"
_GOOD = "good|up|thumbs[ _]?up|👍|yes|true|liked?|positive|correct|accept(ed)?|1|ja|oui|s[ií]|gut|好|是|对|赞|да|نعم"
_BAD = "bad|down|thumbs[ _]?down|👎|no|false|disliked?|negative|wrong|incorrect|reject(ed)?|0|-1|nein|non"
_BAD += "|schlecht|坏|否|错|踩|нет|لا"
_ORDERS = [  # words from the worst to the best; one of a group
    "terrible|awful very.poor|very.bad poor|bad fair|mediocre ok|okay|average|neutral good very.good|great excellent"
    " perfect",
    "strongly.disagree disagree neutral|neither.agree.nor.disagree agree strongly.agree",
    "very.low low medium|moderate high very.high",
    "very.unsatisfied|very.dissatisfied unsatisfied|dissatisfied neutral satisfied very.satisfied",
    "very.unhelpful unhelpful|not.helpful neutral somewhat.helpful|slightly.helpful helpful very.helpful",
    "incorrect|wrong partially.correct|partly.correct correct",
]
_ABOUT = "judg(e)?ments?|critique|rationale|explanation|comments?|reason(ing)?|review|notes?|id|uuid|language|category"
_ID = re.compile(
    r"(^|[^a-z])(ids?|uuid|hash|sha256|is)(?![a-z])|^[a-z]{1,2}ids?$|(^|[^a-z])models?([ _-]?(name|[a-z]|[0-9]+))?$",
    re.IGNORECASE,
)
_KEY = re.compile(r"(^|[^a-z])(ids?|uuid|hash|sha256)(?![a-z])|^[a-z]{1,2}ids?$", re.IGNORECASE)  # and no label
_PARTS = r"(.*[ _-])?(context|passage|document|article|background|history)s?"  # of a prompt, beside the question
_ROLE_KEYS = ("role", "from", "speaker", "author", "sender")
_CONTENT_KEYS = ("content", "value", "text", "message", "said", "body")
_ROLES = {"human": "user", "user": "user", "client": "user", "customer": "user", "prompter": "user", "gpt": "assistant",
          "assistant": "assistant", "bot": "assistant", "model": "assistant", "ai": "assistant", "chatgpt": "assistant",
          "agent": "assistant", "system": "system", "tool": "tool"}  # fmt: skip
_MARKERS = [("\n\nHuman:", "\n\nAssistant:"), ("\nUser:", "\nAssistant:"), ("\nHuman:", "\nAI:"), ("\nQ:", "\nA:")]
_TIE = re.compile(
    r"tie|draw|equal|same|both|neither|none|a=b|empate|unentschieden|gleich|égalité|pareggio|ничья|平局|平手|相同|تعادل",
    re.IGNORECASE,
)
_MISSING = re.compile(r"#?n/?a[!?]?|#[A-Z]+[/0]*[!?]|nan|null|none|error|unknown|skip(ped)?|-", re.IGNORECASE)
_SHARE = re.compile(r"(?P<n>[0-9]{1,6}([.,][0-9]{1,6})?) ?(?P<of>%|stars?|(/|out of) ?(?P<most>[1-9][0-9]{0,5}))")


def draft(records: list[dict[str, Any]], path: str) -> str:
    """YAML of a mapping guessed from `records` of the file `path`; it loads whatever the records are."""
    sample = [r for r in records[:_SAMPLE] if isinstance(r, dict)]
    cells = _json_cells(sample)
    columns = _columns(sample, cells)
    lines = [f"# Drafted from {len(records)} records of {_comment(path)}. A guess: check every line, labels above all."]
    lines += [*_seen(columns), ""]
    if cells:
        lines.append(f"json: {_yaml([paths.quoted(key) for key in cells])}")
    used: list[str] = []
    lines += _conversation(columns, used)
    lines += _rest(columns, used)
    lines += _left_over(columns, used)
    return "\n".join(lines) + "\n"


def _columns(records: list[dict[str, Any]], cells: list[str]) -> dict[str, Column]:
    """Path → values, for the fields of the records and, of objects among them that are no messages, theirs."""
    found: dict[str, Column] = {}
    for record in records:
        for key, value in record.items():
            if isinstance(key, str) and _can_be_named(key):
                for path, own in _leaves(paths.quoted(key), _opened(value) if key in cells else value):
                    found.setdefault(path, []).append(own)
    return found


def _leaves(path: str, value: Any, depth: int = 0) -> Iterator[tuple[str, Any]]:
    """The paths and values in objects, and in an object that is alone in a list, such as `choices[0]`."""
    alone = isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict) and not _is_message(value[0])
    if alone and depth < _DEPTH:
        inner = [*_leaves(f"{path}[0]", value[0], depth + 1)]
        if any(_is_message(found) for _, found in inner):
            yield from inner
            return
    if isinstance(value, dict) and value and not _is_message(value) and depth < _DEPTH:
        for key, own in value.items():
            if isinstance(key, str) and _can_be_named(key):
                yield from _leaves(f"{path}.{paths.quoted(key)}", own, depth + 1)
    elif not _is_blank(value):
        yield path, value


def _is_blank(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _is_message(value: Any) -> bool:
    """An object with a role; under a name that is no role everywhere, such as `author`, one that is known."""
    if not isinstance(value, dict):
        return False
    return any(
        name in value and (name in ("role", "from") or str(value[name]).lower() in _ROLES) for name in _ROLE_KEYS
    )


def _json_cells(records: list[dict[str, Any]]) -> list[str]:
    """The fields of which every text is JSON of a list or an object."""
    texts: dict[str, list[str]] = {}
    for record in records:
        for key, value in record.items():
            if isinstance(key, str) and _can_be_named(key) and not _is_blank(value):
                texts.setdefault(key, []).append(value)
    return [
        key
        for key, values in texts.items()
        if all(isinstance(_opened(v), list | dict) for v in values) and all(isinstance(v, str) for v in values)
    ]


def _opened(value: Any) -> Any:
    """What a text that holds a JSON list or object holds; anything else as it is."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _can_be_named(key: str) -> bool:
    """A key that a path can hold: not empty, not with both kinds of quotes, and text that a file can hold."""
    return bool(key) and not {'"', "'"} <= set(key) and key.isprintable() and _encodable(key)


def _encodable(text: str) -> bool:
    return not any("\ud800" <= c <= "\udfff" for c in text)


def _seen(columns: dict[str, Column]) -> list[str]:
    return ["# Fields: " + _comment(", ".join(list(columns)[:40]) or "none")]


def _comment(text: str) -> str:
    return "".join(c if c.isprintable() and _encodable(c) else " " for c in text)[:400]


def _yaml(value: Any) -> str:
    """A value on one line: JSON is YAML, and a plain name needs no quotes."""
    if isinstance(value, str) and re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.]*", value) and not _is_word(value):
        return value
    if isinstance(value, list):
        return "[" + ", ".join(map(_in_list, value)) + "]"
    return _in_quotes(value)


def _in_list(value: Any) -> str:
    return _in_quotes(value) if isinstance(value, str) and not value.isidentifier() else _yaml(value)


def _in_quotes(value: Any) -> str:
    """JSON, but of what cannot be printed an escape that YAML knows (it has no pairs of surrogates)."""
    written = json.dumps(value, ensure_ascii=False)
    return "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in written)


def _is_word(value: str) -> bool:
    """Words that YAML takes for something else than text."""
    return value.lower() in ("true", "false", "yes", "no", "on", "off", "null", "y", "n", "nan", "inf")


# --- which field is what -------------------------------------------------------------------------


def _named(columns: dict[str, Column], pattern: str, used: list[str]) -> list[str]:
    """The fields whose name, or a part of it between separators, is one of the words.

    Whole names first, then those that end in the word: a `user_prompt` is a prompt, and a `prompt_type` is not.
    """
    parts = rf"(^|[^a-z])({pattern})s?(?![a-z])"
    found = {n: [m.end() for m in re.finditer(parts, _words(n), re.IGNORECASE)] for n in columns if n not in used}
    whole = [n for n in found if re.fullmatch(f"({pattern})s?", n, re.IGNORECASE)]
    others = [n for n, ends in found.items() if ends and n not in whole]
    return whole + sorted(others, key=lambda n: len(_words(n)) not in found[n])


def _words(name: str) -> str:
    return re.sub(r"(?<=[^\W_A-Z0-9])(?=[A-Z0-9])", "_", name)


def _texts(columns: dict[str, Column], names: list[str]) -> list[str]:
    return [n for n in names if any(isinstance(v, str) for v in columns[n])]


def _spoken(columns: dict[str, Column], names: list[str]) -> list[str]:
    """Those that hold text, or messages."""
    return [n for n in names if n in _texts(columns, names) or _messages_in(columns[n])]


def _messages_in(values: Column) -> list[dict[str, Any]]:
    """The messages among the values, from first to last."""
    listed = [v if isinstance(v, list) else [v] for v in values]
    return [m for turns in listed for m in turns if _is_message(m)]


def _is_prose(name: str, columns: dict[str, Column]) -> bool:
    """Words with spaces between them, or messages; not an id, a label or a judge's reasons."""
    words = [v for v in columns[name] if isinstance(v, str)]
    spaced = any(" " in v.strip() for v in words) or bool(_messages_in(columns[name]))
    return spaced and not _is_label(name, columns) and name not in _named(columns, _ABOUT, [])


def _longest(columns: dict[str, Column], used: list[str]) -> list[str]:
    """The fields of prose, the longest texts first."""
    texts = [n for n in _texts(columns, [n for n in columns if n not in used]) if _is_prose(n, columns)]
    return sorted(texts, key=lambda n: -sum(len(v) for v in columns[n] if isinstance(v, str)) / len(columns[n]))


def _sides(columns: dict[str, Column], used: list[str]) -> tuple[str, str] | None:
    """Two text fields whose names differ in a side only, such as answer_a and answer_b."""
    texts = [n for n in _spoken(columns, [n for n in columns if n not in used]) if _can_be_side(n, columns)]
    split = {n: re.split(r"([^A-Za-z0-9]+|(?<=[a-z])(?=[A-Z0-9]))", n) for n in texts}
    ranked = sorted(texts, key=lambda n: n not in _named(columns, _RESPONSE, used))
    for one in ranked:
        for other in texts:
            differing = [(a, b) for a, b in zip(split[one], split[other], strict=False) if a != b]
            same_length = len(split[one]) == len(split[other])
            if same_length and len(differing) == 1 and tuple(map(str.lower, differing[0])) in _SIDES:
                return one, other
    return None


def _can_be_side(name: str, columns: dict[str, Column]) -> bool:
    """No id, no column of a rater's labels, and no scores, unless the name says that it is a response."""
    if re.search(_ID, name) or re.fullmatch(_RATERS, name, re.IGNORECASE):
        return False
    return not _numbers(columns[name]) or name in _named(columns, _RESPONSE, [])


# --- the lines ---------------------------------------------------------------------------------


def _conversation(columns: dict[str, Column], used: list[str]) -> list[str]:
    """Prompt, responses and label."""
    chosen = _spoken(columns, _named(columns, _CHOSEN, used))
    rejected = _spoken(columns, _named(columns, _REJECTED, used))
    if chosen and rejected and chosen[0] != rejected[0]:
        used += [chosen[0], rejected[0]]
        lines = [
            f"chosen: {_said(chosen[0], columns)}",
            f"rejected: {_said(rejected[0], columns)}  # check: this side is the worse one",
        ]
        return _prompt(columns, used, chosen[0]) + lines
    if sides := _sides(columns, used):
        used += sides
        lines = [f"first: {_said(sides[0], columns)}", f"second: {_said(sides[1], columns)}"]
        return _prompt(columns, used, sides[0]) + lines + _label_of_two(columns, used)
    return _single(columns, used)


def _said(name: str, columns: dict[str, Column]) -> str:
    """A prompt or response as the mapping says it: a path, and how a transcript or messages are read."""
    texts = [v for v in columns[name] if isinstance(v, str)]
    for markers in _MARKERS:
        if texts and all(all(marker.strip() in v for marker in markers) for v in texts):
            roles = ", ".join(f"{_in_quotes(m)}: {r}" for m, r in zip(markers, ("user", "assistant"), strict=True))
            return f"{{field: {_yaml(name)}, split: {{{roles}}}}}"
    if found := _messages_in(columns[name]):
        return f"{{field: {_yaml(name)}, messages: {{{_names_in(found)}}}}}"
    return _yaml(name)


def _names_in(found: list[dict[str, Any]]) -> str:
    """How messages call role and text, where it is not as usual."""
    role = next(key for key in _ROLE_KEYS if key in found[0])
    content = next((key for key in _CONTENT_KEYS if key in found[0]), "content")
    roles = sorted({m[role] for m in found if isinstance(m.get(role), str)})[:_FEW]
    named = {r: _ROLES[r.lower()] for r in roles if r.lower() in _ROLES and r != _ROLES[r.lower()]}
    if (role, content) in (("role", "content"), ("from", "value")) and set(named) <= {"human", "gpt"}:
        return ""
    listed = ", ".join(f"{_in_quotes(given)}: {meant}" for given, meant in named.items())
    return f"role: {_yaml(role)}, content: {content}" + (f", roles: {{{listed}}}" if listed else "")


def _is_whole(name: str, columns: dict[str, Column]) -> bool:
    """Whether a field holds a conversation that ends in a response."""
    if "split" in _said(name, columns):
        return True
    ends = [_messages_in([v])[-1] for v in columns[name] if isinstance(v, list) and _messages_in([v])]
    spoken = [str(m.get(next(k for k in _ROLE_KEYS if k in m))).lower() for m in ends]
    return bool(spoken) and all(_ROLES.get(who, who) == "assistant" for who in spoken)


def _prompt(columns: dict[str, Column], used: list[str], response: str) -> list[str]:
    """The prompt's line; none where the response is the end of a conversation that a field holds whole."""
    named = [n for n in _spoken(columns, _named(columns, _PROMPT, used)) if _can_be_prompt(n, columns)]
    if not named and _is_whole(response, columns):
        return []
    names = named or [n for n in columns if n in _longest(columns, used)]
    if not names:
        return ["prompt: prompt  # no prompt was found: name its field, or join the file that has it"]
    used.append(names[0])
    guess = "" if named else "  # a guess: check it"
    return [f"prompt: {_said(names[0], columns)}{guess}"]


def _can_be_prompt(name: str, columns: dict[str, Column]) -> bool:
    return not _is_label(name, columns) and not re.search(_ID, name) and name not in _named(columns, _ABOUT, [])


def _is_label(name: str, columns: dict[str, Column]) -> bool:
    plain = not any(_is_nested(v) for v in columns[name])
    return plain and name in _named(columns, _LABEL, []) and len(_distinct(columns[name])) <= _FEW


def _items(columns: dict[str, Column], used: list[str]) -> list[str]:
    """The lines for a list of objects with a response and its label each; none where there is no such list."""
    for name in (n for n in columns if n not in used):
        objects = [o for v in columns[name] if isinstance(v, list) for o in v if isinstance(o, dict)]
        inner = {} if any(map(_is_message, objects)) else _columns([{"item": o} for o in objects], [])
        said = [n for n in _texts(inner, _named(inner, _RESPONSE, [])) if _can_be_prompt(n, inner)][:1]
        if not said or not (label := _label(inner, said)):
            continue
        used.append(name)
        asked = _prompt({**columns, said[0]: inner[said[0]]}, used, said[0])
        judged_so = _label_of_one(_where(label), inner[label])
        return [f"each: {_yaml(name)}", *asked, f"response: {_yaml(said[0])}", *judged_so]
    return []


def _single(columns: dict[str, Column], used: list[str]) -> list[str]:
    """One response, with a label if there is one; without, it is a demonstration."""
    whole = [n for n in columns if n not in used and _is_whole(n, columns)]
    named = whole or [n for n in _spoken(columns, _named(columns, _RESPONSE, used)) if _can_be_prompt(n, columns)]
    prompts = [n for n in _spoken(columns, _named(columns, _PROMPT, used)) if _can_be_prompt(n, columns)]
    prose = [n for n in columns if n in _longest(columns, used)]
    names = named or ([n for n in _longest(columns, used) if n not in prompts[:1]] if prompts else prose[1:]) or []
    if not names and (items := _items(columns, used)):
        return items
    names = names or ["response"]
    used.append(names[0])
    guess = "" if named else "  # a guess: check it"
    if names[0] not in columns:
        guess = "  # no response was found: name its field"
    found = names[0] in columns
    said = _said(names[0], columns) if found else names[0]
    asked = _prompt(columns if found else columns | {"response": []}, used, names[0])
    if raters := _raters(columns, used):
        return [*asked, f"response: {said}{guess}", *_label_of_one(_where(raters), _all_of(columns, raters))]
    if not (label := _label(columns, used)):
        return [
            *asked,
            f"demonstration: {said}{guess}",
            "# No label was found, so every response is an example to follow. With one: response instead, and label.",
        ]
    used.append(label)
    return [*asked, f"response: {said}{guess}", *_label_of_one(_where(label), columns[label])]


def _raters(columns: dict[str, Column], used: list[str]) -> list[str]:
    """The columns that hold a label each, by people who are only numbered."""
    found = [n for n in columns if n not in used and re.fullmatch(_RATERS, n, re.IGNORECASE)]
    if len(found) < 2 or not (_numbers(values := _all_of(columns, found)) or len(_distinct(values)) <= _FEW):
        return []
    used += found
    return found


def _all_of(columns: dict[str, Column], names: list[str]) -> Column:
    return [value for name in names for value in columns[name]]


def _where(label: str | list[str]) -> list[str]:
    place = f"annotators: {_yaml(label)}" if isinstance(label, list) else f"field: {_yaml(label)}"
    return ["label:", f"  {place}"]


def _label(columns: dict[str, Column], used: list[str]) -> str | None:
    """The field with a label: by its name, the one with values of a kind before the one with any."""
    plain = [n for n, values in columns.items() if not any(isinstance(v, list | dict) for v in values)]
    named = [n for n in _named(columns, _LABEL, used) if n in plain and not re.search(_KEY, n)]
    fitting = [n for n in named if _numbers(columns[n]) or len(_distinct(columns[n])) <= _FEW]
    telling = [n for n in plain if n not in used and not re.search(_KEY, n) and _tells_side(columns[n])]
    return next(iter(fitting + telling), None)


def _tells_side(values: Column) -> bool:
    """Whether the values name one side or the other, or neither."""
    sides = {_side_of(v) for v in _distinct(values) if not _TIE.search(v)}
    return sides == {0, 1}


def _distinct(values: Column) -> list[str]:
    """The distinct values as text, the most frequent first; of what is too many, a few."""
    texts = (str(v).lower() if isinstance(v, bool) else v.strip() if isinstance(v, str) else repr(v)[:60]
             for v in values if not _is_huge(v))  # fmt: skip
    return [text for text, _ in Counter(t for t in texts if _encodable(t)).most_common(_FEW + 1)]


def _is_huge(value: Any) -> bool:
    return isinstance(value, int) and value.bit_length() > 64


def _numbers(values: Column) -> list[float]:
    """The values as numbers, if almost all are: blanks and such words as N/A aside."""
    found, strange = [], 0
    for value in values:
        number = _number(value)
        if number is not None:
            found.append(number)
        elif not (isinstance(value, str) and _MISSING.fullmatch(value.strip())):
            strange += 1
    return found if strange == 0 else []


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str) or _is_huge(value):
        return None
    if isinstance(value, str) and not re.fullmatch(r"\s*[+-]?[0-9]{1,15}(\.[0-9]{1,15})?\s*", value):
        return None
    number = float(value)
    return number if abs(number) < 1e300 else None


def _missing(values: Column) -> list[Any]:
    """What stands for no label, it seems: such words as N/A, and a -1 or -100 below a scale that starts at 0 or 1."""
    numbers = _numbers(values)
    words = [v for v in _distinct(values) if _MISSING.fullmatch(v)] if numbers else []
    above = [n for n in numbers if n >= 0]
    low = {n for n in numbers if n in (-1, -100)} if above and len(set(above)) > 1 else set()
    return words + ([int(n) for n in sorted(low)] if all(n >= 0 or n in low for n in numbers) else [])


def _label_of_one(lines: list[str], values: Column) -> list[str]:
    """What the label of a response means, after the lines that say where it is."""
    distinct = [v for v in _distinct(values) if not _MISSING.fullmatch(v)]
    missing = [v for v in _distinct(values) if _MISSING.fullmatch(v)]
    absent = [f"  missing: {_yaml(missing)}  # check: do these stand for no label?"] if missing else []
    good = [v for v in distinct if re.fullmatch(_GOOD, _same(v), re.IGNORECASE)]
    bad = [v for v in distinct if re.fullmatch(_BAD, _same(v), re.IGNORECASE)]
    if good and bad and len(good) + len(bad) == len(distinct):
        return [*lines, f"  thumbs: {{good: {_yaml(good)}, bad: {_yaml(bad)}}}", *absent]
    if numbers := _numbers(values):
        return lines + _scale(numbers, _missing(values))
    if len(distinct) < 2:
        return [*lines, f"  thumbs: {{good: {_yaml(distinct or ['good'])}, bad: [{_another(distinct)}]}}"
                "  # check: one value was seen", *absent]  # fmt: skip
    return [*lines, *_worded(_unlike(distinct)), *absent]


def _worded(values: list[str]) -> list[str]:
    """Shares of the best, such as 4/5; words of a known order; or the values, for somebody to put in their order."""
    if all(re.search("[%/]|out of", v.lower()) and _share(v) is not None for v in values):
        return ["  scale: unit  # shares of the best, such as 4/5 or 80%"]
    if len(shares := {v: share for v in values if (share := _share(v)) is not None}) == len(values):
        listed = ", ".join(f"{_in_quotes(v)}: {share:.6g}" for v, share in shares.items())
        return [f"  map: {{{listed}}}  # check: other values are rejected", "  scale: unit"]
    if len(commas := {v: n for v in values if (n := _number(v.replace(",", ".", 1))) is not None}) == len(values):
        listed = ", ".join(f"{_in_quotes(v)}: {n:g}" for v, n in commas.items())
        return [f"  map: {{{listed}}}  # check: other values are rejected", *_scale([*commas.values()], [])]
    if ordered := _ordered(values):
        return [f"  order: {_yaml(ordered)}  # check: must go from the worst to the best, the ones not seen too"]
    return [
        "  order: [worst, best]  # put the values here, from the worst to the best; until then all are rejected",
        f"  # seen: {_comment(', '.join(map(_in_quotes, values)))}",
    ]


def _share(value: str) -> float | None:
    """The share of the best that a value such as 4/5, 80%, 4 stars or ★★★★☆ says."""
    if re.fullmatch("★+☆*", value) and len(value) in (3, 4, 5, 10):
        return value.count("★") / len(value)
    if not (found := _SHARE.fullmatch(value.lower())):
        return None
    most = 100 if found["of"] == "%" else float(found["most"] or 5)
    share = float(found["n"].replace(",", ".")) / most
    return share if share <= 1 else None


def _ordered(values: list[str]) -> list[str]:
    """The values from the worst to the best, if all are words of one of the known orders."""
    for order in _ORDERS:
        places = {v: i for v in values for i, words in enumerate(order.split()) if re.fullmatch(words, _same(v))}
        if len(places) == len(values) == len(set(places.values())):
            return sorted(values, key=places.__getitem__)
    return []


def _unlike(values: list[str]) -> list[str]:
    """Of values that differ in case or spelling of a number only, the first: they are one value to a mapping."""
    seen: dict[str, str] = {}
    for value in values:
        seen.setdefault(_same(value), value)
    kept = list(seen.values())
    return kept if len(kept) > 1 else [*kept, _another(kept)]


def _same(value: str) -> str:
    from pipelines.mapping.judgements import canonical

    return canonical(value)


def _another(values: list[str]) -> str:
    return next(word for word in ("bad", "good", "other") if word not in map(_same, values))


def _scale(numbers: list[float], missing: list[Any]) -> list[str]:
    real = [n for n in numbers if n not in missing] or numbers
    low, high = min(real), max(real)
    lines = [f"  missing: {_yaml(missing)}  # check: do these stand for no label?"] if missing else []
    seen = f"  # check the ends of the scale, and that more is better; seen were {low:g} to {high:g}"
    if low >= 1 and high in (5, 10) and all(n == int(n) for n in real):
        return [f"  stars: {int(high)}{seen}", *lines]
    for a, b in ((0, 1), (1, 5), (0, 4), (0, 5), (1, 7), (0, 10), (1, 10), (0, 100), (-1, 1)):
        if a <= low and high <= b:
            return [f"  score: [{a}, {b}]{seen}", *lines]
    return [f"  scale: sigmoid  # no known scale: check; seen were {low:g} to {high:g}; or score: [low, high]", *lines]


def _label_of_two(columns: dict[str, Column], used: list[str]) -> list[str]:
    """The label of a pair: two scores, or a field that tells the winner."""
    scores = [n for n in _named(columns, _LABEL, used) if _numbers(columns[n])]
    if two := _sides({n: ["text"] for n in scores}, []):
        used += two
        return ["label:", f"  fields: {_yaml(list(two))}", "  compare: higher  # check: is more better?"]
    raters = _raters(columns, used)
    if not (name := raters or _label(columns, used)):
        return ["label:", "  field: winner  # no label was found: name its field", _WINNER]
    used += [name] if isinstance(name, str) else []
    values = _all_of(columns, raters or [str(name)])
    signed = set(_numbers(values)) <= {-1, 0, 1}
    missing = [] if signed else _missing(values)
    numbers = [n for n in _numbers(values) if n not in missing]
    lines = [*_where(name), *([f"  missing: {_yaml(missing)}  # check"] if missing else [])]
    if len(set(numbers)) > 2 and set(numbers) != {0, 1, 2}:
        low, high = _ends(numbers)
        seen = f"seen were {min(numbers):g} to {max(numbers):g}"
        check = f"# check the ends, and which of them means the first; {seen}"
        return [*lines, f"  preference: {{first: {low:g}, second: {high:g}}}  {check}"]
    absent = {_same(str(v)) for v in missing}
    return [*lines, _winner([v for v in _distinct(values) if _same(v) not in absent], bool(numbers))]


def _ends(numbers: list[float]) -> tuple[float, float]:
    """The ends of a scale between two responses, its middle a tie."""
    low, high = min(numbers), max(numbers)
    if low < 0:
        return -max(-low, high), max(-low, high)
    scales = ((0, 1), (1, 3), (1, 5), (1, 7), (1, 9), (1, 10), (0, 10), (0, 100))
    return next(((a, b) for a, b in scales if a <= low and high <= b), (low, high))


_WINNER = '  winner: {first: ["a"], second: ["b"], tie: ["tie"]}  # check: which value means which side?'


def _winner(distinct: list[str], numbers: bool = False) -> str:
    """Values in three groups: ties (of 0, 1 and 2, the 0), and the others by the side they name, or of two in order."""
    distinct = _unlike([v for v in distinct if not _MISSING.fullmatch(v) or _TIE.search(v)])
    ties = [v for v in distinct if _TIE.search(v) or (numbers and len(distinct) == 3 and _same(v) == "0")]
    others = sorted(v for v in distinct if v not in ties)
    if len(others) < 2:
        return _WINNER
    first = [v for v in others if _side_of(v) == 0]
    second = [v for v in others if _side_of(v) == 1]
    if len(others) == 2 and not (first and second):
        first, second = others[:1], others[1:]
    if not first or not second or len(first) + len(second) != len(others):
        return f"{_WINNER}  # seen: {_comment(', '.join(map(_in_quotes, distinct)))}"
    tie = f", tie: {_yaml(ties)}" if ties else ""
    return f"  winner: {{first: {_yaml(first)}, second: {_yaml(second)}{tie}}}  # check: which value means which side?"


def _side_of(value: str) -> int | None:
    """0 where a value names the first of two sides, 1 for the second, None where it names neither or both."""
    words = re.split(r"[^a-z0-9]+", _words(value).lower())
    for first, second in _SIDES:
        if (first in words) != (second in words):
            return 0 if first in words else 1
    return None


def _rest(columns: dict[str, Column], used: list[str]) -> list[str]:
    """System turn, annotator and metadata."""
    lines = []
    if system := [n for n in SYSTEM if n in columns and n not in used and _texts(columns, [n])]:
        lines.append(f"system: {system[0]}")
        used.append(system[0])
    if people := [n for n in _named(columns, _ANNOTATOR, used) if not any(_is_nested(v) for v in columns[n])]:
        used.append(people[0])
        lines.append(f"labeller: {{annotator: {_yaml(people[0])}}}  # published as a hash only")
    else:
        lines.append("# labeller: human  # who judged? human, model:…, judge:…, rule:…, or {annotator: FIELD}")
    kept = [n for n in columns if n not in used and re.fullmatch(_KEPT, n, re.IGNORECASE)]
    if kept := [n for n in kept if not any(_is_nested(v) for v in columns[n])]:
        lines.append(f"metadata: {_yaml(kept[:8])}")
        used += kept[:8]
    return lines


def _left_over(columns: dict[str, Column], used: list[str]) -> list[str]:
    """What the draft does not read, above all what may belong to the prompt."""
    others = [n for n in columns if n not in used]
    parts = [n for n in others if re.fullmatch(_PARTS, n, re.IGNORECASE)]
    lines = [f"# check: {_comment(n)} may belong to the prompt; then prompt: {{fields: [this, …]}}" for n in parts]
    if judging := [n for n in others if judged({n: None}) or (_numbers(columns[n]) and not re.search(_KEY, n))]:
        lines.append(f"# check: {_comment(', '.join(judging))} may say how good a response is")
    return [*lines, f"# Not used: {_comment(', '.join(others))}"] if others else lines


def _is_nested(value: Any) -> bool:
    return isinstance(value, list | dict)
