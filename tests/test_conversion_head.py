"""qlinear.convert: an output head takes no sparse scheme that nobody asked it to take, as qlinear.prune leaves it."""

import pytest
import torch
from layers import Snapshot, floats, layers, mlp
from models import logits, relative_error, tiny_gpt2, tiny_llama
from torch import nn

import qlinear
from qlinear import QLinear, sparse
from qlinear.format import FORMATS

SPARSE = sorted(name for name, fmt in FORMATS.items() if fmt.sparsity)


def pruned(scheme, what=0.5, **config):
    """A tiny Llama in the pattern of a scheme."""
    return qlinear.prune(tiny_llama(**config).bfloat16(), "magnitude", what, FORMATS[scheme].sparsity)


def dense_of(scheme):
    """The name of a scheme's dense twin; None where that is float."""
    return FORMATS[scheme].dense and FORMATS[scheme].dense.name


def test_every_sparse_scheme_of_integers_has_a_dense_twin_of_the_same_codes():
    assert {"w4a16-2:4", "w4a16-asym-2:4", "w4a16-block64", "w8a16-unstructured", "w16a16-2:4"} <= set(SPARSE)
    for name in SPARSE:
        fmt = FORMATS[name]
        assert (fmt.dense is None) == (fmt.number == "float")
        if fmt.dense:
            values = [(f.bits, f.activation_bits, f.group_size, f.symmetric, f.number) for f in (fmt, fmt.dense)]
            assert values[0] == values[1] and fmt.dense.sparsity is None


@pytest.mark.parametrize("prune", [None, "magnitude"])
@pytest.mark.parametrize("scheme", SPARSE)
def test_a_pruned_model_is_converted_in_one_call(scheme, prune):
    model = pruned(scheme) if prune is None else tiny_llama().bfloat16()
    head, dense = model.lm_head.weight.detach().clone(), dense_of(scheme)
    with torch.no_grad():
        # Of a model that `convert` prunes: what it makes of one that was pruned.
        before = logits(pruned(scheme))
        qlinear.convert(model, scheme, prune=prune)
        assert relative_error(logits(model), before.double()) < 0.4
    found = layers(model)
    assert found.pop("lm_head", None) == dense and floats(model) == ([] if dense else ["lm_head"])
    assert len(found) == 14 and set(found.values()) == {scheme}
    if dense:
        alone = QLinear.from_float(_linear(head), dense)
        assert torch.equal(model.lm_head.dequantize(), alone.dequantize())
    else:
        assert torch.equal(model.lm_head.weight, head)


def _linear(weight):
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    layer.weight.data = weight
    return layer


@pytest.mark.parametrize("prune", [None, "magnitude"])
@pytest.mark.parametrize("scheme", SPARSE)
def test_a_head_that_was_pruned_is_converted_as_it_is(scheme, prune):
    share = 0.5 if FORMATS[scheme].sparsity == "2:4" else 0.25
    model = pruned(scheme, {"lm_head": share, "*": 0.5})
    zeros = model.lm_head.weight == 0
    qlinear.convert(model, scheme, prune=prune)
    assert set(layers(model).values()) == {scheme} and floats(model) == []
    assert int(model.lm_head.dequantize()[zeros].count_nonzero()) == 0
    assert model.lm_head.packed.density == 1 - share


def test_a_few_zeros_are_no_pruning():
    """Rows of tokens that nobody uses, of int8 less than every eighth weight: a bit for each costs more."""
    model, fmt = pruned("w8a16-unstructured"), FORMATS["w8a16-unstructured"]
    model.lm_head.weight.data[90:] = 0
    assert sparse.holds(model.lm_head.weight, fmt) and not sparse.pays(model.lm_head.weight, fmt)
    assert "w8a16-unstructured" not in qlinear.pruning.report(model).layers[-1].predicted
    qlinear.convert(model, "w8a16-unstructured")
    assert model.lm_head.scheme == "w8a16"


def test_asked_for_by_its_exact_name_it_is_as_any_other_layer():
    model = pruned("w4a16-2:4")
    snapshot = Snapshot(model)
    with pytest.raises(ValueError, match=r"layer 'lm_head' \(w4a16-2:4\): .* 2:4: [0-9.]+% of its groups"):
        qlinear.convert(model, {"lm_head": "w4a16-2:4", "*": "w4a16-2:4"})
    snapshot.assert_unchanged()
    qlinear.convert(model, {"lm_head": "w4a16-2:4", "*": "w4a16-2:4"}, prune="magnitude")
    assert set(layers(model).values()) == {"w4a16-2:4"} and model.lm_head.packed.density == 0.5


@pytest.mark.parametrize(
    "what", [{"*": "w4a16-2:4", "lm_head": "w4a16-2:4"}, {"re:.*": "w4a16-2:4"}, {"*head": "w4a16-2:4"}]
)
def test_a_rule_for_more_than_the_head_is_not_its_name(what):
    """The first match wins, whatever comes after it."""
    model = qlinear.convert(pruned("w4a16-2:4"), what)
    assert model.lm_head.scheme == "w4a16"


