"""qlinear.convert: what is swapped, and by which pattern."""

import pytest
import torch
from layers import Snapshot, count_conversions, floats, layers, mlp
from models import TINY_MODELS, logits, relative_error, same_bits, tiny_gpt2, tiny_llama
from torch import nn

import qlinear
from qlinear import QLinear


@pytest.mark.parametrize("scheme", sorted(qlinear.format.DENSE))
@pytest.mark.parametrize("kind", TINY_MODELS)
def test_a_converted_transformer_is_close_to_float(kind, scheme):
    model = TINY_MODELS[kind]()
    with torch.no_grad():
        before = logits(model)
        assert qlinear.convert(model, scheme) is model
        after = logits(model)
    assert set(layers(model).values()) == {scheme}
    left = {"bert": [], "gpt2": ["lm_head"], "llama": [], "vit": []}[kind]  # GPT-2 ties its lm_head to the embedding
    assert floats(model) == left
    bound = 0.15 if "fp8" in scheme else 0.03 if "w8" in scheme else 0.4
    assert relative_error(after, before.double()) < bound
    assert relative_error(after, before.double()) > 0


def test_a_converted_transformer_writes_text():
    model = qlinear.convert(tiny_llama().bfloat16(), "w4a16-g32")
    tokens = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert tokens.shape == (1, 8)


def test_gpt2_has_its_conv1d_layers_swapped():
    model = qlinear.convert(tiny_gpt2(), "w8a16")
    assert len(layers(model)) == 8
    attention = model.transformer.h[0].attn.c_attn
    assert (attention.in_features, attention.out_features) == (64, 192)


def test_patterns_first_match_wins():
    model = qlinear.convert(
        tiny_llama(),
        {"re:.*mlp\\.(gate|up)_proj": "w4a16-g64", "*.mlp.*": "w4a16", "lm_head": None, "*": qlinear.Scheme(8)},
    )
    found = layers(model)
    assert found["model.layers.0.mlp.gate_proj"] == found["model.layers.1.mlp.up_proj"] == "w4a16-g64"
    assert found["model.layers.0.mlp.down_proj"] == "w4a16"
    assert found["model.layers.1.self_attn.q_proj"] == "w8a16"
    assert floats(model) == ["lm_head"] and len(found) == 14


def test_what_no_pattern_matches_is_left():
    model = qlinear.convert(mlp(), {"up": "w8a16"})
    assert layers(model) == {"up": "w8a16"} and floats(model) == ["down", "head"]


def test_a_regular_expression_matches_the_whole_name():
    assert layers(qlinear.convert(mlp(), {"re:up|down": "w8a8"})) == {"up": "w8a8", "down": "w8a8"}
    with pytest.raises(ValueError, match=r"pattern 're:u' matches no linear layer"):
        qlinear.convert(mlp(), {"re:u": "w8a8"})


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("w9a16", "'w9a16' does not exist; the schemes are: .*w4a16"),
        ({"up": "w8a16", "down": "int4"}, "'int4' is not of the form"),
        ({"nothing.*": "w8a16"}, r"pattern 'nothing\.\*' matches no linear layer; .* are: up, down, head"),
        ({"up": "w8a16", "act": "w8a16"}, "pattern 'act' matches no linear layer"),
        ({"re:(": "w8a16"}, r"'re:\(' is not a regular expression"),
        ({}, "mapping of patterns to schemes is empty"),
        ({"*": None}, "nothing to convert"),
    ],
    ids=["scheme", "form", "glob", "not linear", "regex", "empty", "all left"],
)
def test_a_wrong_request_raises_before_anything_changes(what, message):
    model = mlp()
    snapshot = Snapshot(model, torch.randn(2, 40))
    with pytest.raises(ValueError, match=message):
        qlinear.convert(model, what)
    snapshot.assert_unchanged()


def test_a_model_without_linear_layers_raises():
    with pytest.raises(ValueError, match="none"):
        qlinear.convert(nn.Sequential(nn.ReLU(), nn.Conv2d(3, 4, 3)), "w8a16")


def test_the_root_may_be_the_layer_itself():
    linear = nn.Linear(40, 7)
    new = qlinear.convert(linear, "w8a16")
    assert isinstance(new, QLinear) and type(linear) is nn.Linear
    with pytest.raises(ValueError, match="layer ''"):
        linear.weight.data[0, 0] = torch.nan
        qlinear.convert(linear, "w8a16")


