"""The form a judge's answer must have, read strictly, and the probabilities at the place where its label stands."""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.labellers.endpoint import Reply
from pipelines.labellers.judge_settings import Settings
from schemas.errors import Reject

SHOWN = 500  # characters of an answer that is rejected


@dataclass(frozen=True)
class Form:
    """What an answer must look like: one of `labels`, alone or in JSON under `field`; nothing else is accepted."""

    labels: tuple[str, ...]
    field: str  # score or winner
    json: bool = True
    explain: bool = False

    @property
    def numbers(self) -> bool:
        return self.field == "score"

    def words(self) -> str:
        """The instruction at the prompt's end."""
        value = "N" if self.numbers else '"A"'
        if not self.json:
            return "Answer with the number alone." if self.numbers else "Answer with one letter alone: A or B."
        explanation = '"explanation": "in a sentence or two, why", ' if self.explain else ""
        either = "" if self.numbers else ', or "B" for "A"'
        return f'Answer with JSON alone: {{{explanation}"{self.field}": {value}}}{either}.'

    def schema(self) -> dict[str, Any]:
        values: Any = [int(label) for label in self.labels] if self.numbers else list(self.labels)
        fields = {"explanation": {"type": "string"}} if self.explain else {}
        fields[self.field] = {"type": "integer" if self.numbers else "string", "enum": values}
        return {"type": "object", "properties": fields, "required": list(fields), "additionalProperties": False}

    def read(self, text: str) -> tuple[str, str]:
        """(label, explanation) of an answer; `Reject` with its text when it is anything but the form."""
        label, explanation = self._in_json(text) if self.json else (text.strip(), "")
        if label in self.labels:
            return label, explanation
        if self.numbers and re.fullmatch(r"-?[0-9]{1,300}", label):
            ends = f"{self.labels[0]} to {self.labels[-1]}"
            raise Reject("invalid_score", f"{label[:40]} lies outside {ends}: {text[:SHOWN]!r}")
        raise _unparsable(text)

    def _in_json(self, text: str) -> tuple[str, str]:
        try:
            found = json.loads(text, object_pairs_hook=_distinct, parse_constant=_refused)
        except (ValueError, RecursionError):
            raise _unparsable(text) from None
        if not isinstance(found, dict) or found.keys() != self.schema()["properties"].keys():
            raise _unparsable(text)
        value, explanation = found[self.field], found.get("explanation", "")
        if type(value) is not (int if self.numbers else str) or not isinstance(explanation, str):
            raise _unparsable(text)
        return str(value), explanation

    def place(self, text: str) -> int | None:
        """Where in an answer's text the label begins."""
        if not self.json:
            return len(text) - len(text.lstrip())
        # inside a string of JSON the quotes would be escaped, so this is the key
        key = re.search(rf'"{self.field}"\s*:\s*"?', text)
        return key.end() if key else None


def form_of(settings: Settings) -> Form:
    numbers = tuple(str(n) for n in range(settings.low, settings.high + 1))
    in_json = settings.structured == "json_schema"
    if settings.mode == "pairwise":
        return Form(("A", "B"), "winner", in_json, settings.explain)
    return Form(numbers, "score", in_json, settings.explain)


def _unparsable(text: str) -> Reject:
    return Reject("unparsable_judgement", repr(text[:SHOWN]))


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON with a name twice holds two answers."""
    if len({name for name, _ in pairs}) < len(pairs):
        raise ValueError("a name twice")
    return dict(pairs)


def _refused(word: str) -> Any:
    raise ValueError(word)


def top(reply: Reply, place: int | None) -> list[tuple[str, float]] | None:
    """(token, log-prob) of the likeliest tokens at the one that begins at `place` of the text."""
    if place is None or not reply.tokens:
        return None
    # thoughts may come before the text, an end-of-turn token after it
    at = b"".join(part for part, _ in reply.tokens).rfind(reply.text.encode())
    left = at + len(reply.text[:place].encode())
    for part, likeliest in reply.tokens if at >= 0 else ():
        if left < len(part):
            return likeliest
        left -= len(part)
    return None


def shares(top: Sequence[Sequence[Any]], labels: Sequence[str]) -> dict[str, float]:
    """Label → probability, over tokens that differ only in blanks and JSON's signs around them."""
    shares: dict[str, float] = {}
    for token, logprob in top:
        label = token.strip(' \t\r\n"{}:,')
        if label in labels:
            shares[label] = shares.get(label, 0.0) + math.exp(min(0.0, logprob))
    return shares
