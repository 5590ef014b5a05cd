"""Every stage of ``python -m bench gpu`` without a GPU, on tiny sizes."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import (
    gpu,
    gpu_checks,
    gpu_model,
    gpu_ptx,
    gpu_sparse,
    gpu_speed,
    gpu_summary,
    gpu_tools,
    gpu_tuned,
    gpu_worker,
    matmul,
)
from bench.gpu import Stage
from bench.gpu_job import Job, Result, Sizes
from bench.gpu_warm import Case, distinct, run_case, warm
from qlinear.format import FORMATS
from qlinear.kernels import tuned
from qlinear.kernels.configs import Config
from qlinear.kernels.gauge import blank

TINY = Sizes(
    schemes=("w4a16", "w8a8"),
    dtypes=(torch.bfloat16, torch.float16),
    tokens=(1, 17),
    odd=(35, 264),
    even=(64, 128),
    repeats=1,
    many_tokens=(),
    bench_schemes=("w4a16", "w8a8"),
    bench_tokens=(1, 3),
    layers=(("none", "odd", 64, 96),),
    seconds=0.0,
    launch=(64, 96),
    tuned_schemes=("w4a16",),
    tuned_layers=((64, 128),),
    tuned_tokens=(3, 129),
    model=(32, 48, 4, 2, 8),
    model_schemes=("w4a16-g32", "w8a8"),
    compile_backend="eager",
)


def job(device: torch.device, **changes: Any) -> Job:
    return Job(device, **{"sizes": TINY, **changes})


def test_a_worker_names_the_commit_and_leaves_all_twice(
    tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it saved is there for one that crashes after its file is written, while it ends."""
    monkeypatch.setattr(gpu, "STAGES", (Stage("one", 1, "bench.gpu_tools:environment"),))
    monkeypatch.setattr(gpu_worker, "commit", lambda: "this")
    gpu_worker.work(device, "one", tmp_path, 9.0)
    found = json.loads((tmp_path / "one.json").read_text())
    assert found["commit"] == "this" and found["seconds"] >= 0 and found["versions"]
    assert json.loads((tmp_path / ".one.partial").read_text()) == found


def test_environment(device: torch.device) -> None:
    found = gpu_tools.environment(job(device))
    assert len(found["commit"]) == 40 and found["versions"]["torch"] == torch.__version__
    assert json.dumps(found)


def test_numerics(device: torch.device) -> None:
    saved: list[int] = []
    result = gpu_checks.numerics(job(device, save=lambda r: saved.append(len(r["rows"]))))
    assert result["failed"] == [] and 0 < result["worst_of_bound"] <= 1
    assert {(r["scheme"], r["dtype"], r["m"], r["n"]) for r in result["rows"]} == {
        (scheme, dtype, m, n)
        for scheme in TINY.schemes
        for dtype, n in (("bfloat16", 35), ("float16", 35), ("bfloat16", 64))
        for m in TINY.tokens
    }
    assert saved == sorted(saved) and len(saved) == 6 and json.dumps(result)