def test_a_module_used_twice_is_converted_once(monkeypatch):
    shared = nn.Linear(40, 40)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, nn.ReLU()), "c": nn.Linear(40, 40)})
    calls = count_conversions(monkeypatch)
    qlinear.convert(model, {"b.0": "w4a16", "*": "w8a16"})
    assert len(calls) == 2
    assert model["a"] is model["b"][0] and model["a"].scheme == "w4a16"
    assert model["c"].scheme == "w8a16"


def test_converting_again_finds_nothing_left():
    model = qlinear.convert(mlp(), "w8a16")
    with pytest.raises(ValueError, match="none"):
        qlinear.convert(model, "w4a16")


def test_converting_in_two_steps():
    model = qlinear.convert(qlinear.convert(mlp(), {"up": "w4a16"}), "w8a16")
    assert layers(model) == {"up": "w4a16", "down": "w8a16", "head": "w8a16"}


def test_requires_grad_training_and_bias_are_kept():
    model = mlp()
    model.up.bias.requires_grad_(False)
    model.down.eval()
    biases = [model.up.bias, model.down.bias]
    qlinear.convert(model, "w8a16")
    assert model.up.bias is biases[0] and not model.up.bias.requires_grad
    assert model.down.bias is biases[1] and model.down.bias.requires_grad
    assert (model.up.training, model.down.training, model.head.bias) == (True, False, None)


def test_hooks_go_on_working_and_can_be_removed():
    model, seen = mlp(), []
    handles = [
        model.up.register_forward_pre_hook(lambda m, x: seen.append("pre")),
        model.up.register_forward_pre_hook(lambda m, x, k: seen.append("pre with kwargs"), with_kwargs=True),
        model.up.register_forward_hook(lambda m, x, y: seen.append("post")),
        model.up.register_forward_hook(lambda m, x, k, y: seen.append("post with kwargs"), with_kwargs=True),
        model.up.register_full_backward_hook(lambda m, gx, gy: seen.append("backward")),
        model.up.register_full_backward_pre_hook(lambda m, gy: seen.append("backward pre")),
    ]
    x = torch.randn(2, 40, requires_grad=True)
    model(x).sum().backward()
    expected = list(seen)
    assert len(expected) == 6
    seen.clear()
    qlinear.convert(model, "w8a16")
    model(x).sum().backward()
    assert seen == expected
    for handle in handles:
        handle.remove()
    seen.clear()
    model(x).sum().backward()
    assert seen == []


def test_compute_dtype_reaches_every_layer():
    model = qlinear.convert(mlp(), "w4a16", compute_dtype=torch.bfloat16)
    assert {m.compute_dtype for m in model if isinstance(m, QLinear)} == {torch.bfloat16}
    assert model(torch.randn(2, 40)).dtype == torch.float32


@pytest.mark.parametrize(
    ("what", "names"),
    [("w4a16", "w4a16"), ({"0": "w8a16", "1": "w4a16"}, "w4a16, w8a16"), ({"0": "w8a16", "*": None}, "w8a16")],
    ids=["one-scheme", "mapping", "left-in-float"],
)
def test_prune_is_refused_where_no_scheme_is_sparse(what, names):
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    with pytest.raises(ValueError, match=rf"prune='magnitude' .* and {names} has none"):
        qlinear.convert(model, what, prune="magnitude")
    assert all(type(layer) is nn.Linear for layer in model)
    qlinear.convert(model, {"0": "w4a16", "1": "w4a16-2:4"}, prune="magnitude")


def test_a_layout_that_a_layer_does_not_have_changes_none():
    model = qlinear.convert(
        nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), {"0": "w4a16-2:4", "1": "w4a16"}, prune="magnitude"
    )
    before = [layer.layout for layer in model]
    with pytest.raises(ValueError, match=r"layer '1': layout 'mma.sp' is for 2:4 weights, got w4a16"):
        qlinear.prepare(model, "mma.sp")
    assert [layer.layout for layer in model] == before


def test_prepare_after_loading_by_hand():
    model = qlinear.convert(mlp().bfloat16(), "w4a16")
    with torch.device("meta"):
        fresh = mlp()
    for name in ("up", "down", "head"):
        old = model.get_submodule(name)
        new = QLinear(old.in_features, old.out_features, old.scheme, old.bias is not None, "meta", torch.bfloat16)
        setattr(fresh, name, new)
    fresh.load_state_dict(model.state_dict(), assign=True)
    assert qlinear.prepare(fresh) is fresh
    x = torch.randn(3, 40, dtype=torch.bfloat16)
    assert same_bits(fresh(x), model(x))
