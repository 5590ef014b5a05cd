"""The matmul on a CPU: PyTorch's packed operators where they win, tiled dequantize + ``F.linear`` elsewhere.

:func:`path` is the dispatch table, measured (README, "On a CPU"): the packed operators stream each weight once per
token, so they win for few tokens; above that the float product of a dequantized tile is cheaper.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from qlinear import cpu_sparse, prepacked
from qlinear.bits import e4m3_to_float, unpack_bits
from qlinear.cpu_layout import int4_tiles, zero_points
from qlinear.format import ROUNDED, Format
from qlinear.packing import PackedWeight, expand_groups, scaled, signed

_int4_mm: Callable[..., Tensor] = torch._weight_int4pack_mm_for_cpu
_int8_mm: Callable[..., Tensor] = torch._weight_int8pack_mm

#: Most tokens the packed operators are given; above it a dequantized tile is cheaper.
INT4_TOKENS = 64
INT8_TOKENS = 16
#: Most tokens whose int8 values the weight-only operator multiplies in the cpu layout; above it ``_int_mm`` is faster.
W8A8_TOKENS = 2
#: Whether ``_int_mm`` is wrong here: 30.016 for a sum of 256 ones and minus ones that is 32.
_SATURATES = not prepacked.VNNI and platform.machine() in ("x86_64", "AMD64")
#: Most tokens the packed operators are given where a 16-bit copy of the weight is kept: where their times and those of
#: `F.linear` cross on a line from 1 to 16 tokens (4096 x 4096 in `bench/results/sapphire-rapids-matmul.json`: 5 for
#: int8, 6 for int4).
KEPT_TOKENS = 5
#: Most columns whose products of int8 values (127 * 127) surely fit a sum in int32.
_INT32_COLUMNS = 1 << 17
#: Weights of one dequantized tile: 8 MB of bfloat16. With 2 MB 4096 x 4096 is sixteen products of few rows, and takes
#: 1.1 (int4) and 1.25 times (int8) as long at 128 tokens.
_TILE_WEIGHTS = 1 << 22
#: Floor of a token's largest magnitude: a zero row has zero values, whatever its scale.
_SMALLEST = torch.tensor(1e-30, dtype=torch.float32)
#: What the largest magnitude of a token is rounded to, by the kind of number.
_LARGEST = {number: torch.tensor(rounded.largest, dtype=torch.float32) for number, rounded in ROUNDED.items()}


def path(fmt: Format, dtype: torch.dtype, tokens: int, layout: str = "cpu", columns: int = 32) -> tuple[str, str]:
    """The operator a product of ``tokens`` rows takes on a CPU, and why: ``(name, reason)``.

    ``columns`` is the layer's in_features; only w8a8 asks for it.
    """
    if fmt.sparsity:
        return cpu_sparse.path(fmt, dtype, tokens, layout)
    if fmt.number == "e4m3":
        rounded = "activations rounded to e4m3 per token; " if fmt.quantized_activations else ""
        return "dequantize + F.linear", f"{rounded}no CPU operator for e4m3: saves memory, not time"
    if fmt.integer_activations and fmt.bits == 4:
        name, reason = path(fmt.weight_only, dtype, tokens, layout, columns)
        return name, f"int8 values held as floats, exactly; {reason}"
    if fmt.integer_activations:
        if layout in prepacked.OPERATORS:
            return prepacked.OPERATORS[layout], "int8 x int8, int32 sums; activations quantized per token"
        few = INT8_TOKENS if _SATURATES else W8A8_TOKENS
        if dtype == torch.bfloat16 and tokens <= few and layout == "cpu" and columns % 32 == 0:
            return "aten::_weight_int8pack_mm", f"int8 values held in bfloat16, exactly; up to {few} tokens"
        if _SATURATES:
            return "dequantize + F.linear", "int8 values held in float32: sums of int8 saturate on x86 without VNNI"
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


def few_tokens(fmt: Format, dtype: torch.dtype, layout: str) -> int:
    """The most tokens for which the packed weight is faster than a 16-bit copy of it would be."""
    return KEPT_TOKENS if path(fmt, dtype, 1, layout)[0].startswith("aten::") else 0


def matmul(x: Tensor, packed: PackedWeight) -> Tensor:
    """``x @ W.T`` for x ``[M, K]`` and a packed weight in any layout of a CPU; returns ``[M, N]`` in x's dtype."""
    weight, scale, zero_point = packed.weight, packed.scale, packed.zero_point
    fmt, n = packed.format, packed.out_features
    if x.shape[0] == 0:
        return x.new_empty(0, n)
    if prepacked.is_made(weight):
        return _prepacked_matmul(x, weight, scale)
    if fmt.sparsity:
        return cpu_sparse.matmul(x, packed.to_layout("cpu"))
    if fmt.number == "e4m3" and fmt.quantized_activations:
        values, _, inverse = _round_activations(x, fmt.number)
        # e4m3 is exact in every dtype, but float16 cannot hold a sum of its products.
        held = torch.float32 if x.dtype == torch.float16 else x.dtype
        return (_tiled_matmul(values.to(held), weight, scale, None, fmt, n) / inverse).to(x.dtype)
    name, _ = path(fmt, x.dtype, x.shape[0], packed.layout, x.shape[1])
    if fmt.integer_activations and fmt.bits == 4:
        # float16 cannot hold a sum of products of integers.
        held = torch.float32 if x.dtype == torch.float16 else x.dtype
        values, _, inverse = _round_activations(x)
        y = matmul(values.to(held), replace(packed, format=fmt.weight_only))
        return (y / inverse).to(x.dtype)
    if name == "aten::_weight_int4pack_mm_for_cpu":
        columns = weight.shape[1] * 2
        y = _int4_mm(_pad(x, columns), weight, columns // scale.shape[0], scale)
        return y if y.shape[1] == n else y[:, :n]
    if name == "aten::_weight_int8pack_mm":
        if fmt.integer_activations:
            return _few_int8_matmul(x, packed)
        return _int8_mm(_pad(x, weight.shape[1]), weight, scale.view(-1).to(x.dtype))
    if fmt.integer_activations:
        values, largest, _ = _round_activations(x)
        return rounded_matmul(values, torch.div(largest, _LARGEST["int"]), packed, x.dtype)
    return _tiled_matmul(x, weight, scale, zero_point, fmt, n)


def _pad(x: Tensor, columns: int) -> Tensor:
    return x.contiguous() if x.shape[1] == columns else F.pad(x, (0, columns - x.shape[1]))


def quantize_activations(x: Tensor, number: str = "int") -> tuple[Tensor, Tensor]:
    """Per-token symmetric int8: values int8 ``[M, K]`` and float32 scales ``[M, 1]``, ``x ~ values * scale``.

    Where ``number`` is ``e4m3`` the values are float8_e4m3fn, the largest of a token 448. A zero row has zero values. A
    row with NaN or infinity gets a scale that is not finite, and so does its output row.
    """
    values, largest, _ = _round_activations(x, number)
    # Contiguous, because _int_mm reads one row with the strides of a transposed view from the wrong places.
    values = values.to(ROUNDED[number].dtype, memory_format=torch.contiguous_format)
    return values, torch.div(largest, _LARGEST[number])


def rms_norm_quantize(x: Tensor, gain: Tensor, eps: float, number: str = "int") -> tuple[Tensor, Tensor]:
    """:func:`quantize_activations` of ``x * gain / sqrt(mean(x**2) + eps)`` per token, in float32 throughout."""
    wide = x.float()
    values, scale = quantize_activations(wide * gain.float(), number)
    return values, scale / (wide.square().mean(-1, keepdim=True) + eps).sqrt()


def _round_activations(x: Tensor, number: str = "int") -> tuple[Tensor, Tensor, Tensor]:
    """The values still in float32, each token's largest magnitude, and what it was multiplied by.

    To divide a product by that is an operator less than to multiply it by the scale.
    """
    # Decoding one token is bound by the number of small operators and their kind: 0-dim tensors in the place of Python
    # numbers, and one cast to float32 first, take this from 58 to 37 us at K = 576.
    wide = x.float()
    # The floor keeps a zero row from dividing by zero; NaN passes through.
    largest = torch.maximum(_magnitude(wide), _SMALLEST)
    inverse = torch.div(_LARGEST[number], largest)
    values = wide * inverse if x.dtype == torch.float32 else wide.mul_(inverse)
    values = values.to(torch.float8_e4m3fn).float() if number == "e4m3" else values.round_()
    return values, largest, inverse


def _magnitude(x: Tensor) -> Tensor:
    """The largest magnitude of each token of x ``[M, K]``: ``[M, 1]``."""
    if len(x) == 1:
        return x.abs().amax(-1, keepdim=True)
    # Memory for many tokens costs more than what is done with it: 128 of 4096 in bfloat16 are rounded in 160 us, with a
    # copy of magnitudes and another of values in 1570. A norm of order infinity, and `aminmax`, are not vectorized.
    return torch.maximum(x.amax(-1, keepdim=True), x.amin(-1, keepdim=True).neg_())


def rounded_matmul(values: Tensor, token_scale: Tensor, packed: PackedWeight, dtype: torch.dtype) -> Tensor:
    """The product of int8 values ``[M, K]`` (int8, or held in floats) with int8 weights: ``[M, N]`` in ``dtype``."""
    if _SATURATES:
        wide = values.float()
        y = _tiled_matmul(wide, packed.weight, packed.scale, None, packed.format, packed.out_features)
        return y.mul_(token_scale).to(dtype)
    if prepacked.is_made(packed.weight):
        return prepacked.product(values, packed.weight, packed.scale).mul_(token_scale).to(dtype)
    values = values.to(torch.int8, memory_format=torch.contiguous_format)
    # An int32 tensor times a float32 one is float32, and so it stays when 16-bit scales come in.
    product = _int_product(values, packed.to_layout("cpu").weight)
    return product.mul(token_scale).mul_(packed.scale.view(-1)).to(dtype)


def _prepacked_matmul(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    if not torch.compiler.is_compiling() and len(x) == 1:
        # The same arithmetic with Python numbers: each operator fewer is 10 us where a weight of 4096 x 4096 has driven
        # its code out of the caches, of 500.
        wide = x.float()
        inverse: Tensor | float = ROUNDED["int"].largest / max(float(wide.abs().amax()), _SMALLEST.item())
        values = (wide * inverse if x.dtype == torch.float32 else wide.mul_(inverse)).round_()
    else:
        values, _, inverse = _round_activations(x)
    return prepacked.product(values, weight, scale).div_(inverse).to(x.dtype)


def _int_product(values: Tensor, weight: Tensor) -> Tensor:
    """int8 ``[M, K]`` by ``[N, K]``: exact in int32, or a sum of such in float32 where K is large."""
    k = values.shape[1]
    if k == 1:
        # Of one column _int_mm reads the transposed weight from the wrong places.
        return values.int() * weight.t().int()
    if k <= _INT32_COLUMNS:
        return torch._int_mm(values, weight.t())
    parts = zip(values.split(_INT32_COLUMNS, 1), weight.split(_INT32_COLUMNS, 1), strict=True)
    products = [_int_product(part.contiguous(), columns.contiguous()).float() for part, columns in parts]
    return torch.stack(products).sum(0)


def _few_int8_matmul(x: Tensor, packed: PackedWeight) -> Tensor:
    """The same product for bfloat16 tokens, through the weight-only operator, which sums in float32.

    Integers up to 127 are exact in bfloat16 and so are their products in float32. At one token this takes a third off
    a layer of 576x576 and a fifth off one of 4096x4096: four small operators fewer, and no wait for oneDNN.
    """
    weight, scale = packed.weight, packed.scale
    if scale.dtype != torch.bfloat16 and torch.compiler.is_compiling():
        # Inductor takes scales that are stored, not computed ones.
        return rounded_matmul(*quantize_activations(x), packed, x.dtype)
    values, _, inverse = _round_activations(x)
    return _int8_mm(values.to(torch.bfloat16), weight, scale.view(-1).to(torch.bfloat16)).div_(inverse)


def _tiled_matmul(x: Tensor, weight: Tensor, scale: Tensor, zero_point: Tensor | None, fmt: Format, n: int) -> Tensor:
    """Dequantizes a tile of rows at a time in x's dtype and multiplies by it."""
    if weight.dtype == torch.uint8:
        return _operator_order_matmul(x, weight, scale, fmt)[:, :n]
    k = x.shape[1]
    step = max(1, _TILE_WEIGHTS // k)
    zeros = None if zero_point is None else unpack_bits(zero_point.t(), fmt.bits, n).t()
    y = x.new_empty(x.shape[0], n)
    for start in range(0, n, step):
        rows = slice(start, min(start + step, n))
        if weight.dtype == torch.int8:
            values = weight[rows, :k]
        elif fmt.number == "e4m3":
            values = unpack_bits(weight[rows], 8, k).view(torch.int8)
        else:
            zero = None if zeros is None else expand_groups(zeros[rows], fmt, k)
            values = signed(unpack_bits(weight[rows], fmt.bits, k), zero, fmt)
        if fmt.number == "e4m3":
            values = e4m3_to_float(values, x.dtype)
        # The scale goes on the product where that is one number a row, except in float16, which unscaled sums overflow.
        if fmt.group_size is None and x.dtype != torch.float16:
            torch.mul(F.linear(x, values.to(x.dtype)), scale[rows].view(-1), out=y[:, rows])
        else:
            y[:, rows] = F.linear(x, scaled(values, scale[rows], fmt, x.dtype))
    return y


def _operator_order_matmul(x: Tensor, weight: Tensor, scale: Tensor, fmt: Format) -> Tensor:
    """The product with an int4 weight in the operator's byte order, in any float dtype, a tile of rows at a time.

    The rows come permuted; the columns of the product are put in order once, at the end.
    """
    columns, groups = weight.shape[1] * 2, scale.shape[0]
    x = _pad(x, columns)
    y, orders, start = x.new_empty(x.shape[0], len(weight)), [], 0
    for order, values in int4_tiles(weight, _TILE_WEIGHTS):
        values = values.view(groups, columns // groups, len(order))
        pairs = scale.index_select(1, order).unsqueeze(1)
        if not fmt.symmetric:
            values -= (zero_points(pairs) - fmt.offset).to(torch.int8)
        # Contiguous: a stride of two along the rows makes the product with the scales four times as slow.
        scales = pairs[..., 0].to(x.dtype).contiguous()
        y[:, start : start + len(order)] = x @ values.to(x.dtype).mul_(scales).view(columns, -1)
        orders.append(order)
        start += len(order)
    # Not index_select: 3180 instead of 880 us for 128 tokens of 4096.
    return y.gather(1, torch.cat(orders).argsort().expand(len(y), -1))
