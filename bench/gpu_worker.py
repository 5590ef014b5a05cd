"""One stage in a process of its own: ``python -m bench.gpu_worker STAGE FOLDER SECONDS``.

An illegal access leaves a process without a usable GPU: here it takes one stage with it, and no other.
"""

from __future__ import annotations

import os
import sys
import time
import warnings
from pathlib import Path

import torch

from bench.gpu_job import Job, Result
from bench.gpu_tools import commit
from qlinear.tables import write_json


def main(arguments: list[str]) -> None:
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    if arguments == ["--small"]:
        from bench.gpu_tools import small_case

        small_case(device)
        torch.cuda.synchronize()
        return
    # A warning is worth reading, not worth a stage.
    warnings.simplefilter("default")
    work(device, arguments[0], Path(arguments[1]), float(arguments[2]))


def work(device: torch.device, name: str, folder: Path, seconds: float) -> None:
    """Runs a stage; its file tells the commit and the seconds it took."""
    from bench.gpu import STAGES

    partial = folder / f".{name}.partial"
    begin, present = time.monotonic(), commit()

    def save(result: Result) -> None:
        write_json(partial, result)

    processes = max(1, min(12, (os.cpu_count() or 2) - 2))
    job = Job(device, deadline=begin + seconds, folder=folder, save=save, processes=processes)
    stage = next(stage for stage in STAGES if stage.name == name)
    result = stage.run(job) | {"commit": present, "seconds": time.monotonic() - begin}
    # Twice: this process may still fail to end as it should.
    save(result)
    write_json(folder / f"{name}.json", result)


if __name__ == "__main__":
    main(sys.argv[1:])
