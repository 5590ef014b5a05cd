"""``qlinear demo --sparse`` on tiny models: every pattern, the tables, the picture."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from models import byte_tokenizer, tiny_language_model
from test_cli import Captured, run

import qlinear
from qlinear.demo import sparse, sparse_plot, sparse_times, subjects
from qlinear.demo.encoder import batches, embed
from qlinear.demo.sparse import Plan, run_sparse_demo
from qlinear.demo.sparse_times import linear_bytes, neuron_times, times_table
from qlinear.demo.subjects import Subject, next_token_loss
from qlinear.demo.text import perplexity
from qlinear.pruning import METHODS

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
        return {"fidelity": float((embed(pruned, inputs) * wanted).sum(1).mean()), "people": 0.125}

    loss, unused = subjects._halves_match, _unused(model)
    return Subject("tiny encoder", model, inputs, loss, measure, False, "a note", unused, "people")


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
    "language model": (
        Plan("2:4", 0.5, (None, "w4a16-2:4"), ("magnitude", "sparsegpt")),
        Plan("neurons", 0.25, (None, "w4a16")),
    ),
}


def test_every_method_and_scheme_is_measured_and_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.setattr(sparse, "encoder", tiny_encoder)
    monkeypatch.setattr(sparse, "language_model", tiny_decoder)
    monkeypatch.setattr(sparse, "PLANS", PLANS)
    monkeypatch.setattr(sparse, "_TIMED", 0.5)
    monkeypatch.setattr(sparse, "neuron_times", partial(neuron_times, seconds=0))
    picture, report = tmp_path / "plots" / "sparse.png", tmp_path / "sparse.json"
    assert run("demo", "--sparse", "--picture", picture, "--json", report) == 0
    out = capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000
    encoder, decoder = json.loads(report.read_text())["models"]
    assert encoder["float"]["quality"] == {"fidelity": pytest.approx(1, abs=1e-5), "people": 0.125}
    keys = {(row["pattern"], row["scheme"], row["method"]) for row in encoder["pruned"]}
    assert len(keys) == len(encoder["pruned"]) == 4 * (1 + 3 + 2)
    neurons = {(row["method"], row["scheme"]) for row in decoder["pruned"] if row["pattern"] == "neurons"}
    assert neurons == {(method, scheme) for method in METHODS for scheme in ("float", "w4a16")}
    assert "1.000 (0.125)" in out and "in brackets the correlation with people's ratings" in out
    assert decoder["labels"] == "" and "time expected" in out
    alone, _ = encoder["neurons_25_percent"]
    assert alone["pruned_bytes"] / alone["float_bytes"] == 0.5
    assert "tiny encoder: fidelity (higher is better" in out and "tiny decoder: perplexity (lower" in out
    sizes = {(row["pattern"], row["scheme"]): row["linear_bytes"] for row in encoder["pruned"]}
    assert sizes["2:4", "w4a16-2:4"] < sizes["2:4", "w8a16-2:4"] < encoder["float"]["linear_bytes"]
    # Nothing that was there before is changed by pruning copies of it.
    again = tiny_encoder()
    assert again.measure(again.model)["fidelity"] == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("kind", list(sparse.PLANS))
def test_every_method_prunes_neurons_and_quality_is_shown_against_sparsity(kind: str) -> None:
    plans = sparse.PLANS[kind]
    assert all(plan.methods == METHODS for plan in plans)
    shares = {p.pattern: {plan.sparsity for plan in plans if plan.pattern == p.pattern} for p in plans}
    assert min(len(shares[pattern]) for pattern in ("unstructured", "block64", "neurons")) >= 2


def test_time_and_size_without_a_quarter_of_the_neurons() -> None:
    subject = tiny_decoder()
    pruned = sparse._pruned(subject, Plan("neurons", 0.25), "magnitude")
    alone, whole = neuron_times(subject, pruned, 0.25, seconds=0)
    assert alone.pruned_bytes / alone.float_bytes == alone.expected_share == 0.75
    # The head is as large as it was: more of the time is left than of the layers that were pruned.
    linear = sum(m.weight.numel() for m in pruned.modules() if isinstance(m, torch.nn.Linear))
    assert whole.pruned_bytes == linear_bytes(pruned) < whole.float_bytes
    assert whole.expected_share == linear / sum(
        m.weight.numel() for m in subject.model.modules() if isinstance(m, torch.nn.Linear)
    )
    for each in (alone, whole):
        low, high = each.time_quartiles
        assert each.rounds >= 25 and each.float_ms > 0 and 0 < low <= each.time_share <= high
    text = times_table([alone, whole], 0.25)
    assert "without 25% of the neurons" in text and "75.0%" in text and alone.what in text
    assert "2500 -> 2000" in times_table([replace(whole, float_ms=2500.0, pruned_ms=2000.0)], 0.25)


def test_sides_are_timed_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which every call takes longer than the one before: neither side gains by its place."""
    clock, calls = iter_clock(), []
    monkeypatch.setattr(sparse_times, "perf_counter", lambda: next(clock))
    sides = torch.nn.Linear(4, 4), torch.nn.Linear(4, 3)
    found = sparse_times._shrunk("two layers", *sides, lambda side: calls.append(sides.index(side)), 0.0)
    assert calls[:8] == [0, 1, 0, 1, 1, 0, 0, 1]
    assert found.time_share == pytest.approx(1, abs=0.1)


def iter_clock() -> Iterator[float]:
    now = 0.0
    for step in itertools.count(100):
        yield now
        now += step


@pytest.mark.parametrize(("labels", "wanted"), [("", ["fidelity"]), ("people", ["fidelity", "people"])], ids=repr)
def test_labels_have_a_panel_of_their_own(labels: str, wanted: list[str]) -> None:
    model = {"float": {"quality": {"fidelity": 1.0, "cosine": 1.0, "people": 0.5}}, "labels": labels}
    assert sparse_plot._metrics(model) == wanted


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
