"""Integers and bits as PTX has them, where numpy has no such operation.

Sections of the PTX ISA manual: 9.7.1 "Integer Arithmetic Instructions", 9.7.8 "Logic and Shift Instructions" and
9.7.9 "Data Movement and Conversion Instructions" (prmt).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ptx_machine.arithmetic import Array, f8, i1, i4, i8, u1, u4, u8

_NIBBLES = np.arange(0, 16, 4, dtype=u4)[:, None]


def shl(a: Array, amount: Array) -> Array:
    """PTX ISA, shl: amounts beyond the width count as the width."""
    width = a.dtype.itemsize * 8
    return np.where(amount < width, a << (amount & u4(width - 1)).astype(a.dtype), a.dtype.type(0))


def shr(a: Array, amount: Array) -> Array:
    """PTX ISA, shr: logical, or with the sign where a is signed; amounts beyond the width count as the width."""
    width = a.dtype.itemsize * 8
    if a.dtype.kind == "i":
        return np.right_shift(a, np.minimum(amount, u4(width - 1)).astype(a.dtype))
    return np.where(amount < width, a >> (amount & u4(width - 1)).astype(a.dtype), a.dtype.type(0))


def divide(a: Array, b: Array) -> Array:
    """PTX ISA, div: towards zero. What a division by zero gives is not defined; the hardware sets all bits."""
    if a.dtype.itemsize <= 4:
        # Exact in float64. By way of 64 bits, as the smallest number by -1 is too large for 32: it wraps.
        return np.trunc(np.where(b == 0, f8(-1), a.astype(f8) / b.astype(f8))).astype(i8).astype(a.dtype)
    whole = np.floor_divide(a - np.fmod(a, b), b)
    return np.where(b == 0, ~a.dtype.type(0), whole)


def remainder(a: Array, b: Array) -> Array:
    """PTX ISA, rem: with the sign of a; by zero not defined, here a."""
    return np.where(b == 0, a, a - divide(a, b) * b)


def multiply_high(a: Array, b: Array) -> Array:
    """PTX ISA, mul.hi: the upper half of the product."""
    width = a.dtype.itemsize * 8
    if width < 64:
        wide: Any = i8 if a.dtype.kind == "i" else u8
        return ((a.astype(wide) * b.astype(wide)) >> wide(width)).astype(a.dtype)
    x, y = a.view(u8), b.view(u8)
    half, low = u8(32), u8(0xFFFFFFFF)
    middle = (x >> half) * (y & low) + (((x & low) * (y & low)) >> half)
    other = (x & low) * (y >> half) + (middle & low)
    high = (x >> half) * (y >> half) + (middle >> half) + (other >> half)
    if a.dtype.kind == "i":
        high = high - np.where(a < 0, y, u8(0)) - np.where(b < 0, x, u8(0))
    return high.view(a.dtype)


def bit_field(a: Array, position: Array, length: Array) -> Array:
    """PTX ISA, bfe: bits beyond the number, or beyond the field, are the sign of the field where a is signed."""
    width = u4(a.dtype.itemsize * 8)
    spare = width - np.minimum(length & u4(255), width)
    return shr(shl(shr(a, position & u4(255)), spare), spare)


def insert(a: Array, b: Array, position: Array, length: Array) -> Array:
    """PTX ISA, bfi: the lowest ``length`` bits of a in b at ``position``."""
    width = a.dtype.itemsize * 8
    position, length = position & u4(255), length & u4(255)
    mask = shl(~shl(np.full_like(a, 2**width - 1), length), position)
    return (b & ~mask) | (shl(a, position) & mask)


def popcount(a: Array) -> Array:
    """PTX ISA, popc."""
    return np.bitwise_count(a).astype(u4)


def leading_zeros(a: Array) -> Array:
    """PTX ISA, clz."""
    width = a.dtype.itemsize * 8
    if width == 64:
        high, low = (a >> u8(32)).astype(u4), a.astype(u4)
        return np.where(high == 0, u4(32) + leading_zeros(low), leading_zeros(high))
    # The exponent of a float64 is the number of bits.
    return (i4(width) - np.frexp(a.astype(f8))[1]).astype(u4)


def reverse(a: Array) -> Array:
    """PTX ISA, brev."""
    bits = np.unpackbits(a.view(u1).reshape(len(a), -1), axis=1, bitorder="little")
    return np.packbits(bits[:, ::-1], axis=1, bitorder="little").view(a.dtype).reshape(-1)


def funnel_left(low: Array, high: Array, amount: Array) -> Array:
    """PTX ISA, shf.l: the upper word of (high, low) shifted left by 0 to 32."""
    return (_join(low, high) >> (u4(32) - amount).astype(u8)).astype(u4)


def funnel_right(low: Array, high: Array, amount: Array) -> Array:
    """PTX ISA, shf.r: the lower word of (high, low) shifted right by 0 to 32."""
    return (_join(low, high) >> amount.astype(u8)).astype(u4)


def _join(low: Array, high: Array) -> Array:
    return (high.astype(u8) << u8(32)) | low.astype(u8)


def permute(a: Array, b: Array, selector: Array) -> Array:
    """PTX ISA, prmt: byte i is the byte of (b, a) that nibble i names; its top bit asks for that byte's sign."""
    nibbles = (selector >> _NIBBLES) & u4(15)
    chosen: Array = (_join(a, b) >> ((nibbles & u4(7)) << u4(3)).astype(u8)).astype(u1)
    # A signed shift by 7 leaves the sign alone.
    chosen = chosen.view(i1) >> ((nibbles >> u4(3)) * u4(7)).astype(i1)
    return np.ascontiguousarray(chosen.T).view(u4).reshape(-1)


def pack(*parts: Array) -> Array:
    """PTX ISA, mov of a vector into one register: the first is the lowest part."""
    size = parts[0].dtype.itemsize
    made = parts[0].astype(f"u{size * len(parts)}")
    for i, part in enumerate(parts[1:], 1):
        made |= part.astype(made.dtype) << made.dtype.type(8 * size * i)
    return made
