"""The lines of a draft that say which field is the label, and what its values mean."""

import re
from typing import Any

from pipelines.converters.messages import SYSTEM, judged
from pipelines.mapping.drafting import fields
from pipelines.mapping.judgements import canonical
from pipelines.mapping.leaning import is_denied, is_plain, leaning, snake, spaced, verdict

_SHORT = 40  # characters of a label in words
_SIDE_WORDS = {word for sides in fields.SIDES for word in sides}
# Further words for the first and the second side, as starts of words; those of scripts without spaces stand anywhere.
_FIRST = r"\b(erst|links|prim|izquierd|gauche|premi|esquerd|sinistr|перв|лев|الأول)|左|前者|第一|甲"
_SECOND = r"\b(zweit|rechts|segund|derech|droit|deuxi|second|direit|destr|втор|прав|الثان)|右|后者|後者|第二|乙"
# A label of such values means what its name says: a yes may be good or bad.
_YES_NO = r"yes|no|true|false|1|0|-1|y|n|ja|nein|oui|non|s[ií]|sim|não|да|нет|是|否|نعم|لا"
_RANK = "rank(ed|ing)?|rang|platz|place|puesto|order|ранг|место|排名|名次|順位"  # the first is the best
_ONE_IS_BEST = re.compile(
    r"\b(1 ?((is|means) )?(the )?best|best (is )?1|([2-9]|10) ?((is|means) )?(the )?worst|worst (is )?([2-9]|10))\b"
)
_AMOUNT = "(very.)?(low|high)|medium|moderate"  # of what is good or bad
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
CATEGORY = (
    r"id|uuid|model|language|lang|locale|country|region|category|domain|topic|subject|theme|type|kind|source|dataset"
    r"|corpus|split|subset|fold|version|date|day|month|year|time|timestamp|title|name|author|user|role|platform|device"
    r"|channel|format|license|task|intent|skill|difficulty|persona|gender|annotator|worker|rater|labell?er|reviewer"
    r"|sprache|langue|idioma|lingua|язык|语言|言語|언어|modell|modelo|modèle|modello|модель|模型|kategorie|catégorie"
    r"|categor[ií]a|категория|类别|分类|quelle|fuente|fonte|источник|来源|datum|fecha|data|дата|日期|thema|sujet|tema|тема"
)
_TIE = re.compile(
    r"\w ?[=≈~]+ ?\w|tie|draw|equal|same|both|neither|none"
    r"|empate|unentschieden|gleich|égalité|pareggio|ничья|平局|平手|相同|تعادل",
    re.IGNORECASE,
)
_SHARE = re.compile(r"(?P<n>[0-9]{1,6}([.,][0-9]{1,6})?) ?(?P<of>%|stars?|(/|out of) ?(?P<most>[1-9][0-9]{0,5}))")
_IS_WORSE = "  # check: by its name, this says that a response is worse"
_WINNER = (
    '  winner: {first: ["first is better"], second: ["second is better"]}'
    "  # check: put the values here; until then all are rejected"
)


def of_several(name: str, lists: fields.Column) -> list[str]:
    """Ranks, where every list counts from 0 or 1 and the name allows it; else scores."""
    is_rank, is_score = (fields.named({name: []}, pattern, []) for pattern in (_RANK, fields.LABEL))
    for best in (0, 1) if is_rank or not is_score else ():
        if all(sorted(map(float, v)) == [*range(best, len(v) + best)] for v in lists):
            return [f"  rank: {best}  # check: the best has this rank, not the worst"]
    return _scale(name, [float(n) for v in lists for n in v], [])


def unknown(names: list[str], columns: dict[str, fields.Column], used: list[str]) -> list[str]:
    """A label that rejects every record until somebody says what it means."""
    used.append(names[0])
    return [
        *where_lines(names[0]),
        "  order: [worst, best]"
        "  # check: is this the label? Say what it means: docs/mapping.md. Until then all are rejected",
        f"  # seen: {_all_seen(columns[names[0]])}",
    ]


def _all_seen(values: fields.Column) -> str:
    return fields.comment(", ".join(map(fields.in_quotes, fields.distinct(values))))


