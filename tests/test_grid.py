"""Weights that lie on a format's grid keep their values."""

from __future__ import annotations

import pytest
import torch
from helpers import DTYPES, dtype_id
from models import same_bits

from qlinear.format import FORMATS
from qlinear.grid import on_grid
from qlinear.packing import dequantize_codes
from qlinear.quantize import Codes, quantize

INTEGER = [f for f in FORMATS.values() if f.number == "int"]


@pytest.mark.parametrize("fmt", INTEGER, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("reach", [1.0, 0.4], ids=["all-codes", "the-middle"])
def test_a_rounded_weight_is_read_back(fmt, dtype, reach) -> None:
    g = torch.Generator().manual_seed(0)
    n, k = 24, 200
    groups = fmt.groups(k)
    low = 0 if fmt.symmetric else torch.randint(0, fmt.max_code // 2, (n, groups), generator=g)
    values = (torch.rand(n, k, generator=g) - 0.5) * reach * fmt.max_code
    codes = (values + fmt.offset).round().clamp(0, fmt.max_code).to(torch.uint8)
    codes[3] = fmt.offset
    zero = None if fmt.symmetric else (torch.full((n, groups), fmt.offset) - low // 16).clamp(0).to(torch.uint8)
    scale = (0.001 + 0.01 * torch.rand(n, groups, generator=g)).to(torch.bfloat16).to(fmt.scale_dtype(dtype))
    weight = dequantize_codes(codes, scale, zero, fmt, torch.float32).to(dtype)
    found = quantize(weight, fmt)
    assert torch.equal(dequantize_codes(*found, fmt, torch.float32).to(dtype), weight)
    assert found.scale.dtype == fmt.scale_dtype(dtype)
    again = quantize(dequantize_codes(*found, fmt, torch.float32).to(dtype), fmt)
    assert all(same_bits(a, b) for a, b in zip(found, again, strict=True))


@pytest.mark.parametrize("fmt", INTEGER, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_a_float_weight_is_not_on_the_grid(fmt, dtype) -> None:
    weight = torch.randn(16, 160, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert on_grid(weight, fmt, fmt.scale_dtype(dtype)) is None
    rounded = dequantize_codes(*quantize(weight, fmt), fmt, torch.float32).to(dtype)
    assert on_grid(rounded, fmt, fmt.scale_dtype(dtype)) is not None
    # One group off the grid, the last, and it is a float weight.
    rounded[-1, -32:] = weight[-1, -32:] * 0.4321
    assert on_grid(rounded, fmt, fmt.scale_dtype(dtype)) is None


def test_search_off_is_absmax_still() -> None:
    fmt = FORMATS["w4a16-g32"]
    weight = torch.tensor([[3.0, 1.0, 0.0, -2.0] * 8])
    assert (
        quantize(weight, fmt).codes.view(-1)[:4].tolist() != quantize(weight, fmt, search=False).codes.tolist()[0][:4]
    )
    found = quantize(weight, fmt)
    assert isinstance(found, Codes) and torch.equal(dequantize_codes(*found, fmt), weight)
