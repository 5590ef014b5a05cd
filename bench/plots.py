"""``bench.matmul``'s rows as tables, and as pictures: speed-up against the number of tokens, share of the floor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qlinear.tables import table

Row = dict[str, Any]


def show(rows: Sequence[Row]) -> str:
    """One table per scheme and dtype; a ratio of 2.00x says that the other side takes twice as long."""
    parts = []
    for scheme, dtype in dict.fromkeys((row["scheme"], row["dtype"]) for row in rows):
        mine = [row for row in rows if (row["scheme"], row["dtype"]) == (scheme, dtype)]
        floats = list(dict.fromkeys(name for row in mine for name in row["float_us"]))
        peers = list(dict.fromkeys(name for row in mine for name in row["peers_us"]))
        header = ("N x K", "M", "us", "TFLOP/s", "GB/s", "of floor", *(f"x {name}" for name in [*floats, *peers]))
        lines = [(f"{row['n']} x {row['k']}", str(row["m"]), *_cells(row, floats, peers)) for row in mine]
        parts.append(f"{scheme}, {dtype}\n" + table(header, lines, right=range(1, len(header))))
    return "\n\n".join(parts)


def _cells(row: Row, floats: Sequence[str], peers: Sequence[str]) -> tuple[str, ...]:
    if row["us"] is None:
        return ("wrong" if row["error"].startswith("wrong") else "none", *[""] * (3 + len(floats) + len(peers)))
    floor = f"{row['of_floor']:.0%}" if "of_floor" in row else ""
    others = [row["float_us"].get(name) for name in floats] + [row["peers_us"].get(name) for name in peers]
    ratios = ("" if us is None else f"{us / row['us']:.2f}x" for us in others)
    return (f"{row['us']:.1f}", f"{row['tflops']:.3g}", f"{row['gbps']:.3g}", floor, *ratios)


def plot(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Writes the pictures there is something for: one panel per scheme and dtype, one line per layer.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    done = [row for row in rows if row.get("us")]
    written = []
    faster = [row for row in done if _speedup(row) is not None]
    if faster:
        path = folder / "speedup.png"
        _panels(faster, _speedup, "times as fast as 16-bit F.linear", 1.0, path)
        written.append(path)
    placed = [row for row in done if row.get("of_floor")]
    if placed:
        path = folder / "floor.png"
        _panels(placed, lambda row: float(row["of_floor"]), "share of the floor (memory or tensor cores)", 1.0, path)
        written.append(path)
    return written


def _speedup(row: Row) -> float | None:
    base = next((row["float_us"][name] for name in ("float16", "bfloat16") if name in row["float_us"]), None)
    return None if base is None else float(base) / float(row["us"])


def _panels(rows: Sequence[Row], value: Callable[[Row], float | None], label: str, line: float, path: Path) -> None:
    import matplotlib.pyplot as plt

    keys = list(dict.fromkeys((row["scheme"], row["dtype"]) for row in rows))
    columns = min(3, len(keys))
    lines = -(-len(keys) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(4.6 * columns, 3.4 * lines), squeeze=False, sharey=True)
    for axis in axes.flat[len(keys) :]:
        axis.set_visible(False)
    for axis, (scheme, dtype) in zip(axes.flat, keys, strict=False):
        mine = [row for row in rows if (row["scheme"], row["dtype"]) == (scheme, dtype)]
        for n, k in dict.fromkeys((row["n"], row["k"]) for row in mine):
            points = [(row["m"], value(row)) for row in mine if (row["n"], row["k"]) == (n, k)]
            axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=f"{n} x {k}")
        axis.axhline(line, color="black", linewidth=0.8, linestyle="--")
        axis.set_xscale("log", base=2)
        axis.set_title(f"{scheme}, {dtype}", fontsize=10)
        axis.set_xlabel("tokens M")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel(label)
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
