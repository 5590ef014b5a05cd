"""The command line, end to end, as a person runs it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from models import exit_code, same_bits

import qlinear
from qlinear.cli import main
from qlinear.format import FORMATS

Captured = pytest.CaptureFixture[str]


def run(*arguments: object) -> int:
    """The command's exit code."""
    return exit_code(main, *arguments)


def test_convert_inspect_and_validate_a_folder(language_model: Path, tmp_path: Path, capsys: Captured) -> None:
    out = tmp_path / "out"
    schemes = ("--scheme", "model.layers.0*=none", "--scheme", "*=w4a16-g32")
    assert run("convert", language_model, out, *schemes, "--json", tmp_path / "c.json") == 0
    printed = capsys.readouterr()
    assert f"wrote {out}" in printed.out and "w4a16-g32" in printed.out
    data = json.loads((tmp_path / "c.json").read_text())
    written = {row["name"]: row["scheme"] for row in data["parameters"]}
    assert written["model.layers.0.mlp.down_proj.weight"] is None
    assert written["model.layers.1.mlp.down_proj.weight"] == "w4a16-g32"
    assert (out / "tokenizer.json").is_file()

    assert run("inspect", out, "--json", tmp_path / "i.json") == 0
    assert json.loads((tmp_path / "i.json").read_text())["bytes_after"] == data["bytes_after"]
    assert "7 of 20 quantized" in capsys.readouterr().out

    gate = ("--tokens", 64, "--bound", "kl=5", "--json", tmp_path / "v.json")
    assert run("validate", out, "--reference", language_model, *gate) == 0
    report = json.loads((tmp_path / "v.json").read_text())
    assert report["passed"] and len(report["layers"]) == 7 and report["kl"] < 5
    assert "top-1 agreement" in capsys.readouterr().out


def test_convert_writes_what_the_library_would(language_model: Path, tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    assert run("convert", language_model, tmp_path / "out", "--scheme", "w8a16") == 0
    here = qlinear.convert(LlamaForCausalLM.from_pretrained(language_model, dtype=torch.bfloat16), "w8a16").state_dict()
    there = qlinear.load(tmp_path / "out").state_dict()
    assert here.keys() == there.keys() and all(same_bits(here[k], there[k]) for k in here)


def test_validate_can_convert_and_gate(language_model: Path, tmp_path: Path, capsys: Captured) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the not of a is to be in an or " * 20)
    base = ("validate", language_model, "--scheme", "w8a16", "--text", text, "--tokens", 32)
    assert run(*base, "--bound", "snr_db=20") == 0
    assert run(*base, "--bound", "snr_db=200", "--json", tmp_path / "v.json") == 1
    assert "FAILED model.layers.0.self_attn.q_proj: snr_db" in capsys.readouterr().out
    assert json.loads((tmp_path / "v.json").read_text())["passed"] is False


def test_doctor_checks_every_scheme(tmp_path: Path, capsys: Captured) -> None:
    assert run("doctor", "--json", tmp_path / "d.json") == 0
    printed = capsys.readouterr().out
    data = json.loads((tmp_path / "d.json").read_text())
    assert data["ok"] and {check["scheme"] for check in data["schemes"]} == set(FORMATS)
    assert data["versions"]["torch"] == torch.__version__
    assert all(check["reason"] and check["relative_error"] <= check["bound"] for check in data["schemes"])
    assert ("aten::_int_mm" in printed and "AVX" in printed) or "cpu:" in printed


def test_doctor_fails_on_a_wrong_result(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    from qlinear import reference

    right = reference.matmul
    monkeypatch.setattr(reference, "matmul", lambda x, packed: right(x, packed) * 1.1)
    assert run("doctor") == 1
    assert "ABOVE" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["convert", "nowhere/at/all", "{tmp}/o", "--scheme", "w8a16"], "nowhere/at/all"),
        (["convert", "{folder}", "{tmp}/o", "--scheme", "w3a16"], "w4a16-g64"),
        (["convert", "{folder}", "{tmp}/o", "--scheme", "nothing*=w8a16"], "matches no linear layer"),
        (["convert", "{folder}", "{folder}", "--scheme", "w8a16"], "--overwrite"),
        (["convert", "{folder}", "{tmp}/o", "--scheme", "w8a16", "--device", "cuda:7"], "--device cuda:7"),
        (["convert", "{folder}", "{tmp}/o", "--scheme", "w8a16", "--device", "foo"], "--device foo: there is no such"),
        (["prune", "{folder}", "{tmp}/o", "--device", "foo"], "--device foo: there is no such"),
        (["inspect", "{tmp}/missing"], "missing"),
        (["validate", "{folder}"], "--reference"),
        (["validate", "{folder}", "--scheme", "w8a16", "--bound", "kl"], "METRIC=NUMBER"),
        (["validate", "{folder}", "--scheme", "w8a16", "--tokens", "32", "--bound", "speed=1"], "not a metric"),
    ],
    ids=[
        "no-model",
        "no-scheme",
        "no-match",
        "exists",
        "no-gpu",
        "no-device",
        "prune-no-device",
        "inspect-missing",
        "validate-what",
        "bad-bound",
        "no-metric",
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str], wanted: str, language_model: Path, tmp_path: Path, capsys: Captured
) -> None:
    assert run(*(a.format(tmp=tmp_path, folder=language_model) for a in arguments)) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert error[-1].startswith("qlinear: ") and wanted in error[-1]
    assert not any("Traceback" in line for line in error)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("converted", [False, True], ids=["float", "converted"])
def test_a_damaged_file_is_one_line_too(
    converted: bool, language_model: Path, tmp_path: Path, capsys: Captured
) -> None:
    folder = tmp_path / "model"
    if converted:
        assert run("convert", str(language_model), str(folder), "--scheme", "w8a16") == 0
    else:
        shutil.copytree(language_model, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    capsys.readouterr()
    assert run("inspect", str(folder)) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("qlinear: ")


def test_usage_errors_are_exit_code_2(capsys: Captured) -> None:
    assert run("convert") == 2
    assert run("nonsense") == 2
    assert "No such command 'nonsense'" in capsys.readouterr().err


def test_help_and_version(capsys: Captured) -> None:
    assert run("--help") == 0
    printed = capsys.readouterr().out
    assert all(command in printed for command in ("demo", "convert", "doctor", "inspect", "validate"))
    assert run("--version") == 0
    assert qlinear.__version__ in capsys.readouterr().out
