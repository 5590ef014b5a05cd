# mypy: disable-error-code="no-untyped-def,assignment"
"""y = x @ W^T + bias for unstructured weights, in the plain layout: a bit for every weight, and the kept values.

A program expands a tile of the weight in registers. Where a kept weight lies in memory is counted from the bits before
it, so every load depends on another: this saves memory, and time only against a dense weight that would not fit.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlinear.format import Format
from qlinear.kernels.checks import check_bitmap
from qlinear.kernels.configs import Config, no_empty_part
from qlinear.kernels.dequantize import linear_in_slices
from qlinear.kernels.epilogue import share_partials, split_buffers, store_output
from qlinear.kernels.runtime import MAX_SPLIT_TILES, Target, aligned, device_guard, target_of
from qlinear.kernels.tiles import settled

#: Rows of a tile, and words of 32 columns: of float32, whose three products for one need registers, there are half.
_ROWS = 64
#: Rows of a tile that is only expanded: few, so that there are programs for every processor.
_EXPANDED_ROWS = 16
_WORDS = {torch.float16: 4, torch.bfloat16: 4, torch.float32: 2}
#: K is split so that a multiprocessor has this many programs, each of which keeps this many tiles.
_PROGRAMS, _MIN_TILES = 4, 4


@triton.jit
def _count(words, PTX: tl.constexpr):
    """How many bits of int32 words are set (Warren, "Hacker's Delight", chapter 5)."""
    if PTX:
        return tl.inline_asm_elementwise("popc.b32 $0, $1;", "=r,r", [words], dtype=tl.int32, is_pure=True, pack=1)
    else:
        words = words.to(tl.uint32, bitcast=True)
        pairs = words - ((words >> 1) & 0x55555555)
        fours = (pairs & 0x33333333) + ((pairs >> 2) & 0x33333333)
        bytes = (fours + (fours >> 4)) & 0x0F0F0F0F
        # Their sum by shifts: a product would overflow, which the interpreter warns of.
        sums = bytes + (bytes >> 8)
        return ((sums + (sums >> 16)) & 63).to(tl.int32)


@triton.jit
def _load_words(index_ptrs, first, words, rows_mask, WORDS: tl.constexpr):
    """The words ``[rows, WORDS]`` of the bits from word ``first`` on; 0 past the end of a row."""
    offs = first + tl.arange(0, WORDS)
    return tl.load(index_ptrs[:, None] + 1 + offs[None, :], mask=rows_mask[:, None] & (offs < words)[None, :], other=0)


@triton.jit
def _expand(words, start, w_ptr, OFFSET: tl.constexpr, PTX: tl.constexpr, DT: tl.constexpr):
    """A tile ``[rows, 32 * WORDS]`` of the weight without its scale, in DT, and where the next one's values begin.

    words: its bits ``[rows, WORDS]``. start: ``[rows]``, the place of each row's first value. OFFSET: the code of 0.
    """
    ROWS: tl.constexpr = words.shape[0]
    WORDS: tl.constexpr = words.shape[1]
    counts = _count(words, PTX)
    before = start[:, None] + tl.cumsum(counts, 1) - counts
    lane = tl.arange(0, 32)
    below = ((1 << lane) - 1)[None, None, :]
    place = before[:, :, None] + _count(words[:, :, None] & below, PTX)
    kept = ((words[:, :, None] >> lane[None, None, :]) & 1) != 0
    values = tl.load(w_ptr + place, mask=kept, other=OFFSET)
    tile = tl.reshape(values, (ROWS, 32 * WORDS))
    if OFFSET != 0:
        tile = tile.to(tl.int32) - OFFSET
    return tile.to(tl.float32).to(DT), start + tl.sum(counts, 1)


@triton.jit(do_not_specialize=["M", "splits"])
def _bitmap_kernel(
    x_ptr, w_ptr, scale_ptr, index_ptr, bias_ptr, y_ptr, partial_ptr, counter_ptr, M, N, K, stride_xm, splits,
    OFFSET: tl.constexpr, PTX: tl.constexpr, PRECISION: tl.constexpr, WAIT: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """y[m, n] = sum_k x[m, k] * value[n, k] * scale[n] + bias[n]

    x: [M, K], rows stride_xm apart. y: [M, N] contiguous. bias: [N] or None. w, index: see :mod:`qlinear.sparse`.
    scale: [N], or None where values are floats.
    """
    tile, split = tl.program_id(0) // splits, tl.program_id(0) % splits
    tiles_m, words = tl.cdiv(M, BLOCK_M), tl.cdiv(K, 32)
    pid_m, pid_n = tile % tiles_m, tile // tiles_m
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, 32 * WORDS)
    here = offs_n < N
    index_ptrs = index_ptr + offs_n.to(tl.int64) * (words + 1)
    per_split = tl.cdiv(tl.cdiv(words, WORDS), splits)
    first = split * per_split
    last = tl.minimum(first + per_split, tl.cdiv(words, WORDS))
    start = tl.load(index_ptrs, mask=here, other=0)
    for block in range(0, first):
        start += tl.sum(_count(_load_words(index_ptrs, block * WORDS, words, here, WORDS), PTX), 1)
    x_ptrs = x_ptr + offs_m.to(tl.int64)[None, :] * stride_xm + offs_k[:, None]
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for block in range(first, last):
        bits = _load_words(index_ptrs, block * WORDS, words, here, WORDS)
        w, start = _expand(bits, start, w_ptr, OFFSET, PTX, x_ptr.dtype.element_ty)
        k = block * (32 * WORDS)
        x = tl.load(x_ptrs + k, mask=(offs_m < M)[None, :] & (k + offs_k < K)[:, None], other=0)
        total = tl.dot(w, x, acc, input_precision=PRECISION)
        acc = settled(total) if WAIT else total
    is_last = splits == 1
    if splits > 1:
        acc, is_last = share_partials(
            acc, partial_ptr, counter_ptr, tile, tile.to(tl.int64) * splits, split, splits, M - pid_m * BLOCK_M,
            BLOCK_M, BLOCK_N,
        )  # fmt: skip
    if is_last:
        scale = tl.load(scale_ptr + offs_n, mask=here, other=0) if scale_ptr is not None else None
        store_output(acc, y_ptr, scale, None, bias_ptr, offs_n, offs_m, M, N, 1.0)


@triton.jit
def _expand_kernel(
    w_ptr, scale_ptr, index_ptr, y_ptr, N, K,
    OFFSET: tl.constexpr, PTX: tl.constexpr, BLOCK_N: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """y[n, k] = value[n, k] * scale[n], in float32 and rounded once to y's dtype; y: [N, K] contiguous."""
    words = tl.cdiv(K, 32)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    here = offs_n < N
    index_ptrs = index_ptr + offs_n.to(tl.int64) * (words + 1)
    start = tl.load(index_ptrs, mask=here, other=0)
    scale = tl.load(scale_ptr + offs_n, mask=here, other=0).to(tl.float32) if scale_ptr is not None else None
    for first in range(0, words, WORDS):
        bits = _load_words(index_ptrs, first, words, here, WORDS)
        w, start = _expand(bits, start, w_ptr, OFFSET, PTX, tl.float32)
        if scale is not None:
            w *= scale[:, None]
        offs_k = first * 32 + tl.arange(0, 32 * WORDS)
        y_ptrs = y_ptr + offs_n.to(tl.int64)[:, None] * K + offs_k[None, :]
        tl.store(y_ptrs, w.to(y_ptr.dtype.element_ty), mask=here[:, None] & (offs_k < K)[None, :])


