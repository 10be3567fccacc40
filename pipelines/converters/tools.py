"""Exports of annotation tools: Argilla, Label Studio and Prodigy, one row or comparison for each person's judgement.

Fields and answers are read as `judgements` says. Of a record's metadata, ids, languages and models are kept.
"""

import re
from typing import Any

from pipelines.converters.base import Converter, LeftOut, Policy, Record
from pipelines.converters.judgements import (
    Judgement,
    Texts,
    beaten,
    folded,
    gathered,
    has_response,
    is_clear,
    is_verdict,
    judgement_rows,
    mapping_in,
    name_of,
    named,
    numbered_end,
    objects_in,
    parsed,
    prompt_of,
    rows_of,
    texts,
)
from pipelines.converters.labels import is_missing, judge, person
from pipelines.converters.messages import facts, flag, has, judged, needed, show, text
from schemas.errors import Reject
from schemas.feedback import Row

# --- Argilla -----------------------------------------------------------------------------------

Answers = list[tuple[str, Record]]  # question and answer: value, user_id and status


def _argilla(record: Record, source: str, policy: Policy) -> list[Row | LeftOut]:
    """A record of `to_json`, `to_list` or `to_dict`, or of the server and of 1.x, whose responses are lists.

    Shapes: https://github.com/argilla-io/argilla/blob/main/argilla/src/argilla/records/_resource.py (`to_dict`) and
    `serialize` there. The export by question drops the state of an answer: where the whole record is pending, an
    answer may be a draft and does not count.
    """
    of = texts(mapping_in(needed(record, "fields"), "fields"), "fields.")
    responses = needed(record, "responses")
    pending = "pending" if record.get("status") == "pending" else None
    said = _nested_answers(responses, pending)
    suggestions = record.get("suggestions")
    if not isinstance(suggestions, dict):
        suggestions = {
            name_of(s.get("question_name"), "question_name"): s for s in objects_in(suggestions, "suggestions")
        }
    return _argilla_rows(record, of, said, suggestions, source, policy)


def _nested_answers(responses: Any, pending: str | None) -> Answers:
    """Entries of question and answer, from a list of answers a question, or from a list of people."""
    if isinstance(responses, dict):
        return [
            (question, entry | {"status": entry.get("status") or pending})
            for question, entries in responses.items()
            for entry in objects_in(entries, "responses")
        ]
    return [
        (question, mapping_in(value, "responses.values") | {"user_id": entry.get("user_id"), "status": status})
        for entry in objects_in(responses, "responses")
        for status in [entry.get("status") or pending]
        for question, value in mapping_in(entry.get("values"), "responses.values").items()
    ]


def _answer(entry: tuple[str, Record]) -> list[Judgement]:
    question, given = name_of(entry[0], "question"), entry[1]
    status = given.get("status")
    counts = status is None or status == "submitted"
    unused = "" if counts else f"{question} was not submitted: its state is {show(status)}"
    return [Judgement(question, given.get("value"), person(given.get("user_id")), unused=unused)]


def _suggested(answers: Answers, suggestions: Record) -> list[Judgement]:
    """The suggestions to questions that nobody has answered or discarded, as a judge's."""
    closed = {question for question, given in answers if given.get("status") not in ("draft", "pending")}
    return [
        Judgement(name_of(question, "question"), given["value"], judge(given.get("agent")) or "judge:suggestion")
        for question, given in suggestions.items()
        if question not in closed and isinstance(given, dict) and not is_missing(given.get("value"))
    ]


def _argilla_rows(
    record: Record, of: Texts, answers: Answers, suggestions: Record, source: str, policy: Policy
) -> list[Row | LeftOut]:
    said = [*gathered(answers, "responses", _answer), *_suggested(answers, suggestions)]
    told = mapping_in(record.get("metadata"), "metadata") if not isinstance(record.get("metadata"), list) else {}
    about = facts(told, "language", "lang", "model", "model_name", "category") | facts(record, "id", "external_id")
    return rows_of(said, of, source, policy, about)


_OF_QUESTION = re.compile(r"(.+)\.(responses|suggestion)(\.users|\.status|\.score|\.agent)?", re.DOTALL)