def raters(columns: dict[str, fields.Column], used: list[str]) -> list[str]:
    """The columns that hold a label each, by people who are only numbered."""
    found = [n for n in columns if n not in used and re.fullmatch(fields.RATERS, n, re.IGNORECASE)]
    if len(found) < 2 or not (
        fields.numbers(values := fields.all_of(columns, found)) or len(fields.distinct(values)) <= fields.FEW
    ):
        return []
    used += found
    return found


def where_lines(label: str | list[str]) -> list[str]:
    place = f"annotators: {fields.yaml(label)}" if isinstance(label, list) else f"field: {fields.yaml(label)}"
    return ["label:", f"  {place}"]


def label_field(columns: dict[str, fields.Column], used: list[str]) -> str | None:
    """The field with the label of a response, by its name or else by its values."""
    plain = [n for n, values in columns.items() if n not in used and not any(map(fields.is_nested, values))]
    plain = [n for n in plain if not re.search(fields.KEY, n)]
    named = [n for n in fields.named(columns, fields.LABEL, used) if n in plain and _has_few(columns[n])]
    telling = [n for n in plain if _tells_quality(n, columns[n])]
    return next(iter(named + sorted(telling, key=lambda n: _says_yes(columns[n]))), None)


def _verdicts(
    columns: dict[str, fields.Column], used: list[str], sides: tuple[str, str]
) -> tuple[list[str], list[str]]:
    """The fields that tell the better of two, by name and values, and those that may, by either.

    What each response has its own of tells no winner, and a number only one that the responses are called by.
    """
    plain = [n for n, values in columns.items() if n not in used and not any(map(fields.is_nested, values))]
    plain = [n for n in plain if not any(fields.differ(n, other) or fields.differ(other, n) for other in columns)]
    named = [n for n in fields.named(columns, fields.LABEL, used) if n in plain]
    words = [n for n in named if not fields.numbers(columns[n]) or {*fields.distinct(columns[n])} == {*sides}]
    sure = [n for n in words if _tells_side(columns[n])]
    plain = [n for n in plain if not re.search(fields.KEY, n)]
    about = [n for n in plain if leaning(n) and _side_of(n, sides) is not None and _says_yes(columns[n])]
    maybe = [n for n in named if n in plain and _has_few(columns[n])]
    return sure, maybe + [n for n in plain if n in about or _tells_side(columns[n])]


def _has_few(values: fields.Column) -> bool:
    return bool(fields.numbers(values)) or len(fields.distinct(values)) <= fields.FEW


def _tells_quality(name: str, values: fields.Column) -> bool:
    """Whether the values are words for good and bad, stars, or words of a known order; numbers can be anything.

    A yes or no tells it where the name says of what.
    """
    distinct = [v for v in fields.distinct(values) if not fields.MISSING.fullmatch(v)]
    if fields.numbers(values) or len(distinct) < 2:
        return False
    if _says_yes(values):
        return leaning(name) != 0
    graded = bool(_ordered(distinct)) or all(_share(v) is not None for v in distinct)
    return graded or all(map(verdict, distinct))


def _says_yes(values: fields.Column) -> bool:
    said = [canonical(v) for v in fields.distinct(values) if not fields.MISSING.fullmatch(v)]
    return bool(said) and all(re.fullmatch(_YES_NO, v, re.IGNORECASE) for v in said)


def may_judge(columns: dict[str, fields.Column], used: list[str]) -> list[str]:
    """The fields that may say how good a response is.

    Those with words of judgement, then truth values, numbers, a few words that come again, and remarks.
    """
    others = [n for n in columns if n not in used and not re.search(fields.KEY, n)]
    plain = [n for n in others if not fields.is_prose(n, columns)]
    named = [n for n in plain if any(_hints({n: v}) for v in columns[n][: fields.FEW])]
    truths = [n for n in plain if all(isinstance(v, bool) for v in columns[n])]
    measures = fields.named(columns, _MEASURES, used)
    numbers = [n for n in plain if n not in measures and fields.numbers([_with_point(v) for v in columns[n]])]
    no_labels = {*fields.named(columns, CATEGORY, used), *_asked_or_said(columns), *SYSTEM}
    few = [n for n in others if n not in no_labels and _are_few_words(columns[n])]
    remarks = [n for n in others if judged({n: None})]
    return list(dict.fromkeys(named + truths + numbers + few + remarks))


