"""`una eval`: models compared by what they say to held-out prompts, by their implicit rewards, and by benchmarks.

    questions ──each model──▶ answers ──labellers──▶ rewards, comparisons ──▶ means, win rates, KL, lengths
                                 └──reference──▶ log-ratios ──────────────────┘
    held-out rows of a scored dataset ──▶ implicit against explicit rewards
    a suite of lm-evaluation-harness ──▶ scores beside the paper's

One engine is in memory at a time. What was sampled and what labellers said is kept in the cache beside the output, so a
run that was cut short goes on, and another model is added without asking the first ones again.
"""

import argparse
import dataclasses
import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import dataset, io, labellers, prompts, report
from pipelines.evaluation import answers, calibration, models, questions, rewards, statistics
from pipelines.evaluation import suite as suites
from pipelines.evaluation.answers import Answer, How
from pipelines.evaluation.models import Contestant
from pipelines.evaluation.rewards import Rewarded
from pipelines.label import Voice, voices_of
from pipelines.labellers.base import Score
from pipelines.models import local
from pipelines.report.evaluation import FILE, evaluation_page
from pipelines.report.page import shown
from schemas.command import share
from schemas.errors import UsageError

log = logging.getLogger(__name__)
FILES = ("samples.parquet", "rewards.parquet", "comparisons.parquet", "rejected.parquet", "report.html", FILE)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `una eval`."""
    a = parser.add_argument
    a("model", metavar="MODEL", help="a model, a training run or a checkpoint of one; or NAME=MODEL")
    a("--against", nargs="+", action="extend", default=[], metavar="MODEL",
      help="others to compare with; a file is a model's outputs: records with a prompt and a response")  # fmt: skip
    a("--output", required=True, metavar="DIR", help="the directory to write")
    a("--prompts", metavar="FILE_OR_DATASET", help="held-out prompts: a file, or a dataset directory")
    a("--reward", action="append", default=[], metavar="SPEC",
      help="a labeller as in `una label`, of responses or of pairs; may be given several times")  # fmt: skip
    a("--reference", metavar="MODEL", help="π_ref, to which the KL divergence is taken")
    a("--dataset", metavar="DIR", help="a scored dataset on whose rows implicit and explicit rewards are compared")
    a("--suite", metavar="NAME", help=f"benchmarks: {', '.join(suites.SUITES)}, or a YAML file with tasks")
    a("--split", metavar="NAME", help="of a dataset (default: test, or all where there is none)")
    a("--limit", type=int, metavar="N", help="the first N prompts and questions of a task; about N rows of --dataset")
    a("--samples-per-prompt", type=int, default=1, metavar="N", help="responses to each prompt (1)")
    a("--temperature", type=float, default=1.0, metavar="T", help="of sampling; 0 is greedy (1)")
    a("--top-p", type=float, default=1.0, metavar="P", help="of sampling (1)")
    a("--max-new-tokens", type=int, default=512, metavar="N", help="the longest response (512)")
    a("--max-length", type=int, metavar="N", help="prompt and response together (default: 2048, or the model's limit)")
    a("--seed", type=int, default=0, help="of samples and of the bootstrap (0)")
    a("--beta", type=float, help="β of the implicit reward (default: that of the run which trained the model)")
    a("--engine", choices=("transformers", "vllm"), default="transformers", help="what samples and scores")
    a("--dtype", choices=("float32", "bfloat16"), default="float32")
    a("--batch-tokens", type=int, default=8192, metavar="N", help="tokens in one batch (8192)")
    a("--cache", metavar="DIR", help="where samples and scores are kept (default: .NAME.cache beside the output)")
    a("--max-rejected", type=share, default=0.01, metavar="SHARE", help="of prompts and of answers (0.01)")
    a("--overwrite", action="store_true", help="replace what --output holds")


def command(args: argparse.Namespace) -> dict[str, Any]:
    """`una eval`: returns the summary that `--json` prints, which is `evaluation.json` too."""
    how = _how(args)
    voices = voices_of([labellers.asked(spec) for spec in args.reward])
    if len({voice.identity.labeller for voice in voices}) < len(voices):
        raise UsageError(f"--reward: {voices[0].identity.labeller} is there twice; leave one out")
    if not args.against and (alone := next((voice for voice in voices if voice.pairs), None)):
        raise UsageError(f"--reward: {alone.identity.labeller} compares two responses; name others with --against")
    suite = suites.suite_of(args.suite) if args.suite else None
    harness = suites.Harness(suite) if suite else None
    asked, refused = questions.read(args.prompts, args.split, args.limit) if args.prompts else ([], [])
    held_out = calibration.read(args.dataset, args.split, args.limit) if args.dataset else None
    reference = str(local(args.reference)) if args.reference else None
    output = args.output.rstrip("/")
    if io.is_remote(output):
        raise UsageError(f"--output {output}: must be a directory of this machine")
    dataset.refuse(output, [path for path in (args.prompts, args.dataset, args.model, *args.against) if path])
    stage = Path(dataset.prepare(output, args.overwrite))
    with dataset.staged(str(stage)):
        cache = Path(args.cache or dataset.staging(output).removesuffix(".incomplete") + ".cache")
        cache.mkdir(parents=True, exist_ok=True)
        contestants = models.named([args.model, *args.against], stage)
        ours = [one for one in contestants if one.outputs is None]
        found: dict[str, Any] = {"output": output, "models": {one.name: one.given for one in contestants}}
        found["settings"] = {**dataclasses.asdict(how), "prompts": args.prompts, "reference": args.reference}
        found["notes"] = notes = _whole_datasets(args) + _turns_left_out(asked, voices)
        said = {one.name: _answers(one, asked, how, cache) for one in contestants} if asked else {}
        if reference:
            notes += _against_reference(contestants, said, reference, how)
        if held_out:
            measured = {one.name: calibration.measure(one, held_out, how, args.beta) for one in ours}
            found["calibration"] = {"dataset": held_out.path, "rows": len(held_out.rows["type"]), "models": measured}
        if suite and harness:
            scores = {one.name: harness.run(one.directory, how.dtype, args.limit) for one in ours}
            found["suite"] = {"name": suite.name, "limit": args.limit, "models": scores}
            found["suite"] |= {"paper": suites.PAPER.get(suite.name, {}), "about_paper": suites.ABOUT_PAPER}
        if said:  # last, as a judge that was loaded stays in memory
            found |= _judge(said, voices, how.seed, cache, stage)
            found["prompts"] = {"asked": len(asked), "rejected": len(refused)}
            pq.write_table(_refused(refused), stage / FILES[3])
        if failed := _failed(found, args.max_rejected):
            found["failed"] = failed
        _write(found, stage, Path(output))
    tell(found)
    return found


def _whole_datasets(args: argparse.Namespace) -> list[str]:
    """Notes on datasets that have no split to hold out."""
    given = [path.rstrip("/") for path in (args.prompts, args.dataset) if path and prompts.is_dataset(path)]
    whole = [path for path in dict.fromkeys(given) if questions.split_of(path, args.split) is None]
    return [f"{path} has no split `test`, so all of it is used, what was trained on included." for path in whole]


def _turns_left_out(asked: Sequence[questions.Question], voices: Sequence[Voice]) -> list[str]:
    pairs = [voice.identity.labeller for voice in voices if voice.pairs]
    some = any(question.later for question in asked)
    return [f"{name} compares the first turns alone: later ones follow different answers." for name in pairs if some]


def _refused(refused: Sequence[prompts.Refused]) -> pa.Table:
    """Records that held no prompt."""
    kinds = [("record", pa.int64()), ("reason", pa.string()), ("detail", pa.string()), ("payload", pa.binary())]
    rows = [(one.place, one.why.reason, one.why.detail, one.payload) for one in refused]
    columns = list(zip(*rows, strict=True)) or [()] * len(kinds)
    return pa.table([pa.array(c, kind) for c, (_, kind) in zip(columns, kinds, strict=True)], [n for n, _ in kinds])


def _how(args: argparse.Namespace) -> How:
    """How to sample; `UsageError` for what cannot be, or does not go together."""
    wrong = [
        (not (args.prompts or args.dataset or args.suite), "nothing to do: give --prompts, --dataset or --suite"),
        (args.reward and not args.prompts, "--reward: judges answers, so give --prompts"),
        (args.reference and not args.prompts, "--reference: is compared on sampled answers, so give --prompts"),
        (args.beta is not None and not args.beta > 0, f"--beta {args.beta}: must be positive"),
        *[
            (value is not None and value < 1, f"{option} {value}: must be positive")
            for option, value in (
                ("--limit", args.limit),
                ("--samples-per-prompt", args.samples_per_prompt),
                ("--batch-tokens", args.batch_tokens),
            )
        ],
    ]
    for so, words in wrong:
        if so:
            raise UsageError(words)
    return How(
        n=args.samples_per_prompt,
        temperature=args.temperature,
        top_p=args.top_p,
        max_new_tokens=args.max_new_tokens,
        seed=args.seed,
        engine=args.engine,
        dtype=args.dtype,
        batch_tokens=args.batch_tokens,
        max_length=args.max_length,
    )


# --- answers to prompts --------------------------------------------------------------------------


def _answers(one: Contestant, asked: list[questions.Question], how: How, cache: Path) -> list[Answer]:
    return answers.sampled(one, asked, how, cache) if one.outputs is None else answers.given(one, asked)


def _judge(
    said: Mapping[str, list[Answer]], voices: Sequence[Voice], seed: int, cache: Path, stage: Path
) -> dict[str, Any]:
    """Have all answers judged, and write the tables; what `evaluation.json` says of it."""
    pq.write_table(answers.table(said), stage / FILES[0])
    names, compared = _judged(voices, said, cache)
    rows = [one.row(labeller=name, model=model) for (name, model), of in names.items() for one in of]
    pq.write_table(pa.Table.from_pylist(rows, rewards.REWARDS), stage / FILES[1])
    both = [one.row(labeller=v, model=m, against=o) for (v, m, o), of in compared.items() for one in of]
    pq.write_table(pa.Table.from_pylist(both, rewards.COMPARED), stage / FILES[2])
    return {
        "answers": {name: of_texts(of, least_words(said)) for name, of in said.items()},
        "kl": {name: divergence(of) for name, of in said.items() if any(a.ref_logp is not None for a in of)},
        "rewards": _by_labeller({key: mean_reward(of, seed) for key, of in names.items()}),
        "wins": wins(names, compared, list(said), seed),
    }


def _against_reference(
    contestants: Sequence[Contestant], said: Mapping[str, list[Answer]], reference: str, how: How
) -> list[str]:
    """Score under the reference what those models said that share its tokens; notes on the others."""
    if (how.temperature, how.top_p) != (1.0, 1.0):
        return ["No KL: it takes samples of the policy itself, at --temperature 1 and --top-p 1."]
    from pipelines import render

    vocabulary, notes, asked = render.load_tokenizer(reference).get_vocab(), [], list[Answer]()
    for one in contestants:
        if one.outputs is not None:
            notes.append(f"{one.name}: outputs that were given, so no lengths in tokens and no KL.")
        elif render.load_tokenizer(one.directory).get_vocab() != vocabulary:
            notes.append(f"{one.name}: no KL, its tokens are not those of the reference.")
        else:
            asked += said[one.name]
    if any(answer.response_ids for answer in asked):
        answers.score(asked, reference, how)
    return notes


def _judged(
    voices: Sequence[Voice], said: Mapping[str, list[Answer]], cache: Path
) -> tuple[dict[tuple[str, str], list[Rewarded]], dict[tuple[str, str, str], list[Rewarded]]]:
    """Rewards of all answers by labellers of responses; comparisons with the first model by labellers of pairs."""
    found, compared = dict[tuple[str, str], list[Rewarded]](), dict[tuple[str, str, str], list[Rewarded]]()
    main, *others = said
    for voice in voices:
        label, name = rewards.load(voice, cache), voice.identity.labeller
        if voice.pairs:
            compared |= {
                (name, main, other): rewards.compared(label, voice, said[main], said[other]) for other in others
            }
        else:
            found |= {(name, model): rewards.of_answers(label, voice, of) for model, of in said.items()}
    return found, compared


def _by_labeller(facts: Mapping[tuple[str, str], Any]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for (labeller, model), of in facts.items():
        found.setdefault(labeller, {})[model] = of
    return found


# --- what is measured ----------------------------------------------------------------------------


def least_words(said: Mapping[str, Sequence[Answer]]) -> int:
    """Words of the model that said least: models are compared on as many."""
    return min(sum(len(statistics.words(a.response or "")) for a in of) for of in said.values())


def of_texts(of: Sequence[Answer], most_words: int) -> dict[str, Any]:
    """How long and how varied the answers are, and how many there are not."""
    there = [answer for answer in of if answer.response is not None]
    texts = [statistics.words(answer.response or "") for answer in there]
    tokens = [len(answer.response_ids) for answer in there if answer.response_ids is not None]
    reasons = [answer.why.reason for answer in of if answer.why]
    return {
        "answers": len(there),
        "rejected": {reason: reasons.count(reason) for reason in sorted(set(reasons))},
        "finished": float(np.mean([a.finished for a in there])) if tokens else None,
        "tokens": float(np.mean(tokens)) if tokens else None,
        "characters": float(np.mean([len(a.response or "") for a in there])) if there else None,
        "words": float(np.mean([*map(len, texts)])) if there else None,
        **{f"distinct_{n}": statistics.distinct(texts, n, most_words) for n in (1, 2, 3, 4)},
        "repetition": float(np.mean([*map(statistics.repetition, texts)])) if there else None,
    }


def divergence(of: Sequence[Answer]) -> dict[str, Any]:
    """KL(π‖π_ref) in nats for an answer, by the mean of h over the policy's own samples, and its standard error."""
    there = [answer for answer in of if answer.logratio is not None]
    h = np.array([answer.logratio for answer in there])
    tokens = sum(len(answer.response_ids or ()) for answer in there)
    values = statistics.by_prompt(h, _prompts(there))
    error = statistics.standard_error(values)
    return {"nats": float(values.mean()), "standard_error": error, "per_token": float(h.sum() / tokens)}


