"""The dataset formats of LLaMA-Factory: alpaca and sharegpt, each for demonstrations, preferences and KTO.

Shapes as in https://github.com/hiyouga/LLaMA-Factory/blob/main/data/README.md, with the column names of its
demo files. Other names that a `dataset_info.json` may give are not read. The labeller is unknown: null.
"""

from pipelines.converters.base import Converter, LeftOut, Policy, Record
from pipelines.converters.labels import GOOD_OR_BAD, thumbed
from pipelines.converters.messages import (
    SYSTEM_FIELD,
    answer,
    answered,
    has,
    held,
    judged,
    kept,
    messages,
    needed,
    pair,
    refuse_media,
    refuse_unweighted,
    show,
    side,
    text,
    with_system,
)
from schemas.errors import Reject
from schemas.feedback import Message, Row, comparison, demonstration

_SIDES = ("chosen", "rejected", "chosen_model", "rejected_model", "chosen_policy", "rejected_policy")

# --- sharegpt: a list of turns -----------------------------------------------------------------


def _is_sharegpt_preference(record: Record) -> bool:
    """The demo file's `conversations`, or `messages` with one message a side (a list a side is TRL's)."""
    sides = isinstance(record.get("chosen"), dict) or isinstance(record.get("rejected"), dict)
    turns = "conversations" in record or ("messages" in record and sides)
    return turns and has(record, "chosen", "rejected") and not judged(record, *_SIDES)


def _is_sharegpt_kto(record: Record) -> bool:
    return ("messages" in record or "conversations" in record) and ("label" in record or "kto_tag" in record)


def _name_of_turns(record: Record) -> str:
    return "conversations" if "conversations" in record else "messages"


def _prompt_and_response(record: Record) -> tuple[list[Message], str]:
    name = _name_of_turns(record)
    prompt, response = answer([], answered(needed(record, name), name), name)
    return with_system(record, prompt), response


def _sharegpt_preference(record: Record, source: str, policy: Policy) -> list[Row | LeftOut]:
    """The conversation is the prompt; `chosen` and `rejected` are one message each."""
    refuse_media(record)
    chosen, rejected = (side(needed(record, name), name) for name in ("chosen", "rejected"))
    name = _name_of_turns(record)
    prompt, first, second = pair(messages(needed(record, name), name), chosen, rejected)
    return [*comparison(with_system(record, prompt), first, second, 1.0, source=source, metadata=kept(record))]


def _sharegpt_kto(record: Record, source: str, policy: Policy) -> list[Row | LeftOut]:
    """The last turn is the response; `kto_tag`, or the demo file's `label`, says whether it is good."""
    refuse_media(record)
    name = "kto_tag" if "kto_tag" in record else "label"
    prompt, response = _prompt_and_response(record)
    return [*thumbed(prompt, response, held(record, name), name, policy, source=source, metadata=kept(record))]


def _sharegpt(record: Record, source: str, policy: Policy) -> list[Row | LeftOut]:
    """The last turn is the demonstration; if it is a `function_call`, its text is the response."""
    refuse_media(record)
    prompt, response = _prompt_and_response(record)
    refuse_unweighted(record[_name_of_turns(record)], _name_of_turns(record))
    return [*demonstration(prompt, response, source=source, metadata=kept(record))]


# --- alpaca: an instruction and an answer -------------------------------------------------------


def _alpaca_prompt(record: Record) -> list[Message]:
    """System, the rounds of `history`, and the instruction; `input` follows it on a new line."""
    instruction = text(needed(record, "instruction"), "instruction")
    given = text(record.get("input") or "", "input")
    asked = "\n".join(part for part in (instruction, given) if part)
    return with_system(record, [*rounds(record.get("history") or []), Message(role="user", content=asked)])


def rounds(history: object) -> list[Message]:
    """The turns of `[[question, answer], …]`."""
    if not isinstance(history, list):
        raise Reject("wrong_type", f"history: expected a list of [question, answer], got {show(history)}")
    return [turn for i, spoken in enumerate(history) for turn in _round(spoken, f"history[{i}]")]


