"""Compiles the kernels of a stage in several processes at once: Triton keeps them on disk, and the stage finds them."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bench.gpu_job import Job
from qlinear import ops
from qlinear.format import DENSE, TILE_N, Format
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


def blank(fmt: Format, n: int, k: int, dtype: torch.dtype, device: torch.device) -> PackedWeight:
    """A weight of one tile of rows, repeated: what the kernels are compiled for, made quickly."""
    generator = torch.Generator(device).manual_seed(0)
    one = pack(torch.randn(TILE_N, k, device=device, generator=generator).to(dtype), fmt.name, layout="triton")

    def repeated(t: Tensor) -> Tensor:
        return t.repeat(-(-n // TILE_N), *[1] * (t.dim() - 1))

    return replace(one, weight=repeated(one.weight), scale=repeated(one.scale), out_features=n)


def run_case(case: Case, device: torch.device) -> str | None:
    """Launches the kernels of a case once; what went wrong, if anything did."""
    from qlinear.kernels.matmul import matmul

    try:
        dtype = getattr(torch, case.dtype)
        p = blank(DENSE[case.scheme], case.n, case.k, dtype, device)
        x = torch.zeros(case.m, case.k, dtype=dtype, device=device)
        bias = torch.zeros(case.n, dtype=dtype, device=device) if case.bias else None
        matmul(x, p, bias, case.config)
        if case.config is None and device.type == "cuda":
            ops.linear(x, p.weight, p.scale, p.zero_point, bias, case.scheme, case.k, case.n)
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
    """One case for each kernel: M and N count by the configuration they lead to."""
    from qlinear.kernels.configs import choose_config
    from qlinear.kernels.runtime import target_of

    target = target_of(device)
    kept: dict[object, Case] = {}
    for case in cases:
        fmt, dtype = DENSE[case.scheme], getattr(torch, case.dtype)
        config = case.config or choose_config(case.m, case.n, case.k, fmt, dtype, target.capability, target.num_sms)
        many = case.config is None and case.m >= ops.GPU_DEQUANTIZE_TOKENS
        aligned = (case.n % 16, case.k % 16, case.k % 128 == 0)
        kept.setdefault((case.scheme, case.dtype, replace(config, split_k=1), case.bias, aligned, many), case)
    return list(kept.values())
