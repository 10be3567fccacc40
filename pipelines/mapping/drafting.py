"""A first mapping for a file, guessed from the names, types and values of a sample of its records.

A guess is a proposal: comments in the YAML say what was seen and what to check. Above all the meaning of a label
cannot be seen in a file: which end of a scale is good, or which side "1" means.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from pipelines.converters.messages import SYSTEM, judged
from pipelines.mapping import paths
from pipelines.mapping.leaning import leaning, snake, verdict

Column = list[Any]  # the values of a field that are there

_SAMPLE = 1_000
_DEPTH = 3  # how deep fields are looked for within a field
_FEW = 12  # a label has no more distinct values than this
_SHORT = 40  # characters of a label in words
_SIDES = [("a", "b"), ("1", "2"), ("0", "1"), ("left", "right"), ("first", "second"), ("one", "two"), ("x", "y")]
_SIDE_WORDS = {word for sides in _SIDES for word in sides}
# Further words for the first and the second side, as starts of words; those of scripts without spaces stand anywhere.
_FIRST = r"\b(erst|links|prim|izquierd|gauche|premi|esquerd|sinistr|перв|лев|الأول)|左|前者|第一|甲"
_SECOND = r"\b(zweit|rechts|segund|derech|droit|deuxi|second|direit|destr|втор|прав|الثان)|右|后者|後者|第二|乙"
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
    r"label|kto_tag|score|rating|rate|stars?|preference|preferred|winner|choice|vote|verdict|feedback|thumbs?|reward"
    r"|grade|quality|rank|like|liked|good|correct|acceptable|helpful|which|better|best|prefer|overall|opinion|evaluation"
    r"|bewertung|gewinner|besser|ganador|preferencia|puntuación|calificación|valoración|vencedor|avaliação|gagnant"
    r"|préférence|vincitore|valutazione|оценка|评分|得分|评价|偏好|評価|평가|(ال)?تقييم"
    r"|approved|passed|useful|usefulness|satisfaction|reaction|sentiment|accepted|zufriedenheit|hilfreich|bevorzugt|útil"
    r"|mejor|melhor|utile|meilleure?|migliore|лучший|предпочтение|满意度|打分|点赞|更好|哪个更好|胜者|満足度|만족도|점수"
)
_ANNOTATOR = r"annotator|user_id|worker|evaluator|rater|labeler|labeller|reviewer|completed_by"
_RATERS = r"(rater|annotator|judge|evaluator|reviewer|labell?er|grader|expert|human)[ _-]?[0-9]+"
_KEPT = r"id|model|model_.*|.*_model|language|lang|category|domain|source|timestamp|date"
# A label of such values means what its name says: a yes may be good or bad.
_YES_NO = r"yes|no|true|false|1|0|-1|y|n|ja|nein|oui|non|s[ií]|sim|não|да|нет|是|否|نعم|لا"
_RANK = "rank(ed|ing)?|rang|platz|place|puesto|order|ранг|место|排名|名次|順位"  # the first is the best
# What counts or measures something else than quality.
_MEASURES = (
    r"tokens?|length|counts?|time|timestamp|date|latency|duration|cost|price|temperature|top_p|seed|turns?|year|age|index"
    r"|position|page|row|line|number|num|n|no|version|split|size|weight"
)
_ORDERS = [  # words from the worst to the best; one of a group
    "terrible|awful very.poor|very.bad poor|bad fair|mediocre ok|okay|average|neutral good very.good|great excellent"
    " perfect",
    "negative neutral|mixed positive",
    "非常差|很差 差 一般|中等 好 非常好|很好",
    "sehr.schlecht schlecht mittel|mittelmäßig|neutral gut sehr.gut",
    "muy.mal[oa]? mal[oa]? regular buen[oa]? muy.buen[oa]?",
    "très.mauvaise? mauvaise? moyen(ne)? bon(ne)? très.bon(ne)?",
]
_LIKERT = [  # of these, what was not seen between others is known all the same
    "strongly.disagree disagree neutral|neither.agree.nor.disagree agree strongly.agree",
    "very.low low medium|moderate high very.high",
    "very.unsatisfied|very.dissatisfied unsatisfied|dissatisfied neutral satisfied very.satisfied",
    "very.unhelpful unhelpful|not.helpful neutral somewhat.helpful|slightly.helpful helpful very.helpful",
    "incorrect|wrong partially.correct|partly.correct correct",
    "非常不满意 不满意 一般 满意 非常满意",
    "非常に不満 不満 普通 満足 非常に満足",
]
# What tells responses apart and does not judge them, though a few short words say it.
_CATEGORY = (
    r"id|uuid|model|language|lang|locale|country|region|category|domain|topic|subject|theme|type|kind|source|dataset"
    r"|corpus|split|subset|fold|version|date|day|month|year|time|timestamp|title|name|author|user|role|platform|device"
    r"|channel|format|license|task|intent|skill|difficulty|persona|gender|annotator|worker|rater|labell?er|reviewer"
    r"|sprache|langue|idioma|lingua|язык|语言|言語|언어|modell|modelo|modèle|modello|модель|模型|kategorie|catégorie"
    r"|categor[ií]a|категория|类别|分类|quelle|fuente|fonte|источник|来源|datum|fecha|data|дата|日期|thema|sujet|tema|тема"
)
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
    r"\w ?[=≈~]+ ?\w|tie|draw|equal|same|both|neither|none"
    r"|empate|unentschieden|gleich|égalité|pareggio|ничья|平局|平手|相同|تعادل",
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
    found = {n: [m.end() for m in re.finditer(parts, snake(n), re.IGNORECASE)] for n in columns if n not in used}
    whole = [n for n in found if re.fullmatch(f"({pattern})s?", n, re.IGNORECASE)]
    others = [n for n, ends in found.items() if ends and n not in whole]
    return whole + sorted(others, key=lambda n: len(snake(n)) not in found[n])


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


def _in_order(columns: dict[str, Column], used: list[str], needed: int) -> list[str]:
    """The fields of prose as they stand, but what may be labels last where as many others as needed are left."""
    prose = [n for n in columns if n in _longest(columns, used)]
    sure = [n for n in prose if not _come_again(columns[n])]
    return sure + [n for n in prose if n not in sure] if len(sure) >= needed else prose


def _sides(columns: dict[str, Column], used: list[str]) -> tuple[str, str] | None:
    """Two text fields whose names differ in a side only, such as answer_a and answer_b."""
    texts = [n for n in _spoken(columns, [n for n in columns if n not in used]) if _can_be_side(n, columns)]
    ranked = sorted(texts, key=lambda n: n not in _named(columns, _RESPONSE, used))
    return next(_paired(ranked, texts), None)


def _paired(names: list[str], others: list[str]) -> Iterator[tuple[str, str]]:
    """The pairs of one of `names` and one of `others` that differ in a side only."""
    for one in names:
        yield from ((one, other) for other in others if _differ(one, other))


def _differ(one: str, other: str) -> tuple[str, str] | None:
    """The sides in which two names differ, if they differ in nothing else."""
    parts, others = _parts(one), _parts(other)
    differing = [(a, b) for a, b in zip(parts, others, strict=False) if a != b]
    sides = differing[0] if len(parts) == len(others) and len(differing) == 1 else ("", "")
    side, opposite = map(str.lower, sides)
    return (side, opposite) if (side, opposite) in _SIDES else None


@lru_cache(maxsize=4096)  # every name of a file is compared with every other
def _parts(name: str) -> list[str]:
    return re.split(r"([^A-Za-z0-9]+|(?<=[a-z])(?=[A-Z0-9]))", name)


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
        return _prompt(columns, used, chosen[0], rejected[0]) + lines
    if sides := _sides(columns, used):
        used += sides
        lines = [f"first: {_said(sides[0], columns)}", f"second: {_said(sides[1], columns)}"]
        return _prompt(columns, used, *sides) + lines + _label_of_two(columns, used, _differ(*sides) or _SIDES[0])
    return _list_of_texts(columns, used) or _single(columns, used)


def _list_of_texts(columns: dict[str, Column], used: list[str]) -> list[str]:
    """The lines for a list of two responses, or of several and as many ranks or scores; none where there is no such."""
    lists = {n: values for n, values in columns.items() if n not in used and all(isinstance(v, list) for v in values)}
    texts = [n for n, values in lists.items() if all(len(v) > 1 and all(isinstance(t, str) for t in v) for v in values)]
    for name in texts[:1]:
        numbers = [n for n in lists if n != name and _fit(lists[name], lists[n])]
        used += [name, *numbers[:1]]
        if numbers:
            asked = [*_prompt(columns, used, name), f"responses: {_yaml(name)}"]
            return [*asked, *_where(numbers[0]), *_of_several(numbers[0], lists[numbers[0]])]
        if all(len(v) == 2 for v in lists[name]):
            sides = [f"first: {_yaml(f'{name}[0]')}", f"second: {_yaml(f'{name}[1]')}"]
            return [*_prompt(columns, used, name), *sides, *_label_of_two(columns, used, ("0", "1"))]
        used.remove(name)
    return []


def _fit(texts: Column, lists: Column) -> bool:
    """Whether there is a list of numbers for every list of texts, as long as it."""
    return [*map(len, texts)] == [*map(len, lists)] and all(_number(n) is not None for v in lists for n in v)


def _of_several(name: str, lists: Column) -> list[str]:
    """Ranks, where every list counts from 0 or 1 and the name allows it; else scores."""
    is_rank, is_score = (_named({name: []}, pattern, []) for pattern in (_RANK, _LABEL))
    for best in (0, 1) if is_rank or not is_score else ():
        if all(sorted(map(float, v)) == [*range(best, len(v) + best)] for v in lists):
            return [f"  rank: {best}  # check: the best has this rank, not the worst"]
    return _scale(name, [float(n) for v in lists for n in v], [])


def _said(name: str, columns: dict[str, Column]) -> str:
    """A prompt or response as the mapping says it: a path, and how a transcript or messages are read."""
    if markers := _markers(columns[name]):
        roles = ", ".join(f"{_in_quotes(m)}: {r}" for m, r in zip(markers, ("user", "assistant"), strict=True))
        return f"{{field: {_yaml(name)}, split: {{{roles}}}}}"
    if found := _messages_in(columns[name]):
        return f"{{field: {_yaml(name)}, messages: {{{_names_in(found)}}}}}"
    return _yaml(name)


def _markers(values: Column) -> tuple[str, str] | None:
    """What stands before the turns of the user and the assistant where all texts are transcripts."""
    texts = [v for v in values if isinstance(v, str)]
    fitting = (markers for markers in _MARKERS if all(marker.strip() in v for marker in markers for v in texts))
    return next(fitting, None) if texts else None


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
    if _markers(columns[name]):
        return True
    ends = [_messages_in([v])[-1] for v in columns[name] if isinstance(v, list) and _messages_in([v])]
    spoken = [str(m.get(next(k for k in _ROLE_KEYS if k in m))).lower() for m in ends]
    return bool(spoken) and all(_ROLES.get(who, who) == "assistant" for who in spoken)


def _prompt(columns: dict[str, Column], used: list[str], *responses: str) -> list[str]:
    """The prompt's line; none where the responses are the ends of conversations that their fields hold whole."""
    named = [n for n in _spoken(columns, _named(columns, _PROMPT, used)) if _can_be_prompt(n, columns)]
    if not named and all(_is_whole(name, columns) for name in responses):
        return []
    names = named or _in_order(columns, used, 1)
    if not names:
        return ["prompt: prompt  # none was found: name its field, join its file, or give one for all as {text: …}"]
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
        asked = [n for n in _texts(inner, [*inner]) if re.fullmatch(rf"item\.({_PROMPT})s?", n, re.IGNORECASE)]
        asked = [n for n in asked if n not in said and _can_be_prompt(n, inner)][:1]
        if asked == ["item.user"] and _named(columns, _PROMPT, []):  # who wrote an answer to the record's prompt
            asked = []
        if not said or not (label := _label_of_response(inner, [*said, *asked])):
            continue
        used += [name, *said]
        prompt = _prompt({n: inner[n] for n in asked + said} if asked else columns | inner, used, said[0])
        if any(n in inner for n in used if n not in said):
            prompt.append(f"# check: what stands before an item of {_comment(name)} is no part of its prompt")
        return [f"each: {_yaml(name)}", *prompt, f"response: {_yaml(said[0])}", *label]
    return []


