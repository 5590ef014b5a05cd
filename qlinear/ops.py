"""``torch.ops.qlinear.*``: schema, shapes, CPU and CUDA implementations and autograd, registered once.

Export and CUDA graphs see one opaque call per layer, and so does compile where activations stay in float. The scheme
travels by name; the layout is told by the weight.

- ``linear(x, weight, scale, zero_point?, bias?, scheme, in_features, out_features, dense?, index?)``: ``x @ W.T +
  bias`` for x ``[..., K]``; ``dense`` is the weight ``[N, K]`` in 16 bit, or that of
  :mod:`qlinear.semi_structured`, used for many tokens of its dtype unless the scheme is of blocks or rounds tokens;
  ``index`` says where the weights of a sparse scheme belong.
- ``dequantize(weight, scale, zero_point?, scheme, in_features, out_features, dtype, index?)``: the float weight
  ``[N, K]``.

Operators on rounded tokens are in :mod:`qlinear.token_ops`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from qlinear import cpu, semi_structured
from qlinear.format import FORMATS, Format
from qlinear.packing import PackedWeight
from qlinear.paths import FRAGMENT_TOKENS, UNSTRUCTURED_TOKENS
from qlinear.token_ops import linear_in_parts, rounded_linear

#: What a layer computes in.
FLOATS = (torch.float16, torch.bfloat16, torch.float32)

#: Up to here a GPU's kernel is always taken: crossovers lie at multiples of it.
_FEW_TOKENS = 128


_library = torch.library.Library("qlinear", "DEF")
_library.define(
    "linear(Tensor x, Tensor weight, Tensor scale, Tensor? zero_point, Tensor? bias, str scheme, "
    "int in_features, int out_features, Tensor? dense=None, Tensor? index=None) -> Tensor"
)
_library.define(
    "dequantize(Tensor weight, Tensor scale, Tensor? zero_point, str scheme, int in_features, int out_features, "
    "ScalarType dtype, Tensor? index=None) -> Tensor"
)


def _check(x: Tensor, packed: PackedWeight) -> None:
    if x.shape[-1] != packed.in_features:
        raise ValueError(
            f"the last dimension of the input is {x.shape[-1]}, the layer's in_features is {packed.in_features}"
        )
    if x.dtype not in FLOATS:
        raise ValueError(f"the input is {x.dtype}; a quantized linear layer takes float16, bfloat16 or float32")
    if x.device != packed.device:
        raise ValueError(f"the input is on {x.device}, the weight on {packed.device}")


def _usable(dense: Tensor | None, x: Tensor, fmt: Format) -> bool:
    """Whether x can be multiplied by the kept 16-bit copy; whether it should be is a matter of its tokens."""
    return dense is not None and dense.dtype == x.dtype and not fmt.quantized_activations and not fmt.block


def _linear_dense(x: Tensor, dense: Tensor | None, bias: Tensor | None) -> Tensor:
    assert dense is not None
    product = semi_structured.linear if semi_structured.is_made(dense, x.shape[-1]) else F.linear
    return product(x, dense, None if bias is None else bias.to(x.dtype))


def _linear_cpu(x: Tensor, packed: PackedWeight, bias: Tensor | None, dense: Tensor | None) -> Tensor:
    fmt, n = packed.format, packed.out_features
    flat = x if x.dim() == 2 else x.reshape(-1, packed.in_features)
    if _usable(dense, x, fmt) and flat.shape[0] > cpu.few_tokens(fmt, x.dtype, packed.layout):
        return _linear_dense(x, dense, bias)
    y = cpu.matmul(flat, packed)
    if bias is not None:
        y = y.add_(bias) if bias.dtype == y.dtype else y + bias.to(y.dtype)
    y = y.contiguous()
    # One row of a padded product is contiguous with any stride; a view has the usual ones.
    return y if x is flat and y.stride(0) == n else y.view(*x.shape[:-1], n)


def _linear_cuda(x: Tensor, packed: PackedWeight, bias: Tensor | None, dense: Tensor | None) -> Tensor:
    if packed.layout == "mma.sp":
        return _linear_fragments(x, packed, bias, dense)
    if packed.format.sparsity == "unstructured":
        return _linear_bitmap(x, packed, bias, dense)
    if packed.layout != "triton":
        return _linear_any(x, packed, bias, dense)
    if packed.format.block:
        return _linear_blocks(x, packed, bias)
    # Triton is imported where a GPU needs it, so that `import qlinear` works without either.
    from qlinear.kernels.activations import quantized_linear_tensors
    from qlinear.kernels.dequantize import linear_tensors
    from qlinear.kernels.matmul import matmul_tensors
    from qlinear.kernels.tuned import fused_tokens_on

    fmt, n, k = packed.format, packed.out_features, packed.in_features
    flat, kept = x.reshape(-1, k), _usable(dense, x, fmt)
    most = fused_tokens_on(x.device, n, k, fmt, x.dtype, kept) if flat.shape[0] > _FEW_TOKENS else None
    many = most is not None and flat.shape[0] > most
    if kept and many:
        return _linear_dense(x, dense, bias)
    arguments = flat, packed.weight, packed.scale, fmt, n, bias
    if fmt.quantized_activations:
        y = quantized_linear_tensors(*arguments)
    elif many:
        y = linear_tensors(*arguments, index=packed.index)
    else:
        y = matmul_tensors(*arguments, index=packed.index)
    return y.view(*x.shape[:-1], n)


def _linear_fragments(x: Tensor, packed: PackedWeight, bias: Tensor | None, dense: Tensor | None) -> Tensor:
    from qlinear.kernels.mma_sp import fragment_linear_tensors, supports
    from qlinear.kernels.runtime import target_of

    weight, scale, zero, index = packed.tensors
    flat, fmt, n = x.reshape(-1, packed.in_features), packed.format, packed.out_features
    if flat.shape[0] > FRAGMENT_TOKENS or not supports(fmt, x.dtype, scale.dtype, target_of(x.device)):
        return _linear_any(x, packed, bias, dense)
    return fragment_linear_tensors(flat, weight, scale, zero, index, fmt, n, bias).view(*x.shape[:-1], n)


def _linear_blocks(x: Tensor, packed: PackedWeight, bias: Tensor | None) -> Tensor:
    from qlinear.kernels.blocks import block_linear_tensors

    return _by_index(block_linear_tensors, x, packed, bias)


def _linear_bitmap(x: Tensor, packed: PackedWeight, bias: Tensor | None, dense: Tensor | None) -> Tensor:
    if _usable(dense, x, packed.format):
        return _linear_dense(x, dense, bias)
    from qlinear.kernels.bitmap import bitmap_linear_tensors, expanded_linear_tensors

    many = x.numel() > UNSTRUCTURED_TOKENS * packed.in_features
    return _by_index(expanded_linear_tensors if many else bitmap_linear_tensors, x, packed, bias)


def _by_index(kernel: Callable[..., Tensor], x: Tensor, packed: PackedWeight, bias: Tensor | None) -> Tensor:
    """By a kernel of symmetric sparse weights, which takes a matrix of tokens."""
    flat, n = x.reshape(-1, packed.in_features), packed.out_features
    y = kernel(flat, packed.weight, packed.scale, packed.index, packed.format, n, bias)
    return y.view(*x.shape[:-1], n)


def _linear_any(x: Tensor, packed: PackedWeight, bias: Tensor | None, dense: Tensor | None) -> Tensor:
    """Any device: dequantize the whole weight and multiply."""
    if packed.format.quantized_activations:
        return rounded_linear(x, packed, bias)
    if not _usable(dense, x, packed.format):
        dense = packed.dequantize(x.dtype)
    return _linear_dense(x, dense, bias)


def _linear_fake(x: Tensor, packed: PackedWeight, bias: Tensor | None, dense: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], packed.out_features)


def _dequantize(packed: PackedWeight, dtype: torch.dtype) -> Tensor:
    return packed.dequantize(dtype).contiguous()


def _dequantize_cuda(packed: PackedWeight, dtype: torch.dtype) -> Tensor:
    if packed.format.sparsity == "unstructured":
        return _expand_cuda(packed, dtype)
    if packed.layout != "triton" or packed.format.block:
        return _dequantize(packed, dtype)
    from qlinear.kernels.dequantize import dequantize

    return dequantize(packed, dtype)


def _expand_cuda(packed: PackedWeight, dtype: torch.dtype) -> Tensor:
    from qlinear.kernels.bitmap import expand_tensors

    weight, scale, _, index = packed.tensors
    assert index is not None
    return expand_tensors(weight, scale, index, packed.format, packed.in_features, dtype)


def _dequantize_fake(packed: PackedWeight, dtype: torch.dtype) -> Tensor:
    return packed.weight.new_empty(packed.out_features, packed.in_features, dtype=dtype)


_Linear = Callable[[Tensor, PackedWeight, Tensor | None, Tensor | None], Tensor]


def _with_linear_schema(compute: _Linear) -> Callable[..., Tensor]:
    """``compute`` with the arguments of the operator ``linear``."""

    def implementation(
        x: Tensor, weight: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, scheme: str, k: int, n: int,
        dense: Tensor | None = None, index: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        packed = PackedWeight(weight, scale, zero, FORMATS[scheme], n, k, index)
        _check(x, packed)
        return compute(x, packed, bias, dense)

    return implementation


def _with_dequantize_schema(compute: Callable[[PackedWeight, torch.dtype], Tensor]) -> Callable[..., Tensor]:
    """``compute`` with the arguments of the operator ``dequantize``."""

    def implementation(
        weight: Tensor, scale: Tensor, zero: Tensor | None, scheme: str, k: int, n: int, dtype: torch.dtype,
        index: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        return compute(PackedWeight(weight, scale, zero, FORMATS[scheme], n, k, index), dtype)

    return implementation


_library.impl("linear", _with_linear_schema(_linear_cpu), "CPU")
_library.impl("linear", _with_linear_schema(_linear_cuda), "CUDA")
_library.impl("linear", _with_linear_schema(_linear_any), "CompositeExplicitAutograd")
_library.impl("dequantize", _with_dequantize_schema(_dequantize), "CompositeExplicitAutograd")
_library.impl("dequantize", _with_dequantize_schema(_dequantize_cuda), "CUDA")
torch.library.register_fake("qlinear::linear", _with_linear_schema(_linear_fake), lib=_library)
torch.library.register_fake("qlinear::dequantize", _with_dequantize_schema(_dequantize_fake), lib=_library)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, weight, scale, zero, bias, ctx.scheme, ctx.k, ctx.n = inputs[:8]
    index = inputs[9] if len(inputs) > 9 else None
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
    return grad_x, None, None, None, grad_bias, None, None, None, None, None


torch.library.register_autograd("qlinear::linear", _input_gradient, setup_context=_remember, lib=_library)

_linear_op: Callable[..., Tensor] = torch.ops.qlinear.linear.default
_DIRECT: dict[str, _Linear] = {"cpu": _linear_cpu, "cuda": _linear_cuda}


def reserve(device: torch.device) -> None:
    """Allocates what a GPU's kernels keep between launches, so that nothing is allocated while a graph is captured."""
    if device.type == "cuda":
        from qlinear.kernels.runtime import reserve as reserve_counters

        reserve_counters(device)


