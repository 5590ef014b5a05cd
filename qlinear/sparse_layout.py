"""The layouts of block-sparse weights that are computed with; 2:4 and unstructured ones stay plain on a CPU.

``triton`` is what the kernel of :mod:`qlinear.kernels.blocks` reads:

- weight: int16 words, a block ``[64, 64]`` contiguous and blocks in the order of the plain layout. ``planar4``
  ``[B, 64, 16]``: word ``i`` holds in nibble ``j`` the code of column ``16*j + i``. ``planar8`` ``[B, 64, 32]``: in
  byte ``j`` that of column ``32*j + i``. ``rows16`` ``[B, 64, 64]``: the bits of the floats.
- scale: ``[B, 64]`` where a group is a row of a block, ``[rows of blocks, 64]`` per channel.
- index: ``[3*R + 1 + 2*B]``. The R rows of blocks are ranked, those with most blocks first: ``order [R]``, which row it
  is; ``starts [R]``, where its blocks begin; ``before [R+1]``, how many blocks the ranks before it have, and last all;
  ``ranks [B]``, the rank of each block, counted by rank. Then the columns of the plain layout, in its own order.

``cpu`` is what :mod:`qlinear.cpu_blocks` reads: the blocks of the plain layout, in its order and with its index and
scales, but transposed, so that the weights of one column follow each other:

- weight: ``[B, 4096]`` int16 (the bits of the floats) or int8 (values). For int4 ``[B, 2048]`` uint8: byte ``i`` of the
  32 of a column has the code of row ``i`` as low nibble, that of row ``i + 32`` as high one. So
  ``aten::_weight_int4pack_mm_for_cpu`` has them where it computes with AVX-512.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from qlinear.bits import pack_bits, unpack_bits
from qlinear.format import Format
from qlinear.layout import layout_of, pack_planes, unpack_planes

#: weight, scale, index
Tensors = tuple[Tensor, Tensor, Tensor]


def convert(tensors: Tensors, target: str, fmt: Format, n: int) -> Tensors:
    """weight, scale and index in the layout ``target``, where the format has it; else in the plain one."""
    source = layout_of(tensors[0])
    target = target if fmt.block else "plain"
    if source == target or fmt.block is None:
        return tensors
    if source != "plain":
        tensors = (_from_triton if source == "triton" else _from_cpu)(tensors, fmt, fmt.block, n)
    if target == "plain":
        return tensors
    return (_to_triton if target == "triton" else _to_cpu)(tensors, fmt, fmt.block, n)


def per_channel(fmt: Format) -> bool:
    """Whether a scale belongs to a whole row of the weight."""
    return fmt.group_size is None and fmt.number == "int"


def _to_triton(tensors: Tensors, fmt: Format, size: int, n: int) -> Tensors:
    weight, scale, index = tensors
    rows = -(-n // size)
    codes = unpack_bits(weight, fmt.bits, size)
    words = codes if fmt.bits == 16 else pack_planes(codes.unflatten(2, (fmt.planes, -1)), fmt.bits)
    if per_channel(fmt):
        scale = F.pad(scale, (0, 0, 0, -n % size)).view(rows, size)
    return words.contiguous(), scale, longest_first(index, rows)


def longest_first(index: Tensor, rows: int) -> Tensor:
    """The index of the layout ``triton`` from that of the plain one."""
    starts, columns = index.split((rows + 1, len(index) - rows - 1))
    counts = starts.diff()
    order = counts.argsort(descending=True, stable=True)
    counts = counts[order]
    before = F.pad(counts.cumsum(0), (1, 0))
    ranks = torch.arange(rows, device=index.device).repeat_interleave(counts, output_size=len(columns))
    return torch.cat((order, starts[order], before, ranks, columns)).to(torch.int32)


def _from_triton(tensors: Tensors, fmt: Format, size: int, n: int) -> Tensors:
    weight, scale, index = tensors
    rows, count = -(-n // size), len(weight)
    codes = weight if fmt.bits == 16 else unpack_planes(weight, fmt.bits).flatten(2)
    scale = scale.view(-1, 1)[:n].contiguous() if per_channel(fmt) else scale
    order, starts, before, _, columns = index.split((rows, rows, rows + 1, count, count))
    return pack_bits(codes, fmt.bits), scale, torch.cat((starts[order.argsort()], before[-1:], columns))


def _to_cpu(tensors: Tensors, fmt: Format, size: int, n: int) -> Tensors:
    weight, scale, index = tensors
    codes = unpack_bits(weight, fmt.bits, size).transpose(1, 2)
    if fmt.bits == 16:
        return codes.flatten(1), scale, index
    if fmt.bits == 8:
        return (codes ^ fmt.offset).flatten(1).view(torch.int8), scale, index
    low, high = codes.chunk(2, dim=2)
    return (low | (high << 4)).flatten(1), scale, index


def _from_cpu(tensors: Tensors, fmt: Format, size: int, n: int) -> Tensors:
    weight, scale, index = tensors
    if fmt.bits == 16:
        codes = weight
    elif fmt.bits == 8:
        codes = weight.view(torch.uint8) ^ fmt.offset
    else:
        packed = weight.view(-1, size, size // 2)
        codes = torch.cat((packed & 15, packed >> 4), dim=2)
    return pack_bits(codes.view(-1, size, size).transpose(1, 2), fmt.bits), scale, index