def _argilla_flat(record: Record, source: str, policy: Policy) -> list[Row | LeftOut]:
    """A record of `to_datasets`: for every question, lists of values, users and states, and a suggestion.

    Shape: `_record_to_dict` in
    https://github.com/argilla-io/argilla/blob/main/argilla/src/argilla/records/_io/_generic.py.
    """
    needed(record, "id")
    of = texts({key: value for key, value in record.items() if not _OF_QUESTION.fullmatch(key)})
    questions = [key.removesuffix(".responses") for key in record if key.endswith(".responses")]
    said = [j for question in questions for j in _flat_answers(record, question)]
    agents = {key.removesuffix(".suggestion"): key for key in record if key.endswith(".suggestion")}
    suggestions = {q: {"value": record[key], "agent": record.get(f"{key}.agent")} for q, key in agents.items()}
    return _argilla_rows(record, of, said, suggestions, source, policy)


def _flat_answers(record: Record, question: str) -> Answers:
    name = f"{question}.responses"
    values, users, states = (record.get(key) or [] for key in (name, f"{name}.users", f"{name}.status"))
    if not all(isinstance(column, list) for column in (values, users, states)):
        raise Reject("wrong_type", f"{name}: expected lists of values, users and states")
    if any(len(column) not in (0, len(values)) for column in (users, states)):
        raise Reject("wrong_shape", f"{name}: {len(values)} values, {len(users)} users and {len(states)} states")
    users, states = users or [None] * len(values), states or [None] * len(values)
    entries = zip(values, users, states, strict=True)
    return [(question, {"value": value, "user_id": user, "status": state}) for value, user, state in entries]


def _argilla_v1(record: Record, source: str, policy: Policy) -> list[Row | LeftOut]:
    """A record of a 1.x FeedbackDataset in the form of `datasets`: every question is a column of answers.

    Shape: argilla-v1/src/argilla_v1/client/feedback/integrations/huggingface/dataset.py of
    https://github.com/argilla-io/argilla.
    """
    questions = [key.removesuffix("-suggestion") for key in record if key.endswith("-suggestion")]
    own = {name for q in questions for name in (q, f"{q}-suggestion", f"{q}-suggestion-metadata")}
    of = texts({key: value for key, value in record.items() if key not in own | {"metadata", "external_id"}})
    said = [(q, entry) for q in questions for entry in objects_in(record.get(q), "answers")]
    agents = {q: mapping_in(record.get(f"{q}-suggestion-metadata"), "suggestion-metadata") for q in questions}
    suggestions = {q: {"value": record[f"{q}-suggestion"], "agent": agents[q].get("agent")} for q in questions}
    return _argilla_rows(record, of, said, suggestions, source, policy)


# --- Label Studio ------------------------------------------------------------------------------

_RESULTS = ("selected", "rating", "choices", "text", "number")
_BOOKS = ("id", "annotator", "annotation_id", "created_at", "updated_at", "lead_time", "agreement", "history")


def _label_studio(record: Record, source: str, policy: Policy) -> list[Row | LeftOut]:
    """A task with all its annotations, each a list of results; predictions are not read, nor is what was skipped.

    Shapes: https://labelstud.io/guide/task_format.html, https://labelstud.io/tags/pairwise.html and, for `selected`,
    the tests of https://github.com/modelscope/data-juicer. Left is the first of the names in the result's `to_name`.
    """
    of = texts(mapping_in(needed(record, "data"), "data"), "data.")
    annotations = objects_in(needed(record, "annotations"), "annotations")
    kept = [a for a in annotations if not (flag(a, "was_cancelled") or flag(a, "skipped"))]
    said = gathered(kept, "annotations", lambda annotation: _results(annotation, of))
    return rows_of(said, of, source, policy, facts(record, "id"))


def _results(annotation: Record, of: Texts) -> list[Judgement]:
    user = annotation.get("completed_by")
    labeller = person(user.get("id", user.get("email")) if isinstance(user, dict) else user)
    about = {"ground_truth": True} if annotation.get("ground_truth") is True else {}
    return [
        Judgement(
            name_of(r.get("from_name"), "from_name"), _value(r.get("value")), labeller, _objects(r, of), metadata=about
        )
        for r in objects_in(annotation.get("result"), "annotations.result")
    ]


def _value(value: Any) -> Any:
    """What a control's value says; a list of one word or text is that word."""
    held = next((value[name] for name in _RESULTS if name in value), value) if isinstance(value, dict) else value
    return held[0] if isinstance(held, list) and len(held) == 1 and isinstance(held[0], str) else held


def _objects(result: Record, of: Texts) -> tuple[str, ...]:
    """The responses that a result is about, in the order of its `to_name`: by their field, or by the name's end."""
    names = text(result.get("to_name") or "", "to_name").split(",")
    found = [next((key for key in of.responses if key == n or _same_end(key, n)), None) for n in map(str.strip, names)]
    if len(names) > 1 and None in found and any(numbered_end(n) for n in names):
        raise Reject("wrong_shape", f"to_name {show(result['to_name'])} names other fields than {named(of.responses)}")
    return () if None in found else tuple(name for name in found if name)


