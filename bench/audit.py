"""``python -m bench audit``: compiles what ships, reads the machine code, and predicts times. Needs no GPU.

Every configuration that :func:`qlinear.kernels.configs.choose_config` returns for a problem is compiled once, for x
and scales in the dtype, a bias, and K a multiple of 128 (SmolLM2's 576 is not: its mask costs a few instructions
more). Slots are all instructions of the innermost loop that holds the matrix instructions, times threads, over the
weights of one iteration.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from bench import sass
from bench.cubins import DTYPES, Job, read_all
from bench.operands import early_writes_of_code
from bench.predict import BLOCK_DENSITY, Resources, Step, blocks_per_sm, dequantizes, macs_per_clock, step
from bench.problems import Problem
from qlinear.format import BLOCK_K, FORMATS, Format
from qlinear.kernels.blocks import choose_block_config
from qlinear.kernels.configs import Config, choose_config
from qlinear.kernels.tile_table import multiplies_bytes, token_bytes
from qlinear.machines import MACHINES, Machine, arch_name

#: Those whose kernels are counted here; unstructured ones are in :mod:`bench.bitmaps`.
SCHEMES = tuple(name for name, fmt in FORMATS.items() if fmt.sparsity != "unstructured")
CAPABILITIES = {machine.arch: machine.capability for machine in MACHINES.values()}


def job_and_config(
    problem: Problem, scheme: str, dtype: str, capability: tuple[int, int], sms: int, density: float = BLOCK_DENSITY
) -> tuple[Job, Config]:
    """The kernel a product runs, and its configuration with split-K.

    Where the loop computes nothing in the dtype of x (8-bit products that are scaled at the end, 16-bit weights as they
    are) its instructions are the same for both: one kernel stands for all.
    """
    fmt, x_dtype = FORMATS[scheme], DTYPES[dtype]
    if fmt.number == "float" or (multiplies_bytes(fmt, capability) and fmt.group_size is None):
        dtype = next(iter(DTYPES))
    if fmt.block:
        blocks = fmt.stored(problem.n, problem.k, density)
        config = choose_block_config(problem.m, problem.n, blocks, fmt, x_dtype, capability, sms)
    else:
        config = choose_config(problem.m, problem.n, problem.k, fmt, x_dtype, capability, sms)
    return Job(scheme, dtype, capability, replace(config, split_k=1)), config


def jobs_of(
    problems: Iterable[Problem], schemes: Sequence[str], arch: str, dtypes: Sequence[str] = tuple(DTYPES)
) -> dict[Job, Problem]:
    """Every kernel that the problems need on the machines of an architecture, and the largest problem of each.

    Problems that are dequantized are there too: from 65 tokens on they share their kernel with those that are not.
    """
    found: dict[Job, Problem] = {}
    machines = [machine for machine in MACHINES.values() if machine.arch == arch]
    for problem in problems:
        for scheme in schemes:
            for dtype in dtypes:
                for machine in machines:
                    job, _ = job_and_config(problem, scheme, dtype, machine.capability, machine.sms)
                    best = found.get(job, problem)
                    # One that takes this kernel and not the vendor's comes first.
                    found[job] = max(best, problem, key=partial(_prominence, job))
    return found


def _prominence(job: Job, problem: Problem) -> tuple[bool, int, int]:
    machines = [machine for machine in MACHINES.values() if machine.capability == job.capability]
    fused = not all(dequantizes(problem, job.format, DTYPES[job.dtype], machine) for machine in machines)
    return fused, problem.n * problem.k, problem.m


@dataclass(frozen=True)
class Kernel:
    """What the machine code of a kernel says. Bytes are of one iteration of one program, where nothing else is said."""

    name: str
    scheme: str
    dtype: str
    #: The largest problem it is used for.
    M: int
    N: int
    K: int
    arch: str
    threads: int
    weights_per_iteration: int
    slots_per_weight: float
    integer_per_weight: float
    registers: int
    spills: int
    #: Instructions that write to what a product may still read, of the PTX and of the hot loop's machine code (see
    #: :mod:`bench.operands`).
    early_writes: int
    early_writes_of_code: int
    shared: int
    tensor_columns: int
    blocks_per_sm: int
    #: Distinct opcodes, and instructions of the hot loop by class (see :data:`bench.sass.CLASSES`).
    matrix_kinds: list[str]
    instructions: dict[str, int]
    #: Matrix instructions for one wait for their results; None where the hardware waits by itself.
    matrix_per_wait: float | None
    #: Copied by cp.async or TMA, and what the tile needs of the weight and of x.
    copied_bytes: int
    tile_bytes: int
    asynchronous: bool
    #: Plain global loads of the loop, those whose numbers are used in the same iteration, and the least number of
    #: instructions between a load and who waits for it.
    loads: int
    loads_consumed: int
    load_distance: int | None
    #: Copies are issued this many iterations ahead.
    ahead: int
    bytes_in_flight_per_sm: int
    #: Its file in the folder of the cubins; None where they are not kept.
    cubin: str | None


@dataclass(frozen=True)
class Audited:
    """A kernel with its code."""

    kernel: Kernel
    job: Job
    loop: sass.Loop
    unroll: int


def unroll_of(
    loop: sass.Loop, config: Config, fmt: Format, dtype: torch.dtype, capability: tuple[int, int] = (9, 0)
) -> int:
    """How many blocks along K (of 128, or the format's own) one iteration covers, told by two things that must agree.

    The products tell: an iteration has BLOCK_M * BLOCK_N * 128 multiply-adds per block. So do the copies: of each
    block an iteration brings the weight's tile and the tokens', and little else (scales, and copies that are
    repeated where a tile has fewer bytes than a block of threads moves at once: less than as much again).

    Raises:
        ValueError: they contradict each other, or neither can be read.
    """
    macs = loop.macs(config.num_warps)
    by_products = None if macs is None else macs / (config.block_m * config.block_n * (fmt.block or BLOCK_K))
    by_copies = loop.copied_bytes(32 * config.num_warps) // sum(tile_bytes(config, fmt, dtype, capability))
    # TMA's bytes are not in the code, and of loads that are not copies nothing is known.
    readable = by_copies > 0 and not loop.tma
    if by_products is None:
        if not readable:
            raise ValueError("neither the products nor the copies of the loop can be counted")
        return by_copies
    if by_products != round(by_products) or (readable and by_copies != by_products):
        raise ValueError(f"the products of an iteration are of {by_products} blocks along K, its copies of {by_copies}")
    return round(by_products)


def tile_bytes(
    config: Config, fmt: Format, dtype: torch.dtype, capability: tuple[int, int] = (9, 0)
) -> tuple[int, int]:
    """Bytes of the weight's codes and of x in one block along K."""
    x_size, columns = token_bytes(fmt, dtype, capability), fmt.block or BLOCK_K
    return config.block_n * columns * fmt.block_bytes // BLOCK_K, config.block_m * columns * x_size


def read_kernel(job: Job, problem: Problem, program: Sequence[sass.Instruction], used: dict[str, Any]) -> Audited:
    """Counts one kernel; ``used`` is what the worker said of it."""
    config, fmt, dtype = job.config, job.format, DTYPES[job.dtype]
    threads = 32 * config.num_warps
    loop = sass.hot_loop(program)
    unroll = unroll_of(loop, config, fmt, dtype, job.capability)
    weights = config.block_n * (fmt.block or BLOCK_K) * unroll
    tile = sum(tile_bytes(config, fmt, dtype, job.capability)) * unroll
    copied = loop.copied_bytes(threads)
    machine = next(machine for machine in MACHINES.values() if machine.capability == job.capability)
    use = Resources(threads, used["registers"], used["shared"], used["tensor_columns"])
    blocks = blocks_per_sm(use, machine)
    # What stands before the loop has the copies of so many iterations (and may have the first iteration itself); TMA's
    # cannot be counted.
    ahead = config.num_stages - 1
    if not loop.tma:
        ahead = min(ahead, loop.copied_bytes_before(threads) // max(1, copied))
    kernel = Kernel(
        name=str(job),
        scheme=job.scheme,
        dtype=job.dtype,
        M=problem.m,
        N=problem.n,
        K=problem.k,
        arch=arch_name(job.capability),
        threads=threads,
        weights_per_iteration=weights,
        slots_per_weight=len(loop.body) * threads / weights,
        integer_per_weight=loop.classes["integer"] * threads / weights,
        registers=used["registers"],
        spills=used["spilled"],
        early_writes=used["early_writes"],
        early_writes_of_code=early_writes_of_code(loop),
        shared=used["shared"],
        tensor_columns=used["tensor_columns"],
        blocks_per_sm=blocks,
        matrix_kinds=loop.matrix_kinds,
        instructions={name: loop.classes[name] for name in sass.CLASSES},
        matrix_per_wait=loop.classes["matrix"] / loop.waits if loop.waits else None,
        copied_bytes=copied,
        tile_bytes=tile,
        asynchronous=_asynchronous(loop, threads, tile, weights // (fmt.group_size or weights), fmt.symmetric),
        loads=loop.classes["load"],
        loads_consumed=len(loop.loads_consumed()),
        load_distance=loop.shortest_load(),
        ahead=ahead,
        bytes_in_flight_per_sm=ahead * tile * blocks,
        cubin=used["cubin"],
    )
    return Audited(kernel, job, loop, unroll)


def _asynchronous(loop: sass.Loop, threads: int, tile: int, groups: int, symmetric: bool) -> bool:
    """Whether copies bring all of the weight and of x; plain loads may bring scales.

    Scales are told by being few (the four threads of a matrix fragment's row each load its scale) and narrow: the
    weight and x are contiguous, and a thread loads 16 bytes of them at once.
    """
    scales = groups * (2 if symmetric else 4)
    narrow = all(i.width < 16 for i in loop.body if i.kind == "load")
    return (loop.tma or loop.copied_bytes(threads) >= tile) and narrow and loop.loaded_bytes(threads) <= 4 * scales


def steps(audited: Mapping[Job, Audited], machine: Machine) -> Callable[[Job], Step]:
    """The time of an iteration of each kernel on a machine, walked through once."""
    return cache(lambda job: step(audited[job].loop, job.config.num_warps, macs_per_clock(job.format, machine)))


def audit(jobs: dict[Job, Problem], dump: Path) -> dict[Job, Audited]:
    """Compiles and counts; the cubins stay in ``dump``.

    Raises:
        RuntimeError: one does not compile.
    """
    return read_all(list(jobs), dump, lambda job, program, used: read_kernel(job, jobs[job], program, used))
