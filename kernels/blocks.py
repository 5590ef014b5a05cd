# mypy: disable-error-code="no-untyped-def,assignment"

"""y = x @ W^T + bias for block-sparse weights: only stored blocks are read and multiplied.

A loop of its own beside that of matmul.py, because here a program's blocks are a list: the weight is read one block
after the other, the tokens from where the list says. Decoders, scales, split-K and epilogue are the same.
"""

from __future__ import annotations

from math import ceil
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
from qlinear.kernels.tiles import concat, scale_planes, settled

#: K of a row of blocks is split so that the device is full, but a program keeps this many blocks ...
_MIN_BLOCKS = 4
#: ... and partial sums this share of the bytes of the stored blocks.
_MAX_PARTIALS = 0.5
#: Warps that a multiprocessor shall have.
_WARPS = 16
#: Where the average row is not cut, only what is this many times as long is.
_LONG = 2


@triton.jit
def part_of(place, index_ptr, rows, per):
    """What the program at ``place`` of ``rows + blocks // per`` does, where none has more than ``per`` blocks.

    Returns ``(rank, part, parts, first_sum, first, last)``: the rank of its row of blocks in the index, which of how
    many equal parts of it, the number of the row's first partial sum, and the blocks from first to last. Where the row
    has no such part there is nothing to do.

    The first ``rows`` places have the first part of each row. Each of the others stands for a ``per``-th block, counted
    by rank, and has a further part of that block's row. They suffice: of c blocks that follow each other c // per or
    more are a ``per``-th, and ceil(c / per) is at most one more than that. Rows that are cut have the first ranks and
    are at most blocks // per, so that twice as many partial sums have room for all of theirs.
    """
    starts, before, ranks = index_ptr + rows, index_ptr + 2 * rows, index_ptr + 3 * rows + 1
    more = place - rows + 1
    rank = tl.load(ranks + more * per - 1, mask=more > 0, other=place)
    start, passed = tl.load(starts + rank), tl.load(before + rank)
    count = tl.load(before + rank + 1) - passed
    part = tl.where(more > 0, more - passed // per, 0)
    # A row without blocks has one part too: it stores the bias.
    parts = tl.maximum(tl.cdiv(count, per), 1)
    length = tl.cdiv(count, parts)
    last = tl.minimum((part + 1) * length, count)
    return rank, part, parts, passed // per + rank, start + part * length, start + last


@triton.jit(do_not_specialize=["M", "per"])
def _block_kernel(
    x_ptr, w_ptr, scale_ptr, index_ptr, bias_ptr, y_ptr, partial_ptr, counter_ptr, M, N, K, stride_xm, per,
    DECODE: tl.constexpr, PLANES: tl.constexpr, GROUP: tl.constexpr, SCALED: tl.constexpr, OFFSET: tl.constexpr,
    SCALE_WEIGHT: tl.constexpr, JOIN: tl.constexpr, MASK_K: tl.constexpr, PTX: tl.constexpr, PRECISION: tl.constexpr,
    WAIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """y[m, n] = sum over the stored blocks of n's row of sum_k x[m, k] * value[n, k] * scale + bias[n]

    x: [M, K], rows stride_xm apart. y: [M, N] contiguous. bias: [N] or None. w, scale, index: see
    :mod:`qlinear.sparse_layout`; a block is BLOCK_N x BLOCK_N. GROUP is None where a scale belongs to a whole row, and
    SCALED false where there is none. per, and the places that are axis 1 of the grid: see part_of; axis 0 is tiles of
    tokens. partial, counter: see share_partials.
    """
    DT: tl.constexpr = x_ptr.dtype.element_ty
    WORDS: tl.constexpr = BLOCK_N // PLANES
    # Planes of one product, and its columns.
    SLICES: tl.constexpr = PLANES if JOIN else 1
    STEP: tl.constexpr = WORDS * SLICES
    tiles_m, rows = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    pid_m = tl.program_id(0)
    blocks = tl.load(index_ptr + 3 * rows)
    _, part, parts, _, first, last = part_of(tl.program_id(1), index_ptr, rows, per)
    if part >= parts:
        return
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    row, offs_k = tl.arange(0, BLOCK_N), tl.arange(0, STEP)
    w_offs = row[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
    columns = index_ptr + 3 * rows + 1 + blocks + first
    x_ptrs = x_ptr + offs_m.to(tl.int64)[None, :] * stride_xm + offs_k[:, None]
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
        column = tl.load(columns) * BLOCK_N
        columns += 1
        planes = DECODE(tl.load(w_base + w_offs), zeros, PTX, DT)
        w_base += BLOCK_N * WORDS
        if GROUP is not None:
            s_ptrs += tl.where(block + 1 < last, BLOCK_N, 0)
            next_scale = tl.load(s_ptrs)
            # Not after the product: there ptxas widens the next scale instead, and waits for it.
            wide_scale = scale.to(tl.float32)
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
            acc = settled(total) if WAIT else total
        else:
            acc += total * wide_scale[:, None]
        if GROUP is not None:
            scale = next_scale

    # Asked for once more: what is carried through the loop takes registers there.
    rank, part, parts, first_sum, _, _ = part_of(tl.program_id(1), index_ptr, rows, per)
    is_last = parts == 1
    if parts > 1:
        first_sum = first_sum * tiles_m + pid_m * parts
        acc, is_last = share_partials(
            acc, partial_ptr, counter_ptr, rank * tiles_m + pid_m, first_sum.to(tl.int64), part, parts,
            M - pid_m * BLOCK_M, BLOCK_M, BLOCK_N, AHEAD,
        )  # fmt: skip
    if is_last:
        pid_n = tl.load(index_ptr + rank)
        row_scale = tl.load(scale_ptr + pid_n * BLOCK_N + row) if SCALED and GROUP is None else None
        store_output(acc, y_ptr, row_scale, None, bias_ptr, pid_n * BLOCK_N + row, offs_m, M, N, 1.0)


def choose_block_config(
    m: int, n: int, blocks: int, fmt: Format, dtype: torch.dtype, capability: Capability, num_sms: int
) -> Config:
    """The configuration for x ``[m, K]`` of ``dtype`` and a weight of n rows with ``blocks`` stored blocks."""
    assert fmt.block
    bucket = min(bucket_of(m), TILE_TOKENS)
    block_m, warps, stages = _tile(bucket, dtype, capability)
    rows, split = -(-n // fmt.block), 1
    tiles = rows * -(-bucket // block_m)
    if m <= TILE_TOKENS and tiles <= MAX_SPLIT_TILES:
        wanted = num_sms * _WARPS // warps // tiles
        split = max(1, min(wanted, int(blocks / rows / _shortest_part(bucket, fmt))))
    return Config(block_m, fmt.block, warps, stages, split)


def longest_part(m: int, n: int, blocks: int, fmt: Format, config: Config) -> int:
    """The most blocks that a program has; more than there are where no row is cut.

    It follows from shapes and the bucket of m: how different rows are is on the device, and is not waited for.
    """
    assert fmt.block
    rows, bucket = -(-n // fmt.block), bucket_of(m)
    if config.split_k > 1:
        return max(1, blocks // (rows * config.split_k))
    if bucket > TILE_TOKENS or rows * -(-bucket // config.block_m) > MAX_SPLIT_TILES:
        return blocks + 1
    return ceil(_LONG * max(blocks / rows, _shortest_part(bucket, fmt)))


def _shortest_part(bucket: int, fmt: Format) -> float:
    """The fewest blocks that are worth a program and its partial sums."""
    assert fmt.block
    stored, partial = fmt.block**2 * fmt.bits / 8, 4 * bucket * fmt.block
    return max(_MIN_BLOCKS, partial / (_MAX_PARTIALS * stored))


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
    tiles_m, rows = triton.cdiv(m, config.block_m), triton.cdiv(out_features, config.block_n)
    per = longest_part(m, out_features, len(weight), fmt, config)
    more = len(weight) // per
    # Of what can be cut, see part_of.
    cut, sums = tiles_m * min(rows, more), tiles_m * min(rows + more, 2 * more)
    partial, counter = split_buffers(cut, config, torch.float32, x.device, sums)
    if fmt.number == "float":
        weight = weight.view(scale.dtype)
    with device_guard(x.device):
        _block_kernel[(tiles_m, rows + more)](
            x, weight, scale, index, None if bias is None else bias.contiguous(), y, partial, counter,
            m, out_features, k, x.stride(0), per,
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
        "WAIT": target.nvidia and config.waits_for_operands(target.capability),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        # Parts that are read at a time to be added: of few tokens as many as 64 registers hold.
        "AHEAD": max(1, 32 // config.block_m),
    }
