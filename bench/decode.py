"""Greedy decoding of the demo's model at batch 1 on this CPU: every scheme, and bitsandbytes' nf4, against bfloat16."""

from __future__ import annotations

import copy

import torch
from torch import nn

import qlinear
from qlinear.demo.decode import decode_rate
from qlinear.tables import table

SCHEMES = ("w8a16", "w8a8", "w4a16-g64", "w4a16-g32-asym")


def measure(model: nn.Module, rounds: int, tokens: int, nf4: bool) -> dict[str, float]:
    """Median tokens per second by name; the lm_head is the same bfloat16 layer everywhere."""
    models = {"float": model}
    for scheme in SCHEMES:
        models[scheme] = qlinear.convert(copy.deepcopy(model), {"lm_head": None, "*": scheme}).eval()
    if nf4:
        models["bitsandbytes nf4"] = to_nf4(copy.deepcopy(model)).eval()
    rates = decode_rate(models, rounds, tokens, progress="decoding, in turns")
    if nf4:
        assert_packed(models["bitsandbytes nf4"])
    return rates


def to_nf4(model: nn.Module) -> nn.Module:
    """Swaps every linear layer but the lm_head for bitsandbytes' 4-bit one."""
    import bitsandbytes as bnb

    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and name != "lm_head":
            new = bnb.nn.Linear4bit(
                layer.in_features, layer.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
            )
            new.weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
            model.set_submodule(name, new.to("cpu"))
    return model


def assert_packed(model: nn.Module) -> None:
    """Raises unless every 4-bit layer ran bitsandbytes' packed CPU path: its slow path would be too easy a baseline."""
    import bitsandbytes as bnb

    layers = [m for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)]
    slow = [m for m in layers if not getattr(m.weight.quant_state, "packing_format_for_cpu", False)]
    if not layers or slow:
        raise RuntimeError(f"bitsandbytes' packed CPU path did not run in {len(slow)} of {len(layers)} layers")


def show(rates: dict[str, float]) -> str:
    rows = [(name, f"{rate:.1f}", f"{rate / rates['float']:.2f}x") for name, rate in rates.items()]
    return table(("decoding", "tokens/s", "of float"), rows, right=(1, 2))
