"""``torch.ops.qlinear.*``: schema, shapes, CPU and CUDA implementations and autograd, registered once.

Export and CUDA graphs see one opaque call per layer, and so does compile where activations stay in float. The scheme
travels by name; the layout is told by the weight.

- ``linear(x, weight, scale, zero_point?, bias?, scheme, in_features, out_features, dense?)``: ``x @ W.T + bias`` for x
  ``[..., K]``; ``dense`` is the weight ``[N, K]`` in 16 bit, used for many tokens of its dtype.
- ``dequantize(weight, scale, zero_point?, scheme, in_features, out_features, dtype)``: the float weight ``[N, K]``.

Operators on rounded tokens are in :mod:`qlinear.token_ops`.
"""

from __future__ import annotations

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
from qlinear.token_ops import linear_in_parts

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)

#: Up to here a GPU's kernel is always taken: crossovers lie at multiples of it.
_FEW_TOKENS = 128


_library = torch.library.Library("qlinear", "DEF")
_library.define(
    "linear(Tensor x, Tensor weight, Tensor scale, Tensor? zero_point, Tensor? bias, str scheme, "
    "int in_features, int out_features, Tensor? dense=None) -> Tensor"
)
_library.define(
    "dequantize(Tensor weight, Tensor scale, Tensor? zero_point, str scheme, int in_features, int out_features, "
    "ScalarType dtype) -> Tensor"
)


def _check(x: Tensor, weight: Tensor, in_features: int) -> None:
    if x.shape[-1] != in_features:
        raise ValueError(f"the last dimension of the input is {x.shape[-1]}, the layer's in_features is {in_features}")
    if x.dtype not in _FLOATS:
        raise ValueError(f"the input is {x.dtype}; a quantized linear layer takes float16, bfloat16 or float32")
    if x.device != weight.device:
        raise ValueError(f"the input is on {x.device}, the weight on {weight.device}")


def _usable(dense: Tensor | None, x: Tensor, fmt: Format) -> bool:
    """Whether x can be multiplied by the kept 16-bit copy; whether it should be is a matter of its tokens."""
    return dense is not None and dense.dtype == x.dtype and not fmt.integer_activations


def _linear_dense(x: Tensor, dense: Tensor | None, bias: Tensor | None) -> Tensor:
    assert dense is not None
    return F.linear(x, dense, None if bias is None else bias.to(x.dtype))


def _linear_cpu(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    scheme: str,
    k: int,
    n: int,
    dense: Tensor | None = None,
) -> Tensor:
    _check(x, weight, k)
    fmt, flat = FORMATS[scheme], x.reshape(-1, k)
    if _usable(dense, x, fmt) and flat.shape[0] > cpu.few_tokens(fmt, x.dtype, layout_of(weight)):
        return _linear_dense(x, dense, bias)
    y = cpu.matmul(flat, weight, scale, zero, fmt, n)
    if bias is not None:
        y = y.add_(bias) if bias.dtype == y.dtype else y + bias.to(y.dtype)
    return y.contiguous().view(*x.shape[:-1], n)


def _linear_cuda(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    scheme: str,
    k: int,
    n: int,
    dense: Tensor | None = None,
) -> Tensor:
    _check(x, weight, k)
    fmt = FORMATS[scheme]
    if layout_of(weight) != "triton":
        return _linear_any(x, weight, scale, zero, bias, scheme, k, n, dense)
    # Triton is imported where a GPU needs it, so that `import qlinear` works without either.
    from qlinear.kernels.dequantize import linear_tensors
    from qlinear.kernels.int8 import int8_linear_tensors
    from qlinear.kernels.matmul import matmul_tensors
    from qlinear.kernels.tuned import fused_tokens_on

    flat, kept = x.reshape(-1, k), _usable(dense, x, fmt)
    most = fused_tokens_on(x.device, n, k, fmt, x.dtype, kept) if flat.shape[0] > _FEW_TOKENS else None
    many = most is not None and flat.shape[0] > most
    if kept and many:
        return _linear_dense(x, dense, bias)
    if fmt.integer_activations:
        y = int8_linear_tensors(flat, weight, scale, fmt, n, bias)
    elif many:
        y = linear_tensors(flat, weight, scale, fmt, n, bias)
    else:
        y = matmul_tensors(flat, weight, scale, fmt, n, bias)
    return y.view(*x.shape[:-1], n)


