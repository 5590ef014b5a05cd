"""From which sparsity on a block-sparse weight is predicted to be faster than a dense one, by layer and machine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from bench.audit import Audited, job_and_config, steps
from bench.cubins import Job
from bench.predict import predict
from bench.problems import Problem
from qlinear.format import FORMATS
from qlinear.machines import Machine
from qlinear.tables import table

#: What a block format is compared with: each is looked for where both were audited.
DENSE = ("w4a16", "w8a16")
BLOCKS = tuple(name for name, fmt in FORMATS.items() if fmt.block)
DTYPE = "fp16"
#: Tokens, and sparsities in the order they are tried.
TOKENS = (1, 16, 64)
_SPARSITIES = [percent / 100 for percent in range(0, 100, 5)]


def timing(audited: Mapping[Job, Audited], machine: Machine) -> Callable[[Problem, str, float], float]:
    """What predicts the seconds of ``(problem, scheme, density)``, the share of blocks stored, for x in fp16."""
    step_of = steps(audited, machine)

    def seconds(problem: Problem, scheme: str, density: float) -> float:
        job, config = job_and_config(problem, scheme, DTYPE, machine.capability, machine.sms, density)
        unroll, blocks = audited[job].unroll, audited[job].kernel.blocks_per_sm
        return predict(problem, job.format, config, step_of(job), unroll, blocks, machine, density).seconds

    return seconds


def rows(audited: Mapping[Job, Audited], wanted: Iterable[Problem], machine: Machine) -> list[dict[str, Any]]:
    """One row for each shape, number of tokens, block format and dense format: the least sparsity that is as fast."""
    schemes = {job.scheme for job in audited if job.capability == machine.capability}
    problems = {(p.m, p.n, p.k): p for p in wanted if p.m in TOKENS}
    found, seconds = [], timing(audited, machine)
    for (m, n, k), problem in problems.items():
        dense = {name: seconds(problem, name, 1.0) for name in DENSE if name in schemes}
        for scheme in BLOCKS if dense else ():
            if scheme not in schemes:
                continue
            times = [(s, seconds(problem, scheme, 1 - s)) for s in _SPARSITIES]
            for name, time in dense.items():
                least = next((s for s, mine in times if mine <= time), None)
                shape = {"machine": machine.name, "M": m, "N": n, "K": k}
                found.append(shape | {"scheme": scheme, "dense": name, "sparsity": least})
    return found


def as_table(found: Sequence[Mapping[str, Any]], machine: Machine) -> str:
    """The rows of one machine, a line for each shape."""
    pairs = list(dict.fromkeys((row["scheme"], row["dense"]) for row in found))
    lines = []
    for shape in dict.fromkeys((row["M"], row["N"], row["K"]) for row in found):
        mine = {(r["scheme"], r["dense"]): r["sparsity"] for r in found if (r["M"], r["N"], r["K"]) == shape}
        cells = ("never" if mine[pair] is None else f"{mine[pair]:.0%}" for pair in pairs)
        lines.append((str(shape[0]), f"{shape[1]} x {shape[2]}", *cells))
    title = (
        f"{machine.name}: share of blocks that must be zero for a block-sparse kernel to be as fast as a dense one; "
        "predicted, blocks spread evenly"
    )
    header = ("M", "N x K", *(f"{scheme} / {dense}" for scheme, dense in pairs))
    return f"{title}\n{table(header, lines, right=range(len(header)))}"
