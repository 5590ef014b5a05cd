"""The kernel on sparse tensor cores in the audit: what its code costs, and what it moves through the L2 cache.

It loads through registers, a step ahead, and no copy or product tells how it is unrolled but the sparse ones, which
skip half of what they multiply: so it is counted apart from the other kernels (see :mod:`bench.audit`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bench import sass
from bench.cubins import Counted, Job, counts, kinds_of
from bench.predict import traffic
from bench.problems import Problem
from qlinear.format import FORMATS, Format
from qlinear.kernels.configs import Config
from qlinear.tables import table

#: Issue slots per dense weight, and bytes through the L2 cache per byte of the weight, for at most 16 tokens (issue 4).
SLOTS, L2 = 2.2, 1.5
#: Tiles of 16 rows that share one fragment of x in the registers of a warp.
SHARING_TILES = 8
SCHEMES = tuple(name for name, fmt in FORMATS.items() if fmt.sparsity == "2:4")
#: Columns of K that a sparse product multiplies; each warp has SHARING_TILES of them for every 8 tokens.
_MMA_K = 32


@dataclass(frozen=True)
class Fragments(Counted):
    """What the machine code of one kernel says; bytes are of one program."""

    config: str
    #: Instructions until a load is waited for.
    load_distance: int | None
    #: Changes of layout in the loop's TTGIR, which would move numbers between threads.
    conversions: int
    bytes_in_flight: int

    def __str__(self) -> str:
        return f"{self.scheme}-{self.dtype}-{self.arch}-{self.config} (mma.sp)"


def jobs_of(archs: Sequence[str], schemes: Sequence[str]) -> list[Job]:
    """Every kernel of the schemes that ships, for the architectures that have such cores."""
    from qlinear.kernels.mma_sp import shipped_fragment_configs

    return [
        Job(scheme, dtype, capability, config, mma_sp=True)
        for scheme, dtype, capability in kinds_of(archs, [name for name in schemes if name in SCHEMES])
        if capability[0] < 10
        for config in shipped_fragment_configs()
    ]


def read(job: Job, program: Sequence[sass.Instruction], used: Mapping[str, Any]) -> Fragments:
    """Counts one kernel; ``used`` is what the worker said of it."""
    fmt, config, loop = job.format, job.config, hot_loop(program)
    slots, unroll = slots_per_weight(loop, fmt, config)
    # Of a step: a tile's words and metadata, 128 rows to a warp.
    step = config.num_warps * 128 * _MMA_K * fmt.planes // 128 * fmt.block_bytes
    return Fragments(
        config=str(config).rpartition("-k")[0],
        load_distance=loop.shortest_load(),
        conversions=used["conversions"],
        bytes_in_flight=step * unroll,
        **counts(job, loop, slots, used),
    )


def hot_loop(program: Sequence[sass.Instruction]) -> sass.Loop:
    """The loop along K: the shortest with sparse products.

    Raises:
        ValueError: there is none.
    """
    found = [loop for loop in sass.loops(program) if any("MMA.SP" in i.opcode for i in loop.body)]
    if not found:
        raise ValueError("no loop of this program holds sparse products")
    return min(found, key=lambda loop: len(loop.body))


def slots_per_weight(loop: sass.Loop, fmt: Format, config: Config) -> tuple[float, int]:
    """Instructions per dense weight, and the steps along K of one iteration."""
    products = sum("MMA.SP" in i.opcode for i in loop.body)
    per_step = SHARING_TILES * config.block_m // 8 * fmt.planes
    unroll = products // per_step
    if unroll * per_step != products:
        raise ValueError(f"an iteration has {products} sparse products, a step {per_step}")
    return len(loop.body) * 32 / (128 * _MMA_K * fmt.planes * unroll), unroll


def l2_per_weight_byte(problem: Problem, fmt: Format, config: Config) -> float:
    """Bytes through the L2 cache per byte of the weight: that, x for every tile of rows, partial sums both ways, y."""
    moved = traffic(problem, fmt, config)
    return moved.l2 / moved.weight


def report(kernels: Sequence[Fragments], problems: Iterable[Problem]) -> tuple[str, dict[str, Any]]:
    """Kernels, and the L2 traffic of every problem of at most 16 tokens: as text and as data."""
    from qlinear.kernels.mma_sp import choose_fragment_config

    if not kernels:
        return "", {"kernels": [], "traffic": []}
    rows = [
        (str(k), f"{k.slots_per_weight:.2f}", str(k.registers), str(k.spills), f"{k.bytes_in_flight // 1024}K",
         str(k.loads), str(k.loads_consumed), str(k.load_distance))
        for k in kernels
    ]  # fmt: skip
    traffic = []
    for problem in problems:
        if problem.m <= 16:
            for scheme in dict.fromkeys(k.scheme for k in kernels):
                config = choose_fragment_config(problem.m, problem.n, problem.k, FORMATS[scheme], 132)
                l2 = l2_per_weight_byte(problem, FORMATS[scheme], config)
                shape = {"scheme": scheme, "M": problem.m, "N": problem.n, "K": problem.k}
                traffic.append(shape | {"config": str(config), "l2_bytes_per_weight_byte": l2})
    header = ("sparse tensor cores (unverified)", "slots", "regs", "spill", "flight", "LDG", "now", "after")
    text = table(header, rows, right=range(1, 8))
    over = [
        f"{k}: {k.slots_per_weight:.2f} slots per weight, not {SLOTS}" for k in kernels if k.slots_per_weight > SLOTS
    ]
    return "\n".join([text, *over]), {"kernels": [asdict(k) for k in kernels], "traffic": traffic}
