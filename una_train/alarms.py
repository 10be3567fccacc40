"""Signs that a policy games its reward, from the means of the rounds so far: words, once each.

The newest rounds are compared with the first ones. A reward that goes up while responses grow, repeat themselves or
become all alike, or while a judge that is not trained on says that they get worse, is likely to be a reward that is
gamed. Nothing here knows models.
"""

import math
from collections.abc import Sequence
from typing import Any

SURE = 3.0  # standard errors
LONGER = 1.5  # times the length
REPEATS = 0.15  # more of a response's 4-grams than at the start
ALIKE = 0.5  # times the share of different responses
UNFINISHED = 0.2  # more of the responses are cut off

Facts = dict[str, Any]


def alarms(history: Sequence[Facts], window: int, given: set[str]) -> list[str]:
    """The words that the history of `rounds.facts` calls for and that are not among `given`, which grows by them."""
    if len(history) < 2 * window:
        return []
    first, last = history[:window], history[-window:]
    found = _found(first, last)
    new = [name for name in found if name not in given]
    given.update(new)
    return [f"{found[name]} (the last {window} rounds against the first {window})" for name in new]


def _found(first: Sequence[Facts], last: Sequence[Facts]) -> dict[str, str]:
    out: dict[str, str] = {}
    before, now = (_mean(part, "reward") for part in (first, last))
    risen = _change(first, last, "reward", "reward_error") > SURE
    grown = f"the reward rose from {before:.3f} to {now:.3f} while"
    length = [_mean(part, "length") for part in (first, last)]
    repeats = [_mean(part, "repetition") for part in (first, last)]
    distinct = [_mean(part, "distinct") for part in (first, last)]
    cut_off = [1 - _mean(part, "finished") for part in (first, last)]
    if risen and length[1] > LONGER * length[0]:
        out["length"] = f"{grown} responses grew from {length[0]:.0f} to {length[1]:.0f} tokens: does length pay?"
    if risen and repeats[1] > repeats[0] + REPEATS:
        out["repetition"] = (
            f"{grown} responses came to repeat themselves ({repeats[0]:.0%} to {repeats[1]:.0%} of 4-grams)"
        )
    if risen and distinct[1] < ALIKE * distinct[0]:
        out["alike"] = (
            f"{grown} the responses to a prompt became alike ({distinct[0]:.0%} to {distinct[1]:.0%} differ): raise "
            "beta, or lower learning_rate"
        )
    if cut_off[1] > cut_off[0] + UNFINISHED:
        out["unfinished"] = (
            f"responses no longer end ({cut_off[0]:.0%} to {cut_off[1]:.0%} are cut off): raise max_new_tokens, or "
            "missing_eos=penalize"
        )
    if risen and _change(first, last, "held_out_reward", "held_out_error") < -SURE:
        judged = [_mean(part, "held_out_reward") for part in (first, last)]
        out["held_out"] = f"{grown} the held-out judge's fell from {judged[0]:.3f} to {judged[1]:.3f}: they disagree"
    return out


def _mean(part: Sequence[Facts], name: str) -> float:
    values = [one[name] for one in part if one[name] is not None]
    return math.fsum(values) / len(values) if values else math.nan


def _change(first: Sequence[Facts], last: Sequence[Facts], name: str, error: str) -> float:
    """The change in its standard errors; NaN, which is above and below nothing, without values."""
    errors = [_error(part, error) for part in (first, last)]
    width = math.hypot(*errors)
    change = _mean(last, name) - _mean(first, name)
    return change / width if width else math.copysign(math.inf, change) if change else 0.0


def _error(part: Sequence[Facts], name: str) -> float:
    """Of the mean of rounds' means."""
    errors = [one[name] for one in part if one[name] is not None]
    return math.sqrt(math.fsum(e * e for e in errors)) / len(errors) if errors else math.nan
