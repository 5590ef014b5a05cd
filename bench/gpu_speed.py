"""How fast it is on this device: the benchmark, what a launch costs, and configurations beside the chosen ones."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bench import matmul, peers
from bench.gpu_checks import random_weight
from bench.gpu_job import Job, Result, dtype_name
from bench.gpu_warm import Case, warm
from bench.sides import float_side, packed_side
from bench.timing import in_turns, replayed
from qlinear import QLinear
from qlinear.format import DENSE, Format
from qlinear.packing import PackedWeight

#: Calls whose launches are timed on the CPU: fewer than a device's queue holds.
_CALLS = 400
_16_BIT = (torch.bfloat16, torch.float16)


def benchmark(job: Job) -> Result:
    """``python -m bench matmul`` in bfloat16, then float16, against the vendor's product and every peer installed."""
    sizes = job.sizes
    dtypes = [dtype for dtype in _16_BIT if dtype in sizes.dtypes]
    cases = [
        Case(scheme, dtype_name(dtype), m, n, k)
        for dtype in dtypes
        for scheme in sizes.bench_schemes
        for _, _, n, k in sizes.layers
        for m in sizes.bench_tokens
    ]
    notes: list[str] = []
    result: Result = {"warm": warm(cases, job, job.left * 0.4), "peers": peers.versions(), "notes": notes, "rows": []}
    for dtype in dtypes:
        done = list(result["rows"])

        def save(rows: list[matmul.Row], done: list[matmul.Row] = done) -> None:
            job.save(result | {"rows": done + rows})

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
        result["rows"] = done + matmul.measure(sizes.layers, settings)
    result["failed"] = [
        f"{row['scheme']} {row['dtype']} {_shape(row)}: {row['error']}" for row in _without_time(result)
    ]
    return result


def _shape(row: Result) -> str:
    return f"{row['m']}x{row['n']}x{row['k']}"


def _without_time(result: Result) -> list[Result]:
    return [row for row in result["rows"] if row["us"] is None]


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


def neighbours(config: Any, fmt: Format) -> list[Any]:
    """Configurations one or two steps from ``config``: rows and warps of a tile, buffers, parts of K."""
    found = [config]
    shapes = [(128, 4), (256, 4), (256, 8), (64, 4)]
    for block_n, warps in shapes:
        # As many programs as before.
        split = max(1, config.split_k * block_n // config.block_n)
        found.append(replace(config, block_n=block_n, num_warps=warps, split_k=split))
    for stages in (config.num_stages - 1, config.num_stages + 1):
        if stages >= 2:
            found.append(replace(config, num_stages=stages))
    for split in (config.split_k // 2, config.split_k * 2, config.split_k * 4, 1):
        if split >= 1:
            found.append(replace(config, split_k=split))
            found.append(replace(config, split_k=split, num_stages=max(2, config.num_stages - 1)))
    return list(dict.fromkeys(found))


def tuned(job: Job) -> Result:
    """Neighbours of the chosen configuration for the most used problems: the best, and what it would gain."""
    from qlinear.kernels.configs import choose_config
    from qlinear.kernels.runtime import target_of

    sizes, target = job.sizes, target_of(job.device)
    dtype = sizes.dtypes[0]
    plan: list[tuple[str, int, int, int, list[Any]]] = []
    for n, k in sizes.tuned_layers:
        for m in sizes.tuned_tokens:
            for scheme in sizes.tuned_schemes:
                fmt = DENSE[scheme]
                chosen = choose_config(m, n, k, fmt, dtype, target.capability, target.num_sms)
                plan.append((scheme, m, n, k, neighbours(chosen, fmt)))
    cases = [Case(s, dtype_name(dtype), m, n, k, config=c) for s, m, n, k, configs in plan for c in configs]
    result: Result = {"warm": warm(cases, job, job.left * 0.65), "rows": [], "failed": [], "left_out": []}
    weights: dict[tuple[str, int, int], PackedWeight] = {}
    for scheme, m, n, k, configs in plan:
        if job.left < 3:
            result["left_out"].append(f"{scheme} {m}x{n}x{k}")
            continue
        key = (scheme, n, k)
        if key not in weights:
            weights = {key: random_weight(DENSE[scheme], n, k, dtype, job.device)} | {
                other: weight for other, weight in weights.items() if other[1:] == (n, k)
            }
        x = torch.randn(m, k, device=job.device).to(dtype)
        row, wrong = _tune(x, weights[key], configs, job)
        result["rows"].append(row)
        result["failed"] += wrong
        job.save(result)
    return result


def _tune(x: Tensor, packed: PackedWeight, configs: Sequence[Any], job: Job) -> tuple[Result, list[str]]:
    from qlinear.kernels.matmul import matmul as product

    wanted = product(x, packed, config=configs[0]).double()
    sides: dict[str, list[Callable[[], object]]] = {}
    left_out, wrong = {}, []
    count = len(packed_side(packed).calls)
    copies = [packed, *(replace(packed, weight=packed.weight.clone()) for _ in range(count - 1))]
    for config in configs:
        try:
            y = product(x, packed, config=config).double()
        except Exception as error:
            left_out[str(config)] = f"{type(error).__name__}: {error}".splitlines()[0][:150]
            continue
        # Sums in another order: both are within the bound of the truth.
        if float((y - wanted).norm() / wanted.norm()) <= 2 * packed.format.max_error(x.dtype):
            sides[str(config)] = [partial(product, x, p, None, config) for p in copies]
        else:
            wrong.append(f"{packed.format} {x.shape[0]}x{packed.out_features}x{packed.in_features} {config} is wrong")
    if job.on_gpu:
        times = replayed(sides, 5, job.sizes.seconds, job.device)
    else:
        times = in_turns({name: calls[0] for name, calls in sides.items()}, 0.0, least=1)
    us = {name: t * 1e6 for name, t in sorted(times.items(), key=lambda item: item[1])}
    chosen, best = str(configs[0]), next(iter(us), None)
    row: Result = {"scheme": packed.format.name, "dtype": dtype_name(x.dtype), "m": x.shape[0]}
    row |= {"n": packed.out_features, "k": packed.in_features, "chosen": chosen, "best": best, "us": us}
    row["gain"] = us[chosen] / us[best] if best is not None and chosen in us else None
    return row | {"left_out": left_out}, wrong
