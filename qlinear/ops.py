"""``torch.ops.qlinear.*``: schema, shapes, CPU and CUDA implementations and autograd, registered once.

Compile, export and CUDA graphs see one opaque call per layer. The scheme travels by name; the layout is told by the
weight.

- ``linear(x, weight, scale, zero_point?, bias?, scheme, in_features, out_features, index?)``: ``x @ W.T + bias`` for
  x ``[..., K]``; ``index`` says where the weights of a sparse scheme belong.
- ``dequantize(weight, scale, zero_point?, scheme, in_features, out_features, dtype, index?)``: the float weight ``[N,
  K]``.
- ``quantize_activations(x)``: int8 values ``[M, K]`` and float32 scales ``[M, 1]`` of x ``[M, K]``, per token.
- ``rms_norm_quantize(x, gain, eps)``: the same of ``x * gain / sqrt(mean(x**2) + eps)``, gain ``[K]``, in one kernel.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from qlinear import cpu
from qlinear.format import FORMATS, Format
from qlinear.layout import layout_of
from qlinear.packing import PackedWeight

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)

#: Tokens up to which the crossover between two paths is looked for.
_MOST_TOKENS = 4096
#: Tokens from which a GPU dequantizes into scratch and uses the vendor's matmul: by count, not yet by measurement
#: (at 8192x8192 the extra pass over the weight costs as much as a 16-bit product of about 230 tokens).
GPU_DEQUANTIZE_TOKENS = 256


def path(
    fmt: Format, dtype: torch.dtype, tokens: int, device_type: str, layout: str, in_features: int = 128
) -> tuple[str, str]:
    """How a product of ``tokens`` rows is computed on a device, and why: ``(name, reason)``, for ``doctor``."""
    if device_type == "cpu":
        return cpu.path(fmt, dtype, tokens, layout, in_features)
    if layout != "triton":
        return "dequantize + F.linear", f"no kernel reads the {layout} layout on {device_type}"
    if fmt.block:
        return "Triton block-sparse matmul", "only stored blocks are read and multiplied"
    if fmt.integer_activations:
        return "Triton int8 x int8", "int32 sums on the tensor cores, activations quantized per token by one kernel"
    if tokens >= GPU_DEQUANTIZE_TOKENS and dtype != torch.float32:
        return "Triton dequantize + vendor matmul", f"{GPU_DEQUANTIZE_TOKENS} tokens or more"
    return "Triton matmul", "packed weights are decoded in registers" + (", split along K" if tokens <= 64 else "")


def paths(fmt: Format, dtype: torch.dtype, device_type: str, layout: str, in_features: int = 128) -> dict[int, str]:
    """Every path a layer takes on a device, by the number of tokens each begins at."""
    return dict(_paths(fmt, dtype, device_type, layout, in_features))


@functools.cache
def _paths(
    fmt: Format, dtype: torch.dtype, device_type: str, layout: str, in_features: int
) -> tuple[tuple[int, str], ...]:
    found: list[tuple[int, str]] = []
    for tokens in range(1, _MOST_TOKENS + 1):
        name, _ = path(fmt, dtype, tokens, device_type, layout, in_features)
        if not found or name != found[-1][1]:
            found.append((tokens, name))
    return tuple(found)


def describe_paths(found: dict[int, str]) -> str:
    """The result of :func:`paths` in a line."""
    return "; ".join(name if tokens == 1 else f"from {tokens} tokens {name}" for tokens, name in found.items())


_library = torch.library.Library("qlinear", "DEF")
_library.define(
    "linear(Tensor x, Tensor weight, Tensor scale, Tensor? zero_point, Tensor? bias, str scheme, "
    "int in_features, int out_features, Tensor? index=None) -> Tensor"
)
_library.define(
    "dequantize(Tensor weight, Tensor scale, Tensor? zero_point, str scheme, int in_features, int out_features, "
    "ScalarType dtype, Tensor? index=None) -> Tensor"
)
_library.define("quantize_activations(Tensor x) -> (Tensor, Tensor)")
_library.define("rms_norm_quantize(Tensor x, Tensor gain, float eps) -> (Tensor, Tensor)")


def _check(x: Tensor, weight: Tensor, in_features: int) -> None:
    if x.shape[-1] != in_features:
        raise ValueError(f"the last dimension of the input is {x.shape[-1]}, the layer's in_features is {in_features}")
    if x.dtype not in _FLOATS:
        raise ValueError(f"the input is {x.dtype}; a quantized linear layer takes float16, bfloat16 or float32")
    if x.device != weight.device:
        raise ValueError(f"the input is on {x.device}, the weight on {weight.device}")


def _linear_cpu(
    x: Tensor, weight: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, scheme: str, k: int, n: int,
    index: Tensor | None = None,
) -> Tensor:  # fmt: skip
    _check(x, weight, k)
    y = cpu.matmul(x.reshape(-1, k), weight, scale, zero, FORMATS[scheme], n, index)
    if bias is not None:
        y = y.add_(bias) if bias.dtype == y.dtype else y + bias.to(y.dtype)
    return y.contiguous().view(*x.shape[:-1], n)


def _linear_cuda(
    x: Tensor, weight: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, scheme: str, k: int, n: int,
    index: Tensor | None = None,
) -> Tensor:  # fmt: skip
    _check(x, weight, k)
    fmt = FORMATS[scheme]
    if layout_of(weight) != "triton":
        return _linear_any(x, weight, scale, zero, bias, scheme, k, n, index)
    # Triton is imported where a GPU needs it, so that `import qlinear` works without either.
    from qlinear.kernels.dequantize import linear_tensors
    from qlinear.kernels.int8 import int8_linear_tensors
    from qlinear.kernels.matmul import matmul_tensors

    flat = x.reshape(-1, k)
    if index is not None:
        from qlinear.kernels.blocks import block_linear_tensors

        y = block_linear_tensors(flat, weight, scale, index, fmt, n, bias)
    elif fmt.integer_activations:
        y = int8_linear_tensors(flat, weight, scale, fmt, n, bias)
    elif path(fmt, x.dtype, flat.shape[0], "cuda", "triton")[0] != "Triton matmul":
        y = linear_tensors(flat, weight, scale, fmt, n, bias)
    else:
        y = matmul_tensors(flat, weight, scale, fmt, n, bias)
    return y.view(*x.shape[:-1], n)


def _linear_any(
    x: Tensor, weight: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, scheme: str, k: int, n: int,
    index: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Any device: dequantize the whole weight and multiply."""
    _check(x, weight, k)
    fmt = FORMATS[scheme]
    dense = PackedWeight(weight, scale, zero, fmt, n, k, index).dequantize(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    if not fmt.integer_activations:
        return F.linear(x, dense, bias)
    values, token_scale = cpu.quantize_activations(x.reshape(-1, k))
    y = (values.to(torch.float32) @ dense.t().float()).mul_(token_scale).to(x.dtype).view(*x.shape[:-1], n)
    return y if bias is None else y + bias


def _linear_fake(
    x: Tensor, weight: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, scheme: str, k: int, n: int,
    index: Tensor | None = None,
) -> Tensor:  # fmt: skip
    _check(x, weight, k)
    return x.new_empty(*x.shape[:-1], n)


def _dequantize(
    weight: Tensor, scale: Tensor, zero: Tensor | None, scheme: str, k: int, n: int, dtype: torch.dtype,
    index: Tensor | None = None,
) -> Tensor:  # fmt: skip
    return PackedWeight(weight, scale, zero, FORMATS[scheme], n, k, index).dequantize(dtype).contiguous()


def _dequantize_cuda(
    weight: Tensor, scale: Tensor, zero: Tensor | None, scheme: str, k: int, n: int, dtype: torch.dtype,
    index: Tensor | None = None,
) -> Tensor:  # fmt: skip
    if layout_of(weight) != "triton" or index is not None:
        return _dequantize(weight, scale, zero, scheme, k, n, dtype, index)
    from qlinear.kernels.dequantize import dequantize_tensors

    return dequantize_tensors(weight, scale, FORMATS[scheme], n, k, dtype)


def _dequantize_fake(
    weight: Tensor, scale: Tensor, zero: Tensor | None, scheme: str, k: int, n: int, dtype: torch.dtype,
    index: Tensor | None = None,
) -> Tensor:  # fmt: skip
    return weight.new_empty(n, k, dtype=dtype)


def _quantize_cuda(x: Tensor) -> tuple[Tensor, Tensor]:
    from qlinear.kernels.int8 import quantize_activations

    values, scale = quantize_activations(x)
    # The kernel pads rows to blocks of 128; what the operator returns is contiguous, as its fake says.
    return values.contiguous(), scale.view(-1, 1)


def _norm_quantize_cuda(x: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    from qlinear.kernels.int8 import rms_norm_quantize

    _check_gain(x, gain)
    values, scale = rms_norm_quantize(x, gain, eps)
    return values.contiguous(), scale.view(-1, 1)


def _norm_quantize_any(x: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    _check_gain(x, gain)
    return cpu.rms_norm_quantize(x, gain, eps)


def _check_gain(x: Tensor, gain: Tensor) -> None:
    if x.dim() != 2 or tuple(gain.shape) != (x.shape[-1],) or gain.device != x.device:
        got = f"{tuple(x.shape)} on {x.device} and {tuple(gain.shape)} on {gain.device}"
        raise ValueError(f"an RMS norm takes x [M, K] and its gain [K] on one device, got {got}")


def _norm_quantize_fake(x: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    _check_gain(x, gain)
    return _quantize_fake(x)


def _quantize_fake(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[0], 1, dtype=torch.float32)


_library.impl("linear", _linear_cpu, "CPU")
_library.impl("linear", _linear_cuda, "CUDA")
_library.impl("linear", _linear_any, "CompositeExplicitAutograd")
_library.impl("dequantize", _dequantize, "CompositeExplicitAutograd")
_library.impl("dequantize", _dequantize_cuda, "CUDA")
_library.impl("quantize_activations", cpu.quantize_activations, "CompositeExplicitAutograd")
_library.impl("quantize_activations", _quantize_cuda, "CUDA")
_library.impl("rms_norm_quantize", _norm_quantize_any, "CompositeExplicitAutograd")
_library.impl("rms_norm_quantize", _norm_quantize_cuda, "CUDA")
torch.library.register_fake("qlinear::linear", _linear_fake, lib=_library)
torch.library.register_fake("qlinear::dequantize", _dequantize_fake, lib=_library)
torch.library.register_fake("qlinear::quantize_activations", _quantize_fake, lib=_library)
torch.library.register_fake("qlinear::rms_norm_quantize", _norm_quantize_fake, lib=_library)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, weight, scale, zero, bias, ctx.scheme, ctx.k, ctx.n, index = inputs
    ctx.save_for_backward(weight, scale, zero, index)
    ctx.has_bias = bias is not None


def _input_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The weight is a constant: gradients reach the input (through the dequantized weight) and the bias."""
    weight, scale, zero, index = ctx.saved_tensors
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        dense = torch.ops.qlinear.dequantize(weight, scale, zero, ctx.scheme, ctx.k, ctx.n, grad.dtype, index)
        grad_x = grad @ dense
    if ctx.has_bias and ctx.needs_input_grad[4]:
        grad_bias = grad.reshape(-1, ctx.n).sum(0)
    return grad_x, None, None, None, grad_bias, None, None, None, None


torch.library.register_autograd("qlinear::linear", _input_gradient, setup_context=_remember, lib=_library)

_linear_op: Callable[..., Tensor] = torch.ops.qlinear.linear.default
_DIRECT: dict[str, Callable[..., Tensor]] = {"cpu": _linear_cpu, "cuda": _linear_cuda}


def reserve(device: torch.device) -> None:
    """Allocates what a GPU's kernels keep between launches, so that nothing is allocated while a graph is captured."""
    if device.type == "cuda":
        from qlinear.kernels.runtime import reserve as reserve_counters

        reserve_counters(device)


def linear(
    x: Tensor, weight: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, scheme: str, k: int, n: int,
    index: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``torch.ops.qlinear.linear``, past the dispatcher where nothing but the result is asked for.

    The dispatcher and its way back into Python cost 6 to 10 us a call: a tenth of the decoding time of a small model on
    a CPU. Tracing, gradients, tensor subclasses and dispatch modes need it and get it.
    """
    if (
        type(x) is not Tensor
        or torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or is_in_torch_dispatch_mode()
        or (torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)))
    ):
        return _linear_op(x, weight, scale, zero, bias, scheme, k, n, index)
    direct = _DIRECT.get(x.device.type, _linear_op)
    return direct(x, weight, scale, zero, bias, scheme, k, n, index)