def _asked_or_said(columns: dict[str, fields.Column]) -> list[str]:
    """The fields that are by their names prompts and responses, or parts of them."""
    ends = rf"(.*[\W_])?({fields.PROMPT}|{fields.RESPONSE})s?|{fields.PARTS}"
    return [n for n in columns if re.fullmatch(ends, snake(n), re.IGNORECASE)]


def _are_few_words(values: fields.Column) -> bool:
    """Whether the values are short texts that come again, or too few to tell; a single one only where it is bad."""
    distinct = fields.distinct(values) if _are_short(values) else []
    if len(distinct) == 1:
        return leaning(distinct[0]) < 0 or verdict(distinct[0]) < 0
    return 1 < len(distinct) <= fields.FEW and (len(values) <= fields.FEW or len(distinct) < len(values))


def come_again(values: fields.Column) -> bool:
    return _are_short(values) and 1 < len(fields.distinct(values)) < min(len(values), fields.FEW + 1)


def _are_short(values: fields.Column) -> bool:
    return all(isinstance(v, str) and len(v) <= _SHORT for v in values)


def _hints(value: Any, depth: int = 0) -> bool:
    """Whether a name or a text within the value is one of judgement."""
    if isinstance(value, dict) and depth < fields.DEPTH:
        told = judged(value) or any(isinstance(name, str) and leaning(name) for name in value)
        return told or any(_hints(v, depth + 1) for v in value.values())
    if isinstance(value, list) and depth < fields.DEPTH:
        return not any(map(fields.is_message, value)) and any(_hints(v, depth + 1) for v in value[: fields.FEW])
    return isinstance(value, str) and value.lower() in ("thumbs_up", "thumbs_down", "👍", "👎")


def _with_point(value: Any) -> Any:
    return value.replace(",", ".", 1) if isinstance(value, str) else value


def _tells_side(values: fields.Column) -> bool:
    """Whether the values name one side or the other, or neither."""
    words = [v for v in fields.distinct(values) if not _TIE.search(v)]
    return len(words) > 1 and len(words) == sum(map(len, _placed(words)))


def label_of_one(name: str | list[str], values: fields.Column) -> list[str]:
    """Where the label of a response is, and what it means."""
    lines = where_lines(name)
    distinct = [v for v in fields.distinct(values) if not fields.MISSING.fullmatch(v)]
    missing = [v for v in fields.distinct(values) if fields.MISSING.fullmatch(v)]
    absent = [f"  missing: {fields.yaml(missing)}  # check: do these stand for no label?"] if missing else []
    good = [v for v in distinct if verdict(v) > 0]
    bad = [v for v in distinct if verdict(v) < 0]
    signed = {canonical(v) for v in distinct} == {"-1", "0", "1"}
    numbers = fields.numbers(values)
    told = len(good) + len(bad) == len(distinct) and not signed
    if told and ((good and bad) or (len(distinct) == 1 and not numbers)):
        return [*lines, *_thumbs(name, good, bad), *absent]
    if numbers:
        return lines + _scale(name, numbers, [] if signed else fields.missing(values))
    return [*lines, *(_worded(name, _unlike(distinct)) if distinct else _unordered([])), *absent]


def _thumbs(name: str | list[str], good: list[str], bad: list[str]) -> list[str]:
    """Values of good and bad; a yes or no means what the name says, and of the others one may not have been seen."""
    lean = leaning(name) if isinstance(name, str) else 0
    neutral = _YES_NO + "|positive|negative" + "|(un)?safe" * (lean >= 0)
    yes_no = [v for v in good + bad if re.fullmatch(neutral, canonical(v), re.IGNORECASE)]
    told = ""
    if lean < 0 and not yes_no:
        told = "  # check: the name says that a response is worse; the values are read as they are"
    elif lean < 0 and len(yes_no) < len(good + bad):
        return _unordered(good + bad)
    elif lean < 0:
        good, bad, told = bad, good, _IS_WORSE
    elif yes_no and not lean:
        told = f"  # check: is {fields.comment(fields.in_quotes(yes_no[0]))} {'good' if yes_no[0] in good else 'bad'}?"
    elif yes_no and not is_plain(str(name)):
        told = "  # check: by its name, this says that a response is good; or does it speak of something else?"
    if not good or not bad:
        told += "  # check: one value was seen"
    good, bad = good or ["good"], bad or ["bad"]
    return [f"  thumbs: {{good: {fields.yaml(good)}, bad: {fields.yaml(bad)}}}{told}"]


