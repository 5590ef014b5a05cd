"""Weights that already lie on the grid of an integer format: their codes are read back, not searched.

A weight that was rounded before (by a pruning sweep that rounds as it goes, by GPTQ or AWQ, or dequantized from this
very format) is ``(code - zero_point) * scale`` for some scale of each group. A search for the least error would find
another scale wherever no code of the group reaches the end of its range, and round a second time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qlinear.format import Format

_TILE = 1 << 20  # weights looked at together
_PROBE = 256  # weights of the first group that are tried before any other


def smallest(dtype: torch.dtype) -> float:
    """The smallest scale stored: float16 needs its subnormals (codes are rounded after it)."""
    info = torch.finfo(dtype)
    return info.tiny * info.eps if dtype == torch.float16 else info.tiny


def store(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale as it will be read back, in float32: rounded to its dtype, finite, not zero."""
    size = scale.abs().clamp_(smallest(dtype), torch.finfo(dtype).max)
    return size.copysign_(scale).to(dtype).float()


def exact(scale: Tensor) -> Tensor:
    """A float32 scale shortened to 16 bits, so that its product with any code is a float32 number."""
    return (scale.view(torch.int32) & ~0xFF).view(torch.float32)


def on_grid(weight: Tensor, fmt: Format, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """Codes ``[N, K]``, scales ``[N, G]`` of ``dtype`` and zero points that give ``weight`` bit for bit, or None.

    "Bit for bit" is after rounding ``(code - zero_point) * scale`` to the weight's own dtype. It is all or nothing: one
    group off the grid, and the weight is a float weight like any other. That is found out from one group, as a rule.
    """
    # 8-bit floats and unscaled floats are no grid.
    if weight.dtype == torch.float64 or fmt.number != "int":
        return None
    n, k = weight.shape
    size, groups = fmt.group_size or k, fmt.groups(k)
    x = torch.nn.functional.pad(weight, (0, groups * size - k)).reshape(-1, size)
    used = (x != 0).any(1).nonzero()
    if len(used) and not _passes(x[used[0]], fmt, dtype):
        return None
    parts = []
    for tile in x.split(max(1, _TILE // size)):
        found = _fit(tile, fmt, dtype)
        if found is None:
            return None
        parts.append(found)
    values, scale = torch.cat([v for v, _ in parts]), torch.cat([s for _, s in parts])
    # Where there is a choice of zero points, the lowest that reaches the lowest value.
    zero = values.amin(1, keepdim=True).clamp(max=0).neg() if not fmt.symmetric else None
    codes = values + (fmt.offset if zero is None else zero)
    codes = codes.to(torch.uint8).view(n, groups * size)[:, :k].contiguous()
    return codes, scale.view(n, groups).to(dtype), None if zero is None else zero.view(n, groups).to(torch.uint8)


def _tries(fmt: Format) -> range:
    """The values of ``|code - zero_point|`` that the largest magnitude of a group may have, the likeliest first."""
    return range(fmt.offset if fmt.symmetric else fmt.max_code, 0, -1)


def _passes(group: Tensor, fmt: Format, dtype: torch.dtype) -> bool:
    """Whether the first weights of one group ``[1, size]`` are on any grid with the group's largest magnitude."""
    peak = group.float().abs().amax()
    divisors = torch.tensor(list(_tries(fmt)), device=group.device)
    scales = torch.cat([_nudged(store(peak / divisors, dtype), by, dtype) for by in (0, -1, 1)]).unsqueeze(1)
    some = group[:, :_PROBE]
    values = (some.float() / scales).round()
    return bool(((values * scales).to(group.dtype) == some).all(1).any())


def _nudged(scale: Tensor, by: int, dtype: torch.dtype) -> Tensor:
    """Positive scales, so many steps of their dtype away: a largest weight that was rounded gives its scale so far."""
    if by == 0:
        return scale
    bits = torch.int32 if dtype.itemsize == 4 else torch.int16
    return store((scale.to(dtype).view(bits) + by).view(dtype).float(), dtype)


def _fit(x: Tensor, fmt: Format, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
    """``code - zero_point`` (int16) and scale ``[groups, 1]`` (float32) of each group of ``x`` ``[groups, size]``."""
    values = torch.zeros(x.shape, dtype=torch.int16, device=x.device)
    scale = store(torch.ones(len(x), 1, device=x.device) / fmt.max_code, dtype)
    left = (x != 0).any(1).nonzero().squeeze(1)
    for largest in _tries(fmt):
        for by in (0, -1, 1):
            if not len(left):
                return values, scale
            rows = x[left]
            trial = _nudged(store(rows.float().abs().amax(1, keepdim=True) / largest, dtype), by, dtype)
            found = (rows.float() / trial).round()
            turn = _turn(found, fmt)
            good = ((found * trial).to(x.dtype) == rows).all(1, keepdim=True) & (turn != 0)
            where = good.squeeze(1)
            values[left[where]] = (found * turn)[where].to(torch.int16)
            scale[left[where]] = (trial * turn)[where]
            left = left[~where]
    return (values, scale) if not len(left) else None


def _turn(values: Tensor, fmt: Format) -> Tensor:
    """1 where the values fit the format's codes, -1 where they do with the scale's sign turned, 0 where they do not."""
    low, high = values.amin(1, keepdim=True).clamp(max=0), values.amax(1, keepdim=True).clamp(min=0)
    if not fmt.symmetric:
        return (high - low <= fmt.max_code).float()
    upright = (low >= -fmt.offset) & (high < fmt.offset)
    turned = (high <= fmt.offset) & (low > -fmt.offset)
    return torch.where(upright, 1.0, torch.where(turned & (fmt.bits == 4), -1.0, 0.0))
