"""``mma.sp.sync.aligned.m16n8k32`` as the PTX ISA defines it, on numpy registers: where a thread's numbers belong.

From "Matrix Fragments for sparse mma.m16n8k32 with .f16 and .bf16 types" and "Sparse matrix storage": a statement of
its own, which knows nothing of how this project orders its weights. Which thread has which metadata is in the manual's
figure of the metadata layout; the same is in words in LLVM's integration test of the instruction
(mlir/test/Integration/GPU/CUDA, sparse-mma-2-4-f16.mlir).
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch

LANE = np.arange(32)
GROUP, THREAD = LANE >> 2, LANE % 4


def numbers(registers: list[np.ndarray], bf16: bool) -> np.ndarray:
    """``[warps, 32, 2 * registers]``: the numbers of every thread, the lower half of a register first."""
    words = np.ascontiguousarray(np.stack(registers, -1)).view(np.int16)
    return torch.from_numpy(words).view(torch.bfloat16 if bf16 else torch.float16).double().numpy()


def left_operand(a: list[np.ndarray], metadata: np.ndarray, selector: int, bf16: bool) -> np.ndarray:
    """The matrix A ``[warps, 16, 32]`` with its zeros."""
    kept = numbers(a, bf16)
    warps = np.arange(len(metadata))[:, None]
    matrix = np.zeros((len(warps), 16, 32))
    for i in range(8):
        row = GROUP if 0 <= i < 2 or 4 <= i < 6 else GROUP + 8
        first = THREAD * 4 if i < 4 else THREAD * 4 + 16
        holder = 4 * (row % 8) + 2 * selector + first // 16
        nibble = metadata[:, holder].astype(np.int64) >> (16 * (row // 8) + first % 16) & 15
        places = nibble & 3, nibble >> 2
        assert (places[0] < places[1]).all(), "metadata is not ordered"
        matrix[warps, row, first + places[i % 2]] = kept[:, :, i]
    return matrix


def right_operand(b: list[np.ndarray], bf16: bool) -> np.ndarray:
    """The matrix B ``[warps, 32, 8]``."""
    held = numbers(b, bf16)
    matrix = np.zeros((len(held), 32, 8))
    for i in range(8):
        matrix[:, THREAD * 2 + i % 2 + i // 2 * 8, GROUP] = held[:, :, i]
    return matrix


def mma_sp(registers: list[np.ndarray], selector: int, bf16: bool) -> list[np.ndarray]:
    """c (4, float32), a (4), b (4) and metadata, ``[warps, 32]`` each, as in the instruction's text; returns d (4)."""
    c = [r.view(np.float32) for r in registers[:4]]
    with np.errstate(invalid="ignore"):
        product = left_operand(registers[4:8], registers[12], selector, bf16) @ right_operand(registers[8:12], bf16)
    rows, columns = (GROUP, GROUP, GROUP + 8, GROUP + 8), (THREAD * 2, THREAD * 2 + 1) * 2
    return [(c[i] + product[:, rows[i], columns[i]]).astype(np.float32) for i in range(4)]


def run(text: str, registers: list[np.ndarray]) -> Any:
    """Any number of warps, if the text is this instruction; else None."""
    pattern = (
        r"mma\.sp::ordered_metadata\.sync\.aligned\.m16n8k32\.row\.col\.f32\.(b?f16)\.\1\.f32 "
        r"\{\$0,\$1,\$2,\$3\}, \{\$8,\$9,\$10,\$11\}, \{\$12,\$13,\$14,\$15\}, \{\$4,\$5,\$6,\$7\}, \$16, 0x([01]);"
    )
    found = re.fullmatch(pattern, text.strip())
    if found is None:
        return None
    warps = [np.ascontiguousarray(r).reshape(-1, 32) for r in registers]
    return [d.reshape(-1).view(np.uint32) for d in mma_sp(warps, int(found[2]), found[1] == "bf16")]
