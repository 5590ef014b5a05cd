# mypy: disable-error-code="no-untyped-def,assignment"
"""What every matmul kernel ends with: the parts of K are added, scaled and stored."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlinear.kernels.configs import Config
from qlinear.kernels.runtime import MAX_SPLIT_TILES, counters, unused


@triton.jit
def store_output(acc, y_ptr, scale, x_scale_ptr, bias_ptr, offs_n, offs_m, M, N, UNIT: tl.constexpr):
    """y[m, n] = acc[n, m] * UNIT * scale[n] * x_scale[m] + bias[n], cast once; scale, x_scale and bias may be None."""
    acc = acc.to(tl.float32)
    if scale is not None:
        acc *= (scale.to(tl.float32) * UNIT)[:, None]
    if x_scale_ptr is not None:
        acc *= tl.load(x_scale_ptr + offs_m, mask=offs_m < M, other=0.0)[None, :]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[:, None]
    y_ptrs = y_ptr + offs_m.to(tl.int64)[None, :] * N + offs_n[:, None]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=(offs_m < M)[None, :] & (offs_n < N)[:, None])


@triton.jit
def share_partials(
    acc, partial_ptr, counter_ptr, tile, first, split, splits, rows, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    AHEAD: tl.constexpr = 1,
):  # fmt: skip
    """Split-K in one launch: returns ``(sum of all partials, whether this program is the one that stores it)``.

    Every program writes its partial sum and counts itself in; the last to arrive adds all of them in the order of
    their index, so the bits do not depend on who was last, and sets the counter back to zero for the next launch.

    tile: whose counter. first: the number of its first partial sum, in 64 bits; its others follow.
    """
    offs = tl.arange(0, BLOCK_N)[:, None] + tl.arange(0, BLOCK_M)[None, :] * BLOCK_N
    mask = (tl.arange(0, BLOCK_M) < rows)[None, :]
    ptrs = partial_ptr + first * (BLOCK_M * BLOCK_N) + offs
    tl.store(ptrs + split * (BLOCK_M * BLOCK_N), acc, mask=mask)
    # All threads have written before one of them counts (release), and none reads before that (acquire).
    tl.debug_barrier()
    is_last = tl.atomic_add(counter_ptr + tile, 1, sem="acq_rel", scope="gpu") == splits - 1
    if is_last:
        tl.store(counter_ptr + tile, 0)
        acc = tl.zeros_like(acc)
        # AHEAD parts are on their way at a time: one by one each is a trip to the L2 cache.
        for s in range(0, splits, AHEAD):
            for i in tl.static_range(AHEAD):
                # .cg: not from L1, which other processors' writes do not reach.
                there = mask & (s + i < splits)
                acc += tl.load(ptrs + (s + i) * (BLOCK_M * BLOCK_N), mask=there, other=0, cache_modifier=".cg")
    return acc, is_last


def split_buffers(
    tiles: int, config: Config, sums: torch.dtype, device: torch.device, parts: int | None = None
) -> tuple[Tensor, Tensor]:
    """Where the programs of a launch leave their partial sums, and the counters they count themselves in.

    Args:
        parts: of all tiles together; None where each has ``config.split_k``.

    Raises:
        ValueError: there are more tiles than counters.
    """
    parts = tiles * config.split_k if parts is None else parts
    if parts <= tiles:
        return unused(device, sums), unused(device, torch.int32)
    if tiles > MAX_SPLIT_TILES:
        raise ValueError(f"{config} splits {tiles} tiles along K; at most {MAX_SPLIT_TILES} can be")
    return torch.empty(parts * config.block_m * config.block_n, dtype=sums, device=device), counters(device)
