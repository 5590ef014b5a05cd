"""torch.ops.qlinear.*: opcheck, compile, export, gradients, errors."""

from dataclasses import replace

import pytest
import torch
from models import needs_cpp_compiler, random_packed, relative_error, same_bits
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import qlinear
from qlinear import ops, reference

FORMATS = qlinear.FORMATS.values()
N, K = 20, 72
#: One scheme of each kind, where a test is slow and knows nothing of formats (opcheck_linear walks them all).
FEW = ["w8a16", "w4a16", "w4a16-g32-asym", "w8a8", "fp8"]


def arguments(fmt, m=3, layout="cpu", dtype=torch.bfloat16, bias=True, grad=False):
    packed = random_packed(fmt, N, K).to_layout(layout)
    x = torch.randn(m, K).to(dtype).requires_grad_(grad)
    b = torch.randn(N).to(dtype).requires_grad_(grad) if bias else None
    return (x, packed.weight, packed.scale, packed.zero_point, b, fmt.name, K, N, None, packed.index), packed


# Checking the schema, the shapes, autograd's registration and what torch.compile needs; dynamic shapes included.
@pytest.mark.parametrize(
    ("grad", "bias", "layout"),
    [(True, True, "cpu"), (False, False, "plain")],
    ids=["grad-bias-cpu", "plain"],
)
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_opcheck_linear(fmt, grad, bias, layout):
    args, _ = arguments(fmt, layout=layout, bias=bias, grad=grad)
    torch.library.opcheck(torch.ops.qlinear.linear.default, args, rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize(("layout", "dtype"), [("cpu", torch.float32), ("plain", torch.bfloat16)], ids=str)
@pytest.mark.parametrize("scheme", FEW)
def test_opcheck_dequantize(scheme, layout, dtype):
    packed = random_packed(qlinear.FORMATS[scheme], N, K).to_layout(layout)
    args = (packed.weight, packed.scale, packed.zero_point, scheme, K, N, dtype, packed.index)
    torch.library.opcheck(torch.ops.qlinear.dequantize.default, args)


@pytest.mark.parametrize("number", ["int", "e4m3"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_opcheck_quantize_activations(dtype, number):
    for x in (torch.randn(5, K), torch.randn(K, 5).t(), torch.randn(0, K)):
        torch.library.opcheck(torch.ops.qlinear.quantize_activations.default, (x.to(dtype), number))
        gain = torch.rand(x.shape[1]).to(dtype)
        torch.library.opcheck(torch.ops.qlinear.rms_norm_quantize.default, (x.to(dtype), gain, 1e-5, number))
        with pytest.raises(ValueError, match=r"'int' \(int8\) or 'e4m3' \(float8_e4m3fn\), got 'e5m2'"):
            torch.ops.qlinear.quantize_activations(x.to(dtype), "e5m2")
        with pytest.raises(ValueError, match=r"its gain \[K\] on one device, got"):
            torch.ops.qlinear.rms_norm_quantize(x.to(dtype), gain[:-1], 1e-5)


@pytest.mark.parametrize("shape", [(K,), (1, K), (2, 3, K), (0, K), (2, 0, K), (1, 1, 1, K)], ids=str)
def test_fake_shapes_are_the_real_ones(shape):
    for fmt in FORMATS:
        packed = random_packed(fmt, N, K)
        for dtype in (torch.bfloat16, torch.float32):
            x = torch.randn(shape).to(dtype)
            args = (packed.weight, packed.scale, packed.zero_point, None, fmt.name, K, N, None, packed.index)
            real = torch.ops.qlinear.linear(x, *args)
            fake = torch.ops.qlinear.linear(x.to("meta"), *(a.to("meta") if torch.is_tensor(a) else a for a in args))
            assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


def small_model(scheme):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(K, N), nn.GELU(), nn.Linear(N, 9, bias=False)).bfloat16()
    return qlinear.convert(model, scheme)


@pytest.mark.parametrize("scheme", FEW)
def test_compile_without_a_graph_break(scheme):
    model = small_model(scheme)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, K, dtype=torch.bfloat16)
    with torch.no_grad():
        assert same_bits(compiled(x), model(x))


def test_compile_with_changing_shapes_compiles_once():
    from torch._dynamo.testing import CompileCounterWithBackend

    model, counter = small_model("w8a8"), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=True)
    with torch.no_grad():
        for m in (3, 5, 17):
            x = torch.randn(m, K, dtype=torch.bfloat16)
            assert same_bits(compiled(x), model(x))
    assert counter.frame_count == 1


