"""What annotation and tracing tools hold: free fields that are prompt and responses, and people's words of judgement.

Names of fields and questions are the team's own: which is the prompt, which the responses, and what an answer says, is
read from usual names and words. What cannot be told so is rejected, and needs a mapping. Comments are not read.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from pipelines.converters.base import LeftOut, Policy, Record, note
from pipelines.converters.labels import compared, is_missing, objectives, ranked, rated, some, thumbed
from pipelines.converters.messages import answer, answered, messages, refuse_media, show, text
from schemas.errors import Reject
from schemas.feedback import Message, Row, demonstration, unlabelled

# --- fields: which are prompt and responses ----------------------------------------------------

PROMPTS = (
    *("prompt", "messages", "conversation", "conversations", "chat", "dialogue", "dialog", "instruction", "question"),
    *("query", "input", "user_input", "user_query", "user_prompt", "user_message", "context", "document", "article"),
)
_RESPONSES = (
    *("response", "completion", "output", "generation", "answer", "reply", "model_response", "assistant_response"),
    *("model_output", "generated_text", "bot_response", "llm_response", "ai_response", "model_answer"),
)
_PAIRS = (("chosen", "rejected"), ("chosen_response", "rejected_response"))
_NUMBERED = re.compile(
    r"(?P<stem>(?:\w+_)??(?:response|completion|output|generation|answer|reply|summary|text|candidate|option))s?_?"
    r"(?:model_?)?(?P<which>\d+|[ab]|left|right|first|second)"
)
_ROLES = {"human": "user", "ai": "assistant", "aimessagechunk": "assistant", "model": "assistant", "bot": "assistant"}
_MAP = "say with --mapping which fields are prompt and response"


class Texts(NamedTuple):
    """What was judged: a prompt, and its responses by the names of their fields, in order."""

    prompt: list[Message]
    responses: dict[str, str]


def folded(name: object) -> str:
    """A name as names are compared: lower case, with underscores."""
    return re.sub(r"[\s.-]+", "_", str(name).strip().casefold())


def texts(fields: Record, where: str = "") -> Texts:
    """The prompt and the responses among free fields, by their names.

    Where no field has a response's name, the last turn of a conversation is the response, if it is the assistant's.
    """
    held = {key: value for key, value in fields.items() if not is_missing(value)}
    names = _response_names(held, where)
    prompt = prompt_of({key: value for key, value in held.items() if key not in names}, where)
    if not names and prompt[-1].get("tool_calls"):
        raise Reject("unsupported_content", f"{where}the last turn has tool_calls; only its text could be kept")
    if not names and prompt[-1]["role"] == "assistant":
        return Texts(prompt[:-1], {"response": prompt[-1]["content"]})
    if not names:
        raise Reject("missing_field", f"{where}no response among the fields {named(fields)}; {_MAP}")
    return Texts(*_answers(prompt, {name: held[name] for name in names}, where))


def _answers(prompt: list[Message], sides: Record, where: str) -> tuple[list[Message], dict[str, str]]:
    """The prompt, which a side that is a whole conversation may repeat, and the text of each side."""
    read = {name: answer(prompt, reply(value, where + name), where + name) for name, value in sides.items()}
    first, *others = [turns for turns, _ in read.values()]
    if any(turns != first for turns in others):
        raise Reject("histories_differ", f"{where}{named(sides)}: the conversations differ before the last turn")
    return first, {name: said for name, (_, said) in read.items()}


def _response_names(fields: Record, where: str) -> list[str]:
    """The fields that are responses: one, a pair, or numbered ones in order."""
    by_name = {folded(key): key for key in fields}
    groups = [[by_name[name] for name in pair] for pair in _PAIRS if all(name in by_name for name in pair)]
    numbered: dict[str, list[tuple[str, str]]] = {}
    for name, key in by_name.items():
        if match := _NUMBERED.fullmatch(name):
            numbered.setdefault(match["stem"], []).append((_place(match["which"]), key))
    groups += [[key for _, key in sorted(keys)] for keys in numbered.values() if len(keys) > 1]
    if not groups:
        groups = [[by_name[name]] for name in _RESPONSES if name in by_name]
    if len(groups) > 1:
        raise Reject("wrong_shape", f"{where}{named(k for g in groups for k in g)} may all be responses; {_MAP}")
    return groups[0] if groups else []


def has_response(fields: Record) -> bool:
    """Whether a field has a response's name."""
    return bool(_response_names({key: value for key, value in fields.items() if not is_missing(value)}, ""))


