# mypy: disable-error-code="no-untyped-def,assignment"

"""2:4 sparsity in the matmul loop: two kept codes of every four are put in their places among zeros, in registers.

What comes out are the words of the dense format, so that its decoder and the loop go on as ever: this is the path of
2:4 weights on every GPU. The layout is :mod:`qlinear.layout24`'s. A word holds, in its two halves, the two kept codes
``a`` and ``b`` of the same group of four in every plane, less (exclusive or) the code of zero. Where a thread has two
neighbours of a group it wants ``(a, b)``, ``(a, 0)``, ``(0, a)`` or nothing, or the same with ``b`` first: so one
bit for each of the four places says all, and what it takes is done for all planes of a word at once.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def expand24(words, index, zero, PLANES: tl.constexpr, PTX: tl.constexpr):
    """Words ``[rows, W/4]`` and index ``[rows, 4]``, int32, to the dense format's int16 words ``[rows, W]``.

    ``zero`` is the code of zero: a number, or a column ``[rows, 1]`` of floats.

    The two neighbours that a word is for are made as one number of 32 bits and parted afterwards. As two numbers of 16
    bits in one register (``pack=2``) they could not be told apart: which elements share a register is the layout's
    choice, and where it takes two rows every odd column would be decoded as an even one.
    """
    rows: tl.constexpr = words.shape[0]
    groups: tl.constexpr = words.shape[1]
    pairs: tl.constexpr = (rows, 2 * groups)
    BITS: tl.constexpr = 16 // PLANES
    ONES: tl.constexpr = 0x11111111 if BITS == 4 else 0x01010101 if BITS == 8 else 0x00010001
    MASK: tl.constexpr = (1 << BITS) - 1
    words = tl.permute(tl.reshape(words, (rows, 2, groups // 2)), (0, 2, 1))[:, :, :, None]
    index = tl.permute(tl.reshape(index, (rows, 2, 2)), (0, 2, 1))[:, None, :, :, None]
    words = tl.reshape(tl.broadcast_to(words, (rows, groups // 2, 2, 2)), pairs)
    index = tl.reshape(tl.broadcast_to(index, (rows, groups // 4, 2, 2, 2)), pairs)
    pair = tl.arange(0, 2 * groups)[None, :]
    odd = pair % 2
    shift = tl.broadcast_to(pair // 8 * 2 + odd, pairs)
    fill = tl.broadcast_to((tl.zeros((rows, 1), tl.float32) + zero).to(tl.int32) * ONES, pairs)
    if PTX:
        order = tl.broadcast_to(tl.where(odd == 1, 0x1032, 0x3210), pairs)
        first = tl.broadcast_to(tl.where(odd == 1, 0x3232, 0x1010), pairs)
        both = tl.inline_asm_elementwise(
            """{ .reg .b32 r, x, m, p;
            prmt.b32 r, $1, 0, $3;
            prmt.b32 x, $1, 0, $4;
            shr.u32 m, $2, $5;
            and.b32 m, m, $7;
            mul.lo.u32 m, m, $8;
            prmt.b32 p, m, 0, 0x1010;
            lop3.b32 r, p, r, x, 0xCA;
            lop3.b32 $0, r, m, $6, 0x6A; }""",
            "=r,r,r,r,r,r,r,r,r",
            [words, index, order, first, shift, fill, tl.full(pairs, ONES, tl.int32), tl.full(pairs, MASK, tl.int32)],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        low, high = words & 0xFFFF, (words >> 16) & 0xFFFF
        one, two = tl.where(odd == 1, high, low), tl.where(odd == 1, low, high)
        bits = (index >> shift) & ONES
        left, right = (bits & 0xFFFF) * MASK, ((bits >> 16) & 0xFFFF) * MASK
        second = ((two & left) | (one & ~left)) & right
        both = ((one & left) | (second << 16)) ^ fill
    halves = tl.join(both.to(tl.int16), (both >> 16).to(tl.int16))
    return tl.reshape(halves, (rows, 4 * groups))
