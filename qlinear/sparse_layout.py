"""The ``triton`` layout of block-sparse weights: what the kernel of :mod:`qlinear.kernels.blocks` reads.

- weight: int16 words, a block ``[64, 64]`` contiguous and blocks in the order of the plain layout. ``planar4``
  ``[B, 64, 16]``: word ``i`` holds in nibble ``j`` the code of column ``16*j + i``. ``planar8`` ``[B, 64, 32]``: in
  byte ``j`` that of column ``32*j + i``. ``rows16`` ``[B, 64, 64]``: the bits of the floats.
- scale: ``[B, 64]`` where a group is a row of a block, ``[rows of blocks, 64]`` per channel.
- index: the rows of blocks, those with most blocks first, and then the index of the plain layout.

2:4 and unstructured weights stay plain, as blocks do on a CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from qlinear.bits import pack_bits, unpack_bits
from qlinear.format import Format
from qlinear.layout import layout_of, pack_planes, unpack_planes


def convert(weight: Tensor, scale: Tensor, index: Tensor, target: str, fmt: Format, n: int) -> tuple[Tensor, ...]:
    """weight, scale and index in the layout ``target``, where the format has it; else in the plain one."""
    source, target = layout_of(weight), "triton" if target == "triton" and fmt.block else "plain"
    if source == target or fmt.block is None:
        return weight, scale, index
    per_channel = fmt.group_size is None and fmt.number == "int"
    rows = -(-n // fmt.block)
    if target == "triton":
        codes = unpack_bits(weight, fmt.bits, fmt.block)
        words = codes if fmt.bits == 16 else pack_planes(codes.unflatten(2, (fmt.planes, -1)), fmt.bits)
        if per_channel:
            scale = F.pad(scale, (0, 0, 0, -n % fmt.block)).view(rows, fmt.block)
        order = index[: rows + 1].diff().argsort(descending=True, stable=True).to(torch.int32)
        return words.contiguous(), scale, torch.cat((order, index))
    codes = weight if fmt.bits == 16 else unpack_planes(weight, fmt.bits).flatten(2)
    scale = scale.view(-1, 1)[:n].contiguous() if per_channel else scale
    return pack_bits(codes, fmt.bits), scale, index[rows:].contiguous()
