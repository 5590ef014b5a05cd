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
from qlinear.kernels.configs import dense_rows, shipped_configs
from qlinear.kernels.crossover import ENDS, LAUNCH, dequantize_seconds, fused_seconds, fused_tokens
from qlinear.kernels.estimate import LATENCY, SLOTS, kernel_seconds, machine_for, vendor_seconds
from qlinear.kernels.tile_table import M_BUCKETS
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
    """A row has the same bits within an M bucket: no crossover lies within one."""
    most = fused_tokens(n, k, fmt, torch.bfloat16, capability, num_sms, 50 << 20, kept)
    assert most in ENDS and (most in M_BUCKETS or (most > M_BUCKETS[-1] and most % 128 == 0))


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

    def lost(end):
        """In all, where the kernel is taken up to ``end``."""
        total = 0.0
        for m in ENDS[1:]:
            kernel = fused_seconds(m, n, k, fmt, torch.bfloat16, h200)
            other = dequantize_seconds(m, n, k, fmt, h200)
            total += (kernel if m <= end else other) / min(kernel, other) - 1
        return total

    assert lost(most) == pytest.approx(min(map(lost, ENDS))) and lost(most) < 1


def test_every_slice_of_the_dense_weight_costs_two_launches():
    fmt, h200 = DENSE["w4a16"], MACHINES["H200"]
    slices = -(-28672 // dense_rows(4096, 28672, 8192, 2, h200.sms, h200.l2_bytes))
    moved = (fmt.weight_bytes(28672, 8192) + 2 * 28672 * 8192) / h200.stream_bytes_per_s
    extra = dequantize_seconds(4096, 28672, 8192, fmt, h200) - vendor_seconds(4096, 28672, 8192, h200)
    assert slices > 1 and extra == pytest.approx(moved + LAUNCH * (2 * slices - 1))


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
    assert fused_tokens(8192, 8192, fmt, torch.float16, *H200, measured=measured) == fused_tokens(
        8192, 8192, fmt, torch.float16, *H200
    )
    assert fused_tokens(8192, 8192, fmt, torch.bfloat16, *H200, kept=True, measured=measured) < 2048


def test_the_seconds_of_a_made_up_machine():
    machine = replace(
        MACHINES["A100"], sms=10, clock_hz=1e9, memory_bytes_per_s=1e12, fp16_flops=20e12, l2_bytes=1 << 30
    )
    fmt = DENSE["w8a16"]
    # Two tiles of tokens by 10 of 128 rows: each processor has two, of 10 blocks of 128 along K.
    weights = 2 * 1280 * 128
    issue, tensor = weights * SLOTS[8, 128, 128].channel / 128 / 1e9, 2 * weights * 128 / (2e12 * 0.8 * 0.87)
    seconds = kernel_seconds(256, 1280, 1280, fmt, torch.float16, machine, (128, 128, 8), 1, ahead=1 << 20)
    assert seconds == pytest.approx(max(issue, tensor) + LATENCY)
    # In two parts each processor has four, of half as many blocks; one of them adds two parts of 128 x 128 sums.
    added = 2 * 128 * 128 * 4 / 64e9
    split = kernel_seconds(256, 1280, 1280, fmt, torch.float16, machine, (128, 128, 8), 2, ahead=1 << 20)
    assert split == pytest.approx(max(issue, tensor) + 3 * LATENCY + added)
    # Four warps are one warpgroup: where it has a processor for itself it decodes and multiplies in turns.
    alone = kernel_seconds(128, 1280, 1280, fmt, torch.float16, machine, (128, 128, 4), 1, ahead=1 << 20)
    assert alone == pytest.approx((issue + tensor) / 2)
    # Ten programs that have 55 KB each on their way read half of what 1 TB/s brings in 1.1 us.
    slow = replace(machine, fp16_flops=1e18, clock_hz=1e15)
    reading = kernel_seconds(128, 1280, 1280, fmt, torch.float16, slow, (128, 128, 8), 1, ahead=55_000)
    moved = 1280 * 1280 + 2 * 1280 + 2 * 2 * 128 * 1280
    assert reading == pytest.approx(moved / 0.9e12 * 2)
    # Ten tiles of 256 x 128, one for each processor; 88 of 64 x 64 are nine for some.
    assert vendor_seconds(256, 1280, 1280, machine) == pytest.approx(2 * 256 * 1280 * 1280 / 16e12)
    assert vendor_seconds(2560, 1408, 1280, machine) == pytest.approx(2 * 2560 * 1408 * 1280 / 16e12)
    assert vendor_seconds(256, 1408, 1280, machine) > 1.02 * 2 * 256 * 1408 * 1280 / 16e12
    # 1280 * 1280 codes, a scale a row, and the dense weight at 0.9 TB/s; one kernel more.
    extra = dequantize_seconds(256, 1280, 1280, fmt, machine) - vendor_seconds(256, 1280, 1280, machine)
    assert extra == pytest.approx((1280 * 1280 * 3 + 1280 * 2) / 0.9e12 + LAUNCH)


def test_half_a_gpu_has_half_of_everything():
    whole, half = machine_for((9, 0), 132), machine_for((9, 0), 66)
    assert whole == MACHINES["H200"] and half.slots_per_s == whole.slots_per_s / 2
    assert half.fp16_flops == whole.fp16_flops / 2 and half.memory_bytes_per_s == whole.memory_bytes_per_s / 2
    assert machine_for((12, 0), 142).memory_bytes_per_s == MACHINES["L40S"].memory_bytes_per_s


def test_the_slots_are_those_of_the_machine_code(tmp_path):
    """Recounts the formats that set the table's numbers for Ampere and Hopper."""
    jobs = {}
    for scheme, bound, warps, kind in (
        ("w8a16-g64", (8, 128, 128), 8, "grouped"),
        ("w8a16-g64", (8, 64, 64), 4, "grouped"),
        ("w4a16-g32-asym", (9, 128, 256), 8, "grouped"),
        ("w8a16-g32", (9, 128, 128), 8, "grouped"),
        ("w8a16-fp8", (9, 128, 128), 8, "channel"),
        ("w8a16-g32", (9, 64, 128), 4, "grouped"),
        ("w4a8", (9, 64, 128), 4, "grouped8"),
        ("fp8", (9, 64, 128), 4, "channel8"),
    ):
        fmt, capability = DENSE[scheme], (bound[0], 0)
        shipped = shipped_configs(fmt, DTYPES["bf16"], capability)
        config = next(c for c in shipped if (c.block_m, c.block_n, c.num_warps) == (*bound[1:], warps))
        jobs[Job(scheme, "bf16", capability, config)] = bound, kind
    found = audit({job: Problem("", "", 256, 8192, 8192) for job in jobs}, tmp_path)
    for job, (bound, kind) in jobs.items():
        table = getattr(SLOTS[bound], kind)
        assert 0.9 * table <= found[job].kernel.slots_per_weight <= 1.03 * table, job
