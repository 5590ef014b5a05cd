"""How many times as fast as dense int4 and int8 a 2:4 weight is predicted to be, by layer and machine.

Its sparsity is one half, so that there is no sparsity to look for, as there is of blocks: only what it is worth.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bench.audit import Audited
from bench.cubins import Job
from bench.fragments import SCHEMES, Fragments
from bench.predict import macs_per_clock, traffic
from bench.problems import Problem
from bench.sparsity import DENSE, DTYPE, timing
from qlinear.format import FORMATS
from qlinear.kernels.estimate import adding_seconds
from qlinear.kernels.mma_sp import choose_fragment_config
from qlinear.machines import Machine
from qlinear.tables import table

TOKENS = (1, 16)
#: Of smaller weights a processor has one program or none, whose waiting is predicted of the loop, not of mma.sp.
_LEAST_WEIGHTS = 4096 * 4096
#: What multiplies: the loop of dense weights, or sparse tensor cores, which no GPU has run yet.
EXPANDED, FRAGMENTS = "expanded", "mma.sp"


def fragment_seconds(kernel: Fragments, problem: Problem, machine: Machine) -> float:
    """The kernel on sparse tensor cores: the most that memory, L2 cache, issue slots and products need."""
    fmt, (_, _, m, n, k) = FORMATS[kernel.scheme], problem
    config = choose_fragment_config(m, n, k, fmt, machine.sms)
    programs = -(-n // config.block_n) * -(-m // config.block_m) * config.split_k
    weights = -(-programs // machine.sms) * config.block_n * -(-k // config.split_k)
    # Of one multiprocessor; what is multiplied by a stored zero takes no time.
    issue = weights * kernel.slots_per_weight / (machine.slots_per_s / machine.sms)
    tensor = weights * config.block_m / (2 * macs_per_clock(fmt, machine)) / machine.clock_hz
    moved = traffic(problem, fmt, config, machine.capability)
    least = max(issue, tensor, moved.memory / machine.stream_bytes_per_s, moved.l2 / machine.l2_bytes_per_s)
    return least + adding_seconds(m, n, config.block_m, config.block_n, config.split_k, machine)


def rows(
    audited: Mapping[Job, Audited], fragments: Iterable[Fragments], wanted: Iterable[Problem], machine: Machine
) -> list[dict[str, Any]]:
    """One row for each shape, number of tokens, 2:4 format, kernel and dense format."""
    schemes = {job.scheme for job in audited if job.capability == machine.capability}
    sparse = {(f.scheme, f.config): f for f in fragments if f.arch == machine.arch and f.dtype == DTYPE}
    problems = {(p.m, p.n, p.k): p for p in wanted if p.m in TOKENS and p.n * p.k >= _LEAST_WEIGHTS}
    found, seconds = [], timing(audited, machine)
    for (m, n, k), problem in problems.items():
        dense = {name: seconds(problem, name, 1.0) for name in DENSE if name in schemes}
        for scheme in SCHEMES:
            times = {EXPANDED: seconds(problem, scheme, 1.0)} if scheme in schemes else {}
            tile = str(choose_fragment_config(m, n, k, FORMATS[scheme], machine.sms)).rpartition("-k")[0]
            if (scheme, tile) in sparse:
                times[FRAGMENTS] = fragment_seconds(sparse[scheme, tile], problem, machine)
            shape = {"machine": machine.name, "M": m, "N": n, "K": k, "scheme": scheme}
            for kernel, time in times.items():
                found += [shape | {"kernel": kernel, "dense": name, "times": dense[name] / time} for name in dense]
    return found


def as_table(found: Sequence[Mapping[str, Any]], machine: Machine) -> str:
    """The rows of one machine, a line for each shape; both dense formats in a cell."""
    kinds = list(dict.fromkeys((row["scheme"], row["kernel"]) for row in found))
    names = list(dict.fromkeys(row["dense"] for row in found))
    lines = []
    for shape in dict.fromkeys((row["M"], row["N"], row["K"]) for row in found):
        mine = [row for row in found if (row["M"], row["N"], row["K"]) == shape]
        cells = (" ".join(f"{r['times']:.2f}x" for r in mine if (r["scheme"], r["kernel"]) == kind) for kind in kinds)
        lines.append((str(shape[0]), f"{shape[1]} x {shape[2]}", *cells))
    title = f"{machine.name}: 2:4 against dense {' and '.join(names)}, times as fast; predicted, mma.sp unverified"
    header = ("M", "N x K", *(scheme if kernel == EXPANDED else f"({kernel})" for scheme, kernel in kinds))
    return f"{title}\n{table(header, lines, right=range(len(header)))}"
