"""PTX instructions that work on numbers, said a second time: one thread, Python's integers and exact rationals.

What tests/ptx_machine does with numpy is compared with this, opcode by opcode.
"""

from __future__ import annotations

import bisect
import math
import operator
import struct
from fractions import Fraction
from functools import cache

import torch

#: (bits of the significand, smallest exponent, bits of all, NaN).
FORMATS = {"f16": (11, -14, 16, 0x7FFF), "bf16": (8, -126, 16, 0x7FFF), "f32": (24, -126, 32, 0x7FFFFFFF)}
COMPARE = {"eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le, "gt": operator.gt,
           "ge": operator.ge, "lo": operator.lt, "ls": operator.le, "hi": operator.gt, "hs": operator.ge}  # fmt: skip
LOGIC = {"and": operator.and_, "or": operator.or_, "xor": operator.xor}


def signed(x: int, bits: int) -> int:
    return x - (x >> (bits - 1) << bits)


def number(name: str, x: int) -> int | float:
    """The number that a pattern is by its type."""
    if name == "f16":
        return struct.unpack("<e", struct.pack("<H", x))[0]
    if name == "bf16":
        return struct.unpack("<f", struct.pack("<I", x << 16))[0]
    if name == "f32":
        return struct.unpack("<f", struct.pack("<I", x))[0]
    x &= (1 << int(name[1:])) - 1
    return signed(x, int(name[1:])) if name[0] == "s" else x


def pattern(name: str, x: Fraction | float, towards_zero: bool = False) -> int:
    """The bits of the nearest float, ties to even."""
    significand, least, width, nan = FORMATS[name]
    if isinstance(x, float) and (math.isnan(x) or math.isinf(x) or x == 0):
        if math.isnan(x):
            return nan
        sign = int(math.copysign(1, x) < 0) << (width - 1)
        return sign | ((nan >> (significand - 1)) << (significand - 1) if x else 0)
    x = Fraction(x)
    magnitude = abs(x)
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    exponent = max(exponent if magnitude >= Fraction(2) ** exponent else exponent - 1, least)
    steps = magnitude / Fraction(2) ** (exponent - significand + 1)
    count = math.floor(steps) if towards_zero else round(steps)
    top = (nan >> (significand - 1)) << (significand - 1)
    bits = min(((exponent - least) << (significand - 1)) + count, top - towards_zero)
    return bits | int(x < 0) << (width - 1)


def exact(name: str, double: float, rational: object, *numbers: float) -> int:
    """The exact result rounded; of what is no number, or zero with its sign, what double precision says."""
    if not all(map(math.isfinite, numbers)):
        return pattern(name, double)
    value = rational(*map(Fraction, numbers))  # type: ignore[operator]
    return pattern(name, value if value else double)


@cache
def bytes_of(name: str) -> list[tuple[Fraction, int]]:
    """The positive numbers of an 8-bit float and their codes, in order."""
    numbers = torch.arange(128, dtype=torch.uint8).view(
        getattr(torch, {"e4m3": "float8_e4m3fn", "e5m2": "float8_e5m2"}[name])
    )
    return [(Fraction(x), code) for code, x in enumerate(numbers.double().tolist()) if math.isfinite(x)]


def nearest_byte(name: str, x: float) -> int:
    if math.isnan(x):
        return 0x7F
    table = bytes_of(name)
    magnitude = min(Fraction(min(abs(x), 1e6)), table[-1][0])
    above = bisect.bisect_left(table, (magnitude, -1))
    around = table[max(above - 1, 0) : above + 1]
    code = min(around, key=lambda pair: (abs(pair[0] - magnitude), pair[1] & 1))[1]
    return code | (math.copysign(1, x) < 0) << 7