def linear(x: Tensor, packed: PackedWeight, bias: Tensor | None = None, dense: Tensor | None = None) -> Tensor:
    """``torch.ops.qlinear.linear``, past the dispatcher where nothing but the result is asked for.

    Under ``torch.compile`` a layer with int8 activations is several operators: see :mod:`qlinear.token_ops`.

    The dispatcher and its way back into Python cost 6 to 10 us a call: a tenth of the decoding time of a small model on
    a CPU. Tracing, gradients, tensor subclasses and dispatch modes need it and get it.
    """
    gradients = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
    compiling = torch.compiler.is_compiling()
    if compiling and packed.format.quantized_activations and not gradients and not torch.compiler.is_exporting():
        _check(x, packed)
        return linear_in_parts(x, packed, bias)
    direct = _DIRECT.get(x.device.type)
    if (
        direct is None
        or compiling
        or gradients
        or type(x) is not Tensor
        or torch._C._get_tracing_state() is not None
        or is_in_torch_dispatch_mode()
    ):
        weight, scale, zero, index = packed.tensors
        fmt, n, k = packed.format, packed.out_features, packed.in_features
        return _linear_op(x, weight, scale, zero, bias, fmt.name, k, n, dense, index)
    _check(x, packed)
    return direct(x, packed, bias, dense)
