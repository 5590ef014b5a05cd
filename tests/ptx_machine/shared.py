"""The shared memory of a program: what has been written, is on its way or is still being read, byte by byte.

Races are found by what must happen before what, not by their outcome: an access is a fault if another warp's access
to the same byte has no barrier between, in whatever order the two came here.
"""

from __future__ import annotations

import numpy as np

from ptx_machine.memory import Array, Fault

#: Where shared memory begins: a place that is no offset, aligned as the swizzles of tensor cores need it.
SHARED_BASE = 1024
#: Who must be followed by a fence.proxy.async before wgmma reads (PTX ISA, "Async Proxy").
BY_THREADS, BY_COPIES = 1, 2
_ONE_BY_ONE = np.arange(64)


class SharedMemory:
    """``size`` bytes. A byte is known by its index, from 0; addresses begin at SHARED_BASE."""

    def __init__(self, size: int, threads: int) -> None:
        if threads > 16 * 32:
            raise Fault(f"a program of {threads} threads is not known here; at most 512")
        self.size = size
        self.data = np.full(size, 0xA5, np.uint8)
        self.written = np.zeros(size, bool)
        #: On its way by an asynchronous copy.
        self.pending = np.zeros(size, bool)
        #: Products of tensor cores that read it and have not been waited for.
        self.being_read = np.zeros(size, np.int16)
        #: Bits of the warps that have read, and written, a byte since the last barrier.
        self.readers = np.zeros(size, np.uint16)
        self.writers = np.zeros(size, np.uint16)
        #: The thread that wrote last, and how many synchronisations its warp had had.
        self.writer = np.full(size, -1, np.int16)
        self.written_at = np.zeros(size, np.int32)
        self.synchronised = np.zeros(threads // 32, np.int32)
        #: BY_THREADS or BY_COPIES where tensor cores do not see the last write yet, else 0.
        self.unfenced = np.zeros(size, np.uint8)
        #: What is no fault on a GPU of today but relies on the threads of a warp going together.
        self.within_warp: set[str] = set()

    def barrier(self, place: int) -> None:
        """All threads of the program have met (PTX ISA, "bar.sync") before block ``place`` of the code."""
        self.readers[:] = 0
        self.writers[:] = 0
        self.synchronised += 1

    def warp_barrier(self, warps: Array) -> None:
        """The threads of some warps have met (PTX ISA, "bar.warp.sync")."""
        self.synchronised[warps] += 1

    def fence(self, threads: Array) -> None:
        """What these threads wrote, or may know of, is seen by tensor cores (PTX ISA, "fence.proxy.async")."""
        mine = np.isin(self.writer, threads) | (self.writers == 0)
        self.unfenced[mine] = 0

    def index(self, addresses: Array, width: int, what: str) -> Array:
        """The bytes ``[accesses, width]``; a Fault where they are misaligned or outside."""
        offsets = addresses.astype(np.int64) - SHARED_BASE
        wrong = addresses % np.asarray(width, addresses.dtype) != 0
        if wrong.any():
            raise Fault(f"misaligned {what} of {width} bytes at shared {int(offsets[wrong][0])}")
        outside = (offsets < 0) | (offsets + width > self.size)
        if outside.any():
            raise Fault(f"{what} of {width} bytes at shared {int(offsets[outside][0])}, of {self.size}")
        return offsets[:, None] + _ONE_BY_ONE[:width]

    def load(self, addresses: Array, width: int, threads: Array, place: str) -> Array:
        """The bytes ``[threads, width]``; ``place`` tells the instruction."""
        index = self.index(addresses, width, "load")
        self._check_read(index, threads, place)
        self._mark(self.readers, index, threads // 32)
        return self.data[index]

    def store(self, addresses: Array, values: Array, threads: Array) -> None:
        """Writes ``values``, bytes ``[threads, width]``."""
        index = self.index(addresses, values.shape[1], "store")
        # Several warps may write the same to the same bytes, as they do after a reduction that all of them know.
        new = ~((self.data[index] == values).all(1) & self.written[index].all(1) & (self.writers[index] != 0).all(1))
        self._check_write(index[new], threads[new])
        self.data[index] = values
        if (self.data[index] != values).any():
            raise Fault("threads write different numbers to the same bytes of shared memory")
        self._note_write(index, threads, BY_THREADS)

    def begin_copy(self, index: Array, threads: Array) -> None:
        """An asynchronous copy to the bytes ``[threads, width]`` is on its way."""
        self._check_write(index, threads)
        # Aligned, two of them are the same bytes or have none in common.
        if len(np.unique(index[:, 0])) != len(index):
            raise Fault("cp.async writes a byte twice")
        self.pending[index] = True

    def end_copy(self, index: Array, data: Array, threads: Array) -> None:
        """The threads have waited for their copy: its bytes are theirs, and others' after a barrier."""
        self.data[index] = data
        self.pending[index] = False
        self._note_write(index, threads, BY_COPIES)

    def begin_product(self, index: Array) -> None:
        """A wgmma of a warpgroup reads these bytes (PTX ISA, "wgmma": an access of the async proxy)."""
        what = "wgmma reads shared memory that"
        if self.pending[index].any():
            raise Fault(f"{what} an asynchronous copy has not delivered")
        if not self.written[index].all():
            raise Fault(f"{what} nothing has written")
        if self.writers[index].any():
            raise Fault(f"{what} a warp wrote, with no barrier between")
        for who, name in ((BY_THREADS, "threads"), (BY_COPIES, "cp.async")):
            if (self.unfenced[index] == who).any():
                raise Fault(f"{what} {name} wrote, with no fence.proxy.async between")
        self.being_read[index] += 1

    def end_product(self, index: Array, warps: Array) -> None:
        """The warpgroup of these warps has waited for it; the others know that after their next barrier only."""
        self.being_read[index] -= 1
        self.readers[index] |= np.bitwise_or.reduce(_bits(warps))

    def _mark(self, bits: Array, index: Array, warps: Array) -> None:
        """Each row of ``index`` is read, or written, by a warp."""
        np.bitwise_or.at(bits, index.reshape(-1), np.repeat(_bits(warps), index.shape[1]))

    def _check_read(self, index: Array, threads: Array, place: str) -> None:
        if self.pending[index].any():
            raise Fault("read of shared memory that an asynchronous copy has not delivered")
        if not self.written[index].all():
            raise Fault(f"read of shared memory that nothing has written: byte {int(index[~self.written[index]][0])}")
        writers = self.writers[index]
        if writers.any():
            warps = threads // 32
            if (writers & ~_bits(warps)[:, None]).any():
                raise Fault("read of shared memory that another warp wrote, with no barrier between")
            mine = (writers != 0) & (self.writer[index] != threads[:, None])
            if (mine & (self.written_at[index] == self.synchronised[warps][:, None])).any():
                self.within_warp.add(f"read after write: {place}")

    def _check_write(self, index: Array, threads: Array) -> None:
        if self.pending[index].any():
            raise Fault("write to shared memory that an asynchronous copy is about to write")
        if self.being_read[index].any():
            raise Fault("write to shared memory that a tensor core may still read")
        others = ~_bits(threads // 32)[:, None]
        if (self.readers[index] & others).any():
            raise Fault("write to shared memory that another warp reads, with no barrier between")
        if (self.writers[index] & others).any():
            raise Fault("write to shared memory that another warp writes, with no barrier between")

    def _note_write(self, index: Array, threads: Array, who: int) -> None:
        warps = threads // 32
        self.written[index] = True
        self._mark(self.writers, index, warps)
        self.writer[index] = threads[:, None]
        self.written_at[index] = self.synchronised[warps][:, None]
        self.unfenced[index] = who


def _bits(warps: Array) -> Array:
    """Each warp's bit."""
    return np.uint16(1) << warps.astype(np.uint16)