def _prompts(of: Sequence[Answer]) -> np.ndarray:
    number = {q: i for i, q in enumerate(dict.fromkeys(answer.question.id for answer in of))}
    return np.array([number[answer.question.id] for answer in of], int)


def mean_reward(of: Sequence[Rewarded], seed: int) -> dict[str, Any]:
    """The mean reward with its interval, by turn and by category too where there are several; and what has none."""
    there = [one for one in of if isinstance(one.outcome, Score)]
    reasons = [one.outcome.reason for one in of if not isinstance(one.outcome, Score)]
    facts: dict[str, Any] = {
        "answers": len(there),
        "rejected": {reason: reasons.count(reason) for reason in sorted(set(reasons))},
    }
    if not there:
        return {**facts, "mean": None}
    groups = {
        "turns": [str(1 + one.answer.turn) for one in there],
        "categories": [str(one.answer.question.metadata.get("category") or "") for one in there],
    }
    for name, keys in groups.items():
        if len(set(keys)) > 1:
            parts = {key: [one for one, k in zip(there, keys, strict=True) if k == key] for key in sorted(set(keys))}
            facts[name] = {key: _mean(part, seed) for key, part in parts.items()}
    return {**facts, "mean": _mean(there, seed)}


def _mean(of: Sequence[Rewarded], seed: int) -> dict[str, Any]:
    values = np.array([one.outcome.value for one in of if isinstance(one.outcome, Score)])
    return statistics.mean(statistics.by_prompt(values, _prompts([one.answer for one in of])), seed).facts()


