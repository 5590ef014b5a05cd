"""Reads NVIDIA machine code: the instructions of a listing, its hot loop, and what that loop does.

What a listing means is from the CUDA Binary Utilities manual (the instruction tables by architecture) and, for the
descriptor of tcgen05, from the PTX manual.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property

_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);", re.MULTILINE)
_TARGET = re.compile(r"0x([0-9a-f]+)$")
_WARPGROUP_MMA = re.compile(r"[A-Z]GMMA\.(\d+)x(\d+)x(\d+)")
#: m, n and k are written without a sign between them; m is 16 and n is 8 in all that Triton emits.
_WARP_MMA = re.compile(r"[A-Z]MMA\.168(\d+)")
#: Columns of K in one tcgen05 product: 32 bytes.
_TCGEN05_K = {"UTCHMMA": 16, "UTCIMMA": 32, "UTCQMMA": 32}

#: Classes of instructions, the first pattern that matches the opcode. ``integer`` has IMAD and MOV too, some of which
#: run beside the integer pipe: its count is an upper bound of that pipe's load. ``shared`` has what else goes through
#: the load/store queue without leaving the multiprocessor: tensor memory and shuffles.
CLASSES = {
    "matrix": r"[A-Z]G?MMA\b|UTC[A-Z]MMA\b",
    "async": r"LDGSTS|UTMALDG|UBLKCP",
    "load": r"LDG?\b",
    "shared": r"LDSM?\b|STSM?\b|ATOMS|LDTM|STTM|SHFL",
    "control": r"BAR\b|DEPBAR|LDGDEPBAR|WARP|SYNCS|MEMBAR|FENCE|BRA|BRX|CALL|RET|BSSY|BSYNC|EXIT|NOP|ELECT|VOTE|UTCBAR"
    r"|\w*ERRBAR|CCTL|YIELD|NANOSLEEP|ARRIVES|UTMA|ACQBULK",
    "uniform": r"U[A-Z]|R2UR|S2UR",
    "float": r"F|H[A-Z]+2?\b|MUFU|I2F|D[A-Z]",
    "integer": r"I|VI|VABS|LOP|PLOP|SHF|SHL|SHR|PRMT|LEA|SEL|SGXT|BMSK|POPC|BREV|P2R|R2P|MOV",
    "other": r"",
}
_CLASSES = {name: re.compile(pattern) for name, pattern in CLASSES.items()}
#: A number or half of one goes from register to register, unchanged.
_COPY = re.compile(r"^(?:MOV|IMAD\.MOV\S*) |^PRMT R\d+, R\d+(?:\.reuse)?, 0x(?:7610|5410|7632|3210)\b")
#: These have no destination register: all their operands are read.
_NO_RESULT = re.compile(r"ST|LDGSTS|RED|BAR|BRA|UTC|UTMA|SYNCS|R2UR|R2P|[A-Z]SETP|P?LOP3.LUT P")


@dataclass(frozen=True)
class Instruction:
    address: int
    #: ``@P0`` or such, or nothing.
    predicate: str
    #: With its modifiers, as in ``LDG.E.128``.
    opcode: str
    operands: str
    #: The address a branch goes to.
    target: int | None = None

    def __str__(self) -> str:
        return f"{self.opcode} {self.operands}"

    @property
    def kind(self) -> str:
        """A key of CLASSES."""
        return _kind(self.opcode)

    @property
    def ends(self) -> bool:
        """Whether what stands after it is not reached from it; a branch may have its condition among its operands."""
        always = not self.predicate and "," not in self.operands
        return always and self.opcode.startswith(("BRA", "EXIT", "RET", "CALL"))

    @property
    def width(self) -> int:
        """Bytes a load or copy moves for each thread."""
        modifiers = self.opcode.split(".")
        named = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
        return next((size for name, size in named.items() if name in modifiers), 4)

    @cached_property
    def written(self) -> frozenset[int]:
        """Registers of the result."""
        found = None if _NO_RESULT.match(self.opcode) else re.match(r"R(\d+)\b", self.operands)
        return frozenset(range(int(found[1]), int(found[1]) + self._results)) if found else frozenset()

    @property
    def _results(self) -> int:
        """How many registers the result fills."""
        if found := _WARPGROUP_MMA.match(self.opcode):
            return int(found[2]) // 2
        if found := re.match(r"LDSM\.\S*\.([24])$|LDTM\.x(\d+)", self.opcode):
            return int(found[1] or found[2])
        if self.kind == "matrix":
            return 4
        return self.width // 4 or 1 if self.kind in ("load", "shared") else 1 + (".WIDE" in self.opcode)

    @cached_property
    def read(self) -> frozenset[int]:
        """Registers read, as they are named; of a pair both, of wider operands the first."""
        sources = self.operands if not self.written else self.operands.partition(",")[2]
        named = {int(n) for n in re.findall(r"\bR(\d+)", sources)}
        return frozenset(named | {int(n) + 1 for n in re.findall(r"\bR(\d+)\.64", sources)})

    @cached_property
    def commits(self) -> bool:
        """Whether it closes a group of products that can be waited for."""
        return self.opcode == "UTCBAR" or (self.kind == "matrix" and "gsb0" in self.operands)

    @cached_property
    def waits(self) -> int | None:
        """Groups of products that may be unfinished when it is passed; None where it does not wait for any."""
        if self.opcode.startswith("WARPGROUP.DEPBAR"):
            return int(self.operands.rpartition(" ")[2], 16)
        return 0 if self.opcode.startswith("SYNCS.PHASECHK") else None


@cache
def _kind(opcode: str) -> str:
    return next(name for name, pattern in _CLASSES.items() if pattern.match(opcode))


def parse(listing: str) -> list[Instruction]:
    """The instructions of what nvdisasm or cuobjdump prints, with branch targets as addresses."""
    (program,) = parse_programs(listing, [0])
    return program


def parse_programs(listing: str, begins: Sequence[int]) -> list[list[Instruction]]:
    """As :func:`parse`, for programs that stand one after the other from these addresses on: each begins at 0."""
    programs: list[list[Instruction]] = [[] for _ in begins]
    for address, predicate, opcode, operands in _LINE.findall(listing):
        at = int(address, 16)
        which = bisect_right(begins, at) - 1
        begin, operands, target = begins[which], operands.strip(), None
        if opcode.startswith(("BRA", "CALL")) and (found := _TARGET.search(operands)):
            target = int(found[1], 16) - begin
            operands = operands[: found.start()] + hex(target)
        programs[which].append(Instruction(at - begin, predicate, opcode, operands, target))
    return programs


@dataclass(frozen=True)
class Loop:
    """A backward branch, and everything from where it goes to up to itself."""

    body: tuple[Instruction, ...]
    #: What stands before it in the program.
    before: tuple[Instruction, ...]

    @cached_property
    def classes(self) -> Counter[str]:
        return Counter(i.kind for i in self.body)

    @property
    def matrix_kinds(self) -> list[str]:
        """The distinct matrix instructions, as in ``HGMMA.64x16x16.F32``."""
        return sorted({i.opcode for i in self.body if i.kind == "matrix"})

    @property
    def waits(self) -> int:
        """How often an iteration waits for products; 0 where the hardware's scoreboard does so."""
        asynchronous = any(i.commits for i in self.body)
        return sum(i.waits is not None for i in self.body) if asynchronous else 0

    def copied_bytes(self, threads: int) -> int:
        """Bytes that cp.async moves in one iteration of a block, redundant ones included; TMA's are not in the code."""
        return _copied(self.body, threads)

    def copied_bytes_before(self, threads: int) -> int:
        """As :meth:`copied_bytes`, issued before the first iteration: what is in flight when it begins."""
        return _copied(self.before, threads)

    @property
    def tma(self) -> bool:
        return any(i.opcode.startswith(("UTMALDG", "UBLKCP")) for i in self.body)

    def loaded_bytes(self, threads: int) -> int:
        """Bytes that pass through registers in one iteration of a block."""
        return threads * sum(i.width for i in self.body if i.kind == "load")

    def macs(self, warps: int) -> int | None:
        """Multiply-adds of one iteration of a block; None where the code does not tell."""
        each = [self.macs_of(i, warps) for i in self.body if i.kind == "matrix"]
        return None if None in each else sum(n for n in each if n is not None)

    def macs_of(self, instruction: Instruction, warps: int) -> int | None:
        """Multiply-adds of one matrix instruction, executed by all ``warps`` of a block."""
        if found := _WARPGROUP_MMA.match(instruction.opcode):
            return int(found[1]) * int(found[2]) * int(found[3]) * warps // 4
        if found := _WARP_MMA.match(instruction.opcode):
            return 16 * 8 * int(found[1]) * warps
        # tcgen05: one thread issues it for the block, and its shape is in a descriptor that is set just before:
        # n / 8 in bits 17 to 22, m / 16 in bits 24 to 28.
        register = re.search(r"idesc\[(UR\d+)\]", instruction.operands)
        k = _TCGEN05_K.get(instruction.opcode.split(".")[0])
        if register is None or k is None:
            return None
        for earlier in reversed(self.before + self.body):
            if earlier.address < instruction.address and earlier.operands.startswith(f"{register[1]}, "):
                found = re.fullmatch(r"\S+, 0x([0-9a-f]+)", earlier.operands)
                shape = int(found[1], 16) if found and earlier.opcode == "UMOV" else 0
                return (((shape >> 24) & 31) << 4) * (((shape >> 17) & 63) << 3) * k or None
        return None

    def loads_consumed(self) -> list[Instruction]:
        """Global loads whose number is computed with in the iteration that loads it: their latency is not hidden.

        To be copied to another register at the end of the iteration is what a load that is carried to the next one
        looks like, and does not count.
        """
        return [self.body[at] for at, i in enumerate(self.body) if i.kind == "load" and self._consumed(at)]

    def _consumed(self, at: int) -> bool:
        held = set(self.body[at].written)
        for later in self.body[at + 1 :]:
            if held & later.read:
                if not _COPY.match(str(later)):
                    return True
                held |= later.written
            elif not later.predicate:
                held -= later.written
        return False

    def shortest_load(self) -> int | None:
        """Instructions from a global load to the first that has to wait for it, copies included; of all the least."""
        distances = []
        for at, load in enumerate(self.body):
            if load.kind == "load":
                round_trip = self.body[at + 1 :] + self.body[:at]
                first = next((d for d, later in enumerate(round_trip, 1) if load.written & later.read), len(self.body))
                distances.append(first)
        return min(distances, default=None)


