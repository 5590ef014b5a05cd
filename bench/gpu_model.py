"""One layer of a language model with random weights, built like Llama's: compiled, in a CUDA graph, and its speed."""

from __future__ import annotations

import copy
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.gpu_job import Job, Result, dtype_name
from bench.timing import in_turns
from qlinear import QLinear, convert
from qlinear.format import FORMATS
from qlinear.kernels.graphs import capture, replayed


class Block(nn.Module):
    """Attention over a full cache and a gated MLP, for one new token: ``[1, 1, hidden] -> [1, 1, hidden]``."""

    keys: Tensor
    values: Tensor

    def __init__(self, hidden: int, inner: int, heads: int, kv_heads: int, context: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.size = heads, kv_heads, hidden // heads
        self.norm1, self.norm2 = nn.RMSNorm(hidden), nn.RMSNorm(hidden)
        self.q = nn.Linear(hidden, hidden, bias=False)
        self.k = nn.Linear(hidden, kv_heads * self.size, bias=False)
        self.v = nn.Linear(hidden, kv_heads * self.size, bias=False)
        self.o = nn.Linear(hidden, hidden, bias=False)
        self.gate = nn.Linear(hidden, inner, bias=False)
        self.up = nn.Linear(hidden, inner, bias=False)
        self.down = nn.Linear(inner, hidden, bias=False)
        for name in ("keys", "values"):
            self.register_buffer(name, torch.randn(1, kv_heads, context, self.size))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        q = self.q(y).view(1, 1, self.heads, self.size).transpose(1, 2)
        k = self.k(y).view(1, 1, self.kv_heads, self.size).transpose(1, 2)
        v = self.v(y).view(1, 1, self.kv_heads, self.size).transpose(1, 2)
        k, v = torch.cat((self.keys[:, :, 1:], k), 2), torch.cat((self.values[:, :, 1:], v), 2)
        a = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        x = x + self.o(a.transpose(1, 2).reshape(x.shape))
        y = self.norm2(x)
        added: Tensor = self.down(F.silu(self.gate(y)) * self.up(y))
        return x + added


def in_float(model: nn.Module) -> nn.Module:
    """A copy in float64 that multiplies by the numbers the packed weights stand for."""
    made = copy.deepcopy(model)
    for name, layer in list(made.named_modules()):
        if isinstance(layer, QLinear):
            dense = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
            dense.weight = nn.Parameter(layer.dequantize(torch.float64), requires_grad=False)
            made.set_submodule(name, dense)
    return made.double()


def models(job: Job) -> Result:
    """Is a converted layer right, whole under ``torch.compile``, the same in a CUDA graph; and how fast a token is."""
    dtype = job.sizes.dtypes[0]
    torch.manual_seed(0)
    with torch.device(job.device):
        block = Block(*job.sizes.model).to(dtype).eval().requires_grad_(False)
        x = torch.randn(1, 1, job.sizes.model[0]).to(dtype)
    made: dict[str, nn.Module] = {dtype_name(dtype): block}
    result: Result = {"rows": [], "failed": [], "left_out": []}
    with torch.no_grad():
        for scheme in job.sizes.model_schemes:
            made[scheme] = convert(copy.deepcopy(block), scheme).eval()
            _check(scheme, made[scheme], x, result, job)
            job.save(result)
        result["rows"] += _speeds(made, x, job)
        job.save(result)
        for scheme in job.sizes.model_schemes:
            if job.left < 10:
                result["left_out"].append(f"compile {scheme}")
            else:
                _compile(scheme, made[scheme], x, result, job)
            job.save(result)
    return result


def _check(scheme: str, model: nn.Module, x: Tensor, result: Result, job: Job) -> None:
    wanted = in_float(model)(x.double())
    y = model(x)
    error = float((y.double() - wanted).norm() / wanted.norm())
    # W8A8 and fp8 round their activations, which the float copy does not.
    if not error <= (0.05 if FORMATS[scheme].quantized_activations else 0.02):
        result["failed"].append(f"{scheme}: the layer is off by {error:.2e}")
    result.setdefault("errors", {})[scheme] = error
    if job.on_gpu:
        results: list[Tensor] = []
        graph = capture([lambda: results.append(model(x))], job.device)
        results[-1].fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize(job.device)
        if not torch.equal(results[-1], y):
            result["failed"].append(f"{scheme}: a replay of its CUDA graph has other bits")


def _speeds(made: dict[str, nn.Module], x: Tensor, job: Job) -> list[Result]:
    calls: dict[str, Any] = {name: (lambda model=model: model(x)) for name, model in made.items()}
    if job.on_gpu:
        times = replayed({name: [call] for name, call in calls.items()}, 9, 0.1, job.device)
    else:
        times = in_turns(calls, 0.0)
    base = times[next(iter(made))]
    return [{"model": name, "us": t * 1e6, "of_float": base / t} for name, t in times.items()]


def _compile(scheme: str, model: nn.Module, x: Tensor, result: Result, job: Job) -> None:
    """Whole, without a break; inductor may round elementwise work elsewhere, so bits are not compared."""
    begin = time.monotonic()
    try:
        y = torch.compile(model, fullgraph=True, backend=job.sizes.compile_backend)(x)
    except Exception as raised:
        result["failed"].append(f"{scheme}: torch.compile: {type(raised).__name__}: {str(raised)[:400]}")
        return
    wanted = model(x)
    error = float((y.double() - wanted.double()).norm() / wanted.double().norm())
    row = {"seconds": time.monotonic() - begin, "difference": error}
    result.setdefault("compiled", {})[scheme] = row
    if not error <= (0.05 if FORMATS[scheme].quantized_activations else 0.01):
        result["failed"].append(f"{scheme}: compiled, the layer is off by {error:.2e}")