def _same_end(key: str, name: str) -> bool:
    return numbered_end(key) != "" and numbered_end(key) == numbered_end(name)


def _label_studio_min(record: Record, source: str, policy: Policy) -> list[Row | LeftOut]:
    """A row of JSON-MIN, CSV or TSV: one annotation, whose controls stand beside the task's data.

    Shape: `convert_to_json_min` and `prettify_result` in
    https://github.com/HumanSignal/label-studio-sdk/blob/master/src/label_studio_sdk/converter/converter.py.
    A control is known by its value: `[{"rating": 4}]`, or a word of judgement, which in a column of any name must be a
    clear one. A column named like a judgement that says something else is left out.
    """
    needed(record, "annotation_id")
    labeller = person(needed(record, "annotator"))
    data = {key: value for key, value in record.items() if key not in _BOOKS}
    controls = {key: _control(value) for key, value in data.items()}
    said = {key: value for key, value in controls.items() if value is not None}
    of = texts({key: value for key, value in data.items() if key not in said})
    spare = {key: value for key, value in data.items() if key not in said and key not in of.responses}
    words = {key: value for key, value in spare.items() if isinstance(value, str) and _is_answer(key, value, of)}
    told = [Judgement(name_of(key, "column"), value, labeller) for key, value in {**words, **said}.items()]
    if not told:
        raise Reject(
            "wrong_shape", f"none of {named(spare)} is known as a control; say with --mapping which is the label"
        )
    return rows_of(told, of, source, policy, facts(record, "id", "annotation_id"))


def _control(value: Any) -> Any:
    """What a control's cell says; None for a cell of the task's data."""
    if isinstance(value, str) and value.startswith('[{"'):
        value = parsed(value)
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict):
        held = _value(value[0])
        return None if held is value[0] else held
    return None


_CONTROL = re.compile(r"choice|choose|select|prefer|better|best|pairwise|compar|correct|helpful", re.IGNORECASE)


def _is_answer(key: str, value: str, of: Texts) -> bool:
    if judged({key: value}) or _CONTROL.search(key):
        return is_verdict(value, of) or not value.replace(".", "").isdigit()
    return is_verdict(value, of) and is_clear(value)


# --- Prodigy -----------------------------------------------------------------------------------


def _is_prodigy(record: Record) -> bool:
    return "answer" in record and ("_task_hash" in record or has(record, "options", "accept"))


def _prodigy(record: Record, source: str, policy: Policy) -> list[Row | LeftOut]:
    """A task with options, of which some were accepted, or with one response that was accepted or rejected.

    Shape: https://prodi.gy/docs/api-interfaces#choice. Options beside responses are words of judgement; else they are
    the responses, and every accepted one is better than every other. `answer` of "reject" or "ignore" leaves a choice
    without a verdict.
    """
    state = text(needed(record, "answer"), "answer")
    if state not in ("accept", "reject", "ignore"):
        raise Reject("invalid_label", f"answer: {show(state)} is none of accept, reject, ignore")
    if state == "ignore" or (state == "reject" and "options" in record):
        raise Reject("missing_label", f"answer is {state}")
    fields = {key: value for key, value in record.items() if key not in _TASK}
    if "prompt" not in fields:
        fields["prompt"] = fields.pop("text", None)
    user = person(record.get("_annotator_id", record.get("_session_id")))
    if "options" in record:
        return _chosen(fields, record, policy, source=source, labeller=user)
    return judgement_rows(Judgement("answer", state, user), texts(fields), policy, source=source, labeller=user)


_TASK = ("options", "accept", "answer", "html", "meta", "label", "config")


def _chosen(fields: Record, record: Record, policy: Policy, **about: Any) -> list[Row | LeftOut]:
    """A judgement in words where the fields hold responses, else comparisons of the options."""
    options = {_option_id(o.get("id")): o.get("text") for o in objects_in(record["options"], "options")}
    accepted = record.get("accept")
    taken = [_option_id(i) for i in accepted] if isinstance(accepted, list) else []
    if not taken:
        raise Reject("missing_label", "no option was accepted")
    if not options.keys() >= set(taken):
        raise Reject("invalid_label", f"accept: {named(taken)} are not all among the options {named(options)}")
    if has_response(fields):
        of = texts(fields)
        words = [name if is_verdict(name, of) else options[name] for name in taken]
        said = Judgement("accept", words[0] if len(words) == 1 else words, about["labeller"])
        return judgement_rows(said, of, policy, **about)
    said_by = {name: text(said, f"options.{name}") for name, said in options.items()}
    if all(folded(name) == folded(said) for name, said in said_by.items()):
        raise Reject("wrong_shape", f"the options {named(options)} are labels, and no field is a response")
    best, rest = ([said for name, said in said_by.items() if (name in taken) is side] for side in (True, False))
    return beaten(prompt_of(fields), best, rest, policy, **about)


