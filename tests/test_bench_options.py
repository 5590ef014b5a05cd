"""The command lines of ``python -m bench``: what they take, and that what they refuse is one line and exit code 2."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from models import exit_code
from test_cli import Captured

from bench import audit_tables, coldstart, matmul, rounding
from bench.__main__ import main


def run(*arguments: object) -> int:
    """The command's exit code."""
    return exit_code(main, *arguments)


#: Every name that the rest of the product takes, and spaces; twice the same is once.
SPELLINGS = ("w4a16-g128, W8A8 ,w4a16", ("w4a16", "w8a8"))


def test_schemes_of_the_audit(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    asked: list[object] = []
    monkeypatch.setattr(audit_tables, "run", lambda *arguments: (asked.append(arguments), ("text", {}))[1])
    assert run("audit", "--schemes", SPELLINGS[0], "--models", "SmolLM2-135M, Llama-3-8B") == 0
    assert run("audit", "--schemes", "w4a16-g128-2:4", "--arch", "all") == 0
    small = (("sm_90",), ("SmolLM2-135M", "Llama-3-8B"), SPELLINGS[1], None)
    assert asked[0] == small and asked[1][2] == ("w4a16-2:4",)
    assert "sm_80" in asked[1][0] and capsys.readouterr().err == ""


def test_schemes_of_the_cold_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[object] = []
    monkeypatch.setattr(coldstart, "measure", lambda device, schemes: asked.append(schemes) or [])
    file = tmp_path / "new" / "c.json"
    assert run("coldstart", "--schemes", SPELLINGS[0], "--rounds", 2, "--json", file) == 0
    assert asked == [SPELLINGS[1]] * 2 and json.loads(file.read_text())["rows"] == []
    assert os.listdir(file.parent) == ["c.json"]


def test_lists_of_the_products(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[matmul.Settings] = []
    monkeypatch.setattr(matmul, "measure", lambda layers, settings: asked.append(settings) or [])
    options = ("--tokens", "1, 7", "--dtype", "bfloat16, float32", "--device", "cpu", "--no-peers", "--seconds", 0)
    assert run("matmul", "--schemes", SPELLINGS[0], *options) == 0
    assert [one.dtype for one in asked] == [torch.bfloat16, torch.float32]
    assert asked[0].schemes == SPELLINGS[1] and asked[0].tokens == (1, 7) and asked[0].device == torch.device("cpu")


def test_a_cold_start_that_fails_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    def fails(*_: object) -> object:
        raise RuntimeError("w8a8 cpu: a trace\nof two lines")

    monkeypatch.setattr(coldstart, "measure", fails)
    assert run("coldstart") == 1
    assert capsys.readouterr().err == "Error: w8a8 cpu: a trace of two lines\n"


BAD = [
    ("audit --schemes w3a16", "scheme 'w3a16' does not exist"),
    ("audit --schemes ,", "--schemes': got ',', wanted values separated by commas, none of them empty"),
    ("audit --models GPT-9", "there is no model 'GPT-9' here, but: SmolLM2-135M"),
    ("audit --arch sm_1", "'sm_1' is not one of 'sm_90'"),
    ("audit --dump /proc/x", "'--dump': cannot write '/proc/x'"),
    ("audit --dump {file}/x", "'--dump': cannot write"),
    ("audit --json /proc/x/y.json", "'--json': cannot write '/proc/x/y.json'"),
    ("coldstart --schemes w9a9", "scheme 'w9a9' does not exist"),
    ("coldstart --schemes w4a16-2:4", "w4a16-2:4 is not measured here"),
    ("decode --rounds 0", "0 is not in the range x>=1"),
    ("decode --tokens 0", "0 is not in the range x>=1"),
    ("linear --rounds 0", "0 is not in the range x>=1"),
    ("linear --seconds -1", "-1.0 is not in the range x>=0"),
    ("linear --seconds inf", "got 'inf', wanted a finite number"),
    ("sparse --seconds nan", "got 'nan', wanted a finite number"),
    ("matmul --seconds -1", "-1.0 is not in the range x>=0"),
    ("matmul --device foo", "there is no device 'foo' to measure on here, but: cpu"),
    ("matmul --device mps", "there is no device 'mps' to measure on here, but: cpu"),
    ("matmul --device cuda:99", "there is no device 'cuda:99' to measure on here, but: cpu"),
    ("matmul --tokens 1,zero", "got 'zero', wanted a whole number from 1 to"),
    ("matmul --tokens 0", "got '0', wanted a whole number from 1 to"),
    ("matmul --dtype float8", "there is no dtype 'float8' here, but: float16"),
    ("matmul --threads 0", "0 is not in the range"),
    ("matmul --threads 99999999999", "99999999999 is not in the range"),
    ("matmul --peer cutlass", "there is no peer 'cutlass'"),
    ("matmul --plots /proc/x", "'--plots': cannot write '/proc/x'"),
    ("rounding --seeds a", "got 'a', wanted a whole number from 0 to"),
    ("rounding --seeds 1,-2", "got '-2', wanted a whole number from 0 to"),
    ("rounding --schemes w4a16-block64", "w4a16-block64 is not measured here"),
    ("gpu --out {file}", "is a file"),
    ("gpu --out x --minutes nan", "got 'nan', wanted a finite number"),
    ("nothing", "No such command 'nothing'"),
]


@pytest.mark.parametrize(("line", "wanted"), BAD, ids=[line.replace("/", "|") for line, _ in BAD])
def test_bad_input_is_one_line_and_exit_code_2(line: str, wanted: str, tmp_path: Path, capsys: Captured) -> None:
    file = tmp_path / "file"
    file.touch()
    assert run(*line.format(file=file).split()) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("Error: ") and printed.err.count("\n") == 1
    assert wanted in printed.err


@pytest.mark.parametrize("command", ["audit", "coldstart", "matmul", "rounding"])
def test_an_empty_list_is_not_everything(command: str, capsys: Captured) -> None:
    assert run(command, "--schemes", "") == 2
    assert "got '', wanted values separated by commas" in capsys.readouterr().err


def test_without_bitsandbytes_there_is_no_nf4(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert run("decode") == 2
    assert "--no-nf4" in capsys.readouterr().err


def test_a_folder_for_a_gpu_is_tried_first(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert run("gpu", "--out", "/proc/x") == 2
    assert "cannot write '/proc/x'" in capsys.readouterr().err


def test_every_dense_scheme_can_be_rounded() -> None:
    """What ``rounding --schemes`` takes beside its default: each gives codes and scales with the search and without."""
    from qlinear.format import DENSE

    for fmt in DENSE.values():
        layer = torch.nn.Linear(128, 64, dtype=torch.bfloat16)
        before = layer.weight.clone()
        for search in (False, True):
            rounding._round({layer: before}, fmt, search)
            assert layer.weight.isfinite().all() and not torch.equal(layer.weight, before), fmt.name


def test_help_is_no_error(capsys: Captured) -> None:
    assert run() == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("audit", "coldstart", "matmul"))