def wins(
    names: Mapping[tuple[str, str], list[Rewarded]],
    compared: Mapping[tuple[str, str, str], list[Rewarded]],
    order: Sequence[str],
    seed: int,
) -> dict[str, dict[str, Any]]:
    """Labeller → other model → how often the first model's response is better, with and without length."""
    found: dict[str, dict[str, Any]] = {}
    for (labeller, model), others in names.items():
        if model != order[0]:
            mine, theirs = _values(names[labeller, order[0]]), _values(others)
            facts = win(statistics.all_pairs(mine, theirs), seed)
            if facts["prompts"]:
                facts["difference"] = _difference(mine, theirs, seed)
            found.setdefault(labeller, {})[model] = facts
    for (labeller, _, model), of in compared.items():
        both = rewards.comparisons(of)
        reasons = [one.outcome.reason for one in of if not isinstance(one.outcome, Score)]
        lost = {reason: reasons.count(reason) for reason in sorted(set(reasons))}
        found.setdefault(labeller, {})[model] = {**win(both, seed), "rejected": lost}
    return found


def _values(of: Sequence[Rewarded]) -> list[tuple[Any, float, int]]:
    return [
        ((one.answer.question.id, one.answer.turn), one.outcome.value, len(one.answer.response or ""))
        for one in of
        if isinstance(one.outcome, Score)
    ]


