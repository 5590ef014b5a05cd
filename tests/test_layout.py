"""The layouts of one packed weight: exact in both directions, in the order that is documented."""

import itertools

import numpy as np
import pytest
import torch
from models import CPU_LEVELS, random_packed, run_python, same_bits

import qlinear
from qlinear import cpu_layout
from qlinear.bits import pack_bits
from qlinear.layout import layout_of, native_layout

FORMATS = qlinear.format.DENSE.values()
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ASYMMETRIC = [f for f in FORMATS if not f.symmetric]


def assert_same_weight(a, b):
    assert same_bits(a.weight, b.weight)
    assert same_bits(a.scale, b.scale)
    assert same_bits(a.zero_point, b.zero_point)


@pytest.mark.parametrize("n", [1, 70])
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_round_trip_is_exact(fmt, n):
    for k, dtype in zip((1, 31, 32, 100, 200, 576), DTYPES * 2, strict=True):
        plain = random_packed(fmt, n, k, dtype, seed=k)
        for layout in ("triton", "cpu"):
            there = plain.to_layout(layout)
            assert_same_weight(there.to_layout("plain"), plain)
            assert torch.equal(there.dequantize(torch.float64), plain.dequantize(torch.float64))
        assert_same_weight(plain.to_layout("cpu").to_layout("triton").to_layout("cpu").to_layout("plain"), plain)


@pytest.mark.parametrize("layout", ["plain", "triton", "cpu"])
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_the_tensor_tells_its_layout(fmt, layout):
    packed = random_packed(fmt, 70, 200).to_layout(layout)
    assert packed.layout == layout_of(packed.weight) == layout
    assert packed.to_layout(layout).weight is packed.weight


@pytest.mark.parametrize("fmt", [f for f in FORMATS if f.bits == 4], ids=str)
def test_int4_with_float16_scales_stays_plain_on_a_cpu(fmt):
    packed = random_packed(fmt, 70, 200, torch.float16)
    assert packed.to_layout("cpu").layout == "plain"


def test_the_layout_of_each_device():
    devices = {"cuda": "triton", "cpu": "cpu", "meta": "plain", "mps": "plain"}
    assert {name: native_layout(torch.device(name)) for name in devices} == devices
    with pytest.raises(ValueError, match="layout 'gpu' does not exist; the layouts are: plain, triton, cpu"):
        random_packed(qlinear.format.DENSE["w8a16"], 4, 4).to_layout("gpu")


# --- the GPU layout, spelled out


def padded_codes(packed) -> np.ndarray:
    """Codes [N, K] padded to whole tiles of 64 x 128 with the code of zero."""
    codes, fmt = packed.codes().codes.numpy().astype(np.int64), packed.format
    n, k = codes.shape
    return np.pad(codes, ((0, -n % 64), (0, -k % 128)), constant_values=fmt.offset)


