"""Every kernel that ``bench/budgets.py`` holds, compiled and compared; its counts against a recount."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_audit import recounted

from bench import budgets, predict
from bench.audit import CAPABILITIES, SCHEMES, Audited, audit, jobs_of
from bench.cubins import Job
from bench.problems import Problem
from qlinear.format import DENSE, FORMATS
from qlinear.kernels.configs import shipped_configs
from qlinear.machines import MACHINES, Machine
from qlinear.pruning.report import SLOTS


def held_jobs() -> dict[Job, Problem]:
    """Every kernel that `bench/budgets.py` holds, on every architecture."""
    return {job: p for arch in CAPABILITIES for job, p in jobs_of(budgets.held_problems(), SCHEMES, arch).items()}


@pytest.fixture(scope="module")
def cubins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shipped")


@pytest.fixture(scope="module")
def shipped(cubins: Path) -> dict[Job, Audited]:
    return audit(held_jobs(), cubins)


@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90"])
def test_every_scheme_agrees_with_a_recount(arch: str, shipped, cubins: Path) -> None:
    one_each = {job.scheme: a.kernel for job, a in shipped.items() if a.kernel.arch == arch}
    assert set(one_each) == set(SCHEMES)
    for kernel in one_each.values():
        slots = recounted((cubins / kernel.cubin).read_bytes(), kernel.threads, kernel.weights_per_iteration)
        assert slots == pytest.approx(kernel.slots_per_weight, rel=0.05), kernel.name


def test_many_tokens_multiply_the_decoded_weight_from_registers(tmp_path: Path) -> None:
    """On Hopper: the left operand of every product of a warpgroup is a register, not a descriptor of shared memory."""
    schemes = [DENSE[name] for name in ("w4a16", "w4a16-g32-asym", "w8a16", "w8a16-fp8")]
    jobs = {
        Job(fmt.name, "bf16", (9, 0), config): Problem("", "", 256, 8192, 8192)
        for fmt in schemes
        for config in shipped_configs(fmt, torch.bfloat16, (9, 0))
        if config.block_m >= 64
    }
    found = audit(jobs, tmp_path)
    assert {job.config.block_m for job in found} == {64, 128}
    for job, one in found.items():
        products = [i for i in one.loop.body if i.kind == "matrix"]
        assert products and all(i.opcode.startswith("HGMMA") for i in products), job
        assert all(re.match(r"R\d+, R\d+, gdesc", i.operands) for i in products), job


def test_every_scheme_has_budgets() -> None:
    assert set(budgets.SLOTS) == set(CAPABILITIES)
    assert not {name for of_arch in budgets.SLOTS.values() for name in set(SCHEMES) - set(of_arch)}


@pytest.mark.parametrize("machine", MACHINES.values(), ids=lambda machine: machine.name)
def test_the_report_of_pruned_models_knows_who_is_bound_by_instructions(machine: Machine) -> None:
    """Of this machine's own kernels: what expands longer than it is read is in its table, with the audit's count."""
    n = k = 4096
    for scheme, budget in budgets.SLOTS[machine.arch].items():
        # A budget is a count plus 3 %.
        count, told = budget.fp16 / 1.03, SLOTS[machine.arch].get(scheme)
        size = predict.weight_bytes(FORMATS[scheme], n, k, density=1.0)
        if count * n * k / machine.slots_per_s > size / machine.stream_bytes_per_s:
            assert told == pytest.approx(count, rel=0.01), scheme
        assert told is None or told == pytest.approx(count, rel=0.01), scheme


@pytest.mark.parametrize("scheme", [name for name in SLOTS["sm_90"] if name in SCHEMES])
def test_the_report_of_pruned_models_predicts_with_what_is_counted(scheme: str, shipped) -> None:
    counted = [
        a.kernel.slots_per_weight
        for job, a in shipped.items()
        if job.scheme == scheme and job.dtype == "fp16" and job.capability == (9, 0)
    ]
    assert max(counted) == pytest.approx(SLOTS["sm_90"][scheme], rel=0.03)


def test_kernels_are_within_their_budgets(shipped) -> None:
    """What is mended must leave budgets.KNOWN, and what is not in it must not appear: then look at what changed."""
    compiled = {str(job) for job in shipped}
    known = {line for line in budgets.KNOWN if line.partition(": ")[0] in compiled}
    found = set(budgets.excesses(shipped))
    assert (found - known, known - found) == (set(), set())


def test_a_worse_kernel_is_seen(shipped) -> None:
    job, good = next((job, a) for job, a in shipped.items() if a.kernel.arch == "sm_90" and job.scheme == "w4a16")
    bad = replace(good.kernel, slots_per_weight=9.0, integer_per_weight=4.0, spills=16, asynchronous=False, ahead=0)
    lines = [line.partition(": ")[2] for line in budgets.excesses({job: replace(good, kernel=bad)})]
    for words in ("9.00 slots", "4.00 integer", "16 bytes spilled", "not all", "0.0 KB in flight"):
        assert any(line.startswith(words) for line in lines), (words, lines)
