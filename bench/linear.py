"""One linear layer on this CPU: every scheme against ``F.linear`` in the same dtype, correctness checked first."""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from bench.sides import check, copies
from bench.timing import interleaved, on, rotating
from qlinear import QLinear
from qlinear.tables import table

#: (out_features, in_features) of SmolLM2-135M's layers and of a Llama-3-8B one.
SHAPES = ((576, 576), (1536, 576), (576, 1536), (4096, 4096))
TOKENS = (1, 16, 128)
SCHEMES = ("w8a16", "w8a8", "w4a16-g64", "w4a16-g32-asym")


def measure(dtype: torch.dtype, shapes: Iterable[tuple[int, int]], seconds: float, rounds: int) -> list[dict[str, Any]]:
    """One row per shape and number of tokens: microseconds of ``F.linear`` and of each scheme."""
    rows = []
    for n, k in tqdm(list(shapes), desc=f"linear layers, {dtype}", unit="shape", disable=None):
        cpu, layer = torch.device("cpu"), nn.Linear(k, n, bias=False, dtype=dtype)
        floats = [deepcopy(layer) for _ in range(copies(layer.weight.nbytes, cpu))]
        layers = {scheme: [QLinear.from_float(layer, scheme)] for scheme in SCHEMES}
        for same in layers.values():
            same += [deepcopy(same[0]) for _ in range(copies(same[0].nbytes, cpu) - 1)]
        for m in TOKENS:
            x = torch.randn(m, k).to(dtype)
            for first, *_ in layers.values():
                check(first(x), x, first.packed)
            sides = {"float": rotating(floats, on(x)), **{s: rotating(q, on(x)) for s, q in layers.items()}}
            with torch.inference_mode():
                times = interleaved(sides, rounds, seconds)
            rows.append({"n": n, "k": k, "m": m, "dtype": str(dtype)[6:], "us": {s: t * 1e6 for s, t in times.items()}})
    return rows


def show(rows: list[dict[str, Any]]) -> str:
    """The rows as a table: microseconds of the float layer, and how many times as fast each scheme is."""
    header = ("dtype", "N x K", "M", "float us", *(f"{s}" for s in SCHEMES))
    lines = []
    for row in rows:
        us = row["us"]
        ratios = (f"{us['float'] / us[scheme]:.2f}x" for scheme in SCHEMES)
        lines.append((row["dtype"], f"{row['n']} x {row['k']}", str(row["m"]), f"{us['float']:.0f}", *ratios))
    return table(header, lines, right=range(2, 4 + len(SCHEMES)))
