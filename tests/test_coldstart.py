"""A fresh process compiles what its first call needs and no more; what ``python -m bench coldstart`` reports."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest
import torch
from models import run_python

from bench import coldstart
from bench.gpu_job import Job
from qlinear.format import FORMATS
from qlinear.kernels.configs import choose_config
from qlinear.kernels.tile_table import M_BUCKETS

#: The real launchers and Triton's own specialization for an H100 that is not there: what would be compiled is written
#: down by the hook that Triton calls first, and is not compiled. Prints the kernels of each call that are new.
LAUNCHES = """
import json, sys, torch, triton
from triton.backends.compiler import GPUTarget

class Driver:
    def __init__(self):
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device: 0
        self.get_current_target = lambda: GPUTarget("cuda", 90, 32)

triton.runtime.driver.set_active(Driver())
from qlinear import packing, ops
from qlinear.kernels import activations, matmul, runtime, tuned
target = lambda device: runtime.Target((9, 0), 132)
for module in (activations, matmul, tuned):
    module.target_of = target

seen, new = set(), []
def hook(key, fn, **event):
    if (fn.name, key) not in seen:
        seen.add((fn.name, key))
        new.append(fn.name.split(".")[-1])
    return True  # as if it were compiled: nothing is

triton.knobs.runtime.jit_cache_hook = hook
found = []
for scheme, n, k, m in json.loads(sys.argv[1]):
    packed = packing.pack(torch.randn(n, k).half(), scheme, layout="triton")
    assert not new, "packing compiles"
    x = torch.zeros(m, k, dtype=torch.float16)
    ops._linear_cuda(x, packed, None, None)
    found.append(list(new))
    new.clear()
print(json.dumps(found))
"""


def compiled(calls: list[tuple[str, int, int, int]]) -> list[list[str]]:
    """The kernels that each call (scheme, n, k, tokens) of one process compiles beside those before it."""
    found: list[list[str]] = json.loads(run_python(LAUNCHES, json.dumps(calls), TRITON_INTERPRET="0"))
    return found


def test_one_call_compiles_one_matmul_kernel() -> None:
    # A tenth and another token of the same bucket compile nothing; neither does another layer of the same kind.
    calls = [("w4a16", 256, 1024, 1), ("w4a16", 256, 1024, 8), ("w4a16", 512, 2048, 2), ("w8a16", 256, 1024, 1)]
    calls += [("w8a8", 256, 1024, 1), ("w8a8", 256, 1024, 5), ("w4a8", 256, 1024, 5)]
    assert compiled(calls) == [
        ["_matmul_kernel"],
        [],
        [],
        ["_matmul_kernel"],
        ["_quantize_kernel", "_matmul_kernel"],
        [],
        ["_matmul_kernel"],
    ]


def test_every_number_of_tokens_of_a_bucket_has_one_kernel() -> None:
    ends = [0, *M_BUCKETS]
    tokens = [m for low, high in itertools.pairwise(ends) for m in (low + 1, low + 3, high)]
    calls = [("w4a16-g32", 512, 512, m) for m in tokens]
    fmt, seen, wanted = FORMATS["w4a16-g32"], set(), []
    # A token alone, several, and all: the first of a tile compiles, what has the same one does not.
    for m in tokens:
        tile = replace(choose_config(m, 512, 512, fmt, torch.float16, (9, 0), 132), split_k=1)
        wanted.append([] if tile in seen else ["_matmul_kernel"])
        seen.add(tile)
    assert compiled(calls) == wanted and [len(w) for w in wanted[:9]] == [1, 0, 0] * 3


def test_making_a_layer_compiles_and_imports_nothing() -> None:
    code = """
    import sys, torch, qlinear
    q = qlinear.QLinear.from_float(torch.nn.Linear(128, 64).bfloat16(), "w4a16")
    q(torch.zeros(1, 128).bfloat16())
    assert not [m for m in sys.modules if m.split(".")[0] == "triton" or m.startswith("qlinear.kernels")]
    print("done")
    """
    assert run_python(code).strip() == "done"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here, which the command measures instead")
def test_the_command_measures_fresh_processes() -> None:
    rows = list(coldstart.measure("cpu", ("w8a8",)))
    assert [row["cache"] for row in rows] == ["empty", "filled"]
    kernels = ["_quantize_kernel", "_matmul_kernel"]
    assert [(row["compiled"], row["loaded"]) for row in rows] == [(kernels, []), ([], kernels)]
    for row in rows:
        assert set(row["seconds"]) == set(coldstart._STEPS) and min(row["seconds"].values()) > 0
    empty, filled = coldstart.show(rows).splitlines()[-2:]
    assert empty.endswith("_quantize_kernel _matmul_kernel  none")
    assert filled.endswith("none                             _quantize_kernel _matmul_kernel")


def test_rows_of_several_rounds_are_medians() -> None:
    made = [
        {"scheme": "w8a8", "device": "cpu", "cache": cache, "seconds": {"compile": seconds}}
        for seconds in (3.0, 1.0, 9.0)
        for cache in ("empty", "filled")
    ]
    empty, filled = coldstart.medians(made)
    assert (empty["cache"], empty["seconds"], empty["processes"]) == ("empty", {"compile": 3.0}, 3)
    assert filled["cache"] == "filled" and coldstart.medians([]) == []


def test_a_process_that_fails_is_reported() -> None:
    with pytest.raises(RuntimeError, match=r"w3a16.* does not exist"):
        list(coldstart.measure("cpu", ("w3a16",)))
    late = coldstart.stage(Job(torch.device("cpu"), deadline=0.0))
    assert late["left_out"] == list(coldstart.SCHEMES) and late["rows"] == []
