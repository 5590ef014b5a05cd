"""The stages ``operands`` and ``columns`` of ``python -m bench gpu`` without a GPU, and that they can fail."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import gpu, gpu_columns, gpu_operands, gpu_summary
from bench.gpu_job import Job, Result, Sizes
from bench.gpu_warm import random_weight
from bench.operands import Waiting
from qlinear.format import FORMATS
from qlinear.kernels import matmul as kernels
from qlinear.kernels import runtime
from qlinear.kernels.runtime import Target

TINY = Sizes(
    dtypes=(torch.float16,),
    operands=(64, 256),
    operand_tokens=17,
    operand_schemes=("w8a16",),
    columns=(70, 128),
    repeats=2,
)


def job(device: torch.device, **changes: Any) -> Job:
    return Job(device, **{"sizes": TINY, **changes})


@pytest.fixture
def one_tile(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first tile and dtype of each scheme: the interpreter takes seconds for one."""
    if (capability := runtime.target_of(device).capability) != (9, 0):
        pytest.skip(f"products of warpgroups are sm_90's, this is {capability}")
    tiles, kinds = gpu_operands.tiles, gpu_operands._kinds
    monkeypatch.setattr(gpu_operands, "tiles", lambda scheme, dtype: tiles(scheme, dtype)[:1])
    monkeypatch.setattr(gpu_operands, "_kinds", lambda job: kinds(job)[:1])


def test_operands(device: torch.device, one_tile: None) -> None:
    saved: list[Result] = []
    result = gpu_operands.operands(job(device, save=saved.append))
    assert result["failed"] == [] and [row["m"] for row in result["rows"]] == [17, 16]
    assert result["verdict"].startswith("same bits: registers of A may be rewritten (1 kernels, 4 runs")
    assert saved[-1]["verdict"] == result["verdict"] and json.dumps(result)
    late = gpu_operands.operands(job(device, deadline=time.monotonic()))
    assert late["verdict"] == "UNDECIDED: nothing was compared" and len(late["left_out"]) == 1


