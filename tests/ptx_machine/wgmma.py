"""Asynchronous products of a warpgroup: matrices that tensor cores read from shared memory, and what is under way.

PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions". A product computes when it is issued; its sums can be seen
only after the wait that covers it, and until then nothing that it reads may be written.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ptx_machine.fragments import PACKED, from_sums, left, sums, unpack
from ptx_machine.memory import Array, Fault
from ptx_machine.parse import Instruction, Register
from ptx_machine.translate import Unknown

if TYPE_CHECKING:
    from ptx_machine.strand import Strand

#: Threads of a warpgroup.
WARPGROUP = 128
#: A note, not a fault: the PTX ISA leaves it undefined, Triton's compiler does it, and only a GPU can tell.
REWRITTEN = "a register of A was written while a wgmma may still read it"
#: Bytes of a row that is swizzled, in units of 16, and the bits of the address that take part, by the mode.
_SWIZZLES = {0: (1, 0), 1: (8, 7), 2: (4, 3), 3: (2, 1)}


@dataclass(frozen=True)
class Descriptor:
    """A matrix in shared memory as wgmma is told of it (PTX ISA, "Matrix Descriptor Format"); in bytes."""

    start: int
    leading: int
    stride: int
    swizzle: int

    @classmethod
    def read(cls, bits: int) -> Descriptor:
        """Raises a Fault where it asks for what is not known here."""
        if bits >> 49 & 7:
            raise Fault("wgmma: a base offset is not known here")
        return cls((bits & 0x3FFF) << 4, (bits >> 16 & 0x3FFF) << 4, (bits >> 32 & 0x3FFF) << 4, bits >> 62)

    def addresses(self, outer: int, k: int, size: int, transposed: bool) -> Array:
        """Of the elements ``[outer, k]`` of ``size`` bytes; outer is M or N.

        The canonical layouts (PTX ISA, "Shared Memory Matrix Layout"; CUTLASS, mma_sm90_desc.hpp), in units of 16
        bytes before the swizzle: where K is contiguous ((8, n), (T, 2)) : ((swizzle, stride), (1, leading)), where M
        or N is ((T, swizzle, n), (8, k)) : ((1, T, leading), (swizzle, stride)).
        """
        units, mask = _SWIZZLES[self.swizzle]
        width = 16 * units
        o, kk = np.arange(outer)[:, None], np.arange(k)[None, :]
        if not transposed:
            along = kk * size
            at = (o % 8) * width + (o // 8) * self.stride
            at = at + (along % 16 + along // 16 * self.leading if self.swizzle == 0 else along)
        elif self.swizzle:
            along = o * size
            at = along % width + along // width * self.leading + (kk % 8) * width + (kk // 8) * self.stride
        else:
            along = o * size
            at = along % 16 + along // 16 * self.stride + (kk % 8) * 16 + (kk // 8) * self.leading
        at = at + self.start
        return at ^ ((at >> 7 & mask) << 4)


@dataclass
class Product:
    """One wgmma that has not been waited for."""

    #: The first of its accumulators.
    first: int
    #: Registers of A with what they held.
    used: list[tuple[Register, Array]]
    #: By warpgroup of the strand: bytes of shared memory.
    read: list[tuple[int, Array]]


class Wgmma:
    """The products of a strand, of one warpgroup or of several that go together."""

    def __init__(self, strand: Strand) -> None:
        self.strand = strand
        #: By the index of the first accumulator: all of them, and the sums as they will be.
        self.sums: dict[int, tuple[list[int], list[Array]]] = {}
        #: Of the open group, and of those that are committed, the oldest first.
        self.open: list[Product] = []
        self.groups: list[list[Product]] = []
        self.fenced: list[Any] | None = None

    def fence(self) -> None:
        """wgmma.fence: registers written until now may be read by products."""
        self.fenced = list(self.strand.R)

    def commit(self) -> None:
        """wgmma.commit_group."""
        self.groups.append(self.open)
        self.open = []

    @np.errstate(invalid="ignore", over="ignore")
    def issue(self, ins: Instruction) -> None:
        """wgmma.mma_async."""
        found = re.search(r"\.m64n(\d+)k(\d+)\.(f32|s32)\.(\w+)\.(\w+)$", ins.opcode)
        if found is None or found[4] != found[5] or found[4] not in PACKED:
            raise Unknown(ins.place)
        n, k, kind, integers = int(found[1]), int(found[2]), found[4], found[3] == "s32"
        d, a, b, scale_d, *immediates = ins.operands
        values = [i.value for i in immediates]
        if any(v != 1 for v in values[:2]):
            raise Unknown(f"{ins.place}: scales other than 1")
        # What is left says which matrices in shared memory are transposed.
        turned = [bool(v) for v in values[2:]]
        used = [(r, self._value(r)) for r in a] if isinstance(a, list) else []
        read: list[tuple[int, Array]] = []
        if used:
            # Warp w of a warpgroup has the rows 16 w and on.
            wide = left([array for _, array in used], kind).reshape(-1, 64, 8 * PACKED[kind])
        else:
            wide = self._matrices(a, 64, k, kind, turned[0] if turned else False, read)
        right = self._matrices(b, n, k, kind, turned[-1] if turned else False, read)
        product = wide @ right.swapaxes(1, 2)
        for _, index in read:
            self.strand.shared.begin_product(index)
        self._add(d, product.reshape(-1, 16, n), self._scale(scale_d), integers, used)
        self.open.append(Product(d[0].index, used, read))

    def wait(self, left_open: int) -> None:
        """wgmma.wait_group: all but the youngest ``left_open`` groups are done."""
        done = self.groups[: len(self.groups) - left_open] if left_open else self.groups
        self.groups = self.groups[len(done) :]
        strand = self.strand
        for product in (product for group in done for product in group):
            for register, array in product.used:
                if strand.R[register.index] is not array:
                    strand.notes.add(REWRITTEN)
            for group, index in product.read:
                strand.shared.end_product(index, strand.first // 32 + 4 * group + np.arange(4))
        waiting = {product.first for group in [*self.groups, self.open] for product in group}
        for first in [f for f in self.sums if f not in waiting]:
            indices, arrays = self.sums.pop(first)
            for index, array in zip(indices, arrays, strict=True):
                if strand.R[index] is not None:
                    raise Fault("an accumulator was written while a wgmma was under way")
                strand.R[index] = array

    @property
    def idle(self) -> bool:
        """Whether nothing is under way."""
        return not self.sums

    def _value(self, register: Register) -> Array:
        value: Array | None = self.strand.R[register.index]
        if value is None:
            raise Fault("wgmma: a register of A is not there yet, or never was")
        return value

    def _matrices(
        self, operand: Register, outer: int, k: int, kind: str, transposed: bool, read: list[tuple[int, Array]]
    ) -> Array:
        """Every warpgroup's matrix ``[outer, k]`` in float64; the bytes it lies in are added to ``read``."""
        found = []
        size = 4 // PACKED[kind]
        word = np.dtype(f"u{size}")
        for group, bits in enumerate(self._words(operand)):
            addresses = Descriptor.read(bits).addresses(outer, k, size, transposed)
            index = self.strand.shared.index(addresses.reshape(-1).astype(np.uint32), size, "wgmma read")
            padded = np.zeros((len(index), 4 // size), word)
            padded[:, 0] = np.ascontiguousarray(self.strand.shared.data[index]).view(word).reshape(-1)
            found.append(unpack(padded.view(np.uint32).reshape(-1), kind)[:, 0].reshape(outer, k))
            read.append((group, index.reshape(-1)))
        return np.stack(found)

    def _words(self, operand: Register) -> list[int]:
        """The descriptor of every warpgroup."""
        words = self._value(operand).reshape(-1, WARPGROUP)
        if (words != words[:, :1]).any():
            raise Fault("wgmma: the threads of a warpgroup do not agree about a descriptor")
        return [int(word) for word in words[:, 0]]

    def _scale(self, operand: Any) -> Array:
        """Of every thread: whether the old sums are added to."""
        value = self._value(operand) if isinstance(operand, Register) else np.asarray(operand.value)
        return np.broadcast_to(value.astype(bool), self.strand.width)

    def _add(
        self, d: list[Register], tiles: Array, scale: Array, integers: bool, used: list[tuple[Register, Array]]
    ) -> None:
        """Puts ``[warps, 16, n]`` upon the old sums.

        Products that follow each other in the same accumulators need no wait and no fence between them.
        """
        indices = [r.index for r in d]
        registers = list(used)
        if indices[0] in self.sums:
            known, old = self.sums[indices[0]]
            if known != indices:
                raise Fault("wgmma: accumulators overlap")
        else:
            old = [self.strand.R[i] for i in indices]
            if scale.any() and any(array is None for array in old):
                raise Fault("wgmma: an accumulator is not there yet, or never was")
            registers += zip(d, old, strict=True)
        if self.fenced is None:
            raise Fault("wgmma without wgmma.fence")
        if any(self.fenced[register.index] is not array for register, array in registers):
            raise Fault("wgmma: a register was written after the last wgmma.fence")
        if scale.any():
            added = np.where(scale, np.stack(old).view(np.int32 if integers else np.float32), 0)
            tiles = tiles + sums(list(added.view(np.uint32)), integers)
        new = from_sums(tiles, integers)
        self.sums[indices[0]] = indices, new
        # Nobody may look at them before they are waited for.
        for index in indices:
            self.strand.R[index] = None