def win(both: statistics.Comparisons, seed: int) -> dict[str, Any]:
    """The win rate, ties counting half, and the length-controlled one."""
    if not len(both.p):
        return {"prompts": 0, "comparisons": 0, "win_rate": None, "ties": None, "length_controlled": None}
    controlled, slope = statistics.length_controlled(both, seed)
    return {
        "prompts": len(set(both.prompts.tolist())),
        "comparisons": len(both.p),
        "win_rate": statistics.win_rate(both, seed).facts(),
        "ties": float(statistics.by_prompt((both.p == 0.5).astype(float), both.prompts).mean()),
        "length_controlled": {**controlled.facts(), "length_weight": slope},
        "longer_by": float(statistics.by_prompt(both.longer, both.prompts).mean()),
    }


def _difference(mine: list[tuple[Any, float, int]], theirs: list[tuple[Any, float, int]], seed: int) -> dict[str, Any]:
    """The mean difference of rewards, paired by prompt."""
    means = []
    for of in (mine, theirs):
        values: dict[Any, list[float]] = {}
        for prompt, reward, _ in of:
            values.setdefault(prompt, []).append(reward)
        means.append({prompt: float(np.mean(some)) for prompt, some in values.items()})
    shared = [prompt for prompt in means[0] if prompt in means[1]]
    return statistics.mean(np.array([means[0][p] - means[1][p] for p in shared]), seed).facts()


