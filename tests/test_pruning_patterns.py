"""Where zeros stand, how many there are, what is refused, and that a failure changes nothing."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.utils.prune as torch_prune
from hypothesis import given, settings
from hypothesis import strategies as st
from models import TINY_MODELS, logits, tiny_gpt2, tiny_llama
from torch import Tensor, nn

import qlinear
from qlinear.masks import lowest, masks
from qlinear.pruning import Pattern, fold_masks

IDS = torch.randint(0, 99, (4, 12), generator=torch.Generator().manual_seed(3))
BATCHES = [{"input_ids": IDS[:2]}, {"input_ids": IDS[2:], "attention_mask": torch.ones(2, 12, dtype=torch.long)}]


def tied_scores(n: int, k: int, seed: int) -> Tensor:
    """Scores with many ties, zeros among them."""
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 4, (n, k), generator=g) * torch.rand(1, generator=g)


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4), st.data())
@settings(deadline=None, max_examples=60)
def test_lowest_is_a_stable_sort_of_everything(shapes: list[tuple[int, int]], data: st.DataObject) -> None:
    scores = [tied_scores(n, k, i) for i, (n, k) in enumerate(shapes)]
    count = data.draw(st.integers(0, sum(s.numel() for s in scores)))
    flat = torch.cat([s.flatten() for s in scores])
    want = torch.zeros(len(flat), dtype=torch.bool)
    want[flat.sort(stable=True).indices[:count]] = True
    assert torch.equal(torch.cat([m.flatten() for m in lowest(scores, count)]), want)


@given(st.integers(1, 7), st.integers(2, 8), st.integers(1, 5), st.integers(0, 40), st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_n_of_every_m_stay(n: int, m: int, rows: int, columns: int, seed: int) -> None:
    n, columns = min(n, m - 1), columns + 1
    mask = masks([tied_scores(rows, columns, seed)], Pattern.parse(f"{n}:{m}"), [1 - n / m], "layer")[0]
    for start in range(0, columns, m):
        group = mask[:, start : start + m]
        assert bool(((~group).sum(1) == min(n, group.shape[1])).all())
    assert Pattern.parse(f"{n}:{m}").holds((~mask).float())


@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from(["block4", "block8x3", "block16"]), st.floats(0.1, 0.9))
@settings(deadline=None, max_examples=60)
def test_whole_blocks_go_in_exact_numbers(n: int, k: int, name: str, share: float) -> None:
    pattern = Pattern.parse(name)
    mask = masks([tied_scores(n, k, n * k)], pattern, [share], "layer")[0]
    blocks = [b for rows in mask.split(pattern.rows) for b in rows.split(pattern.columns, 1)]
    assert all(bool(b.all()) or not bool(b.any()) for b in blocks)
    assert sum(bool(b.all()) for b in blocks) == min(round(share * len(blocks)), len(blocks) - 1)


def small_layers() -> nn.Sequential:
    """Layers of 8, 4 and 1 blocks of 64 x 64."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10))


@pytest.mark.parametrize(
    ("share", "want", "message"),
    [
        (0.4, [3 / 8, 2 / 4, 0], r"layer '4' \[10, 64\] loses 0 of 1 blocks, not 0\.4"),
        (0.6, [5 / 8, 2 / 4, 0], r"blocks: layer '4' \[10, 64\] loses 0 of 1 blocks, not 0\.6 of them\. Leave"),
        (0.9, [7 / 8, 3 / 4, 0], r"layer '2' \[64, 256\] loses 3 of 4 blocks, not 0\.9 of them; layer '4'"),
    ],
    ids=["none-of-one", "all-of-one", "all-of-four"],
)
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_no_layer_is_emptied_and_a_layer_of_too_few_blocks_is_named(
    method: str, share: float, want: list[float], message: str
) -> None:
    model, x = small_layers(), torch.randn(300, 128, generator=torch.Generator().manual_seed(0))
    with pytest.warns(UserWarning, match=message):
        qlinear.prune(model, method, share, "block64", [x])
    assert [float((layer.weight == 0).float().mean()) for layer in model[::2]] == want
    # With nine of ten gone, what one layer puts out need not be what the next still reads.
    assert share > 0.6 or len(model(x).unique(dim=0)) == 300, "the outputs do not depend on the inputs"


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_of_few_weights_one_is_left(method: str) -> None:
    layer = nn.Linear(3, 1)
    with pytest.warns(UserWarning, match="layer '' .* loses 2 of 3 weights"):
        qlinear.prune(layer, method, 0.9, calibration=[torch.randn(9, 3)])
    assert int((layer.weight != 0).sum()) == 1


