"""The matmul on a CPU: PyTorch's packed operators where they win, tiled dequantize + ``F.linear`` elsewhere.

:func:`path` is the dispatch table, measured (README, "On a CPU"): the packed operators stream each weight once per token, so
they win for few tokens; above that the float product of a dequantized tile is cheaper.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from qlinear.bits import unpack_bits
from qlinear.cpu_layout import from_plain, int4_tiles, row_blocks, zero_points
from qlinear.format import Format
from qlinear.layout import layout_of
from qlinear.pack import dequantize_codes, expand_groups

#: Most tokens the packed operators are given; above it a dequantized tile is cheaper.
INT4_TOKENS = 16
INT8_TOKENS = 8
#: Weights of one dequantized tile: 2 MB of bfloat16, so that a tile is still in cache when it is multiplied.
_TILE_WEIGHTS = 1 << 20


def path(fmt: Format, dtype: torch.dtype, tokens: int, layout: str = "cpu") -> tuple[str, str]:
    """The operator a product of ``tokens`` rows takes on a CPU, and why: ``(name, reason)``."""
    if fmt.integer_activations:
        return "aten::_int_mm", "int8 x int8, int32 sums; activations quantized per token"
    if dtype != torch.bfloat16:
        return "dequantize + F.linear", "no fast operator in this dtype: saves memory, not time"
    if layout != "cpu":
        return "dequantize + F.linear", "not in the cpu layout: scales not bfloat16, or not prepared"
    if fmt.bits == 4:
        few, name = INT4_TOKENS, "aten::_weight_int4pack_mm_for_cpu"
    elif fmt.group_size is None:
        few, name = INT8_TOKENS, "aten::_weight_int8pack_mm"
    else:
        return "dequantize + F.linear", "no CPU operator for grouped int8: saves memory, not time"
    if tokens <= few:
        return name, f"streams the packed weight; up to {few} tokens"
    return "dequantize + F.linear", f"cheaper above {few} tokens"


def matmul(x: Tensor, weight: Tensor, scale: Tensor, zero_point: Tensor | None, fmt: Format, n: int) -> Tensor:
    """``x @ W.T`` for x ``[M, K]`` and a packed weight in the plain or cpu layout; returns ``[M, N]`` in x's dtype."""
    name, _ = path(fmt, x.dtype, x.shape[0], layout_of(weight))
    if x.shape[0] == 0:
        return x.new_empty(0, n)
    if name == "aten::_weight_int4pack_mm_for_cpu":
        columns = weight.shape[1] * 2
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(_pad(x, columns), weight, columns // scale.shape[0], scale)
        return y if y.shape[1] == n else y[:, :n]
    if name == "aten::_weight_int8pack_mm":
        return torch.ops.aten._weight_int8pack_mm(_pad(x, weight.shape[1]), weight, scale.view(-1).to(x.dtype))
    if name == "aten::_int_mm":
        if weight.dtype == torch.int32:
            weight = from_plain((weight, scale, None), fmt, n, x.shape[1])[0]
        return _int8_matmul(x, weight, scale)
    return _tiled_matmul(x, weight, scale, zero_point, fmt, n)


def _pad(x: Tensor, columns: int) -> Tensor:
    return x.contiguous() if x.shape[1] == columns else F.pad(x, (0, columns - x.shape[1]))


def quantize_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """Per-token symmetric int8: values int8 ``[M, K]`` and float32 scales ``[M, 1]``, ``x ~ values * scale``.

    A zero row has scale 0. A row with NaN or infinity has a NaN scale, so that its whole output row is NaN.
    """
    wide = x.float()
    largest = wide.abs().amax(-1, keepdim=True)
    scale = largest / 127
    inverse = torch.where(largest > 0, 127 / largest, 0)
    values = (wide * inverse).round_()
    if not bool(torch.isfinite(largest).all()):
        scale = torch.where(torch.isfinite(largest), scale, torch.nan)
        values.nan_to_num_(0, 0, 0)
    return values.to(torch.int8), scale


def _int8_matmul(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    values, token_scale = quantize_activations(x)
    product = torch._int_mm(values, weight.t()).float()
    return product.mul_(token_scale).mul_(scale.view(-1)).to(x.dtype)


def _tiled_matmul(x: Tensor, weight: Tensor, scale: Tensor, zero_point: Tensor | None, fmt: Format, n: int) -> Tensor:
    """Dequantizes a tile of rows at a time in x's dtype and multiplies by it."""
    if weight.dtype == torch.uint8:
        return _operator_order_matmul(x, weight, scale)[:, :n]
    k = x.shape[1]
    step = max(1, _TILE_WEIGHTS // k)
    zeros = None if zero_point is None else unpack_bits(zero_point.t(), fmt.bits, n).t()
    y = x.new_empty(x.shape[0], n)
    for start in range(0, n, step):
        rows = slice(start, min(start + step, n))
        if weight.dtype == torch.int8:
            tile = weight[rows, :k].to(x.dtype).mul_(expand_groups(scale[rows], fmt.group_size or k, k))
        else:
            codes, zero = unpack_bits(weight[rows], fmt.bits, k), None if zeros is None else zeros[rows]
            tile = dequantize_codes(codes, scale[rows], zero, fmt, x.dtype)
        y[:, rows] = F.linear(x, tile)
    return y


def _operator_order_matmul(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """The product with an int4 weight in the operator's byte order, in bfloat16 or any float dtype: a block of rows at a time.

    The blocks come with their rows permuted; the columns of the product are put in order once, at the end.
    """
    columns, groups = weight.shape[1] * 2, scale.shape[0]
    x = _pad(x, columns)
    y, order = x.new_empty(x.shape[0], weight.shape[0]), []
    for rows, (start, codes) in zip(row_blocks(weight.shape[0]), int4_tiles(weight), strict=True):
        index = rows[1] + start
        pairs = scale[:, index]
        tile = codes.to(x.dtype).view(groups, columns // groups, len(index))
        tile.sub_(zero_points(pairs).to(x.dtype)[:, None]).mul_(pairs[:, None, :, 0].to(x.dtype))
        torch.mm(x, tile.view(columns, -1), out=y[:, start : start + len(index)])
        order.append(index)
    return y[:, torch.cat(order).argsort()]
