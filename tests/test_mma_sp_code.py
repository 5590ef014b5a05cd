"""The machine code of the kernel on sparse tensor cores, compiled for GPUs that need not be present."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import cubins, fragments
from bench.cubins import Job
from bench.problems import Problem
from qlinear.format import FORMATS
from qlinear.kernels.mma_sp import choose_fragment_config, shipped_fragment_configs

FEW, MORE = shipped_fragment_configs()
#: Every format, dtype, architecture and configuration at least once.
JOBS = [
    Job("w4a16-2:4", "fp16", (9, 0), FEW, mma_sp=True),
    Job("w4a16-2:4", "fp16", (9, 0), MORE, mma_sp=True),
    Job("w4a16-asym-2:4", "bf16", (9, 0), MORE, mma_sp=True),
    Job("w8a16-2:4", "bf16", (8, 0), FEW, mma_sp=True),
    Job("w16a16-2:4", "fp16", (8, 9), MORE, mma_sp=True),
]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> list[fragments.Fragments]:
    return list(cubins.read_all(JOBS, tmp_path_factory.mktemp("cubins"), fragments.read).values())


def test_numbers_go_from_memory_into_the_product(kernels: list[fragments.Fragments]) -> None:
    """No spills, no change of layout and nothing through shared memory in the loop; loads a step ahead."""
    for kernel in kernels:
        assert kernel.spills == 0, kernel
        assert all(kind.startswith("HMMA.SP.16832.F32") for kind in kernel.matrix_kinds), kernel
        assert (kernel.conversions, kernel.loads_consumed) == (0, 0), kernel
        assert kernel.slots_per_weight <= fragments.SLOTS, kernel


def test_int4_reaches_what_it_reached(kernels: list[fragments.Fragments]) -> None:
    """0.88 and 1.13 on 2026-11-22 with Triton 3.7.1, plus 3 %."""
    assert kernels[0].slots_per_weight <= 0.91
    assert kernels[1].slots_per_weight <= 1.17
    # 4.8 TB/s times a latency of 1.1 us, over 132 multiprocessors, is 40 KB.
    assert kernels[0].bytes_in_flight >= 40_000


@pytest.mark.parametrize(
    ("m", "n", "k", "within"),
    [(8, 4096, 4096, True), (8, 8192, 8192, True), (16, 8192, 8192, True), (16, 14336, 4096, True),
     # K is split in 8 for work on every multiprocessor: partial sums are 0.64 of the weight.
     (16, 4096, 4096, False)],
)  # fmt: skip
def test_traffic_through_the_cache(m: int, n: int, k: int, within: bool) -> None:
    fmt = FORMATS["w4a16-2:4"]
    config = choose_fragment_config(m, n, k, fmt, 132)
    l2 = fragments.l2_per_weight_byte(Problem("model", "layer", m, n, k), fmt, config)
    assert (l2 <= fragments.L2 + 1e-9) == within, (config, l2)


def test_changes_of_layout_are_counted() -> None:
    loop = "  %0 = scf.for %i {\n    ttg.convert_layout\n    ttg.local_load\n  }\n"
    text = f"  a = ttg.convert_layout b\n{loop}  ttg.convert_layout\n"
    assert cubins.conversions(text) == 2
    with pytest.raises(ValueError, match="no loop"):
        cubins.conversions("ttg.convert_layout")


def test_a_program_without_sparse_products_is_refused() -> None:
    with pytest.raises(ValueError, match="no loop of this program"):
        fragments.hot_loop([])


def test_what_does_not_compile_is_said(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"does not compile: .*none"):
        cubins.read_all([Job("none", "fp16", (9, 0), FEW, mma_sp=True)], tmp_path, fragments.read)
