# mypy: disable-error-code="no-untyped-def,assignment"

"""y = x @ W^T + bias for block-sparse weights: only stored blocks are read and multiplied.

A loop of its own beside that of matmul.py, because here a program's blocks are a list: the weight is read one block
after the other, the tokens from where the list says. Decoders, scales, split-K and epilogue are the same.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlinear.format import Format
from qlinear.kernels.checks import check_blocks
from qlinear.kernels.configs import Config, bucket_of
from qlinear.kernels.decode import DECODERS
from qlinear.kernels.epilogue import share_partials, split_buffers, store_output
from qlinear.kernels.runtime import MAX_SPLIT_TILES, Capability, Target, aligned, device_guard, target_of
from qlinear.kernels.tile_table import M_BUCKETS, TILE_TOKENS
from qlinear.kernels.tiles import concat, scale_planes

#: K of a row of blocks is split so that the device is full, but a program keeps this many blocks ...
_MIN_BLOCKS = 4
#: ... and partial sums this share of the bytes of the stored blocks.
_MAX_PARTIALS = 0.5
#: Warps that a multiprocessor shall have.
_WARPS = 16


@triton.jit(do_not_specialize=["M", "splits"])
def _block_kernel(
    x_ptr, w_ptr, scale_ptr, index_ptr, bias_ptr, y_ptr, partial_ptr, counter_ptr, M, N, K, stride_xm, splits,
    DECODE: tl.constexpr, PLANES: tl.constexpr, GROUP: tl.constexpr, SCALED: tl.constexpr, OFFSET: tl.constexpr,
    SCALE_WEIGHT: tl.constexpr, JOIN: tl.constexpr, MASK_K: tl.constexpr, PTX: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y[m, n] = sum over the stored blocks of n's row of sum_k x[m, k] * value[n, k] * scale + bias[n]

    x: [M, K], rows stride_xm apart. y: [M, N] contiguous. bias: [N] or None. w, scale, index: see
    :mod:`qlinear.sparse_layout`; a block is BLOCK_N x BLOCK_N. GROUP is None where a scale belongs to a whole row, and
    SCALED false where there is none. Rows of blocks are taken in the order of the index, the longest first, and every
    one is cut in ``splits`` parts: programs that take long start early. partial, counter: see share_partials.
    """
    DT: tl.constexpr = x_ptr.dtype.element_ty
    WORDS: tl.constexpr = BLOCK_N // PLANES
    # Planes of one product, and its columns.
    SLICES: tl.constexpr = PLANES if JOIN else 1
    STEP: tl.constexpr = WORDS * SLICES
    tile, split = tl.program_id(0) // splits, tl.program_id(0) % splits
    tiles_m, rows = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    pid_m, pid_n = tile % tiles_m, tl.load(index_ptr + tile // tiles_m)
    start, end = tl.load(index_ptr + rows + pid_n), tl.load(index_ptr + rows + pid_n + 1)
    per_split = tl.cdiv(end - start, splits)
    first = tl.minimum(start + split * per_split, end)
    last = tl.minimum(first + per_split, end)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    row, offs_k = tl.arange(0, BLOCK_N), tl.arange(0, STEP)
    offs_n = pid_n * BLOCK_N + row
    w_offs = row[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
    x_ptrs = x_ptr + offs_m.to(tl.int64)[None, :] * stride_xm + offs_k[:, None]
    columns = index_ptr + 2 * rows + 1
    zeros = ()
    for _ in tl.static_range(PLANES):
        zeros += (OFFSET,)

    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    w_base = w_ptr + first.to(tl.int64) * (BLOCK_N * WORDS)
    s_ptrs = scale_ptr + first.to(tl.int64) * BLOCK_N + row
    if GROUP is not None:
        # Triton loads ahead what a product needs, but not scales: the next ones are carried in registers.
        scale = tl.load(s_ptrs, mask=row < tl.where(first < last, BLOCK_N, 0), other=0)
    for block in range(first, last):
        column = tl.load(columns + block) * BLOCK_N
        planes = DECODE(tl.load(w_base + w_offs), zeros, PTX, DT)
        w_base += BLOCK_N * WORDS
        if GROUP is not None:
            s_ptrs += tl.where(block + 1 < last, BLOCK_N, 0)
            next_scale = tl.load(s_ptrs)
            if SCALE_WEIGHT:
                planes = scale_planes(planes, (scale,), PLANES, 1, DT)
        total = acc if GROUP is None or SCALE_WEIGHT else tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for j in tl.static_range(BLOCK_N // STEP):
            mask = (offs_m < M)[None, :]
            if MASK_K:
                mask = mask & (offs_k < K - column - j * STEP)[:, None]
            x = tl.load(x_ptrs + (column + j * STEP), mask=mask, other=0)
            w = concat(planes, j * SLICES, SLICES)
            total = tl.dot(w, x, total, input_precision=PRECISION)
        if GROUP is None or SCALE_WEIGHT:
            acc = total
        else:
            acc += total * scale.to(tl.float32)[:, None]
        if GROUP is not None:
            scale = next_scale

    is_last = splits == 1
    if splits > 1:
        acc, is_last = share_partials(
            acc, partial_ptr, counter_ptr, tile, split, splits, M - pid_m * BLOCK_M, BLOCK_M, BLOCK_N
        )
    if is_last:
        row_scale = tl.load(scale_ptr + pid_n * BLOCK_N + row) if SCALED and GROUP is None else None
        store_output(acc, y_ptr, row_scale, None, bias_ptr, offs_n, offs_m, M, N, 1.0)


def choose_block_config(
    m: int, n: int, blocks: int, fmt: Format, dtype: torch.dtype, capability: Capability, num_sms: int
) -> Config:
    """The configuration for x ``[m, K]`` of ``dtype`` and a weight of n rows with ``blocks`` stored blocks."""
    assert fmt.block
    bucket = min(bucket_of(m), TILE_TOKENS)
    block_m, warps, stages = _tile(bucket, dtype, capability)
    rows, split = -(-n // fmt.block), 1
    tiles = rows * -(-m // block_m)
    if m <= TILE_TOKENS and tiles <= MAX_SPLIT_TILES:
        wanted = num_sms * _WARPS // warps // tiles
        # Of one row of blocks, and of the sums of one part of it.
        stored, partial = blocks / rows * fmt.block**2 * fmt.bits / 8, 4 * bucket * fmt.block
        split = max(1, min(wanted, blocks // rows // _MIN_BLOCKS, int(_MAX_PARTIALS * stored / partial)))
    return Config(block_m, fmt.block, warps, stages, split)


def shipped_block_configs(fmt: Format, dtype: torch.dtype, capability: Capability) -> list[Config]:
    """Every configuration :func:`choose_block_config` can return, up to ``split_k``."""
    assert fmt.block
    tiles = dict.fromkeys(_tile(bucket, dtype, capability) for bucket in M_BUCKETS if bucket <= TILE_TOKENS)
    return [Config(block_m, fmt.block, warps, stages) for block_m, warps, stages in tiles]


def _tile(bucket: int, dtype: torch.dtype, capability: Capability) -> tuple[int, int, int]:
    """(BLOCK_M, warps, stages). Where tokens are is loaded first, so the loop needs two stages more than others."""
    if isinstance(capability, str):
        return max(16, 16 if dtype == torch.float32 else bucket), 4, 2
    if dtype == torch.float32:
        return 8, 4, 3
    # Few tokens: one warp reads the tokens once for all 64 rows, and waits for nobody. For int4 and up to 8 tokens that
    # is 2.40 instructions a weight on sm_90; two warps take 3.12.
    return (bucket, 1, 6) if bucket <= 16 else (bucket, 4, 5)


def block_linear_tensors(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    index: Tensor,
    fmt: Format,
    out_features: int,
    bias: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """``x @ W^T + bias`` for x ``[M, K]`` and a block-sparse weight in the ``triton`` layout.

    Raises:
        ValueError: a dtype, a shape or a device does not fit.
    """
    check_blocks(x, weight, scale, index, fmt, out_features, bias)
    m, k = x.shape
    target = target_of(x.device)
    if target.interpreted and x.dtype == torch.bfloat16:
        # Triton's interpreter takes the bits of bfloat16 for integers when it multiplies.
        wide = block_linear_tensors(x.float(), weight, scale, index, fmt, out_features, bias, config)
        return wide.to(x.dtype)
    y = torch.empty(m, out_features, dtype=x.dtype, device=x.device)
    if m == 0:
        return y
    x = aligned(x)
    if config is None:
        config = choose_block_config(m, out_features, len(weight), fmt, x.dtype, target.capability, target.num_sms)
    tiles = triton.cdiv(m, config.block_m) * triton.cdiv(out_features, config.block_n)
    partial, counter = split_buffers(tiles, config, torch.float32, x.device)
    if fmt.number == "float":
        weight = weight.view(scale.dtype)
    with device_guard(x.device):
        _block_kernel[(tiles * config.split_k,)](
            x, weight, scale, index, None if bias is None else bias.contiguous(), y, partial, counter,
            m, out_features, k, x.stride(0), config.split_k,
            **block_constexprs(fmt, x.dtype, k, config, target),
            **block_options(k, config, target.capability),
        )  # fmt: skip
    return y


def block_options(in_features: int, config: Config, capability: Capability) -> dict[str, int]:
    """What the kernel is compiled with, beside its constants."""
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    # With masks ptxas stops at 128 registers and spills 24 bytes of w8a16-block64 on sm_100; told that it may, it takes
    # 146.
    if in_features % config.block_n and not isinstance(capability, str):
        options["maxnreg"] = 255
    return options


def block_constexprs(
    fmt: Format, dtype: torch.dtype, in_features: int, config: Config, target: Target
) -> dict[str, Any]:
    """The compile-time arguments of the kernel for x in ``dtype``."""
    decoder = DECODERS[fmt.packing]
    return {
        "DECODE": decoder.function,
        "PLANES": decoder.planes,
        "GROUP": fmt.group_size,
        "SCALED": fmt.number == "int",
        "OFFSET": fmt.offset,
        "SCALE_WEIGHT": config.scales_weight(fmt),
        "JOIN": config.joins_planes(fmt, dtype, target.capability),
        "MASK_K": in_features % config.block_n != 0,
        "PTX": target.nvidia,
        "PRECISION": target.precision(dtype),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
    }
