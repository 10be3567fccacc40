"""Files told by the names of their columns: pairs of texts under names that are in wide use, LLaMA-Factory's
`dataset_info.json`, which gives other names, and what is known to hold no feedback.

Two columns that may hold the prompt, or two pairs of responses, are not read: a mapping has to say which.
"""

from collections.abc import Mapping
from typing import Any

from pipelines.converters.base import Converter, LeftOut, Policy, Record
from pipelines.converters.llama_factory import rounds
from pipelines.converters.messages import (
    SYSTEM,
    SYSTEM_FIELD,
    conversation,
    facts,
    has,
    judged,
    kept,
    needed,
    pair,
    refuse_media,
    show,
    side,
    with_system,
)
from schemas.errors import Reject, UserError
from schemas.feedback import Row, comparison

# --- two texts ---------------------------------------------------------------------------------

_ASKED = ("prompt", "question", "query", "input", "instruction")
_BETTER_WORSE = (
    ("chosen", "rejected"),
    ("chosen_response", "rejected_response"),
    ("response_chosen", "response_rejected"),
    ("response_j", "response_k"),
    ("response", "rejected_response"),
)
_NAMES = ("chosen_model", "rejected_model", "chosen_policy", "rejected_policy")
_CONTEXT = frozenset(
    ("context", "post", "article", "title", "passage", "document", "text", "messages", "conversations")
)


def _columns(record: Record) -> tuple[str, str, str] | None:
    """The columns of the prompt, of the better and of the worse response; None unless there is one of each."""
    pairs = [names for names in _BETTER_WORSE if has(record, *names)]
    if len(pairs) != 1 or not _CONTEXT.isdisjoint(record):
        return None
    asked = [name for name in _ASKED if name in record]
    return (asked[0], *pairs[0]) if len(asked) == 1 else None


def _is_column_pair(record: Record) -> bool:
    found = _columns(record)
    if found is None or found[:2] in (("prompt", "chosen"), ("instruction", "chosen")):  # TRL's, alpaca's
        return False
    return not judged(record, *found, *_NAMES)


def _column_pair(record: Record, source: str, policy: Policy) -> list[Row | LeftOut]:
    """A prompt and two texts, with `system` and `history` ([[question, answer], …]) where the file has them.

    Where the names were confirmed: https://huggingface.co/datasets/Intel/orca_dpo_pairs (question, chosen);
    https://github.com/axolotl-ai-cloud/axolotl/blob/main/src/axolotl/prompt_strategies/dpo/chatml.py (question or
    input, chosen); https://huggingface.co/datasets/lvwerra/stack-exchange-paired (question, response_j: j is better);
    https://huggingface.co/datasets/shibing624/DPO-En-Zh-20k-Preference (question, response_chosen).
    """
    refuse_media(record)
    found = _columns(record)
    if found is None:
        raise Reject("wrong_shape", f"needs one of {', '.join(_ASKED)}, and one pair of responses beside it")
    asked, better, worse = found
    prompt = [*rounds(record.get("history") or []), *conversation(needed(record, asked), asked)]
    prompt, first, second = pair(prompt, *(side(needed(record, name), name) for name in (better, worse)))
    metadata = kept(record) | facts(record, "chosen_model", "rejected_model")
    return [*comparison(with_system(record, prompt), first, second, 1.0, source=source, metadata=metadata)]


# --- what else such files say ------------------------------------------------------------------

_OURS = {
    "alpaca": {"prompt": "instruction", "query": "input", "response": "output", "history": "history"},
    "sharegpt": {"messages": "conversations"},
}
_SHARED = {name: name for name in ("system", "tools", "images", "videos", "audios", "chosen", "rejected", "kto_tag")}


def columns_of(dataset_info: Any, file_name: str) -> dict[str, str]:
    """Column of a file → the name that the converters know it by, from LLaMA-Factory's `dataset_info.json`.

    {} if no entry names the file, or its entry no columns. As in
    https://github.com/hiyouga/LLaMA-Factory/blob/main/src/llamafactory/data/parser.py. `UserError` if the
    entries of a file contradict each other. The names of roles (`tags`) are no columns: see `messages`.
    """
    if not isinstance(dataset_info, Mapping):
        raise UserError(f"dataset_info.json: expected an object with an entry a dataset, got {show(dataset_info)}")
    entries = [e for e in dataset_info.values() if isinstance(e, dict) and e.get("file_name") == file_name]
    told = [found for entry in entries if (found := _renaming(entry))]
    if any(other != told[0] for other in told):
        raise UserError(f"dataset_info.json gives {file_name} different columns in its entries; leave one of them")
    return told[0] if told else {}


def _renaming(entry: Mapping[str, Any]) -> dict[str, str]:
    formatting, columns = entry.get("formatting", "alpaca"), entry.get("columns")
    ours = _SHARED | _OURS.get(formatting if isinstance(formatting, str) else "", {})
    given = columns if isinstance(columns, dict) else {}
    return {theirs: ours[name] for name, theirs in given.items() if name in ours and isinstance(theirs, str)}


def renamed(record: Record, columns: Mapping[str, str]) -> Record:
    """The record under the names that the converters know; a column that another one replaces is left out."""
    taken = set(columns.values())
    return {columns.get(key, key): value for key, value in record.items() if key in columns or key not in taken}


def refusal(record: Record) -> str:
    """Why a record of a known shape holds no feedback that could be read, in a sentence; '' if there is no such."""
    if has(record, "text", "label") and isinstance(record["label"], list):
        told = "`label` is a list of unnamed numbers, and `text` is not in the template of SteerLM's regression files"
        return f'{told}; describe it with --mapping, where field: "label[4]" is the fifth of them'
    if record.get("type") == "scalar_feedback" and has(record, "output", "reward"):
        return "`reward` has no known scale, as in HALOs' scalar feedback; say its range in a mapping"
    if "text" in record and not judged(record) and not any(name in record for name in (*_ASKED, "messages")):
        return "`text` holds prompt and response in one; give them as `prompt` and `completion`, or as `messages`"
    if set(record) <= {"prompt", "id", "prompt_id", "source", "tools", *SYSTEM} and "prompt" in record:
        return "there are prompts only, and no responses that feedback could be about"
    return ""


CONVERTERS = [
    Converter(
        name="column_pairs",
        feedback="pairwise",
        matches=_is_column_pair,
        convert=_column_pair,
        fields={
            "prompt, question, query, input, instruction": "prompt: the one that is there",
            "chosen, chosen_response, response_chosen, response_j, response": "response with reward 1",
            "rejected, rejected_response, response_rejected, response_k": "response with reward 0",
            "history": "prompt: earlier rounds",
            **SYSTEM_FIELD,
            "chosen_model, rejected_model": "metadata",
            "tools": "metadata: tools, as JSON text",
        },
        required=(),
        labels="the one called chosen, response_j or response is better than the other",
    ),
]
