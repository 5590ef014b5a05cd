"""What ``python -m bench audit`` says: kernels, predicted times and what is over its budget, as tables and as JSON."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench import bitmaps, contract, fragments, sparsity, sparsity24
from bench.audit import SCHEMES, Audited, Kernel, job_and_config, jobs_of, read_kernel, steps
from bench.budgets import KNOWN, excesses
from bench.cubins import DTYPES, Job, read_all
from bench.predict import Prediction, dequantizes, predict, traffic
from bench.problems import TOKENS, Problem, problems
from bench.sass import Instruction
from qlinear.kernels.crossover import dequantize_seconds
from qlinear.kernels.estimate import vendor_seconds
from qlinear.machines import MACHINES, Machine
from qlinear.tables import table


def run(
    archs: Sequence[str], models: Sequence[str], schemes: Sequence[str], dump: Path | None
) -> tuple[str, dict[str, Any]]:
    """Audits everything for the architectures: the text, and what goes into the JSON file.

    Args:
        dump: where the cubins go; None for nowhere.
    """
    tokens = sorted({*TOKENS, *contract.TOKENS})
    wanted, counted = problems(models, tokens), [name for name in schemes if name in SCHEMES]
    jobs: dict[Job, Problem] = {}
    for arch in archs:
        jobs |= jobs_of(wanted, counted, arch)
    mma_sp, unstructured = fragments.jobs_of(archs, schemes), bitmaps.jobs_of(archs, schemes)

    def read(job: Job, program: Sequence[Instruction], used: dict[str, Any]) -> Any:
        if dump is None:
            # The file goes with the scratch folder.
            used = used | {"cubin": None}
        if job in jobs:
            return read_kernel(job, jobs[job], program, used)
        return (fragments if job.mma_sp else bitmaps).read(job, program, used)

    with tempfile.TemporaryDirectory() as scratch:
        kernels = read_all([*jobs, *mma_sp, *unstructured], dump or Path(scratch), read)
    machines = [machine for machine in MACHINES.values() if machine.arch in archs]
    audited, on_sparse_cores = {job: kernels[job] for job in jobs}, [kernels[job] for job in mma_sp]
    parts, data = _tables(audited, wanted, counted, machines) if jobs else ([], {})
    halves = [sparsity24.rows(audited, on_sparse_cores, wanted, machine) for machine in machines]
    data["half_sparsity"] = [row for found in halves for row in found]
    sparse, data["sparse"] = fragments.report(on_sparse_cores, wanted)
    worth = [sparsity24.as_table(found, machine) for found, machine in zip(halves, machines, strict=True) if found]
    bits, data["unstructured"] = bitmaps.report([kernels[job] for job in unstructured])
    return "\n\n".join(part for part in [*parts[:-1], sparse, *worth, bits, *parts[-1:]] if part), data


def _tables(
    audited: dict[Job, Audited], wanted: Sequence[Problem], schemes: Sequence[str], machines: Sequence[Machine]
) -> tuple[list[str], dict[str, Any]]:
    """What does not need the kernels on sparse tensor cores; budgets come last."""
    rows = [row for machine in machines for row in predictions(audited, wanted, schemes, machine)]
    over = [line + " (known)" * (line in KNOWN) for line in excesses(audited)]
    parts = [
        part for part in (kernel_table(audited.values()), early_line([a.kernel for a in audited.values()])) if part
    ]
    slowest = [contract.worst(rows, machine) for machine in machines]
    for machine, found in zip(machines, slowest, strict=True):
        parts += [part for part in (machine_table(rows, machine), contract.as_table(found, machine)) if part]
    crossovers = [sparsity.rows(audited, wanted, machine) for machine in machines]
    parts += [sparsity.as_table(found, machine) for found, machine in zip(crossovers, machines, strict=True) if found]
    parts.append(
        "\n".join(["over budget (see bench/budgets.py):", *over]) if over else "all within budget (bench/budgets.py)"
    )
    kernels = [asdict(a.kernel) for a in audited.values()]
    crossover = [row for found in crossovers for row in found]
    data = {"kernels": kernels, "predictions": rows, "over_budget": over, "crossover_sparsity": crossover}
    return parts, data | {"contract": [row for found in slowest for row in found]}


def predictions(
    audited: dict[Job, Audited], wanted: Iterable[Problem], schemes: Sequence[str], machine: Machine
) -> list[dict[str, Any]]:
    """One row for each problem, scheme and dtype, by the path that the operator takes."""
    step_of, rows = steps(audited, machine), []
    for problem in wanted:
        for scheme in schemes:
            for dtype in DTYPES:
                job, config = job_and_config(problem, scheme, dtype, machine.capability, machine.sms)
                kernel, unroll = audited[job].kernel, audited[job].unroll
                found = predict(problem, job.format, config, step_of(job), unroll, kernel.blocks_per_sm, machine)
                row = _row(problem, job, dtype, found, machine)
                moved = traffic(problem, job.format, config, machine.capability)
                row |= {
                    "config": str(config),
                    "kernel": kernel.name,
                    "programs_per_sm": found.programs_per_sm,
                    "bytes_in_flight_per_sm": round(found.resident * kernel.ahead * kernel.tile_bytes),
                    "l2_bytes_per_weight_byte": moved.l2 / moved.weight,
                    "partial_bytes_per_weight_byte": moved.partials / moved.weight,
                }
                rows.append(row)
    return rows


def _row(problem: Problem, job: Job, dtype: str, kernel: Prediction, machine: Machine) -> dict[str, Any]:
    """The predicted time of the path that is taken, and of the kernel where that is another."""
    fmt, shape = job.format, (problem.m, problem.n, problem.k)
    seconds, bound = kernel.seconds, kernel.bound
    if dequantizes(problem, fmt, DTYPES[dtype], machine):
        seconds, bound = dequantize_seconds(*shape, fmt, machine), "dequantize"
    return {
        "machine": machine.name,
        "model": problem.model,
        "layer": problem.layer,
        "scheme": job.scheme,
        "dtype": dtype,
        "M": problem.m,
        "N": problem.n,
        "K": problem.k,
        "us": seconds * 1e6,
        "bound": bound,
        "kernel_us": kernel.seconds * 1e6,
        "kernel_bound": kernel.bound,
        "floor_us": kernel.floor_seconds * 1e6,
        "share_of_floor": kernel.floor_seconds / seconds,
        "times_16_bit": vendor_seconds(*shape, machine) / seconds,
    }


def kernel_table(audited: Iterable[Audited]) -> str:
    """One line for each kernel; instructions by class are of one iteration."""
    resources = ("regs", "spill", "smem", "blocks", "flight/SM")
    loop = ("matrix", "/wait", "async", "LDG", "now", "after", "instructions of the hot loop")
    header = ("kernel", "slots", "int", *resources, *loop)
    rows = []
    for a in audited:
        k = a.kernel
        counts = " ".join(f"{name} {count}" for name, count in k.instructions.items() if count)
        rows.append(
            (
                k.name,
                f"{k.slots_per_weight:.2f}",
                f"{k.integer_per_weight:.2f}",
                str(k.registers),
                str(k.spills),
                f"{k.shared / 1024:.0f}K",
                str(k.blocks_per_sm),
                f"{k.bytes_in_flight_per_sm / 1024:.0f}K",
                " ".join(k.matrix_kinds),
                "-" if k.matrix_per_wait is None else f"{k.matrix_per_wait:g}",
                "yes" if k.asynchronous else "NO",
                str(k.loads),
                str(k.loads_consumed),
                "-" if k.load_distance is None else str(k.load_distance),
                counts,
            )
        )
    legend = (
        "slots, int: instructions, and those of the integer pipe, per weight. flight/SM: bytes being copied, with all\n"
        "blocks that fit. /wait: matrix instructions per wait. async: cp.async or TMA brings all of the weight and x.\n"
        "LDG: loads through registers in an iteration; now: used in the same one; after: instructions until one waits."
    )
    return f"{table(header, rows, right=(1, 2, 3, 4, 5, 6, 7, 9, 11, 12, 13))}\n{legend}"


def early_line(kernels: Sequence[Kernel]) -> str:
    """How many kernels write to operands of a product that may still run; empty where none does."""
    ptx = sum(kernel.early_writes > 0 for kernel in kernels)
    code = sum(kernel.early_writes_of_code > 0 for kernel in kernels)
    if not ptx and not code:
        return ""
    return (
        f"of {len(kernels)} kernels {ptx} in PTX and {code} in machine code write to registers that a product may\n"
        "still read (bench/operands.py): whether that is harmless only the stage operands of `bench gpu` can tell"
    )


def machine_table(rows: Sequence[dict[str, Any]], machine: Machine) -> str:
    """Predicted times of the largest square layer there is; all others are in the JSON file."""
    mine = [row for row in rows if row["machine"] == machine.name]
    n = max((row["N"] for row in mine if row["N"] == row["K"]), default=0)
    shown = [row for row in mine if row["N"] == row["K"] == n]
    tokens = sorted({row["M"] for row in shown} & set(TOKENS))
    lines = []
    for scheme, dtype in dict.fromkeys((row["scheme"], row["dtype"]) for row in shown):
        by_tokens = {row["M"]: row for row in shown if (row["scheme"], row["dtype"]) == (scheme, dtype)}
        lines.append((scheme, dtype, *(_cell(by_tokens[m]) for m in tokens)))
    title = (
        f"{machine.name}, {n} x {n}: predicted us, share of the floor (the packed weight at "
        f"{machine.stream_bytes_per_s / 1e12:.2f} TB/s), speed against 16 bit;\n"
        "bound by M memory, L the L2 cache, I issue, T tensor cores, W decoding and products in turn; "
        "D dequantized for the vendor"
    )
    return f"{title}\n{table(('scheme', 'x', *(f'M = {m}' for m in tokens)), lines, right=range(2, 2 + len(tokens)))}"


def _cell(row: dict[str, Any]) -> str:
    time = f"{row['us']:.1f}" if row["us"] < 100 else f"{row['us']:.0f}"
    return f"{time} {row['share_of_floor']:4.0%} {row['times_16_bit']:.2f}x {row['bound'][0].upper()}"
