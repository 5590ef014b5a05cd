# mypy: disable-error-code="no-untyped-def,assignment"
"""Prepared weights back to a dense matrix, for the vendor's matmul where there are many tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlinear.format import BLOCK_K, TILE_N, Format
from qlinear.kernels.checks import check_layout, check_weight
from qlinear.kernels.configs import dense_rows
from qlinear.kernels.decode import DECODERS
from qlinear.kernels.runtime import device_guard, target_of
from qlinear.kernels.tiles import concat, decode_block, load_scales, padded_rows, scale_planes, scale_rows

if TYPE_CHECKING:
    from qlinear.packing import PackedWeight


@triton.jit
def _dequantize_kernel(
    w_ptr, index_ptr, scale_ptr, y_ptr, N, K,
    DECODE: tl.constexpr, PLANES: tl.constexpr, GROUP: tl.constexpr, OFFSET: tl.constexpr, FLOAT: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """y[n, k] = (code[n, k] - zero[n, k // GROUP]) * scale[n, k // GROUP], in float32 and rounded once to y's dtype.

    w, scale: prepared layout (see tiles.py). y: [N, K] contiguous.
    """
    COUNT: tl.constexpr = 1 if GROUP is None else 128 // GROUP
    SLICES: tl.constexpr = PLANES if PLANES >= COUNT else COUNT
    blocks = tl.cdiv(K, 128)
    pid_n, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    rows = (padded_rows(pid_n, blocks, N, ROWS) + block * 64)[:, None]
    index = None
    if index_ptr is None:
        w_ptrs = w_ptr + rows * (128 // PLANES) + tl.arange(0, 128 // SLICES)[None, :]
    else:
        w_ptrs = w_ptr + rows * (32 // PLANES) + tl.arange(0, 32 // PLANES)[None, :]
        index = tl.load(index_ptr + rows * 4 + tl.arange(0, 4)[None, :])
    if FLOAT:
        planes = decode_block(w_ptrs, index, (), DECODE, PLANES, COUNT, OFFSET, scale_ptr, False, tl.float32)
    else:
        if GROUP is None:
            s_ptrs = scale_ptr + scale_rows(pid_n, 1, N, 0, COUNT, OFFSET, ROWS)
        else:
            s_ptrs = scale_ptr + scale_rows(pid_n, blocks, N, block, COUNT, OFFSET, ROWS)
        scales = load_scales(s_ptrs, COUNT, OFFSET, tl.float32)
        planes = decode_block(w_ptrs, index, scales, DECODE, PLANES, COUNT, OFFSET, None, False, tl.float32)
        planes = scale_planes(planes, scales, SLICES, COUNT, tl.float32)
    offs_n = pid_n * ROWS + tl.arange(0, ROWS)
    offs_k = block * 128 + tl.arange(0, 128)
    y_ptrs = y_ptr + offs_n.to(tl.int64)[:, None] * K + offs_k[None, :]
    y = concat(planes, 0, SLICES).to(y_ptr.dtype.element_ty)
    tl.store(y_ptrs, y, mask=(offs_n < N)[:, None] & (offs_k < K)[None, :])


def dequantize(packed: PackedWeight, dtype: torch.dtype) -> Tensor:
    """The dense weight ``[N, K]``, the same bits as ``packed.dequantize(dtype)``.

    Raises:
        ValueError: the weight is not in the ``triton`` layout.
    """
    check_layout(packed)
    return dequantize_tensors(
        packed.weight, packed.scale, packed.format, packed.out_features, packed.in_features, dtype, packed.index
    )


def dequantize_tensors(
    weight: Tensor, scale: Tensor, fmt: Format, out_features: int, in_features: int, dtype: torch.dtype,
    index: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """:func:`dequantize` on the bare tensors of the ``triton`` layout."""
    check_weight(weight, scale, fmt, out_features, in_features, index)
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"a dense weight is float16, bfloat16 or float32, got {dtype}")
    # The interpreter truncates to bfloat16 where it should round.
    stored = torch.float32 if target_of(weight.device).interpreted else dtype
    y = torch.empty(out_features, in_features, dtype=stored, device=weight.device)
    with device_guard(weight.device):
        _dequantize_kernel[(triton.cdiv(out_features, TILE_N) * triton.cdiv(in_features, BLOCK_K),)](
            weight, index, scale, y, out_features, in_features, **constexprs(fmt)
        )
    return y.to(dtype)


def linear_tensors(
    x: Tensor, weight: Tensor, scale: Tensor, fmt: Format, out_features: int, bias: Tensor | None = None,
    index: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``x @ W^T + bias`` for many tokens x ``[M, K]``: dequantizes some rows at a time for the vendor's matmul."""
    k = x.shape[1]
    check_weight(weight, scale, fmt, out_features, k, index)

    def dense(start: int, stop: int) -> Tensor:
        tiles = slice(start // TILE_N, -(-stop // TILE_N))
        parts = weight[tiles], scale if fmt.number == "float" else scale[tiles]
        places = None if index is None else index[tiles]
        return dequantize_tensors(*parts, fmt, stop - start, k, x.dtype, places)

    return linear_in_slices(x, out_features, dense, bias)


def linear_in_slices(
    x: Tensor, out_features: int, dense: Callable[[int, int], Tensor], bias: Tensor | None = None
) -> Tensor:
    """``x @ W^T + bias`` for x ``[M, K]`` by the vendor's matmul; ``dense(start, stop)`` makes those rows of W.

    As many rows at a time as stay in the L2 cache.
    """
    (m, k), target = x.shape, target_of(x.device)
    step = dense_rows(m, out_features, k, x.element_size(), target.num_sms, target.l2_bytes)
    if step >= out_features:
        return torch.nn.functional.linear(x, dense(0, out_features), None if bias is None else bias.to(x.dtype))
    y = torch.empty(m, out_features, dtype=x.dtype, device=x.device)
    for start in range(0, out_features, step):
        stop = min(start + step, out_features)
        torch.mm(x, dense(start, stop).t(), out=y[:, start:stop])
    return y if bias is None else y.add_(bias)


def constexprs(fmt: Format) -> dict[str, Any]:
    """The compile-time arguments of the kernel."""
    decoder = DECODERS[fmt.packing]
    return {
        "DECODE": decoder.function,
        "PLANES": decoder.planes,
        "GROUP": fmt.group_size,
        "OFFSET": fmt.offset if fmt.symmetric else None,
        "FLOAT": fmt.number == "float",
        "ROWS": TILE_N,
    }
