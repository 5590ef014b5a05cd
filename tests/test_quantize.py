"""Rounding weights to codes: the search never loses to absmax, codes fit the stored scales, edge cases."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qlinear.format import DENSE, Format
from qlinear.quantize import Codes, _round, quantize

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
EVERY = pytest.mark.parametrize("fmt", DENSE.values(), ids=str)


def per_column(values: Tensor, fmt: Format, k: int) -> Tensor:
    size = fmt.group_size or k
    return values.double().repeat_interleave(size, dim=1)[:, :k]


def dequantized(codes: Codes, fmt: Format) -> Tensor:
    k = codes.codes.shape[1]
    if fmt.number == "e4m3":
        return codes.codes.view(torch.float8_e4m3fn).double() * per_column(codes.scale, fmt, k)
    zero = fmt.offset if codes.zero_point is None else per_column(codes.zero_point, fmt, k)
    return (codes.codes.double() - zero) * per_column(codes.scale, fmt, k)


def group_errors(weight: Tensor, approximation: Tensor, fmt: Format) -> Tensor:
    """The squared error of every group, ``[N, G]``, in float64."""
    n, k = weight.shape
    size = fmt.group_size or k
    square = (weight.double() - approximation).square()
    return torch.nn.functional.pad(square, (0, fmt.groups(k) * size - k)).view(n, -1, size).sum(-1)


def steps(codes: Codes, fmt: Format) -> Tensor:
    """From the value of each code to the next larger one, in float64."""
    scale = per_column(codes.scale.abs(), fmt, codes.codes.shape[1])
    # e4m3: an eighth of the power of two that its exponent means, which is not below 2**-6.
    return scale * 2.0 ** ((codes.codes >> 3 & 15).int().clamp(min=1) - 10) if fmt.number == "e4m3" else scale


def neighbours(codes: Codes, by: int, fmt: Format) -> Codes:
    """The codes of the next smaller or larger value, where there is one."""
    if fmt.number == "int":
        return codes._replace(codes=(codes.codes.int() + by).clamp(0, fmt.max_code))
    magnitude = (codes.codes & 127).int()
    ordered = (torch.where(codes.codes > 127, -magnitude, magnitude) + by).clamp(-126, 126)
    return codes._replace(codes=(ordered.abs() + 128 * (ordered < 0)).to(torch.uint8))


def assert_never_worse(weight: Tensor, fmt: Format) -> None:
    found = dequantized(quantize(weight, fmt), fmt)
    if torch.equal(found.to(weight.dtype), weight):
        return  # the very weight: that its grid is met between two of its own dtype's numbers is no error
    ours = group_errors(weight, found, fmt)
    absmax = group_errors(weight, dequantized(quantize(weight, fmt, search=False), fmt), fmt)
    # The search compares in float32, this in float64: a tie may fall either way by some roundings of the energy.
    slack = 1e-5 * absmax + 1e-9 * group_errors(weight, torch.zeros_like(weight), fmt)
    assert (ours <= absmax + slack).all(), float((ours - absmax).max())


def heavy_tailed(n: int, k: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=g) * torch.exp(torch.randn(n, k, generator=g))
    weight[0] = 0
    weight[1] = 0.37
    weight[2] = -0.37
    weight[3] = weight[3].abs()
    weight[4] = weight[4] * 1e-3
    weight[5, 0] = 50
    return weight * 0.02


@EVERY
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 33, 192, 576])
def test_never_worse_than_absmax(fmt: Format, dtype: torch.dtype, k: int) -> None:
    assert_never_worse(heavy_tailed(24, k).to(dtype), fmt)


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(sorted(DENSE)),
    dtype=st.sampled_from(DTYPES),
    n=st.integers(1, 9),
    k=st.integers(1, 200),
    seed=st.integers(0, 2**31),
    shift=st.floats(-3, 3),
    exponent=st.integers(-2, 2),
)
def test_never_worse_on_anything(
    name: str, dtype: torch.dtype, n: int, k: int, seed: int, shift: float, exponent: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    weight = (torch.randn(n, k, generator=g) + shift) * 10.0**exponent
    assert_never_worse(weight.to(dtype), DENSE[name])


@EVERY
def test_search_lowers_the_error(fmt: Format) -> None:
    weight = torch.randn(64, 576, generator=torch.Generator().manual_seed(1))
    ours = group_errors(weight, dequantized(quantize(weight, fmt), fmt), fmt).sum()
    absmax = group_errors(weight, dequantized(quantize(weight, fmt, search=False), fmt), fmt).sum()
    assert ours < (0.95 if fmt.bits == 4 else 1.0) * absmax


@EVERY
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("search", [False, True])
def test_codes_are_rounded_with_the_stored_scale(fmt: Format, dtype: torch.dtype, search: bool) -> None:
    """Each code is the nearest one to the weight for the scale and zero point that are stored."""
    weight = heavy_tailed(16, 160).to(dtype)
    made = quantize(weight, fmt, search)
    n, k = weight.shape
    assert made.codes.shape == (n, k) and made.codes.dtype == torch.uint8 and int(made.codes.max()) <= fmt.max_code
    assert made.scale.shape == (n, fmt.groups(k)) and made.scale.dtype == fmt.scale_dtype(dtype)
    assert (made.scale != 0).all() and made.scale.isfinite().all()
    assert (fmt.bits == 4 and fmt.symmetric and search) or (made.scale > 0).all()
    assert (made.zero_point is None) == fmt.symmetric
    error = (weight.double() - dequantized(made, fmt)).abs()
    step = steps(made, fmt)
    magnitude = made.codes & 127
    inside = magnitude < 126 if fmt.number == "e4m3" else (made.codes > 0) & (made.codes < fmt.max_code)
    assert (error[inside] <= 0.5001 * step[inside]).all()
    for by in (-1, 1):
        other = neighbours(made, by, fmt)
        assert (error <= (weight.double() - dequantized(other, fmt)).abs() + 1e-4 * step).all()


def test_e4m3_is_rounded_as_torch_rounds() -> None:
    """Every midpoint between two neighbours, and numbers between, to nearest and even; what is too large saturates."""
    grid = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middle = (grid[1:] + grid[:-1]) / 2
    beside = torch.cat((middle, torch.nextafter(middle, middle * 2), torch.nextafter(middle, middle * 0)))
    row = torch.cat((grid, beside, torch.linspace(0, 448, 9001), torch.linspace(0, 0.1, 9001)))
    row, limit = torch.cat((row, -row, torch.tensor([449.0, -1e9])))[None], torch.tensor(448.0)
    made = _round(row, torch.ones(1, 1), -limit, limit, torch.empty_like(row), DENSE["fp8"])
    assert torch.equal(made, row.clamp(-448, 448).to(torch.float8_e4m3fn).float())


def test_the_search_takes_a_tenth_off_e4m3() -> None:
    weight, fmt = torch.randn(64, 1024, generator=torch.Generator().manual_seed(1)), DENSE["w8a16-fp8"]
    ours = group_errors(weight, dequantized(quantize(weight, fmt), fmt), fmt).sum()
    absmax = group_errors(weight, dequantized(quantize(weight, fmt, search=False), fmt), fmt).sum()
    assert ours < 0.95 * absmax


@EVERY
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zeros_stay_zero(fmt: Format, dtype: torch.dtype) -> None:
    weight = heavy_tailed(8, 70).to(dtype)
    weight[:, ::3] = 0
    approximation = dequantized(quantize(weight, fmt), fmt)
    assert (approximation[weight == 0] == 0).all()
    assert (dequantized(quantize(torch.zeros(3, 70, dtype=dtype), fmt), fmt) == 0).all()


@EVERY
@pytest.mark.parametrize("value", [0.5, -0.5, 1.0, -3.0])
def test_a_constant_group_is_exact_to_the_scale(fmt: Format, value: float) -> None:
    approximation = dequantized(quantize(torch.full((2, 96), value), fmt), fmt)
    assert torch.allclose(approximation, torch.full_like(approximation, value), rtol=2**-10)


@EVERY
def test_a_short_last_group_ignores_its_padding(fmt: Format) -> None:
    """The last, short group gets what it would get as a weight of its own."""
    size = fmt.group_size
    if size is None:
        pytest.skip("one group a row")
    # Uniform, so that no group is an outlier of its row: that rule looks at whole rows.
    weight = torch.rand(12, size + size // 2, generator=torch.Generator().manual_seed(4)) - 0.4
    whole, tail = quantize(weight, fmt), quantize(weight[:, size:], fmt)
    assert torch.equal(whole.codes[:, size:], tail.codes)
    assert torch.equal(whole.scale[:, 1:], tail.scale)


@EVERY
def test_magnitudes_a_wide_dtype_can_hold(fmt: Format) -> None:
    """bfloat16 scales reach from 1e-30 to 1e30; the search neither overflows nor vanishes."""
    weight = torch.randn(6, 130, generator=torch.Generator().manual_seed(2))
    near = quantize(weight.bfloat16(), fmt)
    for power in (-100, 100):
        made = quantize((weight.bfloat16().double() * 2.0**power).to(torch.bfloat16), fmt)
        assert torch.equal(made.codes, near.codes)
        assert torch.equal(made.scale.double(), near.scale.double() * 2.0**power)


@EVERY
@pytest.mark.parametrize("factor", [1e-30, 1e30])
def test_a_range_the_scales_cannot_hold_is_refused(fmt: Format, factor: float) -> None:
    weight = torch.ones(2, 64) * factor
    if fmt.scale_dtype(torch.float32) == torch.float16:
        with pytest.raises(ValueError, match=r"float16.*bfloat16"):
            quantize(weight, fmt)
    else:
        assert torch.allclose(dequantized(quantize(weight, fmt), fmt), weight.double(), rtol=1e-2)


def test_small_float16_rows_keep_their_precision() -> None:
    """Scales below float16's normal range are subnormals, not clamped up."""
    fmt = DENSE["w4a16-g32"]
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(3)).half() * 1e-4
    error = (dequantized(quantize(weight, fmt), fmt) - weight.double()).norm() / weight.double().norm()
    assert error < 0.15