def _single(columns: dict[str, Column], used: list[str]) -> list[str]:
    """One response, with a label if there is one; a demonstration where nothing can be one."""
    whole = [n for n in columns if n not in used and _is_whole(n, columns)]
    named = whole or [n for n in _spoken(columns, _named(columns, _RESPONSE, used)) if _can_be_prompt(n, columns)]
    if not named and (items := _items(columns, used)):
        return items
    prompts = [n for n in _spoken(columns, _named(columns, _PROMPT, used)) if _can_be_prompt(n, columns)]
    prose = [n for n in _longest(columns, used) if n not in prompts[:1]] if prompts else _in_order(columns, used, 2)[1:]
    names = named or sorted(prose, key=lambda n: _come_again(columns[n])) or ["response"]
    used.append(names[0])
    guess = "" if named else "  # a guess: check it"
    if names[0] not in columns:
        guess = "  # no response was found: name its field"
    found = names[0] in columns
    said = _said(names[0], columns) if found else names[0]
    asked = _prompt(columns if found else columns | {"response": []}, used, names[0])
    of_turns = _turns(names[0], columns)
    if label := _label_of_response(columns, used):
        unread = ["# check: turns are judged too, which is not read"] if _label(of_turns, []) else []
        return [*asked, f"response: {said}{guess}", *label, *unread]
    if label := _label_of_response(of_turns, []):
        told = [f"# check: only what is said of the last turn of {_comment(names[0])} is read, not of those before it"]
        return [*asked, f"response: {said}{guess}", *label, *told]
    return [
        *asked,
        f"demonstration: {said}{guess}",
        "# check: no label was found, so every response is an example to follow, with reward 1. With one: response"
        " instead, and label.",
    ]


