"""A kept 16-bit copy of a 2:4 weight in PyTorch's semi-structured form, where that multiplies faster than a dense one.

PyTorch has it as ``torch.sparse.SparseSemiStructuredTensor``, which cuSPARSELt multiplies on sparse tensor cores: the
weights that are kept and where they belong, 0.5625 of the bytes. A layer holds the plain tensor inside and not the
subclass, so that its operator, gradients, ``torch.compile``, dispatch modes and moves take it like any other; its shape
tells it from a dense copy. CUTLASS, which PyTorch uses only where it is told to, has two tensors for it: not used.
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from qlinear.format import Format

#: What the two copies are compared with: a long prompt.
TOKENS = 2048
#: Of the comparison; the first round only warms up.
_ROUNDS, _CALLS = 6, 10
#: Tokens and bytes that cuSPARSELt takes in multiples of, as PyTorch calls it.
_ROWS, _ALIGNMENT = 8, 16

#: Seconds of TOKENS tokens by device, dtype and shape: layers that are alike are measured once, and treated alike.
_measured: dict[tuple[torch.device, torch.dtype, torch.Size], tuple[float, float]] = {}


class Choice(NamedTuple):
    """The copy to keep, why, and the seconds of the dense and of the semi-structured one, where both were timed."""

    copy: Tensor
    reason: str
    seconds: tuple[float, float] | None = None


def is_made(copy: Tensor, in_features: int) -> bool:
    """Whether a kept copy is semi-structured; a dense one is ``[out_features, in_features]``."""
    return copy.shape[-1] != in_features


def linear(x: Tensor, copy: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ W.T + bias`` for x ``[..., K]`` and a semi-structured copy of ``W``, all of one dtype."""
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    tokens = len(flat)
    if tokens % _ROWS or tokens == 0 or flat.data_ptr() % _ALIGNMENT:
        flat = F.pad(flat, (0, 0, 0, _ROWS - tokens % _ROWS))
    y = torch._cslt_sparse_mm(copy, flat.t(), bias, transpose_result=True)
    return y[:tokens].view(*x.shape[:-1], y.shape[1])


def make(dense: Tensor) -> Tensor:
    """A 2:4 weight ``[N, K]`` in its semi-structured form.

    Raises:
        ValueError: no sparse tensor cores there, or not what :func:`linear` multiplies by.
        RuntimeError: PyTorch refuses the shape, or has no cuSPARSELt for this device.
    """
    if not _sparse_tensor_cores(dense.device):
        raise ValueError(f"no sparse tensor cores on {dense.device}")
    made = torch.sparse.to_sparse_semi_structured(dense)
    if made.packed is None or made.meta is not None or not is_made(made.packed, dense.shape[1]):
        raise ValueError("PyTorch made it for another library than cuSPARSELt")
    return made.packed


def _sparse_tensor_cores(device: torch.device) -> bool:
    """On NVIDIA's GPUs from compute capability 8.0 on."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


def measure(x: Tensor, dense: Tensor, made: Tensor) -> tuple[float, float]:
    """Seconds of x by the dense and by the semi-structured copy, as a layer calls them; once for each kind of weight.

    Raises:
        RuntimeError: a CUDA graph cannot hold the semi-structured product.
    """
    from qlinear.kernels.graphs import capture

    key = dense.device, dense.dtype, dense.shape
    if key not in _measured:
        sides = partial(F.linear, x, dense), partial(linear, x, made, None)
        # Who captures the layer must not find that a copy keeps it from being captured.
        capture(sides[1:], dense.device)
        rounds = [[_elapsed(side, dense.device) for side in sides] for _ in range(_ROUNDS)][1:]
        first, second = (statistics.median(times) for times in zip(*rounds, strict=True))
        _measured[key] = first, second
    return _measured[key]


def _elapsed(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call on the device, or on the CPU where launching it takes longer."""
    with torch.cuda.device(device):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(_CALLS):
            call()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3 / _CALLS


def choose(
    dense: Tensor,
    fmt: Format,
    make: Callable[[Tensor], Tensor] = make,
    seconds: Callable[[Tensor, Tensor, Tensor], tuple[float, float]] = measure,
) -> Choice:
    """The copy to keep of a weight ``[N, K]`` in 16 bit: ``dense`` itself, or its semi-structured form.

    The latter only of a 2:4 weight, and where its product with random tokens takes less time and differs from the
    dense one by no more than twice ``fmt.max_error``, as a share of its norm. Whatever goes wrong keeps ``dense``.

    Args:
        make: the semi-structured form of a weight.
        seconds: of tokens by the dense copy and by the other.
    """
    if fmt.sparsity != "2:4":
        return Choice(dense, f"{fmt} is not 2:4")
    try:
        with warnings.catch_warnings():
            # PyTorch says that its interface is a prototype.
            warnings.simplefilter("ignore")
            made = make(dense)
        generator = torch.Generator(dense.device).manual_seed(0)
        x = torch.randn(TOKENS, dense.shape[1], device=dense.device, generator=generator).to(dense.dtype)
        wanted = F.linear(x, dense).float()
        error = float((linear(x, made, None).float() - wanted).norm() / wanted.norm())
        # Sums in another order: both are within the bound of the truth. NaN is not.
        if not error <= 2 * fmt.max_error(dense.dtype):
            return Choice(dense, f"wrong: differs from the dense product by {error:.1e}")
        times = seconds(x, dense, made)
    except Exception as problem:
        return Choice(dense, f"{type(problem).__name__}: {problem}".splitlines()[0][:200])
    slow, fast = times
    said = f"{slow / fast:.2f} times as fast as the dense copy with {TOKENS} tokens"
    return Choice(made if fast < slow else dense, said, times)
