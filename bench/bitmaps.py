"""The kernel of unstructured weights in the audit: what its code costs for each weight, kept or not.

It loads single values through registers, so that no copy tells what an iteration brings: it is counted apart from the
other kernels (see :mod:`bench.audit`). Weights of an iteration are told by its products, or are those of one step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bench import sass
from bench.cubins import DTYPES, Counted, Job, counts, kinds_of
from qlinear.format import FORMATS
from qlinear.tables import table

SCHEMES = tuple(name for name, fmt in FORMATS.items() if fmt.sparsity == "unstructured")


@dataclass(frozen=True)
class Bitmap(Counted):
    """What the machine code of one kernel says."""

    name: str


def jobs_of(archs: Sequence[str], schemes: Sequence[str]) -> list[Job]:
    """Every kernel of the schemes that ships."""
    from qlinear.kernels.bitmap import shipped_bitmap_configs
    from qlinear.kernels.runtime import Target

    return [
        Job(scheme, dtype, capability, config)
        for scheme, dtype, capability in kinds_of(archs, [name for name in schemes if name in SCHEMES])
        for config in shipped_bitmap_configs(DTYPES[dtype], Target(capability, 1))
    ]


def read(job: Job, program: Sequence[sass.Instruction], used: Mapping[str, Any]) -> Bitmap:
    """Counts one kernel; ``used`` is what the worker said of it."""
    loop = sass.hot_loop(program)
    slots = len(loop.body) * 32 * job.config.num_warps / weights_per_iteration(loop, job)
    return Bitmap(name=str(job), **counts(job, loop, slots, used))


def weights_per_iteration(loop: sass.Loop, job: Job) -> int:
    """Dense weights that an iteration of a block covers.

    Raises:
        ValueError: its products are not those of whole steps.
    """
    from qlinear.kernels.bitmap import step_columns

    config = job.config
    step, macs = config.block_n * step_columns(DTYPES[job.dtype]), loop.macs(config.num_warps)
    if macs is None:
        return step
    if macs % (step * config.block_m):
        raise ValueError(f"the products of an iteration are {macs}, those of a step {step * config.block_m}")
    return macs // config.block_m


def report(kernels: Sequence[Bitmap]) -> tuple[str, list[dict[str, Any]]]:
    """As text and as data."""
    rows = [
        (k.name, f"{k.slots_per_weight:.2f}", str(k.registers), str(k.spills), str(k.loads), str(k.loads_consumed))
        for k in kernels
    ]
    header = ("unstructured (per weight, kept or not)", "slots", "regs", "spill", "LDG", "now")
    return table(header, rows, right=range(1, 6)) if rows else "", [asdict(k) for k in kernels]
