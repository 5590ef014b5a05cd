"""How fast it is on this device: the benchmark, and what a launch costs."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bench import matmul, peers
from bench.gpu_job import Job, Result, dtype_name
from bench.gpu_warm import Case, warm
from bench.sides import float_side, packed_side
from bench.timing import in_turns
from qlinear import QLinear
from qlinear.format import DENSE
from qlinear.kernels.graphs import replayed
from qlinear.packing import PackedWeight

#: Calls whose launches are timed on the CPU: fewer than a device's queue holds.
_CALLS = 400
#: How many layers are timed in each dtype; None: all.
_LAYERS = {torch.bfloat16: None, torch.float16: 2}


def benchmark(job: Job) -> Result:
    """``python -m bench matmul`` in bfloat16, then float16, against the vendor's product and every peer installed.

    float16 costs what bfloat16 does but for decoding: of it only the first layers.
    """
    sizes = job.sizes
    plan = {dtype: sizes.layers[: _LAYERS[dtype]] for dtype in _LAYERS if dtype in sizes.dtypes}
    cases = [
        Case(scheme, dtype_name(dtype), m, n, k)
        for dtype, layers in plan.items()
        for scheme in sizes.bench_schemes
        for _, _, n, k in layers
        for m in sizes.bench_tokens
    ]
    notes: list[str] = []
    result: Result = {"warm": warm(cases, job, job.left * 0.4), "peers": peers.versions(), "notes": notes, "rows": []}
    for dtype, layers in plan.items():
        done = list(result["rows"])

        def save(rows: list[matmul.Row], done: list[matmul.Row] = done) -> None:
            job.save(_judged(result | {"rows": done + rows}, cases))

        settings = matmul.Settings(
            job.device,
            dtype,
            sizes.bench_tokens,
            sizes.bench_schemes,
            peers.choose(None) if job.on_gpu else (),
            sizes.seconds,
            rounds=5,
            deadline=job.deadline - 3,
            note=notes.append,
            save=save,
        )
        result["rows"] = done + matmul.measure(layers, settings)
    return _judged(result, cases)


def _judged(result: Result, cases: Sequence[Case]) -> Result:
    """The result with what is wrong in its rows, and with the products that it has no row of."""
    rows = result["rows"]
    wrong = [row for row in rows if row["us"] is None]
    failed = [f"{row['scheme']} {row['dtype']} {row['m']}x{row['n']}x{row['k']}: {row['error']}" for row in wrong]
    measured = {(row["dtype"], row["m"], row["n"], row["k"]) for row in rows}
    wanted = dict.fromkeys((case.dtype, case.m, case.n, case.k) for case in cases)
    left_out = [f"{dtype} {m}x{n}x{k}" for dtype, m, n, k in wanted if (dtype, m, n, k) not in measured]
    return result | {"failed": failed, "left_out": left_out}


def arguments() -> dict[str, int]:
    """How many arguments a launch hands to Triton: those that are compiled in, and those that are not."""
    from qlinear.kernels.matmul import _matmul_kernel

    parameters = inspect.signature(_matmul_kernel.fn).parameters.values()
    constants = sum("constexpr" in str(p.annotation) for p in parameters)
    return {"compiled_in": constants, "passed": len(parameters) - constants}


def launch(job: Job) -> Result:
    """What a call costs beside its bytes: on the CPU, and in a graph's replay, with a warm and with a cold cache."""
    n, k = job.sizes.launch
    result: Result = {"n": n, "k": k, "arguments": arguments(), "rows": [], "failed": []}
    dtype = job.sizes.dtypes[0]
    linear = nn.Linear(k, n, bias=False, device=job.device, dtype=dtype).requires_grad_(False)
    x = torch.randn(1, k, device=job.device).to(dtype)
    small = torch.zeros(1, device=job.device)
    sides: dict[str, tuple[Callable[[], object], Sequence[Callable[[], object]]]] = {
        "smallest kernel (x += 1)": (lambda: small.add_(1), [lambda: small.add_(1)]),
        f"F.linear {dtype_name(dtype)}": (lambda: linear(x), _bound(float_side(linear.weight.detach()), x)),
    }
    with torch.no_grad():
        for scheme in job.sizes.tuned_schemes:
            layer = QLinear.from_float(linear, scheme)
            p = layer.packed
            sides[f"QLinear {scheme}"] = (_call(layer, x), _bound(packed_side(p), x))
            sides[f"operator {scheme}"] = (_operator(p, x), [_operator(p, x)])
        hosts = {name: _host_seconds(call, job.device) for name, (call, _) in sides.items()}
        if job.on_gpu:
            warm_times = replayed({key: [call] for key, (call, _) in sides.items()}, 7, 0.05, job.device)
            cold_times = replayed({key: calls for key, (_, calls) in sides.items()}, 7, 0.05, job.device)
        else:
            warm_times = cold_times = in_turns({key: call for key, (call, _) in sides.items()}, 0.0)
    for name, host in hosts.items():
        times = {"graph_warm_us": warm_times.get(name), "graph_cold_us": cold_times.get(name)}
        row = {"side": name, "cpu_us": host * 1e6} | {key: t and t * 1e6 for key, t in times.items()}
        result["rows"].append(row)
    machine = matmul.machine_of(job.device)
    if machine is not None:
        size = DENSE["w4a16"].weight_bytes(n, k)
        result["int4_floor_us"] = matmul.floor_seconds(machine, size, 1, n, k, dtype.itemsize, False) * 1e6
    return result


def _call(layer: nn.Module, x: Tensor) -> Callable[[], object]:
    return lambda: layer(x)


def _operator(p: PackedWeight, x: Tensor) -> Callable[[], object]:
    name = p.format.name
    return lambda: torch.ops.qlinear.linear(
        x, p.weight, p.scale, p.zero_point, None, name, p.in_features, p.out_features
    )


def _bound(side: Any, x: Tensor) -> list[Callable[[], object]]:
    prepared = side.prepare(x)
    return [partial(call, prepared) for call in side.calls]


def _host_seconds(call: Callable[[], object], device: torch.device) -> float:
    """Median seconds until a call returns, while the device works."""

    def once() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begin = time.perf_counter()
        for _ in range(_CALLS if device.type == "cuda" else 3):
            call()
        return (time.perf_counter() - begin) / (_CALLS if device.type == "cuda" else 3)

    once()
    return sorted(once() for _ in range(5))[2]