def test_prune_reads_names_in_the_same_way():
    model = qlinear.prune(tiny_llama(), "magnitude", {"*": 0.5, "lm_head": 0.5})
    assert int((model.lm_head.weight == 0).sum()) == 0


def test_other_layers_without_the_pattern_are_named_with_the_share_that_violates_it():
    model = pruned("w4a16-2:4")
    model.model.layers[1].mlp.up_proj.weight.data.fill_(1)
    with pytest.raises(ValueError, match=r"layer 'model.layers.1.mlp.up_proj' \(w4a16-2:4\): .* 100.0% of its groups"):
        qlinear.convert(model, "w4a16-2:4")
    assert len(floats(model)) == 15


def test_a_scheme_of_its_own_and_a_dense_one_are_taken_as_they_are():
    model = qlinear.convert(pruned("w4a16-2:4"), {"lm_head": "w8a8", "*": "w4a16-2:4"})
    assert model.lm_head.scheme == "w8a8"
    model = qlinear.convert(pruned("w4a16-2:4"), {"lm_head": None, "*": "w4a16-2:4"})
    assert floats(model) == ["lm_head"]
    assert qlinear.convert(tiny_llama(), "w4a16").lm_head.scheme == "w4a16"


def test_a_tied_head_is_left_alone():
    model = qlinear.convert(pruned("w4a16-2:4", tied=True), "w4a16-2:4")
    assert floats(model) == ["lm_head"] and model.lm_head.weight is model.model.embed_tokens.weight
    model = qlinear.convert(tiny_gpt2(), "w4a16-2:4", prune="magnitude")
    assert floats(model) == ["lm_head"] and set(layers(model).values()) == {"w4a16-2:4"}


@pytest.mark.parametrize("prune", [None, "magnitude"])
def test_only_the_head_is_left(prune):
    def head_only():
        return qlinear.convert(tiny_llama(), {"lm_head": None, "*": "w8a16"})

    if prune is None:
        assert qlinear.convert(head_only(), "w4a16-asym-2:4").lm_head.scheme == "w4a16-asym"
    else:
        with pytest.raises(
            ValueError, match=r"w4a16 has none: .*; the output head has to be asked for by its exact name"
        ):
            qlinear.convert(head_only(), "w4a16-2:4", prune=prune)
    with pytest.raises(
        ValueError, match=r"nothing to convert but the output head 'lm_head', which is not pruned for w16"
    ):
        qlinear.convert(head_only(), "w16a16-2:4", prune=prune)


class Decoder(nn.Module):
    """A model with a head of its own further down, as multimodal models have it."""

    def __init__(self, head):
        super().__init__()
        self.body, self.text = mlp(), nn.Module()
        self.text.head = head

    def get_output_embeddings(self):
        return self.text.head


def test_a_head_further_down():
    model = qlinear.convert(Decoder(nn.Linear(7, 70)), "w8a16-2:4", prune="magnitude")
    assert layers(model) == dict.fromkeys(("body.up", "body.down", "body.head"), "w8a16-2:4") | {"text.head": "w8a16"}
    model = qlinear.convert(Decoder(nn.Linear(7, 70)), {"text.head": "w8a16-2:4"}, prune="magnitude")
    assert layers(model) == {"text.head": "w8a16-2:4"}


@pytest.mark.parametrize("head", [None, nn.Sequential(nn.Linear(7, 70))], ids=["none", "no-linear-layer"])
def test_what_is_no_linear_layer_is_no_head(head):
    model = qlinear.convert(Decoder(head), "w8a16-2:4", prune="magnitude")
    assert set(layers(model).values()) == {"w8a16-2:4"} and len(layers(model)) == (3 if head is None else 4)


@pytest.mark.parametrize("error", [AttributeError, NotImplementedError])
def test_a_model_that_cannot_say_has_no_head(error, monkeypatch):
    def raising(self):
        raise error

    monkeypatch.setattr(Decoder, "get_output_embeddings", raising)
    model = qlinear.convert(Decoder(nn.Linear(7, 70)), "w8a16-2:4", prune="magnitude")
    assert len(layers(model)) == 4 and set(layers(model).values()) == {"w8a16-2:4"}
    assert len(qlinear.inspect(model).quantized) == 4


def test_a_model_that_is_a_linear_layer_has_no_head():
    with pytest.raises(ValueError, match=r"layer '' \(w8a16-2:4\): .* 100.0% of its groups"):
        qlinear.convert(nn.Linear(40, 7), "w8a16-2:4")
    assert qlinear.convert(nn.Linear(40, 7), "w8a16-2:4", prune="magnitude").scheme == "w8a16-2:4"


def test_a_head_without_data_raises_by_name():
    with torch.device("meta"):
        model = Decoder(nn.Linear(7, 70))
    with pytest.raises(ValueError, match=r"layer 'text.head' .* meta device"):
        qlinear.convert(model, {"text*": "w8a16-2:4"})
