"""What pages are made of, and how values look on them.

A page is a dict: kind, title, facts (the tiles on top), warnings, notes and sections; a section holds blocks,
each a table, a chart (plots.py) or sample rows. Values stay raw until report.html shows them.
"""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from schemas.feedback import TYPES

Block = dict[str, Any]
Page = dict[str, Any]
SHOWN = 600  # characters of a text


def section(title: str, blocks: Sequence[Block]) -> Block:
    """A section; it is not shown when all of its blocks are empty. report.html knows what to say about it."""
    return {"id": title.lower().replace(" ", "-"), "title": title, "blocks": [b for b in blocks if b]}


def table(head: Sequence[str], body: Sequence[Sequence[Any]], numeric: Iterable[int] = (), total: Any = ()) -> Block:
    """A table; a cell is a value or, for an example, {"lines", "pre"}. `numeric` columns stand on the right."""
    return {"kind": "table", "head": head, "body": body, "total": total, "numeric": set(numeric)} if body else {}


def facts_table(name: str, facts: Any) -> Block:
    """Nested dicts as two columns, dotted names and values."""
    return table([name, "value"], list(_flatten(facts)))


def _flatten(facts: Any, prefix: str = "") -> Iterator[tuple[str, str | None]]:
    if isinstance(facts, dict) and facts:
        for key, value in facts.items():
            yield from _flatten(value, f"{prefix}.{key}" if prefix else str(key))
    elif prefix:
        yield prefix, facts if isinstance(facts, str | None) else json.dumps(facts, ensure_ascii=False)


def in_order(kinds: Iterable[str]) -> list[str]:
    """Types in the order of `TYPES`; any other last."""
    return sorted(kinds, key=lambda k: (TYPES.index(k) if k in TYPES else len(TYPES), k))


def shown(value: Any) -> str:
    """12,345 and 0.1235; a dash for what is missing or not a number."""
    if value is None or value == "" or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    return cut(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def cut(text: str, limit: int = SHOWN) -> str:
    return text if len(text) <= limit else f"{text[:limit]} … {len(text):,} characters in all"


def percent(part: Any, whole: Any = 1) -> str:
    return f"{100 * part / whole:.3g} %" if whole else "0 %"
