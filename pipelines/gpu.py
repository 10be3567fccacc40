"""GPUs for the step that needs them: options, and the resource hints that Beam makes of them.

Dataflow starts machines with what a step's hints ask for, and others for the rest. Hints go on the whole chain from an
address to a part file, behind a shuffle of addresses: between steps of different hints lies a shuffle too, and so no
text crosses one. (`max_active_bundles_per_worker` is no such hint: Beam adds it up over nested steps, which would part
the chain. Options say the same.)
"""

import argparse
import logging
import re

from pipelines.beam import ONE_PROCESS, on_dataflow
from schemas.command import did_you_mean
from schemas.errors import UsageError

log = logging.getLogger(__name__)
GPUS = (  # Dataflow's names
    "nvidia-tesla-t4",
    "nvidia-l4",
    "nvidia-tesla-a100",
    "nvidia-a100-80gb",
    "nvidia-h100-80gb",
    "nvidia-h100-mega-80gb",
)
_SIZE = re.compile(r"[0-9]+(\.[0-9]+)?[KMGT]i?B")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of a stage that runs a model."""
    parser.add_argument(
        "--accelerator", metavar="TYPE", help=f"Dataflow: the GPU of machines that run the model ({', '.join(GPUS)})"
    )
    parser.add_argument("--accelerator-count", type=int, default=1, metavar="N", help="GPUs of such a machine (1)")
    parser.add_argument("--min-ram", metavar="SIZE", help="Dataflow: their least main memory, such as 48GB")


def hints(args: argparse.Namespace) -> dict[str, str]:
    """Resource hints for the step that runs a model; `UsageError` for what Dataflow would not understand."""
    found = {}
    if args.accelerator:
        found["accelerator"] = f"type:{_known(args.accelerator)};count:{args.accelerator_count};install-nvidia-driver"
    elif args.accelerator_count != 1:
        raise UsageError("--accelerator-count: of which GPU? Name it with --accelerator")
    if args.accelerator_count not in (1, 2, 4, 8, 16):
        raise UsageError(f"--accelerator-count {args.accelerator_count}: machines have 1, 2, 4, 8 or 16 GPUs")
    if args.min_ram:
        if not _SIZE.fullmatch(args.min_ram):
            raise UsageError(f"--min-ram {args.min_ram}: must look like 48GB or 64GiB")
        found["min_ram"] = args.min_ram
    if found and any("worker_accelerator" in flag for flag in args.beam):
        raise UsageError("worker_accelerator gives all machines a GPU; leave it out beside --accelerator and --min-ram")
    if found and not on_dataflow(args.beam):
        log.warning("--accelerator, --min-ram: only Dataflow starts machines; ignored by this runner")
    return found


def flags(args: argparse.Namespace) -> list[str]:
    """Beam's options for machines with a GPU, where the user gave none: one process, which holds the model, and two
    threads, one of which reads or writes while the other has the model."""
    if not args.accelerator or not on_dataflow(args.beam):
        return []
    found = [] if any("use_multiple_sdk_containers" in flag for flag in args.beam) else [f"--experiments={ONE_PROCESS}"]
    threads = "--number_of_worker_harness_threads"
    return found + ([] if any(flag.startswith(threads) for flag in args.beam) else [f"{threads}=2"])


def _known(name: str) -> str:
    """A name that Dataflow may know: there will be more of them."""
    if not re.fullmatch(r"nvidia-[a-z0-9-]+", name):
        raise UsageError(f"--accelerator {name}: no name of a GPU{did_you_mean(name, GPUS)}; see docs/dataflow.md")
    return name
