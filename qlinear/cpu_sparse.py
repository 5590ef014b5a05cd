"""The matmul on a CPU with sparse weights.

Blocks: only those that are stored are multiplied, see :mod:`qlinear.cpu_blocks`. Everything else lies in the plain
layout: tiles of rows are made dense and multiplied, which saves memory and not time.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from qlinear import cpu_blocks, sparse
from qlinear.bits import unpack_bits
from qlinear.format import Format
from qlinear.packing import PackedWeight, dequantize_codes

#: Weights of one tile that is made dense.
_TILE_WEIGHTS = 1 << 20


def path(fmt: Format, dtype: torch.dtype, tokens: int, layout: str) -> tuple[str, str]:
    """How a product of ``tokens`` rows is computed, and why."""
    if fmt.block is None:
        return "expand + F.linear", "no CPU operator for this pattern: saves memory, not time"
    if layout == "cpu" and cpu_blocks.by_rows(fmt, dtype, dtype, tokens):
        return "aten::_weight_int4pack_mm_for_cpu", f"a row of blocks at a time; up to {cpu_blocks.ROW_TOKENS} tokens"
    return "stored blocks", "only blocks that are stored are multiplied"


def matmul(x: Tensor, packed: PackedWeight) -> Tensor:
    """``x @ W.T`` for x ``[M, K]`` with M > 0 and a sparse weight in the layout of the CPU: ``[M, N]`` in x's dtype."""
    block = packed.format.block
    return _tiled_matmul(x, packed) if block is None else cpu_blocks.matmul(x, packed, block)


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