def bitmap_linear_tensors(
    x: Tensor, weight: Tensor, scale: Tensor, index: Tensor, fmt: Format, out_features: int, bias: Tensor | None = None
) -> Tensor:
    """``x @ W^T + bias`` for x ``[M, K]`` and an unstructured weight in the ``plain`` layout.

    Raises:
        ValueError: a dtype, a shape or a device does not fit.
    """
    check_bitmap(x, weight, scale, index, fmt, out_features, bias)
    (m, k), target = x.shape, target_of(x.device)
    if target.interpreted and x.dtype == torch.bfloat16:
        # Triton's interpreter takes the bits of bfloat16 for integers when it multiplies.
        return bitmap_linear_tensors(x.float(), weight, scale, index, fmt, out_features, bias).to(x.dtype)
    y = torch.empty(m, out_features, dtype=x.dtype, device=x.device)
    if m == 0:
        return y
    x = aligned(x)
    config = bitmap_config(m, out_features, k, x.dtype, target)
    tiles = triton.cdiv(m, config.block_m) * triton.cdiv(out_features, config.block_n)
    partial, counter = split_buffers(tiles, config, torch.float32, x.device)
    values, scales = _pointers(weight, scale, fmt)
    with device_guard(x.device):
        _bitmap_kernel[(tiles * config.split_k,)](
            x, values, scales, index, None if bias is None else bias.contiguous(), y, partial, counter,
            m, out_features, k, x.stride(0), config.split_k,
            **bitmap_constexprs(fmt, x.dtype, config, target), num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return y


def expand_tensors(
    weight: Tensor, scale: Tensor, index: Tensor, fmt: Format, in_features: int, dtype: torch.dtype
) -> Tensor:
    """The dense weight ``[N, K]`` of all rows that ``index`` and ``scale`` have, in ``dtype``."""
    target, rows = target_of(weight.device), len(index)
    # The interpreter truncates to bfloat16 where it should round.
    stored = torch.float32 if target.interpreted else dtype
    y = torch.empty(rows, in_features, dtype=stored, device=weight.device)
    values, scales = _pointers(weight, scale, fmt)
    with device_guard(weight.device):
        _expand_kernel[(triton.cdiv(rows, _EXPANDED_ROWS),)](
            values, scales, index, y, rows, in_features, **expand_constexprs(fmt, target)
        )
    return y.to(dtype)


def expanded_linear_tensors(
    x: Tensor, weight: Tensor, scale: Tensor, index: Tensor, fmt: Format, out_features: int, bias: Tensor | None = None
) -> Tensor:
    """As :func:`bitmap_linear_tensors`, for many tokens: expands some rows at a time for the vendor's matmul."""
    check_bitmap(x, weight, scale, index, fmt, out_features, bias)

    def dense(start: int, stop: int) -> Tensor:
        return expand_tensors(weight, scale[start:stop], index[start:stop], fmt, x.shape[1], x.dtype)

    return linear_in_slices(x, out_features, dense, bias)


def _pointers(weight: Tensor, scale: Tensor, fmt: Format) -> tuple[Tensor, Tensor | None]:
    """The stored values as bytes or as floats, and the scales where there are any."""
    return (weight.view(scale.dtype), None) if fmt.number == "float" else (weight.view(torch.uint8), scale)


def bitmap_config(m: int, n: int, k: int, dtype: torch.dtype, target: Target) -> Config:
    """The configuration for x ``[m, k]`` of ``dtype`` and a weight of n rows."""
    block_m = 64 if m > 16 and dtype != torch.float32 else 16
    tiles, blocks = -(-n // _ROWS) * -(-m // block_m), -(-k // step_columns(dtype))
    split = 1
    if tiles <= MAX_SPLIT_TILES and blocks >= _MIN_TILES:
        split = no_empty_part(blocks, max(1, min(target.num_sms * _PROGRAMS // tiles, blocks // _MIN_TILES)))
    return Config(block_m, _ROWS, 4, 2, split)


def shipped_bitmap_configs(dtype: torch.dtype, target: Target) -> list[Config]:
    """Every configuration :func:`bitmap_config` can return, up to ``split_k``."""
    found = (bitmap_config(m, 4096, 4096, dtype, target) for m in (16, 64))
    return list(dict.fromkeys(found))


def step_columns(dtype: torch.dtype) -> int:
    """Columns of K that an iteration of the matmul kernel covers, for x in ``dtype``."""
    return 32 * _WORDS[dtype]


def bitmap_constexprs(fmt: Format, dtype: torch.dtype, config: Config, target: Target) -> dict[str, Any]:
    """The compile-time arguments of the matmul kernel for x in ``dtype``."""
    tile = {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "WORDS": _WORDS[dtype]}
    wait = target.nvidia and config.waits_for_operands(target.capability)
    return {"OFFSET": fmt.offset, "PTX": target.nvidia, "PRECISION": target.precision(dtype), "WAIT": wait, **tile}


def expand_constexprs(fmt: Format, target: Target) -> dict[str, Any]:
    """The compile-time arguments of the kernel that writes the dense weight."""
    return {"OFFSET": fmt.offset, "PTX": target.nvidia, "BLOCK_N": _EXPANDED_ROWS, "WORDS": _WORDS[torch.float16]}
