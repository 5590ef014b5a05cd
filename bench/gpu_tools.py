"""Stages that run other programs: what this machine is, pytest, compute-sanitizer."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from bench.gpu_job import Job, Result
from bench.matmul import machine_of
from qlinear.doctor import devices, versions

ROOT = Path(__file__).parent.parent
_CLOCKS = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.draw,power.limit,temperature.gpu"
_SANITIZER = "/usr/local/cuda/bin/compute-sanitizer"
#: A test whose tensors are where the kernels run.
_USES_DEVICE = r"^def test_\w+\([^)]*\bdevice\b"
#: Of an error's text.
_MOST = 3000


def commit() -> str:
    """The commit of this checkout."""
    return run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], 10)[1].strip() or "unknown"


def environment(job: Job) -> Result:
    """Names, versions and clocks; nothing is set."""
    result: Result = {
        "commit": commit(),
        "versions": versions(),
        "devices": devices(),
        "python": platform.python_version(),
    }
    if job.on_gpu:
        p = torch.cuda.get_device_properties(job.device)
        machine = machine_of(job.device)
        result["gpu"] = {
            "name": p.name,
            "capability": [p.major, p.minor],
            "sms": p.multi_processor_count,
            "memory_bytes": p.total_memory,
            "l2_bytes": p.L2_cache_size,
            "cuda": torch.version.cuda,
            "figures": machine and machine.name,
        }
        smi = run(["nvidia-smi", f"--query-gpu={_CLOCKS}", "--format=csv"], 20)
        result["nvidia_smi"] = smi[1].strip() or smi[2].strip()
        result["copy_bytes_per_s"] = _copy_rate(job.device)
    return result


def _copy_rate(device: torch.device) -> float:
    """Bytes read and written per second by a large copy: what this very device's memory gives."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(10):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        best = min(best, begin.elapsed_time(end) / 1e3)
    return 2 * source.nbytes / best


def run(command: Sequence[str], seconds: float, **environment: str) -> tuple[int, str, str]:
    """Exit code, output and errors of a program; -1 where it cannot run or takes longer."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]), **environment}
    limit = None if seconds == float("inf") else max(1.0, seconds)
    # Files, not pipes: what a program leaves running would keep a pipe open.
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        late = ""
        try:
            process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=out, stderr=err, start_new_session=True)
            try:
                code = process.wait(limit)
            except subprocess.TimeoutExpired:
                code, late = -1, f"\ntook longer than {seconds:.0f} s"
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        except OSError as error:
            return -1, "", str(error)
        out.seek(0)
        err.seek(0)
        return code, out.read().decode(errors="replace"), err.read().decode(errors="replace") + late


def gpu_tests(job: Job) -> Result:
    """Every test that is marked ``gpu``, but for those of inline PTX, which have a stage of their own."""
    return tests(["-m", "gpu", *_files(r"mark\.gpu", without="test_ptx")], job)


def kernel_tests(job: Job) -> Result:
    """The other tests of the kernels, which run on the GPU where there is one."""
    return tests(["-m", "not gpu", *_files(_USES_DEVICE, without="test_bench_gpu")], job)


def _files(pattern: str, without: str) -> list[str]:
    """The test files in which a pattern is found, but for one."""
    files = [path for path in sorted((ROOT / "tests").glob("test_*.py")) if path.stem != without]
    return [str(path) for path in files if re.search(pattern, path.read_text(), re.MULTILINE)]


def tests(arguments: Sequence[str], job: Job) -> Result:
    """Runs pytest and reads what it reports; failures are kept in its words."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        options = ["-v", "-p", "no:cacheprovider", "--continue-on-collection-errors", f"--junitxml={report}"]
        # A new version's deprecation is no fault of a kernel.
        options += ["-W", "default"]
        if job.processes and importlib.util.find_spec("xdist") is not None:
            options += ["-n", str(min(6, job.processes))]
        code, out, err = run([sys.executable, "-m", "pytest", *options, *arguments], job.left - 2)
        result: Result = {"exit_code": code, "tail": (out + err)[-_MOST:]}
        found = read_junit(report) if report.exists() else {}
        # 5: nothing was selected. Any other code without a failed test is a failure of pytest's own.
        if found and (code in (0, 5) or found["failed"]):
            return result | found
    if code == -1:
        passed, failures = (re.findall(rf"{word} (\S+)|(\S+) {word}", out) for word in ("PASSED", "FAILED"))
        names = ["".join(pair) for pair in failures]
        counts = {"passed": len(passed), "failed": len(names), "skipped": out.count("SKIPPED")}
        return result | {"counts": counts, "failed": names, "incomplete": err.strip().splitlines()[-1]}
    return result | {"failed": [f"pytest itself failed (exit code {code}): {(out + err)[-600:]}"]}


