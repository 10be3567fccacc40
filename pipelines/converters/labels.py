"""From what a source says of responses to rows: verdicts, ratings and ranks under the policies for ties and for labels
that are missing. Arithmetic only; reading the fields is `messages`' work.
"""

import hashlib
from collections.abc import Iterable, Sequence
from itertools import combinations, pairwise
from typing import Any

from pipelines.converters.base import LeftOut, Policy, note
from pipelines.converters.messages import number, scaled, verdict
from schemas.errors import Reject
from schemas.feedback import Message, Row, comparison, score, thumb, unlabelled

_NOBODY = {"labeller": None}  # gave no label


def annotator(user: object) -> str:
    """The labeller of a person: a hash, so that nobody's name or address is published."""
    return "human:" + hashlib.blake2b(str(user).encode("utf-8", "backslashreplace"), digest_size=6).hexdigest()


def objectives(names: Sequence[str], policy: Policy) -> list[str]:
    """Those of a record's judgements, by name, that are asked for."""
    if policy.objective == "all":
        return list(names)
    if policy.objective not in names:
        raise Reject("missing_label", f"no judgement called {policy.objective!r}; there are {', '.join(names)}")
    return [policy.objective]


# --- one or two responses ----------------------------------------------------------------------


def is_missing(value: Any, sentinels: Iterable[Any] = ()) -> bool:
    """Whether a label is null, blank, or one of the values that stand for none; numbers also match as text."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return True
    return any(value == s or (isinstance(value, str) and value.strip() == str(s)) for s in sentinels)


def compared(
    prompt: list[Message],
    first: str,
    second: str,
    p_first: float | None,
    policy: Policy,
    *,
    raw: tuple[float | None, float | None] = (None, None),
    **facts: Any,
) -> list[Row]:
    """The rows of a comparison; `p_first`, the probability that `first` is better, is None where nobody said."""
    if p_first is None:
        _missing("the comparison has no verdict", policy)
        return [row for text in (first, second) for row in unlabelled(prompt, text, **(facts | _NOBODY))]
    if p_first == 0.5:
        if policy.ties == "drop":
            raise Reject("tie", "neither response was preferred")
        rows = comparison(prompt, first, second, p_first, raw=raw, **facts)
        if policy.ties == "half":
            note("ties")
        return rows
    return comparison(prompt, first, second, p_first, raw=raw, **facts)


def preferred(value: float, prefers_first: float, prefers_second: float, policy: Policy) -> float:
    """The probability that the first response is better, from a place on a scale between the two ends."""
    p = (value - prefers_second) / (prefers_first - prefers_second)
    if not 0 <= p <= 1:
        raise Reject("reward_out_of_range", f"{value:g} is not between {prefers_first:g} and {prefers_second:g}")
    if policy.strength == "hard" or p == 0.5:
        return float(p > 0.5) if p != 0.5 else 0.5
    note("strength")
    return p


def rated(
    prompt: list[Message],
    response: str,
    value: Any,
    where: str,
    low: float,
    high: float,
    policy: Policy,
    *,
    lower_is_better: bool = False,
    sentinels: Iterable[Any] = (),
    **facts: Any,
) -> list[Row]:
    """A scalar row from a number between `low` and `high`; the raw reward is the number as given."""
    if is_missing(value, sentinels):
        _missing(f"{where} is {value!r}", policy)
        return unlabelled(prompt, response, **(facts | _NOBODY))
    raw, reward = scaled(value, where, low, high)
    return score(prompt, response, 1 - reward if lower_is_better else reward, raw_reward=raw, **facts)


def thumbed(prompt: list[Message], response: str, value: Any, where: str, policy: Policy, **facts: Any) -> list[Row]:
    """A binary row from a yes or no as `verdict` reads it."""
    if is_missing(value):
        _missing(f"{where} is {value!r}", policy)
        return unlabelled(prompt, response, **(facts | _NOBODY))
    return thumb(prompt, response, verdict(value, where), **facts)


def _missing(what: str, policy: Policy) -> None:
    if policy.missing == "drop":
        raise Reject("missing_label", what)
    note("missing")


# --- k responses -------------------------------------------------------------------------------

Entry = tuple[str, Any]  # a response, and its rank or score


def ranked(
    prompt: list[Message],
    entries: Sequence[Entry],
    policy: Policy,
    *,
    lower_is_better: bool,
    where: str = "rank",
    sentinels: Iterable[Any] = (),
    **facts: Any,
) -> list[Row | LeftOut]:
    """The responses of a prompt that were ranked against each other, as `policy.rank_as` says.

    `scores`: a scalar row each, whose reward is the share of the other places that are worse: 1 for the best, 0 for the
    worst, and the middle of their places for equal ones. Otherwise comparisons: of neighbours, of all pairs, or of the
    best with each other. What cannot be used is a `LeftOut`; `Reject` where nothing is left.
    """
    made: list[Row | LeftOut] = []
    usable: list[tuple[str, float]] = []
    for i, (response, value) in enumerate(entries):
        try:
            if is_missing(value, sentinels):
                _missing(f"{where} is {value!r}", policy)
                made += unlabelled(prompt, response, **(facts | _NOBODY))
            else:
                usable.append((response, _rank(value, where) if lower_is_better else number(value, where)))
        except Reject as error:
            made.append(LeftOut(f"response {i}", error.reason, error.detail))
    usable.sort(key=lambda entry: entry[1] if lower_is_better else -entry[1])
    made += _places(prompt, usable, **facts) if policy.rank_as == "scores" else _pairs(prompt, usable, policy, **facts)
    return some(made, "no two responses are ranked")


def some(made: list[Row | LeftOut], otherwise: str = "nothing in the record can be used") -> list[Row | LeftOut]:
    """What was made, if there is a row in it; else `Reject` with the reason of the first part that was left out."""
    if not all(isinstance(m, LeftOut) for m in made):
        return made
    first = next((m for m in made if isinstance(m, LeftOut)), None)
    if first is None:
        raise Reject("missing_label", otherwise)
    raise Reject(first.reason, f"{first.part}: {first.detail}; {otherwise}")


def _rank(value: Any, where: str) -> float:
    """A place among others; what is below 0 is none, and would be the best of all."""
    if (place := number(value, where)) < 0:
        raise Reject("invalid_label", f"{where}: {place:g} is no rank")
    return place


def _places(prompt: list[Message], best_first: list[tuple[str, float]], **facts: Any) -> list[Row | LeftOut]:
    values = [value for _, value in best_first]
    made: list[Row | LeftOut] = []
    if len(values) < 2:
        return [LeftOut("response", "missing_label", "it is ranked against no other") for _ in values]
    for i, (response, value) in enumerate(best_first):
        place = values.index(value) + (values.count(value) - 1) / 2  # 0 for the best
        try:
            made += score(prompt, response, 1 - place / (len(values) - 1), raw_reward=value, **facts)
        except Reject as error:
            made.append(LeftOut(f"place {i}", error.reason, error.detail))
    return made


def _pairs(
    prompt: list[Message], best_first: list[tuple[str, float]], policy: Policy, **facts: Any
) -> list[Row | LeftOut]:
    pairs = {
        "adjacent": pairwise(best_first),
        "all": combinations(best_first, 2),
        "best_vs_rest": ((best_first[0], other) for other in best_first[1:]),
    }[policy.rank_as]
    made: list[Row | LeftOut] = []
    for (better, first), (worse, second) in pairs:
        try:
            p = 0.5 if first == second else 1.0
            made += compared(prompt, better, worse, p, policy, raw=(first, second), **facts)
        except Reject as error:
            made.append(LeftOut(f"{first:g} against {second:g}", error.reason, error.detail))
    return made
