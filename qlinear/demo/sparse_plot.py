"""The picture of ``qlinear demo --sparse``: quality against sparsity, a panel for each model and measure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qlinear.demo.source import require
from qlinear.format import FORMATS
from qlinear.pruning import METHODS

_COLOURS = dict(zip(METHODS, ("tab:gray", "tab:orange", "tab:blue", "tab:green"), strict=False))
_MARKERS = {"unstructured": "o", "2:4": "s", "block64": "D", "neurons": "^"}
#: How markers are filled by the bits of the weights, and how far to the right they stand, so that all are seen.
_FILLS = {16: ("full", 0.0), 8: ("none", 0.008), 4: ("top", 0.016)}


def require_matplotlib() -> None:
    """Raises qlinear.demo.wheels.SourceError where it is missing, before any work is done."""
    require("matplotlib")


def plot(models: Sequence[dict[str, Any]], path: Path) -> None:
    """Writes the picture; ``models`` is what :func:`qlinear.demo.sparse.run_sparse_demo` returns under that name."""
    matplotlib = require("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [(model, metric) for model in models for metric in _metrics(model)]
    columns = min(len(panels), 2)
    rows = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(7.5 * columns, 5 * rows), squeeze=False)
    for axis, (model, metric) in zip(axes.flat, panels, strict=False):
        _panel(axis, model, metric)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _metrics(model: dict[str, Any]) -> list[str]:
    """The first measure, and what is compared with people's labels where there are any."""
    first = next(iter(model["float"]["quality"]))
    return [first, model["labels"]] if model["labels"] else [first]


def _panel(axis: Any, model: dict[str, Any], metric: str) -> None:
    axis.axhline(model["float"]["quality"][metric], color="black", linewidth=1, label="float")
    curves: dict[tuple[str, str, int], list[tuple[float, float]]] = {}
    for row in model["pruned"]:
        bits = FORMATS[row["scheme"]].bits if row["scheme"] in FORMATS else 16
        curves.setdefault((row["pattern"], row["method"], bits), []).append((row["sparsity"], row["quality"][metric]))
    for (pattern, method, bits), points in curves.items():
        fill, shift = _FILLS[bits]
        x, y = zip(*sorted(points), strict=True)
        style = "" if bits < 16 else "-" if pattern == "unstructured" else "--"
        marker = {"marker": _MARKERS.get(pattern, "x"), "fillstyle": fill, "color": _COLOURS[method]}
        axis.plot([share + shift for share in x], y, linestyle=style, **marker)
    handles = [axis.plot([], [], color=_COLOURS[method], label=method)[0] for method in METHODS]
    dots = {"color": "black", "linestyle": "none"}
    for pattern in dict.fromkeys(pattern for pattern, _, _ in curves):
        handles += axis.plot([], [], marker=_MARKERS.get(pattern, "x"), label=pattern, **dots)
    for bits in sorted({bits for _, _, bits in curves} - {16}, reverse=True):
        handles += axis.plot([], [], marker="o", fillstyle=_FILLS[bits][0], label=f"int{bits}", **dots)
    # Beside the panel: inside there is no corner without points.
    axis.legend(handles=handles, fontsize="small", loc="upper left", bbox_to_anchor=(1.01, 1.0))
    if metric == "perplexity":
        axis.set_yscale("log")
    axis.set_title(model["float"]["model"])
    axis.set_xlabel("share of weights, blocks or neurons removed")
    axis.set_ylabel("correlation with people's ratings" if metric == model["labels"] else metric)
    axis.grid(alpha=0.3)
