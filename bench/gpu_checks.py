"""Is it right on this device: numerics against float64, the same bits every time, inline PTX against its twin."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from bench.gpu_job import Job, Result, dtype_name
from bench.gpu_warm import Case, random_weight, warm
from qlinear import ops, reference
from qlinear.format import DENSE, Format
from qlinear.kernels.graphs import capture
from qlinear.packing import PackedWeight


@contextmanager
def poisoned() -> Iterator[None]:
    """``torch.empty`` returns NaN, or a large integer: what a kernel does not write is seen."""
    empty: Any = torch.empty

    def filled(*args: Any, **kwargs: Any) -> Tensor:
        tensor: Tensor = empty(*args, **kwargs)
        return tensor.fill_(float("nan") if tensor.is_floating_point() else 93)

    torch.empty = filled
    try:
        yield
    finally:
        torch.empty = empty


def random_tokens(m: int, k: int, dtype: torch.dtype, device: torch.device, seed: int = 1) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(m, k, generator=generator, device=device).to(dtype)


def numerics(job: Job) -> Result:
    """Every format, dtype and bucket of M against float64 on the same packed weight, outputs poisoned beforehand."""
    sizes = job.sizes
    plan = [(sizes.odd, dtype, scheme) for dtype in sizes.dtypes for scheme in sizes.schemes]
    plan += [(sizes.even, sizes.dtypes[0], scheme) for scheme in sizes.bench_schemes]
    cases = [
        Case(scheme, dtype_name(dtype), m, *shape, bias=_has_bias(dtype))
        for shape, dtype, scheme in plan
        for m in (sizes.float32_tokens if dtype == torch.float32 else sizes.tokens)
    ]
    result: Result = {"warm": warm(cases, job, job.left * 0.6), "rows": [], "left_out": []}
    for shape, dtype, scheme in plan:
        if job.left < 2:
            result["left_out"].append(f"{scheme} {dtype_name(dtype)} {shape[0]}x{shape[1]}")
        else:
            tokens = sizes.float32_tokens if dtype == torch.float32 else sizes.tokens
            result["rows"] += _numerics_of(DENSE[scheme], dtype, shape, tokens, job)
            result["failed"] = [_say(row) for row in result["rows"] if not row["ok"]]
            job.save(result)
    shares = [row["error"] / row["bound"] for row in result["rows"] if row["error"] is not None]
    result["worst_of_bound"] = max(shares, default=None)
    return result


def _has_bias(dtype: torch.dtype) -> bool:
    """bfloat16 without, so that the stage of determinism finds the same kernels compiled."""
    return dtype != torch.bfloat16


def _say(row: Result) -> str:
    return f"{row['scheme']} {row['dtype']} {row['m']}x{row['n']}x{row['k']} {row['by']}: {row['problem']}"


def _numerics_of(fmt: Format, dtype: torch.dtype, shape: tuple[int, int], tokens: Any, job: Job) -> list[Result]:
    from qlinear.kernels.matmul import matmul

    n, k = shape
    packed = random_weight(fmt, n, k, dtype, job.device)
    bias = torch.linspace(-3, 3, n, device=job.device).to(dtype) if _has_bias(dtype) else None
    dense = packed.dequantize(torch.float64)
    rows = []
    for m in tokens:
        x = random_tokens(m, k, dtype, job.device)
        wanted = reference.activations(x, packed) @ dense.t() + (0.0 if bias is None else bias.double())
        ways: dict[str, Any] = {"kernel": lambda x=x: matmul(x, packed, bias)}
        if job.on_gpu:
            ways["operator"] = lambda x=x: ops.linear(x, packed, bias)
        for by, way in ways.items():
            row = {"scheme": fmt.name, "dtype": dtype_name(dtype), "m": m, "n": n, "k": k, "by": by}
            rows.append(row | error_of(way, wanted, fmt.max_error(dtype)))
    return rows


def error_of(way: Any, wanted: Tensor, bound: float) -> Result:
    """The relative error of one way; whatever is raised is a result too."""
    try:
        with poisoned():
            y = way()
        unwritten = int((~torch.isfinite(y)).sum())
        error = float((y.double() - wanted).norm() / wanted.norm())
    except Exception as raised:
        text = f"{type(raised).__name__}: {raised}".splitlines()[0][:300]
        return {"ok": False, "error": None, "bound": bound, "problem": text}
    ok = unwritten == 0 and error <= bound
    problem = "" if ok else f"{unwritten} numbers not finite, relative error {error:.2e} above {bound:g}"
    return {"ok": ok, "error": error if error == error else None, "bound": bound, "problem": problem}


def bucket_ends(many: Any = ()) -> list[tuple[int, int]]:
    """The fewest and the most tokens of every bucket that one configuration serves."""
    from qlinear.kernels.tile_table import M_BUCKETS

    ends = [(low + 1, high) for low, high in pairwise((0, *M_BUCKETS))]
    return [*ends, (min(many), max(many))] if many else ends


def rows_that_change(packed: PackedWeight, few: int, many: int, dtype: torch.dtype) -> list[int]:
    """Rows of a batch whose bits depend on the rest of it: on how many there are, or on what they hold."""
    from qlinear.kernels.matmul import matmul

    k, device = packed.in_features, packed.device
    x = random_tokens(many, k, dtype, device)
    y = matmul(x, packed)
    alone = matmul(x[:few].clone(), packed)
    other = random_tokens(many, k, dtype, device, seed=2) * 7
    other[many - few :] = x[many - few :]
    beside = matmul(other, packed)
    same = [torch.equal(y[i], alone[i]) for i in range(few)]
    same_beside = [torch.equal(y[i], beside[i]) for i in range(many - few, many)]
    changed = {i for i, equal in enumerate(same) if not equal}
    return sorted(changed | {many - few + i for i, equal in enumerate(same_beside) if not equal})


def differing_runs(packed: PackedWeight, x: Tensor, repeats: int) -> int:
    """How many of so many runs have other bits than the first."""
    from qlinear.kernels.matmul import matmul

    first = matmul(x, packed)
    return sum(not torch.equal(matmul(x, packed), first) for _ in range(repeats))


def differing_replays(packed: PackedWeight, x: Tensor, repeats: int) -> int:
    """How many replays of a CUDA graph have other bits than the product outside of it."""
    from qlinear.kernels.matmul import matmul

    wanted = matmul(x, packed)
    results: list[Tensor] = []
    graph = capture([lambda: results.append(matmul(x, packed))], x.device)
    captured, different = results[-1], 0
    for _ in range(repeats):
        captured.fill_(float("nan"))
        graph.replay()
        different += not torch.equal(captured, wanted)
    return different


def determinism(job: Job) -> Result:
    """The same bits run to run, under replays of a graph, and whatever else is in the batch (within a bucket of M)."""
    sizes = job.sizes
    n, k = sizes.odd
    dtype = sizes.dtypes[0]
    buckets = bucket_ends(sizes.many_tokens)
    cases = [Case(s, dtype_name(dtype), few, n, k) for s in sizes.schemes for few, _ in buckets]
    result: Result = {"warm": warm(cases, job, job.left * 0.5), "rows": [], "failed": [], "left_out": []}
    for scheme in sizes.schemes:
        packed = random_weight(DENSE[scheme], n, k, dtype, job.device)
        for few, many in buckets:
            if job.left < 2:
                result["left_out"].append(f"{scheme} M = {few} to {many}")
                continue
            x = random_tokens(many, k, dtype, job.device)
            row: Result = {"scheme": scheme, "few": few, "many": many}
            row["runs"] = differing_runs(packed, x, sizes.repeats)
            row["replays"] = differing_replays(packed, x, sizes.repeats) if job.on_gpu else 0
            row["rows"] = rows_that_change(packed, few, many, dtype)
            result["rows"].append(row)
            if row["runs"] or row["replays"] or row["rows"]:
                result["failed"].append(
                    f"{scheme} M = {few} to {many}: {row['runs']} runs and {row['replays']} replays of {sizes.repeats} "
                    f"differ; rows that depend on others: {row['rows'][:8]}"
                )
        job.save(result)
    return result
