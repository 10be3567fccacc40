"""Trees of messages: OpenAssistant's exports, and the feedback export of Open WebUI.

A prompt is the path from the root to the message that was answered. Trees are walked without recursion: they may be
deeper than Python's stack. Not read: emojis, comments, and labels other than quality.
"""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from pipelines.converters.base import Converter, LeftOut, Policy, Record
from pipelines.converters.judges import Made, each_objective
from pipelines.converters.labels import annotator, compared, is_missing, ranked, rated, some, thumbed
from pipelines.converters.messages import facts, flag, has, messages, needed, number, show, structure, text
from schemas.errors import Reject
from schemas.feedback import Message, demonstration

# --- OpenAssistant -----------------------------------------------------------------------------

_ROLES = {"prompter": "user", "assistant": "assistant"}


class _Node(NamedTuple):
    """A message of a tree, the turn it is, and the node above it: so up to the root, which is its prompt."""

    message: Record
    turn: Message
    above: "_Node | None"


def _is_tree(record: Record) -> bool:
    return has(record, "message_tree_id", "prompt") and (record["prompt"] is None or isinstance(record["prompt"], dict))


def _oasst(record: Record, source: str, policy: Policy) -> Made:
    """A tree of turns; assistants' replies to one prompter's turn are ranked among each other, 0 is best.

    Shape: https://github.com/LAION-AI/Open-Assistant/blob/main/oasst-data/oasst_data/schemas.py; meaning of `rank`:
    https://huggingface.co/datasets/OpenAssistant/oasst1. The judgements are `rankings`, wherever two replies or more
    are ranked, and `quality` from 0 to 1, where replies have it. `demonstrations` must be asked for by name: replies
    that are best among their siblings, or have none, on paths of such replies. A reply that nobody ranked makes a row
    only under `missing` unlabelled. What is deleted, or failed its review, is left out with all that follows it.
    """
    needed(record, "message_tree_id")
    root = structure(needed(record, "prompt"), "prompt")
    left_out: list[LeftOut] = []
    turns = list(_prompter_turns(_Node(root, _turn(root), None), left_out))
    rated_too = any(_quality(reply.message) is not None for _, replies in turns for reply in replies)

    def make(name: str, source: str) -> Made:
        return _OASST[name](turns, record, source, policy)

    names = (["rankings", "quality"] if rated_too else ["rankings"]) if policy.objective == "all" else list(_OASST)
    return [*each_objective(names, source, policy, make), *left_out]


Turns = list[tuple[_Node, list[_Node]]]  # prompters' turns, and the assistants' replies to each


def _prompter_turns(root: _Node, left_out: list[LeftOut]) -> Iterator[tuple[_Node, list[_Node]]]:
    """The prompters' turns that an assistant replied to, from the root down, in order; what cannot be used is told."""
    waiting = [root]
    while waiting:
        node = waiting.pop()
        replies = []
        for i, given in enumerate(_replies(node.message)):
            where = f"replies[{i}] to {_id(node.message)}"
            try:
                reply = structure(given, where)
                replies.append(_Node(reply, _turn(reply), node))
            except Reject as error:
                left_out.append(LeftOut(where, error.reason, error.detail))
        waiting += reversed(replies)
        answers = [reply for reply in replies if reply.turn["role"] == "assistant"]
        if answers and node.turn["role"] == "user":
            yield node, answers


def _turn(message: Record) -> Message:
    """A message as a turn; what was withdrawn, or has no text or role, is rejected."""
    name = f"message {_id(message)}"
    if flag(message, "deleted", f"{name}: "):
        raise Reject("filtered", f"{name} was deleted")
    if flag(message, "review_result", f"{name}: ") is False:
        raise Reject("filtered", f"{name} failed its review")
    given = text(needed(message, "role", f"{name}: "), f"{name}: role")
    if given not in _ROLES:
        raise Reject("unknown_role", f"{name}: role {show(given)} is neither prompter nor assistant")
    return Message(role=_ROLES[given], content=text(needed(message, "text", f"{name}: "), f"{name}: text"))


def _replies(message: Record) -> list[Any]:
    replies = message.get("replies") or []
    if not isinstance(replies, list):
        raise Reject("wrong_type", f"message {_id(message)}: replies: expected a list, got {show(replies)}")
    return replies


def _id(message: Record) -> str:
    name = message.get("message_id")
    return repr(name[:60]) if isinstance(name, str) else "without id"


def _path(node: _Node | None) -> list[Message]:
    turns: list[Message] = []
    while node is not None:
        turns.append(node.turn)
        node = node.above
    return turns[::-1]


def _about(record: Record, turn: _Node, replies: list[_Node]) -> dict[str, Any]:
    """What a turn's rows share: ids, language, and the models that wrote replies, if any did."""
    said = [reply.message for reply in replies]
    models = sorted({m["model_name"] for m in said if isinstance(m.get("model_name"), str)})
    written: dict[str, Any] = {"synthetic": True} if any(m.get("synthetic") is True for m in said) else {}
    if models:
        written["models"] = models
    return facts(record, "message_tree_id") | facts(turn.message, "message_id", "lang") | written


