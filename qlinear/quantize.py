"""Rounding a float weight to codes: round to nearest, with a search for the scale (and zero point) of each group.

The search is a clipping search: each group tries a fixed list of clipping ratios, from plain absmax (min-max where
asymmetric) down to about half of it, with the scale rounded to its stored dtype *before* the codes are rounded, and
keeps the one of least squared error; int4 then fits the scale to the codes by least squares, twice. Absmax is on the
list, so no group's squared error ever grows. It needs no data.

A group that holds an outlier of its row is never clipped. A few such weights carry a language model ("super weights",
Yu et al., arXiv:2411.07191): on SmolLM2 and its real activations the plain search lowers a layer's output error by 11 %
(int4, groups of 64, symmetric) and with this rule by 17 %, at a slightly larger squared error of the weights.

The family: clipping by mean squared error as in Banner et al. (arXiv:1810.05723) and OCS (Zhao et al.,
arXiv:1901.09504); a list of candidates per block, then a fit of the scale, as in llama.cpp's ``make_qx_quants`` and
``make_qkx2_quants``. Tried on the same output error and no better: exponents other than two (GPTQ's grid search uses
2.4, HQQ one below one), weighting by magnitude or by column norm, a full search of the zero point, and error feedback
with ``W.T @ W`` in the place of the activations' covariance. With the real covariance feedback gains a factor of four:
that is calibration, not rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from qlinear.format import Format

# The first three are the usual conventions: absmax / 7, / 7.5 and / 8 for int4.
_RATIOS = {
    4: (1.0, 7 / 7.5, 7 / 8, 1.04, 0.97, 0.9, 0.84, 0.8, 0.76, 0.72, 0.67, 0.62, 0.56),
    8: (1.0, 127 / 127.5, 127 / 128, 0.98),
}
# Then the scale is fitted to the codes and the codes are rounded again, this often.
_REFITS = {4: 2, 8: 0}
# Adding and subtracting 1.5 * 2**23 rounds a float32 to the nearest integer, half to even. torch.round() does the same,
# but wakes torch's threads even for small tensors, which costs more than the rounding.
_MAGIC = 12582912.0
# Tiles of this many weights stay in a CPU core's cache, and below 32768 torch does not start its own threads.
_CPU_TILE, _GPU_TILE = 32000, 1 << 24
_MAX_THREADS = 8
# A group with a weight larger than this many times its row's root mean square is not clipped: about one in thirty.
_OUTLIER = 4.5
_MEND = 0.94
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Codes(NamedTuple):
    """A quantized weight before packing: the value of an element is ``(code - zero_point) * scale``."""

    codes: Tensor  # uint8 [N, K], 0 .. 2**bits - 1
    scale: Tensor  # float [N, G]
    zero_point: Tensor | None  # uint8 [N, G]; None where the format is symmetric: the zero point is then fmt.offset


class _Grid(NamedTuple):
    """Candidate scales, each with its range of ``code - zero_point`` (one range for all where symmetric)."""

    scale: Tensor
    low: Tensor
    high: Tensor

    #: The dtype scales are stored in.
    dtype: torch.dtype

    def store(self, scale: Tensor) -> Tensor:
        """The scale as it will be read back, in float32: rounded to its dtype, positive, finite."""
        return _store(scale, self.dtype)

    def at(self, i: int) -> tuple[Tensor, Tensor, Tensor]:
        return self.scale[i], self.low[min(i, len(self.low) - 1)], self.high[min(i, len(self.high) - 1)]


def quantize(weight: Tensor, fmt: Format, search: bool = True) -> Codes:
    """Rounds ``weight`` ``[N, K]`` to the codes of ``fmt``; scales come in ``fmt.scale_dtype(weight.dtype)``.

    ``search=False`` is plain absmax (min-max where asymmetric) rounding. With ``search`` the scale of each group is
    the best of a list of clipping ratios; no group's squared error gets larger. Same bits on every call; works on the
    weight's device, in float32, a bounded tile at a time.

    Raises:
        ValueError: the weight is not a 2-D float matrix, is empty, holds NaN or infinity, or its range does not fit
            the dtype of its scales (only where float32 or float64 weights get float16 scales).
    """
    dtype = _check(weight, fmt)
    n, k = weight.shape
    groups = fmt.groups(k)
    codes = torch.empty((n, k), dtype=torch.uint8, device=weight.device)
    scale = torch.empty((n, groups), dtype=dtype, device=weight.device)
    zero = None if fmt.symmetric else torch.empty((n, groups), dtype=torch.uint8, device=weight.device)
    result, source = Codes(codes, scale, zero), weight.detach()

    def one(rows: slice) -> None:
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
    unit = largest / (fmt.offset - 1) if fmt.symmetric else (max(high, 0.0) - min(low, 0.0)) / fmt.max_code
    if unit > torch.finfo(dtype).max or 0 < unit < _smallest(dtype):
        raise ValueError(
            f"the weight's largest magnitude is {largest:.3g}: its scale {unit:.3g} is out of the range of "
            f"{dtype}, which {fmt} stores it in; rescale the weight or convert the model to torch.bfloat16 first"
        )
    return dtype


def _tiles(n: int, row: int, on_gpu: bool) -> Iterator[slice]:
    """Slices of rows that together hold at most a tile of weights."""
    step = max(1, (_GPU_TILE if on_gpu else _CPU_TILE) // row)
    return (slice(i, min(i + step, n)) for i in range(0, n, step))


def _smallest(dtype: torch.dtype) -> float:
    """The smallest scale stored: float16 needs its subnormals (codes are rounded after it)."""
    info = torch.finfo(dtype)
    return info.tiny * info.eps if dtype == torch.float16 else info.tiny


def _store(scale: Tensor, dtype: torch.dtype) -> Tensor:
    return scale.clamp(_smallest(dtype), torch.finfo(dtype).max).to(dtype).float()


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
    grid = _grid(x, peak, fmt, out.scale.dtype, _RATIOS[fmt.bits] if search else (1.0,), axis)
    scale, low, high = grid.at(0)
    if search:
        outlier = _outliers(x, peak, k, groups, axis)
        scale, low, high = _best(x, grid, peak, outlier, axis, _REFITS[fmt.bits])
    codes = _round(x, peak / scale, low, high, torch.empty_like(x)).sub_(low)
    codes = codes.t() if axis == 0 else codes
    out.codes[rows] = codes.reshape(-1, groups * size)[:, :k].to(torch.uint8)
    out.scale[rows] = scale.view(-1, groups).to(out.scale.dtype)
    if out.zero_point is not None:
        out.zero_point[rows] = (-low).view(-1, groups).to(torch.uint8)


def _grid(x: Tensor, peak: Tensor, fmt: Format, dtype: torch.dtype, ratios: tuple[float, ...], axis: int) -> _Grid:
    """The candidates for every group; the first is absmax. Scales are already rounded to ``dtype``, and positive."""
    steps = torch.tensor(ratios, device=x.device).view(-1, 1, 1)
    low, high = x.amin(axis, keepdim=True).clamp_(max=0), x.amax(axis, keepdim=True).clamp_(min=0)
    unit = torch.maximum(-low, high) / (fmt.offset - 1) if fmt.symmetric else (high - low) / fmt.max_code
    scale = _store(unit * peak * steps, dtype)
    if fmt.symmetric:
        return _Grid(scale, scale.new_full((1, 1, 1), -fmt.offset), scale.new_full((1, 1, 1), fmt.offset - 1), dtype)
    # Absmax puts the lower end on code 0; a clipped range keeps its middle.
    zero = fmt.max_code / 2 - (low + high) / 2 * (peak / scale)
    zero[0] = -low * (peak / scale[0])
    zero.add_(_MAGIC).sub_(_MAGIC).clamp_(0, fmt.max_code)
    return _Grid(scale, -zero, fmt.max_code - zero, dtype)


def _round(x: Tensor, inverse: Tensor, low: Tensor, high: Tensor, out: Tensor) -> Tensor:
    """``round(x * inverse)`` within ``[low, high]``, into ``out``: the values ``code - zero_point``."""
    torch.addcmul(_magic(x.device), x, inverse, out=out).sub_(_MAGIC)
    return torch.clamp(out, low, high, out=out)


def _magic(device: torch.device) -> Tensor:
    return torch.full((), _MAGIC, device=device)


def _outliers(x: Tensor, peak: Tensor, k: int, groups: int, axis: int) -> Tensor:
    """The groups whose largest magnitude stands far out of their row (x is each group over its peak)."""
    peaks = peak.view(-1, groups)
    relative = peaks / peaks.amax(1, keepdim=True)  # of the row's largest, so that no square overflows
    energy = (x * x).sum(axis).view(-1, groups) * relative.square()
    rms = (energy.sum(1, keepdim=True) / k).sqrt()
    return (relative > _OUTLIER * rms).view_as(peak)


def _best(
    x: Tensor, grid: _Grid, peak: Tensor, outlier: Tensor, axis: int, refits: int
) -> tuple[Tensor, Tensor, Tensor]:
    """For each group the scale and range of least squared error: the best candidate, then refits."""
    errors, buffer = torch.empty((len(grid.scale), *peak.shape), device=x.device), torch.empty_like(x)
    for i in range(len(errors)):
        errors[i] = _squares(x, *grid.at(i), peak, axis, buffer)
    floor = grid.scale[0] * outlier  # an outlier's group keeps at least the scale of absmax
    errors.masked_fill_(grid.scale < floor, float("inf"))
    if len(grid.low) > 1:  # asymmetric: an end lies up to half a step off its code, which the fits may mend
        floor *= _MEND
    least, best = errors.min(0, keepdim=True)

    def pick(t: Tensor) -> Tensor:
        return t[0] if len(t) == 1 else t.gather(0, best)[0]

    scale, low, high, error = pick(grid.scale), pick(grid.low), pick(grid.high), least[0]
    for _ in range(refits):
        levels = _round(x, peak / scale, low, high, buffer)
        square = (levels * levels).sum(axis, keepdim=True)
        refit = levels.mul_(x).sum(axis, keepdim=True) / square.clamp_(min=1) * peak  # least squares for these codes
        refit = grid.store(refit)
        trial = _squares(x, refit, low, high, peak, axis, buffer)
        better = (trial < error) & (refit >= floor)
        scale, error = torch.where(better, refit, scale), torch.where(better, trial, error)
    return scale, low, high


def _squares(x: Tensor, scale: Tensor, low: Tensor, high: Tensor, peak: Tensor, axis: int, buffer: Tensor) -> Tensor:
    """Each group's squared error, over its peak squared."""
    levels = _round(x, peak / scale, low, high, buffer)
    error = torch.addcmul(x, levels, scale / peak, value=-1, out=buffer)
    return error.mul_(error).sum(axis, keepdim=True)
