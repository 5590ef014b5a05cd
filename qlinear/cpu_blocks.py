"""The product of a block-sparse weight on a CPU, in the ``cpu`` layout of :mod:`qlinear.sparse_layout`.

Blocks are one batch of products with the columns of the tokens that they need, and a bag of embeddings adds what
belongs to a row of blocks: it reads 16-bit numbers and sums them in float32. One token does not need the products: its
numbers are the weights of a bag, of which the columns of the blocks are the embeddings. In bfloat16 the product of
each block is rounded before they are added: where blocks take back what others give, that shows (tokens around 10 with
a deviation of 1, rows of weights that sum to 0: a relative error of 1.6e-2 where a dense product has 1.7e-3).
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

from qlinear.format import Format
from qlinear.packing import PackedWeight
from qlinear.sparse_layout import per_channel

# Measured on two cores of Sapphire Rapids with 4096 x 4096 in bfloat16 and a fifth of the blocks, in us.
#: Tokens that are multiplied at once: what is copied for them stays in the cache (128 tokens in 16 bit: 8520 by 32,
#: 5950 by 64, and by 128 no less).
_TOKENS = 64
#: Blocks that are decoded and multiplied at once, whole rows of them. Fewer make operators that take longer to start
#: than to run (16 tokens in int8: 3860 by 128, 3380 by 256, 2730 by 512 and by 1024).
_SLICE = 1024
#: Most tokens that are summed one by one (three in 16 bit: 1700, where products take 1390 for four).
_ONE_BY_ONE = 2
#: Most tokens for which the scales of groups go on the products of the blocks and not on their weights (int4, on the
#: products and on the weights: 32 tokens 4280 and 4910, 256 tokens 18600 and 15600).
_LATE_TOKENS = 64


class _Scratch:
    """Memory that the slices of a call share: new memory for each costs as much as filling it."""

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def take(self, use: str, dtype: torch.dtype, *shape: int) -> Tensor:
        """Memory ``shape``, until it is taken for the same use again. A use has one dtype."""
        held = self._held.get(use)
        if held is None or held.numel() < prod(shape):
            held = self._held[use] = torch.empty(shape, dtype=dtype)
        return held if held.shape == shape else held.view(-1)[: prod(shape)].view(shape)


def matmul(x: Tensor, packed: PackedWeight, size: int) -> Tensor:
    """``x @ W.T`` for x ``[M, K]`` and a weight of blocks ``size`` in the ``cpu`` layout: ``[M, N]`` in x's dtype."""
    fmt, n, rows = packed.format, packed.out_features, -(-packed.out_features // size)
    assert packed.index is not None
    one_by_one = len(x) <= _ONE_BY_ONE
    # float16 cannot hold sums of codes that are not scaled, nor those of one block where others take them back; and
    # PyTorch multiplies float32 faster.
    held = x.dtype != torch.float16 or (one_by_one and fmt.number == "float")
    dtype = x.dtype if held else torch.float32
    out = x.new_empty(len(x), rows, size, dtype=dtype)
    parts = [
        (_token_blocks(part.to(dtype), fmt, size), y)
        for part, y in zip(x.split(_TOKENS), out.split(_TOKENS), strict=True)
    ]
    columns, scratch = packed.index[rows + 1 :], _Scratch()
    for first, last, blocks in _slices(packed, rows):
        values, scale = _decode(packed, blocks, size, dtype, len(x) <= _LATE_TOKENS, scratch)
        bags = packed.index[first:last]
        bags = bags - blocks.start if blocks.start else bags
        for tokens, y in parts:
            sums = _row_sums(values, scale, tokens, columns[blocks], bags, scratch, one_by_one)
            y[:, first:last] = sums.transpose(0, 1)
    out = out.flatten(1)[:, :n]
    return (out.mul_(packed.scale.view(-1)) if per_channel(fmt) else out).contiguous().to(x.dtype)


def _slices(packed: PackedWeight, rows: int) -> Iterator[tuple[int, int, slice]]:
    """Rows of blocks (the first, and the one after the last) and their blocks: ``_SLICE``, unless one row has more."""
    assert packed.index is not None
    if len(packed.weight) <= _SLICE:
        yield 0, rows, slice(0, len(packed.weight))
        return
    starts, first = packed.index[: rows + 1].tolist(), 0
    for last in range(1, rows + 1):
        if last == rows or starts[last + 1] - starts[first] > _SLICE:
            yield first, last, slice(starts[first], starts[last])
            first = last


def _decode(
    packed: PackedWeight, blocks: slice, size: int, dtype: torch.dtype, late: bool, scratch: _Scratch
) -> tuple[Tensor, Tensor | None]:
    """Some blocks transposed ``[blocks, size, size]`` in ``dtype``, and what their products are to be multiplied by."""
    held, fmt = packed.weight[blocks], packed.format
    if fmt.number == "float":
        held = held.view(packed.scale.dtype)
    if fmt.bits == 4:
        held = _sixteenfold(held, scratch.take("codes", torch.int8, len(held), 2 * held.shape[1]))
    values = held.view(-1, size, size)
    if values.dtype != dtype:
        values = scratch.take("values", dtype, *values.shape).copy_(values)
    if fmt.group_size is None:
        return values, None
    scale = packed.scale[blocks].to(dtype).unsqueeze(1)
    return (values, scale) if late else (values.mul_(scale), None)


def _sixteenfold(packed: Tensor, out: Tensor) -> Tensor:
    """The values of nibbles times 16: one operator each, where the values themselves take three for two."""
    low, high = out.chunk(2, dim=1)
    signed = packed.view(torch.int8)
    torch.mul(signed, 16, out=low)
    torch.bitwise_and(signed, -16, out=high)
    return out


def _row_sums(
    values: Tensor, scale: Tensor | None, tokens: Tensor, columns: Tensor, bags: Tensor, scratch: _Scratch,
    one_by_one: bool,
) -> Tensor:  # fmt: skip
    """The products of every row of blocks with the tokens ``[K/size, M, size]``: ``[rows, M, size]``."""
    blocks, size, _ = values.shape
    count = tokens.shape[1]
    gathered = scratch.take("tokens", tokens.dtype, blocks, count, size)
    torch.index_select(tokens, 0, columns, out=gathered)
    if one_by_one:
        each = bags * size if scale is None else torch.arange(0, blocks * size, size, dtype=bags.dtype)
        table = values.view(-1, size)
        product = torch.stack([_sum_bags(table, each, token.reshape(-1)) for token in gathered.unbind(1)], dim=1)
        if scale is None:
            return product
    else:
        product = torch.bmm(gathered, values, out=scratch.take("product", tokens.dtype, blocks, count, size))
    if scale is not None:
        product.mul_(scale)
    return _sum_bags(product.view(blocks, count * size), bags).view(-1, count, size)


def _sum_bags(table: Tensor, bags: Tensor, weights: Tensor | None = None) -> Tensor:
    """Sums the rows of ``table`` from each of ``bags`` on up to the next, in float32."""
    every = torch.arange(len(table), dtype=bags.dtype)
    return F.embedding_bag(every, table, bags, mode="sum", per_sample_weights=weights)


def _token_blocks(x: Tensor, fmt: Format, size: int) -> Tensor:
    """x ``[M, K]`` as ``[K/size, M, size]``, divided by what weights are multiplied with."""
    spare = -x.shape[1] % size
    x = x * (1 / 16) if fmt.bits == 4 else x
    blocks = (F.pad(x, (0, spare)) if spare else x).reshape(x.shape[0], -1, size)
    return blocks.transpose(0, 1).contiguous()
