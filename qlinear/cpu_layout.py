"""The ``cpu`` layout: what PyTorch's packed CPU operators read.

- int4 (scales stored in bfloat16): ``weight`` uint8 as ``aten::_convert_weight_to_int4pack_for_cpu`` orders it,
  ``scale`` bfloat16 ``[K/g, N, 2]`` holding scale and ``(8 - zero_point) * scale`` as
  ``aten::_weight_int4pack_mm_for_cpu`` wants. N is padded to a multiple of 16. A group that does not divide K
  becomes the largest smaller one that does, with repeated scales; where none does, K is padded to a multiple of 32.
- int4 with float16 or float32 scales (or a scale of zero beside a zero point): stays plain. The packed operator
  would round the scales, and has no fast path there.
- e4m3: ``weight`` int8 ``[N, K]``, the bits of the floats.
- int8: ``weight`` int8 ``[N, K]`` signed; for w8a16 K is padded to a multiple of 32, because
  ``aten::_weight_int8pack_mm`` reads past the end of a row in bfloat16 otherwise.

``fbgemm`` and ``onednn``, for w8a8: orders that those libraries keep to themselves, :mod:`qlinear.prepacked`.

The order of the int4 bytes differs between AVX2 and AVX-512 and has no inverse operator. :func:`int4_tiles` finds the
order by packing a probe; nothing in this layout is ever written to disk.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from qlinear import prepacked
from qlinear.bits import pack_bits, unpack_bits, unpack_nibbles
from qlinear.format import Format

Tensors = tuple[Tensor, Tensor, Tensor | None]

#: Group sizes of the packed int4 operator.
_OPERATOR_GROUPS = (256, 128, 64, 32)


def from_plain(tensors: Tensors, fmt: Format, n: int, k: int) -> Tensors:
    words, scale, zero = tensors
    if fmt.bits == 8:
        codes = unpack_bits(words, 8, k)
        padded = fmt.group_size is None and not fmt.quantized_activations and fmt.number == "int"
        columns = -(-k // 32) * 32 if padded else k
        values = (codes.to(torch.int16) - fmt.offset).to(torch.int8)
        return torch.nn.functional.pad(values, (0, columns - k)), scale, zero
    if scale.dtype != torch.bfloat16:
        return tensors
    group, columns, rows = _operator_group(fmt, k), -(-k // 32) * 32, -(-n // 16) * 16
    codes = torch.nn.functional.pad(unpack_bits(words, 4, k), (0, columns - k, 0, rows - n), value=fmt.offset)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32), 1)
    zeros = torch.full_like(scale, fmt.offset) if zero is None else unpack_bits(zero.t(), 4, n).t().to(scale.dtype)
    # (8 - zero_point) has few enough bits for bfloat16; its product with the scale is rounded once.
    both = torch.stack((scale, (fmt.offset - zeros) * scale), dim=-1)
    if zero is not None and not torch.equal(zero_points(both), zeros.float()):
        return tensors  # a scale of zero, or one next to overflow, would lose its zero point
    index = torch.arange(0, columns, group, device=scale.device) // (fmt.group_size or columns)
    both = torch.nn.functional.pad(both[:, index], (0, 0, 0, 0, 0, rows - n))
    return packed, both.transpose(0, 1).contiguous(), None if zero is None else zero.new_empty(0)


def to_prepacked(layout: str, tensors: Tensors, fmt: Format, n: int, k: int) -> Tensors:
    """A layout of :mod:`qlinear.prepacked` of plain tensors."""
    values, scale, zero = from_plain(tensors, fmt, n, k)
    return prepacked.make(layout, values, scale), scale, zero


def to_plain(tensors: Tensors, fmt: Format, n: int, k: int) -> Tensors:
    weight, scale, zero = tensors
    if fmt.bits == 8:
        weight = prepacked.values_of(weight) if prepacked.is_made(weight) else weight
        codes = (weight[:, :k].to(torch.int16) + fmt.offset).to(torch.uint8)
        return pack_bits(codes, 8), scale, zero
    order, tiles = zip(*int4_tiles(weight, 2 * weight.numel()), strict=True)
    codes = torch.cat([tile.t() for tile in tiles])[torch.cat(order).argsort()].view(torch.uint8) + fmt.offset
    group = _columns(weight) // scale.shape[0]
    every = 1 if fmt.group_size is None else fmt.group_size // group
    both = scale.transpose(0, 1)[:n, ::every][:, : fmt.groups(k)]
    stored = both[..., 0].contiguous()
    if zero is not None:
        zeros = zero_points(both)
        zero = pack_bits(zeros.to(torch.uint8).t(), 4).t().contiguous()
    return pack_bits(codes[:n, :k].contiguous(), 4), stored, zero


def zero_points(scale_and_zero: Tensor) -> Tensor:
    """The integer zero points behind ``[..., 2]`` pairs of scale and ``(8 - zero_point) * scale``; exact."""
    scale, shifted = scale_and_zero.float().unbind(-1)
    return 8 - torch.where(scale == 0, 0, shifted / scale).round()


def _operator_group(fmt: Format, k: int) -> int:
    """The operator's group size for a row of k weights: the largest allowed that divides both K and our group."""
    columns = -(-k // 32) * 32
    own = fmt.group_size or columns
    return next(g for g in _OPERATOR_GROUPS if columns % g == 0 and own % g == 0)


def _columns(packed: Tensor) -> int:
    """Columns of a packed int4 weight, its padding included (the operator stores ``[N, K/2]`` bytes)."""
    return packed.shape[1] * 2


def int4_tiles(packed: Tensor, most: int) -> Iterator[tuple[Tensor, Tensor]]:
    """A packed int4 weight, about ``most`` weights at a time: some of its rows, and ``code - 8`` int8 ``[K, rows]``.

    The operator keeps rows in blocks, column by column; what is done to a tile runs over the rows of many blocks.
    """
    flat, columns, start = packed.view(-1), _columns(packed), 0
    while start < len(packed):
        block = _block_order(64)
        whole = (len(packed) - start) // len(block)
        count = min(whole, max(1, most // (columns * len(block)))) if whole else 1
        block = block if whole else _block_order(len(packed) - start)
        end = start + count * len(block)
        rows = torch.arange(start, end, len(block))[:, None] + block
        blocks = flat[start * columns // 2 : end * columns // 2].view(count, columns, -1)
        yield rows.view(-1, 2).t().reshape(-1), _signed_nibbles(blocks.transpose(0, 1).reshape(columns, -1))
        start = end


def _signed_nibbles(packed: Tensor) -> Tensor:
    """Bytes ``[K, L]``, two codes each, as ``code - 8``, int8 ``[K, 2L]``: first the low nibbles of a row."""
    values = torch.empty(len(packed), 2, packed.shape[1], dtype=torch.int8)
    low, high = values.unbind(1)
    # The codes' offset is their highest bit: without it they are signed, and shifts to the right repeat the sign.
    signed = (packed ^ 0x88).view(torch.int8)
    torch.bitwise_left_shift(signed, 4, out=low)
    low.bitwise_right_shift_(4)
    torch.bitwise_right_shift(signed, 4, out=high)
    return values.view(len(packed), -1)


@functools.cache
def pairs_halves() -> bool:
    """Whether the int4 operator keeps rows ``i`` and ``i + 32`` of 64 in byte ``i``, as it does with AVX-512."""
    return torch.equal(_block_order(64), torch.arange(64).view(2, 32).t().flatten())


@functools.cache
def _block_order(rows: int) -> Tensor:
    """Packs a probe whose codes spell the row number, a hexadecimal digit at a time, and reads its first column."""
    number = torch.arange(rows, dtype=torch.int32)
    column = torch.arange(32, dtype=torch.int32)
    digits = []
    for probe in (number[:, None].expand(rows, 32), (number >> 4)[:, None].expand(rows, 32), column.expand(rows, 32)):
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu((probe & 15).contiguous(), 1).view(-1)
        digits.append(unpack_nibbles(packed).long())
    length = int((digits[2] != 0).nonzero()[0]) if bool((digits[2] != 0).any()) else rows
    return (digits[0] + 16 * digits[1])[:length]
