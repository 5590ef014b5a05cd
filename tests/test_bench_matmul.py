"""``python -m bench matmul``: what it refuses, what it counts, and that nothing wrong gets a time."""

from __future__ import annotations

import gc
import importlib.util
import itertools
import subprocess
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from models import ROOT

from bench import matmul, peers, plots, sides, timing
from bench.sides import Side, Unavailable
from qlinear.format import FORMATS
from qlinear.kernels import graphs
from qlinear.machines import MACHINES

LAYER = ("none", "square", 64, 96)
CPU = torch.device("cpu")


def settings(**changes: object) -> matmul.Settings:
    values = {"device": CPU, "dtype": torch.bfloat16, "tokens": (1, 3), "schemes": ("w4a16-g32", "w8a8")}
    return matmul.Settings(**(values | {"seconds": 0.0, "note": lambda text: None} | changes))


def test_a_row_for_every_scheme_and_number_of_tokens() -> None:
    saved: list[int] = []
    rows = matmul.measure([LAYER], settings(save=lambda rows: saved.append(len(rows))))
    assert [(row["scheme"], row["m"]) for row in rows] == [
        (scheme, m) for m in (1, 3) for scheme in ("w4a16-g32", "w8a8")
    ]
    # After every number of tokens.
    assert saved == [2, 4]
    for row in rows:
        assert set(row["float_us"]) == {"bfloat16", "float32"} and row["us"] > 0 and row["copies"] >= 2
        assert row["tflops"] == pytest.approx(2e-6 * row["m"] * 64 * 96 / row["us"])
        assert row["gbps"] == pytest.approx(row["packed_bytes"] / row["us"] / 1e3)
        assert "of_floor" not in row
    text = plots.show(rows)
    assert text.count("64 x 96") == 4 and "x bfloat16" in text


def test_a_wrong_result_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sides.ops, "linear", lambda x, *rest: torch.zeros(len(x), 64))
    notes: list[str] = []
    rows = matmul.measure([LAYER], settings(tokens=(2,), schemes=("w8a16",), note=notes.append))
    assert rows[0]["us"] is None and "wrong: relative error 1.00" in rows[0]["error"]
    assert any("a wrong result gets no time" in note for note in notes)
    assert "wrong" in plots.show(rows)


def test_peers_that_are_wrong_or_slow_or_absent_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(weight: torch.Tensor, *rest: object) -> Side:
        raise ImportError("No module named 'absent'")

    def refuses(x: torch.Tensor) -> torch.Tensor:
        raise Unavailable("not today")

    def exact(weight: torch.Tensor, *rest: object) -> Side:
        return Side([lambda x: x @ weight.t()])

    def slow(weight: torch.Tensor, *rest: object) -> Side:
        return Side([lambda x: x @ weight.t()], operator="aten::a_fast_one")

    made = {
        "absent": absent,
        "exact": exact,
        "slow": slow,
        "wrong": lambda weight, *rest: Side([lambda x: x @ weight.flip(0).t()]),
        "broken": lambda weight, *rest: Side([lambda x: 1 / 0]),
        "refuses": lambda weight, *rest: Side([lambda x: x], refuses),
    }
    monkeypatch.setattr(peers, "PEERS", made)
    notes: list[str] = []
    row = matmul.measure([LAYER], settings(tokens=(2,), schemes=("w8a16",), peers=tuple(made), note=notes.append))[0]
    assert set(row["peers_us"]) == {"exact"} and "x exact" in plots.show([row])
    assert "w8a16 absent: not installed (No module named 'absent')" in notes
    skipped = row["peers_skipped"]
    assert skipped["slow"] == "did not run aten::a_fast_one, its fast path"
    assert skipped["wrong"].startswith("wrong: relative error 1.")
    assert skipped["broken"].startswith("ZeroDivisionError") and skipped["refuses"] == "not today"
    assert len(notes) == len(set(notes))


@pytest.mark.parametrize("name", [name for name in peers.PEERS if name != "torchao-compiled"])
@pytest.mark.parametrize("scheme", ["w4a16", "w8a16", "w8a8"])
def test_every_peer_agrees_or_says_why_not(name: str, scheme: str) -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(1)).bfloat16()
    fmt = FORMATS[scheme]
    with torch.no_grad():
        try:
            side = peers.make(name, weight, fmt, 2)
        except Unavailable as reason:
            assert str(reason)
            return
        wanted = x.double() @ weight.double().t()
        for call in side.calls:
            prepared = side.prepare(x)
            y = side.finish(call(prepared), prepared)
            assert float((y.double() - wanted).norm() / wanted.norm()) <= peers.bound(fmt, name)
    assert len(side.calls) == 2


def test_running_out_of_memory_loses_no_row_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    timed = matmul._times

    def times(x: torch.Tensor, *rest: Any) -> dict[str, float]:
        if len(x) == 3:
            raise torch.OutOfMemoryError
        return timed(x, *rest)

    monkeypatch.setattr(matmul, "_times", times)
    rows = matmul.measure([LAYER, ("none", "next", 64, 96)], settings())
    assert [(row["layer"], row["m"]) for row in rows] == [(name, 1) for name in ("square", "next") for _ in range(2)]