def _linear_any(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    scheme: str,
    k: int,
    n: int,
    dense: Tensor | None = None,
) -> Tensor:
    """Any device: dequantize the whole weight and multiply."""
    _check(x, weight, k)
    if FORMATS[scheme].integer_activations:
        values, token_scale = torch.ops.qlinear.quantize_activations(x.reshape(-1, k))
        y: Tensor = torch.ops.qlinear.int8_linear(values, token_scale, weight, scale, bias, scheme, k, n, x.dtype)
        return y.view(*x.shape[:-1], n)
    if dense is None or not _usable(dense, x, FORMATS[scheme]):
        dense = PackedWeight(weight, scale, zero, FORMATS[scheme], n, k).dequantize(x.dtype)
    return _linear_dense(x, dense, bias)


def _linear_fake(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    scheme: str,
    k: int,
    n: int,
    dense: Tensor | None = None,
) -> Tensor:
    _check(x, weight, k)
    return x.new_empty(*x.shape[:-1], n)


def _dequantize(
    weight: Tensor, scale: Tensor, zero: Tensor | None, scheme: str, k: int, n: int, dtype: torch.dtype
) -> Tensor:
    return PackedWeight(weight, scale, zero, FORMATS[scheme], n, k).dequantize(dtype).contiguous()


def _dequantize_cuda(
    weight: Tensor, scale: Tensor, zero: Tensor | None, scheme: str, k: int, n: int, dtype: torch.dtype
) -> Tensor:
    if layout_of(weight) != "triton":
        return _dequantize(weight, scale, zero, scheme, k, n, dtype)
    from qlinear.kernels.dequantize import dequantize_tensors

    return dequantize_tensors(weight, scale, FORMATS[scheme], n, k, dtype)


def _dequantize_fake(
    weight: Tensor, scale: Tensor, zero: Tensor | None, scheme: str, k: int, n: int, dtype: torch.dtype
) -> Tensor:
    return weight.new_empty(n, k, dtype=dtype)


_library.impl("linear", _linear_cpu, "CPU")
_library.impl("linear", _linear_cuda, "CUDA")
_library.impl("linear", _linear_any, "CompositeExplicitAutograd")
_library.impl("dequantize", _dequantize, "CompositeExplicitAutograd")
_library.impl("dequantize", _dequantize_cuda, "CUDA")
torch.library.register_fake("qlinear::linear", _linear_fake, lib=_library)
torch.library.register_fake("qlinear::dequantize", _dequantize_fake, lib=_library)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, weight, scale, zero, bias, ctx.scheme, ctx.k, ctx.n = inputs[:8]
    ctx.save_for_backward(weight, scale, zero)
    ctx.has_bias = bias is not None


def _input_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The weight is a constant: gradients reach the input (through the dequantized weight) and the bias."""
    weight, scale, zero = ctx.saved_tensors
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        dense = torch.ops.qlinear.dequantize(weight, scale, zero, ctx.scheme, ctx.k, ctx.n, grad.dtype)
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
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    scheme: str,
    k: int,
    n: int,
    dense: Tensor | None = None,
) -> Tensor:
    """``torch.ops.qlinear.linear``, past the dispatcher where nothing but the result is asked for.

    Under ``torch.compile`` a layer with int8 activations is several operators: see :mod:`qlinear.token_ops`.

    The dispatcher and its way back into Python cost 6 to 10 us a call: a tenth of the decoding time of a small model on
    a CPU. Tracing, gradients, tensor subclasses and dispatch modes need it and get it.
    """
    gradients = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
    if torch.compiler.is_compiling():
        fmt = FORMATS[scheme]
        if fmt.integer_activations and not gradients and not torch.compiler.is_exporting():
            _check(x, weight, k)
            return linear_in_parts(x, weight, scale, bias, fmt, k, n)
        return _linear_op(x, weight, scale, zero, bias, scheme, k, n, dense)
    if gradients or type(x) is not Tensor or torch._C._get_tracing_state() is not None or is_in_torch_dispatch_mode():
        return _linear_op(x, weight, scale, zero, bias, scheme, k, n, dense)
    direct = _DIRECT.get(x.device.type, _linear_op)
    return direct(x, weight, scale, zero, bias, scheme, k, n, dense)
