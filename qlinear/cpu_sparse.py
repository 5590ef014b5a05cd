"""The matmul on a CPU with sparse weights, which lie in the plain layout there.

Blocks: only those that are stored are dequantized and multiplied. Everything else: tiles of rows are made dense and
multiplied, which saves memory and not time.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from qlinear import sparse
from qlinear.bits import unpack_bits
from qlinear.format import Format
from qlinear.packing import PackedWeight, dequantize_codes, signed

#: Most tokens whose products with single blocks are written, and then added; above it rows of blocks are multiplied
#: whole. 4096 x 4096 in bfloat16 with a fifth of the blocks, two cores of Sapphire Rapids, in us: 16 tokens 2250 and
#: 3450, 32 tokens 4750 and 4800, 128 tokens 40650 and 9300.
BATCH_TOKENS = 24
#: Rows of blocks in one product, and tokens: so many that what is copied for it stays in the cache.
_ROWS, _TOKENS = 8, 128
#: Weights of one tile that is made dense.
_TILE_WEIGHTS = 1 << 20


def path(fmt: Format) -> tuple[str, str]:
    """How a product is computed, and why."""
    if fmt.block is None:
        return "expand + F.linear", "no CPU operator for this pattern: saves memory, not time"
    how = f"in one batch up to {BATCH_TOKENS} tokens, then rows of them"
    return "stored blocks", f"only blocks that are stored are multiplied: {how}"


def matmul(x: Tensor, packed: PackedWeight) -> Tensor:
    """``x @ W.T`` for x ``[M, K]`` with M > 0 and a sparse weight in the plain layout: ``[M, N]`` in x's dtype."""
    if packed.format.block is None:
        return _tiled_matmul(x, packed)
    return (_batched_matmul if x.shape[0] <= BATCH_TOKENS else _row_matmul)(x, packed, packed.format.block)


