"""What it would cost to wait for products before the next block is decoded: ``python -m bench.waiting [SCHEME ...]``.

For every kernel of sm_90 that writes to the operands of a product too early, in PTX or in machine code (see
:mod:`bench.operands`), its machine code and the predicted time of the largest problem it is used for: as it ships, and
as it would be with ``Config.waits_for_operands``. Needs no GPU.

2026-11-28, Triton 3.7.1: of the 293 kernels that the audit counts on sm_90, 62 write early in PTX and 138 in machine
code, none where they wait. Waiting takes 1 to 5 % off their instructions and spills nothing. Where several programs
share a processor the predicted time stays (w4a16-g32 and w4a16-channel for 9 to 16 tokens take up to 16 % longer); in
tiles of 8 warps, one program to a processor, nothing decodes while a product runs: 19 to 60 % longer.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.audit import SCHEMES, Audited, Kernel, audit, job_and_config, jobs_of, steps
from bench.cubins import Job
from bench.predict import predict
from bench.problems import Problem, problems
from qlinear.machines import MACHINES
from qlinear.tables import table

_ARCH, _MACHINE = "sm_90", MACHINES["H200"]


def rows_of(jobs: Mapping[Job, Problem]) -> list[dict[str, Any]]:
    """One row for each kernel that writes early: both builds, and the seconds of both."""
    with tempfile.TemporaryDirectory() as dump:
        ships = audit(dict(jobs), Path(dump))
        those = {job: replace(job, waits=True) for job, found in ships.items() if early(found.kernel)}
        waits = audit({waiting: jobs[job] for job, waiting in those.items()}, Path(dump))
    rows = []
    for job, waiting in those.items():
        seconds = [_seconds(found, jobs[job]) for found in (ships[job], waits[waiting])]
        rows.append({"ships": ships[job].kernel, "waits": waits[waiting].kernel, "seconds": seconds})
    return rows


def early(kernel: Kernel) -> bool:
    return kernel.early_writes > 0 or kernel.early_writes_of_code > 0


def _seconds(found: Audited, problem: Problem) -> float:
    job = found.job
    _, config = job_and_config(problem, job.scheme, job.dtype, job.capability, _MACHINE.sms)
    # Machines of the same architecture choose tiles of their own.
    config = replace(job.config, split_k=config.split_k if replace(config, split_k=1) == job.config else 1)
    one = steps({job: found}, _MACHINE)(job)
    return predict(problem, job.format, config, one, found.unroll, found.kernel.blocks_per_sm, _MACHINE).seconds


def as_table(rows: Sequence[dict[str, Any]]) -> str:
    """Both builds side by side, and the sums."""
    lines = []
    for row in rows:
        a, b, (before, after) = row["ships"], row["waits"], row["seconds"]
        names = ("early_writes", "early_writes_of_code", "registers", "spills", "blocks_per_sm")
        pairs = [f"{getattr(a, name)} -> {getattr(b, name)}" for name in names]
        slots = f"{a.slots_per_weight:.2f} -> {b.slots_per_weight:.2f}"
        times = f"{before * 1e6:.1f} -> {after * 1e6:.1f}", f"{after / before - 1:+.0%}"
        lines.append((a.name, f"{a.M} x {a.N} x {a.K}", slots, *pairs, *times))
    header = ("kernel", "M x N x K", "slots", "early in PTX", "in code", "regs", "spill", "blocks", "us on an H200", "")
    return table(header, lines, right=range(2, 10))


def main(schemes: Sequence[str]) -> None:
    jobs = jobs_of(problems(), schemes or SCHEMES, _ARCH)
    rows = rows_of(jobs)
    still = sum(early(row["waits"]) for row in rows)
    print(as_table(rows))
    print(f"{len(rows)} of {len(jobs)} kernels write early, {still} of them where they wait")


if __name__ == "__main__":
    main(sys.argv[1:])
