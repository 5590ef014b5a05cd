"""Sparse weights on this device: is every path right, and how fast, beside dense int4 and int8 and what PyTorch has.

Of 2:4 weights this decides whether the kernel on sparse tensor cores may become the default: so far no GPU has run it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench import peers
from bench.gpu_checks import error_of, random_tokens
from bench.gpu_job import Job, Result, dtype_name
from bench.gpu_warm import Case, random_weight, warm
from bench.sides import Side, Unavailable, float_side, packed_side
from bench.timing import in_turns
from qlinear import ops, semi_structured
from qlinear.format import FORMATS
from qlinear.kernels.graphs import replayed
from qlinear.packing import PackedWeight, pack

SCHEMES = tuple(name for name, fmt in FORMATS.items() if fmt.sparsity)
#: Tokens of both tiles of the kernel on sparse tensor cores, and more than one tile of them.
TOKENS = (1, 8, 16, 33)
#: The dtype of the times.
_TIMED = torch.float16


def layouts(scheme: str, job: Job) -> tuple[str, ...]:
    """Those that kernels read; ``mma.sp`` is for 2:4 weights on NVIDIA's GPUs."""
    fragments = FORMATS[scheme].sparsity == "2:4" and job.on_gpu and torch.version.hip is None
    return ("triton", "mma.sp") if fragments else ("triton",)


def sparse(job: Job) -> Result:
    """Both layouts against float64, in the first dtype, then times on a layer of ``sizes.launch``, then others.

    Last the 16-bit copies that are kept of such a layer.
    """
    dtypes = [dtype for dtype in job.sizes.dtypes if dtype != torch.float32]
    result: Result = {"warm": warm(_cases(dtypes, job), job, job.left * 0.6)}
    result |= {"rows": [], "times": [], "failed": [], "left_out": []}
    for dtype in dtypes:
        for scheme, layout in _kinds(job):
            if job.left < 3:
                result["left_out"].append(f"{scheme} {layout} {dtype_name(dtype)}")
                continue
            result["rows"] += _numerics(scheme, layout, dtype, job)
            result["failed"] = [_say(row) for row in result["rows"] if not row["ok"]]
            job.save(result)
        for m in TOKENS[:3] if dtype == dtypes[0] else ():
            if job.left < 3:
                result["left_out"].append(f"times of {m} tokens")
                continue
            result["times"].append(_times(m, job))
            job.save(result)
    if job.left < 3:
        result["left_out"].append("kept copies")
    else:
        result["copies"] = [_copy(dtype, job) for dtype in dtypes]
    return result


def _kinds(job: Job) -> list[tuple[str, str]]:
    """Every sparse scheme in each of its layouts."""
    return [(scheme, layout) for scheme in SCHEMES for layout in layouts(scheme, job)]


def _cases(dtypes: list[torch.dtype], job: Job) -> list[Case]:
    """The kernels of the numerics, and of the times."""
    plan = [(job.sizes.odd, dtype) for dtype in dtypes] + [(job.sizes.launch, _TIMED)]
    return [
        Case(scheme, dtype_name(dtype), m, *shape, layout=layout)
        for shape, dtype in plan
        for scheme, layout in _kinds(job)
        for m in TOKENS
    ]


def _say(row: Result) -> str:
    return f"{row['scheme']} {row['layout']} {row['dtype']} M = {row['m']}: {row['problem']}"


def _numerics(scheme: str, layout: str, dtype: torch.dtype, job: Job) -> list[Result]:
    n, k = job.sizes.odd
    packed = random_weight(FORMATS[scheme], n, k, dtype, job.device)
    dense, p, rows = packed.dequantize(torch.float64), packed.to_layout(layout), []
    for m in TOKENS:
        x = random_tokens(m, k, dtype, job.device)
        row = {"scheme": scheme, "layout": layout, "dtype": dtype_name(dtype), "m": m, "n": n, "k": k}
        found = error_of(partial(_product, x, p), x.double() @ dense.t(), packed.format.max_error(dtype))
        rows.append(row | found)
    return rows


def _copy(dtype: torch.dtype, job: Job) -> Result:
    """Which copy ``keep_dense`` keeps of a 2:4 weight, why, and the microseconds of both where they were timed."""
    fmt, (n, k) = FORMATS["w16a16-2:4"], job.sizes.launch
    dense = random_weight(fmt, n, k, dtype, job.device).dequantize(dtype).contiguous()
    found = semi_structured.choose(dense, fmt)
    kept = "semi-structured" if semi_structured.is_made(found.copy, k) else "dense"
    row = {"dtype": dtype_name(dtype), "m": semi_structured.TOKENS, "n": n, "k": k, "kept": kept, "why": found.reason}
    times = zip(("dense", "semi-structured"), found.seconds or (), strict=False)
    return row | {"us": {name: seconds * 1e6 for name, seconds in times}}


def _product(x: Tensor, p: PackedWeight) -> Tensor:
    """The operator's kernels, through the interpreter where there is no GPU."""
    return ops._linear_cuda(x, p, None, None) if p.device.type == "cpu" else ops.linear(x, p)


def _times(m: int, job: Job) -> Result:
    """Microseconds in fp16 with a cold cache; what cannot be done here says why."""
    n, k = job.sizes.launch
    x = random_tokens(m, k, _TIMED, job.device)
    weight = torch.randn(n, k, device=job.device).to(_TIMED)
    made: dict[str, Side] = {"F.linear float16": float_side(weight)}
    for scheme in (*SCHEMES, "w4a16", "w8a16"):
        packed = pack(weight, scheme, layout="triton", prune="magnitude")
        for layout in layouts(scheme, job):
            made[f"{scheme} {layout}"] = packed_side(packed.to_layout(layout))
    row: Result = {"m": m, "n": n, "k": k, "left_out": {}}
    try:
        made["semi-structured"] = peers.make("semi-structured", weight, FORMATS["w16a16-2:4"], 2)
        made["semi-structured"].product(x)
    except (Unavailable, RuntimeError) as reason:
        made.pop("semi-structured", None)
        row["left_out"]["semi-structured"] = str(reason)
    calls: dict[str, list[Callable[[], Any]]] = {
        name: [partial(call, x) for call in side.calls] for name, side in made.items()
    }
    if job.on_gpu:
        times = replayed(calls, 5, job.sizes.seconds, job.device)
    else:
        # Without a GPU the operators of sparse weights are other ones: only that a time is taken can be seen.
        times = in_turns({"F.linear float16": calls["F.linear float16"][0]}, 0.0)
    return row | {"us": {name: seconds * 1e6 for name, seconds in times.items()}}