def _label_of_response(columns: dict[str, Column], used: list[str]) -> list[str]:
    """The lines of the label of one response; none where no field can be one."""
    if raters := _raters(columns, used):
        return _label_of_one(raters, _all_of(columns, raters))
    if label := _label(columns, used):
        used.append(label)
        return _label_of_one(label, columns[label])
    return _unknown(likely, columns, used) if (likely := _may_judge(columns, used)) else []


def _turns(name: str, columns: dict[str, Column]) -> dict[str, Column]:
    """What is said of the turns of conversations beside role and text, as fields of the last turn."""
    lists = [v for v in columns.get(name, []) if isinstance(v, list)]
    inner = _columns(_messages_in(lists), [])
    return {f"{name}[-1].{path}": v for path, v in inner.items() if path not in (*_ROLE_KEYS, *_CONTENT_KEYS)}


def _unknown(names: list[str], columns: dict[str, Column], used: list[str]) -> list[str]:
    """A label that rejects every record until somebody says what it means."""
    used.append(names[0])
    return [
        *_where(names[0]),
        "  order: [worst, best]"
        "  # check: is this the label? Say what it means: docs/mapping.md. Until then all are rejected",
        f"  # seen: {_all_seen(columns[names[0]])}",
    ]


def _all_seen(values: Column) -> str:
    return _comment(", ".join(map(_in_quotes, _distinct(values))))


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
    """The field with the label of a response, by its name or else by its values."""
    plain = [n for n, values in columns.items() if n not in used and not any(map(_is_nested, values))]
    plain = [n for n in plain if not re.search(_KEY, n)]
    named = [n for n in _named(columns, _LABEL, used) if n in plain and _has_few(columns[n])]
    telling = [n for n in plain if _tells_quality(n, columns[n])]
    return next(iter(named + sorted(telling, key=lambda n: _says_yes(columns[n]))), None)