def _place(which: str) -> str:
    """What sorts numbered fields: 2 before 10, left before right."""
    return f"{int(which):09d}" if which.isascii() and which.isdigit() else which


def prompt_of(fields: Record, where: str = "") -> list[Message]:
    """The prompt among free fields, after the turns of `system` and `history` where these are given.

    An `instruction` with an `input` is one turn, the input on a new line, as alpaca files have it.
    """
    refuse_media(fields)
    by_name = {folded(key): key for key in fields if not is_missing(fields[key])}
    names = [name for name in PROMPTS if name in by_name]
    if not names:
        raise Reject("missing_field", f"{where}no prompt among the fields {named(fields)}; {_MAP}")
    values = [fields[by_name[name]] for name in names]
    if names == ["instruction", "input"] and all(isinstance(v, str) for v in values):
        values = ["\n".join(values)]
    if len(values) > 1:
        raise Reject("wrong_shape", f"{where}{named(names)} may all be the prompt; {_MAP}")
    turns = spoken(values[0], where + by_name[names[0]])
    before = next((fields[by_name[n]] for n in ("chat_history", "history") if n in by_name), None)
    system = next((fields[by_name[n]] for n in ("system", "system_prompt", "system_message") if n in by_name), None)
    said = [Message(role="system", content=text(system, f"{where}system"))] if system is not None else []
    return [*said, *(spoken(before, f"{where}history") if before else []), *turns]


def spoken(value: Any, where: str) -> list[Message]:
    """A text, which is one user turn, or messages; also those of LangChain, and a list in a list."""
    if isinstance(value, str):
        return [Message(role="user", content=value)]
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], list):
        value = value[0]
    turns = messages([_turn(m) for m in value] if isinstance(value, list) else value, where)
    if not turns:
        raise Reject("empty_prompt", f"{where} has no turns")
    return turns


def _turn(message: Any) -> Any:
    """A message with the roles that `messages` knows; LangChain's have a `type`, or a class name and `kwargs`."""
    if not isinstance(message, dict):
        return message
    kwargs, path = message.get("kwargs"), message.get("id")
    if isinstance(kwargs, dict) and isinstance(path, list) and path and isinstance(path[-1], str):
        message = kwargs | {"type": path[-1].removesuffix("Message").casefold()}
    role = message.get("role", message.get("type"))
    if not isinstance(role, str) or "from" in message:
        return message
    return message | {"role": _ROLES.get(role.casefold(), role)}


def reply(value: Any, where: str) -> list[Message]:
    """A response: a text, a message, or messages of which it is the last."""
    if isinstance(value, str):
        return [Message(role="assistant", content=value)]
    turns = value if isinstance(value, list) else [value]
    return answered([_turn(m) for m in turns], where)


def named(names: Iterable[object]) -> str:
    """Names for a complaint, the first few of them."""
    shown = [str(name)[:40].encode("utf-8", "backslashreplace").decode() for name in names]
    return ", ".join([*shown[:8], "…"] if len(shown) > 8 else shown) or "(none)"


# --- judgements --------------------------------------------------------------------------------

