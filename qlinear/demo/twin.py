"""The off-grid twin of a model: the same function, with weights that lie on no quantization grid.

The demo's model was shipped in 4 bits (GGUF Q4_1: groups of 32 that hold 16 values each), so rounding its
weights to 4 bits again says little about rounding a float model. A random positive rescale of the channels
between neighbouring layers changes every weight and not the function; quality is measured on that.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_ATTENTION, _MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")


@torch.no_grad()
def off_grid_twin(model: nn.Module, seed: int = 0, sigma: float = 0.15) -> nn.Module:
    """Rescales the channels of a Llama-like model in place by seeded lognormal factors, and returns it.

    The arithmetic is float32, rounded once to the parameters' dtype.

    Raises:
        ValueError: the model is not built like Llama; it is unchanged if a layer is missing, and has to be
            loaded again if its output was found to differ after the rescale.
    """
    layers = _layers(model)
    random = torch.Generator().manual_seed(seed)

    def factors(channels: int) -> Tensor:
        return torch.exp(sigma * torch.randn(channels, generator=random))

    before = _logits(model)
    for layer in layers:
        attention, mlp = layer.self_attn, layer.mlp
        for norm, readers in (
            (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            s = factors(norm.weight.numel())
            _scale(norm.weight, s)
            for reader in readers:
                _scale(reader.weight, 1 / s)
        s = factors(attention.v_proj.out_features)
        _scale_rows(attention.v_proj, s)
        # Query heads that share a value head (GQA) see its scale, one after the other.
        head = attention.head_dim
        repeats = attention.o_proj.in_features // attention.v_proj.out_features
        _scale(attention.o_proj.weight, 1 / s.view(-1, head).repeat_interleave(repeats, dim=0).flatten())
        s = factors(mlp.up_proj.out_features)
        _scale_rows(mlp.up_proj, s)
        _scale(mlp.down_proj.weight, 1 / s)
    _check(before, _logits(model))
    return model


def _layers(model: nn.Module) -> list[Any]:
    """The decoder layers, once every module the rescale touches is known to be there."""
    layers = getattr(getattr(model, "model", None), "layers", None)
    kind = type(model).__name__
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        raise ValueError(f"{kind} is not built like Llama: it has no model.layers")
    for i, layer in enumerate(layers):
        names = ["input_layernorm", "post_attention_layernorm"]
        names += [f"self_attn.{n}" for n in _ATTENTION] + [f"mlp.{n}" for n in _MLP]
        for name in names:
            part: Any = layer
            for attribute in name.split("."):
                part = getattr(part, attribute, None)
            if not isinstance(getattr(part, "weight", None), Tensor) or (
                "proj" in name and not isinstance(part, nn.Linear)
            ):
                raise ValueError(f"{kind} is not built like Llama: layer {i} has no float {name}")
        if not hasattr(layer.self_attn, "head_dim"):
            raise ValueError(f"{kind} is not built like Llama: layer {i} has no self_attn.head_dim")
    return list(layers)


def _scale(parameter: Tensor, by: Tensor) -> None:
    """Multiplies the last axis (a norm's weight, or a matrix's columns)."""
    parameter.copy_(parameter.float() * by.to(parameter.device))


def _scale_rows(linear: nn.Linear, by: Tensor) -> None:
    by = by.to(linear.weight.device)
    linear.weight.copy_(linear.weight.float() * by.unsqueeze(1))
    if linear.bias is not None:
        linear.bias.copy_(linear.bias.float() * by)


def _logits(model: Any) -> Tensor:
    """The logits of a few fixed tokens, to compare."""
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = (torch.arange(16) * 7919 + 11) % vocabulary
    device = next(model.parameters()).device
    logits: Tensor = model(input_ids=ids.unsqueeze(0).to(device), use_cache=False).logits
    return logits


def _check(before: Tensor, after: Tensor) -> None:
    """The rescale must have kept the function, to the precision of the model's dtype."""
    error = float((after.float() - before.float()).norm() / before.float().norm().clamp(min=1e-30))
    bound = 1e-3 if before.dtype == torch.float32 else 0.1
    if not error <= bound:
        raise ValueError(
            f"rescaling changed the model's function (relative error {error:.2g} of the logits): it is not built "
            "like Llama; load it again"
        )
