"""Does the PTX machine notice? One instruction of a compiled kernel at a time is removed, or one constant changed.

What synchronises must be reported when it is missing, unless it can be shown to order nothing: for a barrier by the
trace of all accesses to shared memory, where two warps must meet at the same byte, one of them writing (worked out here
from sets of bytes, and not by the machine's own flags). A changed constant must change a bit of the result, or be
reported. Run as a program this file is the worker, which is asked for questions by their index.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
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
    #: Whether `--every-kernel` is needed for it.
    rare: bool = False

    def __str__(self) -> str:
        return f"sm_{self.arch}-{self.scheme}-{self.config}"


#: Problems fill all but the last row of their tile, so that few constants are for what is not there.
CASES = (
    Case(80, "w4a16", torch.float16, Config(16, 64, 4, 4, 2), (15, 63, 1536)),
    Case(80, "w4a16-2:4", torch.bfloat16, Config(64, 64, 4, 4, 2), (63, 63, 1536), rare=True),
    # Operand A in registers, two products under way at a time.
    Case(90, "w4a16", torch.float16, Config(64, 128, 4, 4, 2), (63, 127, 1536)),
    # Two warpgroups; both operands in shared memory.
    Case(90, "w8a8", torch.float16, Config(128, 128, 8, 4, 2), (127, 127, 1536)),
    Case(90, "w4a16-g64-asym", torch.bfloat16, Config(128, 256, 8, 3, 2), (127, 255, 1536), rare=True),
)
BARRIER = "bar.sync"
#: What waits for, or orders, what is asynchronous.
ASYNCHRONOUS = (
    "cp.async.wait_group", "fence.proxy.async", "wgmma.fence", "wgmma.commit_group", "wgmma.wait_group",
)  # fmt: skip
#: How many of them may go unnoticed, by case. In the loop of the third two products are under way: a group that is not
#: committed waits with the next one, and of two waits the other orders the buffers; both are there for the registers of
#: A, which the compiler overwrites early all the same (bench/operands.py counts where).
REDUNDANT = {(2, "wgmma.commit_group"): 1, (2, "wgmma.wait_group"): 2}
#: Constants that are changed, one at a time, of each kernel; and how many of them may change nothing at all: bits that
#: are masked anyway, defaults of loads that are on, what only another shape needs.
CONSTANTS, EQUIVALENT = 25, 0.25

QUESTIONS = [(case, kind) for case in range(len(CASES)) for kind in (BARRIER, "asynchronous", "constants")]


@pytest.fixture(scope="module")
def found(request: pytest.FixtureRequest) -> dict[int, dict[str, Any]]:
    return answers(request, __file__, lambda index: QUESTIONS[index][0])


def of_kind(kind: str) -> Any:
    found = []
    for i, (case, of) in enumerate(QUESTIONS):
        if of == kind:
            marks = (pytest.mark.every_kernel,) if CASES[case].rare else ()
            found.append(pytest.param(i, id=str(CASES[case]), marks=marks))
    return pytest.mark.parametrize("index", found)


@of_kind(BARRIER)
def test_a_barrier_is_missed_exactly_where_it_orders_something(index: int, found: dict[int, dict[str, Any]]) -> None:
    result = found[index]
    assert "error" not in result, result["error"]
    assert result["needed"] and result["reported"] == result["needed"]


@of_kind("asynchronous")
def test_what_waits_is_missed(index: int, found: dict[int, dict[str, Any]]) -> None:
    result, (case, _) = found[index], QUESTIONS[index]
    assert "error" not in result, result["error"]
    kinds = [kind for kind, _, _ in result["outcomes"]]
    assert set(kinds) >= ({"cp.async.wait_group"} if CASES[case].arch == 80 else set(ASYNCHRONOUS))
    unnoticed = [kind for kind, _, said in result["outcomes"] if said == SAME]
    assert {kind: unnoticed.count(kind) for kind in unnoticed} == {
        kind: count for (of, kind), count in REDUNDANT.items() if of == case
    }


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
        # Of this kernel, and not of the one that rounds tokens before it.
        self.trace = [traced for traced in self.trace if traced.size == self.code.shared]
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
        needed, reported = [], []
        for number, (start, end) in zip(blocks, spans, strict=True):
            if number not in self.code.visited:
                continue
            line = self.text[:start].count("\n") + 1
            if any(traced.conflict_without(number + 1) for traced in self.trace) or self._shares(number + 1):
                needed.append(line)
            if self.changed(start, end, "") != SAME:
                reported.append(line)
        return {"needed": needed, "reported": reported}

    def _shares(self, place: int) -> bool:
        """Whether an atomic comes between it and the next: what the program wrote must be written by then."""
        for block in self.code.blocks[place:]:
            if block.atomic or (block.last and block.last.opcode == BARRIER):
                return block.atomic
        return False


#: Stands for tensor cores beside the bits of warps.
_TENSOR_CORES = 31


class Traced(SharedMemory):
    """Keeps who touched what between barriers: for each byte a bit for each warp that read it, and that wrote."""

    def __init__(self, size: int, threads: int) -> None:
        super().__init__(size, threads)
        #: (block after the barrier, None at first), readers and writers since then.
        self.phases: list[tuple[int | None, Any, Any]] = []
        self._begin(None)

    def _begin(self, place: int | None) -> None:
        self.phases.append((place, np.zeros(self.size, np.uint32), np.zeros(self.size, np.uint32)))

    def barrier(self, place: int) -> None:
        super().barrier(place)
        self._begin(place)

    def conflict_without(self, place: int) -> bool:
        """Whether a byte is written by one and touched by another if the barriers before block ``place`` are not there.

        Between barriers that stay there is no conflict, else the machine would have said so.
        """
        readers, writers = self.phases[0][1:]
        for before, more_readers, more_writers in self.phases[1:]:
            if before == place:
                readers, writers = readers | more_readers, writers | more_writers
                one_writer = writers & (writers - np.uint32(1)) == 0
                if ((writers != 0) & ~(one_writer & (readers & ~writers == 0))).any():
                    return True
            else:
                readers, writers = more_readers, more_writers
        return False

    def _note(self, index: Any, threads: Any, writes: bool) -> None:
        for warp in np.unique(threads // 32):
            self.phases[-1][1 + writes][index[threads // 32 == warp]] |= np.uint32(1 << warp)

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
        self.phases[-1][1][index] |= np.uint32(1 << _TENSOR_CORES)
        super().begin_product(index)

    def end_product(self, index: Any, warps: Any) -> None:
        for warp in warps.tolist():
            self.phases[-1][1][index] |= np.uint32(1 << warp)
        super().end_product(index, warps)


if __name__ == "__main__":
    torch.set_num_threads(1)
    answer(investigate)
