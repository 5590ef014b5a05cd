"""What Triton compiles for a GPU, executed by the PTX machine and compared with float64: every format, every kernel.

One launch each through the project's own operators, with tokens, rows and columns that leave tiles, groups and blocks
ragged, more blocks along K than a pipeline has stages, and K in parts whose programs take turns at their atomics. The
tiles of 8 warps are run with their warpgroups apart, too: each as far as it gets before the other, either first.
Run as a program this file is the worker, which is asked for jobs by their index (see :mod:`bench.workers`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from asked import answers
from helpers import DTYPES, dtype_id, error, random_tokens
from models import random_packed

from bench.workers import answer
from qlinear import ops, reference
from qlinear.format import FORMATS, ROUNDED, Format
from qlinear.kernels.configs import Config, shipped_configs
from qlinear.layout import native_layout

ARCHITECTURES = (80, 90)
#: Multiplies e4m3, but not by warpgroups.
FLOAT8 = 89
#: (tokens, in_features): a tile each of 8, 16 and 64 tokens; K in parts or whole; whole blocks or not.
SHAPES = ((1, 1320), (16, 1280), (33, 808))
ROWS = 71


@dataclass(frozen=True)
class Job:
    """A call of a kernel's launcher: ``product``, by the layout ``mma.sp``, in a given ``tile``, or one beside it."""

    kernel: str
    arch: int
    dtype: torch.dtype
    fmt: Format | None = None
    m: int = 5
    k: int = 808
    config: Config | None = None

    @property
    def n(self) -> int:
        return ROWS if self.config is None else self.config.block_n - 7

    def __str__(self) -> str:
        parts = [self.kernel, f"sm_{self.arch}", self.fmt, dtype_id(self.dtype), self.config]
        return "-".join(str(part) for part in (*parts, f"{self.m}x{self.n}x{self.k}") if part is not None)


def jobs() -> list[tuple[Job, bool]]:
    """All, and whether `--every-kernel` is needed for it."""
    found: list[tuple[Job, bool]] = []

    def add(kernel: str, arch: int, dtype: torch.dtype, fmt: Format, turn: int) -> None:
        few = SHAPES[:2] if kernel == "mma.sp" else SHAPES
        for i, (m, k) in enumerate(few):
            found.append((Job(kernel, arch, dtype, fmt, m, k), i != turn % len(few)))

    for a, arch in enumerate((*ARCHITECTURES, FLOAT8)):
        for d, dtype in enumerate(DTYPES):
            for f, fmt in enumerate(FORMATS.values()):
                if arch != FLOAT8 or fmt.number == "e4m3":
                    add("product", arch, dtype, fmt, a + d + f)
                if arch != FLOAT8 and fmt.sparsity == "2:4" and dtype != torch.float32:
                    add("mma.sp", arch, dtype, fmt, a + d + f)
    for a, arch in enumerate(ARCHITECTURES):
        for d, dtype in enumerate(DTYPES):
            # Blocks are dequantized by torch.
            for f, fmt in enumerate(fmt for fmt in FORMATS.values() if not fmt.block):
                found.append((Job("dequantize", arch, dtype, fmt, k=328), (a + d + f) % 6 != 0))
            for kernel in ("quantize", "rms_norm_quantize"):
                found += [(Job(f"{kernel} {number}", arch, dtype), False) for number in ROUNDED]
    # Triton converts to e4m3 in two steps there.
    found += [(Job("quantize e4m3", FLOAT8, dtype, k=4096), False) for dtype in DTYPES]
    return found + [(job, i % 5 != 0) for i, job in enumerate(two_warpgroups())]


def two_warpgroups() -> Iterator[Job]:
    """Every tile of 8 warps that ships for sm_90, of the loop that has wgmma."""
    for f, fmt in enumerate(fmt for fmt in FORMATS.values() if fmt.sparsity in (None, "2:4")):
        for dtype in DTYPES:
            for i, config in enumerate(shipped_configs(fmt, dtype, (9, 0))):
                if config.num_warps == 8:
                    # Where K is whole blocks, two products are under way at a time.
                    yield Job("tile", 90, dtype, fmt, config.block_m - 3, (768, 808)[(f + i) % 2], config)


JOBS = jobs()


