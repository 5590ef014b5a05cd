"""What programs put out: aligned text tables, human sizes, JSON files; and rules as they take them in."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


def table(
    header: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[int] = (), rule_before_last: bool = False
) -> str:
    """An aligned text table; ``right`` lists the columns that hold numbers."""
    body = [tuple(row) for row in rows]
    widths = [max(len(row[i]) for row in [tuple(header), *body]) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        cells = [
            cell.rjust(w) if i in right else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        return "  ".join(cells).rstrip()

    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    lines = [line(header), rule, *map(line, body)]
    if rule_before_last:
        lines.insert(-1, rule)
    return "\n".join(lines)


def human_bytes(count: float) -> str:
    """``1234567`` as ``1.23 MB`` (decimal units)."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def digits(value: float, count: int = 3) -> str:
    """``0.0012345`` as ``0.00123`` and ``1234.5`` as ``1234``: at least so many digits that say something."""
    places = count - 1 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:.{max(places, 0)}f}"


def by_pattern(rules: Iterable[str]) -> dict[str, str | None]:
    """``["lm_head=none", "w8a16"]`` as ``{"lm_head": None, "*": "w8a16"}``: rules as a command line takes them."""
    found: dict[str, str | None] = {}
    for rule in rules:
        pattern, _, value = rule.rpartition("=")
        found[pattern or "*"] = None if value.lower() == "none" else value
    return found


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Writes beside its place and moves in, so that a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(data, indent=2) + "\n")
    os.replace(temporary, path)
