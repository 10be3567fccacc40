"""OpenAssistant's exports, as trees or with one message a record.

A prompt is the path from the root to the message that was answered. Trees are walked without recursion: they may be
deeper than Python's stack. Not read: emojis, comments, and labels other than quality.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

from pipelines.converters.base import Converter, LeftOut, Policy, Record, touched
from pipelines.converters.labels import Made, each_objective, is_missing, objectives, rated, some, standings
from pipelines.converters.messages import facts, flag, has, judged, needed, number, show, structure, text
from schemas.errors import POLICY_REASONS, Reject
from schemas.feedback import Message, Row, demonstration

# --- trees -------------------------------------------------------------------------------------

_ROLES = {"prompter": "user", "assistant": "assistant"}


class _Node(NamedTuple):
    """A message of a tree, the turn it is, and the node above it: so up to the root, which is its prompt."""

    message: Record
    turn: Message
    above: "_Node | None"


class _Broken(NamedTuple):
    """A message that cannot be used, and so nothing that follows it: how its place is called, and why."""

    message: Any
    told: LeftOut


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
    broken: list[_Broken] = []
    turns = list(_prompter_turns(_Node(root, _turn(root), None), broken))

    def make(name: str, source: str) -> Made:
        judge, otherwise = _OASST[name]
        return some([one for _, one in judge(turns, record, source, policy)], otherwise)

    return [*each_objective(_judgements(turns, policy), source, policy, make), *(one.told for one in broken)]


Turns = list[tuple[_Node, list[_Node]]]  # prompters' turns, and the assistants' replies to each


Told = list[tuple[_Node, Row | LeftOut]]  # what was made, each of which reply


def _judgements(turns: Turns, policy: Policy) -> list[str]:
    """The names of a tree's judgements, those that must be asked for among them if any is."""
    if policy.objective != "all":
        return list(_OASST)
    rated_too = any(_quality(reply.message) is not None for _, replies in turns for reply in replies)
    return ["rankings", "quality"] if rated_too else ["rankings"]


def _prompter_turns(root: _Node, broken: list[_Broken]) -> Iterator[tuple[_Node, list[_Node]]]:
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
                broken.append(_Broken(given, LeftOut(where, error.reason, error.detail)))
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


def _rankings(turns: Turns, record: Record, source: str, policy: Policy) -> Told:
    told: Told = []
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
        places = standings(_path(turn), entries, policy, lower_is_better=True, **about)
        told += [(replies[i], one) for i, one in places]
    return told


def _quality(message: Record) -> Any:
    """The mean quality of a message: labels are an object by name, or in tables three lists, or a list of objects; None
    if it has none.
    """
    labels = message.get("labels")
    if isinstance(labels, list):
        return next(
            (one.get("value") for one in labels if isinstance(one, dict) and one.get("name") == "quality"), None
        )
    if not isinstance(labels, dict):
        return None
    if isinstance(labels.get("name"), list) and isinstance(labels.get("value"), list):
        return dict(zip(map(str, labels["name"]), labels["value"], strict=False)).get("quality")
    quality = labels.get("quality")
    return quality.get("value") if isinstance(quality, dict) else None


def _qualities(turns: Turns, record: Record, source: str, policy: Policy) -> Told:
    told: Told = []
    for turn, replies in turns:
        prompt = _path(turn)
        for reply in replies:
            value = _quality(reply.message)
            if is_missing(value) and (policy.missing == "drop" or policy.objective == "all"):
                continue
            about: dict[str, Any] = {"source": source, "metadata": _about(record, turn, [reply])}
            response = reply.turn["content"]
            try:
                rows = rated(prompt, response, value, "quality", 0, 1, policy, labeller="human", **about)
                told += [(reply, row) for row in rows]
            except Reject as error:
                told.append((reply, LeftOut(f"message {_id(reply.message)}", error.reason, error.detail)))
    return told


def _demonstrations(turns: Turns, record: Record, source: str, policy: Policy) -> Told:
    followed: set[int] = set()  # the assistants' messages that may be learnt from, by identity
    told: Told = []
    for turn, replies in turns:
        if turn.above is not None and id(turn.above) not in followed:
            continue
        best = _best(replies)
        followed |= {id(reply) for reply in best}
        for reply in best:
            about = _about(record, turn, [reply])
            try:
                rows = demonstration(_path(turn), reply.turn["content"], source=source, metadata=about)
                told += [(reply, row) for row in rows]
            except Reject as error:
                told.append((reply, LeftOut(f"message {_id(reply.message)}", error.reason, error.detail)))
    return told


