"""The feedback export of Open WebUI: a rated reply, and the tree of the chat it stands in."""

import re
from typing import Any

from pipelines.converters.base import Converter, LeftOut, Policy, Record
from pipelines.converters.labels import Made, compared, each_objective, is_missing, person, rated, some, thumbed
from pipelines.converters.messages import facts, has, messages, needed, number, show, structure, text
from schemas.errors import Reject
from schemas.feedback import Message

# Blocks that the interface writes into a reply; it takes them off again before a model sees the reply.
_BLOCK = re.compile(r"<details type=\"(?:reasoning|code_interpreter)\".*?</details>\s*", re.DOTALL)
_RENDERED = re.compile(r"<details type=\"(reasoning|code_interpreter|tool_calls)\"")


def _open_webui(record: Record, source: str, policy: Policy) -> Made:
    """A rated reply and the chat it stands in.

    Shape: https://github.com/open-webui/open-webui, backend/open_webui/models/feedbacks.py and `feedbackHandler` in
    src/lib/components/chat/Messages/ResponseMessage.svelte. The judgements are `rating` (thumbs), `details` where a
    number from 1 to 10 was given, and `comparison` in an arena: the reply against each sibling in the snapshot, better
    than it if rated 1, worse if -1, a tie if the sibling was rated alike. The chat's system prompt is read, a
    workspace model's own is not in the export. A reply with rendered reasoning or tool calls is rejected.
    """
    data, meta, snapshot = (structure(needed(record, name), name) for name in ("data", "meta", "snapshot"))
    chat = _chat(snapshot)
    thread = _thread(chat, text(needed(meta, "message_id", "meta."), "meta.message_id"))
    prompt, response = _turns_of(chat, thread[:-1]), _reply(thread[-1], "the rated message")
    about: dict[str, Any] = {
        "labeller": person(record.get("user_id")),
        "metadata": facts(record, "id") | facts(data, "model_id", "reason"),
    }

    def make(name: str, source: str) -> Made:
        if name == "rating":
            return [*thumbed(prompt, response, _thumb(data), "data.rating", policy, source=source, **about)]
        if name == "details":
            given = _detail(data)
            return [*rated(prompt, response, given, "data.details.rating", 1, 10, policy, source=source, **about)]
        return _against_siblings(chat, thread, _thumb(data), prompt, policy, source=source, **about)

    names = ["rating", *(["details"] if not is_missing(_detail(data)) else [])]
    if meta.get("arena") is True and data.get("sibling_model_ids"):
        names.append("comparison")
    return each_objective(names, source, policy, make)


def _chat(snapshot: Record) -> Record:
    """The chat itself; in an export it is wrapped into the record that the server keeps of it."""
    outer = structure(needed(snapshot, "chat", "snapshot."), "snapshot.chat")
    return structure(outer["chat"], "snapshot.chat.chat") if "chat" in outer else outer


def _messages_of(chat: Record) -> Record:
    history = structure(needed(chat, "history", "chat."), "chat.history")
    return structure(needed(history, "messages", "chat.history."), "chat.history.messages")


def _thread(chat: Record, last: str) -> list[Record]:
    """The messages from the first of the chat to the one of id `last`."""
    held = _messages_of(chat)
    found: list[Record] = []
    seen: set[str] = set()
    at: Any = last
    while at is not None:
        at = text(at, "parentId")
        if at in seen or at not in held:
            why = "is its own ancestor" if at in seen else "is not in the snapshot"
            raise Reject("wrong_shape", f"message {at[:60]!r} {why}")
        seen.add(at)
        found.append(structure(held[at], f"message {at[:60]!r}"))
        at = found[-1].get("parentId")
    return found[::-1]


def _turns_of(chat: Record, thread: list[Record]) -> list[Message]:
    """The chat's system prompt, if it has one, and the turns as the model saw them: without rendered blocks."""
    params = chat.get("params")
    system = params.get("system") if isinstance(params, dict) else None
    before = [] if is_missing(system) else [Message(role="system", content=text(system, "chat.params.system"))]
    for i, message in enumerate(thread):
        if message.get("files"):
            raise Reject("unsupported_content", f"turn {i} has files ({show(message['files'])}); only text can be read")
    turns = messages([{"role": m.get("role"), "content": m.get("content")} for m in thread], "chat")
    for i, turn in enumerate(turns):
        if turn["role"] == "assistant":
            turn["content"] = _BLOCK.sub("", turn["content"])
            if _RENDERED.search(turn["content"]):
                raise Reject("unsupported_content", f"turn {i} has tool calls written into it; they cannot be read")
    return before + turns


def _reply(message: Record, where: str) -> str:
    (turn,) = messages([{"role": message.get("role"), "content": message.get("content")}], where)
    if turn["role"] != "assistant":
        raise Reject("wrong_shape", f"{where} is of role {turn['role']}, not the assistant's")
    if found := _RENDERED.search(turn["content"]):
        raise Reject("unsupported_content", f"{where} has {found[1]} written into it; only its text could be kept")
    return turn["content"]


def _thumb(data: Record) -> bool | None:
    """True for a rating of 1, False for -1, None for none."""
    given = data.get("rating")
    if is_missing(given):
        return None
    if (value := number(given, "data.rating")) not in (1, -1):
        raise Reject("invalid_label", f"data.rating: expected 1 or -1, got {show(given)}")
    return value == 1


def _detail(data: Record) -> Any:
    details = data.get("details")
    return details.get("rating") if isinstance(details, dict) else None


def _against_siblings(
    chat: Record, thread: list[Record], good: bool | None, prompt: list[Message], policy: Policy, **about: Any
) -> Made:
    own = _reply(thread[-1], "the rated message")
    made: Made = []
    said = set()
    for key, sibling in _siblings(chat, thread):
        try:
            other, annotation = _reply(sibling, "a sibling"), sibling.get("annotation")
            alike = isinstance(annotation, dict) and good is not None and _thumb(annotation) == good
            if other not in said:
                made += compared(prompt, own, other, 0.5 if alike else _share(good), policy, **about)
            said.add(other)
        except Reject as error:
            made.append(LeftOut(f"sibling {key[:60]!r}", error.reason, error.detail))
    return some(made, "no other reply in the snapshot can be compared with it")


def _share(good: bool | None) -> float | None:
    return None if good is None else float(good)


def _siblings(chat: Record, thread: list[Record]) -> list[tuple[str, Record]]:
    """The other replies to the same message."""
    held, parent = _messages_of(chat).items(), thread[-1].get("parentId")
    return [(k, m) for k, m in held if isinstance(m, dict) and m.get("parentId") == parent and m is not thread[-1]]


CONVERTERS = [
    Converter(
        name="open_webui",
        feedback="binary, scalar, pairwise",
        matches=lambda r: has(r, "data", "meta", "snapshot", "type"),
        convert=_open_webui,
        fields={
            "meta.message_id": "the rated message: response; the messages above it: prompt",
            "snapshot.chat": "the texts, and the chat's system prompt",
            "data.rating": "reward, judgement rating",
            "data.details.rating": "reward, judgement details",
            "data.sibling_model_ids, meta.arena": "judgement comparison, with the siblings in the snapshot",
            "user_id": "labeller, as a hash",
            "id, data.model_id, data.reason": "metadata",
        },
        required=("data", "meta", "snapshot"),
        labels="rating: 1 is good, -1 is bad; details: from 1 to 10, more is better; arena: 1 beats the siblings",
    ),
]
