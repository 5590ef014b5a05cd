"""Neurons and heads: real shape changes that compute what zeros would, in every family."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from models import TINY_MODELS, logits, tiny_llama
from torch import Tensor, nn

import qlinear
from qlinear.checkpoint import save_float
from qlinear.float_layers import float_shape, is_conv1d
from qlinear.pruning import structured
from qlinear.pruning.structure import Structure, find
from qlinear.pruning.targets import matrix

FAMILIES = sorted(TINY_MODELS)
#: 25 % of 130 neurons; GPT-2's 256 go in steps of 128.
SHARE = {"gpt2": 0.5}


def batches(model: nn.Module) -> list[dict[str, Tensor]]:
    g = torch.Generator().manual_seed(5)
    if model.config.model_type == "vit":
        return [{"pixel_values": torch.randn(2, 3, 16, 16, generator=g)} for _ in range(2)]
    return [{"input_ids": torch.randint(0, 99, (2, 12), generator=g)} for _ in range(2)]


def share(name: str, kind: str) -> float:
    return 0.5 if kind == "heads" else SHARE.get(name, 0.25)


def silence(structure: Structure, units: Tensor) -> None:
    """Zeroes everything that belongs to some units: rows, their biases, and columns."""
    for part in structure.slices:
        index = (part.offset + units.unsqueeze(1) * part.size + torch.arange(part.size)).flatten()
        matrix(part.layer).index_fill_(part.axis, index, 0)
        if part.axis == 0 and part.layer.bias is not None:
            part.layer.bias.data[index] = 0


@pytest.mark.parametrize("kind", ["neurons", "heads"])
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "gradient"])
def test_silent_units_go_first_and_change_nothing(name: str, kind: str, method: str) -> None:
    model = TINY_MODELS[name]()
    found = find(model, kind)
    assert len(found) == 2
    for structure in found:
        count = structure.units // 2 if kind == "heads" else round(structure.units * share(name, kind))
        silence(structure, torch.randperm(structure.units, generator=torch.Generator().manual_seed(1))[:count])
    with torch.no_grad():
        want = logits(model)
    before = sum(p.numel() for p in model.parameters())
    loss = (lambda m, b: m(**b).logits.float().square().mean()) if method == "gradient" else None
    qlinear.prune(model, method, share(name, kind), kind, batches(model), loss=loss)
    after = find(model, kind)
    for old, new in zip(found, after, strict=True):
        assert new.units == old.units - (old.units // 2 if kind == "heads" else round(old.units * share(name, kind)))
    assert sum(p.numel() for p in model.parameters()) < before
    with torch.no_grad():
        # SparseGPT refits what is left, by nothing here, but through a damped Hessian.
        torch.testing.assert_close(logits(model), want, rtol=1e-4, atol=1e-4 if method == "sparsegpt" else 2e-6)


@pytest.mark.parametrize("kind", ["neurons", "heads"])
@pytest.mark.parametrize("name", FAMILIES)
def test_removal_computes_what_zeros_in_the_consumer_would(name: str, kind: str) -> None:
    twin, model = TINY_MODELS[name](), TINY_MODELS[name]()
    qlinear.prune(model, "magnitude", share(name, kind), kind)
    removed = 0
    for old, new in zip(find(twin, kind), find(model, kind), strict=True):
        part, left = old.consumer, matrix(new.consumer.layer)
        columns = matrix(part.layer).t()
        gone = torch.tensor([not bool((column == left.t()).all(1).any()) for column in columns])
        assert int(gone.sum()) == columns.shape[0] - left.shape[1]
        scores = torch.zeros(old.units)
        for each in old.slices:
            sums = matrix(each.layer).abs().sum(1 - each.axis)[each.offset : each.offset + old.units * each.size]
            scores += sums.view(old.units, each.size).sum(1)
        lowest = scores.sort().indices[: old.units - new.units]
        assert set(lowest.tolist()) == set(gone.view(old.units, part.size).all(1).nonzero().flatten().tolist())
        columns[gone] = 0
        removed += sum(matrix(s.layer).shape[1 - s.axis] * s.size for s in old.slices) * (old.units - new.units)
        for layer in new.layers:
            n, k = matrix(layer).shape
            sizes = (layer.nf, layer.nx) if is_conv1d(layer) else (layer.out_features, layer.in_features)
            assert sizes == (n, k) == float_shape(layer)
            removed += (
                0 if layer.bias is None else matrix(dict(zip(new.layers, old.layers, strict=True))[layer]).shape[0] - n
            )
    with torch.no_grad():
        torch.testing.assert_close(logits(model), logits(twin), rtol=1e-4, atol=2e-6)
    count = [sum(p.numel() for p in m.parameters()) for m in (twin, model)]
    assert count[0] - count[1] == removed


@pytest.mark.parametrize(
    ("name", "kind"),
    [*((name, "neurons") for name in FAMILIES), ("llama", "heads")],
    ids=lambda v: str(v),
)
def test_save_pretrained_and_from_pretrained_agree(name: str, kind: str, tmp_path: Path) -> None:
    model = TINY_MODELS[name]()
    qlinear.prune(model, "magnitude", share(name, kind), kind)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(logits(again), logits(model))
    if kind == "heads":
        assert (model.config.num_attention_heads, model.config.num_key_value_heads) == (3, 1)
    elif name != "gpt2":
        assert model.config.intermediate_size == 98


@pytest.mark.parametrize("kind", ["neurons", "heads"])
@pytest.mark.parametrize("name", FAMILIES)
def test_what_a_config_cannot_say_stands_in_the_checkpoint(name: str, kind: str, tmp_path: Path) -> None:
    model = TINY_MODELS[name]()
    qlinear.prune(model, "magnitude", share(name, kind), kind)
    unsaid = kind == "heads" and name != "llama"
    if unsaid:
        with pytest.raises(ValueError, match=r"x .*from_pretrained could not read it"):
            save_float(model, tmp_path / "float")
        assert not (tmp_path / "float").exists()
    qlinear.convert(model, "w8a16")
    qlinear.save(model, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert bool(config["quantization_config"]["reshaped"]) == unsaid
    with torch.no_grad():
        assert torch.equal(logits(qlinear.load(tmp_path / "out")), logits(model))
        assert torch.equal(logits(qlinear.load(tmp_path / "out", model=type(model)(model.config))), logits(model))


def test_shapes_of_another_model_are_refused(tmp_path: Path) -> None:
    model = TINY_MODELS["gpt2"]()
    qlinear.prune(model, "magnitude", 0.5, "heads")
    qlinear.save(qlinear.convert(model, "w8a16"), tmp_path / "out")
    with pytest.raises(ValueError, match=r"shape of 'transformer\.h\.0\.attn\.c_attn', which is no linear layer"):
        qlinear.load(tmp_path / "out", model=tiny_llama())


@pytest.mark.parametrize("kind", ["neurons", "heads"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_cut_model_generates_and_converts(name: str, kind: str, tmp_path: Path) -> None:
    model = TINY_MODELS[name]()
    qlinear.prune(model, "magnitude", share(name, kind), kind)
    ids = torch.arange(5).unsqueeze(0)
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    cached = model.generate(ids, **settings)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **settings)) and cached.shape == (1, 11)
    with torch.no_grad():
        want = logits(model)
        qlinear.convert(model, "w8a16")
        assert float((logits(model) - want).norm() / want.norm()) < 0.02
    if name == "llama":
        qlinear.save(model, tmp_path / "out")
        with torch.no_grad():
            assert torch.equal(logits(qlinear.load(tmp_path / "out")), logits(model))


def mlp(width: int = 384) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(16, width), nn.Sigmoid(), nn.Dropout(0.1), nn.Linear(width, 60), nn.GELU(), nn.Linear(60, 4)
    )


def test_sequential_models_lose_neurons_and_widths_stay_multiples_of_128() -> None:
    model, x = mlp().eval(), torch.randn(7, 16)
    qlinear.prune(model, "wanda", 0.3, "neurons", [x])
    assert [float_shape(model[i]) for i in (0, 3, 5)] == [(256, 16), (42, 256), (4, 42)]
    assert model(x).shape == (7, 4) and model[0].bias.shape == (256,)


def test_neurons_of_the_whole_model_can_be_ranked_together() -> None:
    model = mlp(100)
    with torch.no_grad():
        model[3].weight.mul_(0.01), model[3].bias.mul_(0.01)
        model[0].weight.mul_(10)
    qlinear.prune(model, "magnitude", {"3": 0.2, "5": 0.5, "*": None}, "neurons", scope="global")
    assert float_shape(model[0])[0] + float_shape(model[3])[0] == 160 - 20 - 30
    assert float_shape(model[3])[0] < 30


def test_refitting_makes_the_consumer_better_than_cutting_it() -> None:
    x = torch.randn(512, 16) @ torch.randn(16, 16)
    errors = {}
    for method in ("magnitude", "wanda", "sparsegpt"):
        model = mlp(100).eval()
        with torch.no_grad():
            want = model[:4](x)
            qlinear.prune(model, method, {"3": 0.3, "*": None}, "neurons", [x])
            errors[method] = float((model[:4](x) - want).norm() / want.norm())
    assert errors["sparsegpt"] < 0.5 * min(errors["magnitude"], errors["wanda"]), errors


def test_refitting_is_least_squares() -> None:
    x = torch.randn(300, 20, dtype=torch.float64) @ torch.randn(20, 20, dtype=torch.float64)
    weight, keep = torch.randn(5, 20, dtype=torch.float64), torch.arange(0, 20, 2)
    want = torch.linalg.lstsq(x[:, keep], x @ weight.t()).solution.t()
    torch.testing.assert_close(structured.compensated(weight, x.t() @ x, keep, 1e-12), want, rtol=1e-6, atol=1e-8)
    errors = structured.removal_errors(weight, x.t() @ x, 2, 1e-12)
    for unit in range(10):
        left = torch.tensor([i for i in range(20) if i // 2 != unit])
        best = torch.linalg.lstsq(x[:, left], x @ weight.t())
        error = (x[:, left] @ best.solution - x @ weight.t()).square().sum()
        assert float(errors[unit]) == pytest.approx(float(error), rel=1e-5)


@pytest.mark.parametrize("kind", ["neurons", "heads"])
def test_a_failure_half_way_restores_shapes_and_config(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    config, before = model.config.to_dict(), {k: v.clone() for k, v in model.state_dict().items()}
    parameters = dict(model.named_parameters())
    real, calls = structured.update_config, []

    def failing(*args: object) -> None:
        real(*args)
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("stopped")

    monkeypatch.setattr(structured, "update_config", failing)
    with pytest.raises(RuntimeError, match="stopped"):
        qlinear.prune(model, "magnitude", 0.5, kind)
    assert model.config.to_dict() == config
    assert all(parameters[name] is value for name, value in model.named_parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.model.layers[0].mlp.down_proj.in_features == 130


def test_nothing_to_cut_is_an_error() -> None:
    with pytest.raises(ValueError, match="no MLP"):
        qlinear.prune(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)), "magnitude", 0.5, "neurons")
    with pytest.raises(ValueError, match="no attention"):
        qlinear.prune(mlp(), "magnitude", 0.5, "heads")