def _tiled_matmul(x: Tensor, packed: PackedWeight) -> Tensor:
    weight, scale, zero, index = packed.tensors
    fmt, n, k = packed.format, packed.out_features, packed.in_features
    assert index is not None
    zeros = None if zero is None else unpack_bits(zero.t(), fmt.bits, n).t()
    y, step = x.new_empty(x.shape[0], n), max(1, _TILE_WEIGHTS // k)
    for start in range(0, n, step):
        rows = slice(start, min(start + step, n))
        codes = sparse.expand_rows(weight, scale, zeros, index, fmt, k, rows)
        zero = None if zeros is None else zeros[rows]
        y[:, rows] = F.linear(x, dequantize_codes(codes, scale[rows], zero, fmt, x.dtype))
    return y


def _batched_matmul(x: Tensor, packed: PackedWeight, size: int) -> Tensor:
    """Every block times its tokens in one batch; the products of a row of blocks are added in float32.

    Blocks are the left operand: they are multiplied as they lie.
    """
    (rows, columns), n = _places(packed, size), packed.out_features
    tokens = _token_blocks(x, size).view(-1, size, x.shape[0])
    # float16 cannot hold a sum of codes that are not scaled; of others it is cheaper to scale the products.
    early = x.dtype == torch.float16
    values = _values(packed, rows, x.dtype) if early else _codes(packed.weight, packed, x.dtype)
    products = torch.bmm(values, tokens[columns]).float()
    if not early and packed.format.number != "float":
        products *= _scales(packed, rows, size).unsqueeze(-1)
    y = torch.zeros(-(-n // size), size, x.shape[0]).index_add_(0, rows, products)
    return y.flatten(0, 1)[:n].t().to(x.dtype)


def _row_matmul(x: Tensor, packed: PackedWeight, size: int) -> Tensor:
    """Rows of blocks times the columns of the tokens that they need, several rows of about as many blocks at once.

    A row that has fewer blocks than the longest is filled up with its own first block, times columns of zeros.
    """
    assert packed.index is not None
    n, fmt = packed.out_features, packed.format
    rows, zeros = -(-n // size), -(-x.shape[1] // size)
    starts, columns = packed.index[: rows + 1].long(), packed.index[rows + 1 :].long()
    counts, order = starts.diff().sort(descending=True, stable=True)
    counts = counts[: int(counts.count_nonzero())]
    longest = counts[::_ROWS].tolist()
    place = torch.arange(max(longest, default=0))
    there = place < counts.unsqueeze(1)
    blocks = torch.where(there, place, 0) + starts[order[: len(counts)]].unsqueeze(1)
    needed = torch.where(there, columns[blocks], zeros)
    tokens = [_token_blocks(part, size) for part in x.split(_TOKENS)]
    y = x.new_zeros(x.shape[0], rows, size)
    scales, scratch = _line_scales(packed, x.dtype, size), _Scratch()
    for i, most in enumerate(longest):
        mine = slice(i * _ROWS, min((i + 1) * _ROWS, len(counts)))
        values = _row_values(packed, scales, blocks[mine, :most], x.dtype, scratch)
        for part, out in zip(tokens, y.split(_TOKENS), strict=True):
            gathered = scratch.rows(part, needed[mine, :most].flatten())
            product = torch.bmm(values, gathered.view(len(values), values.shape[2], -1))
            out[:, order[mine]] = product.permute(2, 0, 1)
    y = y.flatten(1)[:, :n]
    return y if scales is not None or fmt.number == "float" else y.mul_(packed.scale.t())


class _Scratch:
    """Memory that the products of a call share: new memory for each costs as much as filling it."""

    def __init__(self) -> None:
        self._held: dict[torch.dtype, Tensor] = {}

    def rows(self, source: Tensor, index: Tensor) -> Tensor:
        """``source[index]`` of a matrix, until the next call for its dtype."""
        length = len(index) * source.shape[1]
        held = self._held.get(source.dtype)
        if held is None or len(held) < length:
            held = self._held[source.dtype] = source.new_empty(length)
        return torch.index_select(source, 0, index, out=held[:length].view(len(index), -1))


def _line_scales(packed: PackedWeight, dtype: torch.dtype, size: int) -> Tensor | None:
    """The scales of the lines of all blocks, ``[B * size]``, where they go on the weights and not on the product.

    float16 cannot hold a sum of codes that are not scaled.
    """
    fmt = packed.format
    if fmt.number == "float" or (fmt.group_size is None and dtype != torch.float16):
        return None
    return _scales(packed, _places(packed, size)[0], size).flatten()


def _row_values(
    packed: PackedWeight, scales: Tensor | None, blocks: Tensor, dtype: torch.dtype, scratch: _Scratch
) -> Tensor:
    """The weights ``[rows, size, blocks * size]`` of rows with these ``blocks`` ``[rows, blocks]``, side by side."""
    weight = packed.weight
    size = weight.shape[1]
    # A line of a block after the same line of the block before it.
    lines = (blocks.unsqueeze(1) * size + torch.arange(size).unsqueeze(1)).flatten()
    values = _codes(scratch.rows(weight.flatten(0, 1), lines), packed, dtype)
    if scales is not None:
        values.mul_(scales[lines].unsqueeze(1))
    return values.view(len(blocks), size, -1)


def _token_blocks(x: Tensor, size: int) -> Tensor:
    """x ``[M, K]`` as ``[K/size + 1, size * M]``, the tokens' columns together; the last block is zeros."""
    blocks = F.pad(x, (0, -x.shape[1] % size + size)).view(x.shape[0], -1, size)
    # In two steps: numbers of a column lie a row of x apart, which a cache holds badly (336 instead of 625 us for 128
    # tokens).
    return blocks.transpose(0, 1).contiguous().transpose(1, 2).flatten(1)


def _places(packed: PackedWeight, size: int) -> tuple[Tensor, Tensor]:
    assert packed.index is not None
    return sparse.block_places(packed.index, -(-packed.out_features // size))


def _values(packed: PackedWeight, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """The stored blocks ``[B, size, size]`` in ``dtype``."""
    values = _codes(packed.weight, packed, dtype)
    if packed.format.number == "float":
        return values
    return values.mul_(_scales(packed, rows, values.shape[1]).unsqueeze(-1))


def _codes(words: Tensor, packed: PackedWeight, dtype: torch.dtype) -> Tensor:
    """What words of the weight stand for in ``dtype``, before it is multiplied by its scales."""
    fmt = packed.format
    values = sparse.unpack_values(words, packed.scale, fmt, packed.weight.shape[1])
    return (values if fmt.number == "float" else signed(values, None, fmt)).to(dtype)


def _scales(packed: PackedWeight, rows: Tensor, size: int) -> Tensor:
    """The scales of the rows of every block, ``[B, size]``."""
    scale = packed.scale
    if packed.format.group_size is None:
        return F.pad(scale, (0, 0, 0, -len(scale) % size)).view(-1, size)[rows]
    return scale
