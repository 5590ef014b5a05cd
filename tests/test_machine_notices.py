"""Does the PTX machine notice? One instruction of a compiled kernel at a time is removed, or one constant changed.

What synchronises must be reported when it is missing, unless it can be shown to order nothing: for a barrier by the
trace of all accesses to shared memory, where two warps must meet at the same byte, one of them writing (worked out here
from sets of bytes, and not by the machine's own flags). A changed constant must change a bit of the result, or be
reported. Run as a program this file is the worker, which is asked for questions by their index.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from asked import answers
from models import random_packed
from ptx_machine import machine as machine_module
from ptx_machine.shared import SharedMemory

from bench.workers import answer
from qlinear import reference
from qlinear.format import FORMATS
from qlinear.kernels.configs import Config

Problem = tuple[int, int, int]


@dataclass(frozen=True)
class Case:
    """A kernel, and what it is run on: more blocks along K than it has stages, in two parts."""

    arch: int
    scheme: str
    dtype: torch.dtype
    config: Config
    problem: Problem

    def __str__(self) -> str:
        return f"sm_{self.arch}-{self.scheme}-{self.config}"


CASES = (
    Case(80, "w4a16", torch.float16, Config(16, 64, 4, 4, 2), (13, 71, 1536)),
    Case(80, "w4a16-2:4", torch.bfloat16, Config(64, 64, 4, 4, 2), (33, 71, 1536)),
    # Operand A in registers, two products under way at a time.
    Case(90, "w4a16", torch.float16, Config(64, 128, 4, 4, 2), (33, 71, 2048)),
    # Two warpgroups; both operands in shared memory.
    Case(90, "w8a8", torch.float16, Config(128, 128, 8, 4, 2), (125, 121, 2048)),
    Case(90, "w4a16-g64-asym", torch.bfloat16, Config(128, 256, 8, 3, 2), (125, 249, 2048)),
)
BARRIER = "bar.sync"
#: What waits for, or orders, what is asynchronous.
ASYNCHRONOUS = (
    "cp.async.wait_group", "fence.proxy.async", "wgmma.fence", "wgmma.commit_group", "wgmma.wait_group",
)  # fmt: skip
#: Of those that are asynchronous: what may go unnoticed, and why.
REDUNDANT: dict[tuple[int, str], str] = {}
#: Constants that are changed, one at a time, of each kernel; and how many of them may change nothing at all: bits that
#: are masked anyway, defaults of loads that are on, what only another shape needs.
CONSTANTS, EQUIVALENT = 25, 0.2

QUESTIONS = [(case, kind) for case in range(len(CASES)) for kind in (BARRIER, "asynchronous", "constants")]


@pytest.fixture(scope="module")
def found(request: pytest.FixtureRequest) -> dict[int, dict[str, Any]]:
    return answers(request, __file__, lambda index: QUESTIONS[index][0])


def of_kind(kind: str) -> Any:
    questions = [(i, CASES[case]) for i, (case, of) in enumerate(QUESTIONS) if of == kind]
    return pytest.mark.parametrize("index", [pytest.param(i, id=str(case)) for i, case in questions])


@of_kind(BARRIER)
def test_a_barrier_is_missed_exactly_where_it_orders_something(index: int, found: dict[int, dict[str, Any]]) -> None:
    result = found[index]
    assert "error" not in result, result["error"]
    assert result["needed"] and result["reported"] == result["needed"]


@of_kind("asynchronous")
def test_what_waits_is_missed(index: int, found: dict[int, dict[str, Any]]) -> None:
    result, (case, _) = found[index], QUESTIONS[index]
    assert "error" not in result, result["error"]
    kinds = {kind for kind, _, _ in result["outcomes"]}
    assert kinds >= ({"cp.async.wait_group"} if CASES[case].arch == 80 else set(ASYNCHRONOUS))
    unnoticed = [kind for kind, _, said in result["outcomes"] if said == SAME]
    allowed = [kind for (of, kind), _why in REDUNDANT.items() if of == case]
    assert sorted(unnoticed) == sorted(allowed)


@of_kind("constants")
def test_a_changed_constant_is_noticed(index: int, found: dict[int, dict[str, Any]]) -> None:
    result = found[index]
    assert "error" not in result, result["error"]
    unnoticed = [f"{line}: {change}" for change, line, said in result["outcomes"] if said == SAME]
    assert len(result["outcomes"]) == CONSTANTS and len(unnoticed) <= EQUIVALENT * CONSTANTS, unnoticed


# --- the worker ------------------------------------------------------------------------------------------------------

SAME = "the same bits"


def investigate(index: int) -> dict[str, Any]:
    case, kind = QUESTIONS[index]
    kernel = Kernel(CASES[case])
    if kind == BARRIER:
        return kernel.barriers()
    if kind == "constants":
        return {"outcomes": list(kernel.constants(random.Random(index)))}
    return {"outcomes": list(kernel.without_what_waits())}


class Kernel:
    """A compiled matmul kernel, its input, and what comes of it as it is."""

    def __init__(self, case: Case) -> None:
        self.case = case
        m, n, k = case.problem
        self.packed = random_packed(FORMATS[case.scheme], n, k, case.dtype).to_layout("triton")
        self.x = torch.randn(m, k, generator=torch.Generator().manual_seed(1)).to(case.dtype)
        self.bias = torch.linspace(-3, 3, n).to(case.dtype)
        self.text = ""
        self.trace: list[Traced] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(machine_module, "SharedMemory", lambda *a: self.trace.append(Traced(*a)) or self.trace[-1])
            self.y, self.notes = self.run()
        difference = self.y.double() - reference.matmul(self.x, self.packed, self.bias)
        assert float(difference.norm() / self.y.double().norm()) <= FORMATS[case.scheme].max_error(case.dtype)

    def run(self, edit: Callable[[str], str] | None = None) -> tuple[torch.Tensor, set[str]]:
        from ptx_machine.driver import on_the_machine

        from qlinear.kernels.matmul import matmul

        with on_the_machine(self.case.arch, edit=edit) as driver:
            y = matmul(self.x, self.packed, self.bias, self.case.config)
        if edit is None:
            self.text = next(text for text in driver.texts if ".entry _matmul_kernel" in text)
            self.code = next(reversed(driver.machines.values())).codes[32 * self.case.config.num_warps]
        return y, {note for launch in driver.launches for note in launch.notes}

    def changed(self, start: int, end: int, by: str) -> str:
        """What comes of the kernel with a piece of its text changed: a fault, or how it differs."""
        edited = self.text[:start] + by + self.text[end:]
        try:
            y, notes = self.run(lambda text: edited if text == self.text else text)
        except Exception as error:
            return re.sub(r"-?\d+(x[0-9a-f]+)?", "#", str(error).split(";")[0])
        # Where both are not numbers, they are the same.
        if not torch.equal(y.view(torch.int16), self.y.view(torch.int16)):
            return "other bits"
        return SAME if notes == self.notes else f"a note more or less: {notes ^ self.notes}"

    def places(self, opcode: str) -> list[tuple[int, int]]:
        """Where the instruction stands in the text."""
        pattern = rf"^[ \t]*(?:@!?%p\d+\s+)?{re.escape(opcode)}[^;]*;"
        return [found.span() for found in re.finditer(pattern, self.text, re.MULTILINE)]

    def without_what_waits(self) -> Iterator[tuple[str, int, str]]:
        """(opcode, line of the PTX, what came of removing it)."""
        for opcode in ASYNCHRONOUS:
            for start, end in self.places(opcode):
                yield opcode, self.text[:start].count("\n") + 1, self.changed(start, end, "")

    def constants(self, draw: random.Random) -> Iterator[tuple[str, int, str]]:
        """(change, line of the PTX, what came of it) of random constants in what was executed."""
        body = self.text.index(".reqntid")
        pattern = re.compile(
            r"^\t(?:@!?%p\d+ )?(?!bar|\.|ld\.param|//)[a-z][^\n;]*?[ ,+](-?\d+|0x[0-9A-Fa-f]+|0f[0-9A-F]{8})\]?;", re.M
        )
        executed = {ins.text for number in self.code.visited for ins in self._instructions(number)}
        places = [
            found for found in pattern.finditer(self.text, body) if " ".join(found[0].strip(" \t;").split()) in executed
        ]
        for found in draw.sample(places, CONSTANTS):
            old = found[1]
            new = f"0f{int(old[2:], 16) ^ 0x00800000:08X}" if old.startswith("0f") else str(int(old, 0) ^ 1)
            line = self.text[: found.start()].count("\n") + 1
            yield f"{found[0].strip()} -> {new}", line, self.changed(found.start(1), found.end(1), new)

    def _instructions(self, number: int) -> list[Any]:
        block = self.code.blocks[number]
        found = [ins for step in block.steps for ins in (step if isinstance(step, tuple) else step.instructions)]
        return [ins for ins in (*found, block.last) if hasattr(ins, "text")]

    def barriers(self) -> dict[str, Any]:
        """Lines of the barriers that order something, by the trace, and of those that the machine reports missing."""
        spans = self.places(BARRIER)
        blocks = [
            number for number, block in enumerate(self.code.blocks) if block.last and block.last.opcode == BARRIER
        ]
        assert len(spans) == len(blocks)
        needed, reported, said = [], [], Counter()
        for number, (start, end) in zip(blocks, spans, strict=True):
            if number not in self.code.visited:
                continue
            line = self.text[:start].count("\n") + 1
            if any(traced.conflict_without(number + 1) for traced in self.trace) or self._shares(number + 1):
                needed.append(line)
            outcome = self.changed(start, end, "")
            if outcome != SAME:
                reported.append(line)
            said[outcome] += 1
        return {"needed": needed, "reported": reported, "said": said}

    def _shares(self, place: int) -> bool:
        """Whether an atomic comes between it and the next: what the program wrote must be written by then."""
        for block in self.code.blocks[place:]:
            if block.atomic or (block.last and block.last.opcode == BARRIER):
                return block.atomic
        return False


class Traced(SharedMemory):
    """Keeps who touched which bytes between barriers."""

    def __init__(self, size: int, threads: int) -> None:
        super().__init__(size, threads)
        #: (block after the barrier, None at first) and, since then: (warp, None for tensor cores; writes; bytes).
        self.phases: list[tuple[int | None, list[tuple[int | None, bool, set[int]]]]] = [(None, [])]

    def barrier(self, place: int) -> None:
        super().barrier(place)
        self.phases.append((place, []))

    def conflict_without(self, place: int) -> bool:
        """Whether two warps meet at a byte, one writing, if the barriers before block ``place`` are not there."""
        merged: list[list[tuple[int | None, bool, set[int]]]] = []
        for before, touched in self.phases:
            if before == place and merged:
                merged[-1] = merged[-1] + touched
            else:
                merged.append(touched)
        return any(_conflict(touched) for touched in merged)

    def _note(self, index: Any, threads: Any, writes: bool) -> None:
        warps = threads // 32
        for warp in sorted({int(warp) for warp in warps}):
            self.phases[-1][1].append((warp, writes, set(index[warps == warp].reshape(-1).tolist())))

    def load(self, addresses: Any, width: int, threads: Any, place: str) -> Any:
        self._note(self.index(addresses, width, "load"), threads, False)
        return super().load(addresses, width, threads, place)

    def store(self, addresses: Any, values: Any, threads: Any) -> None:
        self._note(self.index(addresses, values.shape[1], "store"), threads, True)
        super().store(addresses, values, threads)

    def begin_copy(self, index: Any, threads: Any) -> None:
        self._note(index, threads, True)
        super().begin_copy(index, threads)

    def end_copy(self, index: Any, data: Any, threads: Any) -> None:
        self._note(index, threads, True)
        super().end_copy(index, data, threads)

    def begin_product(self, index: Any) -> None:
        self.phases[-1][1].append((None, False, set(index.tolist())))
        super().begin_product(index)

    def end_product(self, index: Any, warps: Any) -> None:
        for warp in warps.tolist():
            self.phases[-1][1].append((warp, False, set(index.tolist())))
        super().end_product(index, warps)


def _conflict(touched: list[tuple[int | None, bool, set[int]]]) -> bool:
    """Whether a byte is written by one warp and touched by another."""
    writers: dict[int, set[int | None]] = {}
    users: dict[int, set[int | None]] = {}
    for warp, writes, indices in touched:
        for index in indices:
            users.setdefault(index, set()).add(warp)
            if writes:
                writers.setdefault(index, set()).add(warp)
    return any(users[index] != warps or len(warps) > 1 for index, warps in writers.items())


if __name__ == "__main__":
    torch.set_num_threads(1)
    answer(investigate)
