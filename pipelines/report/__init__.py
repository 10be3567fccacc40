"""`una report DIR`: a dataset or a training run as one HTML file that works offline.

Reads what the other stages and the trainer wrote, changes nothing, and imports neither Beam nor torch.
A page is a dict of plain values (see page.py); report.html lays it out, escapes it and runs no scripts.
"""

import argparse
import os
from pathlib import Path
from typing import Any

from pipelines.report.dataset import dataset_page
from pipelines.report.page import Page, cut, shown
from pipelines.report.run import run_page
from schemas.errors import UsageError, UserError
from schemas.feedback import ROLES
from schemas.manifest import NAME


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `una report`."""
    parser.add_argument("directory", help="a dataset or training-run directory")
    parser.add_argument("--output", metavar="FILE.html", help="where to write (default: DIR/report.html)")


def command(args: argparse.Namespace) -> dict[str, Any]:
    """Write the report of `args.directory`, print its path, and return it with the warnings it holds."""
    directory = Path(args.directory)
    output = Path(args.output) if args.output else directory / "report.html"
    if output.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"--output {output}: the report is one HTML file, so its name must end in .html")
    page = build(directory)
    write(output, render(page))
    print(output)
    return {"report": str(output), "kind": page["kind"], "warnings": page["warnings"]}


def build(directory: Path) -> Page:
    """The page for a directory, by what lies in it; `UserError` when that is nothing we know."""
    if not directory.is_dir():
        raise UserError(f"{directory}: {'is a file, not a directory' if directory.exists() else 'no such directory'}")
    if (directory / "run.json").is_file() or (directory / "metrics.jsonl").is_file():
        return run_page(directory)
    if (directory / NAME).is_file():
        return dataset_page(directory)
    raise UserError(
        f"{directory}: neither a dataset (no {NAME}) nor a training run (no run.json, no metrics.jsonl); "
        "run `una ingest` or `una train` first, or name the directory that one of them wrote"
    )


def render(page: Page) -> str:
    """The page as HTML; every value in it is escaped."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"cut": cut, "shown": shown}
    return environment.get_template("report.html").render(page=page, roles=ROLES)


def write(output: Path, html: str) -> None:
    """Write beside the target and rename, so that a reader never sees half a report."""
    if output.is_dir():
        raise UsageError(f"--output {output}: is a directory; name a file, such as {output / 'report.html'}")
    if not output.parent.is_dir():
        raise UsageError(f"--output {output}: the directory {output.parent} does not exist; make it first")
    beside = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        beside.write_bytes(html.encode("utf-8", "replace"))  # a lone surrogate becomes a question mark
        os.replace(beside, output)
    finally:
        beside.unlink(missing_ok=True)
