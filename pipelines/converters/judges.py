"""Logs and test sets of judges: LLMBar, AlpacaEval, PandaLM, JudgeBench, Auto-J, LFQA, MT-Bench, WildBench, scores.

Each converter says where its shape was confirmed. A log that names its texts only by their ids is refused with a hint.
Not read: a prompt, a response and a number whose scale the record does not tell (that takes a mapping), and what a
judge wrote to explain itself.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from pipelines.converters.base import Converter, LeftOut, Policy, Record
from pipelines.converters.labels import (
    Made,
    annotator,
    compared,
    each_objective,
    is_missing,
    judge,
    preferred,
    rated,
    some,
)
from pipelines.converters.messages import conversation, facts, has, needed, number, pair, show, text, texts
from schemas.errors import Reject
from schemas.feedback import Message


def needs_join(what: str) -> Callable[[Record, str, Policy], Made]:
    """A `convert` for records that hold a judgement and the ids of its texts, but not the texts."""

    def refuse(record: Record, source: str, policy: Policy) -> Made:
        raise Reject("missing_field", f"{what}; it needs a join: --mapping, see docs/mapping.md")

    return refuse


# --- verdicts ----------------------------------------------------------------------------------


def _said(value: Any, where: str, p_first: Mapping[str, float | None]) -> float | None:
    """The probability that the first response is better, from a label that is one of a few words or whole numbers."""
    if is_missing(value):
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    plain = isinstance(value, str) or (isinstance(value, int) and abs(value) < 100 and not isinstance(value, bool))
    said = str(value).strip().lower().removesuffix(".0") if plain else ""
    if said not in p_first:
        raise Reject("invalid_label", f"{where}: expected one of {', '.join(p_first)}, got {show(value)}")
    return p_first[said]


def _instruction(record: Record) -> list[Message]:
    """`instruction`, and `input`, if it has text, on a new line; pandas writes NaN for an empty one."""
    (instruction,) = texts(record, "instruction")
    given = record.get("input")
    given = "" if given is None or given != given else text(given, "input")
    return conversation("\n".join(part for part in (instruction, given) if part), "instruction")


def _llmbar(record: Record, source: str, policy: Policy) -> Made:
    """People's choice between two outputs (https://github.com/princeton-nlp/LLMBar)."""
    asked, first, second = texts(record, "input", "output_1", "output_2")
    p = _said(record.get("label"), "label", {"1": 1.0, "2": 0.0})
    return [*compared(conversation(asked, "input"), first, second, p, policy, source=source, labeller="human")]


def _alpaca_eval(record: Record, source: str, policy: Policy) -> Made:
    """Annotations of AlpacaEval and AlpacaFarm: 1 = output_1, 2 = output_2, between them a judge's certainty.

    1.5 is a draw, and so is 0 in older files; null is a judge's answer that could not be parsed
    (https://github.com/tatsu-lab/alpaca_eval/blob/main/src/alpaca_eval/metrics/winrate.py). People are numbered by
    `annotator_index`, judges named by `annotator`.
    """
    prompt = _instruction(record)
    first, second = texts(record, "output_1", "output_2")
    given = record.get("preference")
    p = None if is_missing(given) else preferred(_preference(given), 1, 2, policy)
    about = facts(record, "generator_1", "generator_2", "dataset", "preference")
    return [*compared(prompt, first, second, p, policy, source=source, labeller=_annotated_by(record), metadata=about)]


def _preference(value: Any) -> float:
    given = number(value, "preference")
    return 1.5 if given == 0 else given


def _annotated_by(record: Record) -> str | None:
    index = record.get("annotator_index")
    return judge(record.get("annotator")) or (None if is_missing(index) else annotator(index))


_PANDALM = {"1": 1.0, "2": 0.0, "0": 0.5, "tie": 0.5, "garbage": None}
_PANDALM_JUDGE = {"pandalm_result": "judge:pandalm", "gpt_result": "judge:gpt-3.5-turbo"}
_PERSON = re.compile(r"annotator[0-9]+")


def _is_pandalm(record: Record) -> bool:
    shown = has(record, "instruction", "response1", "response2")
    return shown and any(key in _PANDALM_JUDGE or _PERSON.fullmatch(key) for key in record if isinstance(key, str))


