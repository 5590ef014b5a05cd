"""The layouts of block-sparse weights that are computed with; 2:4 and unstructured ones stay plain on a CPU.

``triton`` is what the kernel of :mod:`qlinear.kernels.blocks` reads:

- weight: int16 words, a block ``[64, 64]`` contiguous and blocks in the order of the plain layout. ``planar4``
  ``[B, 64, 16]``: word ``i`` holds in nibble ``j`` the code of column ``16*j + i``. ``planar8`` ``[B, 64, 32]``: in
  byte ``j`` that of column ``32*j + i``. ``rows16`` ``[B, 64, 64]``: the bits of the floats.
- scale: ``[B, 64]`` where a group is a row of a block, ``[rows of blocks, 64]`` per channel.
- index: the rows of blocks, those with most blocks first, and then the index of the plain layout.

``cpu`` is what :mod:`qlinear.cpu_blocks` reads. Every ``RUN`` blocks that follow each other in a row of blocks are a
run, if the weight has ``LEAST`` blocks or more; first come the runs and then what is left, singly, both row by row. The
blocks of a run lie side by side as ``[64, 64 * RUN]``, or after each other where a group of scales is a row of a block.

- weight: ``[B, 4096]`` int16 (the bits of the floats) or int8 (values), ``[B, 2048]`` uint8 for int4: of every
  ``SLICE`` blocks the values (signed) of the first half are the low nibbles, those of the second half the high ones.
- scale: ``[B, 64]`` where a group is a row of a block, plain per channel.
- index: the row of blocks of every run, that of every single block, and the column of blocks of each block.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from qlinear.bits import pack_bits, unpack_bits
from qlinear.format import Format
from qlinear.layout import layout_of, pack_planes, unpack_planes
from qlinear.sparse import block_places

#: Blocks of a row that lie side by side in the ``cpu`` layout. 4096 x 4096 in bfloat16 with a fifth of the blocks, 64
#: tokens, two cores of Sapphire Rapids: 4970 us for single blocks, 3870 for pairs, 3170 for fours, 3450 for eights.
RUN = 4
#: Fewer blocks are all single: a second batch of products costs more than it saves (51 blocks, up to 16 tokens: a
#: quarter less time without runs).
LEAST = 256
#: Blocks that are decoded and multiplied at once, whole runs of them; in the ``cpu`` layout their int4 codes share
#: bytes. By 256 the operators take longer to start than to run.
SLICE = 1024

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


def row_scales(scale: Tensor, size: int) -> Tensor:
    """Scales ``[N, 1]`` of rows as ``[rows of blocks, size]``."""
    return F.pad(scale, (0, 0, 0, -len(scale) % size)).view(-1, size)


def _to_triton(tensors: Tensors, fmt: Format, size: int, n: int) -> Tensors:
    weight, scale, index = tensors
    rows = -(-n // size)
    codes = unpack_bits(weight, fmt.bits, size)
    words = codes if fmt.bits == 16 else pack_planes(codes.unflatten(2, (fmt.planes, -1)), fmt.bits)
    if per_channel(fmt):
        scale = row_scales(scale, size)
    order = index[: rows + 1].diff().argsort(descending=True, stable=True).to(torch.int32)
    return words.contiguous(), scale, torch.cat((order, index))


def _from_triton(tensors: Tensors, fmt: Format, size: int, n: int) -> Tensors:
    weight, scale, index = tensors
    codes = weight if fmt.bits == 16 else unpack_planes(weight, fmt.bits).flatten(2)
    scale = scale.view(-1, 1)[:n].contiguous() if per_channel(fmt) else scale
    return pack_bits(codes, fmt.bits), scale, index[-(-n // size) :].contiguous()


def _to_cpu(tensors: Tensors, fmt: Format, size: int, n: int) -> Tensors:
    weight, scale, index = tensors
    rows, columns = block_places(index, -(-n // size))
    starts = index[: -(-n // size) + 1].long()
    place = torch.arange(len(rows), device=rows.device) - starts[rows]
    single = place >= (starts.diff() // RUN * RUN)[rows] if len(rows) >= LEAST else torch.ones_like(rows)
    order, cut = single.to(torch.uint8).argsort(stable=True), int((single == 0).sum())
    rows = rows[order]
    codes = unpack_bits(weight, fmt.bits, size)[order]
    lines = (codes if fmt.group_size else _side_by_side(codes, cut)).flatten(1)
    index = torch.cat((rows[:cut:RUN], rows[cut:], columns[order])).to(torch.int32)
    scale = scale if fmt.group_size is None else scale[order]
    if fmt.bits == 4:
        lines = lines ^ fmt.offset
        return torch.cat([_pack_halves(part) for part in lines.split(SLICE)]), scale, index
    return (lines if fmt.bits == 16 else (lines ^ fmt.offset).view(torch.int8)), scale, index


def _from_cpu(tensors: Tensors, fmt: Format, size: int, n: int) -> Tensors:
    weight, scale, index = tensors
    runs, singles = runs_and_singles(weight, index)
    cut = runs * RUN
    if fmt.bits == 4:
        values = torch.cat([unpack_halves(part) for part in weight.split(SLICE)])
        lines = (values.view(torch.uint8) & 15) ^ fmt.offset
    else:
        lines = weight if fmt.bits == 16 else weight.view(torch.uint8) ^ fmt.offset
    codes = lines.view(-1, size, size)
    codes = codes if fmt.group_size else _apart(codes, cut)
    rows = row_of_each(index[: runs + singles], runs)
    # Runs come before single blocks in every row, as they did in the plain layout.
    order = rows.argsort(stable=True)
    counts = torch.bincount(rows, minlength=-(-n // size))
    plain = torch.cat((F.pad(counts.cumsum(0), (1, 0)), index[runs + singles :][order])).to(torch.int32)
    return pack_bits(codes[order], fmt.bits), scale if fmt.group_size is None else scale[order], plain


def _side_by_side(blocks: Tensor, cut: int) -> Tensor:
    """Blocks ``[B, size, size]`` of which ``cut`` are in runs: of a run first one line of each block."""
    runs = blocks[:cut].unflatten(0, (-1, RUN)).transpose(1, 2)
    return torch.cat((runs.reshape(cut, *blocks.shape[1:]), blocks[cut:]))


def _apart(blocks: Tensor, cut: int) -> Tensor:
    """The inverse of :func:`_side_by_side`."""
    size = blocks.shape[1]
    runs = blocks[:cut].view(-1, size, RUN, size).transpose(1, 2)
    return torch.cat((runs.reshape(cut, size, size), blocks[cut:]))


def runs_and_singles(weight: Tensor, index: Tensor) -> tuple[int, int]:
    """How many runs and how many single blocks a weight in the ``cpu`` layout has."""
    blocks = len(weight)
    runs = (2 * blocks - len(index)) // (RUN - 1)
    return runs, blocks - runs * RUN


def row_of_each(rows: Tensor, runs: int) -> Tensor:
    """The row of blocks of every block, of those of ``runs`` runs and then of single blocks."""
    return torch.cat((rows[:runs].repeat_interleave(RUN), rows[runs:]))


def _pack_halves(codes: Tensor) -> Tensor:
    half = codes.numel() // 2
    flat = codes.flatten()
    return (flat[:half] | (flat[half:] << 4)).view(len(codes), codes.shape[1] // 2)


def unpack_halves(packed: Tensor, out: Tensor | None = None) -> Tensor:
    """The values ``[b, 4096]`` of a slice of an int4 weight in the ``cpu`` layout, int8."""
    values = packed.new_empty(len(packed), 2 * packed.shape[1], dtype=torch.int8) if out is None else out
    low, high = values.view(2, -1)
    signed = packed.flatten().view(torch.int8)
    # Shifts to the right repeat the sign.
    torch.bitwise_left_shift(signed, 4, out=low)
    low.bitwise_right_shift_(4)
    torch.bitwise_right_shift(signed, 4, out=high)
    return values
