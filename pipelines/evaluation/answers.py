"""Answers: what contestants said to every question, sampled or given, with log-probs where a model of ours gave them.

An answer that there is not, because the prompt cannot be rendered or leaves no room, is one with a reason.
"""

import dataclasses
import gc
import hashlib
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import engines, render
from pipelines.evaluation.models import Contestant
from pipelines.evaluation.questions import Question
from pipelines.labellers.cache import key_of
from pipelines.reference import max_length
from schemas.errors import Reject, UserError
from schemas.feedback import FEEDBACK, Message
from schemas.fingerprint import fingerprint

log = logging.getLogger(__name__)
_AT_ONCE = 256  # prompts handed to the sampler, so that progress is told
_ints, _floats = pa.list_(pa.int32()), pa.list_(pa.float32())
SAMPLES = pa.schema(
    [
        ("model", pa.string()),
        ("question", pa.string()),  # id of the whole question
        ("turn", pa.int32()),
        ("sample", pa.int32()),
        pa.field("prompt", FEEDBACK.field("prompt").type),
        ("response", pa.string()),
        ("finished", pa.bool_()),
        ("prompt_ids", _ints),
        ("response_ids", _ints),
        ("logps", _floats),
        ("logp", pa.float64()),
        ("ref_logp", pa.float64()),
        ("reason", pa.string()),
        ("detail", pa.string()),
    ]
)


@dataclass(frozen=True)
class How(engines.Decoding):
    """How responses are sampled, and by what."""

    max_new_tokens: int = 512
    seed: int = 0
    engine: str = "transformers"
    dtype: str = "float32"
    batch_tokens: int = 8192
    max_length: int | None = None


@dataclass
class Answer:
    """A response to a turn of a question. Token ids and log-probs (nats) only of models that we ran."""

    question: Question
    turn: int
    sample: int
    prompt: list[Message]
    response: str | None = None
    finished: bool | None = None
    prompt_ids: list[int] | None = None
    response_ids: list[int] | None = None
    logps: list[float] | None = None
    ref_logp: float | None = None
    why: Reject | None = None

    @property
    def logp(self) -> float | None:
        return None if self.logps is None else float(np.sum(self.logps, dtype=np.float64))

    @property
    def logratio(self) -> float | None:
        """h = log π(y|x) − log π_ref(y|x), nats."""
        return None if self.logp is None or self.ref_logp is None else self.logp - self.ref_logp

    @property
    def place(self) -> tuple[str, int, int]:
        return self.question.id, self.turn, self.sample

    def row(self, model: str) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in SAMPLES.names if name in _PLAIN}
        why = {"reason": self.why and self.why.reason, "detail": self.why and self.why.detail}
        return {"model": model, "question": self.question.id, "logp": self.logp, **own, **why}


_PLAIN = {field.name for field in dataclasses.fields(Answer)} - {"question", "why"}


def given(contestant: Contestant, questions: Sequence[Question]) -> list[Answer]:
    """The answers of given outputs; `UserError` where none fits a question."""
    assert contestant.outputs is not None
    answers = []
    for question in questions:
        found = contestant.outputs.get(question.id, [])
        if not found:
            lacking = Reject("missing_field", f"{contestant.given} has no response to it")
            answers.append(Answer(question, 0, 0, question.opening, why=lacking))
        answers += [Answer(question, 0, i, question.opening, response) for i, response in enumerate(found)]
    if all(answer.why for answer in answers):
        raise UserError(f"{contestant.given}: no record has one of the prompts; the texts must be the same")
    return answers


def sampled(contestant: Contestant, questions: Sequence[Question], how: How, cache: Path) -> list[Answer]:
    """The answers of a model: from the cache, if the same weights were asked the same in the same way, or sampled."""
    mark = fingerprint(
        contestant.directory, dtype=how.dtype, engine=how.engine, engine_version=engines.version(how.engine)
    )
    key = key_of([mark, dataclasses.asdict(how), [question.id for question in questions]])
    kept = cache / f"samples-{key[:32]}.parquet"
    if kept.is_file():
        log.info("%s: sampled before, taken from %s", contestant.name, kept)
        return _read(kept, questions)
    answers = _sample(contestant, questions, how)
    partial = kept.with_suffix(f".{time.time_ns()}.tmp")
    pq.write_table(table({contestant.name: answers}), partial)
    partial.rename(kept)
    return answers


