"""Files of the fine-tuning services: preference pairs as OpenAI takes them, and what Vertex AI takes for Gemini.

OpenAI's demonstrations are `messages`, which `trl` reads. Only text can be a response; Gemini's function calls
are kept in the turns before it. Not read: images, audio and files, and a model's thoughts.
"""

from typing import Any

from pipelines.converters.base import Converter, LeftOut, Policy, Record
from pipelines.converters.labels import compared, is_missing
from pipelines.converters.messages import (
    answer,
    as_json,
    conversation,
    has,
    judged,
    kept,
    needed,
    pair,
    show,
    side,
    text,
    verdict,
)
from schemas.errors import Reject
from schemas.feedback import Message, Row, comparison, demonstration

# --- OpenAI ------------------------------------------------------------------------------------


def _openai(record: Record, source: str, policy: Policy) -> list[Row | LeftOut]:
    """A prompt and the output that was preferred to the other.

    Shape: https://developers.openai.com/api/docs/guides/direct-preference-optimization; Azure, Together
    (https://docs.together.ai/docs/fine-tuning/preference-tuning) and Fireworks take the same. Files in which
    `input` is the list of messages itself are read too. An output of several messages ends in the response.
    """
    given = needed(record, "input")
    about = given if isinstance(given, dict) else {}
    turns = needed(about, "messages", "input.") if isinstance(given, dict) else given
    prompt = conversation(turns, "input.messages" if about else "input")
    better, worse = (side(needed(record, name), name) for name in ("preferred_output", "non_preferred_output"))
    metadata = kept(record) | kept(about)
    return [*comparison(*pair(prompt, better, worse), 1.0, source=source, metadata=metadata)]


# --- Gemini ------------------------------------------------------------------------------------

_ROLES = {"user": "user", "model": "assistant", "system": "system", "function": "tool"}


def _gemini(record: Record, source: str, policy: Policy) -> list[Row | LeftOut]:
    """Two completions of a conversation, one with score 1 and one with score 0; equal scores are a tie.

    Shape: https://docs.cloud.google.com/vertex-ai/generative-ai/docs/models/gemini-preference-tuning-prepare.
    """
    prompt = _contents(record)
    given = needed(record, "completions")
    if not isinstance(given, list) or len(given) != 2 or not all(isinstance(c, dict) for c in given):
        raise Reject("wrong_shape", f"completions: expected a list of two completions, got {show(given)}")
    first, second = (_completion(c, f"completions[{i}]") for i, c in enumerate(given))
    raw = (_score(given[0], "completions[0].score"), _score(given[1], "completions[1].score"))
    p_first = None if raw[0] is None or raw[1] is None else (1 + raw[0] - raw[1]) / 2
    return [*compared(prompt, first, second, p_first, policy, raw=raw, source=source, metadata=kept(record))]


def _completion(completion: Record, where: str) -> str:
    turn = _turn(needed(completion, "completion", f"{where}."), f"{where}.completion", "assistant")
    return _answer([turn], f"{where}.completion")[1]


def _answer(turns: list[Message], where: str) -> tuple[list[Message], str]:
    """The prompt and the response, which must not be cut down to its text in silence."""
    if turns and turns[-1].get("tool_calls"):
        raise Reject("unsupported_content", f"{where}: the response calls a function; only its text could be kept")
    return answer([], turns, where)


def _score(completion: Record, where: str) -> float | None:
    value = completion.get("score")
    return None if is_missing(value) else float(verdict(value, where))


def _gemini_sft(record: Record, source: str, policy: Policy) -> list[Row | LeftOut]:
    """A conversation whose last turn, the model's, is the demonstration.

    Shape: https://cloud.google.com/vertex-ai/generative-ai/docs/models/gemini-supervised-tuning-prepare.
    """
    prompt, response = _answer(_contents(record), "contents")
    return [*demonstration(prompt, response, source=source, metadata=kept(record))]


def _is_gemini_sft(record: Record) -> bool:
    turns = has(record, "contents") and isinstance(record["contents"], list | dict | None)
    return turns and "completions" not in record and not judged(record)


