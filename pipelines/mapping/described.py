"""A mapping in words, for `una inspect`: what it makes, what becomes of each field, and what the labels mean."""

from typing import Any

from pipelines.mapping.check import item_name, named_paths

_BECOMES = {
    "prompt": "prompt",
    "system": "prompt: the system turn",
    "response": "response",
    "demonstration": "response with reward 1",
    "chosen": "response with reward 1",
    "rejected": "response with reward 0",
    "first": "first response",
    "second": "second response",
    "responses": "responses",
    "json": "JSON text, opened",
    "each": "a list; an item for each element",
    "metadata": "metadata",
    "label": "label",
    "join": "key of the joined record",
    "where": "filter",
    "labeller": "labeller",
}


def feedback_of(spec: dict[str, Any]) -> str:
    """The row type(s): pairwise, binary, scalar or demonstration; ranks are what --rank-as says."""
    if "demonstration" in spec:
        return "demonstration"
    if "chosen" in spec or "first" in spec:
        return "pairwise"
    if "rank" in spec["label"] or "ranking" in spec["label"]:
        return "scalar or pairwise"
    return "binary" if "thumbs" in spec["label"] else "scalar"


def fields_of(spec: dict[str, Any]) -> dict[str, str]:
    """Path → what it becomes."""
    made: dict[str, list[str]] = {}
    for where, path in named_paths(spec):
        what = _BECOMES[where.partition(".")[0].partition("[")[0]]
        what = "labeller" if where == "label.by" else what
        if where.startswith(("label.swapped", "label.annotators.")):
            what = "label: the order the responses were shown in"
        if what not in made.setdefault(path, []):
            made[path].append(what)
    return {path: "; ".join(what) for path, what in made.items()}


def labels_of(spec: dict[str, Any]) -> str:
    """What the labels mean, and which end is better."""
    label = spec.get("label")
    if label is None:
        return "chosen is better than rejected" if "chosen" in spec else "none: every response is an example to follow"
    said = [_meaning(label)]
    if "map" in label:
        said.append("after " + ", ".join(f"{k} → {v}" for k, v in label["map"].items()))
    if "swapped" in label or isinstance(label.get("annotators"), dict):
        said.append("turned round where the responses were shown in the other order")
    if "missing" in label:
        said.append(f"no label: {_words(label['missing'])}")
    if "each" in spec:
        said.append(f"for each {item_name(spec)}")
    return "; ".join(said)


def _meaning(label: dict[str, Any]) -> str:
    better = f"{label.get('better', 'higher')} is better"
    if "score" in label:
        return f"from {label['score'][0]:g} to {label['score'][1]:g}, {better}"
    if "stars" in label:
        return f"1 to {label['stars']} stars, {better}"
    if "scale" in label:
        return {"unit": "from 0 to 1", "percent": "from 0 to 100", "sigmoid": "any number x, as σ(x)"}[
            label["scale"]
        ] + f", {better}"
    if "thumbs" in label:
        return f"good: {_words(label['thumbs']['good'])}; bad: {_words(label['thumbs']['bad'])}"
    if "order" in label:
        return f"from worst to best: {_words(label['order'])}"
    if "rank" in label:
        return f"ranks; {label['rank']} is the best"
    if label.get("ranking") == "best_only":
        return "the name of the best response"
    if "ranking" in label:
        return f"the names of the responses, the {label['ranking'].partition('_')[0]} first"
    return _meaning_of_pairs(label)


def _meaning_of_pairs(label: dict[str, Any]) -> str:
    if "winner" in label:
        return "; ".join(f"{name}: {_words(values)}" for name, values in label["winner"].items())
    if "preference" in label:
        ends = label["preference"]
        strength = f" ({label['strength']})" if "strength" in label else ""
        return f"{ends['first']:g} prefers the first response, {ends['second']:g} the second{strength}"
    if "sign" in label:
        return f"a {label['sign']} number prefers the first response; 0 is a tie"
    if "compare" in label:
        return f"the response with the {label['compare']} number is better; equal numbers are a tie"
    return "; ".join(f"{name}: {path} is 1" for name, path in label["one_hot"].items())


def _words(values: Any) -> str:
    if isinstance(values, dict):
        return f"what {values['field']} says"
    return ", ".join(map(str, values)) if isinstance(values, list) else str(values)
