"""``qlinear demo --sparse`` on tiny models: every pattern, the tables, the picture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from models import byte_tokenizer, tiny_language_model
from test_cli import Captured, run

import qlinear
from qlinear.demo import sparse, subjects
from qlinear.demo.encoder import batches, embed
from qlinear.demo.sparse import Plan, run_sparse_demo
from qlinear.demo.subjects import Subject, next_token_loss
from qlinear.demo.text import perplexity

pytest.importorskip("matplotlib")
transformers = pytest.importorskip("transformers")

TEXTS = ["one short text of words", "another text, about other things", "a third that is longer than both of these"]


def tiny_encoder(*_: object) -> Subject:
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = "!"
    inputs = batches(tokenizer, TEXTS)
    torch.manual_seed(0)
    model = transformers.BertModel(
        transformers.BertConfig(
            vocab_size=300, hidden_size=128, num_hidden_layers=1, num_attention_heads=2, intermediate_size=256
        )
    ).eval()
    wanted = embed(model, inputs)

    def measure(pruned: torch.nn.Module) -> dict[str, float]:
        return {"fidelity": float((embed(pruned, inputs) * wanted).sum(1).mean())}

    return Subject("tiny encoder", model, inputs, subjects._halves_match, measure, False, "a note", _unused(model))


def _unused(model: torch.nn.Module) -> tuple[str, ...]:
    return tuple(name for name, _ in model.named_modules() if name.endswith("pooler.dense"))


def tiny_decoder(*_: object) -> Subject:
    torch.manual_seed(0)
    model, ids = tiny_language_model().eval(), torch.randint(8, 200, (2, 24))
    calibration = [{"input_ids": row.unsqueeze(0)} for row in torch.randint(8, 200, (3, 24))]

    def measure(pruned: torch.nn.Module) -> dict[str, float]:
        return {"perplexity": perplexity(pruned, ids).value}

    return Subject("tiny decoder", model, calibration, next_token_loss, measure, True, "")


PLANS = {
    "encoder": (
        Plan("unstructured", 0.5),
        Plan("2:4", 0.5, (None, "w8a16-2:4", "w4a16-2:4")),
        Plan("block64", 0.25, (None, "w8a16-block64")),
    ),
    "language model": (Plan("2:4", 0.5, (None, "w4a16-2:4"), ("magnitude", "sparsegpt")),),
}


def test_every_method_and_scheme_is_measured_and_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.setattr(sparse, "encoder", tiny_encoder)
    monkeypatch.setattr(sparse, "language_model", tiny_decoder)
    monkeypatch.setattr(sparse, "PLANS", PLANS)
    monkeypatch.setattr(sparse, "_neuron_times", lambda _: dict.fromkeys(sparse.TIMES, 1.0))
    picture, report = tmp_path / "plots" / "sparse.png", tmp_path / "sparse.json"
    assert run("demo", "--sparse", "--picture", picture, "--json", report) == 0
    out = capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000
    encoder, decoder = json.loads(report.read_text())["models"]
    assert encoder["float"]["quality"] == {"fidelity": pytest.approx(1, abs=1e-5)}
    keys = {(row["pattern"], row["scheme"], row["method"]) for row in encoder["pruned"]}
    assert len(keys) == len(encoder["pruned"]) == 4 * (1 + 3 + 2)
    assert {row["scheme"] for row in decoder["pruned"]} == {"float", "w4a16-2:4"}
    assert "tiny encoder: fidelity (higher is better" in out and "tiny decoder: perplexity (lower" in out
    sizes = {(row["pattern"], row["scheme"]): row["linear_bytes"] for row in encoder["pruned"]}
    assert sizes["2:4", "w4a16-2:4"] < sizes["2:4", "w8a16-2:4"] < encoder["float"]["linear_bytes"]
    # Nothing that was there before is changed by pruning copies of it.
    again = tiny_encoder()
    assert again.measure(again.model)["fidelity"] == pytest.approx(1, abs=1e-5)


def test_a_quarter_of_the_neurons_is_gone_from_the_timed_model() -> None:
    subject = tiny_decoder()
    times = sparse._neuron_times(subject, rounds=1)
    assert times.keys() == set(sparse.TIMES)
    assert times["float_ms"] > 0 and times["pruned_ms"] > 0
    assert 0.5 < times["linear_bytes"] < 1 and 0.5 < times["model_bytes"] < 1
    assert "of their size" in sparse._time_line(times)


def test_sizes_with_zeros_are_those_of_the_patterns_own_format() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(128, 64, bias=False))
    assert sparse._bytes(model) == 128 * 64 * 2
    held = sparse._bytes(model, Plan("2:4", 0.5), None)
    weight = model[0].weight.detach().half()
    assert held == qlinear.pack(weight, "w16a16-2:4", layout="plain", prune="magnitude").nbytes


def test_another_model_is_refused(capsys: Captured) -> None:
    assert run("demo", "--sparse", "--model", "some/model") == 2
    assert "qlinear prune" in capsys.readouterr().err


def test_without_matplotlib_nothing_is_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    monkeypatch.setattr(sparse, "encoder", lambda *_: pytest.fail("work was begun"))
    with pytest.raises(RuntimeError, match="matplotlib is missing"):
        run_sparse_demo(no_download=True)
