"""Block-sparse layers on this device against dense ones: from which share of zero blocks on they are faster."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from bench.sides import Side, check, float_side, packed_side
from bench.timing import in_turns, on, rotating
from qlinear.format import FORMATS
from qlinear.packing import pack
from qlinear.sparse import prune_weight
from qlinear.tables import table

SHAPE = (4096, 4096)
SCHEMES = tuple(name for name, fmt in FORMATS.items() if fmt.block)
SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.95)
TOKENS = (1, 16, 128)


def measure(
    dtype: torch.dtype,
    device: torch.device,
    shape: tuple[int, int] = SHAPE,
    tokens: Iterable[int] = TOKENS,
    sparsities: Sequence[float] = SPARSITIES,
    seconds: float = 0.3,
) -> list[dict[str, Any]]:
    """One row for each sparsity and number of tokens: microseconds of the dense layer, in 16 bit and packed, and ours.

    Raises:
        RuntimeError: a product is wrong.
    """
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(*shape, generator=generator).to(dtype).to(device)
    dense = {"float": float_side(weight)} | {name: _packed(weight, name) for name in _dense_schemes()}
    rows = []
    for sparsity in tqdm(sparsities, desc=f"block-sparse, {str(dtype)[6:]}", unit="sparsity", disable=None):
        pruned = {name: prune_weight(weight, FORMATS[name], "magnitude", sparsity) for name in SCHEMES}
        sides = dense | {name: _packed(pruned[name], name) for name in SCHEMES}
        for m in tokens:
            x = torch.randn(m, shape[1], generator=generator).to(dtype).to(device)
            calls = {name: rotating(side.calls, on(x)) for name, side in sides.items()}
            with torch.inference_mode():
                times = in_turns(calls, seconds)
            us = {name: time * 1e6 for name, time in times.items()}
            rows.append({"dtype": str(dtype)[6:], "sparsity": sparsity, "m": m, "n": shape[0], "k": shape[1], "us": us})
    return rows


def _dense_schemes() -> list[str]:
    dense = [FORMATS[name].dense for name in SCHEMES]
    return [fmt.name for fmt in dense if fmt is not None]


def _packed(weight: Tensor, scheme: str) -> Side:
    """qlinear's operator on a weight, which is compared with float64 first."""
    layout = "triton" if weight.is_cuda else "cpu"
    packed = pack(weight, scheme, layout=layout)
    side = packed_side(packed)
    for m in (3, 64):
        x = torch.randn(m, weight.shape[1]).to(weight)
        check(side.product(x), x, packed)
    return side


def show(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a table: how many times as fast as the 16-bit layer, and as the dense layer of as many bits."""
    header = ("dtype", "N x K", "zero blocks", "M", "float us", *SCHEMES)
    lines = []
    for row in rows:
        us = row["us"]
        cells = []
        for name in SCHEMES:
            dense = FORMATS[name].dense
            beside = "" if dense is None else f" ({us[dense.name] / us[name]:.2f}x)"
            cells.append(f"{us['float'] / us[name]:.2f}x{beside}")
        shape = f"{row['n']} x {row['k']}"
        lines.append((row["dtype"], shape, f"{row['sparsity']:.0%}", str(row["m"]), f"{us['float']:.0f}", *cells))
    legend = "times as fast as the dense layer in float; in brackets, as the dense layer in the same bits"
    return f"{table(header, lines, right=range(2, len(header)))}\n{legend}"
