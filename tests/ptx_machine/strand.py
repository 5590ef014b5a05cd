"""Threads that run together: all of a program, or one warpgroup where warpgroups go apart.

Where a branch parts them, the block that comes first runs first, under a mask, and they meet again.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum, auto
from typing import TYPE_CHECKING, Any

import numpy as np

from ptx_machine.elementwise import Elementwise
from ptx_machine.memory import Array, Fault
from ptx_machine.parse import Address, Immediate, Instruction, Register, Symbol
from ptx_machine.translate import Unknown
from ptx_machine.wgmma import Wgmma

if TYPE_CHECKING:
    from ptx_machine.machine import Block, Cta

#: What a register holds in threads that never wrote it, in every byte: no plausible number.
_NEVER = 0xBE


class Event(Enum):
    """Why a strand gives way."""

    #: A block of instructions is done.
    STEP = auto()
    #: The next instruction is an atomic.
    ATOMIC = auto()
    #: All its threads are at a barrier.
    BARRIER = auto()


class Strand:
    """``width`` threads of a program from number ``first`` on, and their registers."""

    def __init__(self, cta: Cta, first: int, width: int) -> None:
        self.cta, self.first, self.width = cta, first, width
        self.shared, self.memory, self.order, self.notes = cta.shared, cta.memory, cta.order, cta.notes
        #: Their numbers in the program.
        self.threads = np.arange(first, first + width)
        #: By index: one number a thread; None where nothing has been written, or a product is under way.
        self.R: list[Any] = [None] * len(cta.code.program.names)
        #: Asynchronous copies (bytes, data, threads): of the open group, and of groups that are not waited for.
        self.open: list[tuple[Array, Array, Array]] = []
        self.groups: list[list[tuple[Array, Array, Array]]] = []
        self.wgmma = Wgmma(self)
        #: Instructions executed.
        self.count = 0
        #: The block that begins after the barrier its threads are at.
        self.place = -1
        self._special()

    def _special(self) -> None:
        """PTX ISA, "Special Registers"."""
        thread = self.threads.astype(np.uint32)
        values = {"%tid.x": thread, "%tid.y": 0 * thread, "%tid.z": 0 * thread, "%laneid": thread % 32}
        values["%ntid.x"] = np.full_like(thread, self.cta.code.program.threads)
        for axis, here, count in zip("xyz", self.cta.place, self.cta.grid, strict=True):
            values[f"%ctaid.{axis}"] = np.full_like(thread, here)
            values[f"%nctaid.{axis}"] = np.full_like(thread, count)
        for name, register in self.cta.code.program.special.items():
            if name not in values:
                raise Unknown(f"the special register {name}")
            self.R[register.index] = values[name]

    def run(self) -> Iterator[Event]:
        """From the entry until all threads have returned."""
        blocks, end = self.cta.code.blocks, len(self.cta.code.blocks)
        ready: dict[int, Array] = {0: np.ones(self.width, bool)}
        parked: dict[int, Array] = {}
        gone = np.zeros(self.width, bool)
        while ready or parked:
            if not ready:
                if len(parked) > 1 or gone.any():
                    raise Fault(
                        f"some threads are not at the barrier that the others wait at; program {self.cta.place}"
                    )
                (self.place,) = parked
                yield Event.BARRIER
                ready, parked = parked, {}
            # The earliest first: threads that went apart meet again.
            number = min(ready)
            mask = ready.pop(number)
            if number == end:
                gone |= mask
                continue
            block = blocks[number]
            self.cta.code.visited.add(number)
            if block.atomic:
                yield Event.ATOMIC
            self._execute(block, None if mask.all() else mask)
            for to, which, threads in self._leave(block, number, mask):
                _join(parked if which else ready, to, threads)
            yield Event.STEP
        if any(self.groups) or self.open:
            self.notes.add("the program ends before its asynchronous copies were waited for")
        if not self.wgmma.idle:
            self.notes.add("the program ends before its wgmma were waited for")

    def _leave(self, block: Block, number: int, mask: Array) -> Iterator[tuple[int, bool, Array]]:
        """(next block, whether at a barrier before it, threads) after a block."""
        last, end = block.last, len(self.cta.code.blocks)
        if last is None:
            yield number + 1, False, mask
        elif last.opcode in ("bra", "bra.uni"):
            taken = mask if last.guard is None else mask & self._guard(last)
            if taken.any():
                yield self.cta.code.target(last), False, taken
            if (mask & ~taken).any():
                yield number + 1, False, mask & ~taken
        elif last.guard is not None:
            raise self.blame(Unknown("under a predicate"), last)
        elif last.opcode in ("ret", "exit"):
            yield end, False, mask
        elif last.opcode == "trap":
            raise self.blame(Fault("trap"), last)
        elif last.operands == [Immediate(0)]:
            yield number + 1, True, mask
        else:
            raise self.blame(Unknown("a barrier other than 0"), last)

    def _guard(self, ins: Instruction) -> Array:
        """Which threads an instruction's predicate lets execute it."""
        assert ins.guard is not None
        value: Array | None = self.R[ins.guard.index]
        if value is None:
            raise self.blame(Fault("a predicate that was never written"), ins)
        return ~value if ins.negated else value

    @np.errstate(all="ignore")
    def _execute(self, block: Block, mask: Array | None) -> None:
        for step in block.steps:
            try:
                if isinstance(step, Elementwise):
                    self.count += len(step)
                    step.run(self.R, mask)
                else:
                    self.count += 1
                    step[1](self, mask)
            except Exception as error:
                raise self.blame(error, step) from error

    def blame(self, error: Exception, step: Any) -> Exception:
        """The error with the instruction it belongs to and the Python line of the kernel."""
        ins = step if isinstance(step, Instruction) else step.at(error) if isinstance(step, Elementwise) else step[0]
        said = str(error) if isinstance(error, Fault | Unknown) else repr(error)
        if isinstance(step, Elementwise) and "None" in said:
            said = "a register that is not there yet, or never was"
        return Fault(f"{said}; program {self.cta.place}, at {ins.place}")

    # --- what instructions are made of -------------------------------------------------------------------------------

    def lanes(self, ins: Instruction, mask: Array | None) -> Array | None:
        """The places of the threads that execute it; None: all."""
        if ins.guard is not None:
            guard = self._guard(ins)
            mask = guard if mask is None else guard & mask
        return None if mask is None or mask.all() else np.flatnonzero(mask)

    def everyone(self, ins: Instruction, mask: Array | None) -> None:
        """Raises a Fault unless all threads execute it."""
        if mask is not None or ins.guard is not None:
            raise Fault(f"not all threads execute {ins.opcode}, which is not known here")

    def whole_warps(self, ins: Instruction, mask: Array | None) -> Array | None:
        """The places of the threads that execute it; a Fault where a warp has threads on and off."""
        lanes = self.lanes(ins, mask)
        if lanes is not None:
            on = np.zeros(self.width, bool)
            on[lanes] = True
            if (on.reshape(-1, 32).any(1) != on.reshape(-1, 32).all(1)).any():
                raise Fault(f"{ins.opcode}: some threads of a warp do not execute it")
        return lanes

    def value(self, operand: Any, size: int = 4) -> Array:
        """One unsigned number of ``size`` bytes a thread; a Fault where a register was never written."""
        if isinstance(operand, Immediate):
            return np.full(self.width, operand.value & ((1 << 8 * size) - 1), f"u{size}")
        value: Array | None = self.R[operand.index]
        if value is None:
            raise Fault("a register that is not there yet, or never was")
        return value

    def put(self, register: Any, lanes: Array | None, values: Array) -> None:
        """Sets a register of the threads ``lanes``; ``_`` takes nothing (PTX ISA, "sink symbol")."""
        if isinstance(register, Symbol) and register.name == "_":
            return
        if lanes is not None:
            old = self.R[register.index]
            new = np.frombuffer(bytes([_NEVER]) * (self.width * values.itemsize), values.dtype) if old is None else old
            new = new.copy()
            new[lanes] = values
            values = new
        self.R[register.index] = values

    def addresses(self, operand: Any, lanes: Array | None) -> Array:
        """What ``[register + offset]`` or ``[symbol + offset]`` is in the threads ``lanes``."""
        assert isinstance(operand, Address)
        if isinstance(operand.base, Symbol):
            base = np.full(self.width, self.cta.code.symbols[operand.base.name], np.uint32)
        else:
            base = self.value(operand.base)
        if lanes is not None:
            base = base[lanes]
        kind = base.dtype.type
        return base + kind(operand.offset & (2 ** (8 * base.dtype.itemsize) - 1)) if operand.offset else base


def _join(where: dict[int, Array], block: int, threads: Array) -> None:
    where[block] = where[block] | threads if block in where else threads


def registers(operand: Any) -> list[Register]:
    """The registers of an operand that may be a vector."""
    return operand if isinstance(operand, list) else [operand]
