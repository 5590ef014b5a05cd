"""Compiles the kernels of a stage in several processes at once: Triton keeps them on disk, and the stage finds them."""

from __future__ import annotations

import multiprocessing
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from bench.gpu_job import Job
from qlinear import ops
from qlinear.format import FORMATS, Format
from qlinear.packing import PackedWeight, pack


@dataclass(frozen=True)
class Case:
    """One product whose kernels are wanted."""

    scheme: str
    dtype: str
    m: int
    n: int
    k: int
    bias: bool = False
    #: A ``qlinear.kernels.configs.Config``; None is the one that is chosen, and the operator's other kernels too.
    config: Any = None
    #: Of a sparse weight.
    layout: str = "triton"


def random_weight(fmt: Format, n: int, k: int, dtype: torch.dtype, device: torch.device) -> PackedWeight:
    """The same weight every time; of a sparse format magnitudes choose what is kept."""
    generator = torch.Generator(device).manual_seed(0)
    weight = torch.randn(n, k, generator=generator, device=device).to(dtype)
    return pack(weight, fmt.name, layout="triton", prune="magnitude")


def run_case(case: Case, device: torch.device) -> str | None:
    """Launches the kernels of a case once; what went wrong, if anything did."""
    from qlinear.kernels.gauge import blank
    from qlinear.kernels.matmul import matmul

    try:
        dtype = getattr(torch, case.dtype)
        x = torch.zeros(case.m, case.k, dtype=dtype, device=device)
        bias = torch.zeros(case.n, dtype=dtype, device=device) if case.bias else None
        fmt = FORMATS[case.scheme]
        if fmt.sparsity:
            p = random_weight(fmt, case.n, case.k, dtype, device).to_layout(case.layout)
            ops._linear_cuda(x, p, bias, None)
        else:
            p = blank(fmt, case.n, case.k, dtype, device)
            matmul(x, p, bias, case.config)
            if case.config is None and device.type == "cuda":
                ops.linear(x, p, bias)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except Exception as error:
        return f"{case}: {type(error).__name__}: {error}".splitlines()[0][:300]
    return None


def _run(arguments: tuple[Case, str]) -> str | None:
    return run_case(arguments[0], torch.device(arguments[1]))


def warm(cases: Iterable[Case], job: Job, seconds: float) -> list[str]:
    """Compiles for at most so many seconds; returns what went wrong, which the stage itself will meet again."""
    if not job.processes or not job.on_gpu:
        return []
    wanted = distinct(list(cases), job.device)
    if not wanted:
        return []
    # A process of its own for each: what one of them breaks on the GPU, the others and the stage do not feel.
    context = multiprocessing.get_context("spawn")
    with context.Pool(min(job.processes, len(wanted))) as pool:
        made = pool.map_async(_run, [(case, str(job.device)) for case in wanted], chunksize=1)
        try:
            return [problem for problem in made.get(timeout=max(1.0, seconds)) if problem]
        except multiprocessing.TimeoutError:
            return [f"compiling {len(wanted)} kernels took longer than {seconds:.0f} s"]


def distinct(cases: Sequence[Case], device: torch.device) -> list[Case]:
    """One case for each kernel: M and N count by the configuration they lead to, or by the bucket of M."""
    from qlinear.kernels.runtime import target_of
    from qlinear.kernels.tile_table import M_BUCKETS
    from qlinear.kernels.tuned import config_on, fused_tokens_on

    target = target_of(device)
    kept: dict[object, Case] = {}
    for case in cases:
        fmt, dtype = FORMATS[case.scheme], getattr(torch, case.dtype)
        aligned = (case.n % 16, case.k % 16, case.k % 128 == 0)
        if fmt.sparsity:
            bucket = bisect_left(M_BUCKETS, case.m)
            kept.setdefault((case.scheme, case.dtype, case.layout, bucket, case.bias, aligned), case)
            continue
        config = case.config or config_on(device, target, case.m, case.n, case.k, fmt, dtype)
        most = fused_tokens_on(device, case.n, case.k, fmt, dtype)
        many = case.config is None and most is not None and case.m > most
        kept.setdefault((case.scheme, case.dtype, replace(config, split_k=1), case.bias, aligned, many), case)
    return list(kept.values())