def _verdicts(columns: dict[str, Column], used: list[str], sides: tuple[str, str]) -> tuple[list[str], list[str]]:
    """The fields that tell the better of two, by name and values, and those that may, by either.

    What each response has its own of tells no winner, and a number only one that the responses are called by.
    """
    plain = [n for n, values in columns.items() if n not in used and not any(map(_is_nested, values))]
    plain = [n for n in plain if not any(_differ(n, other) or _differ(other, n) for other in columns)]
    named = [n for n in _named(columns, _LABEL, used) if n in plain]
    words = [n for n in named if not _numbers(columns[n]) or {*_distinct(columns[n])} == {*sides}]
    sure = [n for n in words if _tells_side(columns[n])]
    plain = [n for n in plain if not re.search(_KEY, n)]
    about = [n for n in plain if leaning(n) and _side_of(n, sides) is not None and _says_yes(columns[n])]
    maybe = [n for n in named if n in plain and _has_few(columns[n])]
    return sure, maybe + [n for n in plain if n in about or _tells_side(columns[n])]


def _has_few(values: Column) -> bool:
    return bool(_numbers(values)) or len(_distinct(values)) <= _FEW


def _tells_quality(name: str, values: Column) -> bool:
    """Whether the values are words for good and bad, stars, or words of a known order; numbers can be anything.

    A yes or no tells it where the name says of what.
    """
    distinct = [v for v in _distinct(values) if not _MISSING.fullmatch(v)]
    if _numbers(values) or len(distinct) < 2:
        return False
    if _says_yes(values):
        return leaning(name) != 0
    graded = bool(_ordered(distinct)) or all(_share(v) is not None for v in distinct)
    return graded or all(map(verdict, distinct))


def _says_yes(values: Column) -> bool:
    said = [_same(v) for v in _distinct(values) if not _MISSING.fullmatch(v)]
    return bool(said) and all(re.fullmatch(_YES_NO, v, re.IGNORECASE) for v in said)


def _may_judge(columns: dict[str, Column], used: list[str]) -> list[str]:
    """The fields that may say how good a response is.

    Those with words of judgement, then truth values, numbers, a few words that come again, and remarks.
    """
    others = [n for n in columns if n not in used and not re.search(_KEY, n)]
    plain = [n for n in others if not _is_prose(n, columns)]
    named = [n for n in plain if any(_hints({n: v}) for v in columns[n][:_FEW])]
    truths = [n for n in plain if all(isinstance(v, bool) for v in columns[n])]
    measures = _named(columns, _MEASURES, used)
    numbers = [n for n in plain if n not in measures and _numbers([_with_point(v) for v in columns[n]])]
    no_labels = {*_named(columns, _CATEGORY, used), *_asked_or_said(columns), *SYSTEM}
    few = [n for n in others if n not in no_labels and _are_few_words(columns[n])]
    remarks = [n for n in others if judged({n: None})]
    return list(dict.fromkeys(named + truths + numbers + few + remarks))


