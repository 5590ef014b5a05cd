# mypy: disable-error-code="no-untyped-def,assignment,misc"
"""One block of 128 along K of the prepared layout, for the rows of one program: addresses, scales, decoded planes.

The layout is :mod:`qlinear.layout`'s: weight ``[N/64, K/128, 64, words]``; scale ``[N/64, G, 64]`` or, where zero
points are stored, ``[N/64, G/C, 64, 2 * C]`` with the C groups of a block side by side. ``GROUP`` is the format's
group size, None where the scale belongs to the whole row.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qlinear.format import BLOCK_K as _BLOCK_K
from qlinear.format import TILE_N as _TILE_N
from qlinear.kernels.sparse24 import expand24

BLOCK_K = tl.constexpr(_BLOCK_K)
TILE_N = tl.constexpr(_TILE_N)


@triton.jit
def padded_rows(pid_n, per_tile, N, BLOCK_N: tl.constexpr):
    """For each row of a program: its place in an array ``[N/64, per_tile, 64]`` at index 0 of the middle axis.

    N is padded to 64 only, so a program of more rows may reach past the end: it reads the last tile again there,
    and need not mask; what it computes for those rows is not stored.
    """
    row = tl.arange(0, BLOCK_N)
    tile = tl.minimum(pid_n * (BLOCK_N // TILE_N) + row // TILE_N, tl.cdiv(N, TILE_N) - 1)
    return tile.to(tl.int64) * per_tile * TILE_N + row % TILE_N


@triton.jit
def scale_rows(pid_n, blocks, N, block, COUNT: tl.constexpr, OFFSET: tl.constexpr, BLOCK_N: tl.constexpr):
    """For each row of a program: where the scales of its groups in ``block`` begin (``blocks`` is 1 per channel)."""
    if OFFSET is None:
        return (padded_rows(pid_n, blocks, N, BLOCK_N) + block * TILE_N) * (COUNT * 2)
    else:
        return padded_rows(pid_n, blocks * COUNT, N, BLOCK_N) + block * (TILE_N * COUNT)


@triton.jit
def load_scales(ptrs, COUNT: tl.constexpr, OFFSET: tl.constexpr, DT: tl.constexpr):
    """The scales of ``COUNT`` neighbouring groups, then their zero points where these are stored (OFFSET is None).

    A scale is ``[rows]`` in the dtype it is stored in, a zero point a column ``[rows, 1]`` of DT: a small integer,
    exact in every dtype.
    """
    rows: tl.constexpr = ptrs.shape[0]
    if OFFSET is None:
        # One wide load for all of a row: in groups of 32 that takes 4 % off the instructions of the loop.
        pairs = tl.load(ptrs[:, None] + tl.arange(0, 2 * COUNT)[None, :])
        scale, zero = tl.split(tl.reshape(pairs, (rows, COUNT, 2)))
        scales = split_columns(scale, COUNT)
        columns = split_columns(zero, COUNT)
        zeros = ()
        for g in tl.static_range(COUNT):
            zeros += (columns[g].to(tl.float32).to(DT)[:, None],)
        return scales + zeros
    else:
        scales = ()
        for g in tl.static_range(COUNT):
            scales += (tl.load(ptrs + g * TILE_N),)
        return scales


@triton.jit
def split_columns(t, COUNT: tl.constexpr):
    """The columns of ``t`` ``[rows, COUNT]``, each ``[rows]``."""
    rows: tl.constexpr = t.shape[0]
    if COUNT == 1:
        return (tl.reshape(t, (rows,)),)
    elif COUNT == 2:
        a, b = tl.split(t)
        return (a, b)
    else:
        even, odd = tl.split(tl.reshape(t, (rows, 2, 2)))
        a, c = tl.split(even)
        b, d = tl.split(odd)
        return (a, b, c, d)


@triton.jit
def decode_block(
    w_ptrs, index, scales, DECODE: tl.constexpr, PLANES: tl.constexpr, COUNT: tl.constexpr, OFFSET: tl.constexpr,
    float_ptr, PTX: tl.constexpr, DT: tl.constexpr,
):  # fmt: skip
    """``max(PLANES, COUNT)`` planes of the block in the order of K; ``scales`` is what load_scales returned.

    index: where the codes of a 2:4 weight belong, None of others. float_ptr: of the dtype that the codes are the bits
    of, None where they are integers.
    """
    zeros = ()
    for j in tl.static_range(PLANES):
        zeros += (scales[COUNT + j * COUNT // PLANES] if OFFSET is None else OFFSET,)
    if PLANES >= COUNT:
        words = tl.load(w_ptrs)
        if index is not None:
            words = expand24(words, index, zeros[0], PLANES, PTX)
        if float_ptr is not None:
            words = words.to(float_ptr.dtype.element_ty, bitcast=True)
        return DECODE(words, zeros, PTX, DT)
    else:
        # int8 in groups of 32: a plane is two groups wide, so the two halves of its words are decoded apart.
        a, c = DECODE(tl.load(w_ptrs), zeros, PTX, DT)
        b, d = DECODE(tl.load(w_ptrs + BLOCK_K // COUNT), zeros, PTX, DT)
        return (a, b, c, d)


@triton.jit
def scale_planes(planes, scales, PLANES: tl.constexpr, COUNT: tl.constexpr, DT: tl.constexpr):
    """``plane * scale`` rounded once to DT, whatever dtype the scales of the COUNT groups are stored in."""
    scaled = ()
    for j in tl.static_range(PLANES):
        scale = scales[j * COUNT // PLANES][:, None]
        if scale.dtype == DT and planes[j].dtype == DT:
            scaled += (planes[j] * scale,)
        else:
            scaled += ((planes[j].to(tl.float32) * scale.to(tl.float32)).to(DT),)
    return scaled


@triton.jit
def settled(total):
    """A sum of 32-bit numbers as it is, on NVIDIA's GPUs: read in the loop that adds to it.

    Only a sum that nothing but the next product reads stays under way while the next block is decoded; for this one
    Triton waits as soon as its product is started. No instruction comes of it: ptxas drops the copy.
    """
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [total], dtype=total.dtype, is_pure=True, pack=1)


@triton.jit
def concat(planes, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """``COUNT`` planes ``[rows, W]`` from ``FIRST`` on, side by side: ``[rows, COUNT * W]``.

    This order of joins is the one that costs no data movement when the result is the left operand of a product:
    every thread already holds what it needs.
    """
    rows: tl.constexpr = planes[FIRST].shape[0]
    width: tl.constexpr = planes[FIRST].shape[1]
    if COUNT == 1:
        return planes[FIRST]
    elif COUNT == 2:
        pair = tl.join(planes[FIRST], planes[FIRST + 1])
        return tl.reshape(tl.permute(pair, (0, 2, 1)), (rows, 2 * width))
    else:
        even = tl.join(planes[0], planes[2])
        odd = tl.join(planes[1], planes[3])
        return tl.reshape(tl.permute(tl.join(even, odd), (0, 2, 3, 1)), (rows, 4 * width))
