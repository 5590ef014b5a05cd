"""Instructions that the threads of a warp, or of a warpgroup, execute together."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from ptx_machine import fragments
from ptx_machine.memory import Array, Fault
from ptx_machine.parse import Instruction
from ptx_machine.strand import registers
from ptx_machine.translate import TYPES, Unknown

if TYPE_CHECKING:
    from ptx_machine.machine import Effect
    from ptx_machine.strand import Strand

_MMA = re.compile(
    r"mma\.(sync|sp::ordered_metadata\.sync)\.aligned\.m16n8k(\d+)\.row\.col\.(?:satfinite\.)?(f32|s32)\.(\w+)\.\4\.\3"
)
#: What ldmatrix and stmatrix are written with, beside the number of matrices.
_MATRIX = {"sync", "aligned", "m8n8", "trans", "shared", "shared::cta", "b16"}


def _put(strand: Strand, lanes: Array | None, targets: list[Any], values: list[Array]) -> None:
    for target, value in zip(targets, values, strict=True):
        strand.put(target, lanes, value if lanes is None else value[lanes])


def _mma(ins: Instruction) -> Effect:
    """PTX ISA, "mma" and "mma.sp::ordered_metadata"."""
    found = _MMA.fullmatch(ins.opcode)
    if found is None or found[4] not in fragments.PACKED:
        raise Unknown(ins.place)
    sparse, k, kind = found[1] != "sync", int(found[2]), found[4]
    # Integers that overflow would wrap without .satfinite.
    wraps = kind == "s8" and ".satfinite." not in ins.opcode
    if k != 8 * fragments.PACKED[kind] * (2 if sparse else 1) or wraps:
        raise Unknown(ins.place)
    d, a, b, c = (registers(operand) for operand in ins.operands[:4])

    def step(strand: Strand, mask: Array | None) -> None:
        lanes = strand.whole_warps(ins, mask)
        values = [[strand.value(register) for register in operand] for operand in (c, a, b)]
        if sparse:
            metadata, selector = strand.value(ins.operands[4]), ins.operands[5].value
            made = fragments.mma_sp(kind, *values, metadata, selector)
        else:
            made = fragments.mma(kind, *values)
        _put(strand, lanes, d, made)

    return step


def _matrix(ins: Instruction) -> Effect:
    """PTX ISA, "ldmatrix" and "stmatrix": the threads 0 to 7 have the addresses of the first matrix's rows, ..."""
    store, turned = ins.parts[0] == "stmatrix", "trans" in ins.parts
    count = next((int(p[1]) for p in ins.parts if p in ("x1", "x2", "x4")), 0)
    if not count or set(ins.parts[1:]) - _MATRIX - {f"x{count}"}:
        raise Unknown(ins.place)

    def step(strand: Strand, mask: Array | None) -> None:
        lanes = strand.whole_warps(ins, mask)
        if lanes is not None and not len(lanes):
            return
        if lanes is not None:
            raise Fault(f"{ins.opcode} of some warps is not known here")
        warps = strand.width // 32
        rows = (np.arange(warps)[:, None] * 32 + np.arange(8 * count)).reshape(-1)
        addresses, threads = strand.addresses(ins.operands[0 if store else 1], rows), strand.threads[rows]
        if store:
            values = [strand.value(register) for register in registers(ins.operands[1])]
            strand.shared.store(addresses, fragments.to_rows(values, warps, turned), threads)
        else:
            data = strand.shared.load(addresses, 16, threads, ins.place)
            _put(strand, None, registers(ins.operands[0]), fragments.from_rows(data, warps, count, turned))

    return step


