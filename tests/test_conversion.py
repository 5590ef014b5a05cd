"""qlinear.convert: what is swapped, what is left and why, and that a failure changes nothing."""

import copy
import gc
import sys
import weakref
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from models import TINY_MODELS, bits, logits, relative_error, same_bits, tiny_gpt2, tiny_llama
from torch import nn
from torch.nn.utils import parametrize

import qlinear
from qlinear import QLinear
from qlinear.conversion import candidates
from qlinear.undo import Undo


def layers(model):
    """Name and scheme of every converted layer."""
    return {name: m.scheme for name, m in model.named_modules() if isinstance(m, QLinear)}


def floats(model):
    return [name for name, m in model.named_modules() if type(m) is nn.Linear]


def mlp():
    torch.manual_seed(0)
    parts = {"up": nn.Linear(40, 64), "act": nn.GELU(), "down": nn.Linear(64, 40), "head": nn.Linear(40, 7, bias=False)}
    return nn.Sequential(OrderedDict(parts))


class Snapshot:
    """Everything about a model that a failed conversion must not change."""

    def __init__(self, model, x=None):
        self.model, self.x = model, x
        self.types = {name: type(m) for name, m in model.named_modules(remove_duplicate=False)}
        self.state = {name: (t.dtype, bits(t), t.requires_grad) for name, t in self._tensors()}
        self.training = {name: m.training for name, m in model.named_modules()}
        self.output = None if x is None else model(x).detach()

    def _tensors(self):
        yield from self.model.named_parameters(remove_duplicate=False)
        yield from self.model.named_buffers(remove_duplicate=False)

    def assert_unchanged(self):
        model = self.model
        assert {name: type(m) for name, m in model.named_modules(remove_duplicate=False)} == self.types
        now = {name: (t.dtype, bits(t), t.requires_grad) for name, t in self._tensors()}
        assert list(now) == list(self.state)
        for name, (dtype, data, grad) in now.items():
            old = self.state[name]
            assert (dtype, grad) == (old[0], old[2]) and torch.equal(data, old[1]), name
        assert {name: m.training for name, m in model.named_modules()} == self.training
        if self.x is not None:
            assert same_bits(model(self.x).detach(), self.output)


# --- real architectures


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
    assert relative_error(after, before.double()) < (0.03 if "w8" in scheme else 0.4)
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


# --- choosing


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


def count_conversions(monkeypatch, hook=lambda count, linear: None):
    """Calls ``hook(k, layer)`` before the k-th layer is converted; returns the list of converted layers' shapes."""
    real, calls = QLinear.from_float.__func__, []

    def counting(cls, linear, *args, **kwargs):
        calls.append(tuple(linear.weight.shape))
        hook(len(calls), linear)
        return real(cls, linear, *args, **kwargs)

    monkeypatch.setattr(QLinear, "from_float", classmethod(counting))
    return calls


def test_converting_again_finds_nothing_left():
    model = qlinear.convert(mlp(), "w8a16")
    with pytest.raises(ValueError, match="none"):
        qlinear.convert(model, "w4a16")


def test_converting_in_two_steps():
    model = qlinear.convert(qlinear.convert(mlp(), {"up": "w4a16"}), "w8a16")
    assert layers(model) == {"up": "w4a16", "down": "w8a16", "head": "w8a16"}


# --- what is left alone


def test_a_tied_lm_head_is_left_with_the_reason():
    model = tiny_llama(tied=True)
    reasons = {c.name: c.tied_to for c in candidates(model) if c.tied_to}
    assert reasons == {"lm_head": "model.embed_tokens.weight"}
    qlinear.convert(model, "w8a16")
    assert floats(model) == ["lm_head"]
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings is True


@pytest.mark.parametrize("pattern", ["*head", "re:lm_head", "*"])
def test_only_its_exact_name_asks_for_a_tied_layer(pattern):
    model = tiny_llama(tied=True)
    if pattern == "*":
        qlinear.convert(model, {pattern: "w8a16"})
        assert floats(model) == ["lm_head"]
    else:
        with pytest.raises(ValueError, match=r"nothing to convert.*tied to model\.embed_tokens\.weight"):
            qlinear.convert(model, {pattern: "w8a16"})


