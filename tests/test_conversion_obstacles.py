"""qlinear.convert: what is left, and why."""

import pytest
import torch
from layers import floats, layers
from models import logits, relative_error, same_bits, tiny_llama
from torch import nn
from torch.nn.utils import parametrize

import qlinear
from qlinear import QLinear
from qlinear.selection import candidates


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


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.spectral_norm], ids=["weight_norm", "spectral_norm"])
def test_a_weight_that_hooks_compute_is_left_alone(norm):
    model = nn.Sequential(norm(nn.Linear(64, 64)), nn.Linear(64, 8)).eval()
    qlinear.convert(model, "w8a16")
    assert floats(model) == ["0"] and model(torch.randn(3, 64)).shape == (3, 8)
    with pytest.raises(ValueError, match=r"layer '0' cannot be converted: its weight is computed before every forward"):
        qlinear.convert(model, {"0": "w8a16"})


@pytest.mark.parametrize("dtype", [torch.float64, "bfloat16"], ids=str)
def test_a_compute_dtype_that_no_product_has_is_refused(dtype):
    model = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(ValueError, match=rf"layer '0' \(w8a16\): compute_dtype is one of .* got .*{dtype}"):
        qlinear.convert(model, "w8a16", compute_dtype=dtype)
    assert isinstance(model[0], nn.Linear)