def _best(replies: list[_Node]) -> list[_Node]:
    """The reply of lowest rank, all of them if several share it; an only reply needs none."""
    if len(replies) == 1:
        return replies
    ranks = [(number(r.message["rank"], "rank"), r) for r in replies if not is_missing(r.message.get("rank"))]
    return [reply for rank, reply in ranks if rank == min(ranks, key=lambda entry: entry[0])[0]]


_OASST: dict[str, tuple[Callable[[Turns, Record, str, Policy], Told], str]] = {  # judgement, and where it makes nothing
    "rankings": (_rankings, "no two replies to a turn are ranked"),
    "quality": (_qualities, "no reply has a quality"),
    "demonstrations": (_demonstrations, "no reply is best among its siblings"),
}


# --- one message a record ------------------------------------------------------------------------

_OWN_ID, _PARENT = ("message_id", "user_message_id"), ("parent_id", "parent_message_id")
_READ = ("message_tree_id", "text", "role", "lang", "rank", "deleted", "review_result", "synthetic", "model_name")
_BARE = (
    "; nobody rated the messages of this file: --objective demonstrations takes replies as examples to follow, "
    "--missing unlabelled keeps them to be labelled later"
)
Fate = Made | LeftOut  # what becomes of a message: rows and parts left out, or why it is rejected


def _is_message_row(record: Record) -> bool:
    """One message of a prompter or an assistant, with the id of the one before it."""
    ids = any(has(record, *names) for names in zip(_OWN_ID, _PARENT, strict=True))
    if not ids or not has(record, "text", "role") or "replies" in record or judged(record, "rank", "labels"):
        return False
    return record["role"] is None or (isinstance(record["role"], str) and record["role"] in _ROLES)


class _Messages:
    """The messages of a file by their ids, each with its replies in the order of the file: its trees.

    A message that has lost its parent, is its own ancestor, or shares its id belongs to no tree, and neither does what
    follows it. Held are the texts, the quality and what else `_READ` names.
    """

    def __init__(self, records: Iterable[Record]):
        self.by_id: dict[str, Record] = {}
        self.lost: dict[str, LeftOut] = {}
        self.parents: dict[str, str] = {}
        self.roots: dict[str, str] = {}  # the id of a message → that of the first of its tree
        for record in records:
            if (name := _first(record, _OWN_ID)) is None:
                continue
            if name in self.by_id:
                self.lost[name] = LeftOut("", "wrong_shape", f"the id {name[:60]!r} is there twice")
                continue
            held = {key: value for key in _READ if not is_missing(value := record.get(key))}
            if (quality := _quality(record)) is not None:
                held["labels"] = {"quality": {"value": quality}}
            self.by_id[name] = held | {"message_id": name, "replies": []}
            if (parent := _first(record, _PARENT)) is not None:
                self.parents[name] = parent
        self.judged = any("rank" in one or "labels" in one for one in self.by_id.values())
        for name in self.by_id:
            self._find_root(name)
        for name, parent in self.parents.items():
            if name not in self.lost:
                self.by_id[parent]["replies"].append(self.by_id[name])

    def _find_root(self, name: str) -> None:
        """Note to which tree a message and all above it belong, or why to none."""
        passed: dict[str, None] = {}  # in order
        at = name
        while at not in self.roots and at not in self.lost and at not in passed:
            passed[at] = None
            if at not in self.parents:
                self.roots[at] = at
            elif self.parents[at] not in self.by_id:
                why = "is not in the file; give it one file that holds the whole conversation"
                self.lost[at] = LeftOut("", "missing_field", f"the parent {self.parents[at][:60]!r} {why}")
            else:
                at = self.parents[at]
        if at in passed and at not in self.roots and at not in self.lost:
            self.lost[at] = LeftOut("", "wrong_shape", f"message {at[:60]!r} is its own ancestor")
        for one in passed:
            if at in self.roots:
                self.roots[one] = self.roots[at]
            else:
                self.lost[one] = self.lost[at]


def _first(record: Record, names: tuple[str, ...]) -> str | None:
    """The id under the first of these names that has one."""
    value = next((record[name] for name in names if not is_missing(record.get(name))), None)
    return str(value) if isinstance(value, str | int) else None


