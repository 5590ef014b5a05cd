"""What else multiplies by quantized weights: each optional, each with a reason where it cannot do a problem.

Sources: torchao's ``quantize_`` configurations, bitsandbytes' modules, gemlite's ``helper`` and PyTorch's own
``torch._int_mm`` and ``torch._scaled_mm``. The last two are the bare products, on activations that are quantized
already: less work than a w8a8 layer does.
"""

from __future__ import annotations

import copy
import importlib.metadata
import types
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.sides import Side, Unavailable, quiet
from qlinear.format import Format
from qlinear.sparse import prune_weight

#: Makes a side of ``copies`` copies from a float weight ``[N, K]``, rounded like the format, in the peer's own way.
Maker = Callable[[Tensor, Format, int], Side]


def versions() -> dict[str, str]:
    """The versions of the peers that are installed."""
    found = {}
    for name in ("torchao", "gemlite", "bitsandbytes"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def make(name: str, weight: Tensor, fmt: Format, copies: int) -> Side:
    """The side of a peer.

    Raises:
        Unavailable: it is not installed, or cannot do this; whatever else it raises is put into words too.
    """
    try:
        with quiet():
            return PEERS[name](weight, fmt, copies)
    except Unavailable:
        raise
    except ImportError as error:
        raise Unavailable(f"not installed ({error})".splitlines()[0]) from None
    except Exception as error:
        raise Unavailable(f"{type(error).__name__}: {error}".splitlines()[0][:200]) from None


def _refuse(condition: bool, reason: str) -> None:
    if condition:
        raise Unavailable(reason)


_SM_89 = "float8 products need sm_89"


def _four_by_eight(fmt: Format) -> bool:
    return fmt.integer_activations and fmt.bits == 4


def _torchao_weight(weight: Tensor, fmt: Format) -> tuple[Tensor, str | None]:
    """The weight as torchao's subclass, and the operator its fast path runs on a CPU."""
    from torchao import quantization as ao

    config: Any
    operator: str | None
    _refuse(_four_by_eight(fmt), "no int4 weights with int8 activations")
    if fmt.number == "e4m3":
        _refuse(weight.device.type == "cpu", "float8 is for GPUs")
        config, operator = ao.Float8WeightOnlyConfig(set_inductor_config=False), None
        if fmt.quantized_activations:
            _refuse(torch.cuda.get_device_capability(weight.device) < (8, 9), _SM_89)
            config = ao.Float8DynamicActivationFloat8WeightConfig(granularity=ao.PerRow(), set_inductor_config=False)
    elif fmt.integer_activations:
        config, operator = ao.Int8DynamicActivationInt8WeightConfig(set_inductor_config=False), "aten::_int_mm"
    elif fmt.bits == 8:
        _refuse(fmt.group_size is not None, "int8 groups are dequantized whole")
        config, operator = ao.Int8WeightOnlyConfig(set_inductor_config=False), "aten::_weight_int8pack_mm"
    else:
        group = fmt.group_size
        _refuse(group is None, "no int4 weight per channel")
        _refuse(weight.shape[1] % (group or 1) != 0, f"K = {weight.shape[1]} is not a multiple of the group")
        operator = "aten::_weight_int4pack_mm_for_cpu"
        if weight.device.type == "cpu":
            # The layout that PyTorch's packed CPU operator reads; the released configurations have none for a CPU.
            from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

            config = PrototypeInt4WeightOnlyConfig(group, set_inductor_config=False)
        else:
            _refuse(weight.dtype != torch.bfloat16, "int4 on a GPU is for bfloat16")
            config = ao.Int4WeightOnlyConfig(
                group_size=group, int4_packing_format="tile_packed_to_4d", set_inductor_config=False
            )
    layer = _linear(weight)
    ao.quantize_(layer, config)
    packed = layer.weight
    _refuse(type(packed.data) is Tensor or type(packed) is nn.Parameter, "torchao left the weight in float")
    return packed, operator if weight.device.type == "cpu" else None


def _linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta", dtype=weight.dtype)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def _copies(item: Any, count: int) -> list[Any]:
    return [item, *(copy.deepcopy(item) for _ in range(count - 1))]


def torchao(weight: Tensor, fmt: Format, copies: int) -> Side:
    """torchao as it runs eagerly."""
    packed, operator = _torchao_weight(weight, fmt)
    # Eagerly, int8 weights are cast whole in every call: that is what a user of it gets.
    operator = None if fmt.bits == 8 and not fmt.integer_activations else operator
    return Side([_linear_by(w) for w in _copies(packed, copies)], operator=operator)


def _linear_by(weight: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: F.linear(x, weight)


def _product(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight)


def torchao_compiled(weight: Tensor, fmt: Format, copies: int) -> Side:
    """torchao under ``torch.compile``, which fuses what surrounds the product and finds the packed int8 operator.

    A single layer pays for dynamo's guards (some 20 us on a CPU), which a whole model pays once.
    """
    packed, operator = _torchao_weight(weight, fmt)
    # Dynamo keeps what it compiled with the code object: each side has its own, so that its guards are few.
    function = types.FunctionType(_product.__code__.replace(), globals())
    compiled = torch.compile(function, fullgraph=True, dynamic=False)
    return Side([_second(compiled, w) for w in _copies(packed, copies)], operator=operator)


def _second(function: Callable[[Tensor, Tensor], Tensor], weight: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: function(x, weight)


def bitsandbytes(weight: Tensor, fmt: Format, copies: int) -> Side:
    """nf4 in blocks of 64 beside int4; LLM.int8() beside w8a8, on a GPU."""
    import bitsandbytes as bnb

    n, k = weight.shape
    on_cpu = weight.device.type == "cpu"
    _refuse(fmt.number == "e4m3", "no float8")
    layer: nn.Module
    _refuse(_four_by_eight(fmt), "no int4 weights with int8 activations")
    if fmt.integer_activations:
        _refuse(on_cpu, "LLM.int8() is for GPUs")
        layer = bnb.nn.Linear8bitLt(k, n, bias=False, has_fp16_weights=False)
        layer.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    else:
        _refuse(fmt.bits == 8, "no weight-only int8")
        _refuse(on_cpu and weight.dtype != torch.bfloat16, "the packed CPU path is for bfloat16")
        layer = bnb.nn.Linear4bit(k, n, bias=False, compute_dtype=weight.dtype, quant_type="nf4")
        layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
    layer = layer.to(weight.device).eval()
    if on_cpu:
        # Packs the weight, which takes a while: the copies are copies of a packed one.
        layer(weight.new_zeros(1, k))
    made = _copies(layer, copies)
    if on_cpu:
        packed = all(getattr(one.weight.quant_state, "packing_format_for_cpu", False) for one in made)
        _refuse(not packed, "its packed CPU path does not run here")
    return Side(made)


def gemlite(weight: Tensor, fmt: Format, copies: int) -> Side:
    """gemlite's Triton kernels, with the settings it ships."""
    _refuse(weight.device.type != "cuda", "needs a GPU")
    from gemlite import helper

    n, k = weight.shape
    device = str(weight.device)
    _refuse(_four_by_eight(fmt), "int4 weights with int8 activations are not compared")
    _refuse(fmt.number == "e4m3", "its float8 is not compared")
    if fmt.integer_activations:
        maker = helper.A8W8_int8_dynamic(device=device, dtype=weight.dtype)
        return Side([maker.from_weights(weight.clone()) for _ in range(copies)])
    if fmt.bits == 8:
        _refuse(fmt.group_size is not None, "int8 groups are not compared")
        maker = helper.A16W8_INT8(device=device, dtype=weight.dtype)
        return Side([maker.from_weights(weight.clone()) for _ in range(copies)])
    group = fmt.group_size or k
    _refuse(k % group != 0, f"K = {k} is not a multiple of the group")
    grouped = weight.float().view(n, -1, group)
    low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
    scale = (high - low).clamp(min=1e-6) / 15
    zero = (-low / scale).round()
    codes = (grouped / scale + zero).round().clamp(0, 15).to(torch.uint8).view(n, k)
    scales, zeros = scale.view(n, -1).to(weight.dtype), zero.view(n, -1).to(weight.dtype)
    maker = helper.A16Wn(device=device, dtype=weight.dtype)
    return Side([maker.from_weights(codes.clone(), scales, zeros, 4, group) for _ in range(copies)])


def int_mm(weight: Tensor, fmt: Format, copies: int) -> Side:
    """``torch._int_mm``: the vendor's int8 product alone."""
    _refuse(not fmt.integer_activations or fmt.bits != 8, "multiplies int8 by int8")
    codes, scale = _rounded(weight, 127.0)
    turned = [c.t() for c in _copies(codes.to(torch.int8), copies)]

    def prepare(x: Tensor) -> tuple[Tensor, Tensor]:
        _refuse(x.is_cuda and (x.shape[0] <= 16 or bool(torch.tensor(codes.shape).remainder(8).any())), _INT_MM_SHAPES)
        values, token_scale = _rounded(x, 127.0)
        return values.to(torch.int8), token_scale

    return Side(
        [_first_by(w) for w in turned], prepare, lambda y, prepared: y.float() * prepared[1] * scale.t().float()
    )


_INT_MM_SHAPES = "on a GPU it wants more than 16 tokens, N and K in multiples of 8"


def _first_by(weight: Tensor) -> Callable[[tuple[Tensor, Tensor]], Tensor]:
    return lambda prepared: torch._int_mm(prepared[0], weight)


def _rounded(t: Tensor, levels: float) -> tuple[Tensor, Tensor]:
    """Rows scaled to ``levels`` and rounded, in float32, and their scales ``[rows, 1]``."""
    scale = t.float().abs().amax(-1, keepdim=True).clamp(min=1e-30) / levels
    return (t.float() / scale).round(), scale


def scaled_mm(weight: Tensor, fmt: Format, copies: int) -> Side:
    """``torch._scaled_mm`` by rows in float8 (e4m3): the vendor's fp8 product, scales included."""
    _refuse(not fmt.quantized_activations or fmt.bits != 8, "multiplies float8 by float8")
    _refuse(not weight.is_cuda, "needs a GPU")
    _refuse(torch.cuda.get_device_capability(weight.device) < (8, 9), _SM_89)
    _refuse(weight.dtype != torch.bfloat16, "by rows its output is bfloat16")

    def rounded(t: Tensor) -> tuple[Tensor, Tensor]:
        scale = t.float().abs().amax(-1, keepdim=True).clamp(min=1e-30) / 448.0
        return (t.float() / scale).to(torch.float8_e4m3fn), scale

    codes, scale = rounded(weight)

    def by(w: Tensor) -> Callable[[tuple[Tensor, Tensor]], Tensor]:
        return lambda p: torch._scaled_mm(p[0], w.t(), scale_a=p[1], scale_b=scale.t(), out_dtype=torch.bfloat16)

    return Side([by(w) for w in _copies(codes, copies)], rounded)


def semi_structured(weight: Tensor, fmt: Format, copies: int) -> Side:
    """``torch.sparse.to_sparse_semi_structured``: cuSPARSELt or CUTLASS on a 16-bit 2:4 weight; for many tokens."""
    _refuse(fmt.sparsity != "2:4" or fmt.number != "float", "multiplies 16-bit 2:4 weights")
    _refuse(not weight.is_cuda, "needs a GPU")
    kept = prune_weight(weight, fmt, "magnitude")
    return Side([_linear_by(torch.sparse.to_sparse_semi_structured(kept.clone())) for _ in range(copies)])


PEERS: dict[str, Maker] = {
    "torchao": torchao,
    "torchao-compiled": torchao_compiled,
    "gemlite": gemlite,
    "bitsandbytes": bitsandbytes,
    "_int_mm": int_mm,
    "_scaled_mm": scaled_mm,
    "semi-structured": semi_structured,
}


def bound(fmt: Format, name: str) -> float:
    """How far a peer may be from the product by the unrounded weight: its own rounding, which ours is not compared to.

    For normal weights int4 groups of 128 are off by 0.10 and nf4 by 0.09, float8 by 0.04, int8 by 0.01: a wrong scale,
    order or layout is off by 0.3 and more.
    """
    if name == "_scaled_mm" or fmt.number == "e4m3":
        return 0.08
    return 0.03 if fmt.bits == 8 else 0.2


def choose(names: Iterable[str] | None) -> Sequence[str]:
    """The peers by name; None is all of them.

    Raises:
        ValueError: there is no such peer.
    """
    chosen = tuple(PEERS) if names is None else tuple(names)
    for name in chosen:
        if name not in PEERS:
            raise ValueError(f"there is no peer {name!r}; the peers are: {', '.join(PEERS)}")
    return chosen