def test_a_tiny_group_beside_a_large_one_rounds_to_zero_at_worst() -> None:
    weight = torch.ones(1, 64)
    weight[0, 32:] = 1e-12
    approximation = dequantized(quantize(weight, DENSE["w4a16-g32"]), DENSE["w4a16-g32"])
    assert (approximation[0, 32:].abs() < 1e-6).all()


@EVERY
def test_same_bits_every_time_and_row_by_row(fmt: Format) -> None:
    """Threads and tiles do not show: rows are independent of each other."""
    weight = heavy_tailed(700, 288)
    first, second = quantize(weight, fmt), quantize(weight, fmt)
    part = quantize(weight[13:55], fmt)
    for a, b, c in zip(first, second, part, strict=True):
        if a is not None:
            assert torch.equal(a, b) and torch.equal(a[13:55], c)


def test_strided_weights_and_weights_with_gradients() -> None:
    fmt = DENSE["w4a16-g32-asym"]
    weight = heavy_tailed(64, 96)
    expected = quantize(weight, fmt)
    made = quantize(torch.nn.Parameter(weight.t().contiguous()).t(), fmt)
    assert all(torch.equal(a, b) for a, b in zip(expected, made, strict=True))
    assert not made.scale.requires_grad


@pytest.mark.parametrize(
    "weight",
    [
        torch.zeros(4),
        torch.zeros(2, 2, 2),
        torch.zeros(0, 8),
        torch.zeros(8, 0),
        torch.zeros(2, 2, dtype=torch.int8),
        torch.tensor([[1.0, float("nan")]]),
        torch.tensor([[1.0, float("inf")]]),
        torch.tensor([[-float("inf"), 1.0]]),
    ],
    ids=["1-D", "3-D", "no rows", "no columns", "integer", "nan", "inf", "-inf"],
)
def test_what_is_no_weight_is_refused(weight: Tensor) -> None:
    with pytest.raises(ValueError, match="weight"):
        quantize(weight, DENSE["w4a16"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@EVERY
def test_a_gpu_weight_stays_on_its_device(fmt: Format) -> None:
    weight = heavy_tailed(64, 320).bfloat16()
    made = quantize(weight.cuda(), fmt)
    assert made.codes.is_cuda and made.scale.is_cuda
    assert_never_worse(weight.cuda(), fmt)


@pytest.mark.parametrize("name", ["w4a16-g64", "w4a16-g64-asym"])
def test_outliers_of_a_row_are_not_clipped(name: str) -> None:
    """A few huge weights carry a language model; the search may clip others, not them."""
    fmt = DENSE[name]
    weight = torch.randn(32, 640, generator=torch.Generator().manual_seed(5))
    weight[:, 100] = 12.0
    error = (dequantized(quantize(weight, fmt), fmt) - weight.double()).abs()
    assert (error[:, 100] <= 12 * 2**-10 + (0 if fmt.symmetric else 0.5)).all()
    weight[:, 100] = 3.0  # no outlier: somewhere it is clipped for the sake of the others
    clipped = (dequantized(quantize(weight, fmt), fmt) - weight.double()).abs()[:, 100].max()
    assert clipped > 0.25


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no-grad", "inference"])
def test_threads_give_the_same_bits_in_every_mode(mode, monkeypatch):
    """Tiles are rounded by a pool of threads, which do not inherit the caller's mode."""
    weight, fmt = torch.randn(1024, 512, generator=torch.Generator().manual_seed(0)), DENSE["w4a16-g32-asym"]
    alone = quantize(weight, fmt)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with mode():
        shared = quantize(weight, fmt)
    for one, other in zip(alone, shared, strict=True):
        assert torch.equal(one, other)
