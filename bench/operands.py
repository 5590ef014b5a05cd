"""Registers that a product of sm_90 reads, and writes to them that come before a wait for it; needs no GPU.

``wgmma.mma_async`` takes its left operand from registers and runs beside the program. To write to such a register
before a ``wgmma.wait_group`` that covers the product is not allowed (PTX ISA, ``wgmma.mma_async``). Triton does so
where a sum is carried from product to product: the next block is decoded ahead of the wait. ptxas does so too, in
the registers it chooses, also in kernels whose PTX keeps the rule, as long as a group may stay under way.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from bench.sass import Loop
from qlinear.kernels.configs import Config
from qlinear.kernels.runtime import Capability

#: A product whose left operand begins at a register, not at a descriptor.
_LEFT = re.compile(r"[A-Z]GMMA\.\S+ R\d+, R(\d+)")
#: What may stand before a statement: braces around a scope, labels.
_BEFORE = re.compile(r"[{}\s]+|([$\w]+):(?!:)")
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/|^\s*\.(?:loc|file|pragma|section)\b[^\n]*", re.MULTILINE | re.DOTALL)
_OPCODE = re.compile(r"(@!?%?\w+\s+)?([a-z][\w.:]*)\s*(.*)", re.DOTALL)
_REGISTER = re.compile(r"%r\d+\b")
#: The first operand of these is no result.
_NO_RESULT = re.compile(r"st\.|bra|ret|bar|cp\.|wgmma|fence|stmatrix|red\.|membar|mbarrier|prefetch")
#: A group as old as this is counted as no older: no wait lets so many be under way.
_OLDEST = 8


class Waiting(Config):
    """A configuration whose kernel waits for a product before it decodes the next block, for comparison."""

    def waits_for_operands(self, capability: Capability) -> bool:
        return capability == (9, 0)


#: By register: how many groups were closed since that of a product that reads it; -1 while its group is open.
_Pending = dict[str, int]


@dataclass(frozen=True)
class _Block:
    """Statements without a jump but at the end: their opcodes, operands and where they may go."""

    statements: tuple[tuple[str, str], ...]
    next: tuple[int, ...]


def early_writes(ptx: str) -> list[str]:
    """The instructions that may write to a register which a product under way reads, on any path; each once.

    Args:
        ptx: of one kernel, as Triton makes it.
    """
    if "wgmma.mma_async" not in ptx:
        return []
    blocks = _blocks(ptx)
    states: dict[int, _Pending] = {0: {}}
    waiting, found = [0], dict[str, None]()
    while waiting:
        at = waiting.pop()
        state = dict(states[at])
        for opcode, operands in blocks[at].statements:
            found |= dict.fromkeys(_step(opcode, operands, state))
        for following in blocks[at].next:
            joined = _join(states.get(following), state)
            if joined != states.get(following):
                states[following] = joined
                waiting.append(following)
    return list(found)


def early_writes_of_code(loop: Loop) -> int:
    """The same in machine code: so many instructions of a loop write to a register that a product may still read."""
    open_group: set[int] = set()
    groups: list[set[int]] = []
    early = set()
    # What is under way when the loop begins again is what its end left.
    for instruction in 2 * loop.body:
        if left := _LEFT.match(str(instruction)):
            open_group |= set(range(int(left[1]), int(left[1]) + 4))
        elif instruction.written and not instruction.written.isdisjoint(open_group.union(*groups)):
            early.add(instruction.address)
        if instruction.commits:
            groups.append(open_group)
            open_group = set()
        if instruction.waits is not None:
            groups = groups[len(groups) - instruction.waits :] if instruction.waits else []
    return len(early)


def _step(opcode: str, operands: str, state: _Pending) -> Iterator[str]:
    """Changes the state by one instruction, and yields it if it writes too early."""
    if opcode.startswith("wgmma.mma_async"):
        # The sums come first, then the left operand: registers, or one descriptor.
        left = re.match(r"\{[^}]*\}\s*,\s*\{([^}]*)\}", operands)
        for register in _REGISTER.findall(left[1]) if left else ():
            state[register] = -1
    elif opcode.startswith("wgmma.commit_group"):
        for register, age in state.items():
            state[register] = min(age + 1, _OLDEST)
    elif opcode.startswith("wgmma.wait_group"):
        for register in [r for r, age in state.items() if age >= int(operands)]:
            del state[register]
    elif state and not _NO_RESULT.match(opcode):
        result = re.match(r"\{[^}]*\}|[^,]*", operands)
        if result and not state.keys().isdisjoint(_REGISTER.findall(result[0])):
            yield f"{opcode} {operands}"


def _join(one: Mapping[str, int] | None, other: Mapping[str, int]) -> _Pending:
    """What may be under way where two paths meet; None of one that has not been walked."""
    if one is None:
        return dict(other)
    return {r: min(one.get(r, _OLDEST), other.get(r, _OLDEST)) for r in one.keys() | other.keys()}


def _blocks(ptx: str) -> list[_Block]:
    """The kernel cut at the labels that are jumped to, and after jumps."""
    _, _, body = ptx.partition(".entry")
    # What follows the kernel is for debuggers.
    body = _COMMENT.sub("", body[body.index("\n{") :].partition("\n\t.section")[0])
    statements: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    ends: set[int] = set()
    for text in body.split(";"):
        at = 0
        while before := _BEFORE.match(text, at):
            at = before.end()
            if before[1]:
                labels[before[1]] = len(statements)
        if found := _OPCODE.match(text, at):
            statements.append(((found[1] or "") + found[2], " ".join(found[3].split())))
            if _jump(statements[-1][0]):
                ends.add(len(statements))
    targets = {labels[operands] for opcode, operands in statements if _jump(opcode) == "bra"}
    begins = sorted({0, *targets, *ends} - {len(statements)})
    number = {begin: at for at, begin in enumerate(begins)}
    blocks = []
    for at, begin in enumerate(begins):
        inside = tuple(statements[begin : begins[at + 1] if at + 1 < len(begins) else len(statements)])
        opcode, operands = inside[-1]
        after = [number[labels[operands]]] if _jump(opcode) == "bra" else []
        if at + 1 < len(begins) and (opcode.startswith("@") or not _jump(opcode)):
            after.append(at + 1)
        blocks.append(_Block(tuple((o.split()[-1], rest) for o, rest in inside), tuple(after)))
    return blocks


def _jump(opcode: str) -> str | None:
    """``bra`` or ``ret``, if it is one, with a condition or without."""
    name = opcode.split()[-1].partition(".")[0]
    return name if name in ("bra", "ret") else None