def read_junit(report: Path) -> Result:
    """Counts, and the failures' own words."""
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    texts, failed, slowest = {}, [], []
    for case in ElementTree.parse(report).iter("testcase"):
        name = f"{case.get('classname', '')}::{case.get('name', '')}"
        slowest.append((float(case.get("time", "0")), name))
        problem = case.find("failure") if case.find("failure") is not None else case.find("error")
        if problem is not None:
            counts["failed"] += 1
            failed.append(f"{name}: {(problem.get('message') or '').splitlines()[:1]}")
            texts[name] = (problem.text or "")[-_MOST:]
        elif case.find("skipped") is not None:
            counts["skipped"] += 1
        else:
            counts["passed"] += 1
    return {"counts": counts, "failed": failed, "texts": texts, "slowest": sorted(slowest, reverse=True)[:10]}


def sanitizer(job: Job) -> Result:
    """compute-sanitizer over a few small products: memory accesses, then races in shared memory."""
    tool = shutil.which("compute-sanitizer") or _SANITIZER
    if not Path(tool).exists():
        return {"left_out": ["compute-sanitizer is not installed"]}
    small = [sys.executable, "-m", "bench.gpu_worker", "--small"]
    result: Result = {"failed": []}
    # Once without it: the kernels are compiled outside.
    code, out, err = run(small, job.left)
    if code == -1:
        return {"left_out": [f"the small case by itself: {err.strip().splitlines()[-1][:200]}"]}
    if code != 0:
        return {"failed": [f"the small case fails by itself: {(out + err)[-_MOST:]}"]}
    for name, options in (("memcheck", ["--report-api-errors", "no"]), ("racecheck", [])):
        if job.left < 3:
            result.setdefault("left_out", []).append(name)
            continue
        command = [tool, "--tool", name, "--error-exitcode", "9", *options, *small]
        # Without torch's own pool every tensor is an allocation of its own, whose end is checked.
        code, out, err = run(command, job.left - 1, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        text = out + err
        result[name] = {"exit_code": code, "tail": text[-_MOST:]}
        if "not supported" in text or "took longer" in text or code == -1:
            result.setdefault("left_out", []).append(f"{name}: {text.strip().splitlines()[-1][:200]}")
        elif code != 0:
            result["failed"].append(f"{name}: exit code {code}")
        job.save(result)
    return result


def small_case(device: torch.device) -> None:
    """A few products with odd sizes: split along K and whole, int4, int8, int8 by int8 and float8.

    In bfloat16 without a bias, as other stages multiply: their kernels are compiled already.
    """
    from bench.gpu_checks import random_tokens
    from bench.gpu_warm import random_weight
    from qlinear.format import DENSE
    from qlinear.kernels.matmul import matmul

    for scheme in ("w4a16", "w4a16-g32-asym", "w8a16", "w8a8", "w8a16-fp8", "fp8"):
        # Made on the CPU: under a sanitizer every kernel launch takes long.
        packed = random_weight(DENSE[scheme], 203, 1352, torch.bfloat16, torch.device("cpu"))
        packed = replace(packed, weight=packed.weight.to(device), scale=packed.scale.to(device))
        for m in (1, 17, 130):
            y = matmul(random_tokens(m, 1352, torch.bfloat16, torch.device("cpu")).to(device), packed)
            assert bool(torch.isfinite(y).all()), f"{scheme} at M = {m}"
