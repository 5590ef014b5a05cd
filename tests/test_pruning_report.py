"""The report of predictions, and ``qlinear prune`` as a person runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from models import tiny_gpt2, tiny_llama
from test_cli import run
from torch import nn

import qlinear
from qlinear.format import FORMATS
from qlinear.pruning import Pattern, report
from qlinear.pruning.report import holds, stored_share
from qlinear.pruning.targets import matrix

Captured = pytest.CaptureFixture[str]


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2], ids=["llama", "gpt2"])
def test_predicted_bytes_are_those_of_the_converted_layers(make) -> None:
    model = make().bfloat16()
    qlinear.prune(model, "magnitude", None, "2:4")
    found = report(model)
    layers = dict(model.named_modules())
    for row in found.layers:
        weight = matrix(layers[row.name])
        assert row.shape == tuple(weight.shape)
        assert row.sparsity == pytest.approx(float((weight == 0).float().mean()))
        assert row.bytes_now == weight.numel() * 2
        assert set(row.predicted) == {name for name, fmt in FORMATS.items() if holds(fmt, weight)}
    for name in row.predicted:
        packed = qlinear.pack(matrix(layers[found.layers[0].name]), name, layout="plain")
        assert found.layers[0].predicted[name] == packed.nbytes, name


@pytest.mark.parametrize("fmt", [f for f in FORMATS.values() if getattr(f, "sparsity", None)], ids=str)
def test_a_sparse_format_is_predicted_where_the_weight_has_its_pattern(fmt) -> None:
    pattern = Pattern.parse(fmt.sparsity)
    layer = nn.Linear(256, 256, bias=False, dtype=torch.bfloat16)
    assert not holds(fmt, layer.weight)
    with pytest.raises(ValueError, match="pattern"):
        qlinear.pack(layer.weight, fmt.name)
    qlinear.prune(layer, "magnitude", 0.5, pattern)
    assert holds(fmt, layer.weight) and stored_share(fmt, layer.weight) == 0.5
    assert report(layer).layers[0].predicted[fmt.name] == qlinear.pack(layer.weight, fmt.name, layout="plain").nbytes


def test_totals_times_and_text() -> None:
    model = nn.Sequential(nn.Linear(256, 128), nn.Linear(128, 64))
    qlinear.prune(model, "magnitude", {"0": 0.75, "*": None})
    found = report(model, "A100")
    assert found.sparsity == pytest.approx(0.75 * 256 * 128 / (256 * 128 + 128 * 64))
    data = json.loads(json.dumps(found.to_dict()))
    assert data["predicted_bytes"]["w4a16"] == sum(row["predicted"]["w4a16"] for row in data["layers"])
    assert data["predicted_microseconds"]["w4a16"] == pytest.approx(data["predicted_bytes"]["w4a16"] / 2.039e6 / 0.9)
    text = str(found)
    assert "us on A100" in text and "nothing was measured" in text and "75.0%" in text
    assert found.layers[0].predicted[found.layers[0].smallest] == min(found.layers[0].predicted.values())
    with pytest.raises(ValueError, match="H200"):
        report(model, "TPU")
    with pytest.raises(ValueError, match="no linear layer"):
        report(nn.Sequential(nn.ReLU()))


@pytest.mark.parametrize(
    ("pattern", "sparsity", "wanted"),
    [
        ("unstructured", 0.5, {"w8a16-unstructured": ("w4a16", True), "w16a16-unstructured": ("w8a16", True)}),
        # Smaller than any dense int4, and slower: every value is loaded by itself.
        ("unstructured", 0.9, {"w8a16-unstructured": ("w8a16", False), "w16a16-unstructured": ("w8a16", False)}),
        ("2:4", None, {"w8a16-2:4": ("w4a16", True), "w16a16-2:4": ("w8a16", True), "w4a16-2:4": None}),
        ("block64", 0.8, {"w8a16-block64": None, "w4a16-block64": None, "w16a16-block64": None}),
    ],
    ids=["half", "most", "2:4", "blocks"],
)
def test_the_report_says_where_a_dense_format_is_better(
    pattern: str, sparsity: float | None, wanted: dict[str, tuple[str, bool] | None]
) -> None:
    layer = nn.Linear(4096, 1024, dtype=torch.bfloat16)
    qlinear.prune(layer, "magnitude", sparsity, pattern)
    found = report(layer)
    outdone = found.outdone()
    for name, better in wanted.items():
        assert outdone.get(name) == (better and {"by": better[0], "smaller": better[1]}), name
        how = "smaller and faster" if better and better[1] else "faster, and larger"
        assert (f"{name}: {better and better[0]} without sparsity is {how}" in str(found)) == (better is not None)
    assert found.to_dict()["outdone"] == outdone
    # 4 Mi weights of 14.7 instructions each, 29.65e12 a second.
    slow = found.to_dict()["predicted_microseconds"]["w16a16-unstructured"]
    assert slow == pytest.approx((4 << 20) * 14.7 / 29.65e6, rel=1e-3)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("the not of a is to be in an or and then there was light " * 40)
    return path


@pytest.mark.parametrize(
    "options",
    [
        ("--method", "wanda", "--sparsity", "0.5", "--pattern", "2:4"),
        ("--method", "sparsegpt", "--scheme", "w4a16-g32"),
        ("--method", "gradient", "--sparsity", "*.mlp.*=0.5", "--sparsity", "none", "--pattern", "unstructured"),
        ("--method", "magnitude", "--sparsity", "0.25", "--pattern", "neurons"),
    ],
    ids=["wanda", "sparsegpt-int4", "gradient", "neurons"],
)
def test_prune_writes_a_folder_that_loads_and_converts(
    options: tuple[str, ...], text: Path, language_model: Path, tmp_path: Path, capsys: Captured
) -> None:
    from transformers import AutoTokenizer, LlamaForCausalLM

    out = tmp_path / "out"
    base = ("--text", text, "--samples", 4, "--length", 32, "--no-download", "--json", tmp_path / "p.json")
    assert run("prune", language_model, out, *options, *base) == 0
    assert f"wrote {out}" in capsys.readouterr().out
    data = json.loads((tmp_path / "p.json").read_text())
    model = LlamaForCausalLM.from_pretrained(out)
    assert model.dtype == torch.bfloat16 and AutoTokenizer.from_pretrained(out) is not None
    assert json.loads(json.dumps(report(model).to_dict()))["layers"] == data["layers"]
    weight = model.model.layers[1].mlp.down_proj.weight.detach()
    if "neurons" in options:
        assert weight.shape == (64, 72) and model.config.intermediate_size == 72
    else:
        assert float((weight == 0).float().mean()) >= 0.5
    scheme = "w4a16-g32"
    assert run("convert", out, tmp_path / "q", "--scheme", scheme) == 0
    if "--scheme" in options:
        found = qlinear.load(tmp_path / "q").model.layers[1].mlp.down_proj.dequantize()
        assert torch.equal(found, weight)


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["{folder}", "{tmp}/o", "--sparsity", "half"], "PATTERN=NUMBER"),
        (["{folder}", "{tmp}/o", "--method", "magnitude", "--pattern", "unstructured"], "between 0 and 1"),
        (["{folder}", "{folder}"], "--overwrite"),
        (["{folder}", "{tmp}/o", "--text", "{tmp}/text.txt", "--length", "100000"], "at least one window"),
        (["nowhere/at/all", "{tmp}/o"], "nowhere/at/all"),
    ],
    ids=["share", "missing", "exists", "short-text", "no-model"],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str], wanted: str, text: Path, language_model: Path, tmp_path: Path, capsys: Captured
) -> None:
    assert run("prune", *(a.format(tmp=tmp_path, folder=language_model) for a in arguments)) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert error[-1].startswith("qlinear: ") and wanted in error[-1]
    assert not (tmp_path / "o").exists()
