"""Compiles what ships, for GPUs that need not be present: no spills, tensor cores used, loads asynchronous.

Run as a program this file is the worker: Triton cannot compile in a process that interprets. It takes the indices
of jobs as arguments and prints one line of JSON for each.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from qlinear.format import FORMATS, Format
from qlinear.kernels.configs import Config, shipped_configs
from qlinear.kernels.runtime import Capability

TARGETS: tuple[Capability, ...] = ((8, 0), (9, 0), (10, 0), "gfx942")
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
WORKERS = 2


class Job(NamedTuple):
    target: Capability
    fmt: Format
    dtype: str
    config: Config
    #: Among the few that run by default; the others are marked slow.
    sampled: bool

    def __str__(self) -> str:
        target = self.target if isinstance(self.target, str) else f"sm_{self.target[0] * 10 + self.target[1]}"
        return f"{target}-{self.fmt}-{self.dtype}-{self.config}"


def jobs() -> list[Job]:
    """Every shipped configuration. By default a format meets half of the tiles on sm_90, one elsewhere."""
    result = []
    for target in TARGETS:
        for i, fmt in enumerate(FORMATS.values()):
            for dtype in DTYPES:
                configs = list(shipped_configs(fmt, DTYPES[dtype], target))
                tiles = list(dict.fromkeys((config.block_m, config.block_n) for config in configs))
                for config in configs:
                    tile = tiles.index((config.block_m, config.block_n))
                    turn = i % 6 == 1 if dtype == "fp32" else dtype == ("bf16", "fp16")[i % 2]
                    here = (tile + i // 2) % min(2, len(tiles)) == 0 if target == (9, 0) else tile == i % len(tiles)
                    # Splitting along K only adds to a kernel's end.
                    sampled = config.split_k > 1 and turn and here
                    result.append(Job(target, fmt, dtype, config, sampled))
    return result


JOBS = jobs()


def compile_all(indices: list[int]) -> dict[int, dict[str, object]]:
    """Compiles jobs in two worker processes."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = str(Path(__file__).parents[1])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (root, environment.get("PYTHONPATH"))))
    shares = [[str(i) for i in indices[worker::WORKERS]] for worker in range(WORKERS)]
    workers = [
        subprocess.Popen([sys.executable, __file__, *share], stdout=subprocess.PIPE, text=True, env=environment)
        for share in shares
        if share
    ]
    lines = [line for worker in workers for line in worker.communicate()[0].splitlines()]
    assert all(worker.returncode == 0 for worker in workers)
    return {result.pop("job"): result for result in map(json.loads, lines)}


@pytest.fixture(scope="session")
def compiled(request):
    """The results of all jobs that were selected, compiled at the first use."""
    items = [item for item in request.session.items if item.get_closest_marker("compiled")]
    return compile_all([item.callspec.params["index"] for item in items])


@pytest.mark.compiled
@pytest.mark.parametrize(
    "index",
    [pytest.param(i, id=str(job), marks=() if job.sampled else pytest.mark.slow) for i, job in enumerate(JOBS)],
)
def test_shipped_configuration(index, compiled):
    job, result = JOBS[index], compiled[index]
    assert "error" not in result, result["error"]
    assert result["spilled"] == 0
    assert result["tensor_core_instructions"] > 0
    if not isinstance(job.target, str):
        assert result["asynchronous_copies"] > 0


def test_every_format_is_sampled_for_every_target():
    sampled = {(job.target, job.fmt.name) for job in JOBS if job.sampled}
    assert sampled == {(target, name) for target in TARGETS for name in FORMATS}


def main() -> None:
    from qlinear.kernels.compile import compile_matmul, usage

    for index in map(int, sys.argv[1:]):
        job = JOBS[index]
        try:
            result = asdict(usage(compile_matmul(job.fmt, DTYPES[job.dtype], job.config, job.target)))
        except Exception as error:
            result = {"error": repr(error)}
        print(json.dumps({"job": index, **result}), flush=True)


if __name__ == "__main__":
    main()
