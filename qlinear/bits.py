"""Bit packing of codes into int32 words: the plain, hardware-independent layout.

Little end first: code ``i`` of a word occupies bits ``[i*bits, (i+1)*bits)``, the order of compressed-tensors'
``pack-quantized`` (weights along K, zero points along N) and of GPTQ.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Packs codes ``[..., L]`` (0 .. 2**bits - 1) into int32 words ``[..., ceil(L*bits/32)]`` along the last axis.

    16 bits are those of any dtype of that size.
    """
    if not codes.numel():  # may have any strides, which a view would mind
        return codes.new_empty((*codes.shape[:-1], -(-codes.shape[-1] * bits // 32)), dtype=torch.int32)
    if bits == 16:
        halves = codes.contiguous().view(torch.int16)
        return torch.nn.functional.pad(halves, (0, codes.shape[-1] % 2)).contiguous().view(torch.int32)
    per_byte, length = 8 // bits, codes.shape[-1]
    padded = -(-length * bits // 32) * 32 // bits
    codes = torch.nn.functional.pad(codes.to(torch.uint8), (0, padded - length))
    if per_byte > 1:
        codes = codes.unflatten(-1, (-1, per_byte))
        packed = codes[..., 0].clone()
        for i in range(1, per_byte):
            packed |= codes[..., i] << (bits * i)
        codes = packed
    return codes.contiguous().view(torch.int32)


def unpack_bits(words: Tensor, bits: int, length: int) -> Tensor:
    """Unpacks int32 words ``[..., W]`` into uint8 codes ``[..., length]``: the inverse of :func:`pack_bits`.

    16 bits come as int16.
    """
    # A last axis of length 1 may have any stride and still count as contiguous; viewing it as bytes wants stride 1.
    words = words.contiguous() if words.shape[-1] != 1 else words.clone(memory_format=torch.contiguous_format)
    if bits == 16:
        return words.view(torch.int16)[..., :length]
    packed = words.view(torch.uint8)
    if bits == 1:
        places = torch.arange(8, dtype=torch.uint8, device=words.device)
        return ((packed.unsqueeze(-1) >> places) & 1).flatten(-2)[..., :length]
    return (packed if bits == 8 else unpack_nibbles(packed))[..., :length]


def unpack_nibbles(packed: Tensor) -> Tensor:
    """uint8 ``[..., L]`` into the codes of its nibbles, uint8 ``[..., 2L]``, low nibble first.

    A byte is widened to 16 bits and its high nibble moved to the high byte: three times as fast as stacking two halves.
    """
    wide = packed.to(torch.int16)
    high = wide & 0xF0
    return (wide.bitwise_and_(0x0F)).bitwise_or_(high.bitwise_left_shift_(4)).view(torch.uint8)


def e4m3_to_float(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """int8 tensors of e4m3 bits as 16-bit floats or float32, exactly, NaN excepted (it becomes 480).

    Sign, exponent and mantissa are moved to their places in the wider float, and the difference of the exponents'
    biases is multiplied in: less time than torch's own conversion takes.
    """
    mantissa, bias, wide = {
        torch.bfloat16: (7, 127, torch.int16),
        torch.float16: (10, 15, torch.int16),
        torch.float32: (23, 127, torch.int32),
    }[dtype]
    shift = mantissa - 3
    moved = bits.to(wide).bitwise_left_shift_(shift)
    # The sign was extended: what stands between it and the exponent is not wanted.
    return moved.bitwise_and_((0x7F << shift) | torch.iinfo(wide).min).view(dtype).mul_(2.0 ** (bias - 7))
