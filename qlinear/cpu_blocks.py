"""The product of a block-sparse weight on a CPU, in the ``cpu`` layout of :mod:`qlinear.sparse_layout`.

Runs of blocks are the left operands of one batch of products, single blocks those of another: they are multiplied as
they lie, by the columns of the tokens that they need, and what belongs to a row of blocks is added in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from qlinear.format import Format
from qlinear.packing import PackedWeight
from qlinear.sparse_layout import RUN, runs_and_singles, slices, unpack_halves

#: Tokens that are multiplied at once: what is copied for them stays in the cache (512 tokens, 4096 x 4096 in bfloat16
#: with a fifth of the blocks: 28.7 ms by 64 and 33.5 ms by 128).
_TOKENS = 64


class _Piece(NamedTuple):
    """Some runs, or some single blocks."""

    weight: Tensor
    #: Blocks that lie side by side.
    width: int
    #: The row of blocks of each run, and the column of blocks of each block.
    rows: Tensor
    columns: Tensor
    #: Of the codes by 64, where a group is a row of a block.
    scale: Tensor | None


class _Scratch:
    """Memory that the products of a call share: new memory for each costs as much as filling it."""

    def __init__(self) -> None:
        self._held: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, use: str, dtype: torch.dtype, *shape: int) -> Tensor:
        """Memory ``shape``, until it is taken for the same use again."""
        held = self._held.get((use, dtype))
        if held is None or held.numel() < prod(shape):
            held = self._held[use, dtype] = torch.empty(prod(shape), dtype=dtype)
        return held[: prod(shape)].view(shape)


def matmul(x: Tensor, packed: PackedWeight, size: int) -> Tensor:
    """``x @ W.T`` for x ``[M, K]`` and a weight of blocks ``size`` in the ``cpu`` layout: ``[M, N]`` in x's dtype."""
    fmt, n = packed.format, packed.out_features
    rows, scratch = -(-n // size), _Scratch()
    parts = [(_token_blocks(part, size), torch.zeros(rows, size, len(part))) for part in x.split(_TOKENS)]
    per_channel = fmt.number == "int" and fmt.group_size is None
    # float16 cannot hold a sum of codes that are not scaled.
    early = per_channel and x.dtype == torch.float16
    for piece in _pieces(packed):
        values = _decode(piece, size, fmt, x.dtype, packed.scale.dtype, scratch)
        if early:
            values.mul_(_row_scales(packed.scale, size)[piece.rows])
        for tokens, y in parts:
            y.index_add_(0, piece.rows, _products(values, tokens, piece.columns, scratch))
    if per_channel and not early:
        for _, y in parts:
            y.mul_(_row_scales(packed.scale, size))
    out = x.new_empty(len(x), n)
    for mine, (_, y) in zip(out.split(_TOKENS), parts, strict=True):
        mine.copy_(y.flatten(0, 1)[:n].t())
    return out


def _pieces(packed: PackedWeight) -> Iterator[_Piece]:
    weight, scale, index, fmt = packed.weight, packed.scale, packed.index, packed.format
    assert index is not None
    # index_add_ is nearly twice as fast as with 32 bits.
    index = index.long()
    runs, singles = runs_and_singles(weight, index)
    columns = index[runs + singles :]
    for start, end, width in slices(runs, singles):
        place = start // RUN if width == RUN else start - runs * (RUN - 1)
        rows = index[place : place + (end - start) // width]
        groups = None if fmt.group_size is None else scale[start:end]
        yield _Piece(weight[start:end], width, rows, columns[start:end], groups)


def _decode(
    piece: _Piece, size: int, fmt: Format, dtype: torch.dtype, stored: torch.dtype, scratch: _Scratch
) -> Tensor:
    """The weights ``[runs, size, width * size]``, scaled where a group is a row of a block."""
    codes = piece.weight.view(stored) if fmt.number == "float" else piece.weight
    if fmt.bits == 4:
        held = scratch.take("codes", torch.uint8, 2 * codes.numel())
        codes = unpack_halves(codes, held).view(torch.int8).sub_(fmt.offset)
    codes = codes.view(-1, size, piece.width * size)
    if codes.dtype == dtype:
        return codes
    values = scratch.take("values", dtype, *codes.shape).copy_(codes)
    if piece.scale is not None:
        values.view(-1, size).mul_(piece.scale.reshape(-1, 1))
    return values


def _products(values: Tensor, tokens: Tensor, columns: Tensor, scratch: _Scratch) -> Tensor:
    """``values @ tokens`` in float32, ``[runs, size, M]``."""
    runs, size, length = values.shape
    gathered = scratch.take("tokens", tokens.dtype, len(columns), tokens.shape[1])
    torch.index_select(tokens, 0, columns, out=gathered)
    gathered = gathered.view(runs, length, -1)
    product = scratch.take("product", tokens.dtype, runs, size, gathered.shape[2])
    torch.bmm(values, gathered, out=product)
    if product.dtype == torch.float32:
        return product
    return scratch.take("wide", torch.float32, *product.shape).copy_(product)


def _row_scales(scale: Tensor, size: int) -> Tensor:
    """Scales ``[N, 1]`` of rows as ``[rows of blocks, size, 1]``."""
    return F.pad(scale, (0, 0, 0, -len(scale) % size)).view(-1, size, 1)


def _token_blocks(x: Tensor, size: int) -> Tensor:
    """x ``[M, K]`` as ``[K/size, size * M]``, the tokens' columns together."""
    spare = -x.shape[1] % size
    blocks = (F.pad(x, (0, spare)) if spare else x).reshape(x.shape[0], -1, size)
    # In two steps: numbers of a column lie a row of x apart, which a cache holds badly (336 instead of 625 us for 128
    # tokens).
    return blocks.transpose(0, 1).contiguous().transpose(1, 2).flatten(1)