def _asked_or_said(columns: dict[str, Column]) -> list[str]:
    """The fields that are by their names prompts and responses, or parts of them."""
    ends = rf"(.*[\W_])?({_PROMPT}|{_RESPONSE})s?|{_PARTS}"
    return [n for n in columns if re.fullmatch(ends, snake(n), re.IGNORECASE)]


def _are_few_words(values: Column) -> bool:
    """Whether the values are short texts that come again, or too few to tell; a single one only where it is bad."""
    distinct = _distinct(values) if _are_short(values) else []
    if len(distinct) == 1:
        return leaning(distinct[0]) < 0 or verdict(distinct[0]) < 0
    return 1 < len(distinct) <= _FEW and (len(values) <= _FEW or len(distinct) < len(values))


def _come_again(values: Column) -> bool:
    return _are_short(values) and 1 < len(_distinct(values)) < min(len(values), _FEW + 1)


def _are_short(values: Column) -> bool:
    return all(isinstance(v, str) and len(v) <= _SHORT for v in values)


def _hints(value: Any, depth: int = 0) -> bool:
    """Whether a name or a text within the value is one of judgement."""
    if isinstance(value, dict) and depth < _DEPTH:
        told = judged(value) or any(isinstance(name, str) and leaning(name) for name in value)
        return told or any(_hints(v, depth + 1) for v in value.values())
    if isinstance(value, list) and depth < _DEPTH:
        return not any(map(_is_message, value)) and any(_hints(v, depth + 1) for v in value[:_FEW])
    return isinstance(value, str) and value.lower() in ("thumbs_up", "thumbs_down", "👍", "👎")


def _with_point(value: Any) -> Any:
    return value.replace(",", ".", 1) if isinstance(value, str) else value


def _tells_side(values: Column) -> bool:
    """Whether the values name one side or the other, or neither."""
    words = [v for v in _distinct(values) if not _TIE.search(v)]
    return len(words) > 1 and len(words) == sum(map(len, _placed(words)))


def _distinct(values: Column) -> list[str]:
    """The distinct values as text, the most frequent first; of what is too many, a few."""
    texts = (str(v).lower() if isinstance(v, bool) else v.strip() if isinstance(v, str) else repr(v)[:60]
             for v in values if not _is_huge(v))  # fmt: skip
    return [text for text, _ in Counter(t for t in texts if _encodable(t)).most_common(_FEW + 1)]


def _is_huge(value: Any) -> bool:
    return isinstance(value, int) and value.bit_length() > 64


def _numbers(values: Column) -> list[float]:
    """The values as numbers, if all are: NaN and such words as N/A aside."""
    found = []
    for value in values:
        number = _number(value)
        if number is not None:
            found.append(number)
        elif not (_is_nan(value) or (isinstance(value, str) and _MISSING.fullmatch(value.strip()))):
            return []
    return found


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


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


def _label_of_one(name: str | list[str], values: Column) -> list[str]:
    """Where the label of a response is, and what it means."""
    lines = _where(name)
    distinct = [v for v in _distinct(values) if not _MISSING.fullmatch(v)]
    missing = [v for v in _distinct(values) if _MISSING.fullmatch(v)]
    absent = [f"  missing: {_yaml(missing)}  # check: do these stand for no label?"] if missing else []
    good = [v for v in distinct if verdict(v) > 0]
    bad = [v for v in distinct if verdict(v) < 0]
    signed = {_same(v) for v in distinct} == {"-1", "0", "1"}
    numbers = _numbers(values)
    told = len(good) + len(bad) == len(distinct) and not signed
    if told and ((good and bad) or (len(distinct) == 1 and not numbers)):
        return [*lines, *_thumbs(name, good, bad), *absent]
    if numbers:
        return lines + _scale(name, numbers, [] if signed else _missing(values))
    return [*lines, *(_worded(name, _unlike(distinct)) if distinct else _unordered([])), *absent]


_IS_WORSE = "  # check: by its name, this says that a response is worse"


