"""Bit packing of the plain layout, and PackedWeight."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import random_packed

import qlinear
from qlinear.bits import e4m3_to_float, pack_bits, unpack_bits
from qlinear.packing import PackedWeight, pack_codes
from qlinear.quantize import Codes

BITS = st.sampled_from([4, 8])
SHAPES = st.lists(st.integers(1, 70), min_size=1, max_size=3)


def numpy_words(codes: np.ndarray, bits: int) -> np.ndarray:
    """compressed-tensors' ``pack-quantized`` computed code by code, on integers: code i of a word at bit i*bits."""
    per_word = 32 // bits
    words = np.zeros((*codes.shape[:-1], -(-codes.shape[-1] // per_word)), dtype=np.uint32)
    for i in range(codes.shape[-1]):
        words[..., i // per_word] |= codes[..., i].astype(np.uint32) << np.uint32(bits * (i % per_word))
    return words.view(np.int32)


@settings(deadline=None)
@given(BITS, SHAPES, st.integers(0, 2**31))
def test_pack_and_unpack_any_shape(bits, shape, seed):
    codes = torch.from_numpy(np.random.default_rng(seed).integers(0, 1 << bits, shape, dtype=np.uint8))
    words = pack_bits(codes, bits)
    assert words.dtype == torch.int32
    assert words.shape == (*shape[:-1], -(-shape[-1] * bits // 32))
    np.testing.assert_array_equal(words.numpy(), numpy_words(codes.numpy(), bits))
    assert torch.equal(unpack_bits(words, bits, shape[-1]), codes)


def test_little_end_first_by_hand():
    assert pack_bits(torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]]), 4).tolist() == [[0x87654321 - (1 << 32)]]
    assert pack_bits(torch.tensor([[1, 2, 3, 4, 5]]), 8).tolist() == [[0x04030201, 0x05]]
    assert pack_bits(torch.tensor([15]), 4).tolist() == [0xF]
    assert unpack_bits(torch.tensor([0x76543210]), 4, 8).tolist() == list(range(8))


def test_packing_reads_strided_codes():
    codes = torch.randint(0, 16, (33, 17), dtype=torch.uint8)
    assert torch.equal(pack_bits(codes.t(), 4), pack_bits(codes.t().contiguous(), 4))
    words = pack_bits(codes, 4)
    assert torch.equal(unpack_bits(words.t().contiguous().t(), 4, 17), codes)


def test_int4_as_compressed_tensors_stores_it():
    # The weight [[-8, -1, 0, 7, 1]] with scale 0.5: stored as q + 8 = 0, 7, 8, 15, 9, the first in the lowest nibble.
    weight = torch.tensor([[-4.0, -0.5, 0.0, 3.5, 0.5]])
    words = torch.tensor([[0x9F870]], dtype=torch.int32)
    fmt = qlinear.FORMATS["w4a16"]
    packed = PackedWeight(words, torch.tensor([[0.5]], dtype=torch.float16), None, fmt, 1, 5)
    assert torch.equal(packed.dequantize(torch.float32), weight)


def test_int8_as_compressed_tensors_stores_it():
    # q = -128, -1, 0, 127 is stored as q + 128 = 0, 127, 128, 255.
    words = torch.tensor([[0xFF807F00 - (1 << 32)]], dtype=torch.int32)
    packed = PackedWeight(words, torch.tensor([[2.0]]), None, qlinear.FORMATS["w8a16"], 1, 4)
    assert packed.dequantize().tolist() == [[-256.0, -2.0, 0.0, 254.0]]


@pytest.mark.parametrize(("n", "k"), [(1, 1), (9, 200), (70, 129)])
@pytest.mark.parametrize("fmt", qlinear.format.DENSE.values(), ids=str)
def test_plain_tensors_as_compressed_tensors_documents_them(fmt, n, k):
    packed = random_packed(fmt, n, k)
    codes, scale, zero = packed.codes()
    assert packed.layout == "plain"
    np.testing.assert_array_equal(packed.weight.numpy(), numpy_words(codes.numpy(), fmt.bits))  # along K
    assert scale.shape == (n, fmt.groups(k))
    if fmt.symmetric:
        assert packed.zero_point is None
    else:  # int32 [ceil(N*b/32), G], packed along N
        assert packed.zero_point.shape == (-(-n * fmt.bits // 32), fmt.groups(k))
        np.testing.assert_array_equal(packed.zero_point.numpy(), numpy_words(zero.numpy().T, fmt.bits).T)


def e4m3(codes):
    """Every e4m3 number, as the OCP specification spells it: sign, exponent with a bias of 7, mantissa of 3 bits."""
    codes = np.asarray(codes).astype(np.int64)
    sign, exponent, mantissa = np.where(codes & 0x80, -1.0, 1.0), codes >> 3 & 15, codes & 7
    normal = (1 + mantissa / 8) * np.exp2(exponent - 7.0)
    value = sign * np.where(exponent == 0, mantissa / 8 * 2.0**-6, normal)
    return np.where((exponent == 15) & (mantissa == 7), np.nan, value)


@settings(max_examples=30, deadline=None)
@given(
    codes=st.lists(st.integers(0, 255), min_size=1, max_size=300),
    scheme=st.sampled_from(["fp8", "w8a16-fp8"]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
)
def test_every_e4m3_code_is_stored_and_read(codes, scheme, dtype):
    """All 256 codes: the same bits in every layout that takes them, and the number that the specification says."""
    fmt, raw = qlinear.FORMATS[scheme], torch.tensor([codes], dtype=torch.uint8)
    packed = pack_codes(Codes(raw, torch.ones(1, 1), None), fmt)
    assert torch.equal(packed.codes().codes, raw)
    np.testing.assert_array_equal(packed.dequantize(dtype).double().numpy(), e4m3(raw))
    if np.isnan(e4m3(raw)).any():
        with pytest.raises(ValueError, match=r"the weight holds NaN \d+ times"):
            packed.to_layout("cpu")
        return
    for layout in ("triton", "cpu"):
        there = packed.to_layout(layout)
        assert torch.equal(there.codes().codes, raw)
        assert torch.equal(there.dequantize(dtype), packed.dequantize(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_e4m3_to_float_is_exact(dtype):
    codes = torch.arange(256, dtype=torch.uint8)
    finite = codes & 127 != 127
    made = e4m3_to_float(codes.view(torch.int8), dtype)
    assert made.dtype == dtype
    expected = codes.view(torch.float8_e4m3fn).to(dtype)
    assert torch.equal(made[finite], expected[finite])
    assert torch.equal(torch.signbit(made), codes > 127)
    np.testing.assert_array_equal(made[finite].double().numpy(), e4m3(codes[finite]))


@pytest.mark.parametrize("fmt", qlinear.format.DENSE.values(), ids=str)
def test_dequantize_against_numpy(fmt):
    n, k = 9, 201
    packed = random_packed(fmt, n, k, torch.float16)
    codes, scale, zero = (None if t is None else t.numpy().astype(np.float64) for t in packed.codes())
    group = np.arange(k) // (fmt.group_size or k)
    zeros = np.full((n, fmt.groups(k)), fmt.offset) if zero is None else zero
    values = e4m3(codes) if fmt.number == "e4m3" else codes - zeros[:, group]
    expected = values * scale[:, group]
    np.testing.assert_array_equal(packed.dequantize(torch.float64).numpy(), expected)
    assert packed.dequantize().dtype == torch.float16


@pytest.mark.parametrize("scheme", sorted(qlinear.format.DENSE))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_pack_stays_within_half_a_step_of_the_weight(scheme, dtype):
    """No element is further from its weight than the clipping search may move it: the error is that of rounding."""
    torch.manual_seed(0)
    weight = torch.randn(33, 200).mul_(0.05).to(dtype)
    fmt = qlinear.FORMATS[scheme]
    packed = qlinear.pack(weight, scheme, layout="plain")
    assert packed.scale.dtype == fmt.scale_dtype(dtype)
    assert (packed.out_features, packed.in_features, packed.format) == (33, 200, fmt)
    step = packed.scale.repeat_interleave(fmt.group_size or 200, dim=1)[:, :200].float().abs()
    if fmt.number == "e4m3":
        # 3 bits of mantissa: a step is an eighth of the power of two below the weight, from 2**-6 on.
        step *= torch.exp2((weight.float().abs() / step).clamp(min=2**-6).log2().floor() - 3)
    error = (packed.dequantize(torch.float32) - weight.float()).abs()
    assert float((error <= step * 0.51).float().mean()) > (0.98 if fmt.bits == 8 else 0.9)
    assert (
        float(error.norm() / weight.float().norm())
        < {("int", 8): 0.02, ("int", 4): 0.16, ("e4m3", 8): 0.03}[fmt.number, fmt.bits]
    )


@pytest.mark.parametrize("scheme", sorted(qlinear.FORMATS))
def test_a_weight_of_zeros_stays_zero(scheme):
    packed = qlinear.pack(torch.zeros(5, 40, dtype=torch.bfloat16), scheme)
    assert torch.equal(packed.dequantize(), torch.zeros(5, 40, dtype=torch.bfloat16))


def test_pack_takes_the_layout_of_the_device_by_default():
    weight = torch.randn(16, 64, dtype=torch.bfloat16)
    assert qlinear.pack(weight, "w4a16").layout == "cpu"
    assert qlinear.pack(weight, "w4a16", layout="triton").layout == "triton"


@pytest.mark.parametrize(
    ("weight", "scheme", "layout", "message"),
    [
        (torch.randn(4, 4), "w5a16", None, "does not exist"),
        (torch.randn(4, 4), "w4a16", "marlin", "'marlin' does not exist; the layouts are: plain, triton, cpu"),
        (torch.randn(4), "w4a16", None, r"\(4,\)"),
        (torch.ones(4, 4, dtype=torch.int32), "w4a16", None, "int32"),
        (torch.zeros(0, 4), "w4a16", None, "non-empty"),
        (torch.tensor([[1.0, float("nan")]]), "w8a16", None, "NaN or infinity"),
        (torch.tensor([[1.0, float("inf")]]), "w4a16-asym", None, "NaN or infinity"),
    ],
    ids=["scheme", "layout", "vector", "integers", "empty", "nan", "inf"],
)
def test_what_cannot_be_packed_raises(weight, scheme, layout, message):
    with pytest.raises(ValueError, match=message):
        qlinear.pack(weight, scheme, layout=layout)


def test_the_weight_is_not_touched():
    weight = torch.randn(8, 64, requires_grad=True)
    before = weight.detach().clone()
    packed = qlinear.pack(weight, "w4a16-g32-asym")
    assert torch.equal(weight, before) and not packed.scale.requires_grad
