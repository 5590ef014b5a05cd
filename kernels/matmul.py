# mypy: disable-error-code="no-untyped-def,assignment,misc"
# ruff: noqa: SIM300 - upper case names are constexprs, not constants
"""y = x @ W^T + bias for packed weights: the only matmul loop and its launcher.

Inside, everything is transposed: ``y^T = W x^T``, the weight being the left operand, because Hopper's tensor cores
take that from registers, where the decoder leaves it. The same source becomes mma.sync or mfma elsewhere.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlinear.format import BLOCK_K, Format
from qlinear.kernels.checks import check, check_layout
from qlinear.kernels.configs import Config, check_parts
from qlinear.kernels.decode import DECODERS
from qlinear.kernels.epilogue import share_partials, split_buffers, store_output
from qlinear.kernels.runtime import Target, aligned, device_guard, target_of
from qlinear.kernels.tiles import TILE_N as TILE_ROWS
from qlinear.kernels.tiles import concat, decode_block, load_scales, scale_planes, scale_rows, settled
from qlinear.kernels.tuned import config_on

if TYPE_CHECKING:
    from qlinear.packing import PackedWeight


@triton.jit(do_not_specialize=["M", "splits"])
def _matmul_kernel(
    x_ptr, w_ptr, index_ptr, scale_ptr, x_scale_ptr, bias_ptr, y_ptr, partial_ptr, counter_ptr,
    M, N, K, stride_xm, splits,
    DECODE: tl.constexpr, PLANES: tl.constexpr, GROUP: tl.constexpr, OFFSET: tl.constexpr, SCALE_WEIGHT: tl.constexpr,
    JOIN: tl.constexpr, MASK_K: tl.constexpr, PTX: tl.constexpr, PRECISION: tl.constexpr, UNIT: tl.constexpr,
    FLOAT: tl.constexpr, WAIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """y[m, n] = sum_k x[m, k] * (code[n, k] - zero[n, k // GROUP]) * scale[n, k // GROUP] * x_scale[m] + bias[n]

    x: [M, K], rows stride_xm apart. y: [M, N] contiguous. x_scale: float32 [M] or None. bias: [N] or None. w, scale:
    prepared layout (see tiles.py); GROUP is None where a scale belongs to a whole row. index: of a 2:4 weight (see
    sparse24.py), None of others. FLOAT: codes are the bits of floats in the dtype of scale, which is empty. partial,
    counter: see share_partials. Products are x's, the sum is float32, or int32 for a row of int8. UNIT: of decoded
    numbers. WAIT: see Config.waits_for_operands.
    """
    DT: tl.constexpr = x_ptr.dtype.element_ty
    PRODUCT: tl.constexpr = tl.int32 if DT == tl.int8 else tl.float32
    ACC: tl.constexpr = PRODUCT if GROUP is None else tl.float32
    # Of 2:4 weights a word of 32 bits is four columns' words.
    WORDS: tl.constexpr = 128 // PLANES if index_ptr is None else 32 // PLANES
    COUNT: tl.constexpr = 1 if GROUP is None else 128 // GROUP
    # What is stored per group: a scale, or a scale and a zero point.
    PARTS: tl.constexpr = 2 if OFFSET is None else 1
    # Columns of one sum: a whole block, but one group where the scale goes on the sum.
    SPAN: tl.constexpr = 128 if SCALE_WEIGHT else 128 // COUNT
    # Planes of one product, and its columns.
    DECODED: tl.constexpr = PLANES if PLANES >= COUNT else COUNT
    SLICES: tl.constexpr = DECODED * SPAN // 128 if JOIN else 1
    STEP: tl.constexpr = 128 // DECODED * SLICES
    PIECES: tl.constexpr = SPAN // STEP

    tile, split = tl.program_id(0) // splits, tl.program_id(0) % splits
    tiles_m, blocks = tl.cdiv(M, BLOCK_M), tl.cdiv(K, 128)
    pid_m, pid_n = tile % tiles_m, tile // tiles_m
    per_split = tl.cdiv(blocks, splits)
    first, last = split * per_split, tl.minimum((split + 1) * per_split, blocks)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, STEP)

    # The tiles of a program lie within 2**31 words: 64-bit arithmetic is left to one address for all threads.
    # Multiplied out: with a common factor taken out ptxas spills w8a16 on sm_100 and waits for loads elsewhere.
    tile_words = blocks * (TILE_ROWS * WORDS)
    first_tile, last_tile = pid_n * (BLOCK_N // TILE_ROWS), tl.cdiv(N, TILE_ROWS) - 1
    w_base = w_ptr + first_tile.to(tl.int64) * tile_words + first * (TILE_ROWS * WORDS)
    row = tl.arange(0, BLOCK_N)
    tile_of_row = tl.minimum(row // TILE_ROWS, last_tile - first_tile)
    w_offs = tile_of_row * tile_words + row % TILE_ROWS * WORDS
    w_offs = w_offs[:, None] + tl.arange(0, WORDS if PLANES >= COUNT else 128 // COUNT)[None, :]
    if index_ptr is not None:
        i_words = blocks * (TILE_ROWS * 4)
        i_base = index_ptr + first_tile.to(tl.int64) * i_words + first * (TILE_ROWS * 4)
        i_offs = (tile_of_row * i_words + row % TILE_ROWS * 4)[:, None] + tl.arange(0, 4)[None, :]
    x_ptrs = x_ptr + offs_m.to(tl.int64)[None, :] * stride_xm + first * 128 + offs_k[:, None]
    x_mask = (offs_m < M)[None, :]
    scales = ()
    if not FLOAT:
        if GROUP is None:
            s_ptrs = scale_ptr + scale_rows(pid_n, 1, N, 0, COUNT, OFFSET, BLOCK_N)
        else:
            # Of a part without a block the first scales would lie past the end.
            s_ptrs = scale_ptr + scale_rows(pid_n, blocks, N, tl.minimum(first, blocks - 1), COUNT, OFFSET, BLOCK_N)
        scales = load_scales(s_ptrs, COUNT, OFFSET, DT)

    acc = tl.zeros((BLOCK_N, BLOCK_M), ACC)
    for block in range(first, last):
        # Triton loads ahead what a product needs: scales do so if zero points come with them, but not on their own.
        # Those of the next block are carried in registers instead.
        if GROUP is not None:
            if OFFSET is None:
                scales = load_scales(s_ptrs, COUNT, OFFSET, DT)
                s_ptrs += 64 * COUNT * PARTS
            else:
                s_ptrs += tl.where(block + 1 < last, 64 * COUNT, 0)
                next_scales = load_scales(s_ptrs, COUNT, OFFSET, DT)
        index = None
        if index_ptr is not None:
            index = tl.load(i_base + i_offs)
            i_base += TILE_ROWS * 4
        planes = decode_block(
            w_base + w_offs, index, scales, DECODE, PLANES, COUNT, OFFSET, scale_ptr if FLOAT else None, PTX, DT
        )
        if SCALE_WEIGHT:
            planes = scale_planes(planes, scales, DECODED, COUNT, DT)
        for i in tl.static_range(128 // SPAN):
            total = acc if GROUP is None or SCALE_WEIGHT else tl.zeros((BLOCK_N, BLOCK_M), PRODUCT)
            for j in tl.static_range(PIECES):
                mask = x_mask
                if MASK_K:
                    mask = x_mask & (offs_k < K - block * 128 - (i * PIECES + j) * STEP)[:, None]
                x = tl.load(x_ptrs + (i * PIECES + j) * STEP, mask=mask, other=0.0)
                w = concat(planes, (i * PIECES + j) * SLICES, SLICES)
                # Some tensor cores keep 14 bits of a running sum of float8 products: they get a block at a time.
                if DT == tl.float8e4nv:
                    total += tl.dot(w, x, max_num_imprecise_acc=128)
                else:
                    total = tl.dot(w, x, total, input_precision=PRECISION, out_dtype=PRODUCT)
            if GROUP is None or SCALE_WEIGHT:
                acc = settled(total) if WAIT else total
            else:
                acc += total.to(tl.float32) * (scales[i].to(tl.float32) * UNIT)[:, None]
        w_base += TILE_ROWS * WORDS
        x_ptrs += 128
        if GROUP is not None and OFFSET is not None:
            scales = next_scales

    is_last = splits == 1
    if splits > 1:
        acc, is_last = share_partials(
            acc, partial_ptr, counter_ptr, tile, tile.to(tl.int64) * splits, split, splits, M - pid_m * BLOCK_M,
            BLOCK_M, BLOCK_N, AHEAD,
        )  # fmt: skip
    if is_last:
        scale = scales[0] if GROUP is None and not FLOAT else None
        store_output(acc, y_ptr, scale, x_scale_ptr, bias_ptr, offs_n, offs_m, M, N, UNIT)


def constexprs(fmt: Format, dtype: torch.dtype, in_features: int, config: Config, target: Target) -> dict[str, Any]:
    """The compile-time arguments of the kernel, for x in ``dtype`` (rounded tokens: what they are held in)."""
    decoder = DECODERS[fmt.packing]
    return {
        "DECODE": decoder.function,
        "PLANES": decoder.planes,
        "GROUP": fmt.group_size,
        "OFFSET": fmt.offset if fmt.symmetric else None,
        "SCALE_WEIGHT": config.scales_weight(fmt),
        "JOIN": config.joins_planes(fmt, dtype, target.capability),
        "MASK_K": in_features % BLOCK_K != 0,
        "PTX": target.nvidia,
        # float32 on tensor cores: the sum of three TF32 products is as exact as float32's own.
        "PRECISION": target.precision(dtype),
        "UNIT": decoder.units.get(dtype, 1.0),
        "FLOAT": fmt.number == "float",
        "WAIT": target.nvidia and config.waits_for_operands(target.capability),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "AHEAD": config.parts_ahead(target.capability),
    }


def matmul(x: Tensor, packed: PackedWeight, bias: Tensor | None = None, config: Config | None = None) -> Tensor:
    """``x @ W^T + bias`` for a packed weight ``[N, K]`` in layout ``triton``: ``[..., K] -> [..., N]`` in x's dtype.

    Args:
        x: float16, bfloat16 or float32, any strides.
        config: for tuning and tests; None is :func:`qlinear.kernels.configs.choose_config`'s.

    Raises:
        ValueError: the layout, a dtype, a shape or a device does not fit.
    """
    check_layout(packed)
    if x.dim() == 0 or x.shape[-1] != packed.in_features:
        raise ValueError(f"x has shape {tuple(x.shape)}; its last axis must be in_features = {packed.in_features}")
    x2d = x.reshape(-1, packed.in_features)
    # Imported here because activations.py is built on this module.
    from qlinear.kernels.activations import quantized_linear_tensors

    linear = quantized_linear_tensors if packed.format.quantized_activations else matmul_tensors
    index = () if packed.index is None else (packed.index,)
    y = linear(x2d, packed.weight, packed.scale, packed.format, packed.out_features, bias, config, *index)
    return y.view(*x.shape[:-1], packed.out_features)


def matmul_tensors(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    fmt: Format,
    out_features: int,
    bias: Tensor | None = None,
    config: Config | None = None,
    index: Tensor | None = None,
) -> Tensor:
    """:func:`matmul` on the bare tensors of the ``triton`` layout, for x ``[M, K]``; not for W8A8 and its like."""
    if fmt.quantized_activations:
        raise ValueError(
            f"{fmt} multiplies 8-bit activations: use qlinear.kernels.activations.quantized_linear_tensors"
        )
    check(x, weight, scale, fmt, out_features, bias, index)
    y = torch.empty(x.shape[0], out_features, dtype=x.dtype, device=x.device)
    launch(x, None, weight, scale, fmt, bias, y, x.shape[1], config, index)
    return y


def launch(
    x: Tensor,
    x_scale: Tensor | None,
    weight: Tensor,
    scale: Tensor,
    fmt: Format,
    bias: Tensor | None,
    y: Tensor,
    in_features: int,
    config: Config | None,
    index: Tensor | None = None,
) -> None:
    """Fills contiguous y ``[M, N]`` from checked tensors; rounded x comes with its scales, padded to blocks of 128."""
    m, n = y.shape
    if m == 0:
        return
    x = aligned(x)
    target = target_of(x.device)
    if target.interpreted and y.dtype == torch.bfloat16:
        # Triton's interpreter takes the bits of bfloat16 for integers when it multiplies, and truncates where it
        # should round.
        wide = torch.empty_like(y, dtype=torch.float32)
        x = x if x_scale is not None else x.float()
        launch(x, x_scale, weight, scale, fmt, bias, wide, in_features, config, index)
        y.copy_(wide)
        return
    if config is None:
        config = config_on(x.device, target, m, n, in_features, fmt, y.dtype)
    else:
        check_parts(config, triton.cdiv(in_features, BLOCK_K))
    tiles = triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n)
    partial, counter = split_buffers(tiles, config, torch.int32 if fmt.integer_sums else torch.float32, x.device)
    with device_guard(x.device):
        _matmul_kernel[(tiles * config.split_k,)](
            x, weight, index, scale, x_scale, None if bias is None else bias.contiguous(), y, partial, counter,
            m, n, x.shape[1], x.stride(0), config.split_k,
            **constexprs(fmt, x.dtype, x.shape[1], config, target),
            **config.options(fmt, target.capability),
        )  # fmt: skip
