"""Compiles kernels without a GPU, in worker processes, and disassembles them with the tool in the Triton package.

Run as a program this file is the worker (see :mod:`bench.workers`).
"""

from __future__ import annotations

import re
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from bench.operands import Waiting, early_writes
from bench.sass import Instruction, Loop, parse_programs
from bench.workers import answer, ask
from qlinear.format import FORMATS, Format
from qlinear.kernels.configs import Config
from qlinear.machines import MACHINES, arch_name

T = TypeVar("T")
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
#: Kernels that are disassembled in one run (see :func:`disassemble`).
_TOGETHER = 32


@dataclass(frozen=True)
class Job:
    """One kernel: ``config`` is without split-K, which is not compiled in."""

    scheme: str
    dtype: str
    capability: tuple[int, int]
    config: Config
    #: The kernel on sparse tensor cores.
    mma_sp: bool = False
    #: A build of it that does not ship, see :class:`bench.operands.Waiting`.
    waits: bool = False

    @property
    def format(self) -> Format:
        return FORMATS[self.scheme]

    def __str__(self) -> str:
        tile = str(self.config).rpartition("-k")[0] + "-mma.sp" * self.mma_sp + "-waits" * self.waits
        return f"{self.scheme}-{self.dtype}-{arch_name(self.capability)}-{tile}"


def read_all(
    jobs: Sequence[Job], dump: Path, read: Callable[[Job, Sequence[Instruction], dict[str, Any]], T]
) -> dict[Job, T]:
    """Compiles kernels in worker processes, the largest tiles first, and reads the machine code of what is compiled.

    Args:
        dump: where the cubins stay.
        read: called for every kernel with its instructions and what the worker says that it uses.

    Raises:
        RuntimeError: one does not compile.
    """
    dump.mkdir(parents=True, exist_ok=True)
    ordered = sorted(jobs, key=lambda job: job.config.block_m * job.config.block_n, reverse=True)
    waiting: dict[tuple[int, int], list[tuple[Job, dict[str, Any]]]] = {}
    batches: list[Future[list[tuple[Job, T]]]] = []

    def read_some(some: Sequence[tuple[Job, dict[str, Any]]]) -> list[tuple[Job, T]]:
        programs = disassemble([(dump / used["cubin"]).read_bytes() for _, used in some], some[0][0].capability)
        return [(job, read(job, program, used)) for (job, used), program in zip(some, programs, strict=True)]

    # One thread disassembles and reads while the workers compile.
    total, command = len(jobs), ["-m", "bench.cubins", str(dump)]
    with ThreadPoolExecutor(1) as pool, tqdm(total=total, desc="compiling", unit="kernel", disable=None) as progress:

        def answered(index: int, used: dict[str, Any]) -> None:
            progress.update()
            job = ordered[index]
            if "cubin" in used:
                waiting.setdefault(job.capability, []).append((job, used))
                if len(waiting[job.capability]) == _TOGETHER:
                    batches.append(pool.submit(read_some, waiting.pop(job.capability)))

        answers = ask(command, [asdict(job) for job in ordered], answered)
        for job, used in zip(ordered, answers, strict=True):
            if "cubin" not in used:
                raise RuntimeError(f"{job} does not compile: {used.get('error')}")
        batches += [pool.submit(read_some, some) for some in waiting.values()]
        found = dict(pair for batch in batches for pair in batch.result())
    return {job: found[job] for job in jobs}


@dataclass(frozen=True)
class Counted:
    """What the machine code of a kernel says that loads through registers, whichever it is."""

    scheme: str
    dtype: str
    arch: str
    slots_per_weight: float
    registers: int
    spills: int
    shared: int
    matrix_kinds: list[str]
    #: Loads of an iteration, and those whose numbers are used in the same one.
    loads: int
    loads_consumed: int
    #: Its file in the folder of the cubins; None where they are not kept.
    cubin: str | None