def _thumbs(name: str | list[str], good: list[str], bad: list[str]) -> list[str]:
    """Values of good and bad; a yes or no means what the name says, and of the others one may not have been seen."""
    lean = leaning(name) if isinstance(name, str) else 0
    neutral = _YES_NO + "|positive|negative" * (lean < 0)
    yes_no = [v for v in good + bad if re.fullmatch(neutral, _same(v), re.IGNORECASE)]
    told = ""
    if lean < 0 and not yes_no:
        told = "  # check: the name says that a response is worse; the values are read as they are"
    elif lean < 0 and len(yes_no) < len(good + bad):
        return _unordered(good + bad)
    elif lean < 0:
        good, bad, told = bad, good, _IS_WORSE
    elif yes_no and not lean:
        told = f"  # check: is {_comment(_in_quotes(yes_no[0]))} {'good' if yes_no[0] in good else 'bad'}?"
    if not good or not bad:
        told += "  # check: one value was seen"
    good, bad = good or ["good"], bad or ["bad"]
    return [f"  thumbs: {{good: {_yaml(good)}, bad: {_yaml(bad)}}}{told}"]


def _less_is_better(name: str | list[str]) -> bool:
    return isinstance(name, str) and (leaning(name) < 0 or _is_rank(name))


def _lower(name: str | list[str]) -> list[str]:
    told = "  # check: by its name, the first is the best" if _is_rank(str(name)) else _IS_WORSE
    return [f"  better: lower{told}"] if _less_is_better(name) else []


def _is_rank(name: str) -> bool:
    return bool(_named({name: []}, _RANK, []))


def _worded(name: str | list[str], values: list[str]) -> list[str]:
    """Shares of the best, such as 4/5; words of a known order; or the values, for somebody to put in their order."""
    worse = _less_is_better(name)
    if all(re.search("[%/]|out of", v.lower()) and _share(v) is not None for v in values):
        return ["  scale: unit  # shares of the best, such as 4/5 or 80%", *_lower(name)]
    if all(re.fullmatch("★+☆*", v) for v in values) and len(lengths := {*map(len, values)}) == 1 and not worse:
        listed = ", ".join(f"{_in_quotes(v)}: {v.count('★')}" for v in values)
        return [f"  map: {{{listed}}}  # check: other values are rejected", f"  stars: {max(2, *lengths)}"]
    if worse:
        return _unordered(values)
    if len(shares := {v: share for v in values if (share := _share(v)) is not None}) == len(values):
        listed = ", ".join(f"{_in_quotes(v)}: {share:.6g}" for v, share in shares.items())
        return [f"  map: {{{listed}}}  # check: other values are rejected", "  scale: unit"]
    if len(numbers := _numbers([_with_point(v) for v in values])) == len(values):
        return _scale(name, numbers, [])
    if ordered := _ordered(values):
        return [f"  order: {_yaml(ordered)}  # check: must go from the worst to the best, the ones not seen too"]
    return _unordered(values)


def _unordered(values: list[str]) -> list[str]:
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
    """The values from the worst to the best, if all are words of one of the known orders.

    With those that were not seen between others, where the order is one that questionnaires have.
    """
    for order in _ORDERS + _LIKERT:
        steps = order.split()
        places = {i: v for v in values for i, words in enumerate(steps) if re.fullmatch(words, _same(v))}
        if len(places) == len(values):
            between = range(min(places), max(places) + 1) if order in _LIKERT and len(places) > 2 else sorted(places)
            return [places.get(i) or steps[i].split("|")[0].replace(".", " ") for i in between]
    return []


def _unlike(values: list[str]) -> list[str]:
    """Two or more values for an order, with a word for what was not seen where there is one only."""
    kept = _unalike(values)
    return kept if len(kept) > 1 else [*kept, _another(kept)]


def _unalike(values: list[str]) -> list[str]:
    """Of values that differ in case or spelling of a number only, the first: they are one value to a mapping."""
    seen: dict[str, str] = {}
    for value in values:
        seen.setdefault(_same(value), value)
    return list(seen.values())


def _same(value: str) -> str:
    from pipelines.mapping.judgements import canonical

    return canonical(value)


def _another(values: list[str]) -> str:
    return next(word for word in ("bad", "good", "other") if word not in map(_same, values))


def _scale(name: str | list[str], numbers: list[float], missing: list[Any]) -> list[str]:
    real = [n for n in numbers if n not in missing] or numbers
    low, high = min(real), max(real)
    worse = _less_is_better(name)
    absent = [f"  missing: {_yaml(missing)}  # check: do these stand for no label?"] if missing else []
    lines = [*absent, *_lower(name)]
    more = "" if worse else ", and that more is better"
    seen = f"  # check the ends of the scale{more}; seen were {low:g} to {high:g}"
    if not worse and low >= 1 and high in (5, 10) and all(n == int(n) for n in real):
        return [f"  stars: {int(high)}{seen}", *lines]
    for a, b in ((0, 1), (1, 5), (0, 4), (0, 5), (1, 7), (0, 10), (1, 10), (0, 100), (-1, 1)):
        if a <= low and high <= b:
            return [f"  score: [{a}, {b}]{seen}", *lines]
    return [f"  scale: sigmoid  # no known scale: check; seen were {low:g} to {high:g}; or score: [low, high]", *lines]