def _contents(record: Record) -> list[Message]:
    """The system instruction, under either spelling, and the turns of `contents`."""
    given = needed(record, "contents")
    turns = [given] if isinstance(given, dict) else given
    if not isinstance(turns, list):
        raise Reject("wrong_type", f"contents: expected a list of turns, got {show(given)}")
    spoken = [_turn(turn, f"contents[{i}]", "user") for i, turn in enumerate(turns)]
    for name in ("system_instruction", "systemInstruction"):
        if record.get(name) is not None:
            said = _turn(record[name], name, "system")
            return [Message(role="system", content=said["content"]), *spoken] if said["content"].strip() else spoken
    return spoken


def _turn(value: Any, where: str, otherwise: str) -> Message:
    """A turn from its `parts`; `otherwise` is its role where none is given."""
    if isinstance(value, str):
        return Message(role=otherwise, content=value)
    if not isinstance(value, dict):
        raise Reject("wrong_type", f"{where}: expected a turn with parts, got {show(value)}")
    name = value.get("role")
    role = otherwise if is_missing(name) else _ROLES.get(text(name, f"{where}.role"))
    if role is None:
        raise Reject("unknown_role", f"{where}: role {show(name)} is none of {', '.join(_ROLES)}")
    parts = needed(value, "parts", f"{where}.")
    parts = [_part(p, f"{where}.parts[{i}]") for i, p in enumerate(parts if isinstance(parts, list) else [parts])]
    return _joined(parts, role, where)


def _part(part: Any, where: str) -> tuple[str, Any]:
    """What a part is, and what it holds: its text, a function's name and arguments, or its answer."""
    if isinstance(part, str):
        return "text", part
    if not isinstance(part, dict):
        raise Reject("wrong_type", f"{where}: expected a part, got {show(part)}")
    held = [key for key, value in part.items() if value is not None]
    kind = next((key for key in ("text", "functionCall", "functionResponse") if key in held), None)
    if kind is None or part.get("thought"):
        raise Reject("unsupported_content", f"{where}: a part with {', '.join(map(show, held[:5]))} is not plain text")
    return kind, text(part["text"], f"{where}.text") if kind == "text" else part[kind]


def _joined(parts: list[tuple[str, Any]], role: str, where: str) -> Message:
    """One turn of the parts; what a function answered is a turn of role tool."""
    said = "".join(value for kind, value in parts if kind == "text")
    calls = [value for kind, value in parts if kind == "functionCall"]
    answers = [value for kind, value in parts if kind == "functionResponse"]
    if answers:
        return Message(role="tool", content=said + "\n".join(as_json(a, f"{where}.functionResponse") for a in answers))
    made = Message(role=role, content=said)
    if calls:
        made["tool_calls"] = as_json([_call(c, f"{where}.functionCall") for c in calls], f"{where}.functionCall")
    return made


def _call(call: Any, where: str) -> dict[str, Any]:
    if not isinstance(call, dict):
        raise Reject("wrong_type", f"{where}: expected a name and args, got {show(call)}")
    function = {"name": text(needed(call, "name", f"{where}."), f"{where}.name"), "arguments": call.get("args") or {}}
    return {"type": "function", "function": function}


_TOOLS = {"tools": "metadata: tools, as JSON text"}
_SPOKEN = {"system_instruction, systemInstruction": "prompt: the system turn", **_TOOLS}

CONVERTERS = [
    Converter(
        name="openai_preference",
        feedback="pairwise",
        matches=lambda r: has(r, "input", "preferred_output", "non_preferred_output") and not judged(r),
        convert=_openai,
        fields={
            "input": "prompt: its messages; metadata: its tools",
            "preferred_output": "response with reward 1",
            "non_preferred_output": "response with reward 0",
        },
        required=("input", "preferred_output", "non_preferred_output"),
        labels="preferred_output is better than non_preferred_output",
    ),
    Converter(
        name="vertex",
        feedback="pairwise",
        matches=lambda r: has(r, "contents", "completions") and not judged(r, "completions"),
        convert=_gemini,
        fields={
            "contents": "prompt",
            **_SPOKEN,
            "completions[].completion": "the two responses",
            "completions[].score": "reward; raw_reward",
        },
        required=("contents", "completions"),
        labels="score 1 is better than score 0; equal scores are a tie (dropped, or .5 by --ties half)",
    ),
    Converter(
        name="vertex_sft",
        feedback="demonstration",
        matches=_is_gemini_sft,
        convert=_gemini_sft,
        fields={"contents": "the last turn: response with reward 1; the turns before it: prompt", **_SPOKEN},
        required=("contents",),
        labels="none: every conversation is an example to follow",
    ),
]