def test_compile_trains_what_is_around_it():
    model = small_model("w4a16-g32")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    gradients = []
    for f in (model, compiled):
        x = torch.linspace(-1, 1, 2 * K).view(2, K).bfloat16().requires_grad_()
        f(x).square().sum().backward()
        gradients.append(x.grad)
    assert relative_error(gradients[1], gradients[0].double()) < 2e-2


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inductor's own
def test_compile_with_inductor():
    needs_cpp_compiler()
    model = small_model("w4a16-g32-asym")
    x = torch.randn(4, K, dtype=torch.bfloat16)
    with torch.no_grad():
        # Fused in float32, GELU differs from eager's by a rounding.
        assert relative_error(torch.compile(model, fullgraph=True)(x), model(x).double()) < 1e-2


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
@pytest.mark.parametrize("scheme", ["w4a16-asym", "w8a8"])
def test_export_holds_one_call_a_layer(scheme, strict):
    model = small_model(scheme)
    x = torch.randn(4, K, dtype=torch.bfloat16)
    with torch.no_grad():
        program = torch.export.export(model, (x,), strict=strict, dynamic_shapes=({0: torch.export.Dim("m", min=2)},))
        calls = [n for n in program.graph.nodes if n.target is torch.ops.qlinear.linear.default]
        assert len(calls) == 2
        for m in (4, 7):
            x = torch.randn(m, K, dtype=torch.bfloat16)
            assert same_bits(program.module()(x), model(x))


@pytest.mark.parametrize("layout", ["cpu", "plain"])
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_gradients_are_those_of_the_dequantized_weight(fmt, layout):
    """W8A8 rounds its activations; their gradient passes straight through."""
    for dtype in (torch.float32, torch.bfloat16):
        args, packed = arguments(fmt, layout=layout, dtype=dtype, grad=True)
        x, bias = args[0], args[4]
        seed = torch.randn(3, N).to(dtype)
        ops.linear(x, packed, bias).backward(seed)
        wide = x.detach().double().requires_grad_()
        (wide @ packed.dequantize(torch.float64).t()).backward(seed.double())
        assert relative_error(x.grad, wide.grad) <= (1e-5 if dtype == torch.float32 else 6e-3)
        assert relative_error(bias.grad, seed.double().sum(0)) <= (1e-5 if dtype == torch.float32 else 1e-2)
        assert (x.grad.dtype, bias.grad.dtype) == (dtype, dtype)


def test_gradients_with_leading_dimensions_and_a_bias_of_another_dtype():
    _, packed = arguments(qlinear.FORMATS["w8a16"], grad=True)
    x = torch.randn(2, 3, K, dtype=torch.bfloat16, requires_grad=True)
    bias = torch.randn(N, requires_grad=True)
    y = ops.linear(x, packed, bias)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert torch.equal(bias.grad, torch.full((N,), 6.0))


def test_no_gradient_is_recorded_where_none_is_asked_for():
    args, packed = arguments(qlinear.FORMATS["w8a16"], grad=True)
    x, bias = args[0], args[4]
    assert ops.linear(x, packed, bias).requires_grad
    with torch.no_grad():
        assert not ops.linear(x, packed, bias).requires_grad
    with torch.inference_mode():
        assert ops.linear(x, packed, bias).is_inference()
    assert not ops.linear(x.detach(), packed, bias.detach()).requires_grad
    assert ops.linear(x.detach(), packed, bias).requires_grad  # the bias alone