def _label_of_two(columns: dict[str, Column], used: list[str], sides: tuple[str, str]) -> list[str]:
    """The label of a pair of these `sides`: a mark or a number for each, or a field that tells the winner."""
    sure, maybe = _verdicts(columns, used, sides)
    if not sure and (lines := _of_each(columns, used) or _by_name(columns, used)):
        return lines
    raters = _raters(columns, used)
    if not (name := raters or (sure + maybe or [""])[0]):
        likely = _may_judge(columns, used)
        used += likely[:1]
        if not likely:
            return ["label:", "  field: winner  # no label was found: name its field", _WINNER]
        return [*_where(likely[0]), f"{_WINNER}  # is this the label? seen: {_all_seen(columns[likely[0]])}"]
    used += [name] if isinstance(name, str) else []
    values = _all_of(columns, raters or [str(name)])
    signed = set(_numbers(values)) <= {-1, 0, 1}
    missing = [] if signed else _missing(values)
    numbers = [n for n in _numbers(values) if n not in missing]
    lean = leaning(name) if isinstance(name, str) else 0
    side = _side_of(str(name), sides) if lean else None
    turned = (lean < 0) != (side == 0)
    lines = [*_where(name), *([f"  missing: {_yaml(missing)}  # check"] if missing else [])]
    if len(set(numbers)) > 2 and set(numbers) != {0, 1, 2}:
        low, high = _ends(numbers)
        seen = f"seen were {min(numbers):g} to {max(numbers):g}"
        low, high = (high, low) if turned else (low, high)
        check = f"# check the ends, and which of them means the first; {seen}"
        return [*lines, f"  preference: {{first: {low:g}, second: {high:g}}}  {check}"]
    absent = {_same(str(v)) for v in missing}
    distinct = [v for v in _distinct(values) if _same(v) not in absent]
    if side is not None and _says_yes(distinct):
        yes = [v for v in distinct if verdict(v) > 0]
        no = [v for v in distinct if v not in yes and not _MISSING.fullmatch(v)]
        first, second = (yes, no) if turned else (no, yes)
        told = f"first: {_yaml(first or [_another(second)])}, second: {_yaml(second or [_another(first)])}"
        return [*lines, f"  winner: {{{told}}}  # check: does {_comment(str(name))} say so?"]
    return [*lines, _winner(distinct, bool(numbers), lean < 0)]


def _of_each(columns: dict[str, Column], used: list[str]) -> list[str]:
    """The lines for two fields that judge a response each: which of them won, or numbers to compare."""
    free = {n: values for n, values in columns.items() if n not in used and (_numbers(values) or _marks(values))}
    telling = [*_named(free, _LABEL, []), *(n for n in free if leaning(n) or _is_rank(n))]
    two = next(_paired(telling, telling), None)
    if not two:
        return []
    used += two
    lower = all(map(_less_is_better, two))
    marked = {sum(both) for both in zip(*(_marks(columns[n]) for n in two), strict=False)}
    ties = [n for n in free if any(map(_TIE.fullmatch, re.split(r"[\W_]+", snake(n)))) and _marks(free[n])]
    if leaning(two[0]) and (marked == {1} or (ties and marked == {0, 1})):
        used += ties[:1]
        first, second = map(_in_list, two[::-1] if lower else two)
        tie = f", tie: {_in_list(ties[0])}" if ties else ""
        told = _IS_WORSE if lower else "  # check: does a 1 mark the better one?"
        return ["label:", f"  one_hot: {{first: {first}, second: {second}{tie}}}{told}"]
    texts = [] if all(_numbers(columns[n]) for n in two) else ['  map: {"true": 1, "false": 0}']
    compare = "lower  # check: is less" if lower else "higher  # check: is more"
    return ["label:", f"  fields: {_yaml(list(two))}", *texts, f"  compare: {compare} better?"]


def _marks(values: Column) -> list[int]:
    """The values as 1 and 0, if all are such or truth values."""
    plain = [v for v in values if not _is_nested(v) and not _is_huge(v)]
    found = [{"true": 1, "1": 1, "false": 0, "0": 0}.get(_same(v)) for v in plain]
    return [mark for mark in found if mark is not None] if len(plain) == len(values) and None not in found else []


