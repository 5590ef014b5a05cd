"""Schemes (what a user asks for) and formats (how one weight is stored).

Everything else reads the formats from here: packing, the reference, the kernels, the module, the benchmarks and the
tests.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import NamedTuple

import torch

#: Weights are packed in blocks of this many along K (in_features): see :mod:`qlinear.layout`.
BLOCK_K = 128
#: Rows (out_features) that lie together in one tile of the prepared GPU layout.
TILE_N = 64

_GRAMMAR = re.compile(
    r"(?:w(?P<weight>\d+)a(?P<activation>\d+)(?P<fp8>-fp8)?|(?P<short>fp8))"
    r"(?:-(?:g(?P<group>\d+)|(?P<channel>channel)))?(?P<asym>-asym)?"
    r"(?:-(?P<sparsity>2:4|block\d+|unstructured))?"
)
_GRAMMAR_TEXT = "w<bits>a<bits>[-fp8][-g<size>|-channel][-asym][-2:4|-block<size>|-unstructured]"

_Shape = tuple[int, ...]
#: weight, scale, zero_point and index in the plain layout; all int32 but the scale. None: there is no such tensor.
PlainShapes = tuple[_Shape, _Shape, _Shape | None, _Shape | None]


class Rounded(NamedTuple):
    """What the numbers of a token are rounded to: a dtype of 8 bits, and what the largest magnitude becomes."""

    dtype: torch.dtype
    largest: float


#: By :attr:`Format.number`.
ROUNDED = {"int": Rounded(torch.int8, 127.0), "e4m3": Rounded(torch.float8_e4m3fn, 448.0)}


@dataclass(frozen=True)
class Format:
    """How one weight ``[N, K]`` (out_features, in_features) is stored. Pure data; the properties follow from it.

    A code is an unsigned integer of ``bits`` bits; its value is ``(code - zero_point) * scale``, where a symmetric
    format has the constant zero point ``offset``. Where ``number`` is ``e4m3`` a code is the bits of an 8-bit float
    (OCP 8-bit Floating Point Specification, E4M3: sign, 4 bits of exponent, 3 of mantissa, up to 448, no infinity;
    ``torch.float8_e4m3fn``), and its value is that float times the scale. Scales (and zero points) belong to
    ``group_size`` neighbours along K, or to a whole row where ``group_size`` is None. The last group of a row may be
    short.
    """

    name: str
    bits: int
    activation_bits: int
    group_size: int | None
    symmetric: bool
    #: Key of the decoder in :mod:`qlinear.kernels.decode`: ``planar4``, ``planar8`` (16-bit words), ``nibbles8`` or
    #: ``rows8`` (bytes, for int8 products), ``planar_e4m3`` and ``rows_e4m3`` (the same two orders, of e4m3 bits),
    #: ``rows16`` (16-bit floats as they are).
    packing: str
    #: What a code is: ``int``, ``e4m3`` for an 8-bit float, or ``float`` for a 16-bit float that has no scale.
    number: str = "int"
    #: Which weights are stored (see :mod:`qlinear.sparse`): None for all, ``2:4``, ``block64`` or ``unstructured``.
    sparsity: str | None = None

    @property
    def offset(self) -> int:
        """The code of zero in a symmetric format: 8 for int4, 128 for int8, 0 for floats."""
        return 1 << (self.bits - 1) if self.number == "int" else 0

    @property
    def largest(self) -> int:
        """What absmax is rounded to in a symmetric format: 7 for int4, 127 for int8, 448 for e4m3."""
        return 448 if self.number == "e4m3" else self.offset - 1

    @property
    def max_code(self) -> int:
        return (1 << self.bits) - 1

    @property
    def planes(self) -> int:
        """Codes in one 16-bit word of the prepared GPU layout."""
        return 16 // self.bits

    @property
    def block_bytes(self) -> int:
        """Bytes of a row of a block of the prepared GPU layout; of 2:4 weights half the codes, and a bit for each."""
        return BLOCK_K * (self.bits // 2 + 1 if self.sparsity == "2:4" else self.bits) // 8

    @property
    def quantized_activations(self) -> bool:
        """Whether activations are rounded to 8 bits, per token, to the kind of number that weights are."""
        return self.activation_bits == 8

    @property
    def integer_activations(self) -> bool:
        return self.quantized_activations and self.number == "int"

    @property
    def integer_sums(self) -> bool:
        """Whether a whole row of int8 products is summed before it is scaled: int32 holds it."""
        return self.integer_activations and self.group_size is None

    @property
    def block(self) -> int | None:
        """Rows and columns of a block in a block-sparse format, None in others."""
        return int(self.sparsity[5:]) if self.sparsity and self.sparsity.startswith("block") else None

    @property
    def dense(self) -> Format | None:
        """The format of the same values without sparsity; None for 16-bit floats, which are the model's own."""
        values = (self.bits, self.activation_bits, self.group_size, self.symmetric, self.number)
        dense = {(f.bits, f.activation_bits, f.group_size, f.symmetric, f.number): f for f in DENSE.values()}
        return dense.get(values)

    @property
    def weight_only(self) -> Format:
        """The format of the same weight for 16-bit activations."""
        return Scheme(self.bits, 16, self.group_size, self.symmetric, self.sparsity, self.number).format

    def groups(self, in_features: int) -> int:
        """Scales in one row of ``in_features`` weights."""
        per_row = 0 if self.number == "float" else 1
        return per_row if self.group_size is None else -(-in_features // self.group_size)

    @property
    def groups_per_block(self) -> int:
        """Groups that a block of the prepared GPU layout spans; 1 where a group is a block or longer."""
        return 1 if self.group_size is None else max(1, BLOCK_K // self.group_size)

    def words(self, in_features: int) -> int:
        """int32 words in one row of the plain layout."""
        return -(-in_features * self.bits // 32)

    def zero_point_words(self, out_features: int) -> int:
        """int32 words in one column of the plain layout's packed zero points."""
        return -(-out_features * self.bits // 32)

    def stored(self, out_features: int, in_features: int, density: float) -> int:
        """How many blocks (or weights, where unstructured) a share ``density`` of them is; 0 where it is fixed."""
        if self.block:
            return round(density * -(-out_features // self.block) * -(-in_features // self.block))
        return round(density * out_features * in_features) if self.sparsity == "unstructured" else 0

    def plain_shapes(self, out_features: int, in_features: int, stored: int = 0) -> PlainShapes:
        """Shapes of the plain layout's tensors for ``stored`` blocks or weights (see :mod:`qlinear.sparse`)."""
        n, k, groups = out_features, in_features, self.groups(in_features)
        zero = None if self.symmetric else (self.zero_point_words(n), groups)
        if self.sparsity is None:
            return (n, self.words(k)), (n, groups), zero, None
        if self.sparsity == "2:4":
            return (n, self.words(2 * -(-k // 4))), (n, groups), zero, (n, -(-k // 32))
        if self.block is None:
            return (self.words(stored),), (n, groups), zero, (n, 1 + -(-k // 32))
        scales = (stored, self.block) if self.group_size else (n, groups)
        index = (-(-n // self.block) + 1 + stored,)
        return (stored, self.block, self.words(self.block)), scales, None, index

    def weight_bytes(self, out_features: int, in_features: int, scale_bytes: int = 2, density: float = 0.5) -> int:
        """Bytes of one weight in the plain layout: codes, scales, zero points and index, padding of words included.

        Args:
            density: the share of blocks (or of weights, where unstructured) that is stored; others do not ask for it.
        """
        stored = self.stored(out_features, in_features, density)
        weight, scale, zero, index = self.plain_shapes(out_features, in_features, stored)
        words = sum(math.prod(shape) for shape in (weight, zero, index) if shape is not None)
        return 4 * words + scale_bytes * math.prod(scale)

    def smaller_dense(self, out_features: int, in_features: int, density: float) -> Format | None:
        """The dense format that is no larger than this sparse one and has the most bits; None where all are larger.

        Where there is one, pruning to this density and pattern saves less than storing every weight in fewer bits.
        """
        most = self.weight_bytes(out_features, in_features, density=density)
        found = [
            (f.bits, f.weight_bytes(out_features, in_features), f)
            for f in DENSE.values()
            if f.activation_bits == self.activation_bits and f.weight_bytes(out_features, in_features) <= most
        ]
        return max(found, key=lambda entry: entry[:2])[2] if found and self.sparsity else None

    def scale_dtype(self, weight_dtype: torch.dtype) -> torch.dtype:
        """The dtype scales are stored in: the weight's own, except that grouped or asymmetric float32 becomes float16.

        Rounding happens after the scale is rounded, so a 16-bit scale costs next to nothing; it halves the scales.
        """
        if weight_dtype in (torch.float16, torch.bfloat16):
            return weight_dtype
        if self.number == "float":
            return torch.float16
        return torch.float32 if self.group_size is None and self.symmetric else torch.float16

    def max_error(self, dtype: torch.dtype) -> float:
        """Bound on ``norm(y - ref) / norm(ref)`` of a kernel against float64 on the same packed weights."""
        return {torch.float16: 1e-3, torch.bfloat16: 6e-3, torch.float32: 2e-5}[dtype]

    def __str__(self) -> str:
        return self.name


def _supported() -> dict[str, Format]:
    formats = [Format("w8a8", 8, 8, None, True, "rows8"), Format("w8a16", 8, 16, None, True, "planar8")]
    formats += [Format("w4a8", 4, 8, 128, True, "nibbles8"), Format("w4a8-channel", 4, 8, None, True, "nibbles8")]
    formats += [Format(f"w8a16-g{g}", 8, 16, g, True, "planar8") for g in (32, 64, 128)]
    formats.append(Format("fp8", 8, 8, None, True, "rows_e4m3", number="e4m3"))
    formats.append(Format("w8a16-fp8", 8, 16, None, True, "planar_e4m3", number="e4m3"))
    for symmetric, suffix in ((True, ""), (False, "-asym")):
        for group, infix in ((128, ""), (64, "-g64"), (32, "-g32"), (None, "-channel")):
            formats.append(Format(f"w4a16{infix}{suffix}", 4, 16, group, symmetric, "planar4"))
    return {f.name: f for f in [*formats, *_sparse()]}


def _sparse() -> list[Format]:
    formats = [
        Format("w4a16-2:4", 4, 16, 128, True, "planar4", sparsity="2:4"),
        Format("w4a16-asym-2:4", 4, 16, 128, False, "planar4", sparsity="2:4"),
        # A group is a row of a block: no scale is stored where no block is.
        Format("w4a16-block64", 4, 16, 64, True, "planar4", sparsity="block64"),
    ]
    for sparsity in ("2:4", "block64", "unstructured"):
        formats.append(Format(f"w8a16-{sparsity}", 8, 16, None, True, "planar8", sparsity=sparsity))
        formats.append(Format(f"w16a16-{sparsity}", 16, 16, None, True, "rows16", "float", sparsity))
    return formats


#: Every format that exists, by the name of its scheme. Tests, benchmarks and ``qlinear doctor`` walk this.
FORMATS: dict[str, Format] = _supported()
#: Those that store every weight.
DENSE: dict[str, Format] = {name: f for name, f in FORMATS.items() if f.sparsity is None}


def _default_group(bits: int, sparsity: str | None) -> int | None:
    """The group_size of a scheme that names none: 128 for int4, or a row of a block; None is one per channel."""
    if bits != 4:
        return None
    return min(128, int(sparsity[5:])) if sparsity and sparsity.startswith("block") else 128


@dataclass(frozen=True)
class Scheme:
    """What a user asks for: weight and activation bits, granularity, symmetry, sparsity, kind of number.

    The grammar is ``w<bits>a<bits>[-fp8][-g<size>|-channel][-asym][-2:4|-block<size>|-unstructured]``; ``w4a16`` means
    group_size 128 (in blocks that of a block) and ``w8a16`` one scale per output channel. ``-fp8`` means 8-bit floats
    (e4m3) in the place of integers, and ``fp8`` alone is short for ``w8a8-fp8``: weights per output channel,
    activations per token. ``str(Scheme.parse(s))`` is the canonical name, and parses to the same scheme.

    Raises:
        ValueError: the scheme cannot be parsed or does not exist; the message lists those that do.
    """

    weight_bits: int
    activation_bits: int = 16
    group_size: int | None = None
    symmetric: bool = True
    sparsity: str | None = None
    number: str = "int"

    def __post_init__(self) -> None:
        if str(self) not in FORMATS:
            raise ValueError(f"scheme {str(self)!r} does not exist; the schemes are: {', '.join(FORMATS)}")

    @classmethod
    def parse(cls, text: str | Scheme) -> Scheme:
        """Reads a scheme's name; a Scheme is returned as it is."""
        if isinstance(text, Scheme):
            return text
        if not isinstance(text, str):
            raise ValueError(f"a scheme is a string such as 'w4a16' or a qlinear.Scheme, got {text!r}")
        match = _GRAMMAR.fullmatch(text.strip().lower())
        if match is None:
            raise ValueError(
                f"scheme {text!r} is not of the form {_GRAMMAR_TEXT}; the schemes are: {', '.join(FORMATS)}"
            )
        number = "e4m3" if match["fp8"] or match["short"] else "int"
        bits, activation_bits = (8, 8) if match["short"] else (int(match["weight"]), int(match["activation"]))
        group = int(match["group"]) if match["group"] else None
        if group is None and not match["channel"]:
            group = _default_group(bits, match["sparsity"])
        number = "float" if bits == 16 else number
        return cls(bits, activation_bits, group, not match["asym"], match["sparsity"], number)

    def __str__(self) -> str:
        name = f"w{self.weight_bits}a{self.activation_bits}" + ("-fp8" if self.number == "e4m3" else "")
        name = "fp8" if name == "w8a8-fp8" else name
        if self.group_size != _default_group(self.weight_bits, self.sparsity):
            name += "-channel" if self.group_size is None else f"-g{self.group_size}"
        return name + ("" if self.symmetric else "-asym") + (f"-{self.sparsity}" if self.sparsity else "")

    @property
    def format(self) -> Format:
        return FORMATS[str(self)]
