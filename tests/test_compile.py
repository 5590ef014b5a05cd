"""Compiles all that ships, for GPUs that need not be present: no spills, all fits, tensor cores, asynchronous loads.

Run as a program this file is the worker, which is asked for jobs by their index (see :mod:`bench.workers`).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

import pytest
import torch
from asked import answers
from test_matmul import MEDIUM

from bench.workers import answer
from qlinear.format import DENSE, FORMATS, Format
from qlinear.kernels.bitmap import shipped_bitmap_configs
from qlinear.kernels.blocks import shipped_block_configs
from qlinear.kernels.configs import Config, shared_bytes, shipped_configs
from qlinear.kernels.runtime import Capability, Target

TARGETS: tuple[Capability, ...] = ((8, 0), (9, 0), (10, 0), "gfx942")
#: And those that multiply 8-bit floats, but not by warpgroups.
FLOAT8_TARGETS: tuple[Capability, ...] = (*TARGETS, (8, 9))
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Job:
    """One call of :func:`qlinear.kernels.compile.compile_matmul`, or of its like for the other kernels."""

    kernel: str
    target: Capability
    dtype: str
    fmt: Format | None = None
    config: Config | None = None
    options: dict[str, object] = field(default_factory=dict)

    def __str__(self) -> str:
        target = self.target if isinstance(self.target, str) else f"sm_{self.target[0] * 10 + self.target[1]}"
        options = [f"{name}={str(value).removeprefix('torch.')}" for name, value in self.options.items()]
        parts = [self.kernel, target, self.fmt, self.dtype, self.config, *options]
        return "-".join(str(part) for part in parts if part is not None)

    @property
    def effort(self) -> int:
        return self.config.block_m * self.config.block_n if self.config else 0


#: What a call may differ in from N = K = 4096, contiguous x, a bias and scales in the dtype of x.
VARIANTS: tuple[tuple[str, str, dict[str, object]], ...] = (
    ("w4a16-g32", "fp16", {"in_features": 4080}),
    ("w4a16-asym", "bf16", {"in_features": 200, "bias": False}),
    ("w8a16", "fp16", {"in_features": 200}),
    ("w4a16", "bf16", {"row_stride": 8192}),
    ("w8a8", "fp16", {"bias": False}),
    ("w4a16-g64-asym", "bf16", {"scale_dtype": torch.float16}),
    ("w8a16-g32", "bf16", {"scale_dtype": torch.float16}),
    ("w4a16-channel", "bf16", {"scale_dtype": torch.float32}),
    ("w8a16", "bf16", {"scale_dtype": torch.float32}),
    ("w8a8", "bf16", {"scale_dtype": torch.float32}),
    ("w8a16-fp8", "fp16", {"in_features": 200}),
    ("fp8", "bf16", {"scale_dtype": torch.float32, "in_features": 4080}),
)
FLOAT8_VARIANTS = VARIANTS[-2:]


#: What the loop of matmul.py multiplies.
FUSED = [fmt for fmt in FORMATS.values() if fmt.sparsity in (None, "2:4")]


def jobs() -> list[Job]:
    result = []
    for target in FLOAT8_TARGETS:
        for dtype in DTYPES:
            for fmt in FUSED:
                if target not in TARGETS and (fmt.number != "e4m3" or dtype != "bf16"):
                    continue
                configs = shipped_configs(fmt, DTYPES[dtype], target)
                result += [Job("matmul", target, dtype, fmt, config) for config in configs]
        for i, (name, dtype, options) in enumerate(VARIANTS if target in TARGETS else FLOAT8_VARIANTS):
            configs = list(shipped_configs(DENSE[name], DTYPES[dtype], target))
            result.append(Job("matmul", target, dtype, DENSE[name], configs[i % len(configs)], options))
        if target in TARGETS:
            for fmt in (fmt for fmt in FORMATS.values() if fmt.block):
                for dtype in DTYPES:
                    configs = shipped_block_configs(fmt, DTYPES[dtype], target)
                    result += [Job("blocks", target, dtype, fmt, config) for config in configs]
                ragged = {"in_features": 200}
                result.append(
                    Job("blocks", target, "bf16", fmt, shipped_block_configs(fmt, torch.bfloat16, target)[0], ragged)
                )
            for i, fmt in enumerate(fmt for fmt in FORMATS.values() if fmt.sparsity == "unstructured"):
                dtypes = DTYPES if target == (9, 0) else ("bf16", "fp32")
                for dtype in dtypes:
                    configs = shipped_bitmap_configs(DTYPES[dtype], Target(target, 132))
                    result += [Job("bitmap", target, dtype, fmt, config) for config in configs]
                result.append(Job("expand", target, ("bf16", "fp32")[i], fmt))
        for k in (200, 14336):
            result.append(Job("quantize", target, "bf16", options={"in_features": k, "number": "e4m3"}))
        for dtype in DTYPES if target in TARGETS else ():
            names = ("w8a16-fp8", "w4a16-asym-2:4", "w16a16-2:4")
            result += [Job("dequantize", target, dtype, FORMATS[name]) for name in names]
            result += [Job("dequantize", target, dtype, DENSE[name]) for name in ("w8a8", "w8a16-g32", "w4a16-asym")]
            # One warp, a row in one block, a row in several.
            result += [Job("quantize", target, dtype, options={"in_features": k}) for k in (200, 4096, 14336)]
            result.append(Job("quantize", target, dtype, options={"in_features": 4096, "norm": True}))
    # Of what tests/test_matmul.py asks for, the most shared memory, where there is least and where Triton takes most.
    most = (DENSE["w4a16-g32"], MEDIUM, {"scale_dtype": torch.float32})
    return result + [Job("tested", target, "fp32", *most) for target in ((8, 6), (9, 0))]


JOBS = jobs()


def pairs(job: Job) -> set[tuple[object, ...]]:
    """What a sample must have one of: a target with each format, tile and dtype, a format with each dtype, options."""
    tile = job.config and (job.config.block_m, job.config.block_n, job.config.num_warps)
    target, fmt = str(job.target), job.fmt and job.fmt.name
    found = ((target, fmt), (target, tile), (target, job.dtype), (fmt, job.dtype), (str(job.options),))
    return {(job.kernel, *pair) for pair in found}


def sample() -> set[int]:
    """Few jobs that have all pairs that any job has: the one with most new pairs, again and again."""
    left = {index: pairs(job) for index, job in enumerate(JOBS)}
    chosen = set()
    while left:
        index = max(left, key=lambda index: len(left[index]))
        chosen.add(index)
        seen = left.pop(index)
        left = {index: rest for index, each in left.items() if (rest := each - seen)}
    return chosen


SAMPLE = sample()


def parameters() -> list[object]:
    """Every job by its name; `pytest --every-kernel` compiles those that the sample leaves out."""
    marks = [() if index in SAMPLE else (pytest.mark.every_kernel,) for index in range(len(JOBS))]
    return [pytest.param(index, marks=marks[index], id=str(job)) for index, job in enumerate(JOBS)]


@pytest.fixture(scope="session")
def compiled(request):
    """The results of all jobs that were selected, compiled at the first use."""
    return answers(request, __file__, lambda index: JOBS[index].effort)


@pytest.mark.parametrize("index", parameters())
def test_compiles_to_what_it_should(index, compiled):
    job, result = JOBS[index], compiled[index]
    assert "error" not in result, result["error"]
    # What is only tested may be slow.
    assert result["spilled"] == 0 or job.kernel == "tested"
    assert result["shared"] <= shared_bytes(job.target)
    if job.kernel in ("matmul", "blocks", "bitmap"):
        assert result["tensor_core_instructions"] > 0
        # Single values, of two bytes at most, are too narrow to be copied.
        if not isinstance(job.target, str) and job.kernel != "bitmap":
            assert result["asynchronous_copies"] > 0


def compile_one(index):
    from qlinear.kernels import compile

    job = JOBS[index]
    dtype = DTYPES[job.dtype]
    if job.kernel in ("matmul", "blocks", "bitmap", "tested"):
        kernel = compile.matmul_compiler(job.fmt)(job.fmt, dtype, job.config, job.target, **job.options)
    elif job.kernel == "dequantize":
        kernel = compile.compile_dequantize(job.fmt, dtype, job.target)
    elif job.kernel == "expand":
        kernel = compile.compile_expand(job.fmt, dtype, job.target)
    else:
        kernel = compile.compile_quantize(dtype, capability=job.target, **job.options)
    return asdict(compile.usage(kernel))


if __name__ == "__main__":
    answer(compile_one)
