# mypy: disable-error-code="no-untyped-def,assignment"

"""2:4 weights on NVIDIA's sparse tensor cores, for few tokens: ``mma.sp.m16n8k32`` (PTX ISA; sm_80 to sm_90).

Opt-in and unverified: no GPU has run it yet. Ask for it with ``to_layout("mma.sp")``; the default of 2:4 weights is the
``triton`` layout.

Triton knows no sparse product, so it is inline PTX (see :mod:`qlinear.kernels.fragments`). :mod:`qlinear.layout24`
stores weights and metadata in the order in which the threads of a warp hold the operands: they go from memory into the
product without changing thread. Of the tokens every thread gathers its own pairs of numbers, and uses them for the 8
tiles of 16 rows that its warp has. The warps of a program share K (``WK``) and rows (``WN``); what they add up is put
together at the end.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlinear.format import BLOCK_K, Format
from qlinear.kernels.checks import check_fragments
from qlinear.kernels.configs import Config, check_parts, no_empty_part
from qlinear.kernels.epilogue import share_partials, split_buffers, store_output
from qlinear.kernels.fragments import (
    columns_of,
    decode_tile,
    halves,
    load_groups,
    load_tokens,
    load_words,
    mma_sp,
    offsets4,
)
from qlinear.kernels.runtime import MAX_SPLIT_TILES, Target, device_guard, target_of
from qlinear.layout24 import FRAGMENT_ROWS


@triton.jit
def four(values, i: tl.constexpr):
    """The i-th four of a tuple."""
    return (values[4 * i], values[4 * i + 1], values[4 * i + 2], values[4 * i + 3])


@triton.jit
def multiply_tiles(
    sums, weights, metadata, w_ptrs, i_ptrs, mask, scales, zeros, x,
    BITS: tl.constexpr, NT: tl.constexpr, DT: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """One step along K: all tiles of a warp by the tokens it holds. Returns the sums, and what the next step takes.

    The next weights of a tile are loaded from ``w_ptrs`` when it has been decoded, into the registers that this leaves
    free; so is the metadata.
    """
    P: tl.constexpr = 16 // BITS
    nothing = tl.zeros_like(sums[0])
    added, next_weights, next_metadata = (), (), ()
    words = columns_of(metadata)
    for r in tl.static_range(8):
        offsets = (None, None)
        if BITS == 4:
            offsets = offsets4(zeros[r], DT)
        a = decode_tile(weights[r], offsets, BITS, DT)
        next_weights += load_words(w_ptrs + r * 128, mask, 1, 0)
        for t in tl.static_range(NT):
            old = four(sums, r * NT + t)
            c = old if SCALE is None else (nothing, nothing, nothing, nothing)
            for j in tl.static_range(P):
                c = mma_sp(c, four(a, j), four(x, t * P + j), words[r // 2 * P + j], DT, r % 2)
            if SCALE is not None:
                upper, lower = halves(scales[r], SCALE)
                c = (old[0] + c[0] * upper, old[1] + c[1] * upper, old[2] + c[2] * lower, old[3] + c[3] * lower)
            added += (c[0], c[1], c[2], c[3])
        if r % (8 // P) == 8 // P - 1:
            next_metadata += load_words(i_ptrs + r // (8 // P) * 128, None, 1, 0)
    return added, next_weights, next_metadata


@triton.jit
def join_halves(parts, HALF: tl.constexpr):
    """Each of the first half of a tuple beside its like of the second."""
    joined = ()
    for i in tl.static_range(HALF):
        joined += (tl.join(parts[i], parts[i + HALF]),)
    return joined


@triton.jit
def gather_tile(sums, NT: tl.constexpr, WN: tl.constexpr, WK: tl.constexpr):
    """The registers of all threads as the tile ``[128 * WN, 8 * NT]`` they are, the warps along K added in order."""
    parts = sums
    for _ in tl.static_range(6 if NT == 2 else 5):
        parts = join_halves(parts, len(parts) // 2)
    # [warp rows, warp along K, lane / 4, lane % 4, tile, token tile, half, token % 2]
    tile = tl.reshape(parts[0], (WN, WK, 8, 4, 8, NT, 2, 2))
    tile = tl.sum(tile, axis=1)
    return tl.reshape(tl.permute(tile, (0, 3, 5, 1, 4, 2, 6)), (128 * WN, 8 * NT))


@triton.jit(do_not_specialize=["M", "splits"])
def _mma_sp_kernel(
    x_ptr, w_ptr, index_ptr, scale_ptr, zero_ptr, bias_ptr, y_ptr, partial_ptr, counter_ptr,
    M, N, K, stride_xm, splits,
    BITS: tl.constexpr, GROUPED: tl.constexpr, FLOAT: tl.constexpr, MASK_K: tl.constexpr,
    NT: tl.constexpr, WN: tl.constexpr, WK: tl.constexpr,
):  # fmt: skip
    """y[m, n] = sum_k x[m, k] * w[n, k] + bias[n] for a 2:4 weight in the layout ``mma.sp``.

    x: [M, K] in fp16 or bf16, rows an even number of elements apart, K even. y: [M, N] contiguous. zero: None where
    symmetric. GROUPED: scales of 128 columns, else of a row. FLOAT: codes are numbers in the dtype of x, without
    scales. partial, counter: see share_partials.
    """
    DT: tl.constexpr = x_ptr.dtype.element_ty
    SCALE: tl.constexpr = scale_ptr.dtype.element_ty if GROUPED else None
    P: tl.constexpr = 16 // BITS
    BLOCK_M: tl.constexpr = 8 * NT
    BLOCK_N: tl.constexpr = 128 * WN
    tile, split = tl.program_id(0) // splits, tl.program_id(0) % splits
    tiles_m, chunks = tl.cdiv(M, BLOCK_M), tl.cdiv(K, 128) * (4 // P)
    pid_m, pid_n = tile % tiles_m, tile // tiles_m
    steps = tl.cdiv(chunks, WK)
    per_split = tl.cdiv(steps, splits)
    first, last = split * per_split, tl.minimum((split + 1) * per_split, steps)

    thread = tl.arange(0, 32 * WN * WK)
    lane, warp = thread % 32, thread // 32
    rows = tl.minimum(pid_n * WN + warp // WK, tl.cdiv(N, 128) - 1).to(tl.int64) * chunks
    # Pairs of neighbours along K: lane % 4 of every eight columns, lane / 4 of every eight tokens.
    m, column = pid_m * BLOCK_M + lane // 4, lane % 4 * 2
    pairs = x_ptr.to(tl.pointer_type(tl.int32)) + m.to(tl.int64) * (stride_xm // 2) + lane % 4
    w_ptrs = w_ptr + lane * 4
    i_ptrs = index_ptr + lane * 4
    s_ptrs, z_ptrs = None, None
    if GROUPED:
        s_ptrs = scale_ptr.to(tl.pointer_type(tl.int32)) + lane // 4 * 8
    if zero_ptr is not None:
        z_ptrs = zero_ptr.to(tl.pointer_type(tl.int32)) + lane // 4 * 8

    # What a warp takes of a step; past the end of K the last chunk again, and tokens that are zero.
    chunk = first * WK + warp % WK
    here, inside = rows + tl.minimum(chunk, chunks - 1), chunk < chunks
    weights = load_words(w_ptrs + here * 1024, inside if FLOAT else None, 8, 128)
    metadata = load_words(i_ptrs + here * (128 * P), None, P, 128)
    x = load_tokens(
        pairs + chunk * (16 * P), stride_xm // 2, m, chunk * (32 * P) + column, inside, M, K, NT, P, MASK_K
    )  # fmt: skip
    scales, zeros = load_groups(s_ptrs, here), load_groups(z_ptrs, here)
    sums = ()
    for _ in tl.static_range(8 * NT * 4):
        sums += (tl.zeros((32 * WN * WK,), tl.float32),)
    for step in range(first, last):
        chunk = tl.minimum(step + 1, last - 1) * WK + warp % WK
        here, inside = rows + tl.minimum(chunk, chunks - 1), chunk < chunks
        next_x = load_tokens(
            pairs + chunk * (16 * P), stride_xm // 2, m, chunk * (32 * P) + column, inside, M, K, NT, P, MASK_K
        )  # fmt: skip
        tile_scales, tile_zeros = columns_of(scales), columns_of(zeros)
        if BITS == 4 and zero_ptr is None:
            for _ in tl.static_range(8):
                tile_zeros += (tl.full((32 * WN * WK,), 0x00088008, tl.int32),)
        scales, zeros = load_groups(s_ptrs, here), load_groups(z_ptrs, here)
        sums, weights, metadata = multiply_tiles(
            sums, weights, metadata, w_ptrs + here * 1024, i_ptrs + here * (128 * P), inside if FLOAT else None,
            tile_scales, tile_zeros, x, BITS, NT, DT, SCALE,
        )  # fmt: skip
        x = next_x

    acc = gather_tile(sums, NT, WN, WK)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    is_last = splits == 1
    if splits > 1:
        acc, is_last = share_partials(
            acc, partial_ptr, counter_ptr, tile, tile.to(tl.int64) * splits, split, splits, M - pid_m * BLOCK_M,
            BLOCK_M, BLOCK_N,
        )  # fmt: skip
    if is_last:
        scale = None if GROUPED or FLOAT else tl.load(scale_ptr + offs_n, mask=offs_n < N, other=0)
        store_output(acc, y_ptr, scale, None, bias_ptr, offs_n, offs_m, M, N, 1.0)


def supports(fmt: Format, x_dtype: torch.dtype, scale_dtype: torch.dtype, target: Target) -> bool:
    """Whether the kernel multiplies tokens of ``x_dtype``; floats must have the dtype of x."""
    # What has been compiled and read. Blackwell has other instructions for it.
    known = isinstance(target.capability, tuple) and (8, 0) <= target.capability < (10, 0)
    return known and x_dtype in (torch.float16, torch.bfloat16) and (fmt.number == "int" or x_dtype == scale_dtype)


def choose_fragment_config(m: int, n: int, k: int, fmt: Format, num_sms: int) -> Config:
    """The configuration for x ``[m, k]``: one program of 8 warps to a multiprocessor.

    16 tokens take 256 rows, two warps reading the same tokens, so that x is read as often as 8 tokens are.
    """
    block_m, block_n = (8, 128) if m <= 8 else (16, 256)
    tiles = -(-n // block_n) * -(-m // block_m)
    steps = _steps(k, fmt, 8 * 128 // block_n)
    split = 1 if tiles > MAX_SPLIT_TILES else max(1, min(num_sms // tiles, steps))
    return Config(block_m, block_n, 8, 1, no_empty_part(steps, split))


def shipped_fragment_configs() -> tuple[Config, ...]:
    """Every configuration :func:`choose_fragment_config` can return, up to ``split_k``, which is not compiled in."""
    return Config(8, 128, 8, 1), Config(16, 256, 8, 1)


def _steps(k: int, fmt: Format, warps: int) -> int:
    """Steps along K of a program with so many warps beside each other along K."""
    chunks = -(-k // BLOCK_K) * 4 // fmt.planes
    return -(-chunks // warps)


def fragment_constexprs(fmt: Format, in_features: int, config: Config) -> dict[str, Any]:
    """The compile-time arguments of the kernel."""
    rows = config.block_n // FRAGMENT_ROWS
    return {
        "BITS": fmt.bits,
        "GROUPED": fmt.group_size is not None,
        "FLOAT": fmt.number == "float",
        "MASK_K": in_features % BLOCK_K != 0,
        "NT": config.block_m // 8,
        "WN": rows,
        "WK": config.num_warps // rows,
    }


def fragment_linear_tensors(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    index: Tensor | None,
    fmt: Format,
    out_features: int,
    bias: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """``x @ W^T + bias`` for x ``[M, K]`` in fp16 or bf16 and the tensors of the ``mma.sp`` layout.

    Raises:
        ValueError: the layout, a dtype, a shape or the device does not fit.
    """
    check_fragments(x, weight, scale, zero, index, fmt, out_features, bias)
    target = target_of(x.device)
    if not supports(fmt, x.dtype, scale.dtype, target):
        raise ValueError(
            f"mma.sp takes float16 or bfloat16 tokens (those of {fmt.number} weights in {scale.dtype}) on NVIDIA GPUs "
            f"from sm_80 on, got {x.dtype} on {target.capability}"
        )
    (m, k), n = x.shape, out_features
    # The interpreter truncates to bfloat16 where it should round.
    dtype = torch.float32 if target.interpreted and x.dtype == torch.bfloat16 else x.dtype
    y = torch.empty(m, n, dtype=dtype, device=x.device)
    if m == 0:
        return y.to(x.dtype)
    # Pairs of numbers are loaded as words of 32 bits.
    if k % 2:
        x = torch.nn.functional.pad(x, (0, 1))
    elif x.stride(1) != 1 or x.stride(0) % 2 or x.data_ptr() % 4:
        x = x.contiguous()
    if config is None:
        config = choose_fragment_config(m, n, k, fmt, target.num_sms)
    constants = fragment_constexprs(fmt, k, config)
    check_parts(config, _steps(k, fmt, constants["WK"]), "steps")
    tiles = triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n)
    partial, counter = split_buffers(tiles, config, torch.float32, x.device)
    with device_guard(x.device):
        _mma_sp_kernel[(tiles * config.split_k,)](
            x, weight, index, scale, zero, None if bias is None else bias.contiguous(), y, partial, counter,
            m, n, k, x.stride(0), config.split_k,
            **constants, num_warps=config.num_warps,
        )  # fmt: skip
    return y.to(x.dtype)
