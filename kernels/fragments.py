# mypy: disable-error-code="no-untyped-def,assignment"
# ruff: noqa: SIM300 - upper case names are constexprs, not constants
"""One sparse product of a warp, and what loads and decodes its operands: one register in every thread.

A tensor ``[32 * warps]`` has one number in every thread, so an elementwise instruction on such tensors is one of a
warp, with registers as its operands. Numbers of 16 bits go in pairs, as int32. The bits of the decoders are those of
:mod:`qlinear.kernels.decode`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qlinear.kernels.tiles import split_columns


@triton.constexpr_function
def mma_text(bf16, selector):
    """The instruction; ``selector`` says which two of every four threads have the metadata."""
    kind = ".bf16" if bf16 else ".f16"
    shape = "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32" + kind + kind + ".f32 "
    operands = "{$0,$1,$2,$3}, {$8,$9,$10,$11}, {$12,$13,$14,$15}, {$4,$5,$6,$7}, $16, "
    return shape + operands + ("0x1;" if selector else "0x0;")


@triton.jit
def mma_sp(c, a, b, metadata, DT: tl.constexpr, SELECTOR: tl.constexpr):
    """c + a b: 16 x 8 numbers in 4 registers, 16 x 32 in 4 (half of them and their metadata), 32 x 8 in 4."""
    # It is an instruction of the whole warp: never to be moved into a branch.
    return tl.inline_asm_elementwise(
        mma_text(DT == tl.bfloat16, SELECTOR),
        "=f,=f,=f,=f,f,f,f,f,r,r,r,r,r,r,r,r,r",
        [c[0], c[1], c[2], c[3], a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3], metadata],
        dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
        is_pure=False,
        pack=1,
    )


@triton.jit
def offsets4(zeros, DT: tl.constexpr):
    """What the decoder of int4 adds to a tile's upper and lower 8 rows: two numbers of DT in each of two registers.

    The bytes of ``zeros`` are the upper rows' zero point z, 16 times the lower rows', and that. fp16: -(1024 + z)
    and -(64 + z). bf16: -(128 + z).
    """
    if DT == tl.float16:
        return tl.inline_asm_elementwise(
            """{
            prmt.b32 $0, $2, 0xE4E4E4E4, 0x4040;
            prmt.b32 $1, $2, 0xD4D4D4D4, 0x4141; }""",
            "=r,=r,r", [zeros], dtype=(tl.int32, tl.int32), is_pure=True, pack=1,
        )  # fmt: skip
    else:
        return tl.inline_asm_elementwise(
            """{
            prmt.b32 $0, $2, 0xC3C3C3C3, 0x4040;
            prmt.b32 $1, $2, 0xC3C3C3C3, 0x4242; }""",
            "=r,=r,r", [zeros], dtype=(tl.int32, tl.int32), is_pure=True, pack=1,
        )  # fmt: skip


@triton.jit
def fragment4(word, offsets, DT: tl.constexpr):
    """Eight nibbles -> four registers of two numbers; the second and the fourth are of the lower rows.

    As in decode.py, with the subtraction.
    """
    if DT == tl.float16:
        return tl.inline_asm_elementwise(
            """{ .reg .b32 t, a, b, c, d, k;
            mov.b32 k, 0x2C002C00;
            shr.u32 t, $4, 8;
            lop3.b32 a, $4, 0x000F000F, 0x64006400, 0xEA;
            lop3.b32 b, $4, 0x00F000F0, 0x64006400, 0xEA;
            lop3.b32 c, t, 0x000F000F, 0x64006400, 0xEA;
            lop3.b32 d, t, 0x00F000F0, 0x64006400, 0xEA;
            add.f16x2 $0, a, $5;
            fma.rn.f16x2 $1, b, k, $6;
            add.f16x2 $2, c, $5;
            fma.rn.f16x2 $3, d, k, $6; }""",
            "=r,=r,=r,=r,r,r,r",
            [word, offsets[0], offsets[1]],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
    else:
        return tl.inline_asm_elementwise(
            """{ .reg .b32 t, u, v, a, b, c, d, k;
            mov.b32 k, 0x3F803F80;
            shr.u32 t, $4, 4;
            shr.u32 u, $4, 8;
            shr.u32 v, $4, 12;
            lop3.b32 a, $4, 0x000F000F, 0x43004300, 0xEA;
            lop3.b32 b, t, 0x000F000F, 0x43004300, 0xEA;
            lop3.b32 c, u, 0x000F000F, 0x43004300, 0xEA;
            lop3.b32 d, v, 0x000F000F, 0x43004300, 0xEA;
            fma.rn.bf16x2 $0, a, k, $5;
            fma.rn.bf16x2 $1, b, k, $6;
            fma.rn.bf16x2 $2, c, k, $5;
            fma.rn.bf16x2 $3, d, k, $6; }""",
            "=r,=r,=r,=r,r,r,r",
            [word, offsets[0], offsets[1]],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )


@triton.jit
def fragment8(first, second, DT: tl.constexpr):
    """Two words of four codes (value + 128) -> four registers of two numbers; the bits are those of decode.py."""
    if DT == tl.float16:
        return tl.inline_asm_elementwise(
            """{ .reg .b32 a, b, c, d, k;
            mov.b32 k, 0xE480E480;
            prmt.b32 a, $4, 0x64646464, 0x4240;
            prmt.b32 b, $4, 0x64646464, 0x4341;
            prmt.b32 c, $5, 0x64646464, 0x4240;
            prmt.b32 d, $5, 0x64646464, 0x4341;
            add.f16x2 $0, a, k;
            add.f16x2 $1, b, k;
            add.f16x2 $2, c, k;
            add.f16x2 $3, d, k; }""",
            "=r,=r,=r,=r,r,r",
            [first, second],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
    else:
        a, b = _fragment8_bf16(first)
        c, d = _fragment8_bf16(second)
        return (a, b, c, d)


@triton.jit
def _fragment8_bf16(word):
    return tl.inline_asm_elementwise(
        """{ .reg .b32 t, a, b, c, d, k;
        mov.b32 k, 0x3F803F80;
        shr.u32 t, $2, 8;
        lop3.b32 a, $2, 0x007F007F, 0x43004300, 0xEA;
        lop3.b32 b, $2, 0x00800080, 0xC380C380, 0x6A;
        lop3.b32 c, t, 0x007F007F, 0x43004300, 0xEA;
        lop3.b32 d, t, 0x00800080, 0xC380C380, 0x6A;
        fma.rn.bf16x2 $0, a, k, b;
        fma.rn.bf16x2 $1, c, k, d; }""",
        "=r,=r,r",
        [word],
        dtype=(tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def decode_tile(words, offsets, BITS: tl.constexpr, DT: tl.constexpr):
    """16 bytes of a tile -> the four registers of each of its products, one after the other."""
    a, b, c, d = split_columns(words, 4)
    if BITS == 4:
        return (
            fragment4(a, offsets, DT)
            + fragment4(b, offsets, DT)
            + fragment4(c, offsets, DT)
            + fragment4(d, offsets, DT)
        )
    elif BITS == 8:
        return fragment8(a, b, DT) + fragment8(c, d, DT)
    else:
        return (a, b, c, d)


@triton.jit
def load_words(ptrs, mask, COUNT: tl.constexpr, STRIDE: tl.constexpr):
    """``COUNT`` times 16 bytes for every thread, ``STRIDE`` words apart: a tuple of ``[threads, 4]``."""
    loaded = ()
    for i in tl.static_range(COUNT):
        words = ptrs[:, None] + (i * STRIDE + tl.arange(0, 4))[None, :]
        if mask is None:
            loaded += (tl.load(words),)
        else:
            loaded += (tl.load(words, mask=mask[:, None], other=0),)
    return loaded


@triton.jit
def load_tokens(
    pairs, row_words, m, k, inside, M, K, NT: tl.constexpr, P: tl.constexpr, MASK_K: tl.constexpr
):  # fmt: skip
    """Fragments of x: for every eight tokens and product four registers of two neighbours along K."""
    loaded = ()
    for t in tl.static_range(NT):
        for i in tl.static_range(4 * P):
            mask = inside & (m + 8 * t < M)
            if MASK_K:
                mask = mask & (k + 8 * i < K)
            loaded += (tl.load(pairs + t * 8 * row_words + 4 * i, mask=mask, other=0),)
    return loaded


@triton.jit
def load_groups(ptrs, chunk):
    """A 32-bit word for each of the 8 tiles of a chunk, the same for the four threads of a row; none without ptrs."""
    if ptrs is None:
        return ()
    else:
        return load_words(ptrs + chunk * 64, None, 2, 4)


@triton.jit
def halves(word, DT: tl.constexpr):
    """The two 16-bit floats of a word, in float32."""
    low, high = word.to(tl.int16), (word >> 16).to(tl.int16)
    return low.to(DT, bitcast=True).to(tl.float32), high.to(DT, bitcast=True).to(tl.float32)


@triton.jit
def columns_of(loaded):
    """A tuple of ``[threads, 4]`` as a tuple of columns."""
    columns = ()
    for i in tl.static_range(len(loaded)):
        columns += split_columns(loaded[i], 4)
    return columns
