"""The product of a block-sparse weight on a CPU, in the ``cpu`` layout of :mod:`qlinear.sparse_layout`.

Few tokens in bfloat16 are multiplied by a row of int4 blocks at a time, which PyTorch's int4 operator takes for a
weight of the columns that these blocks have (:func:`by_rows`). Everywhere else blocks are one batch of products with
the columns of the tokens that they need, and a bag of embeddings adds what belongs to a row of blocks: it reads 16-bit
numbers and sums them in float32. One token does not need the products: its numbers are the weights of a bag, of which
the columns of the blocks are the embeddings. In bfloat16 the product of each block is rounded before they are added:
where blocks take back what others give, that shows (tokens around 10 with a deviation of 1, rows of weights that sum to
0: a relative error of 1.6e-2 where a dense product has 1.7e-3).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

from qlinear.cpu_layout import pairs_halves
from qlinear.format import Format
from qlinear.packing import PackedWeight
from qlinear.sparse_layout import per_channel

_int4_mm: Callable[..., Tensor] = torch._weight_int4pack_mm_for_cpu

#: Most tokens that are multiplied by a row of int4 blocks at a time (4096 x 4096, a fifth of the blocks, on two cores
#: of an AMD EPYC, us so and by all blocks at once: one token 640 and 1330, 8 1440 and 1750, 16 2090 and 2140, 32 2850
#: and 2460).
ROW_TOKENS = 16
#: Most threads for that: up to four tokens a row is the work of one. Not measured but reckoned from two threads, which
#: take 560 us so and 1200 at once for a token.
_ROW_THREADS = 8
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


def by_rows(fmt: Format, dtype: torch.dtype, scales: torch.dtype, tokens: int) -> bool:
    """Whether tokens are multiplied by a row of blocks at a time, with scales of the dtype ``scales``."""
    few = fmt.bits == 4 and tokens <= ROW_TOKENS and torch.get_num_threads() <= _ROW_THREADS
    return few and dtype == scales == torch.bfloat16 and pairs_halves()


def matmul(x: Tensor, packed: PackedWeight, size: int) -> Tensor:
    """``x @ W.T`` for x ``[M, K]`` and a weight of blocks ``size`` in the ``cpu`` layout: ``[M, N]`` in x's dtype."""
    fmt, n = packed.format, packed.out_features
    if by_rows(fmt, x.dtype, packed.scale.dtype, len(x)):
        return _matmul_by_rows(x, packed, size)
    one_by_one = len(x) <= _ONE_BY_ONE
    # float16 cannot hold sums of codes that are not scaled, nor those of one block where others take them back; and
    # PyTorch multiplies float32 faster.
    held = x.dtype != torch.float16 or (one_by_one and fmt.number == "float")
    dtype = x.dtype if held else torch.float32
    out = _matmul_at_once(x, packed, size, dtype, one_by_one).flatten(1)[:, :n]
    return (out.mul_(packed.scale.view(-1)) if per_channel(fmt) else out).contiguous().to(x.dtype)


def _matmul_by_rows(x: Tensor, packed: PackedWeight, size: int) -> Tensor:
    """By int4 blocks, in bfloat16: the operator sums a row of blocks in float32."""
    rows, index = -(-packed.out_features // size), packed.index
    assert index is not None
    starts = index[: rows + 1].tolist()
    counts = [last - first for first, last in pairwise(starts)]
    tokens = _in_blocks(x, size).index_select(1, index[rows + 1 :]).flatten(1)
    parts = tokens.split([count * size for count in counts], 1)
    blocks = packed.weight.view(-1, size // 2).split([count * size for count in counts])
    # The operator reads pairs of a scale and what it adds: a 16-bit number and zeros as one of 32 bits.
    pairs = packed.scale.view(torch.uint16).to(torch.int32).view(torch.bfloat16).view(-1, size, 2)
    none = x.new_zeros(len(x), size)
    products = [
        _int4_mm(part.contiguous(), held.view(size, -1), size, scale) if len(scale) else none
        for part, held, scale in zip(parts, blocks, pairs.split(counts), strict=True)
    ]
    return torch.cat(products, 1)[:, : packed.out_features].contiguous()


def _matmul_at_once(x: Tensor, packed: PackedWeight, size: int, dtype: torch.dtype, one_by_one: bool) -> Tensor:
    """By all blocks of a slice: ``[M, rows of blocks, size]`` in ``dtype``, without the scales of channels."""
    fmt, rows, index = packed.format, -(-packed.out_features // size), packed.index
    assert index is not None
    out = x.new_empty(len(x), rows, size, dtype=dtype)
    x = x * (1 / 16) if fmt.bits == 4 else x
    parts = [
        (_in_blocks(part.to(dtype), size).transpose(0, 1).contiguous(), y)
        for part, y in zip(x.split(_TOKENS), out.split(_TOKENS), strict=True)
    ]
    columns, scratch = index[rows + 1 :], _Scratch()
    for first, last, blocks in _slices(packed, rows):
        values, scale = _decode(packed, blocks, size, dtype, len(x) <= _LATE_TOKENS, scratch)
        bags = index[first:last]
        bags = bags - blocks.start if blocks.start else bags
        for tokens, y in parts:
            sums = _row_sums(values, scale, tokens, columns[blocks], bags, scratch, one_by_one)
            y[:, first:last] = sums.transpose(0, 1)
    return out


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
        held = _sixteenfold(held, size, scratch)
    values = held.view(-1, size, size)
    if values.dtype != dtype:
        values = scratch.take("values", dtype, *values.shape).copy_(values)
    if fmt.group_size is None:
        return values, None
    scale = packed.scale[blocks].to(dtype).unsqueeze(1)
    return (values, scale) if late else (values.mul_(scale), None)


def _sixteenfold(packed: Tensor, size: int, scratch: _Scratch) -> Tensor:
    """Nibbles as int8, 16 times ``code - 8``: of each column of a block first the low ones and then the high ones.

    Sixteen times the value is one operator for each, the value itself would be three for both.
    """
    # The codes' offset is their highest bit: without it they are signed.
    signed = torch.bitwise_xor(packed, 0x88, out=scratch.take("signed", torch.uint8, *packed.shape)).view(torch.int8)
    low, high = codes = scratch.take("codes", torch.int8, 2, *packed.shape)
    torch.mul(signed, 16, out=low)
    torch.bitwise_and(signed, -16, out=high)
    # Side by side in words of eight: 180 us for 820 blocks, where a copy of bytes with strides takes 550.
    halves = codes.view(torch.int64).view(2, -1, size // 16).unbind(0)
    return torch.cat(halves, 1, out=scratch.take("words", torch.int64, len(halves[0]), size // 8)).view(torch.int8)


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


def _in_blocks(x: Tensor, size: int) -> Tensor:
    """x ``[M, K]`` as ``[M, K/size, size]``, with zeros for columns that are missing."""
    spare = -x.shape[1] % size
    return (F.pad(x, (0, spare)) if spare else x).reshape(x.shape[0], -1, size)
