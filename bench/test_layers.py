"""``pytest bench/ --benchmark-only``: one layer by scheme, shape and number of tokens, checked before it is timed.

On the GPU if there is one; if not, SmolLM2's layers and one of 4096x4096 with PyTorch's CPU operators.

What it does not show: the host's clock is read, launches included; every call has the same weight, which the cache
still holds where the layer is small; nothing is compared with other libraries. ``python -m bench matmul`` rotates
weights, times the device alone on a GPU, and has a table with every peer that is installed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.problems import LAYERS
from qlinear import QLinear, reference

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
SHAPES = sorted(
    {*LAYERS["Llama-3-8B"].values(), (8192, 8192)} if ON_GPU else {*LAYERS["SmolLM2-135M"].values(), (4096, 4096)}
)
TOKENS = (1, 16, 64, 256, 1024) if ON_GPU else (1, 16, 128)
SCHEMES = ("float", "w4a16", "w4a16-g32-asym", "w8a16", "w8a8")


@cache
def layer_of(scheme: str, n: int, k: int) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.Linear(k, n, bias=False, device=DEVICE, dtype=torch.bfloat16).requires_grad_(False)
    return layer if scheme == "float" else QLinear.from_float(layer, scheme)


def synchronized(layer: nn.Module, x: Tensor) -> Callable[[], None]:
    def call() -> None:
        layer(x)
        if ON_GPU:
            torch.cuda.synchronize()

    return call


# All of a CPU's together are to take a minute on two cores that nobody else uses.
@pytest.mark.benchmark(max_time=0.25)
@pytest.mark.parametrize("m", TOKENS, ids=lambda m: f"m{m}")
@pytest.mark.parametrize(("n", "k"), SHAPES, ids=lambda size: str(size))
@pytest.mark.parametrize("scheme", SCHEMES)
def test_layer(benchmark: Any, scheme: str, n: int, k: int, m: int) -> None:
    layer = layer_of(scheme, n, k)
    x = torch.randn(m, k, device=DEVICE).bfloat16()
    with torch.no_grad():
        if isinstance(layer, QLinear):
            wanted = reference.matmul(x, layer.packed)
            error = float((layer(x).double() - wanted).norm() / wanted.norm())
            assert error <= layer.format.max_error(x.dtype), f"relative error {error:.2e}"
        benchmark.group = f"{n} x {k}, M = {m}"
        benchmark(synchronized(layer, x))
