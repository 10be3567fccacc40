"""From what a source says of responses to rows: verdicts, ratings and ranks under the policies for ties and for labels
that are missing. Arithmetic only; reading the fields is `messages`' work.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from itertools import combinations, pairwise
from typing import Any

from pipelines.converters.base import LeftOut, Policy, Record, note, tell_lower_is_better
from pipelines.converters.messages import number, scaled, show, verdict
from schemas.errors import Reject
from schemas.feedback import Message, Row, comparison, score, thumb, unlabelled

Made = list[Row | LeftOut]
_NOBODY = {"labeller": None}  # gave no label
GOOD_OR_BAD = "true (or 1) is good, false (or 0) is bad; null, blank and N/A are no label; nothing else is accepted"


def annotator(user: object) -> str:
    """The labeller of a person: a hash, so that nobody's name or address is published."""
    return "human:" + hashlib.blake2b(str(user).encode("utf-8", "backslashreplace"), digest_size=6).hexdigest()


def person(user: Any) -> str:
    """The labeller of a user id; `human` where there is none."""
    if is_missing(user, ("None",)):
        return "human"
    if not isinstance(user, str | int):
        raise Reject("wrong_type", f"expected the id of a person, got {show(user)}")
    return annotator(user)


def judge(name: Any) -> str | None:
    """The labeller of a model by its name; None where there is none."""
    return f"judge:{name}" if isinstance(name, str) and name.strip() else None


def objectives(names: Sequence[str], policy: Policy) -> list[str]:
    """Those of a record's judgements, by name, that are asked for."""
    if policy.objective == "all":
        return list(names)
    if policy.objective not in names:
        raise Reject("missing_label", f"no judgement called {policy.objective!r}; there are {', '.join(names)}")
    return [policy.objective]


def each_objective(names: Sequence[str], source: str, policy: Policy, make: Callable[[str, str], Made]) -> Made:
    """The rows of every judgement asked for, `make(name, source)`; where all are, each has a source of its own.

    A judgement that cannot be used is left out; `Reject` if none can.
    """
    made: Made = []
    for name in objectives(names, policy):
        try:
            made += make(name, f"{source}:{name}" if policy.objective == "all" else source)
        except Reject as error:
            made.append(LeftOut(name, error.reason, error.detail))
    return some(made)


# --- one or two responses ----------------------------------------------------------------------


def is_missing(value: Any, sentinels: Iterable[Any] = ()) -> bool:
    """Whether a label is null, blank, or one of the values that stand for none; numbers also match as text."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return True
    return any(value is s or value == s or (isinstance(value, str) and value.strip() == str(s)) for s in sentinels)


def yes(value: Any, where: str) -> float | None:
    """1 or 0 for a yes or no; None where nobody said."""
    return None if is_missing(value) else float(verdict(value, where))


def numbers_of(record: Record, *names: str) -> tuple[float | None, float | None]:
    """The numbers of the two sides, as far as they are given."""
    first, second = (None if is_missing(record.get(name)) else number(record[name], name) for name in names)
    return first, second


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
    if lower_is_better:
        tell_lower_is_better(facts["source"])
    return score(prompt, response, 1 - reward if lower_is_better else reward, raw_reward=raw, **facts)


def thumbed(prompt: list[Message], response: str, value: Any, where: str, policy: Policy, **facts: Any) -> list[Row]:
    """A binary row from a yes or no as `verdict` reads it; −1 may mean a no, so it does not stand for none."""
    if is_missing(value, ("N/A",)):
        _missing(f"{where} is {value!r}", policy)
        return unlabelled(prompt, response, **(facts | _NOBODY))
    return thumb(prompt, response, verdict(value, where), **facts)


def _missing(what: str, policy: Policy) -> None:
    if policy.missing == "drop":
        raise Reject("missing_label", what)
    note("missing")


# --- k responses -------------------------------------------------------------------------------

Entry = tuple[str, Any]  # a response, and its rank or score
Of = list[tuple[int, Row | LeftOut]]  # what was made, each of which entry
_Placed = tuple[int, str, float]  # which entry, its response and its value


def ranked(prompt: list[Message], entries: Sequence[Entry], policy: Policy, **how: Any) -> list[Row | LeftOut]:
    """`standings` without the places of the entries; `Reject` where nothing is left."""
    return some([one for _, one in standings(prompt, entries, policy, **how)], "no two responses are ranked")


def standings(
    prompt: list[Message],
    entries: Sequence[Entry],
    policy: Policy,
    *,
    lower_is_better: bool,
    where: str = "rank",
    sentinels: Iterable[Any] = (),
    **facts: Any,
) -> Of:
    """The responses of a prompt that were ranked against each other, as `policy.rank_as` says, each with its place in
    `entries`; a comparison with that of the worse response.

    `scores`: a scalar row each, whose reward is the share of the other places that are worse: 1 for the best, 0 for the
    worst, and the middle of their places for equal ones. Otherwise comparisons: of neighbours, of all pairs, or of the
    best with each other. What cannot be used is a `LeftOut`.
    """
    if lower_is_better:
        tell_lower_is_better(facts["source"])
    made: Of = []
    usable: list[_Placed] = []
    for i, (response, value) in enumerate(entries):
        try:
            if is_missing(value, sentinels):
                _missing(f"{where} is {value!r}", policy)
                made += [(i, row) for row in unlabelled(prompt, response, **(facts | _NOBODY))]
            else:
                usable.append((i, response, _rank(value, where) if lower_is_better else number(value, where)))
        except Reject as error:
            made.append((i, LeftOut(f"response {i}", error.reason, error.detail)))
    usable.sort(key=lambda entry: entry[2] if lower_is_better else -entry[2])
    made += _places(prompt, usable, **facts) if policy.rank_as == "scores" else _pairs(prompt, usable, policy, **facts)
    return made


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


def _places(prompt: list[Message], best_first: list[_Placed], **facts: Any) -> Of:
    values = [value for _, _, value in best_first]
    made: Of = []
    if len(values) < 2:
        alone = LeftOut("response", "missing_label", "it is ranked against no other")
        return [(i, alone) for i, _, _ in best_first]
    for at, (i, response, value) in enumerate(best_first):
        place = values.index(value) + (values.count(value) - 1) / 2  # 0 for the best
        try:
            rows = score(prompt, response, 1 - place / (len(values) - 1), raw_reward=value, **facts)
            made += [(i, row) for row in rows]
        except Reject as error:
            made.append((i, LeftOut(f"place {at}", error.reason, error.detail)))
    return made


def _pairs(prompt: list[Message], best_first: list[_Placed], policy: Policy, **facts: Any) -> Of:
    pairs = {
        "adjacent": pairwise(best_first),
        "all": combinations(best_first, 2),
        "best_vs_rest": ((best_first[0], other) for other in best_first[1:]),
    }[policy.rank_as]
    made: Of = []
    for (_, better, first), (i, worse, second) in pairs:
        try:
            p = 0.5 if first == second else 1.0
            rows = compared(prompt, better, worse, p, policy, raw=(first, second), **facts)
            made += [(i, row) for row in rows]
        except Reject as error:
            made.append((i, LeftOut(f"{first:g} against {second:g}", error.reason, error.detail)))
    return made
