"""The PTX machine's own arithmetic: all numbers of 16 and 8 bits against torch, sums against exact rationals."""

from __future__ import annotations

from fractions import Fraction
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from ptx_machine import arithmetic, bits
from ptx_machine.integers import lop3_text
from ptx_scalar import number, pattern

PATTERNS = np.arange(65536, dtype=np.uint16)
#: Every float16 and bfloat16 as float32; the middles to the next, where ties are; and the neighbours of all of them.
FLOATS = np.concatenate(
    [PATTERNS.view(np.float16).astype(np.float32).view(np.uint32), PATTERNS.astype(np.uint32) << 16]
)
FLOATS = np.concatenate([FLOATS, FLOATS + np.uint32(0x1000), FLOATS + np.uint32(0x8000), FLOATS + np.uint32(0x80000)])
FLOATS = np.concatenate([FLOATS - np.uint32(1), FLOATS, FLOATS + np.uint32(1)])


@pytest.fixture(autouse=True)
def silent():
    with np.errstate(all="ignore"):
        yield


def torch_bits(x: torch.Tensor) -> np.ndarray:
    return x.view({1: torch.uint8, 2: torch.int16}[x.element_size()]).numpy().view(f"u{x.element_size()}")


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_every_rounding_of_floats_to_16_bits_is_torchs(name):
    x = FLOATS.view(np.float32)
    made = arithmetic.to_bf16(x) if name == "bfloat16" else arithmetic.bits_f2(x.astype(np.float16))
    wanted = torch_bits(torch.from_numpy(x.copy()).to(getattr(torch, name)))
    there = ~np.isnan(x)
    np.testing.assert_array_equal(made[there], wanted[there])
    assert set(made[~there]) == {0x7FFF}


def test_every_bfloat16_is_torchs():
    wanted = torch.from_numpy(PATTERNS.view(np.int16).copy()).view(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(arithmetic.from_bf16(PATTERNS), wanted)


@pytest.mark.parametrize("name", ["e4m3", "e5m2"])
def test_every_byte_is_torchs(name):
    dtype = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}[name]
    codes = np.arange(256, dtype=np.uint8)
    made = getattr(arithmetic, f"from_{name}")(codes)
    np.testing.assert_array_equal(made.astype(np.float32), torch.from_numpy(codes).view(dtype).float().numpy())


@pytest.mark.parametrize("kind", ["float16", "float32"])
@pytest.mark.parametrize("name", ["e4m3", "e5m2"])
def test_every_rounding_to_bytes_is_torchs_within_the_range(name, kind):
    x = PATTERNS.view(np.float16) if kind == "float16" else FLOATS.view(np.float32)
    dtype, top = {"e4m3": (torch.float8_e4m3fn, 448.0), "e5m2": (torch.float8_e5m2, 57344.0)}[name]
    made = getattr(arithmetic, f"to_{name}")(x)
    there = ~np.isnan(x)
    # Saturated: torch's own conversions make NaN or infinity of what is too large.
    wanted = torch_bits(torch.from_numpy(x.astype(np.float32)).clamp(-top, top).to(dtype))
    np.testing.assert_array_equal(made[there], wanted[there])
    assert set(made[~there]) == {0x7F}


