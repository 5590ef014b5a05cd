"""Operators on tokens rounded to 8 bits: to round them, alone or after a norm, and to multiply what was rounded.

- ``torch.ops.qlinear.quantize_activations(x, number="int")``: int8 values ``[M, K]`` and float32 scales ``[M, 1]`` of x
  ``[M, K]``; float8_e4m3fn values where ``number`` is ``"e4m3"``.
- ``rms_norm_quantize(x, gain, eps, number="int")``: the same of ``x * gain / sqrt(mean(x**2) + eps)``, gain ``[K]``, in
  one kernel.
- ``rounded_linear(values, token_scale, weight, scale, bias?, scheme, in_features, out_features, dtype)``: the product
  of what either returned with a packed weight, ``[M, N]`` in ``dtype``.

Under ``torch.compile`` a layer with 8-bit activations rounds its tokens in PyTorch's own operators, which inductor
fuses with what made the tokens and with each other: layers that read the same ones (q, k and v; gate and up) round
them in one kernel. Outside of it every layer rounds its own. Remembering the last tokens instead would be unsafe:
replaying a CUDA graph writes into tensors without leaving a trace on them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from qlinear import cpu
from qlinear.format import BLOCK_K, FORMATS, ROUNDED
from qlinear.packing import PackedWeight

_library = torch.library.Library("qlinear", "FRAGMENT")
_library.define('quantize_activations(Tensor x, str number="int") -> (Tensor, Tensor)')
_library.define('rms_norm_quantize(Tensor x, Tensor gain, float eps, str number="int") -> (Tensor, Tensor)')
_library.define(
    "rounded_linear(Tensor values, Tensor token_scale, Tensor weight, Tensor scale, Tensor? bias, str scheme, "
    "int in_features, int out_features, ScalarType dtype) -> Tensor"
)


def _quantize_cuda(x: Tensor, number: str = "int") -> tuple[Tensor, Tensor]:
    from qlinear.kernels.activations import quantize_activations

    _check_number(number)
    values, scale = quantize_activations(x, number)
    # The kernel pads rows to blocks of 128; what the operator returns is contiguous, as its fake says.
    return values.contiguous(), scale.view(-1, 1)


def _quantize_any(x: Tensor, number: str = "int") -> tuple[Tensor, Tensor]:
    _check_number(number)
    return cpu.quantize_activations(x, number)


def _quantize_fake(x: Tensor, number: str = "int") -> tuple[Tensor, Tensor]:
    dtype = _check_number(number)
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape[0], 1, dtype=torch.float32)


def _norm_quantize_cuda(x: Tensor, gain: Tensor, eps: float, number: str = "int") -> tuple[Tensor, Tensor]:
    from qlinear.kernels.activations import rms_norm_quantize

    _check_gain(x, gain)
    _check_number(number)
    values, scale = rms_norm_quantize(x, gain, eps, number)
    return values.contiguous(), scale.view(-1, 1)


def _norm_quantize_any(x: Tensor, gain: Tensor, eps: float, number: str = "int") -> tuple[Tensor, Tensor]:
    _check_gain(x, gain)
    _check_number(number)
    return cpu.rms_norm_quantize(x, gain, eps, number)


def _norm_quantize_fake(x: Tensor, gain: Tensor, eps: float, number: str = "int") -> tuple[Tensor, Tensor]:
    _check_gain(x, gain)
    return _quantize_fake(x, number)


def _check_gain(x: Tensor, gain: Tensor) -> None:
    if x.dim() != 2 or tuple(gain.shape) != (x.shape[-1],) or gain.device != x.device:
        got = f"{tuple(x.shape)} on {x.device} and {tuple(gain.shape)} on {gain.device}"
        raise ValueError(f"an RMS norm takes x [M, K] and its gain [K] on one device, got {got}")


def _check_number(number: str) -> torch.dtype:
    """The dtype of what tokens are rounded to."""
    if number not in ROUNDED:
        raise ValueError(f"tokens are rounded to 'int' (int8) or 'e4m3' (float8_e4m3fn), got {number!r}")
    return ROUNDED[number].dtype


_Rounded = Callable[[Tensor, Tensor, PackedWeight, "Tensor | None", torch.dtype], Tensor]


def _with_schema(compute: _Rounded) -> Callable[..., Tensor]:
    """``compute`` with the arguments of the operator ``rounded_linear``."""

    def implementation(
        values: Tensor, token_scale: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, scheme: str, k: int,
        n: int, dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        _check_values(values, scheme)
        return compute(values, token_scale, PackedWeight(weight, scale, None, FORMATS[scheme], n, k), bias, dtype)

    return implementation


def _rounded_any(
    values: Tensor, token_scale: Tensor, packed: PackedWeight, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Any device: dequantizes the whole weight. float32 holds sums of int8 products up to 2**24 exactly."""
    y = (values.float() @ packed.dequantize(torch.float32).t()).mul_(token_scale).to(dtype)
    return y if bias is None else y + bias.to(dtype)


