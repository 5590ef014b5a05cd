"""Global memory, with what compute-sanitizer would say of every access and of the order between programs.

Every tensor lies alone in a range of its own, so that no address is within two of them or next to one. Bytes that
nobody wrote can be told from others, and who wrote a byte in this launch is known.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


class Fault(Exception):
    """The program did what is undefined, or what a GPU would stop it for."""


#: Bits of an address within one allocation.
SPAN = 40
#: Phases of a program (see Order) that a writer's number has room for.
_PHASES = 1 << 12


@dataclass
class Allocation:
    """A tensor's bytes, shared with it, and where they begin in the machine."""

    name: str
    data: Array
    base: int
    #: Which bytes have been written; None where all were from the start.
    written: Array | None = None
    #: Who wrote a byte in this launch, and in which phase: program * _PHASES + phase + 1; 0 is nobody.
    writer: Array = field(init=False)

    def __post_init__(self) -> None:
        self.writer = np.zeros(len(self.data), np.int64)


class GlobalMemory:
    """The tensors of a launch."""

    def __init__(self) -> None:
        self.allocations: list[Allocation] = []

    def add(self, name: str, data: Array, alignment: int, uninitialised: bool = False) -> int:
        """The address of a tensor's first byte, as much aligned as ``alignment`` (its own address) is."""
        base = (len(self.allocations) + 1 << SPAN) + alignment
        written = np.zeros(len(data), bool) if uninitialised else None
        self.allocations.append(Allocation(name, data, base, written))
        return base

    def load(self, addresses: Array, width: int, order: Order | None = None) -> Array:
        """The bytes ``[threads, width]``. An ``order`` says what its program may know of; None: an atomic's own."""
        out = np.empty((len(addresses), width), np.uint8)
        for allocation, which, offsets in self._located(addresses, width, "load"):
            index = offsets[:, None] + np.arange(width)
            if allocation.written is not None and not allocation.written[index].all():
                first = int(offsets[~allocation.written[index].all(1)][0])
                raise Fault(f"load of bytes of {allocation.name} that nothing has written, e.g. byte {first}")
            if order is not None:
                order.check(allocation, index, "load")
            out[which] = allocation.data[index]
        return out

    def store(self, addresses: Array, values: Array, order: Order | None = None) -> None:
        """Writes ``values``, bytes ``[threads, width]``."""
        for allocation, which, offsets in self._located(addresses, values.shape[1], "store"):
            index = offsets[:, None] + np.arange(values.shape[1])
            if order is not None:
                order.check(allocation, index, "store")
                allocation.writer[index] = order.stamp
            allocation.data[index] = values[which]
            if allocation.written is not None:
                allocation.written[index] = True

    def _located(self, addresses: Array, width: int, what: str) -> Iterator[tuple[Allocation, Any, Array]]:
        """(allocation, which accesses, their offsets) for each allocation that is accessed."""
        wrong = addresses % np.uint64(width) != 0
        if wrong.any():
            raise Fault(f"misaligned {what} of {width} bytes at {int(addresses[wrong][0]):#x}")
        owners = addresses >> np.uint64(SPAN)
        alone = bool((owners == owners[0]).all())
        for owner in owners[:1] if alone else np.unique(owners):
            if not 1 <= int(owner) <= len(self.allocations):
                raise Fault(f"{what} of {width} bytes at {int(addresses[owners == owner][0]):#x}, which is no tensor")
            allocation = self.allocations[int(owner) - 1]
            which = slice(None) if alone else np.flatnonzero(owners == owner)
            offsets = addresses[which].astype(np.int64) - allocation.base
            outside = (offsets < 0) | (offsets + width > len(allocation.data))
            if outside.any():
                raise Fault(
                    f"{what} of {width} bytes at byte {int(offsets[outside][0])} of {allocation.name}, which has "
                    f"{len(allocation.data)} ({int(outside.sum())} of {len(offsets)} threads)"
                )
            yield allocation, which, offsets


class Order:
    """Which writes to global memory a program may know of: those before a release that it has acquired.

    PTX ISA, "Memory Consistency Model", release and acquire patterns, as far as split-K uses them. A phase ends at
    every barrier of a program's threads. What a program wrote before the barrier that comes before its release is
    released with it; what it has acquired can be used after its next barrier.
    """

    def __init__(self, released: dict[int, dict[int, int]], program: int) -> None:
        #: By address of the atomic: by program, the phases that are released.
        self.released = released
        self.program = program
        self.phase = 0
        #: By program: the phases of it that may be known now, and from the next barrier on.
        self.known: dict[int, int] = {}
        self.coming: dict[int, int] = {}

    @property
    def stamp(self) -> int:
        """This program in its present phase, as a writer."""
        return self.program * _PHASES + self.phase + 1

    def barrier(self) -> None:
        """All threads of the program have met."""
        self.phase += 1
        if self.phase >= _PHASES:
            raise Fault(f"more than {_PHASES} barriers in a program are not known here")
        for program, phase in self.coming.items():
            self.known[program] = max(phase, self.known.get(program, 0))
        self.coming = {}

    def atomic(self, address: int) -> None:
        """An atomic that both acquires and releases."""
        here = self.released.setdefault(address, {})
        for program, phase in here.items():
            self.coming[program] = max(phase, self.coming.get(program, 0))
        here[self.program] = self.phase
        for program, phase in self.known.items():
            here[program] = max(phase, here.get(program, 0))

    def check(self, allocation: Allocation, index: Array, what: str) -> None:
        """Raises a Fault where the bytes were written by a program that this one knows nothing of."""
        writers = np.unique(allocation.writer[index])
        for writer in writers[writers > 0]:
            program, phase = divmod(int(writer) - 1, _PHASES)
            if program != self.program and phase >= self.known.get(program, 0):
                raise Fault(f"{what} of bytes of {allocation.name} that program {program} wrote, with nothing between")
