"""Packed weights: from a float matrix to the tensors a matmul reads, and back.

Weights are ``[N, K]`` = (out_features, in_features) everywhere outside the kernels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qlinear import layout as layouts
from qlinear import layout24, prepacked, sparse, sparse_layout
from qlinear.bits import pack_bits, unpack_bits
from qlinear.format import Format, Scheme
from qlinear.quantize import Codes, quantize


@dataclass(frozen=True, init=False)
class PackedWeight:
    """One weight ``[out_features, in_features]`` in a format and a layout.

    Layouts (told by the tensors themselves, see :func:`qlinear.layout.layout_of`):

    - ``plain``: ``weight`` int32 ``[N, ceil(K*bits/32)]``, ``scale`` ``[N, G]``, ``zero_point`` int32
      ``[ceil(N*bits/32), G]`` packed along N, or None where symmetric. This is what a checkpoint holds.
    - ``triton``: what the GPU kernels read.
    - ``cpu``: what PyTorch's packed CPU operators read. ``fbgemm`` and ``onednn``: for w8a8 what these libraries read,
      which cannot be shared between processes or exported (:mod:`qlinear.prepacked`).

    A sparse format stores the kept weights only, and ``index`` says where they belong: see :mod:`qlinear.sparse`.
    Blocks and 2:4 weights have GPU layouts of their own, blocks one for the CPU too; everything else sparse is plain.
    """

    weight: Tensor
    scale: Tensor
    zero_point: Tensor | None
    format: Format
    out_features: int
    in_features: int
    index: Tensor | None = None

    def __init__(
        self, weight: Tensor, scale: Tensor, zero_point: Tensor | None, format: Format, out_features: int,
        in_features: int, index: Tensor | None = None,
    ) -> None:  # fmt: skip
        # Made in every call of every layer: five times as fast as what a frozen dataclass does for itself.
        own = self.__dict__
        own["weight"], own["scale"], own["zero_point"], own["index"] = weight, scale, zero_point, index
        own["format"], own["out_features"], own["in_features"] = format, out_features, in_features

    def __getstate__(self) -> dict[str, Any]:
        # What a library made of a weight can be neither pickled nor copied.
        return (self.to_layout("plain") if prepacked.is_made(self.weight) else self).__dict__

    @property
    def layout(self) -> str:
        return layouts.layout_of(self.weight)

    @property
    def nbytes(self) -> int:
        """Bytes the tensors hold in this layout, padding included."""
        made = self.out_features * self.in_features if prepacked.is_made(self.weight) else self.weight.nbytes
        return made + sum(t.nbytes for t in self.tensors[1:] if t is not None)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """weight, scale, zero_point, index."""
        return self.weight, self.scale, self.zero_point, self.index

    @property
    def density(self) -> float:
        """The share of weights that is stored (in blocks, of whole blocks): 1 where the format is dense."""
        weight, _, _, index = self.to_layout("plain").tensors
        if index is None:
            return 1.0
        if self.format.sparsity == "2:4":
            return 0.5
        shape = (self.out_features, self.in_features)
        return sparse.stored(weight, index, self.format, *shape) / self.format.stored(*shape, 1.0)

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
        if plain.index is not None:
            shape = (self.out_features, self.in_features)
            return sparse.expand(plain.weight, plain.scale, zero, plain.index, fmt, *shape)
        return Codes(unpack_bits(plain.weight, fmt.bits, self.in_features), plain.scale, zero)

    def to_layout(self, layout: str | None = None) -> PackedWeight:
        """The same weight in another layout; exact in both directions. None: the one this device computes with.

        Raises:
            ValueError: the layout's name is not one of ``plain``, ``triton``, ``cpu``, ``fbgemm``, ``onednn``,
                ``mma.sp``; or it is ``mma.sp`` and the weight is not 2:4, or ``fbgemm`` or ``onednn`` and this machine
                has none for the weight.
        """
        shape = self.out_features, self.in_features
        target = layout or layouts.native_layout(self.device, self.format, *shape)
        if target not in layouts.LAYOUTS:
            raise ValueError(f"layout {target!r} does not exist; the layouts are: {', '.join(layouts.LAYOUTS)}")
        if target in prepacked.OPERATORS and not prepacked.supports(target, self.format, self.in_features):
            wanted = "w8a8 of at most 65536 in_features, on a CPU with VNNI"
            raise ValueError(f"layout {target!r} is for {wanted}, got {self.format} {shape[0]} x {shape[1]}")
        if self.format.sparsity == "2:4":
            moved = layout24.convert(self.tensors, target, self.format, *shape)
            return replace(self, weight=moved[0], scale=moved[1], zero_point=moved[2], index=moved[3])
        if target == "mma.sp":
            raise ValueError(f"layout 'mma.sp' is for 2:4 weights, got {self.format}")
        if self.index is not None:
            tensors = (self.weight, self.scale, self.index)
            weight, scale, index = sparse_layout.convert(tensors, target, self.format, self.out_features)
            return replace(self, weight=weight, scale=scale, index=index)
        dense = (self.weight, self.scale, self.zero_point)
        dense = layouts.convert(dense, self.layout, target, self.format, *shape)
        return replace(self, weight=dense[0], scale=dense[1], zero_point=dense[2])

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The float weight ``[N, K]`` this stands for, rounded once to ``dtype`` (the scale's)."""
        codes, scale, zero = self.codes()
        return dequantize_codes(codes, scale, zero, self.format, dtype or scale.dtype)


def dequantize_codes(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None, fmt: Format, dtype: torch.dtype = torch.float32
) -> Tensor:
    """``(code - zero_point) * scale`` for uint8 codes ``[N, K]`` and scales ``[N, G]``, rounded to ``dtype`` once.

    Where codes are the bits of e4m3 there is no zero point: that float times the scale. Codes
    that are 16-bit floats are the weights themselves.
    """
    if fmt.number == "float":
        return codes.to(dtype)
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
    if fmt.sparsity:
        weight, scale, index = sparse.compress(codes, fmt)
        return PackedWeight(weight, scale, zero, fmt, n, k, index)
    return PackedWeight(pack_bits(codes.codes, fmt.bits), codes.scale.contiguous(), zero, fmt, n, k)


def patterned(weight: Tensor, fmt: Format, prune: str | None) -> Tensor:
    """The weight, pruned by the method where the format is sparse and one is given.

    Raises:
        ValueError: the format is sparse and the weight does not have its pattern; or an unknown method.
    """
    if fmt.sparsity is None:
        return weight
    if prune is not None:
        return sparse.prune_weight(weight, fmt, prune)
    sparse.check_pattern(weight, fmt)
    return weight


def pack(weight: Tensor, scheme: str | Scheme, layout: str | None = None, *, prune: str | None = None) -> PackedWeight:
    """Quantizes and packs a float weight ``[out_features, in_features]``.

    Args:
        weight: any float dtype, any device.
        scheme: for example ``"w4a16"``.
        layout: ``plain``, ``triton`` or ``cpu``; None is the layout the weight's device computes with.
        prune: how a weight is brought into the pattern of a sparse scheme, for example ``"magnitude"``; None where it
            has the pattern. A dense scheme has none.

    Raises:
        ValueError: unknown scheme, layout or method, a weight that is not a finite float matrix, or one that does not
            have the pattern of a sparse scheme.
    """
    fmt = Scheme.parse(scheme).format
    if weight.dim() == 2:
        weight = patterned(weight, fmt, prune)
    return pack_codes(quantize(weight, fmt), fmt).to_layout(layout)