def _pandalm(record: Record, source: str, policy: Policy) -> Made:
    """A comparison for each annotator, and for each judge whose result was joined to the texts.

    Shape: https://github.com/WeOpenML/PandaLM/tree/main/data (testset-v1.json). A tie is 0 in people's labels and
    "Tie" in a judge's, whose "garbage" is no verdict: missing, where compute_metrics.py counts it as a tie.
    """
    prompt = _instruction(record)
    first, second = texts(record, "response1", "response2")
    people = {key: annotator(key) for key in sorted(record) if _PERSON.fullmatch(key)}
    about = facts(record, "idx", "cmp_key", "motivation_app")
    made: Made = []
    for key, who in {**people, **{k: v for k, v in _PANDALM_JUDGE.items() if k in record}}.items():
        try:
            p = _said(record[key], key, _PANDALM)
            made += compared(prompt, first, second, p, policy, source=source, labeller=who, metadata=about)
        except Reject as error:
            made.append(LeftOut(key, error.reason, error.detail))
    return some(made, "no annotator's label can be used")


def _judgebench(record: Record, source: str, policy: Policy) -> Made:
    """Two responses of which one is objectively right (https://github.com/ScalerLab/JudgeBench)."""
    asked, first, second = texts(record, "question", "response_A", "response_B")
    p = _said(record.get("label"), "label", {"a>b": 1.0, "b>a": 0.0, "a=b": 0.5})
    about = facts(record, "pair_id", "source", "response_model")
    who = "rule:judgebench"
    prompt = conversation(asked, "question")
    return [*compared(prompt, first, second, p, policy, source=source, labeller=who, metadata=about)]


def _auto_j(record: Record, source: str, policy: Policy) -> Made:
    """People's choice: 0 = "response 1", 1 = "response 2", 2 = a tie (https://github.com/GAIR-NLP/auto-j, README)."""
    asked, first, second = texts(record, "prompt", "response 1", "response 2")
    p = _said(record.get("label"), "label", {"0": 1.0, "1": 0.0, "2": 0.5})
    about = facts(record, "scenario")
    prompt = conversation(asked, "prompt")
    return [*compared(prompt, first, second, p, policy, source=source, labeller="human", metadata=about)]


_LFQA = ("overall", "coherence", "factuality")


def _lfqa(record: Record, source: str, policy: Policy) -> Made:
    """Experts on two long answers: −1 = answer_a, 1 = answer_b, 0 = a tie (https://github.com/carriex/lfqa_eval).

    The judgements are `overall`, and `coherence` and `factuality` where the record has them.
    """
    asked, first, second = texts(record, "question", "answer_a", "answer_b")
    prompt = conversation(asked, "question")
    about = facts(record, "answer_a_type", "answer_b_type")

    def make(name: str, source: str) -> Made:
        field = f"{name}_preference"
        p = _said(record.get(field), field, {"-1": 1.0, "0": 0.5, "1": 0.0})
        return [*compared(prompt, first, second, p, policy, source=source, labeller="human", metadata=about)]

    present = [name for name in _LFQA if name == "overall" or not is_missing(record.get(f"{name}_preference"))]
    return each_objective(present, source, policy, make)


# --- scores ------------------------------------------------------------------------------------


def _judge_score(record: Record, source: str, policy: Policy) -> Made:
    """A judge's score of a response, and for some an oracle's, both from 0 to 1 (https://github.com/cimo-labs/cje).

    The judgements are `judge` and, where the record has it, `oracle`: the label that the judge's score stands in for.
    """
    (response,) = texts(record, "response")
    prompt = conversation(needed(record, "prompt"), "prompt")
    fields = {"judge": "judge_score", "oracle": "oracle_label"}
    about = facts(record, "prompt_id", "draw_idx")

    def make(name: str, source: str) -> Made:
        who = "judge:unnamed" if name == "judge" else None
        value, field = record.get(fields[name]), fields[name]
        return [*rated(prompt, response, value, field, 0, 1, policy, source=source, labeller=who, metadata=about)]

    wanted = policy.objective == "oracle" or not is_missing(record.get("oracle_label"))
    return each_objective(["judge", "oracle"] if wanted else ["judge"], source, policy, make)


