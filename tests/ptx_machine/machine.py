"""A kernel's code, cut into blocks, and the programs of a launch: one after the other, or interleaved."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ptx_machine.effects import effect
from ptx_machine.elementwise import Elementwise
from ptx_machine.memory import Array, Fault, GlobalMemory, Order
from ptx_machine.parse import Instruction, Program, Symbol
from ptx_machine.shared import SHARED_BASE, SharedMemory
from ptx_machine.strand import Event, Strand
from ptx_machine.translate import Translator
from ptx_machine.wgmma import WARPGROUP

#: What an instruction that is not elementwise does to the threads of a strand that are on (None: all).
Effect = Callable[[Strand, Array | None], None]
Step = Elementwise | tuple[Instruction, Effect]
_ENDS = (
    "bra",
    "bra.uni",
    "ret",
    "exit",
    "trap",
    "bar.sync",
    "barrier.sync",
    "barrier.sync.aligned",
    "bar.sync.aligned",
)


@dataclass(frozen=True)
class Schedule:
    """In which order what is independent happens; results and checks must not depend on it.

    Args:
        programs: ``forward``, ``backward``, ``random``: whole programs one after the other; ``mixed``: each up to its
            next atomic, in turns.
        warpgroups: ``together``: all threads of a program in step. ``forward``, ``backward``: each warpgroup as far as
            it gets before the next runs; ``random``: a block of instructions at a time.
    """

    programs: str = "forward"
    warpgroups: str = "together"
    seed: int = 0


#: One after the other.
IN_ORDER = Schedule()


@dataclass
class Block:
    """Instructions that run one after the other, and the branch, barrier or return that ends them, if one does."""

    steps: list[Step]
    last: Instruction | None
    #: Whether it begins with an atomic.
    atomic: bool = False


class Code:
    """A kernel that is ready to run by ``width`` threads at a time, with ``shared`` bytes of shared memory."""

    def __init__(self, program: Program, shared: int, width: int) -> None:
        self.program, self.shared, self.width = program, shared, width
        #: Triton's name of the shared memory that a launch asks for.
        self.symbols = {"global_smem": SHARED_BASE}
        self._translator = Translator(width, self.symbols)
        self.blocks: list[Block] = []
        #: Those that a thread has come to.
        self.visited: set[int] = set()
        #: The block that an instruction begins.
        self._block_at: dict[int, int] = {}
        self._cut()

    def target(self, ins: Instruction) -> int:
        """The block a branch goes to."""
        return self._block_at.get(self._label(ins), len(self.blocks))

    def _label(self, ins: Instruction) -> int:
        (label,) = ins.operands
        assert isinstance(label, Symbol), ins.text
        return self.program.labels[label.name]

    def _cut(self) -> None:
        body = self.program.body
        # Labels for the debugger, which nothing branches to, do not count: they would make five times as many blocks.
        leaders = {0, *(self._label(ins) for ins in body if ins.opcode in ("bra", "bra.uni"))}
        leaders |= {i + 1 for i, ins in enumerate(body) if ins.opcode in _ENDS}
        leaders |= {i for i, ins in enumerate(body) if _is_atomic(ins)}
        starts = sorted(leader for leader in leaders if leader < len(body))
        self._block_at = {start: number for number, start in enumerate(starts)}
        for start, stop in zip(starts, [*starts[1:], len(body)], strict=True):
            code = body[start:stop]
            last = code.pop() if code and code[-1].opcode in _ENDS else None
            self.blocks.append(Block(list(self._steps(code)), last, bool(code) and _is_atomic(code[0])))

    def _steps(self, code: list[Instruction]) -> Iterator[Step]:
        """What is elementwise goes together."""
        run: list[Instruction] = []
        for ins in code:
            step = effect(ins)
            if step is None:
                run.append(ins)
                continue
            if run:
                yield Elementwise(self._translator, run)
                run = []
            yield ins, step
        if run:
            yield Elementwise(self._translator, run)


def _is_atomic(ins: Instruction) -> bool:
    return ins.opcode.startswith("atom")


class Cta:
    """One program instance (PTX ISA, "Cooperative Thread Arrays")."""

    def __init__(
        self, code: Code, place: tuple[int, int, int], grid: tuple[int, int, int], parameters: dict[str, int],
        memory: GlobalMemory, order: Order, notes: set[str],
    ) -> None:  # fmt: skip
        self.code, self.place, self.grid, self.parameters = code, place, grid, parameters
        self.memory, self.order, self.notes = memory, order, notes
        self.count = 0

    def run(self, warpgroups: str, draw: random.Random) -> Iterator[None]:
        """Yields before every atomic."""
        # Made here, so that programs which have not begun, or are done, hold no registers.
        self.shared = SharedMemory(self.code.shared, self.code.program.threads)
        strands = [
            Strand(self, first, self.code.width) for first in range(0, self.code.program.threads, self.code.width)
        ]
        running = {strand: strand.run() for strand in (reversed(strands) if warpgroups == "backward" else strands)}
        waiting: list[Strand] = []
        while running:
            free = [strand for strand in running if strand not in waiting]
            if not free:
                self._barrier(waiting, len(strands))
                waiting = []
                continue
            strand = draw.choice(free) if warpgroups == "random" else free[0]
            event = next(running[strand], None)
            if event is None:
                del running[strand]
                self.count += strand.count
            elif event is Event.BARRIER:
                waiting.append(strand)
            elif event is Event.ATOMIC:
                yield
        self.notes |= {f"within a warp, {place}" for place in self.shared.within_warp}

    def _barrier(self, waiting: list[Strand], strands: int) -> None:
        places = {strand.place for strand in waiting}
        if len(waiting) < strands or len(places) > 1:
            raise Fault(f"some warpgroups are not at the barrier that the others wait at; program {self.place}")
        self.shared.barrier(places.pop())
        self.order.barrier()


class Machine:
    """A kernel. ``shared``: bytes of shared memory that each of its programs has."""

    def __init__(self, program: Program, shared: int) -> None:
        self.program, self.shared = program, shared
        #: By the threads that go in step.
        self.codes: dict[int, Code] = {}

    def launch(
        self, grid: tuple[int, int, int], parameters: list[int], memory: GlobalMemory, schedule: Schedule,
        notes: set[str],
    ) -> int:  # fmt: skip
        """Runs every program; returns how many instructions of strands were executed.

        Raises:
            Fault: a program did what is undefined; the message names the instruction and the line of the kernel.
        """
        threads = self.program.threads
        width = threads if schedule.warpgroups == "together" else min(threads, WARPGROUP)
        if width not in self.codes:
            self.codes[width] = Code(self.program, self.shared, width)
        code = self.codes[width]
        values = {name: value for (name, _), value in zip(self.program.parameters, parameters, strict=True)}
        places = [(x, y, z) for z in range(grid[2]) for y in range(grid[1]) for x in range(grid[0])]
        released: dict[int, dict[int, int]] = {}
        ctas = [Cta(code, place, grid, values, memory, Order(released, i), notes) for i, place in enumerate(places)]
        _run(ctas, schedule)
        return sum(cta.count for cta in ctas)


def _run(ctas: list[Cta], schedule: Schedule) -> None:
    draw = random.Random(schedule.seed)
    order = list(ctas)
    if schedule.programs == "backward":
        order.reverse()
    elif schedule.programs in ("random", "mixed"):
        draw.shuffle(order)
    running: list[Any] = [cta.run(schedule.warpgroups, draw) for cta in order]
    while running:
        chosen = draw.choice(running) if schedule.programs == "mixed" else running[0]
        if next(chosen, "done") == "done":
            running.remove(chosen)
