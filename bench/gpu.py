"""``python -m bench gpu``: everything this project wants to know from a GPU, in one run with a time limit.

Each stage runs in a process of its own and writes ``FOLDER/<stage>.json``, with its commit; a stage whose file is there
and holds no error is skipped, so a run that was cut short is taken up again by the same command. The most important
stages come first; one that needs less than its share leaves the rest to those after it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import click

from bench.gpu_job import Job, Result
from bench.gpu_summary import summarize
from bench.gpu_tools import commit
from qlinear.tables import write_json

ROOT = Path(__file__).parent.parent
#: Seconds beyond its share that a stage may take to end by itself, and that are kept for the summary.
_GRACE, _SUMMARY = 5.0, 10.0
#: Seconds that no stage is begun with.
_LEAST = 8.0
#: Of a process's errors.
_MOST = 2000


@dataclass(frozen=True)
class Stage:
    """A part of the run; ``function`` is ``module:name`` of what takes a Job and returns a Result."""

    name: str
    #: Its share of the time, in seconds of an eight-minute run.
    share: float
    function: str
    #: Of each run, and never kept from one before.
    every_run: bool = False

    def run(self, job: Job) -> Result:
        module, name = self.function.split(":")
        found: Callable[[Job], Result] = getattr(import_module(module), name)
        return found(job)


STAGES = (
    Stage("environment", 15, "bench.gpu_tools:environment", every_run=True),
    Stage("ptx", 20, "bench.gpu_ptx:ptx"),
    Stage("numerics", 70, "bench.gpu_checks:numerics"),
    Stage("operands", 30, "bench.gpu_operands:operands"),
    Stage("columns", 25, "bench.gpu_columns:columns"),
    Stage("sparse", 45, "bench.gpu_sparse:sparse"),
    Stage("benchmark", 70, "bench.gpu_speed:benchmark"),
    Stage("determinism", 20, "bench.gpu_checks:determinism"),
    Stage("launch", 20, "bench.gpu_speed:launch"),
    Stage("coldstart", 20, "bench.coldstart:stage"),
    Stage("models", 35, "bench.gpu_model:models"),
    Stage("gpu_tests", 35, "bench.gpu_tools:gpu_tests"),
    Stage("tuned", 30, "bench.gpu_tuned:tuned"),
    Stage("sanitizer", 35, "bench.gpu_tools:sanitizer"),
    Stage("kernel_tests", 10, "bench.gpu_tools:kernel_tests"),
)

#: Runs a stage within so many seconds, leaving its file behind: in its own process, but for the tests.
Launcher = Callable[[Stage, Path, float], None]


def worker(stage: Stage, folder: Path, seconds: float) -> list[str]:
    """The command that runs a stage."""
    return [sys.executable, "-m", "bench.gpu_worker", stage.name, str(folder.resolve()), str(seconds)]


def in_process(
    stage: Stage, folder: Path, seconds: float, command: Callable[[Stage, Path, float], list[str]] = worker
) -> None:
    """Runs a stage in a process of its own; what is left of one that dies or is too slow goes into its file."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    mark, present = uuid.uuid4().hex, commit()
    partial = folder / f".{stage.name}.partial"
    partial.unlink(missing_ok=True)
    with (folder / f".{stage.name}.log").open("w+") as log:
        process = subprocess.Popen(
            command(stage, folder, seconds),
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": path, "QLINEAR_BENCH_STAGE": mark},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(timeout=seconds + _GRACE)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            # Its own processes (compilers, pytest) end with it: they would disturb what is timed next.
            _end(process, mark)
        log.seek(0)
        text = log.read()[-_MOST:]
    kept = json.loads(partial.read_text()) if partial.exists() else {}
    partial.unlink(missing_ok=True)
    if code == 0 and (folder / f"{stage.name}.json").exists():
        return
    reason = f"stopped after {seconds + _GRACE:.0f} s" if code is None else f"ended with exit code {code}"
    # Out of time is no fault of what was measured until then.
    key = "incomplete" if code is None and kept else "error"
    write_json(folder / f"{stage.name}.json", kept | {key: reason, "commit": present, "log": text})


def _end(process: subprocess.Popen[bytes], mark: str) -> None:
    """Ends a process and all that came of it: those in other sessions are found by the mark in their environment."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    end = time.monotonic() + _GRACE
    while (left := _marked(mark)) and time.monotonic() < end:
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def _marked(mark: str) -> list[int]:
    """Who was started with this mark in its environment, or by one who was; nobody where there is no ``/proc``."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        # It has ended meanwhile, or is another user's.
        with contextlib.suppress(OSError):
            if mark.encode() in (process / "environ").read_bytes():
                found.append(int(process.name))
    return found


def run(
    folder: Path,
    minutes: float,
    stages: Sequence[Stage] = STAGES,
    launcher: Launcher = in_process,
    clock: Callable[[], float] = time.monotonic,
    say: Callable[[str], None] = click.echo,
    again: bool = False,
) -> dict[str, Any]:
    """Runs what has not been run, and writes the summary; returns every stage's result by name.

    ``again``: also the stages that failed, that time was too short for or that ran at another commit, from their
    beginning.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for stage in stages:
        if stage.every_run:
            (folder / f"{stage.name}.json").unlink(missing_ok=True)
    present = commit()
    waiting = [stage for stage in stages if not _done(folder, stage, present if again else None)]
    end = clock() + minutes * 60 - _SUMMARY
    unit = (end - clock()) / max(1.0, sum(stage.share for stage in waiting))
    # A stage must end when the shares of all up to it are used up: what one leaves, the next ones have.
    due = clock()
    for number, stage in enumerate(waiting, 1):
        due += stage.share * unit
        seconds = due - clock()
        if seconds < _LEAST:
            say(f"[{number}/{len(waiting)}] {stage.name}: no time left; the same command takes it up again")
            continue
        say(f"[{number}/{len(waiting)}] {stage.name}: at most {seconds:.0f} s")
        begin = clock()
        # Its own limit is the earlier one: it ends by itself, with all it has.
        launcher(stage, folder, seconds - _GRACE)
        say(f"    {clock() - begin:.0f} s: {describe(read(folder, stage.name))}")
    results = {stage.name: found for stage in stages if (found := read(folder, stage.name)) is not None}
    (folder / "summary.md").write_text(summarize(results, [stage.name for stage in stages], folder))
    return results


def read(folder: Path, name: str) -> Result | None:
    """What a stage left, if anything."""
    path = folder / f"{name}.json"
    try:
        found: Result = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found


def _done(folder: Path, stage: Stage, of: str | None) -> bool:
    """Whether a stage ran; ``of``: at this commit, and whole and without a failure."""
    found = read(folder, stage.name)
    if found is None or "error" in found:
        return False
    whole = "incomplete" not in found and not found.get("failed") and not found.get("left_out")
    return of is None or (whole and found.get("commit") == of)


def describe(result: Result | None) -> str:
    """One line on what a stage found."""
    if result is None:
        return "left nothing"
    if "error" in result:
        return f"FAILED: {result['error']}: {' '.join(str(result.get('log', '')).split())[-200:]}"
    failed = len(result.get("failed", ()))
    parts = [f"{failed} FAILED" if failed else "ok"]
    if "verdict" in result:
        parts.append(str(result["verdict"]))
    if "rows" in result:
        parts.append(f"{len(result['rows'])} rows")
    if "incomplete" in result:
        parts.append(str(result["incomplete"]))
    if result.get("left_out"):
        parts.append(f"{len(result['left_out'])} left out")
    return ", ".join(parts)


def good(results: dict[str, Any], stages: Sequence[Stage] = STAGES) -> bool:
    """Whether every stage ran and nothing in it failed."""
    return all(
        stage.name in results and "error" not in results[stage.name] and not results[stage.name].get("failed")
        for stage in stages
    )
