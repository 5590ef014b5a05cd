"""The report of predictions, and ``qlinear prune`` as a person runs it."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest
import torch
from models import byte_tokenizer, tiny_gpt2, tiny_language_model, tiny_llama
from test_cli import run
from torch import nn

import qlinear
from qlinear.format import FORMATS
from qlinear.machines import MACHINES
from qlinear.pruning import Pattern, report
from qlinear.pruning.targets import matrix
from qlinear.sparse import holds, stored_share
from qlinear.tables import digits

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
        assert set(row.predicted) == {name for name, fmt in FORMATS.items() if holds(weight, fmt)}
    for name in row.predicted:
        packed = qlinear.pack(matrix(layers[found.layers[0].name]), name, layout="plain")
        assert found.layers[0].predicted[name] == packed.nbytes, name


@pytest.mark.parametrize("fmt", [f for f in FORMATS.values() if getattr(f, "sparsity", None)], ids=str)
def test_a_sparse_format_is_predicted_where_the_weight_has_its_pattern(fmt) -> None:
    pattern = Pattern.parse(fmt.sparsity)
    layer = nn.Linear(256, 256, bias=False, dtype=torch.bfloat16)
    assert not holds(layer.weight, fmt)
    with pytest.raises(ValueError, match="pattern"):
        qlinear.pack(layer.weight, fmt.name)
    qlinear.prune(layer, "magnitude", 0.5, pattern)
    assert holds(layer.weight, fmt) and stored_share(layer.weight, fmt) == 0.5
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
def with_head() -> nn.Module:
    """A language model in 2:4 whose output head ``prune`` left alone."""
    model = tiny_llama().bfloat16()
    return qlinear.prune(model, "magnitude", None, "2:4")


@pytest.mark.parametrize(
    ("scheme", "head"), [("w4a16-2:4", "w4a16"), ("w8a16-2:4", "w8a16"), ("w16a16-2:4", "float")], ids=str
)
def test_a_head_that_was_not_pruned_is_counted_dense_and_named(scheme: str, head: str, with_head: nn.Module) -> None:
    found = report(with_head)
    assert found.cannot_hold() == found.to_dict()["cannot_hold"] == {}
    *others, last = found.layers
    assert last.head and last.taken_in(scheme) == head and not any(layer.head for layer in others)
    rest = last.predicted[head] if head != "float" else last.bytes_now
    assert found.totals()[scheme] == sum(layer.predicted[scheme] for layer in others) + rest
    text = str(found)
    assert re.search(rf"^{scheme} .* {len(others)} of {len(found.layers)}$", text, re.MULTILINE)
    assert re.search(r"^w4a16 .* all$", text, re.MULTILINE)
    assert "the output head, lm_head, is not pruned for w4a16-2:4, " in text and "to convert so" not in text
    assert _bytes(qlinear.convert(with_head, scheme)) == found.totals()[scheme]


def _bytes(model: nn.Module) -> int:
    """Of all linear layers, as they are stored."""
    layers = [m for m in qlinear.unprepare(model).modules() if isinstance(m, (nn.Linear, qlinear.QLinear))]
    return sum(m.nbytes if isinstance(m, qlinear.QLinear) else m.weight.nbytes for m in layers)


def test_what_the_report_tells_to_convert_other_layers_with_is_taken() -> None:
    model = tiny_llama().bfloat16()
    found = report(qlinear.prune(model, "magnitude", {"*.0.mlp.down_proj": None, "*": 0.5}, "2:4"))
    assert found.cannot_hold()["w4a16-2:4"] == ["model.layers.0.mlp.down_proj"]
    text = str(found)
    assert "the output head, lm_head, is not pruned for w4a16-2:4, " in text
    with pytest.raises(ValueError, match=r"'model.layers.0.mlp.down_proj'.*None"):
        qlinear.convert(model, "w4a16-2:4")
    qlinear.convert(model, ast.literal_eval(text.partition("to convert so: ")[2].splitlines()[0]))
    assert model.model.layers[0].mlp.down_proj.scheme == model.lm_head.scheme == "w4a16"
    assert _bytes(model) == found.totals()["w4a16-2:4"]


def test_a_head_that_was_pruned_is_counted_as_it_is() -> None:
    model = qlinear.prune(tiny_llama().bfloat16(), "magnitude", {"lm_head": 0.5, "*": 0.5}, "2:4")
    found = report(model)
    assert found.layers[-1].taken_in("w4a16-2:4") == "w4a16-2:4" and "output head" not in str(found)
    assert _bytes(qlinear.convert(model, "w4a16-2:4")) == found.totals()["w4a16-2:4"]


def test_a_dense_format_is_compared_over_the_layers_that_hold_the_sparse_one(with_head: nn.Module) -> None:
    with_all, with_pruned = report(with_head).outdone(), report(with_head.model).outdone()
    assert with_all == with_pruned
    assert with_all["w16a16-2:4"] == {"by": "w8a16", "smaller": True}
    assert "w16a16-2:4: w8a16 without sparsity is smaller and faster" in str(report(with_head))


@pytest.mark.parametrize(
    ("machine", "slow"),
    [
        ("A100", set()),
        ("H200", {"w4a16-2:4", "w4a16-asym-2:4"}),
        ("B200", {"w4a16-2:4", "w4a16-asym-2:4", "w8a16-2:4"}),
    ],
    ids=["A100", "H200", "B200"],
)
def test_instructions_are_those_of_the_machine(machine: str, slow: set[str]) -> None:
    """On a B200 reading is faster and expanding takes more: there dense int4 outdoes 2:4 int4."""
    layer = nn.Linear(4096, 4096, bias=False, dtype=torch.float16)
    qlinear.prune(layer, "magnitude", None, "2:4")
    found = report(layer, machine)
    times, sizes = found.times(), found.totals()
    read = {name: 1e6 * size / MACHINES[machine].stream_bytes_per_s for name, size in sizes.items()}
    assert {name for name in times if name.endswith("2:4") and times[name] > 1.05 * read[name]} == slow
    assert {"w4a16-2:4", "w4a16-asym-2:4"} & set(found.outdone()) == (
        {"w4a16-2:4", "w4a16-asym-2:4"} if machine == "B200" else set()
    )


def test_times_of_each_layer_are_printed_with_digits_that_say_something(with_head: nn.Module) -> None:
    found = report(with_head)
    text, layer = str(found), found.layers[0]
    row = next(line for line in text.splitlines() if line.startswith(layer.name))
    best = layer.smallest_of(4)
    assert best is not None
    assert row.endswith(digits(found.layer_microseconds(layer, best)))
    assert digits(found.layer_microseconds(layer, "float")) in row
    assert not re.search(r" 0\.0+( |$)", text)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.00123456, "0.00123"), (0.5, "0.500"), (12.345, "12.3"), (1234.5, "1234"), (0.0, "0")],
    ids=str,
)
def test_three_digits(value: float, text: str) -> None:
    assert digits(value) == text


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


def test_a_folder_with_a_head_of_its_own_is_pruned_and_converted_in_one_command_each(tmp_path: Path) -> None:
    tiny_language_model(tie_word_embeddings=False).bfloat16().save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    assert run("prune", tmp_path / "model", tmp_path / "pruned", "--method", "magnitude", "--pattern", "2:4") == 0
    assert run("convert", tmp_path / "pruned", tmp_path / "out", "--scheme", "w4a16-2:4") == 0
    model = qlinear.load(tmp_path / "out")
    assert model.lm_head.scheme == "w4a16" and model.model.layers[0].mlp.up_proj.scheme == "w4a16-2:4"


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
