"""qlinear.convert: a failure changes nothing."""

import copy
import gc
import sys
import weakref
from pathlib import Path

import pytest
import torch
from layers import (
    Snapshot,
    count_conversions,
    fail_at,
    mlp,
)
from models import logits, same_bits, tiny_llama
from torch import nn
from transformers.pytorch_utils import Conv1D

import qlinear
from qlinear import QLinear
from qlinear.undo import Undo


class Model(nn.Module):
    """One layer twice, a tied pair, an embedding tied to the head, a Conv1D-free mixture of dtypes and gradients."""

    def __init__(self):
        super().__init__()

        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 40)
        self.first = nn.Linear(40, 40)
        self.again = self.first
        self.conv = Conv1D(40, 40)
        self.narrow = nn.Linear(40, 40, bias=False).bfloat16()
        self.left, self.right = nn.Linear(40, 40), nn.Linear(40, 40)
        self.right.weight = self.left.weight
        self.last = nn.Linear(40, 40)
        self.head = nn.Linear(40, 11, bias=False)
        self.head.weight = self.embed.weight
        self.first.weight.requires_grad_(False)
        self.last.eval()

    def forward(self, tokens):
        x = self.conv(self.again(self.first(self.embed(tokens))))
        x = self.narrow(x.bfloat16()).float()
        return self.head(self.last(self.right(self.left(x))))


#: Asks for everything, the tied layers too.
EVERYTHING = {"head": "w8a16", "left": "w4a16-g32", "right": "w4a16-g32", "*": "w4a16-g32-asym"}
LAYERS = 7


def assert_ties(model):
    assert model.again is model.first
    assert model.right.weight is model.left.weight and model.head.weight is model.embed.weight


@pytest.mark.parametrize("k", range(1, LAYERS + 1))
@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_a_failure_at_any_layer_changes_nothing(kind, k, monkeypatch):
    model = Model()
    snapshot = Snapshot(model, torch.tensor([[1, 2, 3]]))

    def fail(count, linear):
        if count == k:
            raise kind("injected")

    calls = count_conversions(monkeypatch, fail)
    with pytest.raises(kind, match="injected"):
        qlinear.convert(model, EVERYTHING)
    assert len(calls) == k
    gc.collect()
    snapshot.assert_unchanged()
    assert_ties(model)
    monkeypatch.undo()
    qlinear.convert(model, EVERYTHING)  # and the model can still be converted
    assert len({id(m) for m in model.modules() if isinstance(m, QLinear)}) == LAYERS


def test_nan_in_the_last_layer_changes_nothing_and_is_named():
    model = Model()
    model.last.weight.data[3, 4] = torch.nan
    snapshot = Snapshot(model, torch.tensor([[1, 2, 3]]))
    with pytest.raises(ValueError, match=r"layer 'last' \(w4a16-g32-asym\): .*NaN"):
        qlinear.convert(model, EVERYTHING)
    snapshot.assert_unchanged()
    assert_ties(model)


def test_a_layer_on_meta_changes_nothing():
    model = mlp()
    model.head = nn.Linear(40, 7, device="meta")
    before = {name: t.clone() for name, t in model.named_parameters() if not t.is_meta}
    with pytest.raises(ValueError, match=r"layer 'head' .*meta device"):
        qlinear.convert(model, "w8a16")
    assert all(type(m) is nn.Linear for m in (model.up, model.down, model.head)) and model.head.weight.is_meta
    assert all(same_bits(dict(model.named_parameters())[name], t) for name, t in before.items())


def test_what_somebody_holds_comes_back_as_the_same_object(monkeypatch):
    model = mlp()
    held_layer, held_weight = model.up, model.down.weight
    count_conversions(monkeypatch, fail_at(3))
    with pytest.raises(RuntimeError, match="injected"):
        qlinear.convert(model, "w8a16")
    assert model.up is held_layer and model.down.weight is held_weight


def test_an_optimizer_still_trains_a_restored_model(monkeypatch):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    count_conversions(monkeypatch, fail_at(3))
    with pytest.raises(RuntimeError, match="injected"):
        qlinear.convert(model, "w8a16")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model(torch.randn(2, 40)).sum().backward()
    optimizer.step()
    assert not any(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_the_config_is_tied_again_after_a_failure():
    model = tiny_llama(tied=True)
    with pytest.raises(RuntimeError, match="late"), Undo(model) as undo:
        undo.untie(model)
        assert model.config.tie_word_embeddings is False
        raise RuntimeError("late")
    assert model.config.tie_word_embeddings is True


# --- memory


def test_originals_are_freed_as_the_work_goes_on(monkeypatch):
    """When layer k is converted, the weights of all layers before it are gone: never two whole models in memory."""
    model = nn.Sequential(*(nn.Linear(40, 40) for _ in range(6)))
    alive = [weakref.ref(m.weight) for m in model]
    counts = []
    count_conversions(monkeypatch, lambda count, linear: counts.append(sum(r() is not None for r in alive)))
    gc.collect()
    gc.disable()  # freed by reference counting, not by luck
    try:
        qlinear.convert(model, "w8a16")
    finally:
        gc.enable()
    assert counts == [6, 5, 4, 3, 2, 1]
    assert not any(r() for r in alive)


def test_the_undo_log_writes_each_weight_once_and_no_more_than_it(monkeypatch):
    """Weights read from a file are views of one storage: only the view is written."""
    storage = torch.randn(4, 64, 64)
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(4)))
    for layer, weight in zip(model, storage, strict=True):
        layer.weight = nn.Parameter(weight)
    sizes = []

    class Measured(Undo):
        def __exit__(self, *error):
            sizes.extend(f.stat().st_size for f in Path(self._folder.name).iterdir())
            super().__exit__(*error)

    monkeypatch.setattr(sys.modules["qlinear.conversion"], "Undo", Measured)
    qlinear.convert(model, "w8a16")
    assert len(sizes) == 4 and max(sizes) < 64 * 64 * 4 + 4096


def test_no_temporary_files_are_left(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    qlinear.convert(mlp(), "w8a16")
    count_conversions(monkeypatch, fail_at(2))
    with pytest.raises(RuntimeError):
        qlinear.convert(mlp(), "w8a16")
    assert list(tmp_path.iterdir()) == []


# --- progress


def test_progress_bar(capsys):
    qlinear.convert(mlp(), "w8a16")
    qlinear.convert(mlp(), "w8a16", progress=False)
    assert capsys.readouterr() == ("", "")
    qlinear.convert(mlp(), "w8a16", progress=True)
    shown = capsys.readouterr()
    assert shown.out == "" and "quantizing: 100%" in shown.err and "3/3" in shown.err


def test_a_deepcopy_of_a_converted_model_is_independent():
    model = qlinear.convert(tiny_llama(), "w4a16")
    twin = copy.deepcopy(model)
    with torch.no_grad():
        before = logits(model)
        assert same_bits(logits(twin), before)
        for m in twin.modules():
            if isinstance(m, QLinear):
                m.weight_scale.zero_()
        assert same_bits(logits(model), before)
