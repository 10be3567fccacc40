"""The `una` command: one table of subcommands, each loaded only when it runs."""

import argparse
import gc
import importlib
import os
import sys

from pipelines import processes
from schemas import command

ALL, STORES, NONE = "--", "--s3_", ""  # how those of Beam's options start that a command takes
# name → (module, function that adds arguments, function that runs, Beam's options, one line of help, examples)
COMMANDS: dict[str, tuple[str, str, str, str, str, str]] = {
    "inspect": (
        "pipelines.understand",
        "add_inspect_arguments",
        "inspect",
        STORES,
        "show how files would be read: format, feedback type, fields, sample rows",
        "una inspect ratings.csv\nuna inspect exports/ thumbs.jsonl.gz",
    ),
    "ingest": (
        "pipelines.ingest",
        "add_arguments",
        "command",
        ALL,
        "turn raw feedback files into feedback rows",
        "una ingest comparisons.jsonl thumbs.jsonl.gz --output data/rows\n"
        "una ingest train.parquet --format helpsteer --source helpsteer2 --output data/rows\n"
        "una ingest exports/ --output data/rows --ties half --direct_num_workers 2 "
        "--direct_running_mode multi_processing",
    ),
    "filter": (
        "pipelines.filters",
        "add_arguments",
        "command",
        ALL,
        "drop rows by language, length, duplication and overlap with evaluation prompts",
        "una filter data/rows --output data/clean --language en,de --exact-duplicates --near-duplicates 0.8\n"
        "una filter data/rows --output data/clean --decontaminate gsm8k.jsonl mmlu.csv",
    ),
    "label": (
        "pipelines.label",
        "add_arguments",
        "command",
        ALL,
        "give rows rewards: by reward models, judges, rules, or several of them",
        "una label data/rows --labeller length:least=20,most=2000 --output data/labelled\n"
        "una label data/rows --labeller judge.yaml --labeller rm.yaml --combine mean --budget 5usd "
        "--output data/labelled",
    ),
    "rollout": (
        "pipelines.rollout",
        "add_arguments",
        "command",
        ALL,
        "sample responses to prompts, as rows that wait for rewards",
        "una rollout prompts.jsonl --model models/base --output data/sampled\n"
        "una rollout data/published --model models/base --samples 8 --engine vllm --output data/sampled",
    ),
    "reference": (
        "pipelines.reference",
        "add_arguments",
        "command",
        ALL,
        "add token ids and reference log-probs",
        "una reference data/rows --model models/base --output data/scored\n"
        "una reference data/rows --model models/base --engine vllm --dtype bfloat16 --output data/scored",
    ),
    "publish": (
        "pipelines.publish",
        "add_arguments",
        "command",
        ALL,
        "split, remove duplicates, write shards and a dataset card",
        "una publish data/scored --output data/published --split train=0.95,test=0.05\n"
        "una publish data/ratings data/thumbs --output data/both",
    ),
    "view": (
        "pipelines.view",
        "add_arguments",
        "command",
        STORES,
        "turn one type of feedback into another, such as scores into comparisons",
        "una view data/published --as pairwise --output data/pairs\n"
        "una view data/published --as binary --threshold 0.7 --output data/thumbs",
    ),
    "export": (
        "pipelines.export",
        "add_arguments",
        "command",
        STORES,
        "write rows as a file for another trainer or a labelling tool",
        "una export data/published --to trl-preference --split train --output pairs.jsonl\n"
        "una export data/published --to llama-factory --split all --type binary --output kto.json",
    ),
    "train": (
        "una_train.train",
        "add_arguments",
        "command",
        NONE,
        "train a policy on a published dataset",
        "una train data/published --model models/base --output runs/policy --set beta=0.1 --set lora=true\n"
        "accelerate launch -m una_train data/published --model models/base --output runs/policy",
    ),
    "online": (
        "una_train.online",
        "add_arguments",
        "command",
        NONE,
        "train a policy on its own responses: sample, reward, score, step",
        "una online prompts.jsonl --model models/base --reward reward.yaml --output runs/online --set beta=0.1\n"
        "una online data/published --model models/base --reward judge.yaml --offline data/published "
        "--set offline_ratio=0.25 --output runs/online",
    ),
    "reward-model": (
        "una_train.reward_model",
        "add_arguments",
        "command",
        NONE,
        "train a reward model on comparisons",
        "una reward-model train data/published --model models/base --output runs/reward --set lora=true",
    ),
    "eval": (
        "pipelines.evaluation",
        "add_arguments",
        "command",
        STORES,
        "compare models: rewards, win rates and KL on held-out prompts, calibration, benchmarks",
        "una eval runs/policy --against models/base --prompts data/published --reward rm.yaml --reference models/base "
        "--output runs/eval\n"
        "una eval runs/policy --against models/base --suite open-llm-leaderboard-new --output runs/benchmarks",
    ),
    "report": (
        "pipelines.report",
        "add_arguments",
        "command",
        STORES,
        "a dataset, a training run or an evaluation as one HTML file",
        "una report data/published\nuna report runs/policy --output report.html",
    ),
    "run": (
        "pipelines.recipe",
        "add_arguments",
        "command",
        ALL,
        "run all stages of a recipe, skipping those that are unchanged",
        "una run examples/demo.yaml",
    ),
}