_GOOD = (
    *("yes", "true", "good", "great", "thumbs_up", "thumbsup", "up", "like", "liked", "upvote", "correct", "accept"),
    *("accepted", "approve", "approved", "pass", "passed", "helpful", "safe", "acceptable", "factual", "👍"),
)
_BAD = (
    *("no", "false", "bad", "terrible", "thumbs_down", "thumbsdown", "down", "dislike", "disliked", "downvote"),
    *("incorrect", "wrong", "reject", "rejected", "fail", "failed", "unhelpful", "not_helpful", "unsafe", "harmful"),
    *("unacceptable", "hallucinated", "👎"),
)
_WORDS = dict.fromkeys(_GOOD, True) | dict.fromkeys(_BAD, False)
_TIES = (
    *("tie", "tied", "draw", "equal", "same", "both", "neither", "both_good", "both_bad", "bothbad", "no_preference"),
    *("equally_good", "equally_bad", "about_the_same", "no_difference"),
)
_VAGUE = ("yes", "no", "true", "false", "both", "same", "equal", "first", "second", "up", "down", "pass")
_SIDE = re.compile(
    r"(?:(?:the_)?(?:response|answer|completion|output|generation|reply|summary|text|candidate|option|model|assistant)_?)?"
    r"(?P<which>\d+|[ab]|left|right|first|second)(?:_is_better|_better|_wins)?"
)
_POSITIONS = {"a": 0, "left": 0, "first": 0, "b": 1, "right": 1, "second": 1}
# A judgement of such a name says how bad a response is: its yes and its high numbers are no praise.
_FAULT = re.compile(
    r"harm|toxi|unsafe|offens|bias|error|mistake|wrong|incorrect|halluc|\bbad\b|spam|refus|reject|flag|leak|jailbreak"
    r"|issue|problem|violat|danger|distance|perplexity|loss\b|latency|cost",
    re.IGNORECASE,
)
_CORRECTION = re.compile(
    r"corrected|correction|edited|edits?\b|rewrit|improved|revised|fixed|ideal"
    r"|better[-_ ](response|answer|completion|output)",
    re.IGNORECASE,
)
_COMMENT = re.compile(
    r"comment|reasons?(?!ing)|rationale|explan|justif|\bwhy\b|notes?\b|remark|critique", re.IGNORECASE
)


class Judgement(NamedTuple):
    """What somebody said of a record: to which question (or under which name), and who."""

    question: str
    value: Any
    labeller: str | None
    of: Sequence[str] = ()  # the fields it is about, in the tool's order; () where the tool does not say
    scale: tuple[float, float] | None = None  # where the tool says it
    metadata: Mapping[str, Any] = {}
    unused: str = ""  # why it does not count, such as "it is a draft"


def rows_of(
    said: Iterable[Judgement | LeftOut], of: Texts, source: str, policy: Policy, metadata: Mapping[str, Any]
) -> list[Row | LeftOut]:
    """The rows of all judgements of a record, each under `source:question`, or those of the one objective asked for.

    The question is in the name even where it is alone, so that records with one answer and with several go together.
    """
    parts = list(said)
    made: list[Row | LeftOut] = [part for part in parts if isinstance(part, LeftOut)]
    told = sorted((j for j in parts if isinstance(j, Judgement) and not _is_comment(j)), key=lambda j: j.question)
    asked = objectives(sorted({j.question for j in told}), policy) if told else []
    for i, judgement in enumerate(j for j in told if j.question in asked):
        under = f"{source}:{judgement.question}" if policy.objective == "all" else source
        about = {**metadata, **judgement.metadata}
        try:
            if judgement.unused:
                raise Reject("missing_label", judgement.unused)
            made += judgement_rows(judgement, of, policy, source=under, labeller=judgement.labeller, metadata=about)
        except Reject as error:
            made.append(LeftOut(f"{judgement.question}[{i}]", error.reason, error.detail))
    if policy.missing == "unlabelled" and all(isinstance(m, LeftOut) and m.reason == "missing_label" for m in made):
        note("missing")
        for response in of.responses.values():
            made += unlabelled(of.prompt, response, source=source, metadata=dict(metadata))
    return some(made, "no judgement of the record can be used")


def gathered(
    entries: Iterable[Any], where: str, read: Callable[[Any], Iterable[Judgement | LeftOut]]
) -> list[Judgement | LeftOut]:
    """What the entries of a list say; one that cannot be read is left out, and the others stay."""
    said: list[Judgement | LeftOut] = []
    for i, entry in enumerate(entries):
        try:
            said += read(entry)
        except Reject as error:
            said.append(LeftOut(f"{where}[{i}]", error.reason, error.detail))
    return said


