"""Compiles kernels without a GPU, in worker processes, and disassembles them with the tool in the Triton package.

Run as a program this file is the worker (see :mod:`bench.workers`).
"""

from __future__ import annotations

import struct
import subprocess
import sys
import tempfile
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from bench.sass import Instruction, parse
from bench.workers import answer, ask
from qlinear.format import FORMATS, Format
from qlinear.kernels.configs import Config
from qlinear.machines import arch_name

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Job:
    """One kernel: ``config`` is without split-K, which is not compiled in."""

    scheme: str
    dtype: str
    capability: tuple[int, int]
    config: Config

    @property
    def format(self) -> Format:
        return FORMATS[self.scheme]

    def __str__(self) -> str:
        tile = str(self.config).rpartition("-k")[0]
        return f"{self.scheme}-{self.dtype}-{arch_name(self.capability)}-{tile}"


def compile_all(
    jobs: Sequence[Job], dump: Path, compiled: Callable[[Job], object] = lambda _: None
) -> dict[Job, dict[str, Any]]:
    """Compiles in worker processes, each taking the largest tile that is left; says what each kernel uses.

    Args:
        compiled: called, from any thread, for every kernel that lies in ``dump``.

    Raises:
        RuntimeError: one does not compile.
    """
    ordered = sorted(jobs, key=lambda job: job.config.block_m * job.config.block_n, reverse=True)
    command = ["-m", "bench.cubins", str(dump)]
    with tqdm(total=len(jobs), desc="compiling", unit="kernel", disable=None) as progress:

        def answered(index: int, result: dict[str, Any]) -> None:
            progress.update()
            if "cubin" in result:
                compiled(ordered[index])

        answers = ask(command, [asdict(job) for job in ordered], answered)
    results = dict(zip(ordered, answers, strict=True))
    for job in jobs:
        if "cubin" not in results[job]:
            raise RuntimeError(f"{job} does not compile: {results[job].get('error')}")
    return results


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
    everything = parse(listing)
    addresses, result, begin = [i.address for i in everything], [], 0
    for code in codes:
        end = begin + len(code)
        mine = everything[bisect_left(addresses, begin) : bisect_left(addresses, end)]
        result.append([_moved(i, begin) for i in mine])
        begin = end
    return result


def _moved(i: Instruction, by: int) -> Instruction:
    operands = i.operands
    if i.target is not None:
        operands = operands[: operands.rindex("0x")] + hex(i.target - by)
    return Instruction(i.address - by, i.predicate, i.opcode, operands)


def _compile(fields: dict[str, Any], dump: Path) -> dict[str, Any]:
    from qlinear.kernels.compile import compile_blocks, compile_matmul, usage

    job = Job(fields["scheme"], fields["dtype"], tuple(fields["capability"]), Config(**fields["config"]))
    compile_job = compile_blocks if job.format.block else compile_matmul
    compiled = compile_job(job.format, DTYPES[job.dtype], job.config, job.capability)
    (dump / cubin_name(job)).write_bytes(compiled.asm["cubin"])
    used = asdict(usage(compiled))
    result = {name: used[name] for name in ("registers", "spilled", "shared")}
    return result | {"tensor_columns": compiled.metadata.tmem_size or 0, "cubin": cubin_name(job)}


if __name__ == "__main__":
    answer(partial(_compile, dump=Path(sys.argv[1])))