def _less_is_better(name: str | list[str]) -> bool:
    return isinstance(name, str) and (leaning(name) < 0 or _is_rank(name))


def _lower(name: str | list[str]) -> list[str]:
    told = "  # check: by its name, the first is the best" if _is_rank(str(name)) else _IS_WORSE
    return [f"  better: lower{told}"] if _less_is_better(name) else []


def _is_rank(name: str) -> bool:
    return bool(fields.named({name: []}, _RANK, [])) or _ONE_IS_BEST.search(spaced(name)) is not None


def _is_quality(name: str | list[str]) -> bool:
    """Whether more of what a field of this name holds is better; labels by people have no name that tells."""
    return isinstance(name, list) or name in fields.named({name: []}, fields.LABEL, []) or leaning(name) > 0


def _worded(name: str | list[str], values: list[str]) -> list[str]:
    """Shares of the best, such as 4/5; words of a known order; or the values, for somebody to put in their order."""
    worse = _less_is_better(name)
    if all(re.search("[%/]|out of", v.lower()) and _share(v) is not None for v in values):
        return ["  scale: unit  # shares of the best, such as 4/5 or 80%", *_lower(name)]
    if all(re.fullmatch("★+☆*", v) for v in values) and len(lengths := {*map(len, values)}) == 1 and not worse:
        listed = ", ".join(f"{fields.in_quotes(v)}: {v.count('★')}" for v in values)
        return [f"  map: {{{listed}}}  # check: other values are rejected", f"  stars: {max(2, *lengths)}"]
    if worse:
        return _unordered(values)
    if len(shares := {v: share for v in values if (share := _share(v)) is not None}) == len(values):
        listed = ", ".join(f"{fields.in_quotes(v)}: {share:.6g}" for v, share in shares.items())
        return [f"  map: {{{listed}}}  # check: other values are rejected", "  scale: unit"]
    if len(numbers := fields.numbers([_with_point(v) for v in values])) == len(values):
        return _scale(name, numbers, [])
    amounts = all(re.fullmatch(_AMOUNT, canonical(v)) for v in values)
    if (ordered := _ordered(values)) and (not amounts or _is_quality(name)):
        return [f"  order: {fields.yaml(ordered)}  # check: must go from the worst to the best, the ones not seen too"]
    return _unordered(values)