def _is_comment(said: Judgement) -> bool:
    """Whether a judgement is a text that says why, by its name, or a sentence of feedback: no verdict."""
    if not isinstance(said.value, str) or folded(said.value) in _WORDS or said.question.endswith(".corrected"):
        return False
    sentence = "feedback" in said.question.casefold() and len(said.value.split()) > 3
    return sentence or _COMMENT.search(said.question) is not None


def name_of(value: Any, where: str) -> str:
    """The name of a question or a score: a text that can be written, and no essay."""
    return text(value, where)[:80].encode("utf-8", "backslashreplace").decode()


def judgement_rows(said: Judgement, of: Texts, policy: Policy, **about: Any) -> list[Row | LeftOut]:
    """The rows of one judgement: a yes or no, a number, a ranking, a side, a word, or a corrected response."""
    value, question = _unpacked(said.value), said.question
    if isinstance(value, list):
        return _ranking(value, of, question, policy, **about)
    if is_missing(value):
        return [*thumbed(of.prompt, _one(said, of), value, question, policy, **about)]
    if isinstance(value, bool):
        return [*thumbed(of.prompt, _one(said, of), _praise(value, question), question, policy, **about)]
    if isinstance(value, int | float):
        low, high = said.scale or _scale(question, value, policy)
        return [*rated(of.prompt, _one(said, of), _praise(value, question), question, low, high, policy, **about)]
    said_text = text(value, question)
    if correction(question):
        return [*demonstration(of.prompt, said_text, **about)]
    return _worded(said, said_text, of, policy, **about)


def _unpacked(value: Any) -> Any:
    """A ranking that was stored as lists of values and ranks, as a list of entries; other values as they are."""
    if not isinstance(value, dict):
        return value
    ranks, names = value.get("rank"), value.get("value", value.get("text"))
    if not isinstance(ranks, list) or not isinstance(names, list) or len(ranks) != len(names):
        raise Reject("invalid_label", f"expected a label, a number or a ranking, got {show(value)}")
    return [{"value": name, "rank": rank} for name, rank in zip(names, ranks, strict=True)]


def _worded(said: Judgement, word: str, of: Texts, policy: Policy, **about: Any) -> list[Row | LeftOut]:
    names = list(said.of) if len(said.of) > 1 else list(of.responses)
    if folded(word) in _WORDS and folded(word) in map(folded, names):
        raise Reject("invalid_label", f"{said.question}: {show(word)} is a word of judgement and the name of a field")
    if len(names) > 1 and (folded(word) in _TIES or _side(word, names) is not None):
        return _preferred(_side(word, names), names, of, policy, **about)
    good = _WORDS.get(folded(word))
    if good is None:
        known = "a side or a tie, or " if len(names) > 1 else ""
        raise Reject("invalid_label", f"{said.question}: {show(word)} is not {known}a word such as yes or bad")
    if folded(word) in ("yes", "no", "true", "false", "pass", "fail", "passed", "failed"):
        _praise(good, said.question)
    return [*thumbed(of.prompt, _one(said, of), good, said.question, policy, **about)]


def is_verdict(word: str, of: Texts) -> bool:
    """Whether a word says which response is better, or whether one is good."""
    names = list(of.responses)
    return folded(word) in _WORDS or (len(names) > 1 and (folded(word) in _TIES or _side(word, names) is not None))


def is_clear(word: str) -> bool:
    """Whether a word of judgement can hardly mean anything else, as 1, A, yes and both can."""
    return len(word) > 1 and not word.isdigit() and folded(word) not in _VAGUE


def correction(question: str) -> bool:
    """Whether a question asks for a better response, by its name."""
    return _CORRECTION.search(question) is not None


def _praise(value: Any, question: str) -> Any:
    """The value, unless the question asks for a fault."""
    if _FAULT.search(question):
        raise Reject("invalid_label", f"{question}: {show(value)} may mean a worse response; say with --mapping")
    return value


