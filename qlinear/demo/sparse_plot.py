"""The picture of ``qlinear demo --sparse``: quality against sparsity, a panel for each model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qlinear.demo.source import require
from qlinear.pruning import METHODS

_COLOURS = dict(zip(METHODS, ("tab:gray", "tab:orange", "tab:blue", "tab:green"), strict=False))
_MARKERS = {"unstructured": "o", "2:4": "s", "block64": "D", "neurons": "^"}


def require_matplotlib() -> None:
    """Raises qlinear.demo.wheels.SourceError where it is missing, before any work is done."""
    require("matplotlib")


def plot(models: Sequence[dict[str, Any]], path: Path) -> None:
    """Writes the picture; ``models`` is what :func:`qlinear.demo.sparse.run_sparse_demo` returns under that name."""
    matplotlib = require("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(models), figsize=(6.5 * len(models), 5), squeeze=False)
    for axis, model in zip(axes[0], models, strict=True):
        _panel(axis, model)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _panel(axis: Any, model: dict[str, Any]) -> None:
    metric, whole = next(iter(model["float"]["quality"].items()))
    axis.axhline(whole, color="black", linewidth=1, label="float")
    plain = [row for row in model["pruned"] if row["scheme"] == "float"]
    for pattern in dict.fromkeys(row["pattern"] for row in plain):
        for method in METHODS:
            points = sorted(
                (row["sparsity"], row["quality"][metric])
                for row in plain
                if (row["pattern"], row["method"]) == (pattern, method)
            )
            if points:
                x, y = zip(*points, strict=True)
                style = "-" if pattern == "unstructured" else "--"
                axis.plot(x, y, style, marker=_MARKERS.get(pattern, "x"), color=_COLOURS[method])
    handles = [axis.plot([], [], color=_COLOURS[method], label=method)[0] for method in METHODS]
    for pattern in dict.fromkeys(row["pattern"] for row in plain):
        handles += axis.plot([], [], color="black", linestyle="none", marker=_MARKERS.get(pattern, "x"), label=pattern)
    axis.legend(handles=handles, fontsize="small")
    if metric == "perplexity":
        axis.set_yscale("log")
    axis.set_title(model["float"]["model"])
    axis.set_xlabel("share of weights, blocks or neurons removed")
    axis.set_ylabel(metric)
    axis.grid(alpha=0.3)
