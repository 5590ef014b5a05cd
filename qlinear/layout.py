"""The layouts of one packed weight, and the exact conversions between them.

``plain`` is what a checkpoint holds (:mod:`qlinear.bits`). ``triton`` is what the GPU kernels read: tiles of
``TILE_N`` rows by ``BLOCK_K`` columns, each contiguous, N and K padded so that the hot loop needs no mask on
weights:

- ``planar4``: int16 words ``[N/64, K/128, 64, 32]``; word ``i`` holds in nibble ``j`` the code of ``k = 128*block +
  32*j + i``.
- ``planar8``: int16 words ``[N/64, K/128, 64, 64]``; word ``i`` holds in byte ``j`` the code (value + 128) of ``k =
  128*block + 64*j + i``.
- ``nibbles8``: int8 words ``[N/64, K/128, 64, 64]`` for int8 x int8 products; word ``i`` holds in its lower nibble the
  value (signed) of ``k = 128*block + i``, in its upper one that of ``k = 128*block + 64 + i``.
- ``rows8``: int8 values ``[N/64, K/128, 64, 128]`` in natural order, for int8 x int8 products.
- ``planar_e4m3``, ``rows_e4m3``: ``planar8`` and ``rows8`` with the bits of e4m3 in the place of the byte.
- scales ``[N/64, G, 64]``, G counted on the padded K (1 per channel); where the format is asymmetric ``[N/64, G/C,
  64, 2 * C]`` holds for a row scale and zero point (exact in 16 bit) of each of the C groups of a block in turn, so
  that one load brings all of them. Padded rows and groups have scale 0.

``cpu`` is what PyTorch's packed CPU operators read: :mod:`qlinear.cpu_layout`; ``fbgemm`` and ``onednn`` are what two
libraries make of w8a8 there: :mod:`qlinear.prepacked`. 2:4 weights have a ``triton`` layout of their own, and another
one, ``mma.sp``: :mod:`qlinear.layout24`.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from qlinear import cpu_layout, prepacked
from qlinear.bits import pack_bits, unpack_bits
from qlinear.format import BLOCK_K, TILE_N, Format

LAYOUTS = ("plain", "triton", "cpu", *prepacked.OPERATORS, "mma.sp")

#: weight, scale, zero_point
Tensors = tuple[Tensor, Tensor, Tensor | None]


def layout_of(weight: Tensor) -> str:
    """The layout of a packed weight, told by the tensor alone."""
    if prepacked.is_made(weight):
        return prepacked.layout_of(weight)
    if weight.dtype == torch.int32:
        # Of 2:4 weights the kernels read 32-bit words.
        return {4: "triton", 5: "mma.sp"}.get(weight.dim(), "plain")
    return "triton" if weight.dim() > 2 else "cpu"


def native_layout(device: torch.device, fmt: Format | None = None, n: int = 0, k: int = 0) -> str:
    """The layout the matmul of this device reads fastest: of a weight ``[n, k]`` in a format."""
    if device.type == "cpu" and fmt is not None and (made := prepacked.native(fmt, n, k)):
        return made
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "plain"
    return {"cuda": "triton", "cpu": "cpu"}.get(device.type, "plain")


def convert(tensors: Tensors, source: str, target: str, fmt: Format, n: int, k: int) -> Tensors:
    """Converts between two layouts, through ``plain``."""
    if source == target:
        return tensors
    if source == "plain" and fmt.number == "e4m3":
        _refuse_nan(tensors[0])
    if source == "triton":
        tensors = _from_triton(tensors, fmt, n, k)
    elif source == "cpu" or source in prepacked.OPERATORS:
        tensors = cpu_layout.to_plain(tensors, fmt, n, k)
    if target in prepacked.OPERATORS:
        return cpu_layout.to_prepacked(target, tensors, fmt, n, k)
    made = {"triton": _to_triton, "cpu": cpu_layout.from_plain}.get(target)
    return tensors if made is None else made(tensors, fmt, n, k)


def _refuse_nan(words: Tensor) -> None:
    """What multiplies moves the bits of e4m3 to a wider float, which has more numbers in the place of its NaN."""
    count = int((words.view(torch.uint8).bitwise_and(0x7F) == 0x7F).sum())
    if count:
        raise ValueError(f"the weight holds NaN {count} times; a quantized weight is finite")


def _pad(t: Tensor, rows: int, columns: int, value: int = 0) -> Tensor:
    return torch.nn.functional.pad(t, (0, columns - t.shape[1], 0, rows - t.shape[0]), value=value)


def _padded(n: int, k: int) -> tuple[int, int]:
    return -(-n // TILE_N) * TILE_N, -(-k // BLOCK_K) * BLOCK_K


def _to_triton(tensors: Tensors, fmt: Format, n: int, k: int) -> Tensors:
    words, scale, zero = tensors
    rows, columns = _padded(n, k)
    # A padded column multiplies a masked activation (0), so any finite weight is right there; `offset` makes it 0
    # as well.
    codes = _pad(unpack_bits(words, fmt.bits, k), rows, columns, fmt.offset)
    tiles = codes.view(rows // TILE_N, TILE_N, columns // BLOCK_K, BLOCK_K).transpose(1, 2)
    if fmt.packing.startswith("rows"):
        weight = (tiles.to(torch.int16) - fmt.offset).to(torch.int8).contiguous()
    elif fmt.packing == "nibbles8":
        # A signed nibble is its code with the highest bit turned.
        low, high = (tiles ^ fmt.offset).unflatten(-1, (2, -1)).unbind(-2)
        weight = (low | (high << 4)).contiguous().view(torch.int8)
    else:
        planes = tiles.unflatten(-1, (fmt.planes, -1))
        weight = pack_planes(planes, fmt.bits)
    return weight, *tile_scales(scale, zero, fmt, n, k)


def tile_scales(scale: Tensor, zero: Tensor | None, fmt: Format, n: int, k: int) -> tuple[Tensor, Tensor | None]:
    """The scales, and zero points beside them, of the ``triton`` layout; what is left of the packed zero points."""
    if fmt.number == "float":
        return scale, None
    rows, columns = _padded(n, k)
    groups = fmt.groups(columns)
    scales = _tile_groups(scale, rows, groups)
    if zero is not None:
        zeros = unpack_bits(zero.t(), fmt.bits, n).t().to(scale.dtype)
        pairs = torch.stack((scales, _tile_groups(zeros, rows, groups)), dim=-1)
        # [tiles, blocks, C, 64, 2] -> [tiles, blocks, 64, C, 2]
        scales = pairs.unflatten(1, (-1, fmt.groups_per_block)).transpose(2, 3).flatten(3)
    return scales.contiguous(), None if zero is None else zero.new_empty(0)


def _tile_groups(scale: Tensor, rows: int, groups: int) -> Tensor:
    return _pad(scale, rows, groups).view(rows // TILE_N, TILE_N, groups).transpose(1, 2)


def pack_planes(planes: Tensor, bits: int) -> Tensor:
    """Codes ``[..., P, W]`` into int16 words ``[..., W]``: plane ``j`` goes to bits ``[j*bits, (j+1)*bits)``."""
    words = planes[..., 0, :].to(torch.int32)
    for j in range(1, planes.shape[-2]):
        words = words | (planes[..., j, :].to(torch.int32) << (bits * j))
    return words.to(torch.int16).contiguous()


def unpack_planes(words: Tensor, bits: int) -> Tensor:
    """int16 words ``[..., W]`` into uint8 codes ``[..., 16/bits, W]``: the inverse of :func:`pack_planes`."""
    wide, mask = words.to(torch.int32), (1 << bits) - 1
    return torch.stack([((wide >> shift) & mask).to(torch.uint8) for shift in range(0, 16, bits)], dim=-2)


def _from_triton(tensors: Tensors, fmt: Format, n: int, k: int) -> Tensors:
    weight, scale, zero = tensors
    if fmt.packing.startswith("rows"):
        tiles = (weight.to(torch.int16) + fmt.offset).to(torch.uint8)
    elif fmt.packing == "nibbles8":
        nibbles = weight.view(torch.uint8)
        tiles = torch.cat((nibbles & 15, nibbles >> 4), dim=-1) ^ fmt.offset
    else:
        tiles = unpack_planes(weight, fmt.bits).flatten(-2)
    codes = tiles.transpose(1, 2).flatten(2).flatten(0, 1)
    words = pack_bits(codes[:n, :k], fmt.bits)
    return words, *untile_scales(scale, zero, fmt, n, k)


def untile_scales(scale: Tensor, zero: Tensor | None, fmt: Format, n: int, k: int) -> tuple[Tensor, Tensor | None]:
    """The inverse of :func:`tile_scales`."""
    if fmt.number == "float":
        return scale, None
    if zero is not None:
        pairs = scale.unflatten(3, (fmt.groups_per_block, 2)).transpose(2, 3).flatten(1, 2)
        zeros = _untile_groups(pairs[..., 1], fmt, n, k).to(torch.uint8)
        zero, scale = pack_bits(zeros.t(), fmt.bits).t().contiguous(), pairs[..., 0]
    return _untile_groups(scale, fmt, n, k), zero


def _untile_groups(scale: Tensor, fmt: Format, n: int, k: int) -> Tensor:
    return scale.transpose(1, 2).flatten(0, 1)[:n, : fmt.groups(k)].contiguous()
