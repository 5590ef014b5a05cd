"""``python -m bench gpu`` without a GPU: the plan, and what survives a stage that dies."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
from models import ROOT

from bench import (
    gpu,
)
from bench.gpu import Stage
from bench.gpu_job import Result


class Clock:
    """Time that passes only when a stage takes it."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def plan(
    folder: Path,
    takes: dict[str, float],
    minutes: float,
    found: dict[str, Result] | None = None,
    again: bool = False,
    commit: str = "this",
) -> list[str]:
    """Runs stages of 100 seconds each; returns ``name:seconds allowed`` of those that were launched."""
    stages = [Stage(name, 100, "none:none", every_run=name == "environment") for name in takes]
    clock, launched = Clock(), []

    def launcher(stage: Stage, folder: Path, seconds: float) -> None:
        launched.append(f"{stage.name}:{seconds + gpu._GRACE:.0f}")
        clock.now += takes[stage.name]
        result = {"commit": commit} | (found or {}).get(stage.name, {"failed": []})
        (folder / f"{stage.name}.json").write_text(json.dumps(result))

    with mock.patch.object(gpu, "commit", lambda: commit):
        gpu.run(folder, minutes, stages, launcher, clock, lambda text: None, again)
    return launched


def test_what_a_stage_leaves_the_next_ones_have(tmp_path: Path) -> None:
    # 310 seconds, of which 10 are the summary's.
    assert plan(tmp_path, {"a": 40, "b": 110, "c": 100}, 310 / 60) == ["a:100", "b:160", "c:150"]


def test_a_stage_that_is_late_takes_from_the_next_ones(tmp_path: Path) -> None:
    assert plan(tmp_path, {"a": 195, "b": 50, "c": 1}, 310 / 60) == ["a:100", "c:105"]
    assert "b" in (tmp_path / "summary.md").read_text() and not (tmp_path / "b.json").exists()


def test_a_run_is_taken_up_again(tmp_path: Path) -> None:
    wrong: dict[str, Result] = {"a": {"error": "died"}, "b": {}, "c": {"incomplete": "late", "rows": []}}
    takes = {"a": 1.0, "b": 1.0, "c": 1.0}
    assert len(plan(tmp_path, takes, 5, wrong)) == 3
    # Only what holds an error is run again, and has all the time.
    assert plan(tmp_path, takes, 110 / 60) == ["a:100"]
    assert plan(tmp_path, takes, 5) == []
    assert plan(tmp_path, takes, 110 / 60, {"c": {"left_out": ["one"]}}, again=True) == ["c:100"]
    assert plan(tmp_path, takes, 110 / 60, {"c": {"left_out": []}}, again=True) == ["c:100"]
    assert plan(tmp_path, takes, 5, again=True) == []


@pytest.mark.parametrize(
    ("left", "rerun"),
    [
        ({"rows": []}, False),
        ({"failed": [], "left_out": []}, False),
        ({"failed": ["one"]}, True),
        ({"incomplete": "late"}, True),
        ({"left_out": ["one"]}, True),
        ({"commit": "that"}, True),
    ],
    ids=["rows", "nothing-wrong", "failed", "incomplete", "left-out", "of-another-commit"],
)
def test_what_again_runs_again(left: Result, rerun: bool, tmp_path: Path) -> None:
    assert plan(tmp_path, {"a": 1.0}, 110 / 60, {"a": left}) == ["a:100"]
    assert plan(tmp_path, {"a": 1.0}, 110 / 60) == []
    assert plan(tmp_path, {"a": 1.0}, 110 / 60, again=True) == (["a:100"] if rerun else [])


def test_results_of_another_commit_are_labelled(tmp_path: Path) -> None:
    """What was done stays done; the environment is of the run that writes the summary."""
    assert plan(tmp_path, {"environment": 1.0, "a": 1.0}, 5, commit="0" * 40) == ["environment:145", "a:289"]
    assert plan(tmp_path, {"environment": 1.0, "a": 1.0}, 110 / 60, commit="1" * 40) == ["environment:100"]
    lines = (tmp_path / "summary.md").read_text().splitlines()
    assert f"commit {'1' * 40}" in lines
    ends = {line.split()[0]: line.split()[-1] for line in lines if line.startswith(("environment ", "a "))}
    assert ends == {"environment": "1" * 10, "a": "0" * 10}
    # No time for it: none is better than another run's.
    assert plan(tmp_path, {"environment": 1.0, "a": 1.0}, 15 / 60) == []
    assert "commit unknown" in (tmp_path / "summary.md").read_text()


