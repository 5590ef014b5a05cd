"""What the operators do with the kernels: on a GPU where there is one, else the same code through the interpreter."""

from __future__ import annotations

import pytest
import torch
from models import random_packed, relative_error

import qlinear
from qlinear import ops, reference
from qlinear.format import DENSE, Format
from qlinear.kernels import dequantize as kernels_dequantize

ALL = pytest.mark.parametrize("fmt", DENSE.values(), ids=str)


def _arguments(fmt: Format, n: int, k: int, device: torch.device) -> tuple[qlinear.PackedWeight, tuple[object, ...]]:
    plain = random_packed(fmt, n, k)
    there = plain.to_layout("triton")
    tensors = [t if t is None else t.to(device) for t in (there.weight, there.scale, there.zero_point)]
    return plain, (*tensors, torch.linspace(-1, 1, n).to(device), fmt.name, k, n)


@ALL
@pytest.mark.parametrize("tokens", [3, ops.GPU_DEQUANTIZE_TOKENS], ids=["few", "many"])
def test_linear_takes_the_kernels(fmt: Format, tokens: int, device: torch.device) -> None:
    plain, arguments = _arguments(fmt, 70, 200, device)
    x = torch.randn(1, tokens, 200).half()
    y = ops._linear_cuda(x.to(device), *arguments)  # type: ignore[arg-type]
    assert y.shape == (1, tokens, 70) and y.dtype == torch.float16
    wanted = reference.matmul(x, plain, torch.linspace(-1, 1, 70))
    assert relative_error(y.cpu(), wanted) <= fmt.max_error(torch.float16)


@pytest.mark.parametrize("scheme", ["w4a16-g32-asym", "w4a16-channel", "w8a16"])
def test_many_tokens_in_slices_of_the_weight(
    scheme: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What does not fit the cache is dequantized some rows at a time: the same numbers, and never the whole matrix."""
    fmt, tokens = DENSE[scheme], ops.GPU_DEQUANTIZE_TOKENS
    plain, arguments = _arguments(fmt, 300, 200, device)
    rows: list[int] = []
    real = kernels_dequantize.dequantize_tensors
    monkeypatch.setattr(kernels_dequantize, "dense_rows", lambda *_: 128)
    monkeypatch.setattr(kernels_dequantize, "dequantize_tensors", lambda *a: rows.append(a[3]) or real(*a))
    x = torch.randn(tokens, 200).half()
    y = ops._linear_cuda(x.to(device), *arguments)  # type: ignore[arg-type]
    assert rows == [128, 128, 44]
    wanted = reference.matmul(x, plain, torch.linspace(-1, 1, 300))
    assert relative_error(y.cpu(), wanted) <= fmt.max_error(torch.float16)


@ALL
def test_dequantize_is_the_plain_weight(fmt: Format, device: torch.device) -> None:
    plain, (weight, scale, zero, _, name, k, n) = _arguments(fmt, 70, 200, device)
    dense = ops._dequantize_cuda(weight, scale, zero, name, k, n, torch.bfloat16)  # type: ignore[arg-type]
    assert torch.equal(dense.cpu(), plain.dequantize(torch.bfloat16))


def test_activations_are_rounded_as_on_a_cpu(device: torch.device) -> None:
    from qlinear import cpu

    x = torch.randn(5, 200).bfloat16()
    values, scale = ops._quantize_cuda(x.to(device))
    wanted, wanted_scale = cpu.quantize_activations(x)
    assert values.is_contiguous() and scale.shape == (5, 1)
    assert torch.equal(values.cpu(), wanted) and torch.equal(scale.cpu(), wanted_scale)


def test_the_plain_layout_works_too(device: torch.device) -> None:
    plain = random_packed(DENSE["w4a16-asym"], 70, 200)
    tensors = [t if t is None else t.to(device) for t in (plain.weight, plain.scale, plain.zero_point)]
    x = torch.randn(3, 200).half()
    y = ops._linear_cuda(x.to(device), *tensors, None, "w4a16-asym", 200, 70)  # type: ignore[arg-type]
    assert relative_error(y.cpu(), reference.matmul(x, plain)) <= 1e-3


@pytest.mark.gpu
@ALL
def test_a_module_on_a_gpu(fmt: Format) -> None:
    layer = torch.nn.Linear(200, 70).cuda().half()
    quantized = qlinear.QLinear.from_float(layer, fmt.name)
    assert quantized.layout == "triton"
    x = torch.randn(2, 5, 200, device="cuda").half()
    on_cpu = quantized.packed.to_layout("plain")
    plain = qlinear.PackedWeight(
        on_cpu.weight.cpu(), on_cpu.scale.cpu(), None if fmt.symmetric else on_cpu.zero_point.cpu(), fmt, 70, 200
    )
    wanted = reference.matmul(x.cpu(), plain, layer.bias.detach().cpu())
    assert relative_error(quantized(x).cpu(), wanted) <= fmt.max_error(torch.float16)
    there_and_back = quantized.cpu().cuda()
    assert torch.equal(there_and_back(x), quantized(x))


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", ["w4a16", "w8a8"])
def test_compile_and_cuda_graphs(scheme: str) -> None:
    layer = qlinear.QLinear.from_float(torch.nn.Linear(512, 256).cuda().half(), scheme)
    x = torch.randn(4, 512, device="cuda").half()
    with torch.no_grad():
        wanted = layer(x)
        assert torch.equal(torch.compile(layer, fullgraph=True)(x), wanted)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = layer(x)
        captured.zero_()
        graph.replay()
    assert torch.equal(captured, wanted)
