"""``python -m bench coldstart``: what the first call costs in a fresh process, with an empty and a filled Triton cache.

On a GPU: the operator itself. Without one: the kernels of that call, compiled ahead of time for an H100 (what a first
call on one spends on compiling, nothing else), and the first calls of the CPU path. Each row is of fresh processes.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.gpu_job import Job, Result
from qlinear.tables import table

ROOT = Path(__file__).parent.parent
SCHEMES = ("w4a16", "w8a8")
#: out_features, in_features.
SHAPE = (1536, 576)
#: Of a process.
_LIMIT = 300.0
_STEPS = ("import torch", "import qlinear", "make layer", "first call", "second call", "import triton", "compile")


def measure(
    device: str, schemes: tuple[str, ...] = SCHEMES, left: Callable[[], float] = lambda: _LIMIT
) -> Iterator[dict[str, Any]]:
    """Seconds of each step by scheme, first with an empty Triton cache, then with what that left in it.

    Each row also has the names of the kernels that were ``compiled``, and of those ``loaded`` from the cache instead.

    ``left`` is how many seconds the next process may take.
    """
    for scheme in schemes:
        with tempfile.TemporaryDirectory() as cache:
            for state in ("empty", "filled"):
                found = _fresh([scheme, device], cache, left())
                yield {"scheme": scheme, "device": device, "cache": state, **found}


def medians(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for all of the same scheme and cache: the median of each step's seconds, and over how many processes."""
    same: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        same.setdefault((row["scheme"], row["cache"]), []).append(row)
    return [
        each[0]
        | {
            "processes": len(each),
            "seconds": {step: statistics.median(row["seconds"][step] for row in each) for step in each[0]["seconds"]},
        }
        for each in same.values()
    ]


def show(rows: list[dict[str, Any]]) -> str:
    """One line for each process; milliseconds."""
    header = ("scheme", "on", "Triton cache", *_STEPS, "kernels compiled", "kernels loaded")
    lines = [
        (
            *(row[name] for name in ("scheme", "device", "cache")),
            *(f"{row['seconds'][step] * 1e3:.1f}" if step in row["seconds"] else "" for step in _STEPS),
            *(" ".join(row[how]) or "none" for how in ("compiled", "loaded")),
        )
        for row in rows
    ]
    return f"milliseconds in a fresh process, {SHAPE[0]} x {SHAPE[1]}, bfloat16, one token\n" + table(
        header, lines, right=range(3, 3 + len(_STEPS))
    )


def stage(job: Job) -> Result:
    """The same as a part of ``python -m bench gpu``."""
    result: Result = {"rows": [], "failed": [], "left_out": []}
    for scheme in SCHEMES:
        if job.left < 5:
            result["left_out"].append(scheme)
            continue
        try:
            for row in measure(job.device.type, (scheme,), lambda: job.left):
                result["rows"].append(row)
                job.save(result)
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            result["failed"].append(str(error)[-500:])
        job.save(result)
    return result


def _fresh(arguments: list[str], cache: str, limit: float) -> dict[str, Any]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": path, "TRITON_CACHE_DIR": cache}
    command = [sys.executable, str(Path(__file__).with_name("coldstart_child.py")), *arguments, *map(str, SHAPE)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=limit)
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)}: {done.stderr.strip()[-400:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
