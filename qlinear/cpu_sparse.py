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

#: Most products of a block and a token that are written at a time; where there are more, one product for each row of
#: blocks. 4096 x 4096 in bfloat16, 128 tokens, two cores of Sapphire Rapids: with half of the blocks (262144
#: products) the rows are twice as fast as the batch, with a fifth (104858) the batch is 1.4 times as fast as the rows.
BATCH_PRODUCTS = 1 << 17
#: Weights of one tile that is made dense.
_TILE_WEIGHTS = 1 << 20


def path(fmt: Format) -> tuple[str, str]:
    """How a product is computed, and why."""
    if fmt.block is None:
        return "expand + F.linear", "no CPU operator for this pattern: saves memory, not time"
    return "stored blocks", "only blocks that are stored are multiplied: in one batch or, where there are many, by rows"


def matmul(x: Tensor, packed: PackedWeight) -> Tensor:
    """``x @ W.T`` for x ``[M, K]`` with M > 0 and a sparse weight in the plain layout: ``[M, N]`` in x's dtype."""
    if packed.format.block is None:
        return _tiled_matmul(x, packed)
    size = packed.format.block
    few = len(packed.weight) * x.shape[0] <= BATCH_PRODUCTS
    return (_batched_matmul if few else _row_matmul)(x, packed, size)


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
    tokens = F.pad(x, (0, -x.shape[1] % size)).t().contiguous().view(-1, size, x.shape[0])
    # float16 cannot hold a sum of codes that are not scaled; of others it is cheaper to scale the products.
    early = x.dtype == torch.float16
    values = _values(packed, rows, x.dtype) if early else _codes(packed, x.dtype)
    products = torch.bmm(values, tokens[columns]).float()
    if not early and packed.format.number != "float":
        products *= _scales(packed, rows, size).unsqueeze(-1)
    y = torch.zeros(-(-n // size), size, x.shape[0]).index_add_(0, rows, products)
    return y.flatten(0, 1)[:n].t().to(x.dtype)


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
    values = _codes(packed, dtype)
    if packed.format.number == "float":
        return values
    return values.mul_(_scales(packed, rows, values.shape[1]).unsqueeze(-1))


def _codes(packed: PackedWeight, dtype: torch.dtype) -> Tensor:
    """As :func:`_values`, before they are multiplied by their scales."""
    fmt = packed.format
    values = sparse.unpack_values(packed.weight, packed.scale, fmt, packed.weight.shape[1])
    return (values if fmt.number == "float" else signed(values, None, fmt)).to(dtype)


def _scales(packed: PackedWeight, rows: Tensor, size: int) -> Tensor:
    """The scales of the rows of every block, ``[B, size]``."""
    scale = packed.scale
    if packed.format.group_size is None:
        return F.pad(scale, (0, 0, 0, -len(scale) % size)).view(-1, size)[rows]
    return scale