@pytest.mark.parametrize("wrong", ["bits", "numbers", "waits", "sometimes"])
def test_operands_find_other_bits(
    wrong: str, device: torch.device, one_tile: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One bit of one number, now and then, is enough; and a build to compare with that is wrong decides nothing."""
    product, calls = kernels.matmul, []

    def changed(x: Tensor, packed: Any, bias: Any = None, config: Any = None) -> Tensor:
        y = product(x, packed, bias, config)
        calls.append(config)
        waits = isinstance(config, Waiting)
        if wrong == "waits" or (wrong == "numbers" and not waits):
            y[0] = 100
        elif not waits and (wrong == "bits" or len(calls) == 4):
            y.view(torch.int16)[0, 0] ^= 1
        return y

    monkeypatch.setattr(kernels, "matmul", changed)
    result = gpu_operands.operands(job(device))
    assert result["failed"]
    if wrong == "waits":
        assert result["verdict"].startswith("UNDECIDED: the build that waits is wrong itself")
        assert "as it waits: relative error" in result["failed"][0]
    else:
        name = "w8a16 float16 16x256-w4-s3-k1"
        assert result["verdict"].startswith(
            "DIFFERENT BITS: let Config.waits_for_operands return `capability == (9, 0)`"
        )
        assert result["verdict"].endswith(f"wrong are {name}")
        assert f"{name} 17x64x256: as it ships: up to" in result["failed"][0]


def row(early: int | None, early_waiting: int | None = 0, **ships: Any) -> Result:
    good = {"different": 0, "error": 1e-4}
    found: Result = {"scheme": "w4a16", "dtype": "float16", "tile": "t", "m": 1, "n": 2, "k": 3, "runs": 5}
    found |= {"bound": 1e-3, "waits": good | {"early_writes": early_waiting}}
    return found | {"ships": good | {"early_writes": early} | ships}


@pytest.mark.parametrize(
    ("rows", "verdict"),
    [
        ([row(8)], "same bits: registers of A may be rewritten (1 kernels, 5 runs, 1 do so)"),
        ([row(8), row(None)], "same bits: registers of A may be rewritten (1 kernels, 10 runs, 1 do so)"),
        ([row(0)], "nothing to decide"),
        ([row(8, 3)], "UNDECIDED: the build that waits is wrong itself, or does not wait"),
        ([row(8), row(8, different=1)], "DIFFERENT BITS"),
        ([row(8, error=None)], "DIFFERENT BITS"),
        ([row(8, error=0.5)], "DIFFERENT BITS"),
        ([], "UNDECIDED"),
    ],
)
def test_verdicts(rows: list[Result], verdict: str) -> None:
    found, failed = gpu_operands.judge(rows)
    assert found.startswith(verdict) and bool(failed) is verdict.startswith(("DIFFERENT", "UNDECIDED: the"))


def test_other_gpus_are_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_operands, "target_of", lambda device: Target((8, 0), 108))
    result = gpu_operands.operands(job(torch.device("cpu")))
    assert result["verdict"] == gpu_operands.NOT_ASKED and not result["rows"] and not result["failed"]


def test_the_summary_says_the_verdict(tmp_path: Path) -> None:
    bad: Result = {"rows": [], "failed": ["x"], "verdict": "DIFFERENT BITS: y"}
    assert "**operands**: DIFFERENT BITS: y" in gpu_summary.summarize({"operands": bad}, ["operands"], tmp_path)
    assert gpu.describe(bad) == "1 FAILED, DIFFERENT BITS: y, 0 rows"


def test_columns(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_columns, "SCHEMES", ("w4a16-asym-2:4",))
    tiles = gpu_columns.tiles
    monkeypatch.setattr(gpu_columns, "tiles", lambda packed, dtype: tiles(packed, dtype)[-1:])
    result = gpu_columns.columns(job(device))
    assert result["failed"] == [] and result["left_out"] == [] and json.dumps(result)
    assert [r["kernel"].rpartition(" ")[0] for r in result["rows"]][:1] == ["w4a16-asym-2:4 triton float16"]
    late = gpu_columns.columns(job(device, deadline=time.monotonic()))
    assert late["rows"] == [] and len(late["left_out"]) >= 1


def test_every_tile_is_asked_for_all_columns(device: torch.device) -> None:
    weight = random_weight(FORMATS["w16a16-2:4"], 70, 128, torch.float16, device)
    tiles = gpu_columns.tiles(weight, torch.float16)
    assert {tile.block_m for tile in tiles} >= {8, 16, 64} and len(tiles) == len(set(tiles))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        # Odd columns have the number of the row before: what packs two rows for neighbours makes.
        (lambda y: y[1::2].copy_(y[1::2].roll(1, 1)), r"^64 of 128 columns are wrong, 64 of them odd ones: 1 \(in"),
        (lambda y: y[4].mul_(1.01), r"^1 of 128 columns are wrong, 0 of them odd ones: 4 \(in \d+ of 70 rows\)$"),
        (lambda y: y[5].masked_fill_(y[5] == 0, 1e-4), r"columns are wrong, 1 of them odd ones: 5 \(in 3\d of"),
        (lambda y: y[127].fill_(float("nan")), r"127 \(in 70 of 70 rows\)$"),
    ],
    ids=["rows-for-neighbours", "a-little", "zeros", "nan"],
)
def test_columns_that_are_wrong_are_named(change: Any, named: str) -> None:
    weight = random_weight(FORMATS["w8a16-2:4"], 70, 128, torch.float16, torch.device("cpu"))
    right = weight.dequantize(torch.float64).t().half()
    assert gpu_columns.wrong_columns(weight, torch.float16, lambda x: x @ right)["problem"] == ""
    wrong = right.clone()
    change(wrong)
    found = gpu_columns.wrong_columns(weight, torch.float16, lambda x: wrong)
    assert re.search(named, found["problem"]), found["problem"]


def test_a_product_that_raises_is_a_failure() -> None:
    def product(x: Tensor) -> Tensor:
        raise RuntimeError("an illegal memory access was encountered")

    weight = random_weight(FORMATS["w8a16-2:4"], 70, 128, torch.float16, torch.device("cpu"))
    found = gpu_columns.wrong_columns(weight, torch.float16, product)
    assert found == {"wrong": None, "problem": "RuntimeError: an illegal memory access was encountered"}
