"""Messages to token ids: the one place where a conversation becomes what the model sees.

The prompt is rendered with the generation prompt as text P, the whole conversation as F. F must start
with P; P and the rest of F are tokenised apart, so the boundary is always a token boundary. The response ends
with the end-of-turn token; what a template writes after that token is not part of it.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from schemas.errors import Reject, UserError
from schemas.feedback import Message

log = logging.getLogger(__name__)
_PROBE: list[Message] = [{"role": "user", "content": "x"}]
_PROBE_ANSWER = "y"


@dataclass
class Renderer:
    """A tokenizer with its chat template, and what was learned of it from one probe conversation."""

    tokenizer: Any
    end_of_turn: int  # token id that ends an assistant turn
    appended: bool  # the template writes no end-of-turn token, so the tokenizer's EOS is appended
    bos: int | None  # token id that every sequence starts with
    special: frozenset[str]  # texts that would become special tokens

    def ids(self, prompt: list[Message], response: str) -> tuple[list[int], list[int]]:
        """Token ids of prompt and response, end of turn included; `Reject` when they cannot be made faithfully."""
        self._refuse_special(prompt, response)
        messages = [_for_template(m) for m in prompt]
        start = self._text(messages, generation=True)
        whole = self._text([*messages, {"role": "assistant", "content": response}], generation=False)
        if not whole.startswith(start):
            raise Reject(
                "template_error",
                "the conversation rendered whole does not start with the prompt rendered for generation: "
                f"…{whole[max(0, len(start) - 40) : len(start)]!r} against …{start[-40:]!r}",
            )
        if response.strip() not in whole[len(start) :]:
            raise Reject("template_error", "the chat template changes the response's text")
        prompt_ids = self._with_bos(self._tokens(start))
        return prompt_ids, self._ended(self._tokens(whole[len(start) :]))

    def _text(self, messages: list[dict[str, Any]], generation: bool) -> str:
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation)
        except Exception as error:  # templates raise what they like, jinja2's errors and their own
            raise Reject("template_error", f"{type(error).__name__}: {error}") from None

    def _tokens(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _with_bos(self, ids: list[int]) -> list[int]:
        return ids if self.bos is None or ids[:1] == [self.bos] else [self.bos, *ids]

    def _ended(self, ids: list[int]) -> list[int]:
        """Cut what the template writes after the end-of-turn token, or append that token where it writes none."""
        if self.end_of_turn in ids:
            return ids[: ids.index(self.end_of_turn) + 1]
        if not self.appended:
            raise Reject("template_error", "the chat template left this response without an end-of-turn token")
        return [*ids, self.end_of_turn]

    def _refuse_special(self, prompt: list[Message], response: str) -> None:
        """Text that spells a special token would become that token: a second BOS, or a turn that ends early."""
        for text in (response, *(m["content"] + (m.get("tool_calls") or "") for m in prompt)):
            for token in self.special:
                if token in text:
                    raise Reject("special_token_in_text", f"the text holds {token!r}")


def _for_template(message: Message) -> dict[str, Any]:
    calls = message.get("tool_calls")
    plain: dict[str, Any] = {"role": message["role"], "content": message["content"]}
    try:
        return {**plain, "tool_calls": orjson.loads(calls)} if calls else plain
    except orjson.JSONDecodeError as error:
        raise Reject("template_error", f"tool_calls is not valid JSON: {error}") from None


def load(model: str | Path) -> Renderer:
    """The renderer of a local model directory; `UserError` when its tokenizer or template is unusable."""
    from transformers import AutoTokenizer, logging

    logging.set_verbosity_error()  # it warns of every row longer than the context; those are rejected with a reason
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except Exception as error:
        raise UserError(f"{model}: the tokenizer cannot be loaded ({type(error).__name__}: {error})") from None
    if not tokenizer.chat_template:
        raise UserError(
            f"{model}: the tokenizer has no chat template; add a chat_template.jinja to the directory "
            "(chat models ship one; a base model needs one chosen for it)"
        )
    if "strftime_now" in str(tokenizer.chat_template):
        log.warning("%s: the chat template writes today's date, so token ids differ from day to day", model)
    special = {t.content: i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    special |= dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    end_of_turn, appended = _end_of_turn(tokenizer, set(special.values()), str(model))
    adds = tokenizer("")["input_ids"][:1]
    bos = tokenizer.bos_token_id if adds and adds[0] == tokenizer.bos_token_id else None
    return Renderer(tokenizer, end_of_turn, appended, bos, frozenset(special))


def _end_of_turn(tokenizer: Any, special_ids: set[int], model: str) -> tuple[int, bool]:
    """The first special token after an assistant's text; without one, the tokenizer's EOS, which is appended."""
    try:
        text = tokenizer.apply_chat_template([*_PROBE, {"role": "assistant", "content": _PROBE_ANSWER}], tokenize=False)
    except Exception as error:
        raise UserError(f"{model}: the chat template cannot render a user and an assistant turn ({error})") from None
    if _PROBE_ANSWER not in text:
        raise UserError(f"{model}: the chat template does not write an assistant's text as it is; mend the template")
    tail = tokenizer(text[text.rindex(_PROBE_ANSWER) + 1 :], add_special_tokens=False)["input_ids"]
    special = [i for i in tail if i in special_ids]
    if special:
        return special[0], False
    if tokenizer.eos_token_id is None:
        raise UserError(f"{model}: neither the chat template nor the tokenizer has an end-of-turn token; set eos_token")
    return tokenizer.eos_token_id, True