@pytest.mark.parametrize("pattern", ["unstructured", "block64"])
def test_ranked_together_each_layer_keeps_its_highest_unit(pattern: str) -> None:
    model = small_layers()
    with torch.no_grad():
        model[2].weight.mul_(1e-6)
    highest = model[2].weight.detach().abs().max()
    qlinear.prune(model, "magnitude", 0.6, pattern, scope="global")
    units = [layer.weight.detach() != 0 for layer in model[::2]]
    if pattern == "unstructured":
        assert sum(int(u.sum()) for u in units) == sum(u.numel() for u in units) - round(
            0.6 * sum(u.numel() for u in units)
        )
        assert int(units[1].sum()) == 1 and model[2].weight.detach().abs().max() == highest
    else:
        blocks = [sum(bool(b.any()) for rows in u.split(64) for b in rows.split(64, 1)) for u in units]
        assert sum(blocks) == 13 - round(0.6 * 13) and min(blocks) == 1 == blocks[1]


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4),
    st.floats(0.01, 0.99),
    st.sampled_from(["layer", "global"]),
)
@settings(deadline=None, max_examples=60)
def test_something_is_left_of_every_matrix(shapes: list[tuple[int, int]], share: float, scope: str) -> None:
    scores = [tied_scores(n, k, i) for i, (n, k) in enumerate(shapes)]
    chosen = masks(scores, Pattern.parse("unstructured"), [share] * len(scores), scope)
    assert not any(bool(c.all()) for c in chosen)
    if scope == "global":
        total = sum(s.numel() for s in scores)
        assert sum(int(c.sum()) for c in chosen) == min(round(share * total), total - len(scores))


