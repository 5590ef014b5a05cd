"""Rounding a float weight to codes: round to nearest, with a search for the scale (and zero point) of each group."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qlinear.format import Format


class Codes(NamedTuple):
    """A quantized weight before packing: the value of an element is ``(code - zero_point) * scale``."""

    codes: Tensor  # uint8 [N, K], 0 .. 2**bits - 1
    scale: Tensor  # float [N, G]
    zero_point: Tensor | None  # uint8 [N, G]; None where the format is symmetric: the zero point is then fmt.offset


def quantize(weight: Tensor, fmt: Format, search: bool = True) -> Codes:
    """Rounds ``weight`` ``[N, K]`` to the codes of ``fmt``.

    ``search=False`` is plain absmax (min-max where asymmetric) rounding. With ``search`` the scale of each group is chosen to
    lower the squared error, and never raises it.

    Raises:
        ValueError: the weight is not a 2-D float matrix, is empty, or holds NaN or infinity.
    """
    groups = _grouped(weight, fmt)
    low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
    if fmt.symmetric:
        scale, zero = torch.maximum(-low, high) / (fmt.offset - 1), torch.full_like(low, fmt.offset)
    else:
        scale, zero = (high - low) / fmt.max_code, torch.zeros_like(low)
    scale = _storable(scale, fmt.scale_dtype(weight.dtype))
    if not fmt.symmetric:
        zero = (-low / scale).round().clamp(0, fmt.max_code)
    codes = (groups / scale + zero).round().clamp(0, fmt.max_code)
    return _finish(codes, scale, zero, weight, fmt)


def _grouped(weight: Tensor, fmt: Format) -> Tensor:
    """The weight as float32 ``[N, G, group]``, a short last group padded with zeros (which stay exactly zero)."""
    if weight.dim() != 2 or not weight.is_floating_point() or weight.numel() == 0:
        raise ValueError(
            f"a weight is a non-empty float matrix [out_features, in_features], got {weight.dtype} {tuple(weight.shape)}"
        )
    if not bool(torch.isfinite(weight).all()):
        raise ValueError("the weight holds NaN or infinity; it cannot be quantized")
    n, k = weight.shape
    size = fmt.group_size or k
    padded = torch.nn.functional.pad(weight.detach().float(), (0, fmt.groups(k) * size - k))
    return padded.view(n, fmt.groups(k), size)


def _storable(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale as its stored dtype can hold it, in float32: rounded before the codes are, positive, never infinite."""
    info = torch.finfo(dtype)
    return scale.clamp(min=max(info.tiny, 1e-30), max=info.max).to(dtype).float()


def _finish(codes: Tensor, scale: Tensor, zero: Tensor, weight: Tensor, fmt: Format) -> Codes:
    n, k = weight.shape
    return Codes(
        codes.view(n, -1)[:, :k].to(torch.uint8).contiguous(),
        scale.squeeze(-1).to(fmt.scale_dtype(weight.dtype)),
        None if fmt.symmetric else zero.squeeze(-1).to(torch.uint8),
    )
