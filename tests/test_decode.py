"""Every decoder through the two kernels that use it, exactly: the identity matrix, and the dense weight."""

from __future__ import annotations

import pytest
import torch
from helpers import DTYPES, coded_weight, dtype_id, random_weight, weight64

from qlinear.format import DENSE, FORMATS
from qlinear.kernels.decode import DECODERS
from qlinear.kernels.dequantize import dequantize, dequantize_tensors
from qlinear.kernels.matmul import matmul

every_format = pytest.mark.parametrize("fmt", DENSE.values(), ids=str)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)


def powers_of_two(fmt, k):
    """Scales 1, 1/2, 1/4 by group: products with them are exact, and a group out of place is seen."""
    return 2.0 ** -(torch.arange(fmt.groups(k)) % 3)


def test_every_packing_has_a_decoder():
    assert {fmt.packing for fmt in FORMATS.values()} == set(DECODERS)


@every_dtype
@every_format
def test_identity_matrix_returns_the_weight(fmt, dtype, device):
    k = 200
    packed = coded_weight(fmt, 70, k, powers_of_two(fmt, k).half(), device)
    if fmt.quantized_activations and dtype == torch.float32:
        pytest.skip("a token's scale of 1/127 or 1/448 is not exact in float32")
    y = matmul(torch.eye(k, dtype=dtype, device=device), packed)
    assert torch.equal(y.t().double(), weight64(packed))


@every_dtype
@every_format
def test_dequantize_has_the_bits_of_the_reference(fmt, dtype, device):
    packed = random_weight(fmt, 70, 200, torch.float16, device)
    y = dequantize(packed, dtype)
    assert torch.equal(y, packed.dequantize(dtype))


@pytest.mark.parametrize("scale_dtype", DTYPES, ids=dtype_id)
def test_dequantize_takes_scales_of_any_dtype(scale_dtype, device):
    fmt = DENSE["w4a16-g32"]
    packed = coded_weight(fmt, 64, 128, torch.rand(64, 4).to(scale_dtype), device)
    assert packed.scale.dtype == scale_dtype
    assert torch.equal(dequantize(packed, torch.bfloat16), packed.dequantize(torch.bfloat16))


def test_dequantize_refuses_what_does_not_fit(device):
    packed = random_weight(DENSE["w4a16"], 70, 200, torch.float16, device)
    with pytest.raises(ValueError, match="layout 'triton', got 'plain'"):
        dequantize(packed.to_layout("plain"), torch.float16)
    with pytest.raises(ValueError, match=r"int16 \(2, 2, 64, 32\)"):
        dequantize_tensors(packed.weight, packed.scale, packed.format, 128, 300, torch.float16)
    with pytest.raises(ValueError, match="a dense weight is float16"):
        dequantize(packed, torch.int8)
