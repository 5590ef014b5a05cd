"""The machine code of the kernel of unstructured weights, compiled for a GPU that need not be present."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import bitmaps, sass
from bench.audit import CAPABILITIES
from bench.cubins import Job, read_all
from qlinear.kernels.configs import Config
from qlinear.pruning.report import SLOTS


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> list[bitmaps.Bitmap]:
    """Those of few tokens; on other machines than Hopper's those of float16."""
    jobs = [
        job
        for job in bitmaps.jobs_of(list(CAPABILITIES), bitmaps.SCHEMES)
        if job.config.block_m == 16 and (job.capability == (9, 0) or job.dtype == "fp16")
    ]
    return list(read_all(jobs, tmp_path_factory.mktemp("cubins"), bitmaps.read).values())


def test_the_report_predicts_with_what_is_counted(kernels: list[bitmaps.Bitmap]) -> None:
    assert {(k.arch, k.scheme) for k in kernels} == {(arch, name) for arch in SLOTS for name in bitmaps.SCHEMES}
    for kernel in kernels:
        assert kernel.slots_per_weight == pytest.approx(SLOTS[kernel.arch][kernel.scheme], rel=0.03), kernel
        assert kernel.spills == 0, kernel


def test_they_are_shown(kernels: list[bitmaps.Bitmap], tmp_path: Path) -> None:
    text, data = bitmaps.report(kernels)
    assert all(kernel.name in text for kernel in kernels)
    assert [row["name"] for row in data] == [kernel.name for kernel in kernels]
    assert bitmaps.report([]) == ("", [])


def test_products_of_part_of_a_step_are_refused() -> None:
    listing = """
    /*0000*/ HMMA.16816.F32 R0, R4, R8, R0 ;
    /*0010*/ BRA 0x0 ;
    """
    job = Job("w8a16-unstructured", "fp16", (8, 0), Config(16, 64, 4, 2))
    with pytest.raises(ValueError, match="the products of an iteration are 8192, those of a step 131072"):
        bitmaps.weights_per_iteration(sass.hot_loop(sass.parse(listing)), job)
