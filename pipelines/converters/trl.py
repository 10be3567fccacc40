"""The dataset formats of TRL: preference, unpaired preference, prompt-completion and conversational messages.

Shapes as in https://huggingface.co/docs/trl/dataset_formats. Not read here: `text` (no prompt) and
prompt-only; stepwise supervision is in `trainers`. TRL has no column for the labeller, so it stays null.
"""

import re

from pipelines.converters.base import Converter, LeftOut, Policy, Record, Texts
from pipelines.converters.labels import GOOD_OR_BAD, thumbed
from pipelines.converters.messages import (
    SYSTEM,
    SYSTEM_FIELD,
    answer,
    answered,
    conversation,
    has,
    held,
    judged,
    kept,
    needed,
    pair,
    refuse_media,
    refuse_unweighted,
    side,
    text,
    with_system,
)
from schemas.errors import Reject
from schemas.feedback import Message, Row, comparison, demonstration

# A record with one of these beside chosen and rejected has its prompt there, not inside the two.
_PROMPT = frozenset(("question", "input", "instruction", "query", "context", "history", "conversations"))
_PROMPT |= {"post", "article", "title", "text", "user", "messages", "request", "task"}
# Columns that hold no prompt, whatever words are in them.
_FACT = re.compile(
    r"(.*_)?(id|source|dataset|subset|split|category|type|lang|language|model|domain|tag|comment)s?", re.I
)


def _is_preference(record: Record) -> bool:
    """Without `prompt`, the prompt is inside the two sides, unless another column may hold it."""
    if not has(record, "chosen", "rejected") or judged(record, "chosen", "rejected", *_POLICIES):
        return False
    return "prompt" in record or not any(_may_be_prompt(key, record) for key in record)


_POLICIES = ("chosen_model", "rejected_model", "chosen_policy", "rejected_policy")


def _may_be_prompt(key: object, record: Record) -> bool:
    """By its name; or, where the sides are plain texts with no turns to tell apart, by having several words."""
    if not isinstance(key, str) or key in ("chosen", "rejected", "tools", *SYSTEM) or _FACT.fullmatch(key):
        return False
    value, plain = record[key], isinstance(record["chosen"], str)
    return key.lower() in _PROMPT or (plain and isinstance(value, str) and len(value.split()) > 1)


def _preference(record: Record, source: str, policy: Policy) -> list[Row | LeftOut]:
    """Preference: standard or conversational, with the prompt explicit, implicit or both.

    Without `prompt`, the turns that both sides share are the prompt. Older files have a prompt
    text beside whole conversations; then the conversations are read, and the prompt must be a turn of them.
    """
    refuse_media(record)
    chosen, rejected = needed(record, "chosen"), needed(record, "rejected")
    if "prompt" in record:
        prompt = conversation(needed(record, "prompt"), "prompt")
    elif isinstance(chosen, str) or isinstance(rejected, str):
        shared, chosen, rejected = _split_shared(text(chosen, "chosen"), text(rejected, "rejected"))
        prompt = conversation(shared, "prompt")
    else:
        prompt = []
    turns, first, second = pair(prompt, side(chosen, "chosen"), side(rejected, "rejected"))
    return [*comparison(with_system(record, turns), first, second, 1.0, source=source, metadata=kept(record))]


def _split_shared(chosen: str, rejected: str) -> tuple[str, str, str]:
    """The beginning that two texts share, up to its last white space so that no word is cut, and the two rests."""
    if chosen == rejected:
        raise Reject("identical_responses", f"chosen and rejected are both {chosen[:80]!r}")
    differs = (i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b)
    shared = chosen[: next(differs, min(len(chosen), len(rejected)))]
    cut = max((m.start() for m in re.finditer(r"\s", shared)), default=0)
    if not shared[:cut].strip():
        raise Reject("histories_differ", "there is no `prompt`, and chosen and rejected begin with different words")
    return shared[:cut], chosen[cut:], rejected[cut:]


def _unpaired(record: Record, source: str, policy: Policy) -> list[Row | LeftOut]:
    """Unpaired preference: a completion and whether it is good.

    The label is a boolean, 1 or 0, or one of these as text; a score such as 0.3 is rejected, never cast.
    """
    refuse_media(record)
    prompt, response = _completion(record)
    about = {"source": source, "metadata": kept(record)}
    return [*thumbed(prompt, response, held(record, "label"), "label", policy, **about)]


def _prompt_completion(record: Record, source: str, policy: Policy) -> list[Row | LeftOut]:
    """Prompt-completion: a demonstration."""
    refuse_media(record)
    prompt, response = _completion(record)
    return [*demonstration(prompt, response, source=source, metadata=kept(record))]


def _completion(record: Record) -> tuple[list[Message], str]:
    prompt = conversation(needed(record, "prompt"), "prompt")
    turns, response = answer(prompt, side(needed(record, "completion"), "completion"), "completion")
    return with_system(record, turns), response


def _messages(record: Record, source: str, policy: Policy) -> list[Row | LeftOut]:
    """Conversational language modelling: the last turn, which must be the assistant's, is the demonstration.

    OpenAI's and Mistral's files are of this shape; a last turn of `weight` 0 is rejected, as it is not to be learnt.
    """
    refuse_media(record)
    turns, response = answer([], answered(needed(record, "messages"), "messages"), "messages")
    refuse_unweighted(record["messages"], "messages")
    return [*demonstration(with_system(record, turns), response, source=source, metadata=kept(record))]


_TOOLS = {**SYSTEM_FIELD, "tools": "metadata: tools, as JSON text"}

CONVERTERS = [
    Converter(
        name="trl_preference",
        feedback="pairwise",
        matches=_is_preference,
        convert=_preference,
        fields={
            "prompt": "prompt; if absent, what chosen and rejected share",
            "chosen": "response with reward 1",
            "rejected": "response with reward 0",
            **_TOOLS,
        },
        required=("chosen", "rejected"),
        labels="chosen is better than rejected",
        texts=Texts("prompt", ("chosen", "rejected")),
    ),
    Converter(
        name="trl_unpaired",
        feedback="binary",
        matches=lambda r: has(r, "prompt", "completion", "label"),
        convert=_unpaired,
        fields={"prompt": "prompt", "completion": "response", "label": "reward: 1 or 0", **_TOOLS},
        required=("prompt", "completion", "label"),
        telling=("label", lambda n: n == 0),
        labels=GOOD_OR_BAD,
    ),
    Converter(
        name="trl_prompt_completion",
        feedback="demonstration",
        matches=lambda r: has(r, "prompt", "completion") and not judged(r),
        convert=_prompt_completion,
        fields={"prompt": "prompt", "completion": "response with reward 1", **_TOOLS},
        required=("prompt", "completion"),
        labels="none: every completion is an example to follow",
        texts=Texts("prompt", ("completion",)),
    ),
    Converter(
        name="trl_messages",
        feedback="demonstration",
        matches=lambda r: has(r, "messages") and "completion" not in r and not judged(r),
        convert=_messages,
        fields={"messages": "the last assistant turn: response with reward 1; the turns before it: prompt", **_TOOLS},
        required=("messages",),
        labels="none: every conversation is an example to follow",
    ),
]