# --- MT-Bench ----------------------------------------------------------------------------------

_REFERENCE = r"(?:\[The Start of Reference Answer\]\n.*?\n\[The End of Reference Answer\]\n\n)?"
_SINGLE = re.compile(
    rf"\[Question\]\n(.*?)\n\n{_REFERENCE}"
    r"\[The Start of Assistant's Answer\]\n(.*)\n\[The End of Assistant's Answer\]\s*\Z",
    re.DOTALL,
)
_PAIR = re.compile(
    rf"\[User Question\]\n(.*?)\n\n{_REFERENCE}"
    r"\[The Start of Assistant A's Answer\]\n(.*?)\n\[The End of Assistant A's Answer\]\n\n"
    r"\[The Start of Assistant B's Answer\]\n(.*)\n\[The End of Assistant B's Answer\]\s*\Z",
    re.DOTALL,
)
_DIALOGUE = re.compile(
    r"<\|The Start of Assistant ([AB])'s Conversation with User\|>\n\n### User:\n(.*?)\n\n"
    r"<\|The End of Assistant \1's Conversation with User\|>",
    re.DOTALL,
)
_TURN = re.compile(r"\n\n### (User|Assistant [AB]):\n")


def _mt_bench_single(record: Record, source: str, policy: Policy) -> Made:
    """A score of one answer by a judge, -1 where its verdict could not be parsed.

    Question and answer are taken out of `user_prompt`, what the judge was shown, by the marks of FastChat's templates
    (https://github.com/lm-sys/FastChat/blob/main/fastchat/llm_judge/data/judge_prompts.jsonl); in the second turn the
    first is part of the prompt. The judge is asked for 1 to 10, but does give 0, so the reward is the score over 10.
    """
    shown = text(needed(record, "user_prompt"), "user_prompt")
    *prompt, last = _single(shown)
    about = facts(record, "question_id", "model", "turn")
    who = _judge(record)
    value, answer = record.get("score"), last["content"]
    return [
        *rated(
            prompt, answer, value, "score", 0, 10, policy, sentinels=(-1,), source=source, labeller=who, metadata=about
        )
    ]


def _single(shown: str) -> list[Message]:
    if found := _SINGLE.search(shown):
        return _turns(*found.groups())
    (dialogue,) = _dialogues(shown, 1)
    return dialogue


def _dialogues(shown: str, n: int) -> list[list[Message]]:
    """The two rounds of each of the `n` conversations that a judge was shown."""
    found = [_TURN.split(spoken) for _, spoken in _DIALOGUE.findall(shown)]
    if len(found) != n or any(len(parts) != 7 or parts[3] != "User" for parts in found):
        raise Reject("wrong_shape", "the turns in what the judge was shown cannot be told apart; join the texts by id")
    return [_turns(*parts[::2]) for parts in found]


def _turns(*said: str) -> list[Message]:
    return [Message(role="assistant" if i % 2 else "user", content=what) for i, what in enumerate(said)]


def _judge(record: Record) -> str:
    """The judge of a record, `[model, template]`."""
    given = needed(record, "judge")
    model = given[0] if isinstance(given, list) and given else given
    return f"judge:{text(model, 'judge')}"


_GAME = {"model_1": 1.0, "model_2": 0.0, "tie": 0.5, "error": None}


def _mt_bench_pair(record: Record, source: str, policy: Policy) -> Made:
    """Two games between two answers, shown in either order; `error` is a verdict that could not be parsed.

    One comparison of both games: by default their common verdict, or a tie if they differ, as in
    https://github.com/lm-sys/FastChat/blob/main/fastchat/llm_judge/common.py; their mean under `strength` soft. The
    texts are taken out of `g1_user_prompt`; second rounds are compared only where the first answers are the same.
    """
    for name in ("question_id", "model_1", "model_2"):
        needed(record, name)
    shown = record.get("g1_user_prompt")
    if shown is None:
        return needs_join("a pair log with no g1_user_prompt holds neither question nor answers")(
            record, source, policy
        )
    prompt, first, second = pair([], *_pair(text(shown, "g1_user_prompt")))
    about = facts(record, "question_id", "model_1", "model_2", "turn")
    p, who = _of_games(record, policy), _judge(record)
    return [*compared(prompt, first, second, p, policy, source=source, labeller=who, metadata=about)]


