"""Packed weights: from a float matrix to the tensors a matmul reads, and back.

Weights are ``[N, K]`` = (out_features, in_features) everywhere outside the kernels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qlinear import layout as layouts
from qlinear.bits import pack_bits, unpack_bits
from qlinear.format import Format, Scheme
from qlinear.quantize import Codes, quantize


@dataclass(frozen=True)
class PackedWeight:
    """One weight ``[out_features, in_features]`` in a format and a layout.

    Layouts (told by the tensors themselves, see :func:`qlinear.layout.layout_of`):

    - ``plain``: ``weight`` int32 ``[N, ceil(K*bits/32)]``, ``scale`` ``[N, G]``, ``zero_point`` int32
      ``[ceil(N*bits/32), G]`` packed along N, or None where symmetric. This is what a checkpoint holds.
    - ``triton``: what the GPU kernels read. - ``cpu``: what PyTorch's packed CPU operators read.
    """

    weight: Tensor
    scale: Tensor
    zero_point: Tensor | None
    format: Format
    out_features: int
    in_features: int

    @property
    def layout(self) -> str:
        return layouts.layout_of(self.weight)

    @property
    def nbytes(self) -> int:
        """Bytes the tensors hold in this layout, padding included."""
        return sum(t.nbytes for t in (self.weight, self.scale, self.zero_point) if t is not None)

    @property
    def device(self) -> torch.device:
        return self.weight.device

    def codes(self) -> Codes:
        """The codes, scales and zero points, unpacked from whatever layout this is."""
        plain = self.to_layout("plain")
        fmt = self.format
        zero = None
        if plain.zero_point is not None:
            zero = unpack_bits(plain.zero_point.t(), fmt.bits, self.out_features).t().contiguous()
        return Codes(unpack_bits(plain.weight, fmt.bits, self.in_features), plain.scale, zero)

    def to_layout(self, layout: str | None = None) -> PackedWeight:
        """The same weight in another layout; exact in both directions. None: the one this device computes with.

        Raises:
            ValueError: the layout's name is not one of ``plain``, ``triton``, ``cpu``.
        """
        target = layout or layouts.native_layout(self.device)
        if target not in layouts.LAYOUTS:
            raise ValueError(f"layout {target!r} does not exist; the layouts are: {', '.join(layouts.LAYOUTS)}")
        tensors = (self.weight, self.scale, self.zero_point)
        tensors = layouts.convert(tensors, self.layout, target, self.format, self.out_features, self.in_features)
        return replace(self, weight=tensors[0], scale=tensors[1], zero_point=tensors[2])

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The float weight ``[N, K]`` this stands for, rounded once to ``dtype`` (the scale's)."""
        codes, scale, zero = self.codes()
        return dequantize_codes(codes, scale, zero, self.format, dtype or scale.dtype)


def dequantize_codes(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None, fmt: Format, dtype: torch.dtype = torch.float32
) -> Tensor:
    """``(code - zero_point) * scale`` for uint8 codes ``[N, K]`` and scales ``[N, G]``, rounded to ``dtype`` once.

    Where codes are the bits of e4m3 there is no zero point: that float times the scale.
    """
    if zero_point is not None:
        zero_point = expand_groups(zero_point, fmt, codes.shape[1])
    return scaled(signed(codes, zero_point, fmt), scale, fmt, dtype)


def scaled(values: Tensor, scale: Tensor, fmt: Format, dtype: torch.dtype) -> Tensor:
    """int8 or e4m3 values ``[N, K]`` times their scales ``[N, G]``, in ``dtype``."""
    n, k = values.shape
    size = fmt.group_size or k
    values = torch.nn.functional.pad(values, (0, scale.shape[1] * size - k))
    return values.view(n, -1, size).to(dtype).mul_(scale.unsqueeze(-1)).view(n, -1)[:, :k]


def expand_groups(per_group: Tensor, fmt: Format, in_features: int) -> Tensor:
    """``[N, G]`` repeated along K to ``[N, in_features]``; the last group may be short."""
    return per_group.repeat_interleave(fmt.group_size or in_features, dim=1)[:, :in_features]


def signed(codes: Tensor, zero_point: Tensor | None, fmt: Format) -> Tensor:
    """``code - zero_point`` as int8, for uint8 codes and zero points (None: the format's offset); or the e4m3 value."""
    if fmt.number == "e4m3":
        return codes.view(torch.float8_e4m3fn)
    if fmt.bits == 8:
        return (codes ^ fmt.offset).view(torch.int8)
    return codes.view(torch.int8) - (fmt.offset if zero_point is None else zero_point.view(torch.int8))


def pack_codes(codes: Codes, fmt: Format) -> PackedWeight:
    """Packs codes into the plain layout."""
    n, k = codes.codes.shape
    zero = None
    if codes.zero_point is not None:
        zero = pack_bits(codes.zero_point.t(), fmt.bits).t().contiguous()
    return PackedWeight(pack_bits(codes.codes, fmt.bits), codes.scale.contiguous(), zero, fmt, n, k)


def pack(weight: Tensor, scheme: str | Scheme, layout: str | None = None) -> PackedWeight:
    """Quantizes and packs a float weight ``[out_features, in_features]``.

    Args:
        weight: any float dtype, any device.
        scheme: for example ``"w4a16"``.
        layout: ``plain``, ``triton`` or ``cpu``; None is the layout the weight's device computes with.

    Raises:
        ValueError: unknown scheme or layout, or a weight that is not a finite float matrix.
    """
    fmt = Scheme.parse(scheme).format
    return pack_codes(quantize(weight, fmt), fmt).to_layout(layout)