@given(st.sampled_from(["unstructured", "2:4", "7:9", "block32", "block128x64", "neurons", "heads", " Block64x64 "]))
def test_a_pattern_parses_to_itself(name: str) -> None:
    pattern = Pattern.parse(name)
    assert Pattern.parse(str(pattern)) == pattern == Pattern.parse(pattern)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "gradient"])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "block16x8"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_models_get_exactly_the_zeros_asked_for(name: str, pattern: str, method: str) -> None:
    model, kind = TINY_MODELS[name](), Pattern.parse(pattern)
    loss = (lambda m, b: m(**b).logits.float().square().mean()) if method == "gradient" else None
    assert qlinear.prune(model, method, 0.5, pattern, BATCHES, loss=loss) is model
    assert model.training is False
    seen = 0
    for path, module in model.named_modules():
        if not (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"):
            continue
        weight = module.weight.detach() if isinstance(module, nn.Linear) else module.weight.detach().t()
        zeros = int((weight == 0).sum())
        if path == "lm_head":
            assert zeros == 0
            continue
        seen += 1
        n, k = weight.shape
        if kind.kind == "n:m":
            assert kind.holds(weight) and zeros >= n * (k // 4) * 2
        elif kind.kind == "unstructured":
            assert zeros == (n * round(k / 2) if method == "wanda" else round(n * k / 2))
        else:
            blocks = [b for rows in weight.split(kind.rows) for b in rows.split(kind.columns, 1)]
            assert sum(bool((b == 0).all()) for b in blocks) == round(len(blocks) / 2)
            assert sum(int((b == 0).sum()) for b in blocks if bool((b != 0).any())) == 0
    assert seen >= 8 and bool(logits(model).isfinite().all())


def test_layers_are_chosen_as_convert_chooses_them() -> None:
    model = tiny_llama(tied=True)
    qlinear.prune(model, "magnitude", {"re:.*down_proj": 0.25, "*.0.mlp.*": 0.5, "*": None})
    shares = {n: float((m.weight == 0).float().mean()) for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert shares["model.layers.0.mlp.up_proj"] == 0.5 and shares["lm_head"] == 0
    assert (
        shares["model.layers.0.mlp.down_proj"] == pytest.approx(0.25, abs=1e-3)
        and shares["model.layers.1.mlp.up_proj"] == 0
    )
    qlinear.prune(model, "magnitude", {"lm_head": 0.5, "*": None})
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert float((model.lm_head.weight == 0).float().mean()) == 0.5


def test_padding_does_not_count() -> None:
    results = []
    for junk in (0, 50):
        model = tiny_llama()
        ids, mask = IDS.clone(), torch.ones_like(IDS)
        ids[:, 9:], mask[:, 9:] = junk, 0
        qlinear.prune(model, "wanda", 0.5, calibration=[{"input_ids": ids, "attention_mask": mask}])
        results.append(model.model.layers[1].mlp.down_proj.weight.detach())
    torch.testing.assert_close(results[0], results[1])


def masked_llama() -> nn.Module:
    """A model with a mask of torch.nn.utils.prune whose ``weight`` is stale until the next forward."""
    model = tiny_llama()
    torch.manual_seed(0)
    layer = model.model.layers[0].mlp.up_proj
    torch_prune.random_unstructured(layer, "weight", 0.6)
    with torch.no_grad():
        layer.weight_orig.mul_(2)  # as an optimizer's step would
    return model


@torch.no_grad()
def test_masks_of_torch_prune_are_taken_over_converted_and_folded() -> None:
    model = masked_llama()
    layer = model.model.layers[0].mlp.up_proj
    want, before = layer.weight_orig * layer.weight_mask, logits(masked_llama())
    new = qlinear.prune(masked_llama(), "magnitude", 0.7).model.layers[0].mlp.up_proj
    assert isinstance(new.weight, nn.Parameter) and not new._forward_pre_hooks
    assert bool((new.weight[want == 0] == 0).all()) and int((new.weight == 0).sum()) == round(0.7 * want.numel())
    folded = fold_masks(masked_llama())
    assert torch.equal(folded.model.layers[0].mlp.up_proj.weight, want)
    assert folded.state_dict().keys() == tiny_llama().state_dict().keys()
    converted = qlinear.convert(model, "w8a16").model.layers[0].mlp.up_proj
    assert not converted._forward_pre_hooks and bool((converted.weight[want == 0] == 0).all())
    assert float((logits(model) - before).norm() / before.norm()) < 0.02


def test_a_failed_conversion_puts_masked_layers_back() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4))
    torch_prune.l1_unstructured(model[0], "weight", 0.5)
    masked, x = model[0], torch.randn(3, 16)
    want = model(x)
    model[1].weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match="'1'"):
        qlinear.convert(model, "w8a16")
    assert model[0] is masked
    model[1].weight.data[0, 0] = 0.0
    assert torch.equal(masked(x), nn.functional.linear(x, masked.weight_orig * masked.weight_mask, masked.bias))
    assert model(x).shape == want.shape


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "gradient"])
def test_a_failure_leaves_the_model_as_it_was(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_gpt2().train()
    torch_prune.l1_unstructured(model.transformer.h[1].mlp.c_fc, "weight", 0.5)
    before, parameters = state(model), dict(model.named_parameters())
    hooks = dict(model.transformer.h[1].mlp.c_fc._forward_pre_hooks)

    def failing(m: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        value = m(**batch).logits.square().mean()
        return value * (math.nan if batch is BATCHES[1] else 1)

    if method == "magnitude":
        real, calls = Tensor.masked_fill_, []

        def fill(self: Tensor, *args: object) -> Tensor:
            calls.append(1)
            if len(calls) > 5:
                raise RuntimeError("no room")
            return real(self, *args)

        monkeypatch.setattr(Tensor, "masked_fill_", fill)
    elif method != "gradient":
        monkeypatch.setattr(type(model.transformer.h[1].mlp), "forward", lambda self, x: x)  # c_fc gets no input
    with pytest.raises((ValueError, RuntimeError), match=r"no room|no input|finite"):
        qlinear.prune(model, method, 0.5, calibration=BATCHES, loss=failing if method == "gradient" else None)
    monkeypatch.undo()
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[k], before[k]) for k in before)
    assert all(parameters[name] is value for name, value in model.named_parameters()) and model.training
    assert dict(model.transformer.h[1].mlp.c_fc._forward_pre_hooks) == hooks
    assert all(p.grad is None and p.requires_grad for p in model.parameters()) and model.config.use_cache


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "obd"}, "methods are: magnitude"),
        ({"pattern": "block"}, "patterns are"),
        ({"pattern": "4:2"}, "0 < n < m"),
        ({"pattern": "2:4", "sparsity": 0.6}, "makes a sparsity of 0.5"),
        ({"sparsity": None}, "between 0 and 1, got None"),
        ({"sparsity": 1.0}, "between 0 and 1"),
        ({"sparsity": {"nothing*": 0.5}}, "matches no linear layer"),
        ({"sparsity": {}}, "empty"),
        ({"sparsity": {"*": None}}, "nothing to prune"),
        ({"sparsity": {"lm_head*": 0.5}}, "by its exact name"),
        ({"method": "wanda"}, "needs calibration"),
        ({"method": "wanda", "calibration": []}, "no calibration batches"),
        ({"method": "wanda", "calibration": [1], "scope": "global"}, "does not rank layers together"),
        ({"scope": "model"}, "scopes are"),
        ({"sparsity": {"*.0.*": 0.25, "*": 0.5}, "scope": "global"}, "one sparsity .* got 0.25 for 'model.layers.0"),
        ({"method": "gradient", "calibration": [1]}, "loss"),
        ({"loss": print}, "loss"),
        ({"scheme": "w4a16"}, "sweep"),
        ({"method": "sparsegpt", "calibration": [1], "damping": 0}, "damping"),
        ({"method": "sparsegpt", "calibration": [1], "shrinkage": 1}, "shrinkage"),
        ({"method": "sparsegpt", "calibration": [1], "scheme": "w3a16"}, "schemes are"),
        ({"method": "sparsegpt", "calibration": [1], "scheme": "fp8"}, "does not store integers"),
        ({"pattern": "neurons", "sparsity": 0.001}, "can be removed"),
        ({"pattern": "neurons", "sparsity": {"*.0.*": 0.25, "*": None}}, "one number of neurons"),
        ({"pattern": "heads", "sparsity": 0.5, "scope": "global"}, "one number of heads"),
    ],
    ids=str,
)
def test_bad_input_is_named(arguments: dict[str, object], message: str) -> None:
    model = tiny_llama()
    before = state(model)
    with pytest.raises(ValueError, match=message):
        qlinear.prune(model, **{"sparsity": 0.5, **arguments})
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_layer_that_cannot_be_pruned_is_named() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    model[1].weight.data[0, 0] = math.inf
    with pytest.raises(ValueError, match=r"'1'.*NaN or infinity"):
        qlinear.prune(model, "magnitude", 0.5)
    assert bool((model[0].weight != 0).all())
    with pytest.raises(ValueError, match="meta"):
        qlinear.prune(nn.Linear(8, 8, device="meta"), "magnitude", 0.5)