def _unordered(values: list[str]) -> list[str]:
    return [
        "  order: [worst, best]  # put the values here, from the worst to the best; until then all are rejected",
        f"  # seen: {fields.comment(', '.join(map(fields.in_quotes, values)))}",
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
        places = {i: v for v in values for i, words in enumerate(steps) if re.fullmatch(words, canonical(v))}
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
        seen.setdefault(canonical(value), value)
    return list(seen.values())


def _another(values: list[str]) -> str:
    return next(word for word in ("bad", "good", "other") if word not in map(canonical, values))


def _scale(name: str | list[str], numbers: list[float], missing: list[Any]) -> list[str]:
    real = [n for n in numbers if n not in missing] or numbers
    low, high = min(real), max(real)
    worse = _less_is_better(name)
    absent = [f"  missing: {fields.yaml(missing)}  # check: do these stand for no label?"] if missing else []
    lines = [*absent, *_lower(name)]
    more = "" if worse else ", and that more is better"
    seen = f"  # check the ends of the scale{more}; seen were {low:g} to {high:g}"
    if not worse and low >= 1 and high in (5, 10) and all(n == int(n) for n in real):
        return [f"  stars: {int(high)}{seen}", *lines]
    for a, b in ((0, 1), (1, 5), (0, 4), (0, 5), (1, 7), (0, 10), (1, 10), (0, 100), (-1, 1)):
        if a <= low and high <= b:
            return [f"  score: [{a}, {b}]{seen}", *lines]
    return [f"  scale: sigmoid  # no known scale: check; seen were {low:g} to {high:g}; or score: [low, high]", *lines]


def label_of_two(columns: dict[str, fields.Column], used: list[str], sides: tuple[str, str]) -> list[str]:
    """The label of a pair of these `sides`: a mark or a number for each, or a field that tells the winner."""
    sure, maybe = _verdicts(columns, used, sides)
    if not sure and (lines := _of_each(columns, used) or _by_name(columns, used)):
        return lines
    people = raters(columns, used)
    if not (name := people or (sure + maybe or [""])[0]):
        likely = may_judge(columns, used)
        used += likely[:1]
        if not likely:
            return ["label:", "  field: winner  # no label was found: name its field", _WINNER]
        return [*where_lines(likely[0]), f"{_WINNER}  # is this the label? seen: {_all_seen(columns[likely[0]])}"]
    used += [name] if isinstance(name, str) else []
    values = fields.all_of(columns, people or [str(name)])
    signed = set(fields.numbers(values)) <= {-1, 0, 1}
    missing = [] if signed else fields.missing(values)
    numbers = [n for n in fields.numbers(values) if n not in missing]
    lean = leaning(name) if isinstance(name, str) else 0
    side = _side_of(str(name), sides) if lean else None
    turned = (lean < 0) != (side == 0)
    lines = [*where_lines(name), *([f"  missing: {fields.yaml(missing)}  # check"] if missing else [])]
    if len(set(numbers)) > 2 and set(numbers) != {0, 1, 2}:
        low, high = _ends(numbers)
        seen = f"seen were {min(numbers):g} to {max(numbers):g}"
        low, high = (high, low) if turned else (low, high)
        check = f"# check the ends, and which of them means the first; {seen}"
        return [*lines, f"  preference: {{first: {low:g}, second: {high:g}}}  {check}"]
    absent = {canonical(str(v)) for v in missing}
    distinct = [v for v in fields.distinct(values) if canonical(v) not in absent]
    if side is not None and _says_yes(distinct):
        yes = [v for v in distinct if verdict(v) > 0]
        no = [v for v in distinct if v not in yes and not fields.MISSING.fullmatch(v)]
        first, second = (yes, no) if turned else (no, yes)
        told = f"first: {fields.yaml(first or [_another(second)])}, second: {fields.yaml(second or [_another(first)])}"
        return [*lines, f"  winner: {{{told}}}  # check: does {fields.comment(str(name))} say so?"]
    return [*lines, _winner(distinct, bool(numbers), lean < 0)]


def _of_each(columns: dict[str, fields.Column], used: list[str]) -> list[str]:
    """The lines for two fields that judge a response each: which of them won, or numbers to compare."""
    free = {n: values for n, values in columns.items() if n not in used and (fields.numbers(values) or _marks(values))}
    telling = [*fields.named(free, fields.LABEL, []), *(n for n in free if leaning(n) or _is_rank(n))]
    two = next(fields.paired(telling, telling), None)
    if not two:
        return []
    used += two
    lower = all(map(_less_is_better, two))
    marked = {sum(both) for both in zip(*(_marks(columns[n]) for n in two), strict=False)}
    ties = [n for n in free if any(map(_TIE.fullmatch, re.split(r"[\W_]+", snake(n)))) and _marks(free[n])]
    if leaning(two[0]) and (marked == {1} or (ties and marked == {0, 1})):
        used += ties[:1]
        first, second = map(fields.in_list, two[::-1] if lower else two)
        tie = f", tie: {fields.in_list(ties[0])}" if ties else ""
        told = _IS_WORSE if lower else "  # check: does a 1 mark the better one?"
        return ["label:", f"  one_hot: {{first: {first}, second: {second}{tie}}}{told}"]
    texts = [] if all(fields.numbers(columns[n]) for n in two) else ['  map: {"true": 1, "false": 0}']
    compare = "lower  # check: is less" if lower else "higher  # check: is more"
    return ["label:", f"  fields: {fields.yaml(list(two))}", *texts, f"  compare: {compare} better?"]


def _marks(values: fields.Column) -> list[int]:
    """The values as 1 and 0, if all are such or truth values."""
    plain = [v for v in values if not fields.is_nested(v) and not fields.is_huge(v)]
    found = [{"true": 1, "1": 1, "false": 0, "0": 0}.get(canonical(v)) for v in plain]
    return [mark for mark in found if mark is not None] if len(plain) == len(values) and None not in found else []


def _by_name(columns: dict[str, fields.Column], used: list[str]) -> list[str]:
    """The lines for a field that holds what one of two others does, such as the name of the model that won."""
    texts = {n: values for n, values in columns.items() if all(isinstance(v, str) for v in values)}
    texts = {n: values for n, values in texts.items() if not _says_yes(values)}
    for name in [*fields.named(texts, fields.LABEL, used), *(n for n in texts if n not in used and leaning(n))]:
        said = {canonical(v): v for v in texts[name]}
        others = [n for n in texts if n != name]
        for two in fields.paired(others, others) if not said.keys() & _SIDE_WORDS else ():
            strange = [v for same, v in said.items() if same not in {canonical(v) for n in two for v in texts[n]}]
            ties = [v for v in strange if _TIE.search(v)]
            missing = [v for v in strange if v not in ties and fields.MISSING.fullmatch(v)]
            if len(ties + missing) < len(strange) or len(strange) == len(said):
                continue
            used += [name, *(n for n in two if n not in used and not re.fullmatch(fields.KEPT, n, re.IGNORECASE))]
            first, second = map(fields.in_list, two[::-1] if leaning(name) < 0 else two)
            tie = f", tie: {fields.yaml(ties)}" if ties else ""
            sides = f"first: {{field: {first}}}, second: {{field: {second}}}{tie}"
            told = _IS_WORSE if leaning(name) < 0 else "  # check: does it name the better one?"
            absent = [f"  missing: {fields.yaml(missing)}  # check"] if missing else []
            return [*where_lines(name), f"  winner: {{{sides}}}{told}", *absent]
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


def _winner(distinct: list[str], numbers: bool = False, worse: bool = False) -> str:
    """Values in three groups: ties (of 0, 1 and 2, the 0), and the others by the side they name, or of two numbers in
    order. What names no side is not placed."""
    distinct = _unalike([v for v in distinct if not fields.MISSING.fullmatch(v) or _TIE.search(v)])
    ties = [v for v in distinct if _TIE.search(v) or (numbers and len(distinct) == 3 and canonical(v) == "0")]
    others = sorted(v for v in distinct if v not in ties)
    first, second = _placed(others)
    if len(others) == 2 and numbers and not (first and second):
        first, second = others[:1], others[1:]
    worst = {v for v in others if leaning(v) < 0 or is_denied(v)}
    first, second = (
        [v for v in others if v in (b if v in worst else a)] for a, b in ((first, second), (second, first))
    )
    if not first or not second:
        return f"{_WINNER}  # seen: {fields.comment(', '.join(map(fields.in_quotes, distinct)))}"
    first, second, told = (second, first, _IS_WORSE) if worse else (first, second, "")
    tie = f", tie: {fields.yaml(ties)}" if ties else ""
    if unplaced := [v for v in others if v not in first + second]:
        told += f"  # not placed, so rejected: {fields.comment(', '.join(map(fields.in_quotes, unplaced)))}"
    sides = f"first: {fields.yaml(first)}, second: {fields.yaml(second)}{tie}"
    return f"  winner: {{{sides}}}  # check: which value means which side?{told}"


def _placed(values: list[str]) -> tuple[list[str], list[str]]:
    """The values that name the first of two sides and those that name the second, by the words that place the most.

    Of A > B, it is A that is named.
    """
    words = {v: re.split(r"[\W_]+", snake(_greater(v)).lower()) for v in values}
    sides = [({v for v in values if a in words[v]}, {v for v in values if b in words[v]}) for a, b in fields.SIDES]
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
