"""Whether a name or a value says good or bad: a yes under `helpful`, `not_helpful`, `unsafe`; `thumbs up`, `schlecht`.

Names leave out names that say only what was measured (`quality`, `rating`), and what people did (`retried`, `edited`):
there a yes may be either.
"""

import re

from pipelines.mapping.judgements import canonical

# Values, as whole texts.
_YES = (
    r"good|up|thumbs[ _]?up|👍|yes|true|liked?|positive|correct|accept(ed)?|1|ja|oui|s[ií]|gut|好|是|对|赞|да|نعم|y"
    r"|approved|pass(ed)?|helpful|useful|safe|satisfied|sim|bueno|bon|満足|良い|満意|满意|好评|有用|좋아요|хорошо|جيد"
    r"|❤|😀|😃|🙂|😊|✅|✔|💯"
)
_NO = (
    r"bad|down|thumbs[ _]?down|👎|no|false|disliked?|negative|wrong|incorrect|reject(ed)?|0|-1|nein|non|n|não|нет|لا"
    r"|schlecht|坏|否|错|踩|fail(ed)?|(un|not[ _])helpful|useless|unsafe|(un|dis)satisfied|malo|mauvais|不満|悪い"
    r"|不满意|差评|没用|싫어요|плохо|سيئ|💔|😞|🙁|☹|😠|😡|❌|✖|✗|✘"
)
# Words of names.
_GOOD = (  # starts of words
    r"good|ok(ay)?\b|helpful|useful|harmless|flawless|unbias|correct(ly)?\b|accurate|accept|approv|pass(ed|es)?\b|like[sd]?\b|loved?\b"
    r"|safe\b|satisf(ied|ying|actory)|thumbs? ?up|upvot|best|better|prefer|chosen|win(s|ner|ning)?\b|won\b|resolved"
    r"|solved|succe(ss|ed)|truthful|faithful|factual$|grounded|valid\b|relevant|coherent|consistent|complete\b|clear\b"
    r"|honest|polite|appropriate|compliant|desir|favou?r|recommend|perfect|excellent|great\b|usable|(?<!false )positiv"
    r"|gut\b|hilfreich|besser|bevorzugt|zufrieden|korrekt|richtig|nützlich|fehlerfrei|[uú]til|mejor|melhor|meilleur"
    r"|miglior|buen|buon|bon(ne)?\b|bom\b|boa\b|corret|хорош|полезн|лучш|верн|точн"
)
_GOOD_ANYWHERE = "好|有用|有帮助|满意|滿意|满足|満足|正确|正確|准确|赞|良い|役に立|좋|만족|유용|جيد|مفيد"
_BAD = (  # anywhere in a word, as in Denkfehler
    r"wors[et]|\bbad(?!ge)|downvot|thumbs? ?down|\bdown\b|toxic|\bharm(?!on)|hallucinat|error|mistake|severity|violat"
    r"|offensive|\bbias|\brisk|problem|\bissue|complain|refus(al|ed)|fail|wrong|reject|\blos(er|es|ing|t)\b|negativ"
    r"|\bpoor|useless|terrible"
    r"|awful|nonsens|\bspam|jailbr|\bneeds?\b|mislead|\bbroken|\bbug(s|gy)?\b|abus|insult|hateful|nsfw|plagiar|danger|illegal"
    r"|contradict|frustrat|defect|inferior|\bflagged|^((red|user) )?flags?$|\breported( by|$)|\bpeggio|\bpeor|\bpire"
    r"|\bpior|\berros?\b|erreur|\bmauvais|\bmal[oa]?\b|fehler|schlecht|falsch|худш|плох|ошибк|вред|токсич"
    r"|差|踩|[没无]用|错误|錯誤|有害|毒性|坏|悪い|나쁜|سيئ"
)
_TURNED = r"un|in|im|ir|dis|non|не"  # before a word
_NOT = re.compile(
    r"\b(no|not|non|never|without|free|pas|nicht|keine?[rns]?|ohne|sin|sem|senza|не|нет|без)\b", re.IGNORECASE
)
_LESS_IS_BETTER = re.compile(r"\b(low|less|least|small|few)\w* (is |are |means )?(better|best)\b")
_FILLERS = r"\b(is|was|are|it|es|ist|est|это)\b|是否|吗"  # words of a name that say nothing
_SAID = re.compile(
    rf"(?P<good>\b(?P<ungood>{_TURNED})?({_GOOD})|(?P<notgood>[不无無没沒未])?({_GOOD_ANYWHERE}))"
    rf"|(\b(?P<unbad>{_TURNED}))?({_BAD})",
    re.IGNORECASE,
)


def snake(name: str) -> str:
    """The name with `_` where camel case or a digit begins a word."""
    return re.sub(r"(?<=[^\W_A-Z0-9])(?=[A-Z0-9])", "_", name)


def spaced(name: str) -> str:
    """The words of a name, in lower case."""
    return re.sub(r"[\W_]+", " ", snake(name)).strip().lower()


def leaning(name: str) -> int:
    """1 where a yes, or more, in a field of this name is good, -1 where it is bad, 0 where the name does not tell."""
    said = spaced(name)
    if _LESS_IS_BETTER.search(said):
        return -1
    signs = {_sign(found) for found in _SAID.finditer(said)}
    if len(signs) != 1:
        return 0
    return -signs.pop() if _NOT.search(said) else signs.pop()


def is_denied(value: str) -> bool:
    """Whether a value that leans to neither side says that something is not so, such as `not A`."""
    return not leaning(value) and _NOT.search(spaced(value)) is not None


def is_plain(name: str) -> bool:
    """Whether a name that leans says nothing but the judgement: `is_correct`, and not `correct_answer`."""
    said = spaced(name)
    return not re.sub(rf"({_SAID.pattern})\w*|{_NOT.pattern}|{_FILLERS}", "", said, flags=re.IGNORECASE).strip()


def _sign(found: re.Match[str]) -> int:
    turned = found["ungood"] or found["notgood"] or found["unbad"]
    return 1 if bool(found["good"]) != bool(turned) else -1


def verdict(value: str) -> int:
    """1 where a value says by itself that something is good, or yes, -1 where it says bad, or no, else 0."""
    said = canonical(value)
    return bool(re.fullmatch(_YES, said, re.IGNORECASE)) - bool(re.fullmatch(_NO, said, re.IGNORECASE))