def _by_name(columns: dict[str, Column], used: list[str]) -> list[str]:
    """The lines for a field that holds what one of two others does, such as the name of the model that won."""
    texts = {n: values for n, values in columns.items() if all(isinstance(v, str) for v in values)}
    texts = {n: values for n, values in texts.items() if not _says_yes(values)}
    for name in [*_named(texts, _LABEL, used), *(n for n in texts if n not in used and leaning(n))]:
        said = {_same(v): v for v in texts[name]}
        others = [n for n in texts if n != name]
        for two in _paired(others, others) if not said.keys() & _SIDE_WORDS else ():
            strange = [v for same, v in said.items() if same not in {_same(v) for n in two for v in texts[n]}]
            ties = [v for v in strange if _TIE.search(v)]
            missing = [v for v in strange if v not in ties and _MISSING.fullmatch(v)]
            if len(ties + missing) < len(strange) or len(strange) == len(said):
                continue
            used += [name, *(n for n in two if n not in used and not re.fullmatch(_KEPT, n, re.IGNORECASE))]
            first, second = map(_in_list, two[::-1] if leaning(name) < 0 else two)
            tie = f", tie: {_yaml(ties)}" if ties else ""
            sides = f"first: {{field: {first}}}, second: {{field: {second}}}{tie}"
            told = _IS_WORSE if leaning(name) < 0 else "  # check: does it name the better one?"
            absent = [f"  missing: {_yaml(missing)}  # check"] if missing else []
            return [*_where(name), f"  winner: {{{sides}}}{told}", *absent]
    return []


def _side_of(name: str, sides: tuple[str, str]) -> int | None:
    """Which of two sides a name is about, such as `a_is_better`; None for both or neither."""
    said = re.split(r"[\W_]+", snake(name).lower())
    pairs = (sides, ("a", "b"), ("left", "right"), ("first", "second"))
    return next((int(b in said) for a, b in pairs if (a in said) != (b in said)), None)


def _ends(numbers: list[float]) -> tuple[float, float]:
    """The ends of a scale between two responses, its middle a tie."""
    low, high = min(numbers), max(numbers)
    if low < 0:
        return -max(-low, high), max(-low, high)
    scales = ((0, 1), (1, 3), (1, 5), (1, 7), (1, 9), (1, 10), (0, 10), (0, 100))
    return next(((a, b) for a, b in scales if a <= low and high <= b), (low, high))


_WINNER = (
    '  winner: {first: ["first is better"], second: ["second is better"]}'
    "  # check: put the values here; until then all are rejected"
)


def _winner(distinct: list[str], numbers: bool = False, worse: bool = False) -> str:
    """Values in three groups: ties (of 0, 1 and 2, the 0), and the others by the side they name, or of two numbers in
    order. What names no side is not placed."""
    distinct = _unalike([v for v in distinct if not _MISSING.fullmatch(v) or _TIE.search(v)])
    ties = [v for v in distinct if _TIE.search(v) or (numbers and len(distinct) == 3 and _same(v) == "0")]
    others = sorted(v for v in distinct if v not in ties)
    first, second = _placed(others)
    if len(others) == 2 and numbers and not (first and second):
        first, second = others[:1], others[1:]
    worst = {v for v in others if leaning(v) < 0}
    first, second = (
        [v for v in others if v in (b if v in worst else a)] for a, b in ((first, second), (second, first))
    )
    if not first or not second:
        return f"{_WINNER}  # seen: {_comment(', '.join(map(_in_quotes, distinct)))}"
    first, second, told = (second, first, _IS_WORSE) if worse else (first, second, "")
    tie = f", tie: {_yaml(ties)}" if ties else ""
    if unplaced := [v for v in others if v not in first + second]:
        told += f"  # not placed, so rejected: {_comment(', '.join(map(_in_quotes, unplaced)))}"
    sides = f"first: {_yaml(first)}, second: {_yaml(second)}{tie}"
    return f"  winner: {{{sides}}}  # check: which value means which side?{told}"


def _placed(values: list[str]) -> tuple[list[str], list[str]]:
    """The values that name the first of two sides and those that name the second, by the words that place the most.

    Of A > B, it is A that is named.
    """
    words = {v: re.split(r"[\W_]+", snake(_greater(v)).lower()) for v in values}
    sides = [({v for v in values if a in words[v]}, {v for v in values if b in words[v]}) for a, b in _SIDES]
    sides.append(({v for v in values if _names(_FIRST, v)}, {v for v in values if _names(_SECOND, v)}))
    clear = [(first - second, second - first) for first, second in sides if first - second and second - first]
    first, second = max(clear, key=lambda found: len(found[0] | found[1]), default=(set(), set()))
    return sorted(first), sorted(second)


def _greater(value: str) -> str:
    """What stands at the open end of the first sign such as `>` or `<<`; all of a value that has none."""
    sign = re.search("[<>≻≺]+", value)
    if not sign:
        return value
    return value[: sign.start()] if sign[0][0] in ">≻" else value[sign.end() :]


def _names(pattern: str, value: str) -> bool:
    return re.search(pattern, value, re.IGNORECASE) is not None


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