def parameters() -> list[Any]:
    marks = [(pytest.mark.every_kernel,) if rare else () for _, rare in JOBS]
    return [pytest.param(i, marks=marks[i], id=str(job)) for i, (job, _) in enumerate(JOBS)]


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest) -> dict[int, dict[str, Any]]:
    """Of all jobs that were selected, at the first use."""
    return answers(request, __file__, lambda index: JOBS[index][0].k)


@pytest.mark.parametrize("index", parameters())
def test_compiled_code_agrees_with_float64(index: int, results: dict[int, dict[str, Any]]) -> None:
    result, (job, _) = results[index], JOBS[index]
    assert "error" not in result, result["error"]
    assert result["difference"] <= result["bound"]
    assert result["architectures"] == [job.arch] * len(result["kernels"]) and result["kernels"]
    if job.kernel in ("product", "mma.sp", "tile"):
        assert result["multiplies"]


# --- the worker ------------------------------------------------------------------------------------------------------


def run(index: int) -> dict[str, Any]:
    from ptx_machine.driver import on_the_machine
    from ptx_machine.machine import Schedule

    job, _ = JOBS[index]
    results: list[dict[str, Any]] = []
    for warpgroups in ("forward", "backward") if job.kernel == "tile" else ("random",):
        with on_the_machine(job.arch, Schedule("mixed", warpgroups, seed=index)) as driver:
            difference, bound = prepare(job)()
        results.append(
            {
                "difference": difference,
                "bound": bound,
                "kernels": [launch.kernel for launch in driver.launches],
                "architectures": [int(text.split(".target sm_")[1][:2]) for text in driver.texts],
                "multiplies": any("mma" in text for text in driver.texts),
                "notes": sorted({note for launch in driver.launches for note in launch.notes}),
            }
        )
    # All that can be told from outside is the same.
    assert all(result == results[0] for result in results), results
    return results[0]


def prepare(job: Job) -> Callable[[], tuple[float, float]]:
    """A call that returns how far a kernel's result is from float64, and how far it may be."""
    cpu = torch.device("cpu")
    if job.fmt is None:
        return lambda: quantized(job)
    packed = random_packed(job.fmt, job.n, job.k, job.dtype)
    packed = packed.to_layout("mma.sp" if job.kernel == "mma.sp" else native_layout(torch.device("cuda")))
    if job.kernel == "dequantize":
        wanted = packed.dequantize(job.dtype)
        return lambda: (float((ops._dequantize_cuda(packed, job.dtype) != wanted).sum()), 0.0)
    x, bias = random_tokens(job.m, job.k, job.dtype, cpu), torch.linspace(-3, 3, job.n).to(job.dtype)

    def product() -> tuple[float, float]:
        from qlinear.kernels.matmul import matmul

        y = ops._linear_cuda(x, packed, bias, None) if job.config is None else matmul(x, packed, bias, job.config)
        return error(y, reference.matmul(x, packed, bias)), job.fmt.max_error(job.dtype)

    return product


def quantized(job: Job) -> tuple[float, float]:
    """Tokens rounded to 8 bits: how many differ from those that torch rounds, or how far their scales are off."""
    from qlinear.kernels.activations import quantize_activations, rms_norm_quantize

    kernel, number = job.kernel.split()
    x = random_tokens(job.m, job.k, job.dtype, torch.device("cpu"))
    gain = random_tokens(1, job.k, job.dtype, torch.device("cpu"))[0]
    if kernel == "quantize":
        (q, scale), values, rms = quantize_activations(x, number), x.float(), 1.0
    else:
        (q, scale), values = rms_norm_quantize(x, gain, 1e-5, number), x.float() * gain.float()
        rms = (x.double().square().mean(1) + 1e-5).sqrt()
    dtype, levels = ROUNDED[number]
    largest = values.abs().amax(1, keepdim=True)
    wanted = values * torch.div(torch.tensor(levels), largest)
    wanted = wanted.round().to(dtype) if number == "int" else wanted.to(dtype)
    differing = int((q.float() != wanted.float()).sum())
    return differing + error(scale, (largest / levels).squeeze(1).double() / rms), 1e-6


if __name__ == "__main__":
    torch.set_num_threads(1)
    answer(run)