def _one(said: Judgement, of: Texts) -> str:
    """The response that a judgement is about: the tool says which, or its question names it, or there is one only."""
    names = [n for n in said.of if n in of.responses] or [n for n in of.responses if folded(n) in folded(said.question)]
    names = names or list(of.responses)
    if len(names) != 1:
        raise Reject("wrong_shape", f"{said.question} does not say of which of {named(names)} it is")
    return of.responses[names[0]]


def _scale(question: str, value: float, policy: Policy) -> tuple[float, float]:
    """The ends of a question's scale: those of the policy, which is the only place where it can stand."""
    found = policy.ranges.get(question, policy.ranges.get("*"))
    if found is None:
        raise Reject(
            "missing_field",
            f"the scale of {question} ({show(value)}) is not in the record; give it with --ranges",
        )
    return found


def _side(word: str, names: Sequence[str]) -> int | None:
    """Which of the responses a word names: by its field, by the end of its field's name, or by left, right, A and B."""
    said, known = folded(word), [folded(name) for name in names]
    if said in known:
        return known.index(said)
    match = _SIDE.fullmatch(said)
    if not match:
        return None
    ends = [numbered_end(name) for name in names]
    if match["which"] in ends:
        return ends.index(match["which"])
    return _POSITIONS.get(match["which"]) if len(names) == 2 else None


def numbered_end(name: str) -> str:
    """The number or side that a name ends in; "" for none."""
    match = re.fullmatch(r".*?(?:(?<!\d)(\d+)|_(a|b|left|right|first|second))", folded(name))
    return (match[1] or match[2]) if match else ""


def _preferred(best: int | None, names: Sequence[str], of: Texts, policy: Policy, **about: Any) -> list[Row | LeftOut]:
    """The comparisons that a choice makes: the best with each other; a tie is one of two only."""
    sides = [of.responses[name] for name in names]
    if len(sides) == 2:
        p_first = 0.5 if best is None else float(best == 0)
        return [*compared(of.prompt, sides[0], sides[1], p_first, policy, **about)]
    if best is None:
        raise Reject("tie", f"none of the {len(sides)} responses was preferred")
    return beaten(of.prompt, [sides[best]], sides[:best] + sides[best + 1 :], policy, **about)


def beaten(
    prompt: list[Message], better: Sequence[str], worse: Sequence[str], policy: Policy, **about: Any
) -> list[Row | LeftOut]:
    """Comparisons of each better response with each worse one."""
    made: list[Row | LeftOut] = []
    for i, (first, second) in enumerate((first, second) for first in better for second in worse):
        try:
            made += compared(prompt, first, second, 1.0, policy, **about)
        except Reject as error:
            made.append(LeftOut(f"comparison {i}", error.reason, error.detail))
    return some(made, "no response was preferred to another")


def _ranking(value: list[Any], of: Texts, question: str, policy: Policy, **about: Any) -> list[Row | LeftOut]:
    """A ranking, rank 1 the best; other lists, such as several labels or spans, are no verdict."""
    if not value or not all(isinstance(v, dict) and "rank" in v and ("value" in v or "text" in v) for v in value):
        raise Reject("invalid_label", f"{question}: {show(value)} is no ranking; several labels are no verdict")
    names = list(of.responses)
    entries = []
    for place in value:
        word = text(place.get("value", place.get("text")), f"{question}.value")
        side = _side(word, names)
        if side is None:
            raise Reject("invalid_label", f"{question}: {show(word)} is none of the responses {named(names)}")
        entries.append((of.responses[names[side]], place["rank"]))
    return ranked(of.prompt, entries, policy, lower_is_better=True, where=f"{question}.rank", **about)


def parsed(value: Any) -> Any:
    """What a text says as JSON; other values, and texts that are not JSON, as they are."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def mapping_in(value: Any, where: str) -> Record:
    """An object, or its JSON text; null is an empty one."""
    held = {} if is_missing(value) else parsed(value)
    if not isinstance(held, dict):
        raise Reject("wrong_type", f"{where}: expected an object, got {show(value)}")
    return held


def objects_in(value: Any, where: str) -> list[Record]:
    """A list of objects; null is an empty one."""
    entries = [] if value is None else value
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise Reject("wrong_type", f"{where}: expected a list of objects, got {show(value)}")
    return entries
