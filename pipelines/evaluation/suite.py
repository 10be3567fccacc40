"""Benchmarks by lm-evaluation-harness, with the shots and metrics of the two Open LLM Leaderboards.

The harness does the work; here is what is asked of it, which of its numbers count, and what the paper reports.
"""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from schemas import settings_file
from schemas.errors import UsageError, UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Task:
    """A task or group of the harness. The score is the mean of `metrics`, which are `name` or `name,filter`."""

    name: str
    shots: int
    metrics: tuple[str, ...]


@dataclass(frozen=True)
class Suite:
    name: str
    tasks: Mapping[str, Task]
    include_path: str | None = None  # a folder with tasks that the harness does not have


SUITES = {
    "open-llm-leaderboard-new": {
        "bbh": Task("leaderboard_bbh", 3, ("acc_norm",)),
        "gpqa": Task("leaderboard_gpqa", 0, ("acc_norm",)),
        "mmlu_pro": Task("leaderboard_mmlu_pro", 5, ("acc",)),
        "musr": Task("leaderboard_musr", 0, ("acc_norm",)),
        "ifeval": Task("leaderboard_ifeval", 0, ("inst_level_strict_acc", "prompt_level_strict_acc")),
        "math_hard": Task("leaderboard_math_hard", 4, ("exact_match",)),
    },
    "open-llm-leaderboard-old": {
        "gsm8k": Task("gsm8k", 5, ("exact_match,strict-match",)),
        "truthfulqa": Task("truthfulqa_mc2", 0, ("acc",)),
        "winogrande": Task("winogrande", 5, ("acc",)),
        "arc_challenge": Task("arc_challenge", 25, ("acc_norm",)),
        "hellaswag": Task("hellaswag", 10, ("acc_norm",)),
        "mmlu": Task("mmlu", 5, ("acc",)),
    },
}
# Averages over a suite, in percent, of UNA's paper (arXiv 2408.15339, Mistral-7B trained on HelpSteer2): those that at
# least two readers' reports quote alike. The paper's other numbers could not be verified and are left out.
PAPER = {
    "open-llm-leaderboard-new": {
        "Mistral-7B": 28.61,
        "DPO (UNA-pairwise)": 28.53,
        "KTO": 28.56,
        "UNA-binary (BCE)": 28.93,
        "UNA-score (MSE)": 30.92,
    }
}
ABOUT_PAPER = (
    "The paper's averages are quoted from readers' reports that agree; its numbers by task, and those of the old "
    "leaderboard, could not be verified and are left out. Its authors' scripts average ifeval's four accuracies, both "
    "filters of gsm8k, and mc1 with mc2, where the leaderboards take what is scored here; and math_hard is judged by "
    "math-verify by now. So compare with care."
)


def suite_of(asked: str) -> Suite:
    """A suite by name, or one in a YAML file: `tasks: {task: {shots: 0, metric: acc}}` and perhaps `include_path`."""
    if asked in SUITES:
        return Suite(asked, SUITES[asked])
    if Path(asked).suffix not in (".yaml", ".yml"):
        raise UsageError(f"--suite {asked}: must be {', '.join(SUITES)}, or a YAML file with tasks")
    found = settings_file.read(asked, "suite")
    if wrong := sorted(found.keys() - {"tasks", "include_path"}):
        raise UsageError(f"{asked}: {wrong[0]!r} is none of tasks, include_path")
    if not isinstance(found.get("tasks"), dict) or not found["tasks"]:
        raise UsageError(f"{asked}: needs tasks, such as `tasks: {{my_task: {{shots: 0, metric: acc}}}}`")
    include = found.get("include_path")
    folder = str((Path(asked).parent / include).resolve()) if include else None
    if folder and not Path(folder).is_dir():
        raise UsageError(f"{asked}: include_path {include}: no such directory")
    return Suite(Path(asked).stem, {name: _task(asked, name, of) for name, of in found["tasks"].items()}, folder)


def _task(where: str, name: str, of: Any) -> Task:
    if not isinstance(of, dict) or of.keys() != {"shots", "metric"} or type(of["shots"]) is not int or of["shots"] < 0:
        raise UsageError(f"{where}: tasks.{name}: needs shots (a whole number) and metric, and nothing else: {of!r}")
    metrics = of["metric"] if isinstance(of["metric"], list) else [of["metric"]]
    return Task(name, of["shots"], tuple(map(str, metrics)))


class Harness:
    """The harness with the tasks of a suite; `UserError` when it is not installed or lacks one."""

    def __init__(self, suite: Suite):
        try:
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise UserError(f"--suite: lm_eval is missing ({error}); `pip install 'una-align[eval]'`") from None
        self.suite, names = suite, {task.name for task in suite.tasks.values()}
        self.manager = TaskManager(include_path=suite.include_path, include_defaults=not suite.include_path)
        if suite.include_path and not names <= set(self.manager.all_tasks):
            self.manager = TaskManager(include_path=suite.include_path)
        if unknown := sorted(names - set(self.manager.all_tasks)):
            raise UserError(f"--suite {suite.name}: the harness has no task {unknown[0]!r}")

    def run(self, directory: str, dtype: str, limit: int | None) -> dict[str, dict[str, Any]]:
        """Task → score and standard error in percent, shots and metrics; `UserError` for a task that cannot be run."""
        import torch
        from lm_eval.models.huggingface import HFLM

        gpu = torch.cuda.is_available()
        lm = HFLM(
            pretrained=directory,
            dtype=dtype,
            device="cuda" if gpu else "cpu",
            batch_size="auto" if gpu else 8,
            trust_remote_code=False,
        )
        return {label: self._one(lm, task, limit) for label, task in self.suite.tasks.items()}

    def _one(self, lm: Any, task: Task, limit: int | None) -> dict[str, Any]:
        import lm_eval

        log.info("%s, %d shots", task.name, task.shots)
        try:
            found = lm_eval.simple_evaluate(
                lm,
                tasks=[task.name],
                num_fewshot=task.shots,
                limit=limit,
                task_manager=self.manager,
                log_samples=False,
                bootstrap_iters=1000,
            )
        except Exception as error:  # data sets that cannot be fetched, tasks' own code: anything
            offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0") else ""
            said = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            raise UserError(f"--suite {self.suite.name}: {task.name} cannot be run{offline}: {said}") from None
        assert found is not None
        return scored(task, {**found["results"], **found.get("groups", {})}[task.name])


def scored(task: Task, result: Mapping[str, Any]) -> dict[str, Any]:
    """The score of what the harness found; `UserError` for a metric that it does not report."""
    values, errors = [], []
    for metric in task.metrics:
        name, _, chosen = metric.partition(",")
        keys = [key for key in result if key.partition(",")[0] == name and chosen in ("", key.partition(",")[2])]
        if len(keys) != 1:
            known = sorted(key for key in result if "," in key and "_stderr" not in key)
            raise UserError(f"{task.name}: {len(keys)} results are called {metric!r}; it reports {', '.join(known)}")
        values.append(float(result[keys[0]]))
        errors.append(result.get(keys[0].replace(",", "_stderr,", 1)))
    alone = errors[0] if len(errors) == 1 and isinstance(errors[0], int | float) else None
    told = {"score": 100 * sum(values) / len(values), "standard_error": None if alone is None else 100 * alone}
    return {**told, "shots": task.shots, "metrics": list(task.metrics)}


def average(scores: Mapping[str, Mapping[str, Any]]) -> float:
    return sum(one["score"] for one in scores.values()) / len(scores)