def test_out_of_time() -> None:
    notes: list[str] = []
    assert matmul.measure([LAYER], settings(deadline=0.0, note=notes.append)) == []
    assert notes == ["out of time before none square"]


def test_the_floor_is_memory_for_few_tokens_and_products_for_many() -> None:
    h200 = MACHINES["H200"]
    size = FORMATS["w4a16"].weight_bytes(8192, 8192)
    few = matmul.floor_seconds(h200, size, 1, 8192, 8192, 2, integer=False)
    assert few == pytest.approx((size + 2 * 8192 * 2) / 4.32e12)
    many = matmul.floor_seconds(h200, size, 4096, 8192, 8192, 2, integer=False)
    assert many == pytest.approx(2 * 4096 * 8192 * 8192 / h200.fp16_flops)
    assert matmul.floor_seconds(h200, size, 4096, 8192, 8192, 2, integer=True) < many


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("NVIDIA H200", "H200"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA A100-SXM4-80GB", "A100"),
    ],
)
def test_gpus_are_found_by_name(name: str, found: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    machine = matmul.machine_of(torch.device("cuda"))
    assert (machine and machine.name) == found
    assert matmul.machine_of(CPU) is None


def test_jobs_of_the_command_line() -> None:
    jobs = matmul.jobs(("SmolLM2-135M",), ("w4a16",), (1, 7), ("bfloat16", "float32"), CPU, 0.1, ())
    assert [job.dtype for _, job in jobs] == [torch.bfloat16, torch.float32]
    layers, first = jobs[0]
    assert len(layers) == 4 and first.schemes == ("w4a16",) and tuple(first.tokens) == (1, 7)
    ((layers, by_default),) = matmul.jobs(None, None, None, ("bfloat16",), CPU, 0.1, ())
    assert ("Llama-3-8B", "q,o", 4096, 4096) in layers and by_default.schemes == matmul.SCHEMES
    assert tuple(by_default.tokens) == matmul.CPU_TOKENS


def test_a_bad_option_is_one_line() -> None:
    command = [sys.executable, "-m", "bench", "matmul", "--models", "GPT-9"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2 and result.stdout == ""
    assert "there is no model 'GPT-9' here, but: SmolLM2-135M" in result.stderr and result.stderr.count("\n") == 1


def test_turns_are_many_and_short() -> None:
    calls: list[str] = []
    times = timing.in_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 0.0, least=3)
    assert set(times) == {"a", "b"}
    turns = [name for name, _ in itertools.groupby(calls[4:])]
    assert turns == ["a", "b"] * 3


class FakeGraph:
    """A CUDA graph that remembers how often it was replayed."""

    made: ClassVar[list[FakeGraph]] = []

    def __init__(self) -> None:
        self.replays, self.ended = 0, False
        self.made.append(self)

    def capture_begin(self) -> None:
        assert not gc.isenabled()

    def capture_end(self) -> None:
        self.ended = True

    def replay(self) -> None:
        self.replays += 1


class FakeEvent:
    def __init__(self, enable_timing: bool) -> None:
        self.at = 0

    def record(self) -> None:
        self.at = sum(graph.replays for graph in FakeGraph.made)

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: FakeEvent) -> float:
        """Every replay takes 64 us."""
        return (end.at - self.at) * 0.064


def test_replays_are_timed_by_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The arithmetic around a device's clock and graphs, on ones that are made up."""
    monkeypatch.setattr(FakeGraph, "made", [])
    monkeypatch.setattr(graphs, "_capture_stream", lambda index: SimpleNamespace(wait_stream=lambda other: None))
    for name, value in {
        "CUDAGraph": FakeGraph,
        "Event": FakeEvent,
        "stream": lambda stream: nullcontext(),
        "device": lambda device: nullcontext(),
        "synchronize": lambda device: None,
        "current_stream": lambda device: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    calls: list[int] = []

    def refuses() -> None:
        if not gc.isenabled():
            raise RuntimeError("not while a graph is captured")

    sides = {"ours": [partial(calls.append, copy) for copy in range(5)], "refuses": [refuses]}
    with pytest.warns(UserWarning, match="refuses cannot be captured"):
        times = graphs.replayed(sides, 3, 0.0, torch.device("cuda", 0))
    # 32 calls at least, in whole turns of the five copies: 35 in a graph.
    assert times == {"ours": pytest.approx(64e-6 / 35)} and gc.isenabled()
    assert calls[-35:] == [0, 1, 2, 3, 4] * 7 and FakeGraph.made[0].replays == 5
    assert all(graph.ended for graph in FakeGraph.made)


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed")
def test_pictures(tmp_path: Path) -> None:
    rows = [
        {
            "scheme": s,
            "dtype": "float16",
            "n": 64,
            "k": 64,
            "m": m,
            "us": 2.0,
            "of_floor": 0.5,
            "float_us": {"float16": 3},
        }
        for s in ("w4a16", "w8a8")
        for m in (1, 16)
    ]
    assert [p.name for p in plots.plot(rows, tmp_path)] == ["speedup.png", "floor.png"]
    assert all((tmp_path / name).stat().st_size > 1000 for name in ("speedup.png", "floor.png"))
    assert plots.plot([row | {"us": None} for row in rows], tmp_path) == []
