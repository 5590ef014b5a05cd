"""What rounding to int4 costs a language model: perplexity with the search for each group's scale, and without."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from qlinear.demo.text import perplexity
from qlinear.demo.twin import off_grid_twin
from qlinear.format import DENSE, Format
from qlinear.packing import dequantize_codes
from qlinear.quantize import quantize
from qlinear.tables import table

#: Other schemes of int4 weights are rounded alike.
SCHEMES = tuple(name for name, fmt in DENSE.items() if fmt.bits == 4 and not fmt.integer_activations)


def measure(
    load: Callable[[], Any], ids: Tensor, seeds: Sequence[int], schemes: Sequence[str] = SCHEMES
) -> list[dict[str, Any]]:
    """One row per scheme and seed of the off-grid twin: perplexity of float, of absmax rounding and of qlinear's.

    The rounded weights are put back as floats, so that nothing but the rounding differs.

    Args:
        load: makes a fresh float causal language model, built like Llama.
        ids: token ids ``[windows, length]`` to score.
    """
    rows = []
    for seed in seeds:
        model: Any = off_grid_twin(load(), seed)
        head = model.get_output_embeddings()
        linears = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
        layers = {layer: layer.weight.detach().clone() for layer in linears}
        base = perplexity(model, ids).value
        for scheme in tqdm(schemes, desc=f"seed {seed}", unit="scheme", disable=None):
            row: dict[str, Any] = {"scheme": scheme, "seed": seed, "float": base}
            for name, search in (("absmax", False), ("qlinear", True)):
                _round(layers, DENSE[scheme], search)
                row[name] = perplexity(model, ids).value
            rows.append(row)
    return rows


@torch.no_grad()
def _round(layers: dict[nn.Linear, Tensor], fmt: Format, search: bool) -> None:
    for layer, weight in layers.items():
        codes, scale, zero = quantize(weight, fmt, search)
        layer.weight.copy_(dequantize_codes(codes, scale, zero, fmt, weight.dtype))


def excess(rows: list[dict[str, Any]], scheme: str, side: str) -> list[float]:
    """Perplexity over float's, minus one, seed by seed."""
    return [row[side] / row["float"] - 1 for row in rows if row["scheme"] == scheme]


def show(rows: list[dict[str, Any]]) -> str:
    """Excess perplexity of both sides, and their ratio, seed by seed and of the means."""
    lines = []
    for scheme in dict.fromkeys(row["scheme"] for row in rows):
        absmax, ours = excess(rows, scheme, "absmax"), excess(rows, scheme, "qlinear")
        mean = sum(ours) / sum(absmax)
        each = "  ".join(f"{a:.3f} -> {b:.3f}" for a, b in zip(absmax, ours, strict=True))
        lines.append((scheme, each, f"{sum(absmax) / len(absmax):.3f}", f"{sum(ours) / len(ours):.3f}", f"{mean:.2f}x"))
    return table(("excess perplexity", "absmax -> qlinear, by seed", "absmax", "qlinear", "ratio"), lines, (2, 3, 4))
