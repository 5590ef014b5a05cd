"""Operators on rounded tokens, and what torch.compile makes of layers that read the same ones."""

import pytest
import torch
from models import needs_cpp_compiler, random_packed, relative_error, same_bits
from torch import nn
from torch._dynamo.backends.common import aot_autograd

import qlinear
from qlinear import cpu, prepacked
from qlinear.token_ops import linear_in_parts

FORMATS = [fmt for fmt in qlinear.FORMATS.values() if fmt.quantized_activations]
N, K = 20, 72


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_rounded_linear_is_the_second_half_of_linear(fmt, bias):
    packed, x = random_packed(fmt, N, K), torch.randn(3, K)
    b = torch.randn(N) if bias else None
    values, token_scale = torch.ops.qlinear.quantize_activations(x, fmt.number)
    args = (values, token_scale, packed.weight, packed.scale, b, fmt.name, K, N, torch.float32)
    checks = ["test_autograd_registration", "test_faketensor"]
    if fmt.number == "int":  # what compares inputs before and after needs arithmetic that float8 has not
        checks += ["test_schema", "test_aot_dispatch_dynamic"]
    torch.library.opcheck(torch.ops.qlinear.rounded_linear.default, args, test_utils=tuple(checks))
    whole = torch.ops.qlinear.linear(x, packed.weight, packed.scale, None, b, fmt.name, K, N)
    assert relative_error(torch.ops.qlinear.rounded_linear(*args), whole) < 1e-6
    with pytest.raises(ValueError, match=rf"{fmt} multiplies tokens in torch.*, got torch.float32"):
        torch.ops.qlinear.rounded_linear(values.float(), *args[1:])


class Siblings(nn.Module):
    """Three layers that read the same input, as attention has them."""

    def __init__(self, scheme, device):
        super().__init__()
        self.layers = nn.ModuleList(qlinear.QLinear(64, n, scheme, device=device) for n in (64, 32, 32))

    def forward(self, x):
        return torch.cat([layer(x) for layer in self.layers], dim=-1)


def traced_calls(module, x):
    """How often each operator is called in the graph that the compiler is given."""
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph.forward

    with torch.no_grad():
        torch.compile(module, backend=aot_autograd(fw_compiler=keep), fullgraph=True)(x)
    (graph,) = graphs
    targets = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    return {name: targets.count(name) for name in targets}


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_the_compiler_sees_the_rounding_and_one_product_a_layer(fmt):
    # On `meta` as on a GPU.
    calls = traced_calls(Siblings(fmt.name, "meta"), torch.randn(5, 64, device="meta", dtype=torch.bfloat16))
    assert calls["qlinear.rounded_linear.default"] == 3
    assert fmt.number == "e4m3" or calls["aten.round.default"] == 3
    assert {name for name in calls if name.startswith("qlinear")} == {"qlinear.rounded_linear.default"}


def converted_siblings():
    torch.manual_seed(0)
    module = Siblings("w8a8", "cpu")
    module.layers = nn.ModuleList(
        qlinear.QLinear.from_float(nn.Linear(64, q.out_features, dtype=torch.bfloat16), "w8a8") for q in module.layers
    )
    return module


@pytest.mark.parametrize("layout", ["cpu", *prepacked.OPERATORS])
def test_on_a_cpu_the_compiler_sees_all_but_a_weight_in_a_library_s_order(layout, monkeypatch):
    if layout != "cpu" and not prepacked.supports(layout, FORMATS[0], 64):
        pytest.skip("a CPU without VNNI")
    monkeypatch.setattr(cpu, "_SATURATES", False)
    module = qlinear.prepare(converted_siblings(), layout)
    calls = traced_calls(module, torch.randn(5, 64, dtype=torch.bfloat16))
    assert calls["aten._int_mm.default" if layout == "cpu" else "qlinear.prepacked_product.default"] == 3
    assert calls["aten.round.default"] == 3
    assert layout != "cpu" or not any(name.startswith("qlinear") for name in calls)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inductor's own
def test_inductor_rounds_the_tokens_of_siblings_in_one_kernel():
    from torch._inductor.utils import run_and_get_code

    needs_cpp_compiler()
    module, x = converted_siblings(), torch.randn(5, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        y, (code,) = run_and_get_code(torch.compile(module, fullgraph=True), x)
        assert relative_error(y, module(x).double()) < 1e-2
    kernels = code.split("async_compile.cpp_pybinding")[1:]
    assert sum("nearbyint" in kernel or ".round()" in kernel for kernel in kernels) == 1


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_parts_are_the_same_bits_as_the_whole_on_a_cpu(fmt, tokens):
    packed = random_packed(fmt, N, K, dtype=torch.bfloat16).to_layout("cpu")
    x, b = torch.randn(2, tokens, K).bfloat16(), torch.randn(N).bfloat16()
    whole = torch.ops.qlinear.linear(x, packed.weight, packed.scale, None, b, fmt.name, K, N)
    assert same_bits(linear_in_parts(x, packed, b), whole)


def test_training_and_export_still_see_one_operator():
    layer = qlinear.QLinear.from_float(nn.Linear(64, 32), "w8a8")
    x = torch.randn(3, 64, requires_grad=True)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    (gradient,) = torch.autograd.grad(compiled(x).sum(), x)
    (expected,) = torch.autograd.grad(layer(x).sum(), x)
    assert same_bits(gradient, expected)
    exported = torch.export.export(layer, (x.detach(),))
    assert [str(n.target) for n in exported.graph.nodes if "qlinear" in str(n.target)] == ["qlinear.linear.default"]