def _round(spoken: object, where: str) -> list[Message]:
    if not isinstance(spoken, list) or len(spoken) != 2:
        raise Reject("wrong_type", f"{where}: expected [question, answer], got {show(spoken)}")
    question, reply = (text(turn, where) for turn in spoken)
    return [Message(role="user", content=question), Message(role="assistant", content=reply)]


def _alpaca_preference(record: Record, source: str, policy: Policy) -> list[Row | LeftOut]:
    """`chosen` and `rejected` are texts."""
    refuse_media(record)
    first, second = (text(needed(record, name), name) for name in ("chosen", "rejected"))
    return [*comparison(_alpaca_prompt(record), first, second, 1.0, source=source, metadata=kept(record))]


def _alpaca_kto(record: Record, source: str, policy: Policy) -> list[Row | LeftOut]:
    """`kto_tag` says whether `output` is good."""
    refuse_media(record)
    prompt, response = _alpaca_prompt(record), text(needed(record, "output"), "output")
    about = {"source": source, "metadata": kept(record)}
    return [*thumbed(prompt, response, held(record, "kto_tag"), "kto_tag", policy, **about)]


def _alpaca(record: Record, source: str, policy: Policy) -> list[Row | LeftOut]:
    """`output` is the demonstration."""
    refuse_media(record)
    response = text(needed(record, "output"), "output")
    return [*demonstration(_alpaca_prompt(record), response, source=source, metadata=kept(record))]


_TURNS = {
    "conversations": "prompt",
    "messages": "prompt, in files without conversations",
    **SYSTEM_FIELD,
    "tools": "metadata: tools, as JSON text",
}
_WITH_RESPONSE = _TURNS | {"conversations": "the last turn: response; the turns before it: prompt"}
_ASKED = {
    "instruction": "prompt",
    "input": "prompt, on a new line after instruction",
    "history": "prompt: earlier rounds",
    **SYSTEM_FIELD,
}
_PAIR = {"chosen": "response with reward 1", "rejected": "response with reward 0"}
CONVERTERS = [
    Converter(
        name="sharegpt_preference",
        feedback="pairwise",
        matches=_is_sharegpt_preference,
        convert=_sharegpt_preference,
        fields=_TURNS | _PAIR,
        required=("chosen", "rejected", ("conversations", "messages")),
        labels="chosen is better than rejected",
    ),
    Converter(
        name="sharegpt_kto",
        feedback="binary",
        matches=_is_sharegpt_kto,
        convert=_sharegpt_kto,
        fields=_WITH_RESPONSE | {"kto_tag": "reward: 1 or 0", "label": "reward, in files without kto_tag"},
        required=(("conversations", "messages"), ("label", "kto_tag")),
        telling=("label", lambda n: n == 0),
        labels=GOOD_OR_BAD,
    ),
    Converter(
        name="sharegpt",
        feedback="demonstration",
        matches=lambda r: has(r, "conversations") and not judged(r),
        convert=_sharegpt,
        fields=_WITH_RESPONSE,
        required=("conversations",),
        labels="none: every conversation is an example to follow",
    ),
    Converter(
        name="alpaca_preference",
        feedback="pairwise",
        matches=lambda r: has(r, "instruction", "chosen", "rejected") and "prompt" not in r and not judged(r, *_SIDES),
        convert=_alpaca_preference,
        fields=_ASKED | _PAIR,
        required=("instruction", "chosen", "rejected"),
        labels="chosen is better than rejected",
    ),
    Converter(
        name="alpaca_kto",
        feedback="binary",
        matches=lambda r: has(r, "instruction", "output", "kto_tag"),
        convert=_alpaca_kto,
        fields=_ASKED | {"output": "response", "kto_tag": "reward: 1 or 0"},
        required=("instruction", "output", "kto_tag"),
        telling=("kto_tag", lambda n: n == 0),
        labels=GOOD_OR_BAD,
    ),
    Converter(
        name="alpaca",
        feedback="demonstration",
        matches=lambda r: has(r, "instruction", "output") and not judged(r),
        convert=_alpaca,
        fields=_ASKED | {"output": "response with reward 1"},
        required=("instruction", "output"),
        labels="none: every output is an example to follow",
    ),
]