def _rounded_cpu(
    values: Tensor, token_scale: Tensor, packed: PackedWeight, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    fmt = packed.format
    if fmt.bits != 8 or not fmt.integer_activations:
        return _rounded_any(values, token_scale, packed, bias, dtype)
    y = cpu.rounded_matmul(values, token_scale, packed, dtype)
    return y if bias is None else y + bias.to(dtype)


def _rounded_cuda(
    values: Tensor, token_scale: Tensor, packed: PackedWeight, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    if packed.layout != "triton":
        return _rounded_any(values, token_scale, packed, bias, dtype)
    from qlinear.kernels.activations import rounded_product

    fmt, n, k = packed.format, packed.out_features, packed.in_features
    if k % BLOCK_K:
        # As bytes: padding is not implemented for float8 everywhere.
        values = F.pad(values.view(torch.int8), (0, -k % BLOCK_K)).view(values.dtype)
    return rounded_product(values, token_scale.view(-1), packed.weight, packed.scale, fmt, n, k, bias, dtype)


def _rounded_fake(
    values: Tensor, token_scale: Tensor, packed: PackedWeight, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    return values.new_empty(values.shape[0], packed.out_features, dtype=dtype)


def _check_values(values: Tensor, scheme: str) -> None:
    number = FORMATS[scheme].number
    if values.dtype != ROUNDED[number].dtype:
        wanted = f"{ROUNDED[number].dtype}: quantize_activations(x, {number!r})"
        raise ValueError(f"{scheme} multiplies tokens in {wanted}, got {values.dtype}")


_library.impl("quantize_activations", _quantize_any, "CompositeExplicitAutograd")
_library.impl("quantize_activations", _quantize_cuda, "CUDA")
_library.impl("rms_norm_quantize", _norm_quantize_any, "CompositeExplicitAutograd")
_library.impl("rms_norm_quantize", _norm_quantize_cuda, "CUDA")
_library.impl("rounded_linear", _with_schema(_rounded_any), "CompositeExplicitAutograd")
_library.impl("rounded_linear", _with_schema(_rounded_cpu), "CPU")
_library.impl("rounded_linear", _with_schema(_rounded_cuda), "CUDA")
torch.library.register_fake("qlinear::quantize_activations", _quantize_fake, lib=_library)
torch.library.register_fake("qlinear::rms_norm_quantize", _norm_quantize_fake, lib=_library)
torch.library.register_fake("qlinear::rounded_linear", _with_schema(_rounded_fake), lib=_library)


def rounded_linear(x: Tensor, packed: PackedWeight, bias: Tensor | None) -> Tensor:
    """Rounds the tokens x ``[..., K]`` in PyTorch's own operators, and multiplies with the operator above."""
    n, k = packed.out_features, packed.in_features
    values, token_scale = cpu.quantize_activations(x.reshape(-1, k), packed.format.number)
    weight, scale, scheme = packed.weight, packed.scale, packed.format.name
    y: Tensor = torch.ops.qlinear.rounded_linear(values, token_scale, weight, scale, bias, scheme, k, n, x.dtype)
    return y.view(*x.shape[:-1], n)


def linear_in_parts(x: Tensor, packed: PackedWeight, bias: Tensor | None) -> Tensor:
    """``torch.ops.qlinear.linear`` for a format with 8-bit activations, in pieces that ``torch.compile`` can fuse."""
    if x.device.type != "cpu":
        return rounded_linear(x, packed, bias)
    y = cpu.matmul(x.reshape(-1, packed.in_features), packed)
    return (y if bias is None else y + bias.to(x.dtype)).view(*x.shape[:-1], packed.out_features)
