"""From how many tokens the vendor's matmul is taken: the counts, and what they lead to."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.audit import audit
from bench.cubins import DTYPES, Job
from bench.problems import Problem
from qlinear.format import DENSE
from qlinear.kernels.configs import M_BUCKETS, choose_config, dense_rows
from qlinear.kernels.crossover import (
    LAUNCH,
    MOST_TOKENS,
    SLOTS,
    dequantize_seconds,
    fused_seconds,
    fused_tokens,
    machine_for,
    vendor_seconds,
)
from qlinear.machines import MACHINES

H200 = ((9, 0), 132, 50 << 20)
CAPABILITIES = [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0), "gfx942"]
WEIGHT_ONLY = [fmt for fmt in DENSE.values() if not fmt.quantized_activations]
ROUNDED = [fmt for fmt in DENSE.values() if fmt.quantized_activations]


@settings(deadline=None, max_examples=100)
@given(
    n=st.integers(1, 100_000),
    k=st.integers(1, 60_000),
    fmt=st.sampled_from(WEIGHT_ONLY),
    capability=st.sampled_from(CAPABILITIES),
    num_sms=st.integers(1, 200),
    kept=st.booleans(),
)
def test_it_lies_between_tiles_of_tokens(n, k, fmt, capability, num_sms, kept):
    """A row has the same bits within an M bucket, which ends at 128 tokens: no crossover lies within one."""
    most = fused_tokens(n, k, fmt, torch.bfloat16, capability, num_sms, 50 << 20, kept)
    assert most is not None and most % M_BUCKETS[-1] == 0 and M_BUCKETS[-1] <= most <= MOST_TOKENS


@pytest.mark.parametrize("fmt", ROUNDED, ids=str)
def test_rounded_activations_never_leave_the_kernel(fmt):
    assert all(fused_tokens(n, 4096, fmt, torch.bfloat16, *H200, kept) is None for n in (64, 8192) for kept in (0, 1))


def test_float32_never_leaves_the_kernel():
    assert fused_tokens(8192, 8192, DENSE["w4a16"], torch.float32, *H200) is None


@pytest.mark.parametrize("name", ["w4a16", "w4a16-channel", "w8a16", "w8a16-g32"])
@pytest.mark.parametrize(("n", "k"), [(8192, 8192), (4096, 4096), (1024, 4096), (28672, 8192)])
def test_it_is_where_the_two_predictions_cross(name, n, k):
    fmt, h200 = DENSE[name], MACHINES["H200"]
    most = fused_tokens(n, k, fmt, torch.bfloat16, *H200)

    def kernel_wins(m):
        slices = -(-n // dense_rows(m, n, k, 2, h200.sms, h200.l2_bytes))
        other = dequantize_seconds(m, n, k, fmt, h200) + LAUNCH * (2 * slices - 1)
        return fused_seconds(m, n, k, fmt, torch.bfloat16, h200) <= other

    assert all(kernel_wins(m) for m in range(256, most + 1, 128)) and not kernel_wins(most + 128)


def test_layers_too_narrow_to_fill_the_processors_cross_first():
    fmt = DENSE["w4a16"]
    most = [fused_tokens(n, 8192, fmt, torch.bfloat16, *H200) for n in (1024, 8192)]
    assert most == [128, 256]


def test_a_slow_memory_moves_it_up():
    """An L40S reads and writes the dense weight five times as slowly as an H200."""
    fmt = DENSE["w4a16"]
    slow = fused_tokens(8192, 8192, fmt, torch.bfloat16, (8, 9), 142, 96 << 20)
    assert slow > fused_tokens(8192, 8192, fmt, torch.bfloat16, *H200)


def test_a_kept_copy_is_taken_earlier():
    for capability, sms, l2 in (H200, ((8, 9), 142, 96 << 20), ((8, 0), 108, 40 << 20)):
        for n, k in ((8192, 8192), (14336, 4096), (28672, 8192)):
            arguments = (n, k, DENSE["w8a16"], torch.float16, capability, sms, l2)
            assert fused_tokens(*arguments, kept=True) <= fused_tokens(*arguments)


def test_a_measurement_wins_but_not_over_a_kept_copy():
    fmt, measured = DENSE["w4a16"], {("w4a16", torch.bfloat16, 8192, 8192): 2048}
    assert fused_tokens(8192, 8192, fmt, torch.bfloat16, *H200, measured=measured) == 2048
    assert fused_tokens(8192, 8192, fmt, torch.float16, *H200, measured=measured) == 256
    assert fused_tokens(8192, 8192, fmt, torch.bfloat16, *H200, kept=True, measured=measured) == 128


def test_the_seconds_of_a_made_up_machine():
    machine = replace(
        MACHINES["A100"], sms=10, clock_hz=1e9, memory_bytes_per_s=1e12, fp16_flops=20e12, l2_bytes_per_clock=10_000
    )
    fmt = DENSE["w8a16"]
    # Two tiles of tokens by 10 of 128 rows: each processor has two, of 10 blocks of 128 along K.
    weights = 2 * 1280 * 128
    issue, tensor = weights * SLOTS[8, 128][0] / 128 / 1e9, 2 * weights * 128 / (2e12 * 0.52)
    assert fused_seconds(256, 1280, 1280, fmt, torch.float16, machine) == pytest.approx(max(issue, tensor))
    assert vendor_seconds(256, 1280, 1280, machine) == pytest.approx(2 * 256 * 1280 * 1280 / 16e12)
    # 1280 * 1280 codes, a scale a row, and the dense weight at 0.9 TB/s.
    extra = dequantize_seconds(256, 1280, 1280, fmt, machine) - vendor_seconds(256, 1280, 1280, machine)
    assert extra == pytest.approx((1280 * 1280 * 3 + 1280 * 2) / 0.9e12)


def test_half_a_gpu_has_half_of_everything():
    whole, half = machine_for((9, 0), 132), machine_for((9, 0), 66)
    assert whole == MACHINES["H200"] and half.slots_per_s == whole.slots_per_s / 2
    assert half.fp16_flops == whole.fp16_flops / 2 and half.memory_bytes_per_s == whole.memory_bytes_per_s / 2
    assert machine_for((12, 0), 142).memory_bytes_per_s == MACHINES["L40S"].memory_bytes_per_s


def test_the_slots_are_those_of_the_machine_code(tmp_path):
    """Recounts the formats that set the table's numbers for Ampere and Hopper."""
    jobs = {}
    for scheme, n, bound in (
        ("w8a16-g64", 8192, (8, 128)),
        ("w4a16-g32-asym", 28672, (9, 256)),
        ("w8a16-g32", 8192, (9, 128)),
        ("w8a16-fp8", 8192, (9, 128)),
    ):
        config = choose_config(256, n, 8192, DENSE[scheme], DTYPES["bf16"], (bound[0], 0), 132)
        assert (config.block_m, config.block_n) == (128, bound[1])
        jobs[Job(scheme, "bf16", (bound[0], 0), config)] = bound
    found = audit({job: Problem("", "", 256, 8192, 8192) for job in jobs}, tmp_path)
    for job, bound in jobs.items():
        table = SLOTS[bound][job.format.group_size is not None]
        assert 0.9 * table <= found[job].kernel.slots_per_weight <= 1.03 * table, job
