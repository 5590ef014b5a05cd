"""The speed contract: how fast a layer has to be against 16 bit, and what the audit's predictions say of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qlinear.machines import Machine
from qlinear.tables import table

#: At least so many times as fast as 16 bit, from so many tokens on.
CONTRACT: dict[str, tuple[tuple[int, float], ...]] = {
    "w4a16": ((1, 1.0), (129, 0.85), (2049, 0.95)),
    "w8a16": ((1, 1.0), (129, 0.85), (2049, 0.95)),
    "w8a8": ((1, 1.0),),
    "fp8": ((1, 1.0),),
}
#: Tokens it is looked at, on both sides of every step.
TOKENS = (1, 16, 64, 128, 256, 512, 1024, 2048, 4096)
#: Layers of fewer weights are left out: in 16 bit, too, they are bound by what no prediction here knows, a launch and
#: the first wave.
_LARGE = 4096 * 4096


def wanted(scheme: str, m: int) -> float | None:
    """What the contract asks for; None of a scheme that is not in it."""
    steps = [factor for first, factor in CONTRACT.get(scheme, ()) if m >= first]
    return steps[-1] if steps else None


def worst(predictions: Sequence[dict[str, Any]], machine: Machine) -> list[dict[str, Any]]:
    """The layer of 4096 x 4096 and up that is slowest against 16 bit, by scheme and number of tokens."""
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in predictions:
        # Where tensor cores do not know e4m3 there is nothing to be faster with.
        if row["machine"] != machine.name or (row["scheme"] == "fp8" and machine.capability < (8, 9)):
            continue
        if row["M"] in TOKENS and row["scheme"] in CONTRACT and row["N"] * row["K"] >= _LARGE:
            groups.setdefault((row["scheme"], row["M"]), []).append(row)
    found = []
    for (scheme, m), rows in groups.items():
        least, asked = min(rows, key=lambda row: row["times_16_bit"]), wanted(scheme, m)
        one = {name: least[name] for name in ("machine", "scheme", "dtype", "M", "N", "K", "bound", "times_16_bit")}
        found.append(one | {"wanted": asked, "held": asked is not None and least["times_16_bit"] >= asked})
    return found


def as_table(rows: Sequence[dict[str, Any]], machine: Machine) -> str:
    """One line for each scheme; empty where there is nothing to show."""
    if not rows:
        return ""
    tokens, lines = sorted({row["M"] for row in rows}), []
    for scheme in dict.fromkeys(row["scheme"] for row in rows):
        mine = {row["M"]: row for row in rows if row["scheme"] == scheme}
        lines.append((scheme, *(_cell(mine[m]) if m in mine else "" for m in tokens)))
    title = (
        f"{machine.name}, speed against 16 bit, predicted, of the slowest layer of 4096 x 4096 and up; !: less\n"
        "than the contract wants (bench/contract.py). 16 bit: in the best of usual tiles, half-filled waves included."
    )
    return f"{title}\n{table(('scheme', *(f'M = {m}' for m in tokens)), lines, right=range(1, 1 + len(tokens)))}"


def _cell(row: dict[str, Any]) -> str:
    return f"{row['times_16_bit']:.2f}x{'' if row['held'] else ' !'}"
