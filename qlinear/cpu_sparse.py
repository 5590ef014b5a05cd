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

#: Most tokens for which all blocks are multiplied in one batch; above it one product for each row of blocks, because a
#: batch writes a product for every block before it adds them. Not measured yet.
BATCH_TOKENS = 32
#: Weights of one tile that is made dense.
_TILE_WEIGHTS = 1 << 20


def path(fmt: Format, tokens: int) -> tuple[str, str]:
    """How a product of ``tokens`` rows is computed, and why."""
    if fmt.block is None:
        return "expand + F.linear", "no CPU operator for this pattern: saves memory, not time"
    if tokens <= BATCH_TOKENS:
        return "blocks in a batch", f"only stored blocks are multiplied, at once up to {BATCH_TOKENS} tokens"
    return "blocks by rows", f"only stored blocks are multiplied, row by row above {BATCH_TOKENS} tokens"


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
    """Every block times its tokens in one batch; the products of a row of blocks are added in float32."""
    places, tokens = _places(packed, size), _token_blocks(x, size)
    products = torch.bmm(tokens[places[1]], _values(packed, places[0], x.dtype).transpose(1, 2))
    rows = -(-packed.out_features // size)
    y = torch.zeros(rows, x.shape[0], size).index_add_(0, places[0], products.float())
    return y.transpose(0, 1).flatten(1)[:, : packed.out_features].to(x.dtype)


def _row_matmul(x: Tensor, packed: PackedWeight, size: int) -> Tensor:
    """One product for each row of blocks, with the tokens' columns that it needs."""
    places, tokens = _places(packed, size), _token_blocks(x, size)
    values, n = _values(packed, places[0], x.dtype), packed.out_features
    y = x.new_zeros(x.shape[0], n)
    assert packed.index is not None
    starts: list[int] = packed.index[: -(-n // size) + 1].tolist()
    for i in range(len(starts) - 1):
        blocks = slice(starts[i], starts[i + 1])
        if starts[i] < starts[i + 1]:
            needed = tokens[places[1][blocks]].transpose(0, 1).flatten(1)
            y[:, i * size : (i + 1) * size] = F.linear(
                needed, values[blocks].transpose(0, 1).flatten(1)[: n - i * size]
            )
    return y


def _places(packed: PackedWeight, size: int) -> tuple[Tensor, Tensor]:
    assert packed.index is not None
    return sparse.block_places(packed.index, -(-packed.out_features // size))


def _token_blocks(x: Tensor, size: int) -> Tensor:
    """x ``[M, K]`` as ``[K/size, M, size]``."""
    x = F.pad(x, (0, -x.shape[1] % size))
    return x.view(x.shape[0], x.shape[1] // size, size).transpose(0, 1)


def _values(packed: PackedWeight, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """The stored blocks ``[B, size, size]`` in ``dtype``."""
    fmt, scale = packed.format, packed.scale
    values = sparse.unpack_values(packed.weight, scale, fmt, packed.weight.shape[1])
    if fmt.number == "float":
        return values.to(dtype)
    if fmt.group_size is None:
        scale = F.pad(scale, (0, 0, 0, -len(scale) % values.shape[1])).view(-1, values.shape[1])[rows]
    return signed(values, None, fmt).to(dtype).mul_(scale.unsqueeze(-1))
