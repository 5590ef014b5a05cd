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
#: Most tokens for which the scales of groups go on the products of single blocks and not on the weights of runs. int4
#: as above, in us: one token 2970 and 3730, 16 tokens 4570 and 5100, 32 tokens 5770 and 5790, 64 tokens 9360 and 7890.
LATE_TOKENS = 16


class _Piece(NamedTuple):
    """Some runs, or some single blocks."""

    weight: Tensor
    #: Blocks that lie side by side.
    width: int
    #: The row of blocks of each run, and the column of blocks of each block.
    rows: Tensor
    columns: Tensor
    #: ``[blocks, 64]`` where a group is a row of a block.
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
    early = x.dtype == torch.float16
    late = fmt.group_size is not None and len(x) <= LATE_TOKENS and not early
    for piece in _pieces(packed):
        values = _decode(piece, size, fmt, x.dtype, packed.scale.dtype, scratch, apart=late)
        if early and per_channel:
            values.mul_(_row_scales(packed.scale, size)[piece.rows])
        places = piece.rows.repeat_interleave(piece.width) if late else piece.rows
        for tokens, y in parts:
            y.index_add_(0, places, _products(values, tokens, piece.columns, piece.scale if late else None, scratch))
    if per_channel and not early:
        for _, y in parts:
            y.mul_(_row_scales(packed.scale, size))
    out = x.new_empty(len(x), rows, size)
    for mine, (_, y) in zip(out.split(_TOKENS), parts, strict=True):
        # Rounded first: half as many bytes change places (333 and 249 us for 64 tokens).
        mine.copy_(y.to(x.dtype).permute(2, 0, 1))
    return out.flatten(1)[:, :n].contiguous()


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
    piece: _Piece, size: int, fmt: Format, dtype: torch.dtype, stored: torch.dtype, scratch: _Scratch, apart: bool
) -> Tensor:
    """The weights ``[runs, size, width * size]``; ``apart`` as blocks ``[blocks, size, size]`` without their scales."""
    held, width = piece.weight.view(stored) if fmt.number == "float" else piece.weight, piece.width
    if fmt.bits == 4:
        held = unpack_halves(held, scratch.take("codes", torch.int8, 2 * held.numel()))
    if held.dtype == dtype:
        return held.view(-1, size, width * size)
    if apart or piece.scale is None:
        held = held.view(-1, size, size if apart else width * size)
        return scratch.take("values", dtype, *held.shape).copy_(held)
    values = scratch.take("values", dtype, len(held) // (width * size * size), size, width, size)
    values.copy_(held.view(-1, width, size, size).transpose(1, 2))
    return values.mul_(piece.scale.view(-1, width, size).transpose(1, 2).unsqueeze(-1)).flatten(2)


def _products(values: Tensor, tokens: Tensor, columns: Tensor, scale: Tensor | None, scratch: _Scratch) -> Tensor:
    """``values @ tokens`` in float32 ``[runs, size, M]``, times scales ``[runs, size]`` where there are any."""
    runs, size, length = values.shape
    gathered = scratch.take("tokens", tokens.dtype, len(columns), tokens.shape[1])
    torch.index_select(tokens, 0, columns, out=gathered)
    gathered = gathered.view(runs, length, -1)
    product = scratch.take("product", tokens.dtype, runs, size, gathered.shape[2])
    torch.bmm(values, gathered, out=product)
    if product.dtype != torch.float32:
        # Converted first: a product of both dtypes takes twice as long.
        product = scratch.take("wide", torch.float32, *product.shape).copy_(product)
    return product if scale is None else product.mul_(scale.float().unsqueeze(-1))


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
