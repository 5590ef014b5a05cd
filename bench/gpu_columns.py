"""2:4 weights column by column: tokens are unit vectors, so that every output is one number of the weight.

An expansion that takes a number for its neighbour, along K or along N, may do so in one layout of registers and not in
another: every tile that ships is asked for all columns, odd and even ones, and the failure names them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from bench.gpu_checks import poisoned
from bench.gpu_job import Job, Result, dtype_name
from bench.gpu_sparse import layouts
from bench.gpu_warm import random_weight
from qlinear.format import FORMATS
from qlinear.kernels.configs import Config, shipped_configs
from qlinear.kernels.runtime import target_of
from qlinear.packing import PackedWeight

SCHEMES = tuple(name for name, fmt in FORMATS.items() if fmt.sparsity == "2:4")
#: Columns that a failure names.
_NAMED = 6
#: float32 is the sum of three products of TF32.
_FLOAT32 = 1e-5

_Product = Callable[[Tensor], Tensor]


def columns(job: Job) -> Result:
    """Every 2:4 format, dtype, layout and tile that ships, the plain path first, float16 before the others."""
    result: Result = {"rows": [], "failed": [], "left_out": []}
    for dtype in sorted(job.sizes.dtypes, key=lambda dtype: dtype != torch.float16):
        for scheme in SCHEMES:
            weight = random_weight(FORMATS[scheme], *job.sizes.columns, dtype, job.device)
            for layout in layouts(scheme, job):
                packed = weight.to_layout(layout)
                for config in tiles(packed, dtype):
                    name = f"{scheme} {layout} {dtype_name(dtype)} {config}"
                    if job.left < 3:
                        result["left_out"].append(name)
                        continue
                    row = wrong_columns(weight, dtype, partial(_product, packed, config))
                    result["rows"].append({"kernel": name} | row)
                    if row["problem"]:
                        result["failed"].append(f"{name}: {row['problem']}")
            job.save(result)
    return result


def tiles(packed: PackedWeight, dtype: torch.dtype) -> list[Config]:
    """The configurations that ship for a weight in its layout; none where its kernel does not take the dtype."""
    from qlinear.kernels.mma_sp import shipped_fragment_configs, supports

    target = target_of(packed.device)
    if packed.layout == "mma.sp":
        known = supports(packed.format, dtype, packed.scale.dtype, target)
        return list(shipped_fragment_configs()) if known else []
    return list(shipped_configs(packed.format, dtype, target.capability))


def _product(packed: PackedWeight, config: Config, x: Tensor) -> Tensor:
    from qlinear.kernels.matmul import matmul
    from qlinear.kernels.mma_sp import fragment_linear_tensors

    if packed.layout != "mma.sp":
        return matmul(x, packed, config=config)
    return fragment_linear_tensors(x, *packed.tensors, packed.format, packed.out_features, None, config)


def wrong_columns(weight: PackedWeight, dtype: torch.dtype, product: _Product) -> Result:
    """Which columns of a weight ``[N, K]`` a product with unit vectors does not give back, and in how many rows.

    A code times its scale is rounded once or twice on its way; what is pruned must be zero.
    """
    wanted = weight.dequantize(torch.float64).t()
    x = torch.eye(weight.in_features, dtype=dtype, device=weight.device)
    try:
        with poisoned():
            y = product(x).double()
    except Exception as raised:
        return {"wrong": None, "problem": f"{type(raised).__name__}: {raised}".splitlines()[0][:300]}
    bound = _FLOAT32 if dtype == torch.float32 else torch.finfo(dtype).eps
    # What is not a number is not within the bound either.
    rows = (~((y - wanted).abs() <= bound * wanted.abs())).sum(1)
    wrong = rows.nonzero().flatten().tolist()
    if not wrong:
        return {"wrong": 0, "problem": ""}
    named = ", ".join(f"{k} (in {int(rows[k])} of {weight.out_features} rows)" for k in wrong[:_NAMED])
    odd = sum(k % 2 for k in wrong)
    problem = f"{len(wrong)} of {len(rows)} columns are wrong, {odd} of them odd ones: {named}"
    return {"wrong": len(wrong), "odd": odd, "problem": problem + (", ..." if len(wrong) > _NAMED else "")}