def counts(job: Job, loop: Loop, slots_per_weight: float, used: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of :class:`Counted`; ``used`` is what the worker said of the kernel."""
    return {
        "scheme": job.scheme,
        "dtype": job.dtype,
        "arch": arch_name(job.capability),
        "slots_per_weight": slots_per_weight,
        "registers": used["registers"],
        "spills": used["spilled"],
        "shared": used["shared"],
        "matrix_kinds": loop.matrix_kinds,
        "loads": loop.classes["load"],
        "loads_consumed": len(loop.loads_consumed()),
        "cubin": used["cubin"],
    }


def kinds_of(archs: Sequence[str], schemes: Sequence[str]) -> list[tuple[str, str, tuple[int, int]]]:
    """(scheme, dtype, capability) of all kernels to count: floats are multiplied as they are, in any dtype alike."""
    return [
        (scheme, dtype, capability)
        for capability in dict.fromkeys(m.capability for m in MACHINES.values() if m.arch in archs)
        for scheme in schemes
        for dtype in (list(DTYPES)[:1] if FORMATS[scheme].number == "float" else DTYPES)
    ]


def cubin_name(job: Job) -> str:
    return f"{job}.cubin"


def text_section(cubin: bytes) -> bytes:
    """The machine code of the only function in a cubin (64-bit ELF)."""
    (table,) = struct.unpack_from("<Q", cubin, 40)
    size, count, names = struct.unpack_from("<HHH", cubin, 58)
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(count)]
    start = sections[names][4]
    code = [
        cubin[offset : offset + length]
        for name, _, _, _, offset, length in sections
        if cubin[start + name :].startswith(b".text.")
    ]
    if len(code) != 1:
        raise ValueError(f"expected one function in the cubin, found {len(code)}")
    return code[0]


def disassemble(cubins: Sequence[bytes], capability: tuple[int, int]) -> list[list[Instruction]]:
    """The instructions of each cubin, addresses from 0.

    All in one run: nvdisasm takes half a second to start and a tenth for a kernel. It takes one raw stretch of code,
    and branches are relative to their own address.
    """
    import triton

    codes = [text_section(cubin) for cubin in cubins]
    number = capability[0] * 10 + capability[1]
    # Warpgroup and tcgen05 instructions exist in the architecture-specific sets only.
    arch = f"SM{number}a" if number >= 90 else f"SM{number}"
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(b"".join(codes))
        file.flush()
        command = [str(tool), "-ndf", "-b", arch, file.name]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return parse_programs(listing, [0, *accumulate(map(len, codes[:-1]))])


def conversions(ttgir: str) -> int:
    """Changes of layout and trips through shared memory in the first loop of a kernel, which is the one along K."""
    found = re.search(r"^( *)[^\n]*scf\.for .*?^\1\}", ttgir, re.MULTILINE | re.DOTALL)
    if found is None:
        raise ValueError("the kernel has no loop")
    return len(re.findall(r"ttg\.(?:convert_layout|local_load|local_store|local_alloc)", found[0]))


def _compile(fields: dict[str, Any], dump: Path) -> dict[str, Any]:
    from qlinear.kernels import compile as compiler

    config = (Waiting if fields["waits"] else Config)(**fields["config"])
    job = Job(**fields | {"capability": tuple(fields["capability"]), "config": config})
    compile_job = compiler.compile_fragments if job.mma_sp else compiler.matmul_compiler(job.format)
    compiled = compile_job(job.format, DTYPES[job.dtype], job.config, job.capability)
    (dump / cubin_name(job)).write_bytes(compiled.asm["cubin"])
    used = asdict(compiler.usage(compiled))
    result = {name: used[name] for name in ("registers", "spilled", "shared")}
    result["early_writes"] = len(early_writes(compiled.asm["ptx"]))
    if job.mma_sp:
        result["conversions"] = conversions(compiled.asm["ttgir"])
    return result | {"tensor_columns": compiled.metadata.tmem_size or 0, "cubin": cubin_name(job)}


if __name__ == "__main__":
    answer(partial(_compile, dump=Path(sys.argv[1])))