# --- what is written and told --------------------------------------------------------------------


def _failed(found: Mapping[str, Any], limit: float) -> str | None:
    """Why the run failed after all was written: too many prompts, answers or rewards that there are not."""
    counts = {"prompts": (found.get("prompts", {}).get("rejected", 0), found.get("prompts", {}).get("asked", 0))}
    for name, of in found.get("answers", {}).items():
        counts[f"answers of {name}"] = (sum(of["rejected"].values()), of["answers"])
    for labeller, by_model in found.get("rewards", {}).items():
        for name, of in by_model.items():
            counts[f"rewards of {name} by {labeller}"] = (sum(of["rejected"].values()), of["answers"])
    for labeller, by_model in found.get("wins", {}).items():
        for name, of in by_model.items():
            lost = sum(of.get("rejected", {}).values())
            counts[f"comparisons with {name} by {labeller}"] = (lost, of["comparisons"])
    for what, (lost, there) in counts.items():
        if lost > limit * (lost + there):
            return (
                f"{lost} of {lost + there} {what} are missing ({lost / (lost + there):.1%}), more than --max-rejected "
                f"{limit:g}; the column reason in {found['output']} says why"
            )
    return None


def _write(found: dict[str, Any], stage: Path, output: Path) -> None:
    """The tables are there; now the summary and the page, and all of it becomes the output."""
    (stage / FILE).write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", "utf-8")
    report.write(str(stage / "report.html"), report.render(evaluation_page(stage)))
    output.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        (output / name).unlink(missing_ok=True)
    for name in FILES:
        if (stage / name).is_file():
            os.replace(stage / name, output / name)
    shutil.rmtree(stage)


def tell(found: Mapping[str, Any]) -> None:
    """The results as a short text on stdout."""
    for name, of in found.get("answers", {}).items():
        kl = found["kl"].get(name)
        print(f"{name}: {of['answers']} answers, {_many(of)}{_kl(kl) if kl else ''}")
    for labeller, by_model in found.get("rewards", {}).items():
        for name, of in by_model.items():
            print(f"{labeller}: {name}: mean reward {_interval(of['mean'])}, {of['answers']} answers")
    for labeller, by_model in found.get("wins", {}).items():
        for name, of in by_model.items():
            main = next(iter(found["models"]))
            controlled = f", length-controlled {_interval(of['length_controlled'])}" if of["win_rate"] else ""
            print(f"{labeller}: {main} beats {name}: {_interval(of['win_rate'])}{controlled}, {of['prompts']} prompts")
    for name, by_type in found.get("calibration", {}).get("models", {}).items():
        for kind, of in by_type.items():
            told = ", ".join(f"{k} {shown(of.get(k))}" for k in ("pearson", "kendall", "accuracy", "ece"))
            print(f"{name}: implicit against explicit rewards of {of['rows']} {kind} rows: {told}")
    if "suite" in found:
        _tell_suite(found["suite"])
    for note in found.get("notes", []):
        print(f"note: {note}")
    print(f"{found['output']}/report.html")


def _many(of: Mapping[str, Any]) -> str:
    tokens = f"{of['tokens']:.1f} tokens, " if of["tokens"] is not None else ""
    repeated = shown(of["repetition"])
    return f"{tokens}{shown(of['characters'])} characters, distinct-2 {shown(of['distinct_2'])}, repetition {repeated}"


def _kl(kl: Mapping[str, Any]) -> str:
    return f", KL {round(kl['nats'], 2) + 0.0:g} ± {shown(kl['standard_error'])} nats"


def _interval(of: Mapping[str, Any] | None) -> str:
    return f"{of['value']:.4g} [{of['low']:.4g}, {of['high']:.4g}]" if of else "–"


def _tell_suite(suite: Mapping[str, Any]) -> None:
    tasks = list(next(iter(suite["models"].values())))
    rows = [
        [name, *(f"{of[task]['score']:.2f}" for task in tasks), f"{suites.average(of):.2f}"]
        for name, of in suite["models"].items()
    ]
    rows += [[f"{name} (paper)", *["–"] * len(tasks), f"{value:.2f}"] for name, value in suite["paper"].items()]
    head = [suite["name"], *tasks, "average"]
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    for row in [head, *rows]:
        print("  ".join(cell.ljust(w) if not i else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))))  # noqa: B905
    if suite["paper"]:
        print(suite["about_paper"])
