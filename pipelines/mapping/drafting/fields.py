"""The fields of a file: what they are called, what they hold, and how a mapping writes both."""

import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from pipelines.mapping import paths
from pipelines.mapping.leaning import snake

Column = list[Any]  # the values of a field that are there
DEPTH = 3  # how deep fields are looked for within a field
FEW = 12  # a label has no more distinct values than this
SIDES = [("a", "b"), ("1", "2"), ("0", "1"), ("left", "right"), ("first", "second"), ("one", "two"), ("x", "y")]
PROMPT = (
    r"prompt|question|instruction|query|input|user|asked|context|conversation|messages|history|post|request|task"
    r"|frage|pregunta|pergunta|domanda|вопрос|问题|問題|提问|指令|質問|질문|(ال)?سؤال"
)
RESPONSE = (
    r"response|answer|completion|output|reply|generation|generated|assistant|bot|model_output|text|summary"
    r"|antwort|respuesta|resposta|réponse|risposta|ответ|回答|答案|回复|応答|답변|(ال)?(إجابة|جواب)"
)
LABEL = (
    r"label|kto_tag|score|rating|rate|stars?|preference|preferred|winner|choice|vote|verdict|feedback|thumbs?|reward"
    r"|grade|quality|rank|like|liked|good|correct|acceptable|helpful|which|better|best|prefer|overall|opinion|evaluation"
    r"|bewertung|gewinner|besser|ganador|preferencia|puntuación|calificación|valoración|vencedor|avaliação|gagnant"
    r"|préférence|vincitore|valutazione|оценка|评分|得分|评价|偏好|評価|평가|(ال)?تقييم"
    r"|approved|passed|useful|usefulness|satisfaction|reaction|sentiment|accepted|zufriedenheit|hilfreich|bevorzugt|útil"
    r"|mejor|melhor|utile|meilleure?|migliore|лучший|предпочтение|满意度|打分|点赞|更好|哪个更好|胜者|満足度|만족도|점수"
)
RATERS = r"(rater|annotator|judge|evaluator|reviewer|labell?er|grader|expert|human)[ _-]?[0-9]+"
KEPT = r"id|model|model_.*|.*_model|language|lang|category|domain|source|timestamp|date"
ABOUT = "judg(e)?ments?|critique|rationale|explanation|comments?|reason(ing)?|review|notes?|id|uuid|language|category"
KEY = re.compile(r"(^|[^a-z])(ids?|uuid|hash|sha256)(?![a-z])|^[a-z]{1,2}ids?$", re.IGNORECASE)  # and no label
PARTS = r"(.*[ _-])?(context|passage|document|article|background|history)s?"  # of a prompt, beside the question
ROLE_KEYS = ("role", "from", "speaker", "author", "sender")
ROLES = {"human": "user", "user": "user", "client": "user", "customer": "user", "prompter": "user", "gpt": "assistant",
          "assistant": "assistant", "bot": "assistant", "model": "assistant", "ai": "assistant", "chatgpt": "assistant",
          "agent": "assistant", "system": "system", "tool": "tool"}  # fmt: skip
MISSING = re.compile(r"#?n/?a[!?]?|#[A-Z]+[/0]*[!?]|nan|null|none|error|unknown|skip(ped)?|-", re.IGNORECASE)


def columns(records: list[dict[str, Any]], cells: list[str]) -> dict[str, Column]:
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
    alone = isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict) and not is_message(value[0])
    if alone and depth < DEPTH:
        inner = [*_leaves(f"{path}[0]", value[0], depth + 1)]
        if any(is_message(found) for _, found in inner):
            yield from inner
            return
    if isinstance(value, dict) and value and not is_message(value) and depth < DEPTH:
        for key, own in value.items():
            if isinstance(key, str) and _can_be_named(key):
                yield from _leaves(f"{path}.{paths.quoted(key)}", own, depth + 1)
    elif not _is_blank(value):
        yield path, value


def _is_blank(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def is_message(value: Any) -> bool:
    """An object with a role; under a name that is no role everywhere, such as `author`, one that is known."""
    if not isinstance(value, dict):
        return False
    return any(name in value and (name in ("role", "from") or str(value[name]).lower() in ROLES) for name in ROLE_KEYS)


def json_cells(records: list[dict[str, Any]]) -> list[str]:
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


def comment(text: str) -> str:
    return "".join(c if c.isprintable() and _encodable(c) else " " for c in text)[:400]


def yaml(value: Any) -> str:
    """A value on one line: JSON is YAML, and a plain name needs no quotes."""
    if isinstance(value, str) and re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.]*", value) and not _is_word(value):
        return value
    if isinstance(value, list):
        return "[" + ", ".join(map(in_list, value)) + "]"
    return in_quotes(value)


def in_list(value: Any) -> str:
    return in_quotes(value) if isinstance(value, str) and not value.isidentifier() else yaml(value)