class Adapted(nn.Module):
    """A LoRA adapter beside a quantized layer."""

    def __init__(self, base):
        super().__init__()
        self.base, self.down, self.up = base, nn.Linear(K, 4, bias=False), nn.Linear(4, N, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


@pytest.mark.parametrize("scheme", sorted(qlinear.FORMATS))
def test_an_adapter_trains_on_top_and_only_it_changes(scheme):
    torch.manual_seed(0)
    first, second = (
        Adapted(qlinear.QLinear.from_float(nn.Linear(k, n), scheme, prune="magnitude")) for k, n in ((K, N), (K, N))
    )
    lift = nn.Linear(N, K)
    model = nn.Sequential(first, lift, second)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("down" in name or "up" in name)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    x, target = torch.randn(16, K), torch.randn(16, N)
    losses = []
    for _ in range(8):
        loss = (model(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    for name, tensor in model.state_dict().items():
        assert same_bits(tensor, before[name]) == (not ("down" in name or "up" in name)), name


@pytest.mark.parametrize("call", ["op", "function"])
def test_errors_name_what_was_got_and_wanted(call):
    args, packed = arguments(qlinear.FORMATS["w8a16"])
    x = args[0]

    def linear(x, packed=packed):
        if call == "function":
            return ops.linear(x, packed)
        return torch.ops.qlinear.linear(x, packed.weight, packed.scale, None, None, packed.format.name, K, N)

    with pytest.raises(ValueError, match=r"last dimension of the input is 71, the layer's in_features is 72"):
        linear(x[:, :71])
    with pytest.raises(ValueError, match=r"the input is torch.int64; .*float16, bfloat16 or float32"):
        linear(x.long())
    with pytest.raises(ValueError, match=r"the input is torch.float64"):
        linear(x.double())
    with pytest.raises(ValueError, match=r"the input is on meta, the weight on cpu"):
        linear(x.to("meta"))
    with pytest.raises(ValueError, match=r"the input is on cpu, the weight on meta"):
        linear(x, replace(packed, weight=packed.weight.to("meta"), scale=packed.scale.to("meta")))


def test_a_wrong_shape_is_found_while_compiling():
    model = torch.compile(small_model("w8a16"), fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="the layer's in_features is 72"):
        model(torch.randn(3, K + 1, dtype=torch.bfloat16))


@pytest.mark.parametrize("layout", ["cpu", "plain", "triton"])
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_dequantize_op(fmt, layout):
    packed = random_packed(fmt, N, K).to_layout(layout)
    tensors = (packed.weight, packed.scale, packed.zero_point)
    dense = torch.ops.qlinear.dequantize(*tensors, fmt.name, K, N, torch.float32, packed.index)
    assert dense.is_contiguous() and torch.equal(dense, packed.dequantize(torch.float32))


def test_a_device_without_kernels_of_its_own_still_computes():
    """What MPS or XPU runs: the whole weight is dequantized, by PyTorch alone."""
    for fmt in FORMATS:
        args, packed = arguments(fmt, layout="plain", dtype=torch.float32)
        y = ops._linear_any(args[0], packed, args[4], None)
        assert relative_error(y, reference.matmul(args[0], packed, args[4])) <= fmt.max_error(torch.float32)


class Recorded(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls.append(function)
        return function(*args, **(kwargs or {}))


@pytest.mark.filterwarnings("ignore:.torch.jit.trace:DeprecationWarning")
def test_whoever_watches_sees_one_operator():
    """Eager calls go past the dispatcher; a dispatch mode and a trace get ``qlinear::linear``, same bits."""
    layer = small_model("w8a8")[0]
    x = torch.randn(1, K, dtype=torch.bfloat16)
    with torch.no_grad():
        expected = layer(x)
        with Recorded() as recorded:
            watched = layer(x)
        traced = torch.jit.trace(layer, x, check_trace=False)
    assert recorded.calls == [torch.ops.qlinear.linear.default]
    assert "qlinear::linear" in str(traced.inlined_graph)
    assert torch.equal(watched, expected) and torch.equal(traced(x), expected)