def _shuffle(ins: Instruction) -> Effect:
    """PTX ISA, "shfl.sync"."""
    mode = ins.parts[2]
    if ins.parts[1] != "sync" or ins.parts[3:] != ["b32"] or mode not in ("up", "down", "bfly", "idx"):
        raise Unknown(ins.place)

    def step(strand: Strand, mask: Array | None) -> None:
        lanes = strand.whole_warps(ins, mask)
        a, b, c, members = (strand.value(operand) for operand in ins.operands[1:5])
        if (members != 0xFFFFFFFF).any():
            raise Fault("shfl of a part of a warp is not known here")
        lane = np.arange(strand.width, dtype=np.int64) % 32
        amount, clamp, segment = (t.astype(np.int64) & 31 for t in (b, c, c >> np.uint32(8)))
        most, least = (lane & segment) | (clamp & ~segment), lane & segment
        source = {
            "up": lane - amount,
            "down": lane + amount,
            "bfly": lane ^ amount,
            "idx": least | (amount & ~segment),
        }[mode]
        inside = source >= most if mode == "up" else source <= most
        source = np.where(inside, source, lane) + np.arange(strand.width) // 32 * 32
        target = ins.operands[0]
        # ``d|p``: p says whether there was a source.
        targets = list(target) if isinstance(target, tuple) else [target]
        _put(strand, lanes, targets, [a[source], inside][: len(targets)])

    return step


def _redux(ins: Instruction) -> Effect:
    """PTX ISA, "redux.sync": every thread of a warp gets the same."""
    operation = {"max": np.max, "min": np.min, "add": np.sum}.get(ins.parts[2])
    if operation is None or ins.parts[1] != "sync" or ins.parts[3] not in ("s32", "u32") or len(ins.parts) > 4:
        raise Unknown(ins.place)
    kind = TYPES[ins.parts[3]]

    def step(strand: Strand, mask: Array | None) -> None:
        lanes = strand.whole_warps(ins, mask)
        a, members = (strand.value(operand) for operand in ins.operands[1:3])
        if (members != 0xFFFFFFFF).any():
            raise Fault("redux of a part of a warp is not known here")
        made = operation(a.view(kind).reshape(-1, 32), 1).astype(kind)
        _put(strand, lanes, [ins.operands[0]], [np.repeat(made, 32).view(np.uint32)])

    return step


def _barrier(ins: Instruction) -> Effect:
    """PTX ISA, "bar.warp.sync"; other barriers end a block of instructions and do not come here."""
    if ins.opcode != "bar.warp.sync":
        raise Unknown(ins.place)

    def step(strand: Strand, mask: Array | None) -> None:
        lanes = strand.whole_warps(ins, mask)
        if lanes is not None and len(lanes) < strand.width:
            raise Fault("bar.warp.sync of some warps is not known here")
        strand.shared.warp_barrier(np.unique(strand.threads // 32))
        if strand.cta.code.program.threads == 32:
            # They are all of the program's threads.
            strand.shared.barrier(-1)
            strand.order.barrier()

    return step


def _wgmma(ins: Instruction) -> Effect:
    """PTX ISA, "wgmma"; see :mod:`ptx_machine.wgmma`."""
    what = ins.parts[1]
    if what not in ("fence", "mma_async", "commit_group", "wait_group") or ins.parts[2:4] != ["sync", "aligned"]:
        raise Unknown(ins.place)

    def step(strand: Strand, mask: Array | None) -> None:
        strand.everyone(ins, mask)
        if what == "fence":
            strand.wgmma.fence()
        elif what == "mma_async":
            strand.wgmma.issue(ins)
        elif what == "commit_group":
            strand.wgmma.commit()
        else:
            strand.wgmma.wait(ins.operands[0].value)

    return step


def _fence(ins: Instruction) -> Effect:
    """PTX ISA, "fence.proxy.async"."""
    if ins.opcode != "fence.proxy.async.shared::cta":
        raise Unknown(ins.place)

    def step(strand: Strand, mask: Array | None) -> None:
        strand.everyone(ins, mask)
        strand.shared.fence(strand.threads)

    return step


#: By the first part of the opcode.
EFFECTS: dict[str, Callable[[Instruction], Any]] = {
    "mma": _mma, "ldmatrix": _matrix, "stmatrix": _matrix, "shfl": _shuffle, "redux": _redux, "bar": _barrier,
    "wgmma": _wgmma, "fence": _fence,
}  # fmt: skip