def reference(opcode: str, values: list[int], number_in_text: int = 0) -> list[int] | None:
    """The bits of its destinations; None where the manual leaves them open."""
    head, *rest = opcode.split(".")
    name = rest[-1]
    if name in ("f16x2", "bf16x2", "s16x2", "u16x2", "f32x2") and head != "cvt":
        width, one = (32 if name == "f32x2" else 16), opcode.removesuffix("x2")
        halves = [reference(one, [value >> shift & ((1 << width) - 1) for value in values]) for shift in (0, width)]
        return [halves[0][0] | halves[1][0] << width]  # type: ignore[index]
    if head == "cvt":
        return [convert(rest, values)]
    if head == "setp":
        a, b = (number(name.replace("b", "u") if name != "bf16" else name, value) for value in values[:2])
        truth = comparison(rest[0], a, b, "f" in name)
        if rest[1] in LOGIC:
            return [int(LOGIC[rest[1]](t, values[2])) for t in (truth, not truth)]
        return [int(truth), int(not truth)]
    if head == "selp":
        return [values[0] if values[2] else values[1]]
    if name in FORMATS or "f32" in rest:
        return [floating(head, rest, values)]
    return integer(head, rest, values, number_in_text)


def comparison(relation: str, a: float, b: float, floats: bool) -> bool:
    unordered = a != a or b != b
    if relation in ("num", "nan"):
        return unordered == (relation == "nan")
    if floats and relation.endswith("u"):
        return unordered or COMPARE[relation[:-1]](a, b)
    return not unordered and COMPARE[relation](a, b)


def floating(head: str, rest: list[str], values: list[int]) -> int:
    name = rest[-1]
    width = FORMATS[name][2]
    if head == "neg":
        return values[0] ^ 1 << (width - 1)
    if head == "abs":
        return values[0] & ~(1 << (width - 1))
    # Mixed precision: the last operand, and the result, are float32.
    to = "f32" if "f32" in rest else name
    names = [name] * (len(values) - 1) + [to] if to != name else [name] * len(values)
    x = [number(n, value) for n, value in zip(names, values, strict=True)]
    if head in ("min", "max"):
        if any(map(math.isnan, x)) and ("NaN" in rest or all(map(math.isnan, x))):
            return FORMATS[name][3]
        there = [v for v in x if not math.isnan(v)]
        return pattern(name, {"min": min, "max": max}[head](there, key=lambda v: (v, math.copysign(1, v))))
    if head == "sqrt":
        return root(x[0])
    if head in ("div", "rcp"):
        return quotient(*(x if head == "div" else [1.0, *x]))
    double = {
        "add": lambda a, b: a + b,
        "sub": lambda a, b: a - b,
        "mul": lambda a, b: a * b,
        "fma": lambda a, b, c: a * b + c,
    }[head]
    return exact(to, double(*x), double, *x)


def root(x: float) -> int:
    """Of float32: what lies between two numbers of 200 bits is on the same side of every tie as the middle of them."""
    if not (0 < x < math.inf):
        return pattern("f32", math.nan if x < 0 else x)
    scaled = Fraction(x) * Fraction(4) ** 200
    count = math.isqrt(math.floor(scaled))
    return pattern("f32", Fraction(2 * count + (count * count != scaled), 2 * 2**200))


def quotient(a: float, b: float) -> int:
    """Of float32."""
    if b:
        return exact("f32", a / b, operator.truediv, a, b)
    sign = math.copysign(1, a) * math.copysign(1, b)
    return pattern("f32", math.nan if a == 0 or a != a else sign * math.inf)


