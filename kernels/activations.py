# mypy: disable-error-code="no-untyped-def,assignment"
# ruff: noqa: SIM300 - upper case names are constexprs, not constants
"""W8A8, W4A8, fp8: tokens are rounded to 8 bits, each with its own scale, and multiplied by the loop of matmul.py."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlinear.format import BLOCK_K, ROUNDED, Format
from qlinear.kernels.checks import check
from qlinear.kernels.configs import Config
from qlinear.kernels.matmul import launch
from qlinear.kernels.runtime import Target, device_guard, target_of

#: A row up to this long stays in registers between finding its largest value and writing it.
_MAX_BLOCK = 8192

#: 127 * 128 * MAX_IN_FEATURES < 2**31; 128 is also 16 times the largest int4, as decode_nibbles8 has it.
MAX_IN_FEATURES = 1 << 17


@triton.jit
def _largest(x):
    """The largest absolute value; NaN if there is one, which tl.max would drop.

    The bits of non-negative floats are ordered like the floats, and NaN is above infinity.
    """
    return tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=0)


@triton.jit
def _round(x, DT: tl.constexpr):
    """The nearest int8 for \\|x\\| <= 127, or the nearest e4m3 for \\|x\\| <= 448, held in DT; ties to even.

    1.5 * 2**23 + x has the integer in its low bits; a power of two times 1.5 * 2**20 is so large that a sum with it
    keeps 3 bits below that power. So it is for e4m3 too, where a conversion would do on most GPUs: on sm_89 Triton
    converts by way of float16, and what lies just beyond a tie is rounded twice.
    """
    if DT == tl.int8:
        return (x + 12582912.0).to(tl.int32, bitcast=True).to(DT)
    else:
        power = (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        power = tl.maximum(power, 0.015625) * 1572864.0
        return ((x + power) - power).to(DT)


@triton.jit
def _load(x_ptr, gain_ptr, offs, K):
    """One block of a row in float32, and the same times the gain of a norm where there is one; zeros past its end."""
    x = tl.load(x_ptr + offs, mask=offs < K, other=0.0).to(tl.float32)
    if gain_ptr is None:
        return x, x
    else:
        return x, x * tl.load(gain_ptr + offs, mask=offs < K, other=0.0).to(tl.float32)


@triton.jit
def _quantize_kernel(
    x_ptr, gain_ptr, q_ptr, scale_ptr, K, stride_xm, stride_qm, eps, LEVELS: tl.constexpr, BLOCK: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
):  # fmt: skip
    """scale[m] = max_k |y[m, k]| / LEVELS, q[m, k] = round(y[m, k] / scale[m]), 0 for K <= k < stride_qm.

    x: [M, K], rows stride_xm apart. q: int8 or e4m3 (see _round), [M, stride_qm] contiguous. scale: float32 [M]. y is
    x, or where there is a gain [K] its RMS norm: y[m, k] = x[m, k] * gain[k] / sqrt(mean_k x[m, k]^2 + eps), never
    rounded to x's dtype. A norm changes the scale of a row and no value of q: it costs one sum.
    """
    DT: tl.constexpr = q_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * stride_xm
    q_ptrs = q_ptr + row * stride_qm + tl.arange(0, BLOCK)
    offs = tl.arange(0, BLOCK)
    x, y = _load(x_ptr, gain_ptr, offs, K)
    bits, squares = _largest(y), x * x
    if not ONE_BLOCK:
        for start in range(BLOCK, K, BLOCK):
            x, y = _load(x_ptr, gain_ptr, start + offs, K)
            bits = tl.maximum(bits, _largest(y))
            squares += x * x
    largest = bits.to(tl.float32, bitcast=True)
    # A row of zeros (or next to it) gets a scale that is not zero, so that nothing is divided by zero; NaN stays.
    largest = tl.where(largest < 1e-30, 1e-30, largest)
    inverse = tl.div_rn(LEVELS, largest)
    scale = tl.div_rn(largest, LEVELS)
    if gain_ptr is not None:
        scale = tl.div_rn(scale, tl.sqrt_rn(tl.div_rn(tl.sum(squares, axis=0), K.to(tl.float32)) + eps))
    tl.store(scale_ptr + row, scale)
    if ONE_BLOCK:
        tl.store(q_ptrs, _round(y * inverse, DT), mask=offs < stride_qm)
    else:
        for start in range(0, stride_qm, BLOCK):
            _, y = _load(x_ptr, gain_ptr, start + offs, K)
            tl.store(q_ptrs + start, _round(y * inverse, DT), mask=start + offs < stride_qm)


def quantize_activations(x: Tensor, number: str = "int") -> tuple[Tensor, Tensor]:
    """One symmetric scale per token, ties to even: ``x[m] ~ q[m] * scale[m]``.

    A token that holds NaN or infinity gets such a scale, hence a non-finite row of the product, and touches no other.

    Args:
        x: float ``[M, K]``.
        number: ``int`` (127 levels on either side of zero) or ``e4m3`` (8-bit floats, the largest 448).

    Returns:
        q: int8 or float8_e4m3fn ``[M, K]``, its rows padded with zeros to a multiple of 128. scale: float32 ``[M]``.
    """
    return _without_padding(*_quantize_padded(x, number), x.shape[1], number)


def rms_norm_quantize(x: Tensor, gain: Tensor, eps: float, number: str = "int") -> tuple[Tensor, Tensor]:
    """:func:`quantize_activations` of ``x * gain / sqrt(mean(x**2) + eps)`` in one kernel.

    RMS norm: Zhang and Sennrich, arXiv:1910.07467. The norm of a row is one number, which joins its scale.

    Args:
        x: float ``[M, K]``. gain: float ``[K]``.
    """
    return _without_padding(*_quantize_padded(x, number, gain.contiguous(), eps), x.shape[1], number)


def _without_padding(q: Tensor, scale: Tensor, columns: int, number: str) -> tuple[Tensor, Tensor]:
    # Where the GPU has no e4m3 its numbers are held in float16.
    return q[:, :columns].to(ROUNDED[number].dtype), scale


def rounded_dtype(number: str, target: Target) -> torch.dtype:
    """The dtype that tokens rounded to ``number`` are held in on a target.

    Where tensor cores have no e4m3 its numbers are held in float16: exactly, and so are its products in float32.
    """
    return torch.float16 if number == "e4m3" and not target.fp8 else ROUNDED[number].dtype


def _quantize_padded(x: Tensor, number: str, gain: Tensor | None = None, eps: float = 0.0) -> tuple[Tensor, Tensor]:
    """:func:`quantize_activations` with the padding, so that the product needs no mask along K."""
    m, k = x.shape
    if x.stride(1) != 1:
        x = x.contiguous()
    padded = -(-k // BLOCK_K) * BLOCK_K
    q = torch.empty(m, padded, dtype=rounded_dtype(number, target_of(x.device)), device=x.device)
    scale = torch.empty(m, dtype=torch.float32, device=x.device)
    if m > 0:
        constants, options = quantize_options(padded, number)
        with device_guard(x.device):
            _quantize_kernel[(m,)](x, gain, q, scale, k, x.stride(0), padded, eps, **constants, **options)
    return q, scale


def quantize_options(padded: int, number: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The compile-time arguments of the kernel for rows of ``padded`` numbers, and the options it is compiled with."""
    block = min(triton.next_power_of_2(padded), _MAX_BLOCK)
    constants = {"LEVELS": ROUNDED[number].largest, "BLOCK": block, "ONE_BLOCK": padded <= block}
    # A multiply-add would round once what every other implementation rounds twice: tokens next to a tie would differ.
    return constants, {"num_warps": max(1, min(8, block // 512)), "enable_fp_fusion": False}


def quantized_linear_tensors(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    fmt: Format,
    out_features: int,
    bias: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """``x @ W^T + bias`` for x ``[M, K]``: quantizes the tokens; integer products are exact before they are scaled."""
    check(x, weight, scale, fmt, out_features, bias)
    k = x.shape[1]
    if fmt.integer_activations and k > MAX_IN_FEATURES:
        raise ValueError(f"in_features is {k}; sums of int8 products fit int32 up to {MAX_IN_FEATURES}")
    q, x_scale = _quantize_padded(x, fmt.number)
    return rounded_product(q, x_scale, weight, scale, fmt, out_features, k, bias, x.dtype, config)


def rounded_product(
    q: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    scale: Tensor,
    fmt: Format,
    out_features: int,
    in_features: int,
    bias: Tensor | None,
    dtype: torch.dtype,
    config: Config | None = None,
) -> Tensor:
    """The product of rounded tokens: q ``[M, in_features]`` and zeros to a multiple of 128; x_scale ``[M]``.

    e4m3 is held in float16 where the device does not multiply it.
    """
    q = q.to(rounded_dtype(fmt.number, target_of(q.device)))
    y = torch.empty(q.shape[0], out_features, dtype=dtype, device=q.device)
    launch(q, x_scale, weight, scale, fmt, bias, y, in_features, config)
    return y