def _option_id(value: Any) -> str:
    """The id of an option, a text or a number, as text."""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise Reject("wrong_type", f"expected the id of an option, got {show(value)}")
    return str(value).encode("utf-8", "backslashreplace").decode()


_BY_PERSON = "each answer is its annotator's, under source:question"
_WORDS = "yes, good, like … are good, no, bad, wrong … are bad; response-1, A, left … is the better side"
_LABELS = f"{_BY_PERSON}; rank 1 is the best, numbers need a scale; {_WORDS}"
_SUGGESTED = "label of judge:<agent>, where nobody has answered or discarded"
_KINDS = "pairwise, binary, scalar, demonstration"
_FIELDS = "prompt and responses, by their names"

CONVERTERS = [
    Converter(
        name="argilla",
        feedback=_KINDS,
        matches=lambda r: has(r, "fields", "responses"),
        convert=_argilla,
        fields={
            "fields": _FIELDS,
            "responses": "labels, one for each annotator; a text in answer to corrected_… is a demonstration",
            "suggestions": _SUGGESTED,
            "status": "pending: the answers may be drafts and do not count",
            "metadata": "metadata: language and model",
        },
        required=("fields", "responses"),
        labels=f"{_LABELS}; drafts and discarded answers do not count",
    ),
    Converter(
        name="argilla_flat",
        feedback=_KINDS,
        matches=lambda r: "id" in r and any(key.endswith((".responses", ".suggestion")) for key in r),
        convert=_argilla_flat,
        fields={
            "id": "metadata",
            "other columns": _FIELDS,
            "<question>.responses, .responses.users, .responses.status": "labels, one for each annotator",
            "<question>.suggestion, .suggestion.agent": _SUGGESTED,
        },
        required=("id",),
        labels=f"{_LABELS}; drafts and discarded answers do not count",
    ),
    Converter(
        name="argilla_v1",
        feedback=_KINDS,
        matches=lambda r: "external_id" in r and any(key.endswith("-suggestion-metadata") for key in r),
        convert=_argilla_v1,
        fields={
            "other columns": _FIELDS,
            "<question>[].value, user_id, status": "labels, one for each annotator",
            "<question>-suggestion, -suggestion-metadata": _SUGGESTED,
            "external_id, metadata": "metadata: id, language and model",
        },
        required=(),
        labels=f"{_LABELS}; drafts and discarded answers do not count",
    ),
    Converter(
        name="label_studio",
        feedback=_KINDS,
        matches=lambda r: has(r, "data", "annotations"),
        convert=_label_studio,
        fields={
            "data": _FIELDS,
            "annotations[].result[]": "labels by control name: pairwise, rating, choices, number, textarea",
            "annotations[].was_cancelled": "true: not read",
            "annotations[].ground_truth": "metadata",
            "id": "metadata",
        },
        required=("data", "annotations"),
        labels=f"left is the first field of to_name; {_LABELS}",
    ),
    Converter(
        name="label_studio_min",
        feedback=_KINDS,
        matches=lambda r: has(r, "annotation_id", "annotator"),
        convert=_label_studio_min,
        fields={
            "annotator": "labeller, hashed",
            "annotation_id, id": "metadata",
            "<control>": "label",
            "other columns": _FIELDS,
        },
        required=("annotation_id", "annotator"),
        labels=f"left is the first of the responses; {_LABELS}",
    ),
    Converter(
        name="prodigy",
        feedback="pairwise, binary",
        matches=_is_prodigy,
        convert=_prodigy,
        fields={
            "text, prompt": "prompt",
            "options[].text": "responses, unless fields such as response_1 are; then words of judgement",
            "accept": "the ids of the better options",
            "answer": "accept or reject of a single response; ignore: dropped as missing_label",
            "_annotator_id, _session_id": "labeller, hashed",
        },
        required=("answer",),
        labels="an accepted option is better than each that is not",
    ),
]
