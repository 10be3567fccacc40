"""One score from several labellers'. Shapes: n rows, k labellers."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from schemas.command import did_you_mean
from schemas.errors import UsageError

COMBINE = {
    "mean": "the mean",
    "min": "the lowest",
    "max": "the highest",
    "median": "the median",
    "vote": "the share of labellers whose score is above one half, exactly one half counted half",
    "weighted": "the mean, weighted by --weights",
}
NEED = {
    "all": "a row to which one of the labellers gave no score is rejected",
    "any": "the scores that there are count, and their labellers are named in the row",
}


def check(how: str, pairs: bool, labellers: int, weights: Mapping[str, float]) -> None:
    """`UsageError` for a combination that cannot be."""
    if pairs and how in ("min", "max"):
        raise UsageError(
            f"--combine {how}: of comparisons it depends on which response comes first; "
            "use mean, median, vote or weighted"
        )
    if bool(weights) != (how == "weighted"):
        raise UsageError("--weights NAME=W,… goes with --combine weighted, and --combine weighted with --weights")
    if how == "weighted" and labellers == 1:
        raise UsageError("--combine weighted: there is one labeller; leave it out")
    if weights and (min(weights.values()) < 0 or sum(weights.values()) == 0):
        raise UsageError("--weights: must not be negative, nor all zero")


def by_name(given: Mapping[str, object], labellers: Sequence[tuple[str, str]], option: str) -> dict[str, object]:
    """What an option says of each labeller, by the labeller's name; `labellers`: (kind, name) of each.

    A labeller is named in full (judge:x@1f), by its name (judge:x, x) or by its kind, where one labeller has it.
    """
    found: dict[str, object] = {}
    for key, value in given.items():
        names = [name for _, name in labellers if key == name]
        names = names or [name for kind, name in labellers if key in (kind, *_short(name))]
        if len(names) != 1:
            known = [name for _, name in labellers]
            meant = f"; give one of {', '.join(names)}" if names else did_you_mean(key, known)
            raise UsageError(f"{option}: {len(names) or 'no'} labellers {key!r}{meant}")
        found[names[0]] = value
    return found


def _short(name: str) -> tuple[str, str]:
    bare = name.partition("@")[0]
    return bare, bare.partition(":")[2]


def combined(scores: np.ndarray, how: str, weights: np.ndarray, need: str = "all") -> np.ndarray:
    """Scores [n, k], NaN where there is none → [n]; NaN for a row that lacks what it needs. `weights` [k]."""
    there = np.isfinite(scores)
    enough = there.all(axis=1) if need == "all" else (there * (weights > 0)).any(axis=1)
    found = np.full(len(scores), np.nan)
    some, w = scores[enough], weights * there[enough]
    if not len(some):
        return found
    if how == "vote":
        some, how = np.where(np.isnan(some), np.nan, 0.5 + np.sign(some - 0.5) / 2), "mean"
    if how in ("mean", "weighted"):
        found[enough] = (np.nan_to_num(some) * w).sum(axis=1) / w.sum(axis=1)
    else:
        middle: dict[str, Callable[..., np.ndarray]] = {"min": np.nanmin, "max": np.nanmax, "median": np.nanmedian}
        found[enough] = middle[how](some, axis=1)
    return np.clip(found, 0, 1)


def disagreement(scores: np.ndarray) -> np.ndarray:
    """The standard deviation of each row's scores [n, k] → [n]; NaN for rows of fewer than two."""
    there = np.isfinite(scores)
    several = there.sum(axis=1) > 1
    found = np.full(len(scores), np.nan)
    found[several] = np.nanstd(scores[several], axis=1)
    return found