def _pair(shown: str) -> list[list[Message]]:
    if found := _PAIR.search(shown):
        question, first, second = found.groups()
        return [_turns(question, first), _turns(question, second)]
    return _dialogues(shown, 2)


def _of_games(record: Record, policy: Policy) -> float | None:
    first, second = (_said(record.get(name), name, _GAME) for name in ("g1_winner", "g2_winner"))
    if first is None or second is None:
        return None
    if policy.strength == "hard":
        return first if first == second else 0.5
    return preferred((first + second) / 2, 1, 0, policy)


# --- WildBench ---------------------------------------------------------------------------------

_CHOICE = {"a++": 1.0, "a+": 0.75, "a=b": 0.5, "b+": 0.25, "b++": 0.0, "a": 1.0, "b": 0.0, "tie": 0.5, "n/a": None}
_SPOKEN = re.compile(r"(?:\A|\n\n)(USER|ASSISTANT): ")


def _wildbench(record: Record, source: str, policy: Policy) -> Made:
    """A judge's score from 1 to 10, which may be a text (https://github.com/allenai/WildBench/blob/main/src/eval.py)."""
    prompt, result, told = _wild(record, source)
    value = record.get("score", result.get("score"))
    output = _output(record, "model_output")
    return [*rated(prompt, output, value, "score", 1, 10, policy, sentinels=("N/A",), **told)]


def _wildbench_pairs(record: Record, source: str, policy: Policy) -> Made:
    """A judge's choice from A++ to B++ (shape as `_wildbench`); `assignment` says which model was shown as A."""
    prompt, result, told = _wild(record, source)
    first, second = (_output(record, name) for name in ("model_output", "ref_output"))
    p = _said(result.get("choice"), "parsed_result.choice", _CHOICE)
    if p is not None:
        p = preferred(p if _is_a(record) else 1 - p, 1, 0, policy)
    return [*compared(prompt, first, second, p, policy, **told)]


def _wild(record: Record, source: str) -> tuple[list[Message], Record, dict[str, Any]]:
    """The prompt, what the judge said, and what the rows share."""
    prompt = [*_history(record), *_turns(*texts(record, "last_query"))]
    result = needed(record, "parsed_result")
    if not isinstance(result, dict):
        raise Reject("wrong_type", f"parsed_result: expected an object, got {show(result)}")
    config = record.get("eval_config")
    about = facts(record, "session_id", "generator", "ref_generator") | facts(result, "choice")
    who = judge(config.get("gpt")) if isinstance(config, dict) else None
    return prompt, result, {"source": source, "labeller": who, "metadata": about}


def _history(record: Record) -> list[Message]:
    """The turns before the last query; each begins with USER: or ASSISTANT:."""
    before, *spoken = _SPOKEN.split(text(record.get("history") or "", "history").removesuffix("\n\n"))
    if before.strip():
        raise Reject("wrong_shape", f"history: {show(before)} stands before the first USER: or ASSISTANT:")
    roles = {"USER": "user", "ASSISTANT": "assistant"}
    turns = zip(spoken[::2], spoken[1::2], strict=True)
    return [Message(role=roles[who], content=said) for who, said in turns]


def _output(record: Record, name: str) -> str:
    """A text, or the first of a list of texts: the one that the judge was shown."""
    value = needed(record, name)
    return text(value[0] if isinstance(value, list) and value else value, name)


def _is_a(record: Record) -> bool:
    """Whether `model_output` was shown as A."""
    assigned, own, other = record.get("assignment"), record.get("generator"), record.get("ref_generator")
    shown = assigned.get("A") if isinstance(assigned, dict) else None
    if own == other or shown is None or shown not in (own, other):
        raise Reject("wrong_shape", f"assignment: {show(assigned)} does not say which of the two models was A")
    return bool(shown == own)


# --- logs without their texts ------------------------------------------------------------------

