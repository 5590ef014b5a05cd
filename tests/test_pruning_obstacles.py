"""Neurons and heads of what is more than it seems: masks are folded in, the rest is refused and left as it was."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from models import logits, tiny_bert, tiny_gpt2, tiny_llama
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils import prune as torch_prune

import qlinear
from qlinear.float_layers import float_shape
from qlinear.pruning import structured
from qlinear.pruning.structure import find

IDS = [{"input_ids": torch.randint(0, 99, (2, 12), generator=torch.Generator().manual_seed(5))}]


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def refused(model: nn.Module, kind: str, message: str, sparsity: object = 0.5) -> None:
    """Pruning raises, and the model is as it was: names, values, the very parameters and hooks."""
    before, parameters = state(model), dict(model.named_parameters())
    hooks = {name: dict(m._forward_pre_hooks) for name, m in model.named_modules()}
    with pytest.raises(ValueError, match=message):
        qlinear.prune(model, "magnitude", sparsity, kind)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[k], before[k]) for k in before)
    assert all(parameters[name] is value for name, value in model.named_parameters())
    assert {name: dict(m._forward_pre_hooks) for name, m in model.named_modules()} == hooks


def masked_llama() -> nn.Module:
    model = tiny_llama()
    for layer in model.model.layers:
        torch_prune.l1_unstructured(layer.mlp.gate_proj, "weight", 0.4)
        torch_prune.l1_unstructured(layer.self_attn.k_proj, "weight", 0.4)
    return model


def masked_bert() -> nn.Module:
    model = tiny_bert()
    for layer in model.bert.encoder.layer:
        torch_prune.random_unstructured(layer.intermediate.dense, "bias", 0.4)
        torch_prune.random_unstructured(layer.attention.self.value, "bias", 0.4)
    return model


#: The consumers have no mask: those on the other layers are found through the structures.
MASKED = {
    "llama-weight": (masked_llama, {"neurons": "*down_proj", "heads": "*o_proj"}),
    "bert-bias": (masked_bert, dict.fromkeys(("neurons", "heads"), "*output.dense")),
}


@pytest.mark.parametrize("kind", ["neurons", "heads"])
@pytest.mark.parametrize("case", MASKED)
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "gradient"])
def test_masks_on_any_layer_of_a_structure_become_permanent(method: str, case: str, kind: str) -> None:
    make, patterns = MASKED[case]
    model, folded = make(), qlinear.pruning.fold_masks(make())
    loss = (lambda m, b: m(**b).logits.float().square().mean()) if method == "gradient" else None
    for each in (model, folded):
        qlinear.prune(each, method, {patterns[kind]: 0.5}, kind, IDS, loss=loss)
    for layer in (layer for structure in find(model, kind) for layer in structure.layers):
        assert not layer._forward_pre_hooks and {"weight", "bias"} == {*layer._parameters}
        assert tuple(layer.weight.shape) == (layer.out_features, layer.in_features)
    with torch.no_grad():
        assert torch.equal(logits(model), logits(folded))


@pytest.mark.parametrize("case", MASKED)
def test_masks_come_back_after_a_failure(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*args: object) -> None:
        raise ValueError("stopped")

    monkeypatch.setattr(structured, "update_config", failing)
    refused(MASKED[case][0](), "neurons", "stopped")


def normed(norm: Callable[..., nn.Module]) -> Callable[[nn.Module], None]:
    return lambda layer: norm(layer) and None


NOT_PLAIN = {
    "weight_norm-hook": (normed(nn.utils.weight_norm), "weight is computed before every forward"),
    "spectral_norm-hook": (normed(nn.utils.spectral_norm), "weight is computed before every forward"),
    "weight_norm": (normed(parametrizations.weight_norm), "weight is parametrized"),
    "spectral_norm": (normed(parametrizations.spectral_norm), "weight is parametrized"),
    "replaced-forward": (lambda layer: setattr(layer, "forward", lambda x: x), "its forward was replaced"),
    "buffer": (lambda layer: layer.register_buffer("scale", torch.ones(1)), "it has scale besides a weight"),
    "child": (lambda layer: setattr(layer, "lora_A", nn.Linear(2, 2)), "it has lora_A besides a weight"),
    "meta": (lambda layer: setattr(layer, "weight", nn.Parameter(layer.weight.to("meta"))), "meta device"),
    "infinite": (lambda layer: layer.weight.data.view(-1)[3].fill_(torch.inf), "NaN or infinity"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize(("path", "kind"), [("mlp.gate_proj", "neurons"), ("self_attn.v_proj", "heads")])
@pytest.mark.parametrize("case", NOT_PLAIN)
def test_a_layer_that_is_not_plain_is_refused_by_name(case: str, path: str, kind: str) -> None:
    model = tiny_llama()
    change, message = NOT_PLAIN[case]
    change(model.get_submodule(f"model.layers.1.{path}"))
    sparsity = {"*down_proj" if kind == "neurons" else "*o_proj": 0.5}
    if case == "meta":
        with pytest.raises(ValueError, match=rf"'model\.layers\.1\.{path}'.*{message}"):
            qlinear.prune(model, "magnitude", sparsity, kind)
    else:
        refused(model, kind, rf"'model\.layers\.1\.{path}'.*{message}", sparsity)


@pytest.mark.parametrize("key", ["weight", "bias"])
@pytest.mark.parametrize("mask", [False, True], ids=["plain", "masked"])
def test_a_shared_parameter_keeps_its_shape(key: str, mask: bool) -> None:
    model = tiny_bert()
    first, second = (layer.intermediate.dense for layer in model.bert.encoder.layer)
    setattr(second, key, getattr(first, key))
    if mask:
        torch_prune.identity(second, key)
    message = rf"'bert\.encoder\.layer\.0\.intermediate\.dense' keeps its shape: its {key} is tied to .*layer\.1"
    refused(model, "neurons", message, {"*output.dense": 0.5})


class Mlp(nn.Module):
    """``fc2(f(fc1(x)))`` of 16, 24 and 16 features, with whatever stands between."""

    def __init__(self, between: nn.Module | None = None, width: int = 24) -> None:
        super().__init__()
        self.fc1, self.between, self.fc2 = nn.Linear(16, width), between or nn.GELU(), nn.Linear(width, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.between(self.fc1(x)))


class Scaled(Mlp):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(size))


class Parallel(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc1(x) * self.fc2(x).sigmoid()


class ScaleNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))


def shared_norm() -> nn.Module:
    norm = nn.LayerNorm(8)
    return nn.Sequential(nn.Linear(8, 8), norm, nn.Linear(8, 8), norm, nn.Linear(8, 8))


def used_twice() -> nn.Module:
    twice = nn.Linear(8, 8)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), twice, nn.ReLU(), twice)


def used_outside() -> nn.Module:
    model = nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8))})
    model["alias"] = model["mlp"][0]
    return model


class Normed(nn.ReLU):
    """A subclass of an elementwise module that is not one."""


MLPS = {
    "layer-norm": (lambda: nn.Sequential(Mlp(nn.LayerNorm(24))), r"0\.between has the width of the neurons, 24"),
    "batch-norm": (lambda: Mlp(nn.BatchNorm1d(24)), "between has the width of the neurons, 24"),
    "statistics-only": (lambda: Mlp(nn.BatchNorm1d(24, affine=False)), "between has the width of the neurons"),
    "norm-without-weight": (lambda: Mlp(nn.LayerNorm(24, elementwise_affine=False)), "between is not known to treat"),
    "norm-in-a-container": (
        lambda: Mlp(nn.Sequential(nn.LayerNorm(24, elementwise_affine=False), nn.GELU())),
        "between is not known to treat",
    ),
    "norm-with-one-scale": (lambda: Mlp(ScaleNorm()), "between is not known to treat"),
    "softmax": (lambda: Mlp(nn.Softmax(-1)), "between is not known to treat each neuron by itself"),
    "prelu": (lambda: Mlp(nn.PReLU(24)), "between has the width of the neurons"),
    "parameter": (lambda: Scaled(24), "scale has the width of the neurons, 24"),
    "quantized": (lambda: Mlp(qlinear.convert(nn.Linear(24, 24), "w4a16")), "between has the width of the neurons"),
    "parallel": (lambda: Parallel(width=16), "16 neurons between 16 inputs and 16 outputs do not show"),
    "used-twice": (used_twice, r"a module is used in 2 places, as 2, 4"),
    "used-outside": (used_outside, r"a module is used in 2 places, as alias, mlp\.0"),
    "shared-norm": (shared_norm, "no MLP"),
    "subclass-of-relu": (lambda: nn.Sequential(nn.Linear(8, 12), Normed(), nn.Linear(12, 8)), "no MLP"),
}


@pytest.mark.parametrize("case", MLPS)
def test_an_mlp_that_is_more_than_its_layers_is_refused(case: str) -> None:
    make, message = MLPS[case]
    refused(make(), "neurons", message, {"*": 0.5})


@pytest.mark.parametrize("between", [nn.GELU(), nn.Sequential(nn.ReLU(), nn.Dropout()), nn.Identity()], ids=str)
def test_an_mlp_of_elementwise_modules_is_pruned(between: nn.Module) -> None:
    model = nn.ModuleDict({"norm": nn.LayerNorm(16), "a": Mlp(between), "b": Scaled(16)})
    qlinear.prune(model, "magnitude", 0.5, "neurons")
    assert float_shape(model["a"].fc1) == float_shape(model["b"].fc1) == (12, 16)
    assert model["a"](torch.randn(3, 16)).shape == (3, 16)


def test_a_sequential_with_names_of_an_mlp_is_pruned_once() -> None:
    model = nn.Sequential()
    for key, module in {"fc1": nn.Linear(16, 24), "act": nn.ReLU(), "fc2": nn.Linear(24, 16)}.items():
        model.add_module(key, module)
    qlinear.prune(model, "magnitude", 0.5, "neurons")
    assert float_shape(model.fc1) == (12, 16) and model(torch.randn(3, 16)).shape == (3, 16)


def test_a_module_used_twice_as_a_whole_is_pruned() -> None:
    block = Mlp()
    model = nn.Sequential(block, nn.LayerNorm(16), block)
    qlinear.prune(model, "magnitude", 0.5, "neurons")
    assert float_shape(block.fc1) == (12, 16) and model(torch.randn(3, 16)).shape == (3, 16)


def hugging_face(family: str, **config: object) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import transformers

        torch.manual_seed(0)
        sizes = {"vocab_size": 99, "hidden_size": 72, "intermediate_size": 130, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 12, "pad_token_id": 0}
        settings = getattr(transformers, f"{family}Config")(**{**sizes, **heads, **config})
        return getattr(transformers, f"{family}ForCausalLM")(settings).eval()

    return make


def changed_llama(change: Callable[[nn.Module], object]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = tiny_llama()
        change(model.model.layers[1].self_attn)
        return model

    return make


def relative_positions() -> nn.Module:
    model = tiny_llama()
    model.positions = nn.Embedding(31, 6)
    return model


BIGCODE = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 32, "multi_query": False}
ATTENTIONS = {
    "norm-over-all-heads": (hugging_face("Olmo2"), r"layers\.0\.self_attn\.q_norm \(Olmo2RMSNorm\) is not known"),
    "sinks": (hugging_face("GptOss", num_local_experts=4), r"parameter model\.layers\.0\.self_attn\.sinks"),
    "width-in-the-forward": (hugging_face("XGLM"), "XGLMAttention reads embed_dim, 72"),
    "joined-by-heads": (hugging_face("GPTBigCode", **BIGCODE), r"attn\.c_attn makes queries, keys and values, in an"),
    "gate": (changed_llama(lambda a: setattr(a, "gate", nn.Linear(72, 6))), r"gate \(Linear\) is not known"),
    "buffer": (changed_llama(lambda a: a.register_buffer("slopes", torch.ones(6))), r"buffer .*layers\.1.*slopes"),
    "other-head-dim": (changed_llama(lambda a: setattr(a, "head_dim", 10)), r"q_proj has 72 features, and heads of 10"),
    "table": (relative_positions, r"positions\.weight \[31, 6\] seems to have a column for each head"),
}


@pytest.mark.parametrize("case", ATTENTIONS)
def test_an_attention_that_is_more_than_its_layers_is_refused(case: str) -> None:
    make, message = ATTENTIONS[case]
    refused(make(), "heads", message)


@pytest.mark.parametrize("kind", ["neurons", "heads"])
@pytest.mark.parametrize("family", ["Mistral", "Qwen2", "Qwen3", "Gemma2", "OPT"])
def test_these_families_are_pruned(family: str, kind: str) -> None:
    changes = {"ffn_dim": 130, "word_embed_proj_dim": 72} if family == "OPT" else {}
    model = hugging_face(family, **changes)()
    before = sum(p.numel() for p in model.parameters())
    qlinear.prune(model, "magnitude", 0.5, kind)
    assert sum(p.numel() for p in model.parameters()) < before
    with torch.no_grad():
        assert bool(logits(model).isfinite().all())


def test_what_is_not_asked_for_stands_in_nobodys_way() -> None:
    model = nn.ModuleDict({"a": Mlp(), "b": Mlp(nn.LayerNorm(24))})
    qlinear.prune(model, "magnitude", {"a.*": 0.5}, "neurons")
    assert float_shape(model["a"].fc1) == (12, 16) and float_shape(model["b"].fc1) == (24, 16)


def test_gpt2_with_a_mask_on_the_joined_projection_generates() -> None:
    model = tiny_gpt2()
    for block in model.transformer.h:
        torch_prune.l1_unstructured(block.attn.c_attn, "weight", 0.3)
    qlinear.prune(model, "magnitude", {"*attn.c_proj": 0.5}, "heads")
    assert model.generate(torch.arange(5).unsqueeze(0), max_new_tokens=3, pad_token_id=0).shape[0] == 1