def test_a_tied_lm_head_asked_for_by_name_is_untied():
    model = tiny_llama(tied=True)
    embedding = model.model.embed_tokens.weight.detach().clone()
    qlinear.convert(model, {"lm_head": "w8a16", "*": "w4a16"})
    assert model.lm_head.scheme == "w8a16" and model.config.tie_word_embeddings is False
    assert torch.equal(model.model.embed_tokens.weight, embedding)
    assert torch.isfinite(logits(model)).all()


class Doubling(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Renamed(nn.Linear):
    """A subclass that computes what nn.Linear computes."""


def obstacles():
    attention = nn.MultiheadAttention(40, 4)
    parametrized = nn.Linear(40, 40)
    parametrize.register_parametrization(parametrized, "weight", nn.Identity())
    patched = nn.Linear(40, 40)
    patched.forward = lambda x: x
    return {
        "attention": (attention, "out_proj", "read directly by nn.MultiheadAttention"),
        "own forward": (nn.Sequential(Doubling(40, 40)), "0", "Doubling has a forward of its own"),
        "parametrized": (nn.Sequential(parametrized), "0", "its weight is parametrized"),
        "patched": (nn.Sequential(patched), "0", "its forward was replaced on the instance"),
        "lazy": (nn.Sequential(nn.LazyLinear(40)), "0", "not initialized"),
    }


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
@pytest.mark.parametrize("case", ["attention", "own forward", "parametrized", "patched", "lazy"])
def test_what_cannot_be_swapped_is_left_with_the_reason(case):
    module, name, reason = obstacles()[case]
    model = nn.ModuleDict({"x": module, "y": nn.Linear(40, 40)})
    before = module.get_submodule(name)
    found = {c.name: c.obstacle for c in candidates(model)}
    assert reason in found[f"x.{name}"] and found["y"] is None
    qlinear.convert(model, "w8a16")
    assert module.get_submodule(name) is before and isinstance(model["y"], QLinear)
    model = nn.ModuleDict({"x": module, "y": nn.Linear(40, 40)})
    with pytest.raises(ValueError, match=f"layer 'x.{name}' cannot be converted: .*{reason}"):
        qlinear.convert(model, {f"x.{name}": "w8a16"})
    assert type(model["y"]) is nn.Linear


def test_multihead_attention_still_runs():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(40, 4), "after": nn.Linear(40, 40)}).eval()
    x = torch.randn(3, 2, 40)
    expected = model["attention"](x, x, x)[0]
    qlinear.convert(model, "w8a16")
    assert same_bits(model["attention"](x, x, x)[0], expected)


def test_a_transformer_encoder_of_torch_still_runs():
    """In eval mode its fast path reads the weights of linear1 and linear2; a decoder layer has no fast path."""
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(40, 4, 64, batch_first=True), 2)
    decoder = nn.TransformerDecoderLayer(40, 4, 64, batch_first=True)
    model = nn.ModuleDict({"encoder": encoder, "decoder": decoder, "head": nn.Linear(40, 7)}).eval()

    def run():
        x = torch.linspace(-1, 1, 400).view(2, 5, 40)
        return model["head"](model["decoder"](x, model["encoder"](x)))

    with torch.no_grad():
        expected = run()
        qlinear.convert(model, "w8a16")
        assert relative_error(run(), expected.double()) < 0.03
    assert sorted(layers(model)) == ["decoder.linear1", "decoder.linear2", "head"]
    assert "TransformerEncoderLayer" in {c.name: c.obstacle for c in candidates(model)}["encoder.layers.1.linear2"]


def test_a_subclass_that_computes_the_same_is_swapped():
    assert layers(qlinear.convert(nn.Sequential(Renamed(40, 7)), "w8a16")) == {"0": "w8a16"}


# --- what is kept


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


# --- all or nothing


class Model(nn.Module):
    """One layer twice, a tied pair, an embedding tied to the head, a Conv1D-free mixture of dtypes and gradients."""

    def __init__(self):
        super().__init__()
        from transformers.pytorch_utils import Conv1D

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


def fail_at(k):
    def fail(count, linear):
        if count == k:
            raise RuntimeError("injected")

    return fail


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
