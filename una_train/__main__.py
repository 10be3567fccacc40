"""`accelerate launch -m una_train DIR --model M --output DIR`: `una train` on several processes."""

import argparse
import os
import sys
from typing import Any

from schemas import command
from schemas.errors import UserError
from una_train import train


def main() -> int:
    command.log_to_stderr()
    parser = argparse.ArgumentParser(prog="una_train", description=__doc__)
    train.add_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print the summary as JSON on the last line of stdout")
    args = parser.parse_args()
    args.json = args.json and os.environ.get("RANK", "0") == "0"
    follower = os.environ.get("LOCAL_RANK", "0") != "0"
    return command.run(_silent if follower else train.command, args, "una_train")


def _silent(args: argparse.Namespace) -> dict[str, Any]:
    """Every process of a machine meets the same user errors; the first one reports them."""
    try:
        return train.command(args)
    except UserError:
        sys.exit(1)


if __name__ == "__main__":
    sys.exit(main())
