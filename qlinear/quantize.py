"""Rounding a float weight to codes: round to nearest, with a search for the scale (and zero point) of each group.

The search is a clipping search: each group tries a fixed list of clipping ratios, from plain absmax (min-max where
asymmetric) down to about half of it, with the scale rounded to its stored dtype *before* the codes are rounded, and
keeps the one of least squared error. Absmax is on the list, so no group's squared error ever grows. It needs no data.

A symmetric int4 group may have a negative scale: codes reach from -8 to 7, and the sign puts the largest weight on the
longer end, as llama.cpp's Q4_0 does. On SmolLM2's off-grid twin (groups of 64) that takes the excess perplexity from
0.99 of absmax's to 0.81.

A group that holds an outlier of its row is never clipped. A few such weights carry a language model ("super weights",
Yu et al., arXiv:2411.07191); with this rule the excess above falls to 0.64 of absmax's.

The family: clipping by mean squared error as in Banner et al. (arXiv:1810.05723) and OCS (Zhao et al.,
arXiv:1901.09504); a list of candidates per block as in llama.cpp's ``make_qx_quants``. Tried and left out, as no better
than the noise: a least-squares refit of the scale, exponents other than two (GPTQ's grid search uses 2.4, HQQ one below
one), weighting by magnitude or by column norm, a full search of the zero point, and error feedback with ``W.T @ W`` in
the place of the activations' covariance.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from qlinear.format import Format
from qlinear.grid import on_grid, smallest, store

# Clipping ratios, as shares of absmax. A negative one turns the scale's sign where that puts the group's largest weight
# on the longer end. The positive ones are the usual conventions: absmax / 7, / 7.5 and / 8 for int4.
# Scales up to twice absmax / 448: a float has the same grid in every octave, so what counts is where in one a row's
# weights come to lie. On rows of SmolLM2-135M that takes 11 % off the squared error of absmax.
_E4M3 = (1.0, *(2.0 ** (i / 8) for i in range(1, 8)))
_SYMMETRIC = {
    ("int", 4): (1.0, 7 / 7.5, 7 / 8, -7 / 7.5, -7 / 8, -0.84, -0.8, -0.76, -0.72, -0.67, -0.62, -0.56),
    ("int", 8): (1.0, 127 / 127.5, 127 / 128),
    ("e4m3", 8): _E4M3,
}
_ASYMMETRIC = (1.0, 1.04, 0.98, 0.95, 0.92, 0.89, 0.86, 0.83, 0.79, 0.75, 0.7, 0.64, 0.56)
# Adding and subtracting 1.5 * 2**23 rounds a float32 to the nearest integer, half to even. torch.round() does the same,
# but wakes torch's threads even for small tensors, which costs more than the rounding.
_MAGIC = 12582912.0
# Tiles of this many weights stay in a CPU core's cache, and below 32768 torch does not start its own threads.
_CPU_TILE, _GPU_TILE = 32000, 1 << 24
_MAX_THREADS = 8
# A group with a weight larger than this many times its row's root mean square is not clipped: about one in thirty.
_OUTLIER = 4.5
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Codes(NamedTuple):
    """A quantized weight before packing: the value of an element is ``(code - zero_point) * scale``."""

    codes: Tensor  # [N, K]: uint8, 0 .. 2**bits - 1, or the 16-bit floats themselves
    scale: Tensor  # float [N, G]; may be negative where the format is symmetric
    zero_point: Tensor | None  # uint8 [N, G]; None where the format is symmetric: the zero point is then fmt.offset


class _Grid(NamedTuple):
    """Candidate scales, each with its range of ``code - zero_point`` (one range for all where symmetric)."""

    scale: Tensor
    low: Tensor
    high: Tensor

    def at(self, i: int) -> tuple[Tensor, Tensor, Tensor]:
        return self.scale[i], self.low[min(i, len(self.low) - 1)], self.high[min(i, len(self.high) - 1)]


def quantize(weight: Tensor, fmt: Format, search: bool = True) -> Codes:
    """Rounds ``weight`` ``[N, K]`` to the codes of ``fmt``; scales come in ``fmt.scale_dtype(weight.dtype)``.

    ``search=False`` is plain absmax (min-max where asymmetric) rounding. With ``search`` the scale of each group is
    the best of a list of clipping ratios; no group's squared error gets larger. A weight that lies on a grid of the
    format already keeps its values exactly (:mod:`qlinear.grid`). Same bits on every call; works on the
    weight's device, in float32, a bounded tile at a time.

    Raises:
        ValueError: the weight is not a 2-D float matrix, is empty, holds NaN or infinity, or its range does not fit
            the dtype of its scales (only where float32 or float64 weights get float16 scales).
    """
    dtype = _check(weight, fmt)
    if fmt.number == "float":
        empty = torch.empty((len(weight), 0), dtype=dtype, device=weight.device)
        return Codes(weight.detach().to(dtype), empty, None)
    found = on_grid(weight.detach(), fmt, dtype) if search else None
    if found is not None:
        return Codes(*found)
    n, k = weight.shape
    groups = fmt.groups(k)
    codes = torch.empty((n, k), dtype=torch.uint8, device=weight.device)
    scale = torch.empty((n, groups), dtype=dtype, device=weight.device)
    zero = None if fmt.symmetric else torch.empty((n, groups), dtype=torch.uint8, device=weight.device)
    result, source = Codes(codes, scale, zero), weight.detach()

    inference = torch.is_inference_mode_enabled()

    def one(rows: slice) -> None:
        # A thread of the pool starts outside the caller's inference mode, and may not write its tensors there.
        with torch.inference_mode(inference):
            _quantize_rows(source, fmt, search, rows, result)

    tiles = list(_tiles(n, groups * (fmt.group_size or k), weight.is_cuda))
    threads = min(torch.get_num_threads(), _MAX_THREADS, len(tiles) // 4)
    if weight.device.type != "cpu" or threads < 2:
        for rows in tiles:
            one(rows)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(one, tiles))
    return result


def _check(weight: Tensor, fmt: Format) -> torch.dtype:
    """The dtype of the scales, once the weight is known to be fit for them."""
    if weight.dim() != 2 or weight.dtype not in _DTYPES or weight.numel() == 0:
        got = f"{weight.dtype} {tuple(weight.shape)}"
        raise ValueError(f"a weight is a non-empty float matrix [out_features, in_features], got {got}")
    low, high = (float(t) for t in torch.aminmax(weight.detach()))
    largest, dtype = max(-low, high), fmt.scale_dtype(weight.dtype)
    if not largest < float("inf"):
        raise ValueError("the weight holds NaN or infinity; it cannot be quantized")
    if fmt.number == "float":
        if largest > torch.finfo(dtype).max:
            raise ValueError(
                f"the weight's largest magnitude is {largest:.3g}, which {dtype} does not hold; "
                "convert the model to torch.bfloat16 first"
            )
        return dtype
    unit = largest / fmt.largest if fmt.symmetric else (max(high, 0.0) - min(low, 0.0)) / fmt.max_code
    if unit > torch.finfo(dtype).max or 0 < unit < smallest(dtype):
        raise ValueError(
            f"the weight's largest magnitude is {largest:.3g}: its scale {unit:.3g} is out of the range of "
            f"{dtype}, which {fmt} stores it in; rescale the weight or convert the model to torch.bfloat16 first"
        )
    return dtype


def _tiles(n: int, row: int, on_gpu: bool) -> Iterator[slice]:
    """Slices of rows that together hold at most a tile of weights."""
    step = max(1, (_GPU_TILE if on_gpu else _CPU_TILE) // row)
    return (slice(i, min(i + step, n)) for i in range(0, n, step))


def _quantize_rows(weight: Tensor, fmt: Format, search: bool, rows: slice, out: Codes) -> None:
    k = weight.shape[1]
    size, groups = fmt.group_size or k, fmt.groups(k)
    # A short last group is filled with zeros: they are exactly representable, so they change neither range nor error.
    x = torch.nn.functional.pad(weight[rows].float(), (0, groups * size - k)).reshape(-1, size)
    # Short groups are laid side by side, so that every operation runs over long rows; whole rows already are long.
    axis = 0 if fmt.group_size else 1
    x = x.t().contiguous() if axis == 0 else x
    peak = x.abs().amax(axis, keepdim=True)
    peak.masked_fill_(peak == 0, 1.0)
    x = x / peak  # in [-1, 1], so that squares neither overflow nor vanish
    ratios = _SYMMETRIC[fmt.number, fmt.bits] if fmt.symmetric else _ASYMMETRIC
    grid = _grid(x, peak, fmt, out.scale.dtype, ratios if search else (1.0,), axis)
    scale, low, high = grid.at(0)
    if search:
        # A row is as long as what it keeps.
        kept = (x != 0).sum(axis).view(-1, groups).sum(1, keepdim=True) if fmt.sparsity else k
        outlier = _outliers(x, peak, kept, groups, axis)
        scale, low, high = _best(x, grid, peak, outlier, axis, fmt)
    values = _round(x, peak / scale, low, high, torch.empty_like(x), fmt)
    codes = values.to(torch.float8_e4m3fn).view(torch.uint8) if fmt.number == "e4m3" else values.sub_(low)
    codes = codes.t() if axis == 0 else codes
    out.codes[rows] = codes.reshape(-1, groups * size)[:, :k].to(torch.uint8)
    out.scale[rows] = scale.view(-1, groups).to(out.scale.dtype)
    if out.zero_point is not None:
        out.zero_point[rows] = (-low).view(-1, groups).to(torch.uint8)


def _grid(x: Tensor, peak: Tensor, fmt: Format, dtype: torch.dtype, ratios: tuple[float, ...], axis: int) -> _Grid:
    """The candidates for every group; the first is absmax. Scales are already rounded to ``dtype``."""
    steps = torch.tensor(ratios, device=x.device).view(-1, 1, 1)
    low, high = x.amin(axis, keepdim=True).clamp_(max=0), x.amax(axis, keepdim=True).clamp_(min=0)
    if fmt.symmetric:
        # Codes reach from -offset to offset - 1: a turned scale has the largest weight at the longer end.
        steps = torch.where((steps < 0) & (high < -low), -steps, steps)
        scale = store(peak * steps / fmt.largest, dtype)
        least = -fmt.offset if fmt.number == "int" else -fmt.largest
        return _Grid(scale, scale.new_full((1, 1, 1), least), scale.new_full((1, 1, 1), fmt.largest))
    scale = store((high - low) / fmt.max_code * peak * steps, dtype)
    # Absmax puts the lower end on code 0; a clipped range keeps its middle.
    zero = fmt.max_code / 2 - (low + high) / 2 * (peak / scale)
    zero[0] = -low * (peak / scale[0])
    zero.add_(_MAGIC).sub_(_MAGIC).clamp_(0, fmt.max_code)
    return _Grid(scale, -zero, fmt.max_code - zero)


def _round(x: Tensor, inverse: Tensor, low: Tensor, high: Tensor, out: Tensor, fmt: Format) -> Tensor:
    """``x * inverse`` rounded within ``[low, high]``, into ``out``: the values ``code - zero_point``, or of e4m3."""
    if fmt.number == "e4m3":
        torch.mul(x, inverse, out=out).clamp_(low, high)
        # A power of two times 1.5 * 2**20 is so large that float32 keeps 3 bits below that power, ties to even; torch's
        # own conversions to float8 and back give the same numbers in twice the time.
        power = out.view(torch.int32).bitwise_and(0x7F800000).view(torch.float32).clamp_(min=2.0**-6).mul_(1.5 * 2**20)
        return out.add_(power).sub_(power)
    torch.addcmul(_magic(x.device), x, inverse, out=out).sub_(_MAGIC)
    return torch.clamp(out, low, high, out=out)


def _magic(device: torch.device) -> Tensor:
    return torch.full((), _MAGIC, device=device)


def _outliers(x: Tensor, peak: Tensor, k: int | Tensor, groups: int, axis: int) -> Tensor:
    """The groups whose largest magnitude stands far out of their row of k weights (x is each group over its peak)."""
    peaks = peak.view(-1, groups)
    relative = peaks / peaks.amax(1, keepdim=True)  # of the row's largest, so that no square overflows
    energy = (x * x).sum(axis).view(-1, groups) * relative.square()
    rms = (energy.sum(1, keepdim=True) / k).sqrt()
    return (relative > _OUTLIER * rms).view_as(peak)


def _best(
    x: Tensor, grid: _Grid, peak: Tensor, outlier: Tensor, axis: int, fmt: Format
) -> tuple[Tensor, Tensor, Tensor]:
    """For each group the candidate of least squared error: its scale and range. Outliers are not clipped."""
    errors, buffer = torch.empty((len(grid.scale), *peak.shape), device=x.device), torch.empty_like(x)
    inverse, step = peak / grid.scale, grid.scale / peak
    for i in range(len(errors)):
        _, low, high = grid.at(i)
        _round(x, inverse[i], low, high, buffer, fmt)
        error = torch.addcmul(x, buffer, step[i], value=-1, out=buffer)
        torch.sum(error.mul_(error), axis, keepdim=True, out=errors[i])
    # Where symmetric, a turned scale of 7/8 of absmax still reaches the largest weight.
    least = grid.scale[0] * (0.87 if len(grid.low) == 1 else 1.0)
    errors.masked_fill_(outlier & (grid.scale.abs() < least), float("inf"))
    best = errors.argmin(0, keepdim=True)

    def pick(t: Tensor) -> Tensor:
        return t[0] if len(t) == 1 else t.gather(0, best)[0]

    return pick(grid.scale), pick(grid.low), pick(grid.high)
