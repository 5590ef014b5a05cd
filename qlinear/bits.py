"""Bit packing of codes into int32 words: the plain, hardware-independent layout.

Little end first: code ``i`` of a word occupies bits ``[i*bits, (i+1)*bits)``, the order of compressed-tensors'
``pack-quantized`` (weights along K, zero points along N) and of GPTQ.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Packs codes ``[..., L]`` (0 .. 2**bits - 1) into int32 words ``[..., ceil(L*bits/32)]`` along the last axis."""
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
    """Unpacks int32 words ``[..., W]`` into uint8 codes ``[..., length]``: the inverse of :func:`pack_bits`."""
    packed = words.contiguous().view(torch.uint8)
    if bits < 8:
        mask = (1 << bits) - 1
        packed = torch.stack([(packed >> shift) & mask for shift in range(0, 8, bits)], dim=-1).flatten(-2)
    return packed[..., :length]