def _of_file(records: Iterable[Record], source: str, policy: Policy) -> Callable[[Record], Made]:
    """One message a record; its prompt are the messages above it, which may stand anywhere in the file.

    Shape: https://huggingface.co/datasets/OpenAssistant/oasst1 and oasst2; with `user_message_id` and
    `parent_message_id`, the seed data of https://github.com/LAION-AI/Open-Assistant. The rows are those of the same
    messages as trees (`oasst_trees`). An assistant's message makes its own rows, and a comparison is made by the worse
    of the two. A message that makes none is accepted if it stands in the prompt or in the comparison of another;
    if not, it is rejected, as `missing_label` where there is nothing else wrong with it.
    """
    messages = _Messages(records)

    @lru_cache(maxsize=1024)
    def fates(root: str) -> tuple[dict[str, Fate], Counter[str]]:
        counting = touched.set(Counter())
        try:
            return _fates(messages.by_id[root], source, policy), touched.get()
        finally:
            touched.reset(counting)

    def convert(record: Record) -> Made:
        for field in ("text", "role"):
            needed(record, field)
        name = _first(record, _OWN_ID)
        if name is None:
            raise Reject("missing_field", f"{_OWN_ID[0]} is absent or null")
        if name in messages.lost:
            raise Reject(messages.lost[name].reason, messages.lost[name].detail)
        of_tree, counts = fates(messages.roots[name])
        if name == messages.roots[name] and (counted := touched.get(None)) is not None:
            counted.update(counts)  # once for the tree
        fate = of_tree[name]
        if isinstance(fate, LeftOut):
            raise Reject(
                fate.reason, fate.detail + ("" if messages.judged or fate.reason != "missing_label" else _BARE)
            )
        return fate

    return convert


def _fates(root: Record, source: str, policy: Policy) -> dict[str, Fate]:
    """What becomes of every message of a tree, by its id."""
    broken: list[_Broken] = []
    try:
        turns = list(_prompter_turns(_Node(root, _turn(root), None), broken))
    except Reject as error:
        turns, broken = [], [_Broken(root, LeftOut("", error.reason, error.detail))]
    made: dict[str, Made] = {}
    said: dict[int, set[str]] = {}  # responses of rows, by the turn they answer
    for name in objectives(_judgements(turns, policy), policy):
        own = f"{source}:{name}" if policy.objective == "all" else source
        for node, one in _OASST[name][0](turns, root, own, policy):
            made.setdefault(node.message["message_id"], []).append(one)
            if not isinstance(one, LeftOut):
                said.setdefault(id(node.above), set()).add(one["response"])
    used = _used(turns, said)
    unusable = {id(one.message): one.told for one in broken}
    fates: dict[str, Fate] = {}
    waiting: list[tuple[Record, LeftOut | None]] = [(root, None)]
    while waiting:
        message, above = waiting.pop()
        above = unusable.get(id(message), above)
        waiting += [(reply, above) for reply in message["replies"]]
        name = message["message_id"]
        fates[name] = above or _fate(message, made.get(name, []), name in used)
    return fates


def _used(turns: Turns, said: dict[int, set[str]]) -> set[str]:
    """The ids of the messages that stand in a row, as its response or in its prompt."""
    used: set[str] = set()
    for turn, replies in turns:
        for reply in replies:
            at = reply if reply.turn["content"] in said.get(id(turn), ()) else None
            while at is not None and at.message["message_id"] not in used:
                used.add(at.message["message_id"])
                at = at.above
    return used


def _fate(message: Record, made: Made, used: bool) -> Fate:
    left_out = [one for one in made if isinstance(one, LeftOut)]
    if used or len(left_out) < len(made):
        return made
    wrong = [one for one in left_out if one.reason not in POLICY_REASONS]
    if left_out:
        return (wrong or left_out)[0]
    what = "nobody judged the reply" if message.get("role") == "assistant" else "no reply to the message was judged"
    return LeftOut("", "missing_label", f"{what}, nor any that follows it")


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
        name="oasst_messages",
        feedback="scalar",
        matches=_is_message_row,
        convert=lambda record, source, policy: _of_file([record], source, policy)(record),
        fields={
            "text, role": "response; the messages above it: prompt",
            "message_id, user_message_id": "the message's id; metadata",
            "parent_id, parent_message_id": "the message above it, anywhere in the file",
            "rank": "reward, judgement rankings, among the replies to one turn; as rank_as says",
            "labels.quality": "reward, judgement quality",
            "deleted, review_result": "what is deleted or failed its review is left out",
            "message_tree_id, lang, synthetic, model_name": "metadata",
        },
        required=("text", "role", _OWN_ID, _PARENT),
        labels="as in trees; a message that makes no row is accepted where it stands in the prompt or comparison of "
        "another; every process holds the texts of the whole file in memory",
        of_file=_of_file,
    ),
]
