"""A conversation as text and token ids, by a tokenizer that is given: no library of models is imported here.

A reward model reads the whole conversation exactly as its chat template writes it, what stands behind the end of the
last turn included; `whole` is that, for the labeller and for the training of reward models alike.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from schemas.errors import Reject, UserError
from schemas.feedback import Message


@dataclass
class Conversation:
    """A tokenizer with a chat template."""

    tokenizer: Any
    bos: int | None  # token id that every sequence starts with
    special: frozenset[str]  # texts that would become special tokens

    def whole(self, messages: Sequence[Message], **given: str) -> list[int]:
        """Token ids of the messages, and of what else the template is given, with exactly one BOS.

        `Reject` when the template cannot render them, or leaves out or changes the last text.
        """
        self.refuse_special(messages, *given.values())
        text = self.text([for_template(m) for m in messages], generation=False, **given)
        for last in given.values() or [messages[-1]["content"]]:
            if last.strip() not in text:
                raise Reject("template_error", f"the chat template changes the text {last[:40]!r}, or leaves it out")
        return self.with_bos(self.tokens(text))

    def text(self, messages: list[dict[str, Any]], *, generation: bool, **given: str) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=generation, **given
            )
        except Exception as error:  # templates raise what they like, jinja2's errors and their own
            raise Reject("template_error", f"{type(error).__name__}: {error}") from None

    def tokens(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def with_bos(self, ids: list[int]) -> list[int]:
        return ids if self.bos is None or ids[:1] == [self.bos] else [self.bos, *ids]

    def refuse_special(self, messages: Sequence[Message], *texts: str) -> None:
        """Text that spells a special token would become that token: a second BOS, or a turn that ends early."""
        for text in (*texts, *(m["content"] + (m.get("tool_calls") or "") for m in messages)):
            for token in self.special:
                if token in text:
                    raise Reject("special_token_in_text", f"the text holds {token!r}")


def for_template(message: Message) -> dict[str, Any]:
    """A message as chat templates take it."""
    calls = message.get("tool_calls")
    plain: dict[str, Any] = {"role": message["role"], "content": message["content"]}
    try:
        return {**plain, "tool_calls": orjson.loads(calls)} if calls else plain
    except orjson.JSONDecodeError as error:
        raise Reject("template_error", f"tool_calls is not valid JSON: {error}") from None


def of(tokenizer: Any, model: str) -> Conversation:
    """What the tokenizer of `model` does to conversations; `UserError` without a chat template."""
    if not tokenizer.chat_template:
        raise UserError(
            f"{model}: the tokenizer has no chat template; add a chat_template.jinja to the directory "
            "(chat models ship one; a base model needs one chosen for it)"
        )
    adds = tokenizer("")["input_ids"][:1]
    bos = tokenizer.bos_token_id if adds and adds[0] == tokenizer.bos_token_id else None
    return Conversation(tokenizer, bos, frozenset(special_ids(tokenizer)))


def special_ids(tokenizer: Any) -> dict[str, int]:
    """Text and id of every special token."""
    special = {t.content: i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    return special | dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))


def longest(asked: int, config: Any, tokenizer: Any) -> int:
    """The most tokens of a conversation: those asked for, or what model or tokenizer says that the model takes."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None) or asked
    return min(asked, positions, tokenizer.model_max_length)