_BEAMS = {
    ALL: "\n\nOther options go to Beam (--runner, --direct_num_workers, --s3_endpoint_url, …).",
    STORES: "\n\nOptions for s3:// paths (--s3_endpoint_url, …) go to Beam.",
    NONE: "",
}


def parser_for(name: str) -> argparse.ArgumentParser:
    """The parser of one subcommand."""
    module, add, _, beams, text, examples = COMMANDS[name]
    parser = argparse.ArgumentParser(
        prog=f"una {name}",
        description=text[0].upper() + text[1:] + ".",
        epilog=f"examples:\n  {examples.replace(chr(10), chr(10) + '  ')}" + _BEAMS[beams],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    getattr(importlib.import_module(module), add)(parser)
    parser.add_argument("--json", action="store_true", help="print a JSON summary as the last line of stdout")
    return parser


def parse(name: str, argv: list[str]) -> argparse.Namespace:
    """Parse a subcommand's arguments; options that only Beam knows are kept for it in `args.beam`."""
    parser = parser_for(name)
    ours = parser._option_string_actions
    start = COMMANDS[name][3]
    flags: list[str] = []
    if start and any(a.startswith(start) and a.split("=")[0] not in ours for a in argv):
        from pipelines import beam

        flags, argv = beam.split_flags(argv, set(ours), start)
    args, rest = parser.parse_known_args(argv)
    if rest:
        parser.error(f"unknown argument {rest[0]}{command.did_you_mean(rest[0], ours)}")
    args.beam = flags
    return args


def call(name: str, args: argparse.Namespace) -> dict:
    """Run a subcommand in this process and return its summary."""
    if args.beam:
        from pipelines import remote

        remote.connect(args.beam)
    module, _, function, *_ = COMMANDS[name]
    return getattr(importlib.import_module(module), function)(args)


def _is_text(argument: str) -> bool:
    return not any("\ud800" <= c <= "\udfff" for c in argument)


def main(argv: list[str] | None = None) -> int:
    """Entry point of `una`."""
    from importlib.metadata import version

    gc.set_threshold(50_000, 20, 20)  # what is imported stays: to look for garbage among it costs a tenth of the start
    own_process = argv is None
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="una",
        description="Any feedback on language-model outputs in, an aligned policy and a published dataset out.",
        epilog="examples:\n  una inspect feedback.jsonl\n  una run examples/demo.yaml\n  una ingest --help",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"una {version('una-align')}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=", ".join(COMMANDS))
    lines = "\n".join(f"  {name:12} {entry[4]}" for name, entry in COMMANDS.items())
    parser.epilog = f"commands:\n{lines}\n\n{parser.epilog}"
    name = parser.parse_args(argv[:1]).command
    if wrong := next((arg for arg in argv if not _is_text(arg)), None):
        parser.error(f"{os.fsencode(wrong)!r} is not valid UTF-8")
    command.log_to_stderr()
    if own_process:
        processes.end_quickly()
        if name in processes.LEAN:
            processes.hide(*processes.NOT_OURS)
    return command.run(lambda args: call(name, args), lambda: parse(name, argv[1:]), f"una {name}")


if __name__ == "__main__":
    sys.exit(main())
