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

from qlinear.packing import PackedWeight
from qlinear.sparse_layout import (
    RUN,
    SLICE,
    per_channel,
    row_of_each,
    row_scales,
    runs_and_singles,
    unpack_halves,
)

#: Tokens that are multiplied at once: what is copied for them stays in the cache (512 tokens, 4096 x 4096 in bfloat16
#: with a fifth of the blocks: 28.7 ms by 64 and 33.5 ms by 128).
_TOKENS = 64
#: Most tokens for which the scales of groups go on the products of single blocks and not on the weights of runs. int4
#: as above, in us: one token 2970 and 3730, 16 tokens 4570 and 5100, 32 tokens 5770 and 5790, 64 tokens 9360 and 7890.
LATE_TOKENS = 16


class _Piece(NamedTuple):
    """Some blocks, ready to be multiplied."""

    #: ``[batch, size, length]``: runs, single blocks.
    operands: list[Tensor]
    #: The row of blocks of each, one operand after the other, and the column of blocks of every block.
    rows: Tensor
    columns: Tensor
    #: What the products ``[batch of all, size, 1]`` are still to be multiplied by.
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

    def converted(self, use: str, t: Tensor, dtype: torch.dtype) -> Tensor:
        """``t`` itself where it has the dtype, or a copy in it."""
        return t if t.dtype == dtype else self.take(use, dtype, *t.shape).copy_(t)


def matmul(x: Tensor, packed: PackedWeight, size: int) -> Tensor:
    """``x @ W.T`` for x ``[M, K]`` and a weight of blocks ``size`` in the ``cpu`` layout: ``[M, N]`` in x's dtype."""
    fmt, n, scratch = packed.format, packed.out_features, _Scratch()
    parts = [(_token_blocks(part, size), torch.zeros(-(-n // size), size, len(part))) for part in x.split(_TOKENS)]
    by_row = row_scales(packed.scale, size).unsqueeze(-1) if per_channel(fmt) else None
    # float16 cannot hold a sum of codes that are not scaled.
    early = x.dtype == torch.float16
    for piece in _pieces(packed, size, x.dtype, scratch, late=len(x) <= LATE_TOKENS and not early):
        if by_row is not None and early:
            its = by_row[piece.rows].split([len(operand) for operand in piece.operands])
            for operand, scale in zip(piece.operands, its, strict=True):
                operand.mul_(scale)
        for tokens, y in parts:
            product = _products(piece.operands, tokens, piece.columns, scratch)
            y.index_add_(0, piece.rows, product if piece.scale is None else product.mul_(piece.scale))
    out = x.new_empty(len(x), -(-n // size), size)
    for mine, (_, y) in zip(out.split(_TOKENS), parts, strict=True):
        if by_row is not None and not early:
            y.mul_(by_row)
        # Rounded first: half as many bytes change places (333 and 249 us for 64 tokens).
        mine.copy_(y.to(x.dtype).permute(2, 0, 1))
    return out.flatten(1)[:, :n].contiguous()


def _pieces(packed: PackedWeight, size: int, dtype: torch.dtype, scratch: _Scratch, late: bool) -> Iterator[_Piece]:
    """The weight by ``SLICE`` in ``dtype``. Scales of groups are in the operands, or ``late`` beside single blocks."""
    weight, index, grouped = packed.weight, packed.index, packed.format.group_size is not None
    assert index is not None
    # index_add_ is nearly twice as fast as with 32 bits.
    index = index.long()
    runs, singles = runs_and_singles(weight, index)
    for start in range(0, len(weight), SLICE):
        blocks = slice(start, min(start + SLICE, len(weight)))
        held, columns = _held(packed, blocks, scratch), index[runs + singles :][blocks]
        in_runs = min(max(runs * RUN - start, 0), len(held))
        first = start // RUN if in_runs else start - runs * (RUN - 1)
        rows = index[first : first + len(held) - in_runs // RUN * (RUN - 1)]
        scale = None
        if grouped and not late:
            values = _scaled(held.view(-1, size, size), packed.scale[blocks], in_runs, dtype, scratch)
        else:
            values = scratch.converted("values", held, dtype)
        if grouped and late:
            # A scale belongs to one block: runs are taken apart.
            rows, in_runs = row_of_each(rows, in_runs // RUN), 0
            scale = packed.scale[blocks].unsqueeze(-1).float()
        operands = [values[:in_runs].view(-1, size, RUN * size), values[in_runs:].view(-1, size, size)]
        yield _Piece([operand for operand in operands if len(operand)], rows, columns, scale)


def _held(packed: PackedWeight, blocks: slice, scratch: _Scratch) -> Tensor:
    """Some blocks ``[blocks, size * size]``: int8 values, or floats."""
    held = packed.weight[blocks]
    if packed.format.number == "float":
        return held.view(packed.scale.dtype)
    if packed.format.bits == 8:
        return held
    return unpack_halves(held, scratch.take("codes", torch.int8, len(held), 2 * held.shape[1]))


def _scaled(blocks: Tensor, scale: Tensor, in_runs: int, dtype: torch.dtype, scratch: _Scratch) -> Tensor:
    """Values times their groups' scales, and blocks of runs side by side: ``[blocks, size * size]``."""
    size = blocks.shape[1]
    values = scratch.take("values", dtype, len(blocks), size * size)
    side = values[:in_runs].view(-1, size, RUN, size)
    side.copy_(blocks[:in_runs].view(-1, RUN, size, size).transpose(1, 2))
    side.mul_(scale[:in_runs].view(-1, RUN, size).transpose(1, 2).unsqueeze(-1))
    values[in_runs:].view(-1, size, size).copy_(blocks[in_runs:]).mul_(scale[in_runs:].unsqueeze(-1))
    return values


def _products(operands: list[Tensor], tokens: Tensor, columns: Tensor, scratch: _Scratch) -> Tensor:
    """Every operand times the tokens ``[K/size, size * M]`` that it needs, in float32 ``[batch of all, size, M]``."""
    size = operands[0].shape[1]
    gathered = scratch.take("tokens", tokens.dtype, len(columns), tokens.shape[1])
    torch.index_select(tokens, 0, columns, out=gathered)
    product = scratch.take("product", tokens.dtype, sum(map(len, operands)), size, tokens.shape[1] // size)
    column = place = 0
    for values in operands:
        batch, _, length = values.shape
        needed = gathered[column : column + batch * length // size]
        torch.bmm(values, needed.view(batch, length, -1), out=product[place : place + batch])
        column, place = column + len(needed), place + batch
    # Before it is scaled: a product of both dtypes takes twice as long.
    return scratch.converted("wide", product, torch.float32)


def _token_blocks(x: Tensor, size: int) -> Tensor:
    """x ``[M, K]`` as ``[K/size, size * M]``, the tokens' columns together."""
    spare = -x.shape[1] % size
    blocks = (F.pad(x, (0, spare)) if spare else x).reshape(x.shape[0], -1, size)
    # In two steps: numbers of a column lie a row of x apart, which a cache holds badly (336 instead of 625 us for 128
    # tokens).
    return blocks.transpose(0, 1).contiguous().transpose(1, 2).flatten(1)
