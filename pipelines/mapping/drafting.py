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
    r"label|score|rating|rate|stars?|preference|preferred|winner|choice|vote|verdict|feedback|thumbs?|reward|grade|quality"
    r"|rank|like|liked|good|correct|acceptable|helpful|which|better|best|prefer|overall|opinion|evaluation"
    r"|bewertung|gewinner|besser|ganador|preferencia|puntuación|calificación|valoración|vencedor|avaliação|gagnant"
    r"|préférence|vincitore|valutazione|оценка|评分|得分|评价|偏好|評価|평가|(ال)?تقييم"
    r"|approved|passed|useful|usefulness|satisfaction|reaction|sentiment|accepted|zufriedenheit|hilfreich|bevorzugt|útil"
    r"|mejor|melhor|utile|meilleure?|migliore|лучший|предпочтение|满意度|打分|点赞|更好|哪个更好|胜者|満足度|만족도|점수"
)
_ANNOTATOR = r"annotator|user_id|worker|evaluator|rater|labeler|labeller|reviewer|completed_by"
_RATERS = r"(rater|annotator|judge|evaluator|reviewer|labell?er|grader|expert|human)[ _-]?[0-9]+"
_KEPT = r"id|model|model_.*|.*_model|language|lang|category|domain|source|timestamp|date"
_GOOD = "good|up|thumbs[ _]?up|👍|yes|true|liked?|positive|correct|accept(ed)?|1|ja|oui|s[ií]|gut|好|是|对|赞|да|نعم"
_GOOD += (
    "|approved|pass(ed)?|helpful|useful|safe|satisfied|sim|bueno|bon|満足|良い|満意|满意|好评|有用|좋아요|хорошо|جيد"
)
_GOOD += "|❤|😀|😃|🙂|😊|✅|✔|💯"
_BAD = "bad|down|thumbs[ _]?down|👎|no|false|disliked?|negative|wrong|incorrect|reject(ed)?|0|-1|nein|non"
_BAD += "|schlecht|坏|否|错|踩|нет|لا|fail(ed)?|(un|not[ _])helpful|useless|unsafe|(un|dis)satisfied|não|malo|mauvais"
_BAD += "|不満|悪い|不满意|差评|没用|싫어요|плохо|سيئ|💔|😞|🙁|☹|😠|😡|❌|✖|✗|✘"
# A label of such a name is higher, or yes, where the response is worse.
_WORSE = re.compile(
    r"wors[et]|bad(?!ge)|dislik|downvot|toxic|harm(?!less)|unsafe|hallucinat|error|mistake|severity|violat|offensive|(?<!un)bias|risk"
    r"|problem|issue|complain|fail|incorrect|wrong|reject|loser|losing|fehler|schlecht|peor|pire|худш|更差|错误|有害|毒性",
    re.IGNORECASE,
)
# What counts or measures something else than quality.
_MEASURES = (
    r"tokens?|length|counts?|time|timestamp|date|latency|duration|cost|price|temperature|top_p|seed|turns?|year|age|index"
    r"|position|page|row|line|number|num|n|no|version|split|size"
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
        return _prompt(columns, used, chosen[0], rejected[0]) + lines
    if sides := _sides(columns, used):
        used += sides
        lines = [f"first: {_said(sides[0], columns)}", f"second: {_said(sides[1], columns)}"]
        return _prompt(columns, used, *sides) + lines + _label_of_two(columns, used)
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
            return [*asked, *_where(numbers[0]), *_of_several(lists[numbers[0]])]
        if all(len(v) == 2 for v in lists[name]):
            sides = [f"first: {_yaml(f'{name}[0]')}", f"second: {_yaml(f'{name}[1]')}"]
            return [*_prompt(columns, used, name), *sides, *_label_of_two(columns, used)]
        used.remove(name)
    return []


def _fit(texts: Column, lists: Column) -> bool:
    """Whether there is a list of numbers for every list of texts, as long as it."""
    return [*map(len, texts)] == [*map(len, lists)] and all(_number(n) is not None for v in lists for n in v)


def _of_several(lists: Column) -> list[str]:
    """Ranks, where every list counts from 0 or 1; else scores."""
    for best in (0, 1):
        if all(sorted(map(float, v)) == [*range(best, len(v) + best)] for v in lists):
            return [f"  rank: {best}  # check: the best has this rank, not the worst"]
    return _scale([float(n) for v in lists for n in v], [])


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
    names = named or [n for n in columns if n in _longest(columns, used)]
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
        if not said or not (label := _label(inner, said)):
            continue
        used.append(name)
        asked = _prompt({**columns, said[0]: inner[said[0]]}, used, said[0])
        judged_so = _label_of_one(label, inner[label])
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
        return [*asked, f"response: {said}{guess}", *_label_of_one(raters, _all_of(columns, raters))]
    label = _label(columns, used)
    if not label and (likely := _may_judge(columns, used)):
        return [*asked, f"response: {said}{guess}", *_unknown(likely, columns, used)]
    if not label:
        return [
            *asked,
            f"demonstration: {said}{guess}",
            "# No label was found, so every response is an example to follow. With one: response instead, and label.",
        ]
    used.append(label)
    return [*asked, f"response: {said}{guess}", *_label_of_one(label, columns[label])]


def _unknown(names: list[str], columns: dict[str, Column], used: list[str]) -> list[str]:
    """A label that rejects every record until somebody says what it means."""
    used.append(names[0])
    return [
        *_where(names[0]),
        "  order: [worst, best]  # is this the label? Say what it means (docs/mapping.md); until then all are rejected",
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


def _label(columns: dict[str, Column], used: list[str], sides: bool = False) -> str | None:
    """The field with a label, by its name or else by its values: of two `sides`, or of good and bad."""
    plain = [n for n, values in columns.items() if not any(isinstance(v, list | dict) for v in values)]
    named = [n for n in _named(columns, _LABEL, used) if n in plain and not re.search(_KEY, n)]
    fitting = [n for n in named if _numbers(columns[n]) or len(_distinct(columns[n])) <= _FEW]
    telling = _tells_side if sides else _tells_quality
    others = [n for n in plain if n not in used and not re.search(_KEY, n) and telling(columns[n])]
    return next(iter(fitting + others), None)


def _tells_quality(values: Column) -> bool:
    """Whether the values are words for good and bad, stars, or words of a known order; numbers can be anything."""
    distinct = [v for v in _distinct(values) if not _MISSING.fullmatch(v)]
    if _numbers(values) or len(distinct) < 2:
        return False
    graded = bool(_ordered(distinct)) or all(_share(v) is not None for v in distinct)
    return graded or all(re.fullmatch(f"{_GOOD}|{_BAD}", _same(v), re.IGNORECASE) for v in distinct)


def _may_judge(columns: dict[str, Column], used: list[str]) -> list[str]:
    """The fields that may say how good a response is: with words of judgement, then truth values, then numbers."""
    others = [n for n in columns if n not in used and not re.search(_KEY, n) and not _is_prose(n, columns)]
    named = [n for n in others if any(_hints({n: v}) for v in columns[n][:_FEW])]
    truths = [n for n in others if all(isinstance(v, bool) for v in columns[n])]
    measures = _named(columns, _MEASURES, used)
    numbers = [n for n in others if n not in measures and _numbers([_with_point(v) for v in columns[n]])]
    return list(dict.fromkeys(named + truths + numbers))


def _hints(value: Any, depth: int = 0) -> bool:
    """Whether a name or a text within the value is one of judgement."""
    if isinstance(value, dict) and depth < _DEPTH:
        told = judged(value) or any(isinstance(name, str) and re.search(_WORSE, name) for name in value)
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


def _label_of_one(name: str | list[str], values: Column) -> list[str]:
    """Where the label of a response is, and what it means."""
    lines, worse = _where(name), isinstance(name, str) and re.search(_WORSE, name) is not None
    distinct = [v for v in _distinct(values) if not _MISSING.fullmatch(v)]
    missing = [v for v in _distinct(values) if _MISSING.fullmatch(v)]
    absent = [f"  missing: {_yaml(missing)}  # check: do these stand for no label?"] if missing else []
    good = [v for v in distinct if re.fullmatch(_GOOD, _same(v), re.IGNORECASE)]
    bad = [v for v in distinct if re.fullmatch(_BAD, _same(v), re.IGNORECASE)]
    signed = {_same(v) for v in distinct} == {"-1", "0", "1"}
    if good and bad and len(good) + len(bad) == len(distinct) and not signed:
        good, bad, told = (bad, good, _IS_WORSE) if worse else (good, bad, "")
        return [*lines, f"  thumbs: {{good: {_yaml(good)}, bad: {_yaml(bad)}}}{told}", *absent]
    if numbers := _numbers(values):
        lower = [f"  better: lower{_IS_WORSE}"] if worse else []
        return lines + _scale(numbers, [] if signed else _missing(values), stars=not worse) + lower
    if len(distinct) < 2 and (good or bad):
        sides = (distinct, [_another(distinct)])
        good, bad = sides if bool(good) != worse else sides[::-1]
        return [*lines, f"  thumbs: {{good: {_yaml(good)}, bad: {_yaml(bad)}}}  # check: one value was seen", *absent]
    return [*lines, *(_worded(_unlike(distinct), worse) if distinct else _unordered([])), *absent]


_IS_WORSE = "  # check: by its name, this says that a response is worse"


def _worded(values: list[str], worse: bool = False) -> list[str]:
    """Shares of the best, such as 4/5; words of a known order; or the values, for somebody to put in their order."""
    if all(re.search("[%/]|out of", v.lower()) and _share(v) is not None for v in values):
        return ["  scale: unit  # shares of the best, such as 4/5 or 80%"]
    if all(re.fullmatch("★+☆*", v) for v in values) and len(lengths := {*map(len, values)}) == 1 and not worse:
        listed = ", ".join(f"{_in_quotes(v)}: {v.count('★')}" for v in values)
        return [f"  map: {{{listed}}}  # check: other values are rejected", f"  stars: {max(2, *lengths)}"]
    if worse:
        return _unordered(values)
    if len(shares := {v: share for v in values if (share := _share(v)) is not None}) == len(values):
        listed = ", ".join(f"{_in_quotes(v)}: {share:.6g}" for v, share in shares.items())
        return [f"  map: {{{listed}}}  # check: other values are rejected", "  scale: unit"]
    if len(numbers := _numbers([_with_point(v) for v in values])) == len(values):
        return _scale(numbers, [])
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


def _scale(numbers: list[float], missing: list[Any], stars: bool = True) -> list[str]:
    real = [n for n in numbers if n not in missing] or numbers
    low, high = min(real), max(real)
    lines = [f"  missing: {_yaml(missing)}  # check: do these stand for no label?"] if missing else []
    seen = f"  # check the ends of the scale, and that more is better; seen were {low:g} to {high:g}"
    if stars and low >= 1 and high in (5, 10) and all(n == int(n) for n in real):
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
    if not (name := raters or _label(columns, used, sides=True)):
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
    worse = isinstance(name, str) and re.search(_WORSE, name) is not None
    lines = [*_where(name), *([f"  missing: {_yaml(missing)}  # check"] if missing else [])]
    if len(set(numbers)) > 2 and set(numbers) != {0, 1, 2}:
        low, high = _ends(numbers)
        seen = f"seen were {min(numbers):g} to {max(numbers):g}"
        low, high = (high, low) if worse else (low, high)
        check = f"# check the ends, and which of them means the first; {seen}"
        return [*lines, f"  preference: {{first: {low:g}, second: {high:g}}}  {check}"]
    absent = {_same(str(v)) for v in missing}
    return [*lines, _winner([v for v in _distinct(values) if _same(v) not in absent], bool(numbers), worse)]


def _ends(numbers: list[float]) -> tuple[float, float]:
    """The ends of a scale between two responses, its middle a tie."""
    low, high = min(numbers), max(numbers)
    if low < 0:
        return -max(-low, high), max(-low, high)
    scales = ((0, 1), (1, 3), (1, 5), (1, 7), (1, 9), (1, 10), (0, 10), (0, 100))
    return next(((a, b) for a, b in scales if a <= low and high <= b), (low, high))


_WINNER = '  winner: {first: ["a"], second: ["b"], tie: ["tie"]}  # check: which value means which side?'


def _winner(distinct: list[str], numbers: bool = False, worse: bool = False) -> str:
    """Values in three groups: ties (of 0, 1 and 2, the 0), and the others by the side they name, or of two numbers in
    order. What names no side is not placed."""
    distinct = _unalike([v for v in distinct if not _MISSING.fullmatch(v) or _TIE.search(v)])
    ties = [v for v in distinct if _TIE.search(v) or (numbers and len(distinct) == 3 and _same(v) == "0")]
    others = sorted(v for v in distinct if v not in ties)
    first, second = _placed(others)
    if len(others) == 2 and numbers and not (first and second):
        first, second = others[:1], others[1:]
    if not first or not second:
        return f"{_WINNER}  # seen: {_comment(', '.join(map(_in_quotes, distinct)))}"
    first, second, told = (second, first, _IS_WORSE) if worse else (first, second, "")
    tie = f", tie: {_yaml(ties)}" if ties else ""
    if unplaced := [v for v in others if v not in first + second]:
        told += f"  # not placed, so rejected: {_comment(', '.join(map(_in_quotes, unplaced)))}"
    sides = f"first: {_yaml(first)}, second: {_yaml(second)}{tie}"
    return f"  winner: {{{sides}}}  # check: which value means which side?{told}"


def _placed(values: list[str]) -> tuple[list[str], list[str]]:
    """The values that name the first of two sides and those that name the second, by the words that place the most."""
    words = {v: re.split(r"[\W_]+", _words(v).lower()) for v in values}
    sides = [({v for v in values if a in words[v]}, {v for v in values if b in words[v]}) for a, b in _SIDES]
    sides.append(({v for v in values if _names(_FIRST, v)}, {v for v in values if _names(_SECOND, v)}))
    clear = [(first - second, second - first) for first, second in sides if first - second and second - first]
    first, second = max(clear, key=lambda found: len(found[0] | found[1]), default=(set(), set()))
    return sorted(first), sorted(second)


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
