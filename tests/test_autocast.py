"""Layers under autocast, compiled or not: what the product is made of keeps its dtypes."""

from __future__ import annotations

import pytest
import torch
from models import needs_cpp_compiler, relative_error
from torch import nn

import qlinear
from qlinear.format import FORMATS

HALVES = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("scheme", FORMATS)
def test_a_float32_layer_gives_what_one_in_autocast_s_dtype_gives(scheme: str, dtype: torch.dtype) -> None:
    layer = qlinear.QLinear.from_float(nn.Linear(1024, 64), scheme, prune="magnitude")
    for m in (1, 4):
        x = torch.randn(m, 1024)
        with torch.no_grad():
            wanted = layer(x.to(dtype))
            with torch.autocast("cpu", dtype):
                y = layer(x)
        assert y.dtype == dtype and torch.equal(y, wanted)


# PyTorch's own: where Inductor is imported, and of scales that a float32 layer has in float16.
@pytest.mark.filterwarnings("ignore:bf16 and fp16 are mixed:UserWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("m", [1, 4])
@pytest.mark.parametrize("scheme", ["w8a8", "fp8", "w4a8", "w4a16"])
def test_it_compiles(scheme: str, m: int) -> None:
    """w8a8 with scales in float32 and bfloat16 tokens takes an operator whose scales Inductor wants stored."""
    needs_cpp_compiler()
    layer = qlinear.QLinear.from_float(nn.Linear(256, 64), scheme).requires_grad_(False)
    # Numbers that bfloat16 has: compiled, tokens are not rounded to it first, and some would get another e4m3.
    x = torch.randn(m, 256).bfloat16().float()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert relative_error(torch.compile(layer, fullgraph=True)(x), layer(x).double()) <= 2e-2


def test_the_input_goes_by_its_name_in_pytorch() -> None:
    layer, x = qlinear.QLinear.from_float(nn.Linear(8, 4), "w8a16"), torch.randn(2, 8)
    assert torch.equal(layer(input=x), layer(x))