def script(text: str) -> Callable[[Stage, Path, float], list[str]]:
    return lambda stage, folder, seconds: [sys.executable, "-S", "-c", text, str(folder), stage.name]


WRITE = "import sys, os, signal, time\nfolder, name = sys.argv[1:]\n"
#: Of a process that did not live to write its file.
LEFT: Result = {"commit": "this", "log": ""}


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("open(f'{folder}/{name}.json', 'w').write('{\"rows\": [1]}')", {"rows": [1]}),
        (
            "[open(f'{folder}/{n}', 'w').write('{\"rows\": [3]}') for n in (f'.{name}.partial', f'{name}.json')]",
            {"rows": [3]},
        ),
        ("print('what happened'); sys.exit(3)", LEFT | {"error": "ended with exit code 3", "log": "what happened\n"}),
        ("os.kill(os.getpid(), signal.SIGSEGV)", LEFT | {"error": "ended with exit code -11"}),
        ("time.sleep(60)", LEFT | {"error": "stopped after 5 s"}),
        (
            "open(f'{folder}/.{name}.partial', 'w').write('{\"rows\": [2]}'); time.sleep(60)",
            LEFT | {"rows": [2], "incomplete": "stopped after 5 s"},
        ),
        (
            "open(f'{folder}/.{name}.partial', 'w').write('{\"rows\": [2]}'); sys.exit(1)",
            LEFT | {"rows": [2], "error": "ended with exit code 1"},
        ),
    ],
    ids=["good", "good-twice", "exit", "crash", "slow", "slow-with-rows", "exit-with-rows"],
)
def test_what_is_left_of_a_process(text: str, wanted: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Long enough for Python to start on a busy machine.
    monkeypatch.setattr(gpu, "_GRACE", 5.4 if "sleep" in text else 60.0)
    monkeypatch.setattr(gpu, "commit", lambda: "this")
    stage = Stage("one", 1, "none:none")
    begin = time.monotonic()
    gpu.in_process(stage, tmp_path, 0.05, script(WRITE + text))
    assert gpu.read(tmp_path, "one") == wanted
    assert time.monotonic() - begin < 55 and not (tmp_path / ".one.partial").exists()


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="processes are found in /proc")
@pytest.mark.parametrize(
    "end", ["time.sleep(60)", "os.kill(os.getpid(), signal.SIGSEGV)", ""], ids=["slow", "crash", "good"]
)
def test_nothing_outlives_a_stage(end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither what has a session of its own, as pytest and the sanitizer do, nor what that one started."""
    monkeypatch.setattr(gpu, "_GRACE", 5.4 if "sleep" in end else 60.0)
    child = "import os, subprocess, sys; p = subprocess.Popen(['sleep', '60'], start_new_session=True); print(p.pid)"
    start = f"""import subprocess
child = subprocess.Popen([sys.executable, "-S", "-c", {child + "; sys.stdout.close(); p.wait()"!r}],
                         stdout=subprocess.PIPE, start_new_session=True)
pids = [child.pid, int(child.stdout.readline())]
open(f"{{folder}}/pids.json", "w").write(str(pids))
"""
    gpu.in_process(Stage("one", 1, "none:none"), tmp_path, 0.05, script(WRITE + start + end))
    pids = json.loads((tmp_path / "pids.json").read_text())
    # One that was killed takes a moment to end.
    late = time.monotonic() + 3
    while any(runs(pid) for pid in pids) and time.monotonic() < late:
        time.sleep(0.01)
    assert len(pids) == 2 and not [pid for pid in pids if runs(pid)]


def runs(pid: int) -> bool:
    """Whether a process is there; one that has ended and that nobody asked after is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_every_stage_exists() -> None:
    for stage in gpu.STAGES:
        module, name = stage.function.split(":")
        assert callable(getattr(__import__(module, fromlist=[name]), name))
    assert [stage.name for stage in gpu.STAGES if stage.every_run] == ["environment"]
    assert sum(stage.share for stage in gpu.STAGES) <= 480
    assert gpu.worker(gpu.STAGES[0], Path("/x"), 3.0)[1:] == ["-m", "bench.gpu_worker", "environment", "/x", "3.0"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so_in_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench", "gpu", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and not (tmp_path / "out").exists()
    assert done.stderr == "Error: no CUDA or ROCm device is here; this command measures one\n"
