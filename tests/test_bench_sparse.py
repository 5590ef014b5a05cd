"""Sparse layers in the benchmarks: what is predicted for a GPU, and what is measured here."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import fragments, gpu_sparse, sparse, sparsity, sparsity24
from bench.audit import audit, jobs_of
from bench.cubins import read_all
from bench.gpu_job import Job, Sizes
from bench.problems import Problem
from qlinear import reference, semi_structured
from qlinear.machines import MACHINES
from qlinear.semi_structured import Choice


def test_the_sparsity_from_which_on_blocks_are_as_fast(tmp_path: Path) -> None:
    wanted = [Problem("m", "l", 1, 8192, 8192), Problem("m", "l", 4096, 8192, 8192)]
    schemes = ["w4a16", "w4a16-block64", "w8a16-block64"]
    audited = audit(jobs_of(wanted[:1], schemes, "sm_90", ["fp16"]), tmp_path)
    found = sparsity.rows(audited, wanted, MACHINES["H200"])
    # One token: bytes decide. int4 blocks have two scales where int4 in groups of 128 has one; int8 has twice the bits.
    assert [(row["M"], row["scheme"], row["dense"], row["sparsity"]) for row in found] == [
        (1, "w4a16-block64", "w4a16", 0.05),
        (1, "w8a16-block64", "w4a16", 0.5),
    ]
    seconds = sparsity.timing(audited, MACHINES["H200"])
    half, quarter = (seconds(wanted[0], "w8a16-block64", share) for share in (0.5, 0.25))
    assert quarter == pytest.approx(half / 2, rel=0.02)
    text = sparsity.as_table(found, MACHINES["H200"])
    assert "8192 x 8192" in text and " 5%" in text and "50%" in text
    assert "never" in sparsity.as_table([found[0] | {"sparsity": None}], MACHINES["H200"])


def test_what_half_of_the_weights_are_worth(tmp_path: Path) -> None:
    problem, machine = Problem("m", "l", 1, 8192, 8192), MACHINES["H200"]
    audited = audit(jobs_of([problem], ["w4a16", "w8a16", "w4a16-2:4"], "sm_90", ["fp16"]), tmp_path)
    jobs = fragments.jobs_of(["sm_90"], ["w4a16-2:4"])
    few = [job for job in jobs if job.dtype == "fp16" and job.config.block_m == 8]
    kernel = read_all(few, tmp_path, fragments.read)[few[0]]
    found = sparsity24.rows(audited, [kernel], [problem], machine)
    times = {(row["kernel"], row["dense"]): row["times"] for row in found}
    assert len(times) == len(found) == 4
    # Bytes decide for sparse tensor cores: 3.125 bits a weight against 4.125 and 8; dense layers add four parts of
    # K of one token, where they add two. Expanding costs instructions.
    bytes_per_s, l2 = machine.stream_bytes_per_s, 64 * machine.clock_hz
    for dense, bits in (("w4a16", 4.125), ("w8a16", 8)):
        floors = [bits * 8192 * 8192 / 8 / bytes_per_s, 3.125 * 8192 * 8192 / 8 / bytes_per_s]
        wanted = (floors[0] + 4 * 256 * 4 / l2) / (floors[1] + 4 * 128 * 2 / l2)
        assert times["mma.sp", dense] == pytest.approx(wanted, rel=0.02)
    assert 1 < times["expanded", "w4a16"] < times["mma.sp", "w4a16"]
    slow = replace(kernel, slots_per_weight=100.0)
    assert sparsity24.fragment_seconds(slow, problem, machine) == pytest.approx(
        100 * 128 * 8192 / 2 / 128 / machine.clock_hz, rel=0.01
    )
    text = sparsity24.as_table(found, machine)
    assert "8192 x 8192" in text and "(mma.sp)" in text and f"{times['mma.sp', 'w4a16']:.2f}x" in text


def test_a_block_sparse_layer_is_timed_against_dense_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"shape": (192, 320), "tokens": (1, 40), "sparsities": (0.5, 0.9), "seconds": 1e-3}
    rows = sparse.measure(torch.bfloat16, torch.device("cpu"), **settings)
    assert [(row["sparsity"], row["m"]) for row in rows] == [(0.5, 1), (0.5, 40), (0.9, 1), (0.9, 40)]
    names = {"float", "w8a16", "w4a16-g64", *sparse.SCHEMES}
    assert all(set(row["us"]) == names and min(row["us"].values()) > 0 for row in rows)
    rows[0]["us"] |= {"float": 6.0, "w4a16-block64": 2.0, "w4a16-g64": 3.0}
    assert "3.00x (1.50x)" in sparse.show(rows)
    monkeypatch.setattr(reference, "matmul", lambda x, _: torch.ones(len(x), 192).double())
    with pytest.raises(RuntimeError, match=r"w4a16-g64 is wrong here|w8a16 is wrong here"):
        sparse.measure(torch.bfloat16, torch.device("cpu"), **settings)


def test_the_kept_copies_of_sparse_weights(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Why the dense one, where nothing can be timed, or both times."""
    job = Job(device, Sizes(launch=(64, 96)))
    here = gpu_sparse._copy(torch.float16, job)
    keys = {"dtype": "float16", "m": 2048, "n": 64, "k": 96}
    assert here.items() >= keys.items() and here["kept"] in ("dense", "semi-structured") and json.dumps(here)
    if device.type == "cpu":
        assert here == keys | {"kept": "dense", "why": "ValueError: no sparse tensor cores on cpu", "us": {}}
    found = Choice(torch.zeros(64, 54), "faster", (3e-6, 2e-6))
    monkeypatch.setattr(semi_structured, "choose", lambda dense, fmt: found)
    there = gpu_sparse._copy(torch.bfloat16, job)
    assert there["kept"] == "semi-structured" and there["why"] == "faster"
    assert there["us"] == {"dense": pytest.approx(3.0), "semi-structured": pytest.approx(2.0)}