def test_tf32_is_the_nearest_and_ties_go_away_from_zero():
    x = FLOATS[np.isfinite(FLOATS.view(np.float32))]
    made = arithmetic.to_tf32(x.view(np.float32))
    assert not (made & 0x1FFF).any()
    steps = (x & np.uint32(0x7FFFFFFF)).astype(np.int64)
    np.testing.assert_array_equal((made & 0x7FFFFFFF) >> 13, (steps + 4096) // 8192)
    np.testing.assert_array_equal(made >> 31, x >> 31)
    special = np.array([0x7F800000, 0xFF800000, 0x7F800001, 0xFFFFFFFF], np.uint32)
    np.testing.assert_array_equal(
        arithmetic.to_tf32(special.view(np.float32)), np.array([0x7F800000, 0xFF800000, 0x7FFFFFFF, 0x7FFFFFFF])
    )


def test_towards_zero_never_grows_and_misses_by_less_than_a_step():
    x = np.abs(FLOATS.view(np.float32))
    x = x[np.isfinite(x)]
    made = arithmetic.to_f2_zero(x)
    assert np.isfinite(made).all() and (made.astype(np.float32) <= x).all()
    above = np.nextafter(made, np.float16(np.inf)).astype(np.float32)
    assert ((above > x) | (made == np.finfo(np.float16).max)).all()


FMA = {"f16": arithmetic.fma_f2, "bf16": arithmetic.fma_bf, "f32": arithmetic.fma_f4}


def fused(name: str, patterns: list[int]) -> int:
    """The bits that the machine makes of ``a * b + c``."""
    read = {"f16": lambda x: x.astype(np.uint16).view(np.float16), "bf16": lambda x: arithmetic.from_bf16(x),
            "f32": lambda x: x.astype(np.uint32).view(np.float32)}[name]  # fmt: skip
    write = {"f16": arithmetic.bits_f2, "bf16": arithmetic.to_bf16, "f32": lambda x: x.view(np.uint32)}[name]
    return int(write(FMA[name](*(read(np.array([p])) for p in patterns)))[0])


@pytest.mark.parametrize("name", FMA)
@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_fma_rounds_once(name, data):
    """Half of the sums are a product with a number close to a tie of it."""
    width = 32 if name == "f32" else 16
    any_bits = st.integers(0, (1 << width) - 1).filter(lambda p: np.isfinite(number(name, p)))
    a, b, c = (data.draw(any_bits) for _ in "abc")
    if data.draw(st.booleans()):
        exact = Fraction(number(name, a)) * Fraction(number(name, b))
        close = pattern(name, exact / 2 ** data.draw(st.integers(0, 60)))
        if np.isfinite(number(name, close)):
            c = close ^ data.draw(st.sampled_from([0, 1, 1 << (width - 1)]))
    exact = Fraction(number(name, a)) * Fraction(number(name, b)) + Fraction(number(name, c))
    if exact:
        assert fused(name, [a, b, c]) == pattern(name, exact)


@pytest.mark.parametrize(
    ("name", "patterns"),
    [
        # 1 + 2^-24 is a tie: what is far below decides.
        ("f32", [0x3F800000, 0x3F800001, 0x00000001]),
        ("f32", [0x33800000, 0x3F800000, 0x3F800000]),
        ("f32", [0x33800001, 0x3F800000, 0x3F800000]),
        ("f32", [0x39800800, 0x39FFF001, 0x3F800000]),
        ("f32", [0x00800000, 0x3EFFFFFF, 0x00000001]),
        ("bf16", [0x3F81, 0x3F81, 0x0001]),
        ("bf16", [0x3B80, 0x3F80, 0x3F80]),
        ("bf16", [0x3B80, 0x3F80, 0x3F81]),
        ("f16", [0x3C01, 0x1001, 0x3C00]),
        ("f16", [0x1000, 0x3C00, 0x3C01]),
    ],
)
@pytest.mark.parametrize("tiny", [0, 1, -1])
def test_fma_at_a_tie(name, patterns, tiny):
    """Also with a number in place of b that is off by one."""
    patterns = [patterns[0], patterns[1] + tiny, patterns[2]]
    a, b, c = (Fraction(number(name, p)) for p in patterns)
    assert fused(name, patterns) == pattern(name, a * b + c)


@pytest.mark.parametrize("sign", [1, -1], ids=["plus", "minus"])
@pytest.mark.parametrize(
    ("a", "b", "c"),
    [
        # In float64 all of these are 2^-60 beside a tie, which they become when they are rounded to float64.
        (Fraction(1774001, 2**30), Fraction(38737, 2**30), Fraction(1)),
        (Fraction(2**18 + 1, 2**42), Fraction(2**18 - 1, 2**18), Fraction(2**23 + 1, 2**23)),
        (Fraction(2**18 + 1, 2**42 * 2**100), Fraction(2**18 - 1, 2**18), Fraction(2**23 + 1, 2**123)),
    ],
    ids=["above", "below", "small"],
)
def test_fma_of_float32_beside_a_tie(a, b, c, sign):
    exact = sign * (a * b + c)
    bits_of = [pattern("f32", sign * a), pattern("f32", b), pattern("f32", sign * c)]
    twice = np.float32(float(exact)).view(np.uint32)
    assert fused("f32", bits_of) == pattern("f32", exact) != twice


@pytest.mark.parametrize("name", ["largest", "smallest", "largest_nan", "smallest_nan"])
def test_extremes_order_zeros_and_nan(name):
    nan, function = float("nan"), getattr(arithmetic, name)
    pairs = np.array(list(product([-0.0, 0.0, 1.0, -1.0, nan, -np.inf], repeat=2)), np.float32)
    for (a, b), made in zip(pairs.tolist(), function(pairs[:, 0], pairs[:, 1]), strict=True):
        there = sorted((x for x in (a, b) if x == x), key=lambda x: (x, np.copysign(1, x)))
        if not there or (len(there) < 2 and name.endswith("nan")):
            assert made.view(np.uint32) == 0x7FFFFFFF
        else:
            wanted = np.float32(there[-1] if name.startswith("largest") else there[0])
            assert made.view(np.uint32) == wanted.view(np.uint32), (a, b)


@pytest.mark.parametrize("dtype", [np.int8, np.uint16, np.int32, np.uint32, np.int64, np.uint64])
def test_floats_to_integers_are_clamped(dtype):
    info = np.iinfo(dtype)
    x = np.array([0.0, -1.0, 1.0, 1e30, -1e30, np.inf, -np.inf, float(info.max), float(info.min)])
    wanted = [min(max(int(np.clip(v, -1e40, 1e40)), info.min), info.max) for v in x]
    assert arithmetic.to_integer(x, dtype).tolist() == wanted
    nan = int(arithmetic.to_integer(np.array([np.nan]), dtype)[0])
    assert nan % 2**64 == (1 << 63 if info.bits == 64 else 0)


def test_every_function_of_three_bits():
    names = {"a": 0xF0, "b": 0xCC, "c": 0xAA, "ONES": 0xFF, "ZERO": 0}
    for table in range(256):
        assert eval(lop3_text(table), {}, names) & 0xFF == table, lop3_text(table)


@given(
    st.integers(0, 2**32 - 1),
    st.integers(0, 300),
    st.integers(0, 300),
    st.sampled_from([np.int32, np.uint32, np.int64]),
)
@example(0x80000000, 32, 1, np.int32)
@example(0x80000000, 31, 200, np.int32)
@example(0x7FFFFFFF, 0, 0, np.int32)
@settings(max_examples=200, deadline=None)
def test_bit_fields_bit_by_bit(a, start, length, dtype):
    """As the manual's pseudo code says it."""
    width = np.dtype(dtype).itemsize * 8
    value = np.array([a], f"u{width // 8}")
    made = bits.bit_field(value.view(dtype), np.array([start], np.uint32), np.array([length], np.uint32))
    start, length = start & 255, length & 255
    bit = [a >> i & 1 for i in range(width)]
    sign = bit[min(start + length - 1, width - 1)] if np.issubdtype(dtype, np.signedinteger) and length else 0
    wanted = sum((bit[start + i] if i < length and start + i < width else sign) << i for i in range(width))
    assert int(made.view(value.dtype)[0]) == wanted


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.int64, np.uint32, np.uint64])
def test_division_goes_towards_zero_at_the_extremes(dtype):
    info = np.iinfo(dtype)
    edges = {
        info.min,
        info.min + 1,
        info.max,
        info.max - 1,
        info.max // 2,
        7,
        1,
        2,
        3,
        max(info.min, -1),
        max(info.min, -7),
    }
    pairs = [(a, b) for a, b in product(sorted(edges), repeat=2) if b]
    a, b = (np.array(column, dtype) for column in zip(*pairs, strict=True))
    for (x, y), quotient, rest in zip(pairs, bits.divide(a, b), bits.remainder(a, b), strict=True):
        wanted = abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1)
        assert int(quotient) == int(np.array(wanted % 2**info.bits, f"u{info.bits // 8}").view(dtype)), (x, y)
        assert int(rest) == x - wanted * y


def test_what_was_never_written_is_not_taken_for_a_number():
    x, mask = np.arange(4, dtype=np.uint32), np.array([True, False, True, False])
    for call in (
        lambda: arithmetic.keep(mask, x, None), lambda: arithmetic.keep(None, x, x), lambda: arithmetic.equal(x, None),
        lambda: arithmetic.select(None, x, x), lambda: arithmetic.select(mask, None, x),
        lambda: arithmetic.select(mask, x, None),
    ):  # fmt: skip
        with pytest.raises(TypeError, match="None"):
            call()
    np.testing.assert_array_equal(arithmetic.keep(mask, None, x), [0, 0xDEADBEEF, 2, 0xDEADBEEF])