def in_quotes(value: Any) -> str:
    """JSON, but of what cannot be printed an escape that YAML knows (it has no pairs of surrogates)."""
    written = json.dumps(value, ensure_ascii=False)
    return "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in written)


def _is_word(value: str) -> bool:
    """Words that YAML takes for something else than text."""
    return value.lower() in ("true", "false", "yes", "no", "on", "off", "null", "y", "n", "nan", "inf")


def named(columns: dict[str, Column], pattern: str, used: list[str]) -> list[str]:
    """The fields whose name, or a part of it between separators, is one of the words.

    Whole names first, then those that end in the word: a `user_prompt` is a prompt, and a `prompt_type` is not.
    """
    parts = rf"(^|[^a-z])({pattern})s?(?![a-z])"
    found = {n: [m.end() for m in re.finditer(parts, snake(n), re.IGNORECASE)] for n in columns if n not in used}
    whole = [n for n in found if re.fullmatch(f"({pattern})s?", n, re.IGNORECASE)]
    others = [n for n, ends in found.items() if ends and n not in whole]
    return whole + sorted(others, key=lambda n: len(snake(n)) not in found[n])


def messages_in(values: Column) -> list[dict[str, Any]]:
    """The messages among the values, from first to last."""
    listed = [v if isinstance(v, list) else [v] for v in values]
    return [m for turns in listed for m in turns if is_message(m)]


def is_prose(name: str, columns: dict[str, Column]) -> bool:
    """Words with spaces between them, or messages; not an id, a label or a judge's reasons."""
    words = [v for v in columns[name] if isinstance(v, str)]
    spaced = any(" " in v.strip() for v in words) or bool(messages_in(columns[name]))
    return spaced and not is_label(name, columns) and name not in named(columns, ABOUT, [])


def paired(names: list[str], others: list[str]) -> Iterator[tuple[str, str]]:
    """The pairs of one of `names` and one of `others` that differ in a side only."""
    for one in names:
        yield from ((one, other) for other in others if differ(one, other))


def differ(one: str, other: str) -> tuple[str, str] | None:
    """The sides in which two names differ, if they differ in nothing else."""
    parts, others = _parts(one), _parts(other)
    differing = [(a, b) for a, b in zip(parts, others, strict=False) if a != b]
    sides = differing[0] if len(parts) == len(others) and len(differing) == 1 else ("", "")
    side, opposite = map(str.lower, sides)
    return (side, opposite) if (side, opposite) in SIDES else None


@lru_cache(maxsize=4096)  # every name of a file is compared with every other
def _parts(name: str) -> list[str]:
    return re.split(r"([^A-Za-z0-9]+|(?<=[a-z])(?=[A-Z0-9]))", name)


def is_label(name: str, columns: dict[str, Column]) -> bool:
    plain = not any(is_nested(v) for v in columns[name])
    return plain and name in named(columns, LABEL, []) and len(distinct(columns[name])) <= FEW


def all_of(columns: dict[str, Column], names: list[str]) -> Column:
    return [value for name in names for value in columns[name]]


def distinct(values: Column) -> list[str]:
    """The distinct values as text, the most frequent first; of what is too many, a few."""
    texts = (str(v).lower() if isinstance(v, bool) else v.strip() if isinstance(v, str) else repr(v)[:60]
             for v in values if not is_huge(v))  # fmt: skip
    return [text for text, _ in Counter(t for t in texts if _encodable(t)).most_common(FEW + 1)]


def is_huge(value: Any) -> bool:
    return isinstance(value, int) and value.bit_length() > 64


def numbers(values: Column) -> list[float]:
    """The values as numbers, if all are: NaN and such words as N/A aside."""
    found = []
    for value in values:
        read = number(value)
        if read is not None:
            found.append(read)
        elif not (_is_nan(value) or (isinstance(value, str) and MISSING.fullmatch(value.strip()))):
            return []
    return found


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str) or is_huge(value):
        return None
    if isinstance(value, str) and not re.fullmatch(r"\s*[+-]?[0-9]{1,15}(\.[0-9]{1,15})?\s*", value):
        return None
    number = float(value)
    return number if abs(number) < 1e300 else None


def missing(values: Column) -> list[Any]:
    """What stands for no label, it seems: such words as N/A, and a -1 or -100 below a scale that starts at 0 or 1."""
    found = numbers(values)
    words = [v for v in distinct(values) if MISSING.fullmatch(v)] if found else []
    above = [n for n in found if n >= 0]
    low = {n for n in found if n in (-1, -100)} if above and len(set(above)) > 1 else set()
    return words + ([int(n) for n in sorted(low)] if all(n >= 0 or n in low for n in found) else [])


def is_nested(value: Any) -> bool:
    return isinstance(value, list | dict)