def integer(head: str, rest: list[str], values: list[int], number_in_text: int) -> list[int] | None:
    name = rest[-1]
    if name == "pred":
        return [1 - values[0] if head == "not" else int(LOGIC[head](*values))]
    width = int(name[1:])
    ones = (1 << width) - 1
    x = [number(name.replace("b", "u"), value) for value in values]
    if head in ("mul", "mad") and rest[0] == "wide":
        return [(x[0] * x[1] + (values[2] if head == "mad" else 0)) & (1 << 2 * width) - 1]
    if head in ("div", "rem") and x[1] == 0:
        return None
    if head in ("div", "rem"):
        quotient = abs(x[0]) // abs(x[1]) * (1 if (x[0] < 0) == (x[1] < 0) else -1)
        return [(quotient if head == "div" else x[0] - quotient * x[1]) & ones]
    if head == "bfe":
        start, length = values[1] & 255, values[2] & 255
        bit = [values[0] >> i & 1 for i in range(width)]
        sign = bit[min(start + length - 1, width - 1)] if name[0] == "s" and length else 0
        return [sum((bit[start + i] if i < length and start + i < width else sign) << i for i in range(width))]
    if head == "bfi":
        start, length = values[2] & 255, values[3] & 255
        bit = [values[1] >> i & 1 for i in range(width)]
        for i in range(length):
            if start + i < width:
                bit[start + i] = values[0] >> i & 1
        return [sum(b << i for i, b in enumerate(bit))]
    if head == "shf":
        amount = min(values[2], 32) if rest[1] == "clamp" else values[2] & 31
        both = values[1] << 32 | values[0]
        return [(both << amount >> 32 if rest[0] == "l" else both >> amount) & ones]
    if head == "lop3":
        a, b, c = values[:3]
        return [
            sum((number_in_text >> (4 * (a >> i & 1) + 2 * (b >> i & 1) + (c >> i & 1)) & 1) << i for i in range(32))
        ]
    if head == "prmt":
        pool = (values[1] << 32 | values[0]).to_bytes(8, "little")
        chosen = [(pool[values[2] >> 4 * i & 7], values[2] >> 4 * i & 8) for i in range(4)]
        return [int.from_bytes(bytes((255 * (b >> 7) if sign else b) for b, sign in chosen), "little")]
    simple = {
        "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "min": min, "max": max, "abs": abs, "neg": lambda a: -a,
        "mul": lambda a, b: a * b >> (width if rest[0] == "hi" else 0), "mad": lambda a, b, c: a * b + c,
        "and": operator.and_, "or": operator.or_, "xor": operator.xor, "not": operator.invert,
        "shl": lambda a, b: a << min(values[1], 64), "shr": lambda a, b: a >> min(values[1], 64),
        "popc": lambda a: a.bit_count(), "clz": lambda a: width - a.bit_length(),
        "brev": lambda a: int(f"{a:0{width}b}"[::-1], 2),
    }  # fmt: skip
    return [simple[head](*x) & ones]


def convert(rest: list[str], values: list[int]) -> int:
    """cvt: rounded, clamped."""
    *how, to, source = rest
    if to.endswith("x2") and source == "f32":
        high, low = (convert([*how, to[:-2], "f32"], [value]) for value in values)
        return high << (8 if to[0] == "e" else 16) | low
    if to.endswith("x2") or source.endswith("x2"):
        size, made = (8, 16) if source[0] == "e" else (16, 8)
        halves = [convert([*how, to[:-2], source[:-2]], [values[0] >> shift & (1 << size) - 1]) for shift in (0, size)]
        return halves[1] << made | halves[0]
    if source in ("e4m3", "e5m2"):
        code = values[0] & 0x7F
        found = [x for x, c in bytes_of(source) if c == code]
        x = float(found[0]) if found else math.inf if (source, code) == ("e5m2", 0x7C) else math.nan
        return pattern(to, math.copysign(x, -1 if values[0] & 0x80 else 1) if x == x else x)
    x = number(source, values[0])
    if to in ("e4m3", "e5m2"):
        return nearest_byte(to, x)
    if to == "tf32":
        if not math.isfinite(x):
            return pattern("f32", x)
        count = math.floor(Fraction(values[0] & 0x7FFFFFFF, 1 << 13) + Fraction(1, 2)) << 13
        return count | values[0] & 0x80000000
    rounding = next((h for h in how if h in ("rni", "rzi", "rmi", "rpi")), None)
    if rounding and math.isfinite(x):
        whole = {"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}[rounding](x)
        x = whole if to not in FORMATS else math.copysign(float(whole), x)
    if to in FORMATS:
        if "sat" in how:
            x = min(x, 1.0) if x > 0 else 0.0
        return pattern(to, float(x) if isinstance(x, float) or x == 0 else Fraction(x), towards_zero="rz" in how)
    width = int(to[1:])
    least, most = (-(1 << width - 1), (1 << width - 1) - 1) if to[0] == "s" else (0, (1 << width) - 1)
    if isinstance(x, float) and not math.isfinite(x):
        return (1 << 63 if width == 64 else 0) if x != x else (most if x > 0 else least) & (1 << width) - 1
    return (max(least, min(most, x)) if rounding or "sat" in how else x) & (1 << width) - 1
