"""The table that ``qlinear tune`` would write, for the most used problems, in the run's folder: ready to install."""

from __future__ import annotations

import torch

from bench.gpu_job import Job, Result, dtype_name
from bench.gpu_warm import Case, warm
from qlinear.kernels.gauge import DeviceGauge
from qlinear.kernels.runtime import target_of
from qlinear.kernels.search import Found, default_config, neighbours, plan
from qlinear.kernels.tuned import Key, Table, kernels_hash, key_of
from qlinear.tuning import measure, row

#: Seconds kept for the end.
_GRACE = 3.0


def tuned(job: Job) -> Result:
    """Searches as ``qlinear tune`` does, after compiling the first candidates in several processes."""
    sizes, target = job.sizes, target_of(job.device)
    dtype = sizes.dtypes[0]
    layers = [(scheme, n, k) for n, k in sizes.tuned_layers for scheme in sizes.tuned_schemes]
    problems = plan(layers, dtype, list(sizes.tuned_tokens))
    defaults = [(p, default_config(p, target)) for p in problems if p.bucket]
    cases = [
        Case(p.scheme, dtype_name(dtype), p.tokens, p.n, p.k, config=config)
        for p, default in defaults
        for config in (default, *neighbours(default, p, target))
    ]
    key = _key(job.device)
    table = Table(key, job.folder / "tuned" / key.file_name)
    result: Result = {"warm": warm(cases, job, job.left * 0.5), "rows": [], "failed": [], "left_out": []}
    result["table"] = f"tuned/{key.file_name}"

    def save(found: Found) -> None:
        result["rows"].append(row(found))
        wrong = [f"{found.problem} {c}: {why}" for c, why in found.left_out.items() if why.startswith("wrong")]
        result["failed"] += wrong
        job.save(result)

    gauge = DeviceGauge(job.device, sizes.seconds)
    done = measure(problems, table, target, gauge, job.left - _GRACE, progress=False, save=save)
    result["left_out"] = [str(p) for p in problems[len(done.found) :]]
    return result


def _key(device: torch.device) -> Key:
    if device.type == "cuda":
        return key_of(torch.cuda.current_device() if device.index is None else device.index)
    target = target_of(device)
    return Key("no GPU", target.capability, target.num_sms, "none", kernels_hash())