def _sample(contestant: Contestant, questions: Sequence[Question], how: How) -> list[Answer]:
    renderer = render.load(contestant.directory)
    longest = max_length(contestant.directory, how.max_length, how.engine)
    if how.max_new_tokens >= longest:
        raise UserError(
            f"--max-new-tokens {how.max_new_tokens}: {contestant.given} takes {longest} tokens of prompt and response "
            "together; ask for fewer"
        )
    sampler = engines.load_sampler(
        how.engine,
        contestant.directory,
        dtype=how.dtype,
        batch_tokens=how.batch_tokens,
        max_length=longest,
        end_of_turn=renderer.end_of_turn,
    )
    done: list[Answer] = []
    now = [[Answer(question, 0, i, question.opening) for i in range(how.n)] for question in questions]
    while now:
        for start in range(0, len(now), _AT_ONCE):
            part = now[start : start + _AT_ONCE]
            _ask(part, renderer, sampler, longest, how)
            done += [answer for of in part for answer in of]
            log.info("%s: %d of %d prompts", contestant.name, min(start + _AT_ONCE, len(now)), len(now))
        now = [[_next(answer)] for of in now for answer in of if answer.turn < len(answer.question.later)]
    sampler.close()
    return done


def _next(answer: Answer) -> Answer:
    """The question's next turn, asked after the answer to this one."""
    turn = answer.turn + 1
    if answer.response is None:
        return Answer(answer.question, turn, answer.sample, answer.prompt, why=answer.why)
    said = Message(role="assistant", content=answer.response)
    asked = Message(role="user", content=answer.question.later[answer.turn])
    return Answer(answer.question, turn, answer.sample, [*answer.prompt, said, asked])


def _ask(groups: list[list[Answer]], renderer: render.Renderer, sampler: Any, longest: int, how: How) -> None:
    """Fill in the answers: each group is samples of one prompt."""
    asked = []
    for group in groups:
        try:
            if group[0].why:
                raise group[0].why
            ids = renderer.prompt_ids(group[0].prompt)
            if len(ids) + how.max_new_tokens > longest:
                most = f"the model takes {longest}, of which --max-new-tokens {how.max_new_tokens} are for the response"
                raise Reject("too_long", f"the prompt has {len(ids)} tokens; {most}")
            asked.append((group, ids))
        except Reject as no:
            for answer in group:
                answer.why = no
    seeds = [_seed(how.seed, group[0]) for group, _ in asked]
    found = sampler.sample([ids for _, ids in asked], dataclasses.replace(how, n=len(groups[0])), seeds)
    for (group, ids), samples in zip(asked, found, strict=True):
        for answer, sample in zip(group, samples, strict=True):
            answer.prompt_ids, answer.response_ids, answer.finished = ids, list(sample.ids), sample.finished
            answer.logps = [float(x) for x in sample.logps]
            answer.response = renderer.words(answer.response_ids)


def _seed(seed: int, answer: Answer) -> int:
    """Of a prompt, 63 bits: a question is answered the same whatever else is asked."""
    text = f"{seed} {answer.question.id} {answer.turn} {answer.sample}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 1


def score(answers: Sequence[Answer], reference: str, how: How) -> None:
    """Fill in log π_ref of answers that have token ids."""
    asked = [answer for answer in answers if answer.response_ids]
    longest = max(len(a.prompt_ids or ()) + len(a.response_ids or ()) for a in asked)
    engine = engines.load(how.engine, reference, dtype=how.dtype, batch_tokens=how.batch_tokens, max_length=longest)
    found = engine.score([a.prompt_ids or [] for a in asked], [a.response_ids or [] for a in asked])
    for answer, logps in zip(asked, found, strict=True):
        answer.ref_logp = float(logps.astype(np.float64).sum())
    release(engine)


def release(engine: Any) -> None:
    """Let go of an engine that scores, so that the next one has the memory."""
    if (llm := getattr(engine, "llm", None)) is not None:
        llm.llm_engine.engine_core.shutdown()
    gc.collect()


def table(answers: Mapping[str, Sequence[Answer]]) -> pa.Table:
    rows = [answer.row(model) for model, of in answers.items() for answer in of]
    return pa.Table.from_pylist(rows, SAMPLES)


def _read(path: Path, questions: Sequence[Question]) -> list[Answer]:
    known = {question.id: question for question in questions}
    answers = []
    for row in pq.read_table(path).to_pylist():
        row["prompt"] = [{k: v for k, v in turn.items() if v is not None} for turn in row["prompt"]]
        why = Reject(row["reason"], row["detail"]) if row["reason"] else None
        facts = {name: row[name] for name in SAMPLES.names if name in _PLAIN}
        answers.append(Answer(question=known[row["question"]], why=why, **facts))
    return answers
