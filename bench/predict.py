"""From counts to time: how many programs a multiprocessor holds, what a problem moves, how long it takes at least.

A prediction is a bound, the largest of what the memory, the L2 cache, the issue slots and the tensor cores need, then
the start of programs that follow others, and the sum of the parts of K; it knows no launch and no first wave. Tensor
cores are charged what large products reach, and 0.87 of that where the weight is decoded on the way: see
:mod:`qlinear.kernels.estimate`. Where the operator leaves the kernel for the vendor's matmul is decided by
:mod:`qlinear.kernels.crossover`.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import torch

from bench.problems import Problem
from bench.sass import Loop
from qlinear.format import BLOCK_K, TILE_N, Format
from qlinear.kernels.configs import Config
from qlinear.kernels.crossover import fused_tokens
from qlinear.kernels.estimate import LATENCY, adding_seconds, macs_per_s
from qlinear.kernels.tile_table import token_bytes
from qlinear.machines import Machine

#: Shared memory the driver takes of every block, and the columns of tensor memory of a multiprocessor (CUDA
#: Programming Guide, compute capabilities).
_RESERVED_SHARED = 1024
_TENSOR_COLUMNS = 512
#: The share of blocks that block-sparse problems store.
BLOCK_DENSITY = 0.5
#: Iterations of a loop after which its timing repeats.
_SETTLED = 6


@dataclass(frozen=True)
class Resources:
    """What one program takes of a multiprocessor."""

    threads: int
    registers: int
    shared: int
    tensor_columns: int = 0


def blocks_per_sm(use: Resources, machine: Machine) -> int:
    """Programs that fit on a multiprocessor at the same time."""
    # A warp's registers come in units of 256, shared memory in units of 128 bytes.
    warp_registers = -(-use.registers * 32 // 256) * 256
    warps = machine.registers // warp_registers // 4 * 4
    shared = -(-(use.shared + _RESERVED_SHARED) // 128) * 128
    limits = [
        machine.max_blocks,
        machine.max_threads // use.threads,
        warps * 32 // use.threads,
        machine.shared_bytes // shared,
    ]
    if use.tensor_columns:
        limits.append(_TENSOR_COLUMNS // use.tensor_columns)
    return min(limits)


@dataclass(frozen=True)
class Traffic:
    """Bytes one product moves."""

    #: Codes, scales and zero points as the kernels read them, padding included: the floor of any kernel.
    weight: float
    #: From and to the memory: the weight, x and y once.
    memory: float
    #: Through the L2 cache: the weight for every tile of tokens, x for every tile of rows, partial sums both ways, y.
    l2: float
    #: Partial sums of split-K, one way.
    partials: float


def weight_bytes(fmt: Format, n: int, k: int, density: float = BLOCK_DENSITY) -> int:
    """Bytes of the ``triton`` layout (see :mod:`qlinear.layout`), scales of 16 bits."""
    if fmt.block:
        return fmt.weight_bytes(n, k, density=density)
    rows, columns = -(-n // TILE_N) * TILE_N, -(-k // BLOCK_K) * BLOCK_K
    return rows * columns // BLOCK_K * fmt.block_bytes + rows * fmt.groups(columns) * (2 if fmt.symmetric else 4)


def traffic(
    problem: Problem,
    fmt: Format,
    config: Config,
    capability: tuple[int, int] = (9, 0),
    density: float = BLOCK_DENSITY,
) -> Traffic:
    """What the matmul kernel moves; loads of tokens that do not exist are masked, and cost nothing."""
    _, _, m, n, k = problem
    weight = weight_bytes(fmt, n, k, density)
    x = m * k * token_bytes(fmt, torch.float16, capability)
    y = m * n * 2
    partials = 4 * m * n * config.split_k if config.split_k > 1 else 0
    tiles_m, tiles_n = -(-m // config.block_m), -(-n // config.block_n)
    reads = tiles_n * (density if fmt.block else 1)
    return Traffic(weight, weight + x + y, weight * tiles_m + x * reads + 2 * partials + y, partials)


@dataclass(frozen=True)
class Step:
    """One iteration of a hot loop, in clocks of a multiprocessor that runs nothing else."""

    #: Until all its instructions are issued, and all its products done.
    issue: float
    tensor: float
    #: From one iteration of a block to the next, when it is alone: what it waits for included.
    alone: float


def step(loop: Loop, warps: int, macs_per_clock: float) -> Step:
    """Walks the loop of one block, whose warps are kept in step by the barrier in every iteration.

    Four schedulers each issue one warp's instruction a clock. Products run beside them in the order they are issued,
    until an instruction waits for a group of them: what is decoded and what is multiplied overlap as far as the code
    lets them. Where nothing waits, the hardware's scoreboard lets them overlap freely.
    """
    issue_clocks = warps / 4
    costs = [(loop.macs_of(i, warps) or 0) / macs_per_clock if i.kind == "matrix" else 0.0 for i in loop.body]
    now = tensor = began = 0.0
    groups: list[float] = []
    for _ in range(_SETTLED):
        began = now
        for instruction, cost in zip(loop.body, costs, strict=True):
            now += issue_clocks
            if cost:
                tensor = max(tensor, now) + cost
            if instruction.commits:
                groups.append(tensor)
            pending = instruction.waits
            if pending is not None and len(groups) > pending:
                now = max(now, groups[-1 - pending])
    return Step(len(loop.body) * issue_clocks, sum(costs), now - began)


@dataclass(frozen=True)
class Prediction:
    """At least this long, and why."""

    seconds: float
    #: ``memory``, ``l2``, ``issue``, ``tensor``, or ``wait``: decoding and products one after the other.
    bound: str
    #: Programs on the busiest multiprocessor, and how many of them at a time.
    programs_per_sm: int
    resident: float
    #: The packed weight, read once at the speed of the memory.
    floor_seconds: float

    @property
    def share_of_floor(self) -> float:
        return self.floor_seconds / self.seconds


def predict(
    problem: Problem,
    fmt: Format,
    config: Config,
    one: Step,
    unroll: int,
    blocks: int,
    machine: Machine,
    density: float = BLOCK_DENSITY,
) -> Prediction:
    """The time of the matmul kernel (for W8A8 after that of quantizing x).

    Args:
        one: of the kernel's hot loop on ``machine``, which covers ``unroll`` blocks of 128 along K, or of the format's.
        blocks: what :func:`blocks_per_sm` says.
        density: the share of blocks that a block-sparse weight stores, the same in every row of blocks.
    """
    moved = traffic(problem, fmt, config, machine.capability, density)
    programs = -(-problem.m // config.block_m) * -(-problem.n // config.block_n) * config.split_k
    per_sm = -(-programs // machine.sms)
    resident = min(blocks, per_sm)
    blocks_of_k = ceil(problem.k / fmt.block * density) if fmt.block else -(-problem.k // BLOCK_K)
    steps = -(-blocks_of_k // (config.split_k * unroll))
    # What one program waits for, others that share its multiprocessor fill.
    clocks = {"issue": one.issue, "tensor": one.tensor, "wait": one.alone / resident}
    times = {name: per_sm * steps * each / machine.clock_hz for name, each in clocks.items()}
    times["memory"] = moved.memory / machine.stream_bytes_per_s
    times["l2"] = moved.l2 / machine.l2_bytes_per_s
    # The sum of issue and products is a wait only if it is more than either.
    bound = max(times, key=lambda name: (times[name], name != "wait"))
    tile = config.block_m, config.block_n
    seconds = times[bound] + adding_seconds(problem.m, problem.n, *tile, config.split_k, machine)
    seconds += (ceil(per_sm / max(1, resident)) - 1) * LATENCY
    if fmt.quantized_activations:
        seconds += 3 * problem.m * problem.k / machine.stream_bytes_per_s
    floor = moved.weight / machine.stream_bytes_per_s
    return Prediction(seconds, bound, per_sm, min(blocks, programs / machine.sms), floor)


def dequantizes(problem: Problem, fmt: Format, dtype: torch.dtype, machine: Machine) -> bool:
    """Whether the operator dequantizes the weight for the vendor's matmul."""
    fused = fused_tokens(problem.n, problem.k, fmt, dtype, machine.capability, machine.sms, machine.l2_bytes)
    return fused is not None and problem.m > fused


def macs_per_clock(fmt: Format, machine: Machine) -> float:
    """Multiply-adds of one multiprocessor's tensor cores."""
    return macs_per_s(fmt, machine) / machine.clock_hz