@pytest.mark.parametrize(("n", "k"), [(70, 200), (64, 128), (1, 33)])
@pytest.mark.parametrize("fmt", [f for f in FORMATS if f.packing.startswith("planar")], ids=str)
def test_planar_order(fmt, n, k):
    packed = random_packed(fmt, n, k)
    words = packed.to_layout("triton").weight
    codes = padded_codes(packed)
    width = {4: 32, 8: 64}[fmt.bits]
    assert words.dtype == torch.int16 and words.is_contiguous()
    assert words.shape == (codes.shape[0] // 64, codes.shape[1] // 128, 64, width)
    words = words.numpy().view(np.uint16)
    for row, block, i in itertools.product(range(codes.shape[0]), range(codes.shape[1] // 128), range(width)):
        word = int(words[row // 64, block, row % 64, i])
        if fmt.bits == 4:  # nibble j of word i is k = 128*block + 32*j + i
            expected = sum(int(codes[row, 128 * block + 32 * j + i]) << (4 * j) for j in range(4))
        else:  # byte j of word i is k = 128*block + 64*j + i
            expected = sum(int(codes[row, 128 * block + 64 * j + i]) << (8 * j) for j in range(2))
        assert word == expected


@pytest.mark.parametrize("scheme", ["w8a8", "fp8"])
def test_rows8_is_natural_order_and_signed(scheme):
    packed = random_packed(qlinear.format.DENSE[scheme], 70, 200)
    values = packed.to_layout("triton").weight
    assert values.dtype == torch.int8 and values.shape == (2, 2, 64, 128)
    natural = values.numpy().transpose(0, 2, 1, 3).reshape(128, 256).astype(np.int64)
    np.testing.assert_array_equal(natural, (padded_codes(packed) - packed.format.offset).astype(np.int8))


def test_nibbles8_are_signed_halves_of_a_block():
    packed = random_packed(qlinear.format.DENSE["w4a8"], 70, 200)
    words = packed.to_layout("triton").weight
    assert words.dtype == torch.int8 and words.shape == (2, 2, 64, 64)
    halves = np.concatenate(((words.numpy() << 4) >> 4, words.numpy() >> 4), axis=-1)
    natural = halves.transpose(0, 2, 1, 3).reshape(128, 256).astype(np.int64)
    np.testing.assert_array_equal(natural, padded_codes(packed) - 8)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_scales_of_a_tile_lie_together_and_padding_is_zero(fmt):
    n, k = 70, 200
    packed = random_packed(fmt, n, k)
    scale = packed.to_layout("triton").scale
    groups = fmt.groups(256)
    pairs = fmt.groups_per_block
    assert scale.shape == ((2, groups, 64) if fmt.symmetric else (2, groups // pairs, 64, 2 * pairs))
    expected = torch.zeros(128, groups)
    expected[:n, : fmt.groups(k)] = packed.scale
    stored = scale.transpose(1, 2) if fmt.symmetric else scale[..., ::2].transpose(1, 2)
    assert torch.equal(stored.reshape(128, groups).float(), expected)
    if not fmt.symmetric:
        zeros = torch.zeros(128, groups)
        zeros[:n, : fmt.groups(k)] = packed.codes().zero_point
        assert torch.equal(scale[..., 1::2].transpose(1, 2).reshape(128, groups).float(), zeros)


# --- the CPU layout


@pytest.mark.parametrize("fmt", [f for f in FORMATS if f.bits == 8], ids=str)
def test_8_bits_on_a_cpu_are_signed_and_padded_only_where_the_operator_needs_it(fmt):
    packed = random_packed(fmt, 5, 100)
    weight = packed.to_layout("cpu").weight
    columns = 128 if fmt.name == "w8a16" else 100
    assert weight.dtype == torch.int8 and weight.shape == (5, columns)
    assert torch.equal(weight[:, :100], (packed.codes().codes.int() - fmt.offset).to(torch.int8))
    assert not weight[:, 100:].any()


@pytest.mark.parametrize(("n", "k"), [(1, 24), (70, 200), (16, 576)])
@pytest.mark.parametrize("fmt", [f for f in FORMATS if f.bits == 4], ids=str)
def test_int4_on_a_cpu_is_what_the_operator_reads(fmt, n, k):
    """The identity matrix through the operator shows the weight, its padding nowhere to be seen."""
    packed = random_packed(fmt, n, k)
    cpu = packed.to_layout("cpu")
    columns = cpu.weight.shape[1] * 2
    assert columns % 32 == 0 and cpu.weight.shape[0] % 16 == 0 and columns - k < 32
    identity = torch.eye(columns, dtype=torch.bfloat16)
    group = columns // cpu.scale.shape[0]
    shown = torch.ops.aten._weight_int4pack_mm_for_cpu(identity, cpu.weight, group, cpu.scale).t()
    expected = packed.dequantize(torch.float64)
    # (8 - zero point) * scale is rounded to bfloat16 once, the product once more.
    assert (shown[:n, :k] - expected).abs().max() <= 2**-7 * 8 * packed.scale.max()
    assert not shown[n:].any()


@pytest.mark.parametrize("fmt", ASYMMETRIC, ids=str)
def test_every_zero_point_survives_every_scale(fmt):
    """The operator keeps (8 - zero point) * scale only: all 16 zero points come back, at tiny and huge scales too."""
    k = fmt.group_size or 64
    for exponent in (-126, -120, -60, -7, 0, 20, 100):
        plain = random_packed(fmt, 160, k)
        scale = torch.linspace(1, 1.99, 160).mul(2.0**exponent)[:, None].to(torch.bfloat16)
        zeros = torch.arange(160, dtype=torch.uint8).remainder(16)[None]
        plain = qlinear.PackedWeight(plain.weight, scale, pack_bits(zeros, 4).t().contiguous(), fmt, 160, k)
        assert_same_weight(plain.to_layout("cpu").to_layout("plain"), plain)


@pytest.mark.parametrize("layout", ["cpu", "triton"])
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_a_scale_of_zero_survives(fmt, layout):
    """A pruned row or group of someone else's checkpoint may have the scale 0."""
    plain = random_packed(fmt, 70, 200)
    plain.scale[3] = 0
    plain.scale[40:, -1] = 0
    there = plain.to_layout(layout)
    assert_same_weight(there.to_layout("plain"), plain)
    assert not there.dequantize(torch.float32)[3].any()


@pytest.mark.parametrize("most", [1, 5000, 1 << 22])
@pytest.mark.parametrize("rows", [16, 32, 48, 64, 80, 112, 128, 576])
def test_tiles_hold_every_row_once(rows, most):
    codes = torch.randint(0, 16, (rows, 64), dtype=torch.int32, generator=torch.Generator().manual_seed(rows))
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    order, tiles = zip(*cpu_layout.int4_tiles(packed, most), strict=True)
    assert torch.equal(torch.cat(order).sort().values, torch.arange(rows))
    assert torch.equal(torch.cat(tiles, dim=1).t() + 8, codes[torch.cat(order)])


@pytest.mark.parametrize("level", CPU_LEVELS)
def test_cpu_layout_inverts_at_every_instruction_set(level):
    """The order of packed int4 differs between AVX2 and AVX-512; either is read back to the same plain tensors."""
    code = """
    import torch, qlinear
    from models import random_packed, same_bits
    for fmt in qlinear.format.DENSE.values():
        for n in (1, 15, 17, 40, 64, 70, 144):
            for k in (24, 200):
                plain = random_packed(fmt, n, k, seed=n)
                back = plain.to_layout("cpu").to_layout("plain")
                assert same_bits(back.weight, plain.weight), (fmt, n, k)
                assert same_bits(back.scale, plain.scale), (fmt, n, k)
                assert same_bits(back.zero_point, plain.zero_point), (fmt, n, k)
    print(torch.backends.cpu.get_cpu_capability())
    """
    shown = run_python(code, ATEN_CPU_CAPABILITY=level, OMP_NUM_THREADS="1").strip()
    assert shown.lower() == level
