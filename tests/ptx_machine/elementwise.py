"""A run of elementwise instructions as one Python function, and as another for when some threads are off."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import TracebackType
from typing import Any

from ptx_machine.memory import Array
from ptx_machine.parse import Instruction
from ptx_machine.translate import Translator

_NUMBER = itertools.count()
_Function = Callable[[list[Any], "Array | None"], None]


class Elementwise:
    """Instructions that follow each other and touch nothing but registers of their own thread."""

    def __init__(self, translator: Translator, instructions: list[Instruction]) -> None:
        self._translator, self.instructions = translator, instructions
        self._name = f"<ptx {next(_NUMBER)}>"
        #: Of each line of the function the instruction it is of; the first line is its head.
        self._sources: list[Instruction] = []
        self._made: dict[bool, _Function] = {}
        # At once, so that what is not known is refused before anything runs.
        self._function(False)

    def __len__(self) -> int:
        return len(self.instructions)

    def run(self, registers: list[Any], mask: Array | None) -> None:
        """Executes them in the threads of ``mask``; None: in all."""
        self._function(mask is not None)(registers, mask)

    def at(self, error: BaseException) -> Instruction:
        """The instruction that an error came from."""
        trace: TracebackType | None = error.__traceback__
        found = self.instructions[0]
        while trace is not None:
            if trace.tb_frame.f_code.co_filename == self._name:
                found = self._sources[trace.tb_lineno - 1]
            trace = trace.tb_next
        return found

    def _function(self, masked: bool) -> _Function:
        if masked not in self._made:
            lines, sources = ["def run(R, mask):"], [self.instructions[0]]
            for ins in self.instructions:
                for line in self._translator.lines(ins, masked):
                    lines.append("    " + line)
                    sources.append(ins)
            # Both functions have the same lines, one for one.
            self._sources = sources
            if len(lines) == 1:
                lines.append("    pass")
            names = self._translator.names
            exec(compile("\n".join(lines), self._name, "exec"), names)
            self._made[masked] = names["run"]
        return self._made[masked]