def _rankings(turns: Turns, record: Record, source: str, policy: Policy) -> Made:
    made: Made = []
    for turn, replies in turns:
        ranks = [reply.message.get("rank") for reply in replies]
        together = sum(not is_missing(rank) for rank in ranks) >= 2
        if not together and policy.missing == "drop":
            continue
        entries = [
            (reply.turn["content"], rank if together else None) for reply, rank in zip(replies, ranks, strict=True)
        ]
        about: dict[str, Any] = {"source": source, "metadata": _about(record, turn, replies)}
        about["labeller"] = "human" if together else None
        try:
            made += ranked(_path(turn), entries, policy, lower_is_better=True, **about)
        except Reject as error:
            made.append(LeftOut(f"replies to {_id(turn.message)}", error.reason, error.detail))
    return some(made, "no two replies to a turn are ranked")


def _quality(message: Record) -> Any:
    """The mean quality of a message: labels are an object by name, or three lists in tables; None if it has none."""
    labels = message.get("labels")
    if not isinstance(labels, dict):
        return None
    if isinstance(labels.get("name"), list) and isinstance(labels.get("value"), list):
        return dict(zip(map(str, labels["name"]), labels["value"], strict=False)).get("quality")
    quality = labels.get("quality")
    return quality.get("value") if isinstance(quality, dict) else None


def _qualities(turns: Turns, record: Record, source: str, policy: Policy) -> Made:
    made: Made = []
    for turn, replies in turns:
        prompt = _path(turn)
        for reply in replies:
            value = _quality(reply.message)
            if is_missing(value) and (policy.missing == "drop" or policy.objective == "all"):
                continue
            about: dict[str, Any] = {"source": source, "metadata": _about(record, turn, [reply])}
            try:
                made += rated(prompt, reply.turn["content"], value, "quality", 0, 1, policy, labeller="human", **about)
            except Reject as error:
                made.append(LeftOut(f"message {_id(reply.message)}", error.reason, error.detail))
    return some(made, "no reply has a quality")


def _demonstrations(turns: Turns, record: Record, source: str, policy: Policy) -> Made:
    followed: set[int] = set()  # the assistants' messages that may be learnt from, by identity
    made: Made = []
    for turn, replies in turns:
        if turn.above is not None and id(turn.above) not in followed:
            continue
        best = _best(replies)
        followed |= {id(reply) for reply in best}
        for reply in best:
            about = _about(record, turn, [reply])
            try:
                made += demonstration(_path(turn), reply.turn["content"], source=source, metadata=about)
            except Reject as error:
                made.append(LeftOut(f"message {_id(reply.message)}", error.reason, error.detail))
    return some(made, "no reply is best among its siblings")


def _best(replies: list[_Node]) -> list[_Node]:
    """The reply of lowest rank, all of them if several share it; an only reply needs none."""
    if len(replies) == 1:
        return replies
    ranks = [(number(r.message["rank"], "rank"), r) for r in replies if not is_missing(r.message.get("rank"))]
    return [reply for rank, reply in ranks if rank == min(ranks, key=lambda entry: entry[0])[0]]


_OASST = {"rankings": _rankings, "quality": _qualities, "demonstrations": _demonstrations}


def _is_message_row(record: Record) -> bool:
    """One message a record, with the id of the one before it."""
    ids = ("message_id" in record and "parent_id" in record) or "parent_message_id" in record
    return ids and has(record, "text", "role") and "replies" not in record


def _message_row(record: Record, source: str, policy: Policy) -> Made:
    """Always rejected: the prompt of a message is in other records."""
    judged = "rank" in record or "labels" in record
    cure = "ingest the .trees export instead, or join by the parent's id: --mapping, see docs/mapping.md"
    none = "nobody has rated the messages: there is no feedback in them"
    what = "a record holds one message, and its prompt is in others"
    raise Reject("missing_field", f"{what}; {cure if judged else none}")


# --- Open WebUI --------------------------------------------------------------------------------

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
    user = record.get("user_id")
    about: dict[str, Any] = {
        "labeller": "human" if is_missing(user) else annotator(user),
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


_REFUSED = "not read: a message alone has no prompt; take the .trees export, or join with --mapping"

CONVERTERS = [
    Converter(
        name="oasst_trees",
        feedback="scalar",
        matches=_is_tree,
        convert=_oasst,
        fields={
            "prompt": "the root; the turns down to a prompter's message: prompt",
            "prompt…replies[].text": "response",
            "prompt…replies[].rank": "reward, judgement rankings, among the replies to one turn; as rank_as says",
            "prompt…replies[].labels.quality": "reward, judgement quality",
            "prompt…deleted, review_result": "what is deleted or failed its review is left out",
            "message_tree_id": "metadata",
            "prompt…message_id, lang, synthetic, model_name": "metadata",
        },
        required=("message_tree_id", "prompt"),
        labels="rank 0 is best; quality from 0 to 1, more is better; demonstrations only if asked for by name",
    ),
    Converter(
        name="message_rows",
        feedback="none",
        matches=_is_message_row,
        convert=_message_row,
        fields={"text, role": _REFUSED, "parent_id, parent_message_id": _REFUSED, "rank, labels": "not read"},
        required=("text", "role", ("parent_id", "parent_message_id")),
        labels="rank 0 is best among the replies to a message; without rank and labels there is no feedback",
    ),
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