def _copied(instructions: Sequence[Instruction], threads: int) -> int:
    return threads * sum(i.width for i in instructions if i.opcode.startswith("LDGSTS"))


def loops(instructions: Sequence[Instruction]) -> Iterator[Loop]:
    """A loop for every backward branch over matrix instructions whose target is passed by all that reach the branch.

    Not every backward branch closes a loop: where a product is waited for, the spinning stands at the end of the
    program, and jumps back into the middle of the loop it came from.
    """
    place = {i.address: at for at, i in enumerate(instructions)}
    goes = [None if i.target is None else place.get(i.target) for i in instructions]
    ends = [i.ends for i in instructions]
    for end, begin in enumerate(goes):
        if begin is None or begin > end:
            continue
        if any(i.kind == "matrix" for i in instructions[begin:end]) and not _reaches(end, goes, ends, begin):
            yield Loop(tuple(instructions[begin : end + 1]), tuple(instructions[:begin]))


def _reaches(wanted: int, goes: Sequence[int | None], ends: Sequence[bool], avoided: int) -> bool:
    """Whether a position is reached from the first without passing ``avoided``.

    Args:
        goes: the position that each instruction may branch to.
        ends: whether what stands after it is not reached from it.
    """
    seen, waiting = {avoided}, [0]
    while waiting:
        at = waiting.pop()
        while at < len(goes) and at not in seen:
            seen.add(at)
            branch = goes[at]
            if branch is not None:
                waiting.append(branch)
            if ends[at]:
                break
            at += 1
    return wanted != avoided and wanted in seen


def hot_loop(instructions: Sequence[Instruction]) -> Loop:
    """The innermost loop that holds matrix instructions; of several the one with the most.

    Raises:
        ValueError: there is none.
    """
    found = list(loops(instructions))

    def inside(inner: Loop, outer: Loop) -> bool:
        begins, ends = inner.body[0].address - outer.body[0].address, inner.body[-1].address - outer.body[-1].address
        return begins >= 0 >= ends and (begins, ends) != (0, 0)

    innermost = [loop for loop in found if not any(inside(other, loop) for other in found)]
    if not innermost:
        raise ValueError("no loop of this program holds matrix instructions")
    return max(innermost, key=lambda loop: (loop.classes["matrix"], -len(loop.body)))