def test_numerics_find_what_is_not_written_and_what_raises(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qlinear.kernels import matmul as kernels

    def nothing(x: torch.Tensor, packed: object, *rest: object) -> torch.Tensor:
        if len(x) > 1:
            raise RuntimeError("an illegal memory access was encountered")
        return torch.empty(len(x), 35, dtype=x.dtype)

    monkeypatch.setattr(kernels, "matmul", nothing)
    sizes = Sizes(
        schemes=("w4a16",), dtypes=(torch.float16,), tokens=(1, 2), odd=(35, 128), even=(35, 128), bench_schemes=()
    )
    failed = gpu_checks.numerics(job(device, sizes=sizes))["failed"]
    assert "w4a16 float16 1x35x128 kernel: 35 numbers not finite" in failed[0]
    assert "RuntimeError: an illegal memory access" in failed[1]


def test_numerics_out_of_time(device: torch.device) -> None:
    result = gpu_checks.numerics(job(device, deadline=time.monotonic()))
    assert result["rows"] == [] and len(result["left_out"]) == 6


def test_determinism(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    # The interpreter takes half a minute for the large ones.
    ends = gpu_checks.bucket_ends()[:6]
    monkeypatch.setattr(gpu_checks, "bucket_ends", lambda many: ends)
    sizes = Sizes(schemes=("w4a16",), dtypes=(torch.float16,), odd=(35, 128), repeats=1, many_tokens=())
    result = gpu_checks.determinism(job(device, sizes=sizes))
    assert result["failed"] == [] and [(r["few"], r["many"]) for r in result["rows"]] == ends


def test_ptx(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    result = gpu_ptx.ptx(job(device))
    assert result["failed"] == [] and {row["packing"] for row in result["rows"]} == {
        "planar4",
        "planar8",
        "planar_e4m3",
    }
    monkeypatch.setattr(gpu_ptx, "decode", lambda *args: torch.zeros(1, 65536))
    assert "numbers are wrong" in gpu_ptx.ptx(job(device))["failed"][0]


def test_benchmark(device: torch.device) -> None:
    saved: list[int] = []
    result = gpu_speed.benchmark(job(device, save=lambda r: saved.append(len(r["rows"]))))
    assert result["failed"] == [] and len(result["rows"]) == 8 and saved == [2, 4, 6, 8]
    assert {row["dtype"] for row in result["rows"]} == {"bfloat16", "float16"}


def test_a_benchmark_that_is_stopped_leaves_rows_and_what_is_wrong_in_them(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed = matmul._times

    def times(x: torch.Tensor, entries: dict[str, Any], *rest: Any) -> dict[str, float]:
        if len(x) == 3:
            raise KeyboardInterrupt
        return timed(x, {key: entry for key, entry in entries.items() if key != "w8a8"}, *rest)

    monkeypatch.setattr(matmul, "_times", times)
    saved: list[Result] = []
    with pytest.raises(KeyboardInterrupt):
        gpu_speed.benchmark(job(device, save=saved.append))
    (kept,) = saved
    assert [(row["scheme"], row["m"], row["us"] is None) for row in kept["rows"]] == [
        ("w4a16", 1, False),
        ("w8a8", 1, True),
    ]
    assert kept["failed"] == ["w8a8 bfloat16 1x64x96: could not be timed"]
    assert kept["left_out"] == ["bfloat16 3x64x96", "float16 1x64x96", "float16 3x64x96"]


def test_launch(device: torch.device) -> None:
    result = gpu_speed.launch(job(device))
    assert {row["side"] for row in result["rows"]} >= {"F.linear bfloat16", "QLinear w4a16", "operator w4a16"}
    assert result["arguments"]["passed"] >= 10 and all(row["cpu_us"] > 0 for row in result["rows"])


def test_tuned(device: torch.device, tmp_path: Path) -> None:
    result = gpu_tuned.tuned(job(device, folder=tmp_path))
    row, crossover = result["rows"][0], result["rows"][-1]
    assert result["failed"] == [] and row["chosen"] in row["us"] and row["gain"] >= 1.0
    assert len(row["us"]) + len(row["left_out"]) >= 5 and crossover["fused_tokens"] % 128 == 0
    # What is written is a table as it is installed.
    table = tuned.read(tmp_path / result["table"])
    assert len(table.configs) == 2 and len(table.crossovers) == 1 and not table.partial
    out_of_time = gpu_tuned.tuned(job(device, folder=tmp_path, deadline=time.monotonic()))
    assert out_of_time["rows"] == [] and len(out_of_time["left_out"]) == 3


def test_models(device: torch.device) -> None:
    result = gpu_model.models(job(device))
    assert result["failed"] == [] and [row["model"] for row in result["rows"]] == ["bfloat16", *TINY.model_schemes]
    assert set(result["compiled"]) == set(TINY.model_schemes) == set(result["errors"])


def test_warming_up_launches_the_kernels(device: torch.device) -> None:
    assert run_case(Case("w4a16-asym", "float16", 2, 130, 200, bias=True), device) is None
    problem = run_case(Case("w4a16", "float64", 2, 64, 128), device)
    assert problem is not None and "float64" in problem and "\n" not in problem
    weight = blank(FORMATS["w4a16-g32-asym"], 130, 200, torch.float16, device)
    assert weight.out_features == 130 and weight.weight.shape[0] == weight.scale.shape[0] == 3
    for scheme, layout in (("w4a16-2:4", "triton"), ("w8a16-block64", "triton"), ("w16a16-unstructured", "triton")):
        assert run_case(Case(scheme, "float16", 2, 130, 200, layout=layout), device) is None
    assert warm([Case("w4a16", "float16", 1, 64, 64)], job(torch.device("cpu"), processes=4), 1.0) == []


def test_every_kernel_is_compiled_once(device: torch.device) -> None:
    cases = [Case("w4a16", "float16", m, n, 4096) for m in (1, 5, 8, 12, 256) for n in (4096, 4112, 1001)]
    kept = distinct(cases, device)
    assert {(case.m, case.n) for case in kept} >= {(1, 4096), (1, 1001), (12, 4096), (256, 4096)}
    assert not {(case.m, case.n) for case in kept} & {(5, 4096), (8, 4112)}
    both = ("triton", "mma.sp")
    sparse = [Case("w4a16-2:4", "float16", m, 64, 128, layout=name) for m in (1, 8, 16) for name in both]
    assert [(case.m, case.layout) for case in distinct(sparse, device)] == [(m, name) for m in (1, 16) for name in both]
    config = distinct([Case("w4a16", "float16", 1, 64, 128, config=c) for c in CONFIGS], device)
    assert [case.config for case in config] == [CONFIGS[0], CONFIGS[2]]


#: The first two differ in what is not compiled in.
CONFIGS = [Config(16, 64, 4, 2), Config(16, 64, 4, 2, split_k=3), Config(16, 64, 4, 3)]

JUNIT = """<testsuites><testsuite><testcase classname="tests.a" name="good" time="1.5"/>
<testcase classname="tests.a" name="bad" time="0.1"><failure message="1 != 2&#10;more">whole text</failure></testcase>
<testcase classname="tests.a" name="broken"><error message="no fixture">its text</error></testcase>
<testcase classname="tests.a" name="left"><skipped message="no GPU"/></testcase></testsuite></testsuites>"""


def test_reading_what_pytest_reports(tmp_path: Path) -> None:
    (tmp_path / "r.xml").write_text(JUNIT)
    found = gpu_tools.read_junit(tmp_path / "r.xml")
    assert found["counts"] == {"passed": 1, "failed": 2, "skipped": 1}
    assert found["failed"] == ["tests.a::bad: ['1 != 2']", "tests.a::broken: ['no fixture']"]
    assert found["texts"]["tests.a::bad"] == "whole text" and found["slowest"][0] == (1.5, "tests.a::good")


def test_running_pytest(device: torch.device) -> None:
    result = gpu_tools.tests(["tests/test_tables_that_is_not_there.py"], job(device))
    assert result["failed"] and result["exit_code"] != 0
    code, _, err = gpu_tools.run([sys.executable, "-S", "-c", "print(1, flush=True); import time; time.sleep(9)"], 1.0)
    assert code == -1 and "took longer than 1 s" in err
    assert gpu_tools.run(["no-such-program"], 1.0)[0] == -1


def test_a_sanitizer_that_is_not_there(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_tools, "_SANITIZER", "/no/such/tool")
    monkeypatch.setattr(gpu_tools.shutil, "which", lambda name: None)
    assert gpu_tools.sanitizer(job(device)) == {"left_out": ["compute-sanitizer is not installed"]}


def test_the_summary_shows_what_failed_and_what_was_measured(tmp_path: Path) -> None:
    row: Result = {
        "scheme": "w4a16",
        "dtype": "bfloat16",
        "n": 64,
        "k": 64,
        "m": 1,
        "us": 2.0,
        "tflops": 1.0,
        "gbps": 3.0,
    }
    row |= {"of_floor": 0.5, "float_us": {"bfloat16": 1.0}, "peers_us": {"torchao": 4.0}, "path": "Triton matmul"}
    copy = {"dtype": "float16", "m": 2048, "n": 64, "k": 96, "kept": "semi-structured", "why": "faster"}
    copy |= {"us": {"dense": 12.5, "semi-structured": 10.0}}
    results: dict[str, Result] = {
        "environment": {"commit": "abc", "devices": ["cuda:0: H200"], "versions": {"torch": "2.11"}, "nvidia_smi": "x"},
        "numerics": {"rows": [], "failed": ["w4a16 is wrong"] * 20, "incomplete": "late"},
        "benchmark": {"rows": [row, row | {"m": 256, "us": 1.1}], "notes": ["a note"], "failed": []},
        "sparse": {"rows": [], "copies": [copy, copy | {"us": {}, "kept": "dense", "why": "no cores"}]},
        "launch": {
            "rows": [{"side": "QLinear", "cpu_us": 9.0, "graph_warm_us": 2.0, "graph_cold_us": None}],
            "arguments": {"passed": 13, "compiled_in": 9},
            "n": 64,
            "k": 64,
            "int4_floor_us": 2.0,
        },
        "models": {
            "rows": [{"model": "w4a16", "us": 10.0, "of_float": 2.0}],
            "compiled": {"w4a16": {"seconds": 3.0, "difference": 0.0}},
        },
        "tuned": {
            "rows": [
                {
                    "scheme": "w4a16",
                    "m": 1,
                    "n": 2,
                    "k": 3,
                    "chosen": "a",
                    "best": "b",
                    "us": {"a": 3.0, "b": 2.0},
                    "gain": 1.5,
                }
            ]
        },
        "sanitizer": {"error": "ended with exit code 1", "log": "Device not supported"},
        "gpu_tests": {"counts": {"passed": 7, "failed": 0, "skipped": 0}, "failed": [], "slowest": []},
    }
    names = [stage.name for stage in gpu.STAGES]
    text = gpu_summary.summarize(results, names, tmp_path)
    for wanted in (
        "w4a16 is wrong",
        "and 8 more",
        "Device not supported",
        "1 held, 1 broken",
        "0.50x",
        "x torchao",
        "13 passed, 9 compiled in",
        "1.50x",
        "7 passed",
        "not run",
        "cut short",
        "a note",
        "12.5",
        "no cores",
    ):
        assert wanted in text, wanted
    assert not gpu.good(results) and gpu.good({"a": {}}, [Stage("a", 1, "")])
    assert gpu.describe(results["numerics"]) == "20 FAILED, 0 rows, late"


def test_sparse(device: torch.device) -> None:
    """Every sparse format in the layouts that this device has, against float64, and a time of each."""
    result = gpu_sparse.sparse(job(device))
    assert result["failed"] == [] and result["left_out"] == []
    wanted = {(scheme, layout) for scheme in gpu_sparse.SCHEMES for layout in gpu_sparse.layouts(scheme, job(device))}
    assert {(r["scheme"], r["layout"]) for r in result["rows"]} == wanted and len(wanted) >= 9
    assert [t["m"] for t in result["times"]] == [1, 8, 16] and json.dumps(result)
    assert [copy["dtype"] for copy in result["copies"]] == ["bfloat16", "float16"]
    assert all(us > 0 for t in result["times"] for us in t["us"].values())
    late = gpu_sparse.sparse(job(device, deadline=time.monotonic()))
    assert late["rows"] == [] and len(late["left_out"]) == 2 * len(gpu_sparse.SCHEMES) + 4