_NO_TEXT = "none: the texts are in other files; use --mapping to join them"
_FIRST = "response with reward 1 or 0"
_TIE = "a tie is dropped, or .5 by --ties half"

_WILD = {
    "history": "prompt: the turns before the last query",
    "last_query": "prompt: its last turn",
    "eval_config.gpt": "labeller",
    "session_id, generator, ref_generator": "metadata",
}

CONVERTERS = [
    Converter(
        name="llmbar",
        feedback="pairwise",
        matches=lambda r: has(r, "input", "output_1", "output_2", "label"),
        convert=_llmbar,
        fields={"input": "prompt", "output_1, output_2": _FIRST, "label": "reward: which output is better"},
        required=("input", "output_1", "output_2"),
        telling=("label", lambda n: n == 2),
        labels="1: output_1 is better; 2: output_2 is better",
    ),
    Converter(
        name="alpaca_eval",
        feedback="pairwise",
        matches=lambda r: has(r, "instruction", "output_1", "output_2", "preference"),
        convert=_alpaca_eval,
        fields={
            "instruction": "prompt",
            "input": "prompt, on a new line after instruction",
            "output_1, output_2": _FIRST,
            "preference": "reward; metadata",
            "annotator, annotator_index": "labeller: a judge by its name, a person by a hash",
            "generator_1, generator_2, dataset": "metadata",
        },
        required=("instruction", "output_1", "output_2"),
        telling=("preference", lambda n: n > 1),
        labels=f"from 1 (output_1 is better) to 2 (output_2 is better); 1.5, or 0 in older files: {_TIE}",
    ),
    Converter(
        name="pandalm",
        feedback="pairwise",
        matches=_is_pandalm,
        convert=_pandalm,
        fields={
            "instruction": "prompt",
            "input": "prompt, on a new line after instruction",
            "response1, response2": _FIRST,
            "annotator1, annotator2, …": "reward: a comparison each, labeller human:<hash>",
            "pandalm_result, gpt_result": "reward: a comparison each, labeller judge:<name>",
            "idx, cmp_key, motivation_app": "metadata",
        },
        required=("instruction", "response1", "response2"),
        labels=f"1: response1 is better; 2: response2 is better; 0 or Tie: {_TIE}; garbage: no verdict",
    ),
    Converter(
        name="judgebench",
        feedback="pairwise",
        matches=lambda r: has(r, "question", "response_A", "response_B", "label"),
        convert=_judgebench,
        fields={
            "question": "prompt",
            "response_A, response_B": _FIRST,
            "label": "reward: which response is right",
            "pair_id, source, response_model": "metadata",
        },
        required=("question", "response_A", "response_B"),
        labels="A>B: response_A is right and response_B is not; B>A: the other way round",
    ),
    Converter(
        name="auto_j",
        feedback="pairwise",
        matches=lambda r: has(r, "prompt", "response 1", "response 2", "label"),
        convert=_auto_j,
        fields={
            "prompt": "prompt",
            "response 1, response 2": _FIRST,
            "label": "reward: which response is better",
            "scenario": "metadata",
        },
        required=("prompt", "response 1", "response 2"),
        telling=("label", lambda n: n == 0),
        labels=f"0: response 1 is better; 1: response 2 is better; 2: {_TIE}",
    ),
    Converter(
        name="lfqa",
        feedback="pairwise",
        matches=lambda r: has(r, "question", "answer_a", "answer_b", "overall_preference"),
        convert=_lfqa,
        fields={
            "question": "prompt",
            "answer_a, answer_b": _FIRST,
            "overall_preference": "reward, judgement overall",
            "coherence_preference": "reward, judgement coherence",
            "factuality_preference": "reward, judgement factuality",
            "answer_a_type, answer_b_type": "metadata",
        },
        required=("question", "answer_a", "answer_b"),
        telling=("overall_preference", lambda n: n < 0),
        labels=f"negative: answer_a is better; positive: answer_b is better; 0: {_TIE}",
    ),
    Converter(
        name="wildbench_pairs",
        feedback="pairwise",
        matches=lambda r: has(r, "session_id", "last_query", "model_output", "ref_output", "parsed_result"),
        convert=_wildbench_pairs,
        fields={
            **_WILD,
            "model_output, ref_output": _FIRST,
            "parsed_result.choice": "reward; metadata",
            "assignment": "which model was shown as A",
        },
        required=("last_query", "model_output", "ref_output", "parsed_result"),
        labels=f"from A++ to B++: A, the response that assignment says, is better first; A=B: {_TIE}",
    ),
    Converter(
        name="wildbench",
        feedback="scalar",
        matches=lambda r: has(r, "session_id", "last_query", "model_output", "parsed_result"),
        convert=_wildbench,
        fields={**_WILD, "model_output": "response", "parsed_result.score": "reward"},
        required=("last_query", "model_output", "parsed_result"),
        labels="from 1 to 10, more is better; N/A: the judge's answer could not be parsed",
    ),
    Converter(
        name="judge_score",
        feedback="scalar",
        matches=lambda r: has(r, "prompt", "response", "judge_score"),
        convert=_judge_score,
        fields={
            "prompt": "prompt",
            "response": "response",
            "judge_score": "reward, judgement judge",
            "oracle_label": "reward, judgement oracle, where there is one",
            "prompt_id, draw_idx": "metadata",
        },
        required=("prompt", "response"),
        labels="from 0 to 1, more is better",
    ),
    Converter(
        name="mt_bench_single",
        feedback="scalar",
        matches=lambda r: has(r, "question_id", "judge", "user_prompt", "score"),
        convert=_mt_bench_single,
        fields={
            "user_prompt": "prompt and response, out of what the judge was shown",
            "score": "reward, over 10",
            "judge": "labeller: the model; the template's name is not kept",
            "question_id, model, turn": "metadata",
        },
        required=("judge", "user_prompt"),
        labels="from 0 to 10, more is better; -1: the judge's verdict could not be parsed",
    ),
    Converter(
        name="mt_bench_pair",
        feedback="pairwise",
        matches=lambda r: has(r, "question_id", "model_1", "model_2") and ("g1_winner" in r or "winner" in r),
        convert=_mt_bench_pair,
        fields={
            "g1_user_prompt": "prompt and responses, out of what the judge was shown; without it, see --mapping",
            "g1_winner, g2_winner": "reward: the verdicts of two games, in either order",
            "judge": "labeller",
            "question_id, model_1, model_2, turn": "metadata",
        },
        required=("question_id", "model_1", "model_2"),
        labels=f"model_1 or model_2 is better; tie, or games that differ: {_TIE}; error: no verdict",
    ),
    Converter(
        name="fastchat_review",
        feedback="pairwise",
        matches=lambda r: has(r, "question_id", "answer1_id", "answer2_id"),
        convert=needs_join("a review names question and answers by question_id, answer1_id and answer2_id"),
        fields={"question_id, answer1_id, answer2_id": _NO_TEXT, "score": _NO_TEXT},
        required=("question_id", "answer1_id", "answer2_id"),
        labels="score: two numbers from 1 to 10, of answer 1 and answer 2",
    ),
    Converter(
        name="wildbench_result",
        feedback="scalar, pairwise",
        matches=lambda r: has(r, "session_id", "parsed_result") and ("model_output" in r or "model_outputs" in r),
        convert=needs_join("a result of WildBench's batch jobs names its conversation by session_id"),
        fields={"session_id": _NO_TEXT, "parsed_result": _NO_TEXT, "model_output, model_outputs": "not read"},
        required=("session_id", "parsed_result", ("model_output", "model_outputs")),
        labels="score: from 1 to 10; winner and extent: a model and by how much, 0 to 2",
    ),
    Converter(
        name="pandalm_result",
        feedback="pairwise",
        matches=lambda r: "idx" in r and ("pandalm_result" in r or "gpt_result" in r),
        convert=needs_join("a result of PandaLM's test names its texts by idx"),
        fields={"idx": _NO_TEXT, "pandalm_result, gpt_result": _NO_TEXT},
        required=("idx", ("pandalm_result", "gpt_result")),
        labels="1: response1 is better; 2: response2 is better; Tie; garbage: no verdict",
    ),
]
