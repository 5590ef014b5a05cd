# mypy: disable-error-code="no-untyped-def,untyped-decorator,assignment"
"""Inline PTX against its twin in plain Triton, on the device, over all 65,536 words: the decoders and nothing else."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bench.gpu_job import Job, Result, dtype_name
from qlinear.bits import e4m3_to_float
from qlinear.kernels.decode import DECODERS
from qlinear.kernels.runtime import target_of
from qlinear.layout import unpack_planes

_BLOCK = 1024


@triton.jit
def _decode_kernel(
    w_ptr, y_ptr, SIZE: tl.constexpr, BLOCK: tl.constexpr, DECODE: tl.constexpr, PLANES: tl.constexpr,
    OFFSET: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """y[j, i] = plane j of word i, less OFFSET."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    zeros = ()
    for _ in tl.static_range(PLANES):
        zeros += (OFFSET,)
    planes = DECODE(tl.load(w_ptr + offs), zeros, PTX, y_ptr.dtype.element_ty)
    for j in tl.static_range(PLANES):
        tl.store(y_ptr + j * SIZE + offs, planes[j])


def decode(packing: str, words: Tensor, dtype: torch.dtype, offset: int, ptx: bool) -> Tensor:
    """Every plane of every word, as the decoder of ``packing`` makes it."""
    decoder = DECODERS[packing]
    y = torch.full((decoder.planes, words.numel()), float("nan"), dtype=dtype, device=words.device)
    _decode_kernel[(words.numel() // _BLOCK,)](
        words, y, words.numel(), _BLOCK, decoder.function, decoder.planes, offset, ptx
    )
    return y


def ptx(job: Job) -> Result:
    """Both twins against the codes themselves; without inline PTX (not NVIDIA) only the plain one."""
    words = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    result: Result = {"rows": [], "failed": []}
    target = target_of(job.device)
    # Triton's interpreter has no bfloat16 constants.
    dtypes = (torch.float16,) if target.interpreted else (torch.float16, torch.bfloat16)
    for packing, offsets in {"planar4": (8, 0, 15), "planar8": (128,), "planar_e4m3": (0,)}.items():
        codes = unpack_planes(words.unsqueeze(-1), 16 // DECODERS[packing].planes).squeeze(-1).t().to(job.device)
        for dtype in dtypes:
            for offset in offsets:
                wanted = codes.float() - offset
                if packing == "planar_e4m3":
                    unit = DECODERS[packing].units.get(dtype, 1.0)
                    wanted = e4m3_to_float(codes.contiguous().view(torch.int8), torch.float32) / unit
                for inline in (False, True) if target.nvidia else (False,):
                    y = decode(packing, words.to(job.device), dtype, offset, inline)
                    wrong = int((y.float() != wanted).sum())
                    row = {"packing": packing, "dtype": dtype_name(dtype), "offset": offset, "ptx": inline}
                    result["rows"].append(row | {"wrong": wrong})
                    if wrong:
                        result["failed"].append(f"{row}: {wrong} of {y.numel()} numbers are wrong")
        job.save(result)
    return result
