"""Whether a product's operands may be written again while it runs (see :mod:`bench.operands`): only a GPU can tell.

Every kernel of sm_90 that may do so, against a build of it that waits and against float64, on a large weight and with
many programs to a processor. The verdict is in words, in the file and in the summary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from bench.cubins import disassemble
from bench.gpu_checks import random_tokens
from bench.gpu_job import Job, Result, dtype_name
from bench.gpu_warm import Case, random_weight, warm
from bench.operands import Waiting, early_writes, early_writes_of_code
from bench.sass import hot_loop
from qlinear import reference
from qlinear.format import FORMATS
from qlinear.kernels.configs import Config, shipped_configs
from qlinear.kernels.runtime import target_of
from qlinear.packing import PackedWeight

#: Whose tiles they are: others have no such product.
_CAPABILITY = (9, 0)
#: Fewer tokens are multiplied by a warp's products, which read their operands when they start.
_FEWEST = 16
NOT_ASKED = "not asked: only products of sm_90 read the weight from registers while the program goes on"


def operands(job: Job) -> Result:
    """Both builds of every tile, several times, on many tokens and on few."""
    result: Result = {"rows": [], "failed": [], "left_out": []}
    target = target_of(job.device)
    if not target.interpreted and target.capability != _CAPABILITY:
        return result | {"verdict": NOT_ASKED}
    result["warm"] = warm(list(_cases(job)), job, job.left * 0.6)
    for scheme, dtype in _kinds(job):
        n, k = job.sizes.operands
        packed = random_weight(FORMATS[scheme], n, k, dtype, job.device)
        for config in tiles(scheme, dtype):
            if job.left < 2:
                result["left_out"].append(f"{scheme} {dtype_name(dtype)} {config}")
                continue
            result["rows"] += [compare(packed, m, dtype, config, job) for m in _tokens(config, job)]
            verdict, failed = judge(result["rows"])
            job.save(result | {"verdict": verdict, "failed": failed})
    verdict, failed = judge(result["rows"])
    return result | {"verdict": verdict, "failed": failed}


def tiles(scheme: str, dtype: torch.dtype) -> list[Config]:
    """The configurations that multiply a weight in registers by a whole warpgroup."""
    return [c for c in shipped_configs(FORMATS[scheme], dtype, _CAPABILITY) if c.block_m >= _FEWEST]


def _kinds(job: Job) -> list[tuple[str, torch.dtype]]:
    """The first two schemes in bfloat16 too: it is decoded by other instructions."""
    schemes = job.sizes.operand_schemes
    return [(scheme, torch.float16) for scheme in schemes] + [(scheme, torch.bfloat16) for scheme in schemes[:2]]


def _tokens(config: Config, job: Job) -> tuple[int, int]:
    """As many as fill every processor many times, and one tile."""
    return job.sizes.operand_tokens, config.block_m


def _cases(job: Job) -> Iterator[Case]:
    n, k = job.sizes.operands
    for scheme, dtype in _kinds(job):
        for config in tiles(scheme, dtype):
            for build in (config, Waiting(**asdict(config))):
                yield Case(scheme, dtype_name(dtype), config.block_m, n, k, config=build)


def compare(packed: PackedWeight, m: int, dtype: torch.dtype, config: Config, job: Job) -> Result:
    """One configuration as it ships and as it would wait, on ``m`` tokens, each so many times as ``sizes.repeats``."""
    from qlinear.kernels.matmul import matmul

    x = random_tokens(m, packed.in_features, dtype, job.device)
    wanted = reference.activations(x, packed) @ packed.dequantize(torch.float64).t()
    row: Result = {
        "scheme": packed.format.name,
        "dtype": dtype_name(dtype),
        "tile": str(config),
        "m": m,
        "n": packed.out_features,
        "k": packed.in_features,
        "runs": job.sizes.repeats,
        "bound": packed.format.max_error(dtype),
    }
    first: Tensor | None = None
    for name, build in (("waits", Waiting(**asdict(config))), ("ships", config)):
        before = _compiled(job.device)
        different, error = 0, 0.0
        for _ in range(job.sizes.repeats):
            y = matmul(x, packed, config=build)
            first = y if first is None else first
            different = max(different, int((_bits(y) != _bits(first)).sum()))
            error = max(error, float((y.double() - wanted).norm() / wanted.norm()))
        new = [kernel for key, kernel in _compiled(job.device).items() if key not in before]
        row[name] = {"different": different, "error": error if error == error else None}
        row[name]["early_writes"] = sum(map(_early, new)) if new else None
    return row


def _early(kernel: Any) -> int:
    """Early writes of a compiled kernel, in PTX and in machine code."""
    (program,) = disassemble([kernel.asm["cubin"]], _CAPABILITY)
    return len(early_writes(kernel.asm["ptx"])) + early_writes_of_code(hot_loop(program))


def _compiled(device: torch.device) -> dict[Any, Any]:
    """The kernels that this process has compiled for a device, by what they were compiled for."""
    from qlinear.kernels.matmul import _matmul_kernel

    caches = getattr(_matmul_kernel, "device_caches", None)
    return {} if caches is None or device.type != "cuda" else dict(caches[device.index or 0][0])


def _bits(y: Tensor) -> Tensor:
    """Two numbers that are not are equal if their bits are."""
    return y.contiguous().view(torch.int16)


def judge(rows: Sequence[Result]) -> tuple[str, list[str]]:
    """The verdict over all rows, and what is wrong in each that is."""
    failed = [_say(row, problem) for row in rows for problem in _problems(row)]
    kernels, early = {_kernel(row) for row in rows}, {_kernel(row) for row in rows if row["ships"]["early_writes"]}
    known = any(row["ships"]["early_writes"] is not None for row in rows)
    runs = f"{len(kernels)} kernels, {sum(row['runs'] for row in rows)} runs"
    if wrong := sorted({_kernel(row) for row in rows if _sound(row, "waits") and not _sound(row, "ships")}):
        change = "let Config.waits_for_operands return `capability == (9, 0)`"
        return f"DIFFERENT BITS: {change}; wrong are {', '.join(wrong)}", failed
    if not rows:
        return "UNDECIDED: nothing was compared", failed
    if failed:
        return "UNDECIDED: the build that waits is wrong itself, or does not wait", failed
    if known and not early:
        return f"nothing to decide: none of {len(kernels)} kernels writes to operands early here", failed
    return f"same bits: registers of A may be rewritten ({runs}{f', {len(early)} do so' if known else ''})", failed


def _kernel(row: Result) -> str:
    return f"{row['scheme']} {row['dtype']} {row['tile']}"


def _sound(row: Result, name: str) -> bool:
    """Whether a build has the bits of the one that waits, every time, and these are right."""
    return not row[name]["different"] and row[name]["error"] is not None and row[name]["error"] <= row["bound"]


def _problems(row: Result) -> Iterator[str]:
    for name in ("waits", "ships"):
        if row[name]["different"]:
            yield f"as it {name}: up to {row[name]['different']} numbers have other bits than where it waits"
        elif not _sound(row, name):
            yield f"as it {name}: relative error {row[name]['error']} above {row['bound']:g}"
    if row["waits"]["early_writes"]:
        yield f"as it waits: {row['waits']['early_writes']} instructions still write to operands early"


def _say(row: Result, problem: str) -> str:
    return f"{_kernel(row)} {row['m']}x{row['n']}x{row['k']}: {problem}"
