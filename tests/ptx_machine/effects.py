"""Instructions that load, store, copy and count: effects beyond the registers of their own thread."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from ptx_machine import warps
from ptx_machine.memory import Array, Fault
from ptx_machine.parse import Immediate, Instruction, Register
from ptx_machine.strand import registers
from ptx_machine.translate import SIZES, TYPES, Unknown

if TYPE_CHECKING:
    from ptx_machine.machine import Effect
    from ptx_machine.strand import Strand

_SPACES = ("global", "shared", "param")
#: Modifiers of loads and stores that change nothing here: caches, state spaces that are one here, vectors, promises.
_HARMLESS = {"global", "shared", "shared::cta", "param", "v2", "v4", "v8", "ca", "cg", "cs", "lu", "wb", "wt", "nc"}


def effect(ins: Instruction) -> Effect | None:
    """What an instruction does to the threads of a strand that are on; None where it is elementwise.

    Raises:
        Unknown: nothing here knows it.
    """
    head = ins.parts[0]
    if head in ("ld", "st"):
        space = next((p.split("::")[0] for p in ins.parts if p.split("::")[0] in _SPACES), "generic")
        make = {"global": _global, "shared": _shared, "param": _parameter}.get(space)
        if make is None or set(ins.parts[1:-1]) - _HARMLESS:
            raise Unknown(ins.place)
    else:
        make = _EFFECTS.get(head) or warps.EFFECTS.get(head)
    return None if make is None else make(ins)


# --- loads and stores ------------------------------------------------------------------------------------------------


def _shape(ins: Instruction) -> tuple[int, int, bool]:
    """(numbers, bytes of one, whether they are signed) of a load or store."""
    count = next((int(p[1:]) for p in ins.parts if p in ("v2", "v4", "v8")), 1)
    kind = TYPES[ins.parts[-1]]
    return count, SIZES[kind], kind[0] == "i"


def _unpack(strand: Strand, ins: Instruction, lanes: Array | None, data: Array) -> None:
    """Bytes ``[threads, width]`` to the registers of a load; a wider register takes the sign along."""
    _, size, signed = _shape(ins)
    words = np.ascontiguousarray(data).view(f"u{size}")
    for i, register in enumerate(registers(ins.operands[0])):
        column = words[:, i]
        if isinstance(register, Register):
            if signed and register.width > size:
                column = column.view(f"i{size}").astype(f"i{register.width}").view(f"u{register.width}")
            column = column.astype(f"u{register.width}")
        strand.put(register, lanes, column)


def _skip(strand: Strand, ins: Instruction, lanes: Array | None) -> None:
    """None of the threads loads: what they hold is any number, which others of their warp may be told by a shuffle."""
    if ins.parts[0] == "ld":
        count, size, _ = _shape(ins)
        _unpack(strand, ins, lanes, np.empty((0, count * size), np.uint8))


def _pack(strand: Strand, ins: Instruction, lanes: Array | None) -> Array:
    """The bytes ``[threads, width]`` of a store."""
    _, size, _ = _shape(ins)
    columns = []
    for operand in registers(ins.operands[1]):
        value = strand.value(operand, size).astype(f"u{size}")
        columns.append(value if lanes is None else value[lanes])
    return np.ascontiguousarray(np.stack(columns, 1)).view(np.uint8)


def _global(ins: Instruction) -> Effect:
    """PTX ISA, "ld" and "st", .global."""
    count, size, _ = _shape(ins)
    store = ins.parts[0] == "st"

    def step(strand: Strand, mask: Array | None) -> None:
        lanes = strand.lanes(ins, mask)
        if lanes is not None and not len(lanes):
            _skip(strand, ins, lanes)
            return
        addresses = strand.addresses(ins.operands[0 if store else 1], lanes)
        if store:
            strand.memory.store(addresses, _pack(strand, ins, lanes), strand.order)
        else:
            _unpack(strand, ins, lanes, strand.memory.load(addresses, count * size, strand.order))

    return step


def _shared(ins: Instruction) -> Effect:
    """PTX ISA, "ld" and "st", .shared."""
    count, size, _ = _shape(ins)
    store = ins.parts[0] == "st"

    def step(strand: Strand, mask: Array | None) -> None:
        lanes = strand.lanes(ins, mask)
        threads = strand.threads if lanes is None else strand.threads[lanes]
        if not len(threads):
            _skip(strand, ins, lanes)
            return
        addresses = strand.addresses(ins.operands[0 if store else 1], lanes)
        if store:
            strand.shared.store(addresses, _pack(strand, ins, lanes), threads)
        else:
            _unpack(strand, ins, lanes, strand.shared.load(addresses, count * size, threads, ins.place))

    return step


def _parameter(ins: Instruction) -> Effect:
    """PTX ISA, "ld.param": the same for all threads."""
    target, address = ins.operands

    def step(strand: Strand, mask: Array | None) -> None:
        value = strand.cta.parameters[address.base.name] >> 8 * address.offset & (2 ** (8 * target.width) - 1)
        strand.R[target.index] = np.full(strand.width, value, f"u{target.width}")

    return step


def _atomic(ins: Instruction) -> Effect:
    """PTX ISA, "atom": the one that counts programs in."""
    if ins.parts[1:] != ["global", "gpu", "acq_rel", "add", "u32"]:
        raise Unknown(ins.place)
    target, address, operand = ins.operands

    def step(strand: Strand, mask: Array | None) -> None:
        lanes = strand.lanes(ins, mask)
        lanes = np.arange(strand.width) if lanes is None else lanes
        if not len(lanes):
            return
        old = np.zeros(len(lanes), np.uint32)
        amount = strand.value(operand)
        for i, (lane, place) in enumerate(zip(lanes, strand.addresses(address, lanes), strict=True)):
            here = np.array([place])
            word = strand.memory.load(here, 4).view(np.uint32)
            strand.order.atomic(int(place))
            old[i] = word[0, 0]
            strand.memory.store(here, (word + amount[lane]).view(np.uint8))
        strand.put(target, lanes, old)

    return step


# --- asynchronous copies (PTX ISA, "cp.async") -----------------------------------------------------------------------


def _copy(ins: Instruction) -> Effect:
    what = ins.parts[2]
    if ins.opcode == "cp.async.commit_group":
        return _commit(ins)
    if ins.opcode in ("cp.async.wait_group", "cp.async.wait_all"):
        return _wait(ins)
    if what not in ("ca", "cg") or ins.parts[3:] not in (["shared", "global"], ["shared::cta", "global"]):
        raise Unknown(ins.place)
    width = ins.operands[2].value
    count = ins.operands[3] if len(ins.operands) > 3 else Immediate(width)

    def step(strand: Strand, mask: Array | None) -> None:
        lanes = strand.lanes(ins, mask)
        lanes = np.arange(strand.width) if lanes is None else lanes
        if not len(lanes):
            return
        index = strand.shared.index(strand.addresses(ins.operands[0], lanes), width, "cp.async")
        threads = strand.threads[lanes]
        strand.shared.begin_copy(index, threads)
        sizes = strand.value(count)[lanes]
        if not np.isin(sizes, (0, width)).all():
            raise Fault("cp.async of a part of its bytes is not known here")
        # What is not copied is filled with zeros.
        data = np.zeros((len(lanes), width), np.uint8)
        there = np.flatnonzero(sizes)
        if len(there):
            sources = strand.addresses(ins.operands[1], lanes[there])
            data[there] = strand.memory.load(sources, width, strand.order)
        strand.open.append((index, data, threads))

    return step


def _commit(ins: Instruction) -> Effect:
    def step(strand: Strand, mask: Array | None) -> None:
        strand.everyone(ins, mask)
        strand.groups.append(strand.open)
        strand.open = []

    return step


def _wait(ins: Instruction) -> Effect:
    """Copies arrive here and not before, so that who does not wait long enough is seen."""
    every = ins.opcode == "cp.async.wait_all"
    left = 0 if every else ins.operands[0].value

    def step(strand: Strand, mask: Array | None) -> None:
        strand.everyone(ins, mask)
        if every:
            strand.groups.append(strand.open)
            strand.open = []
        done = strand.groups[: len(strand.groups) - left] if left else strand.groups
        strand.groups = strand.groups[len(done) :]
        for copy in (copy for group in done for copy in group):
            strand.shared.end_copy(*copy)

    return step


_EFFECTS: dict[str, Callable[[Instruction], Any]] = {"atom": _atomic, "cp": _copy}
