"""A kept 16-bit copy: opt-in, used for many tokens, counted, and never where it does not belong."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from helpers import to_device
from layers import K, N, float_layer, mlp
from models import relative_error, same_bits
from torch import nn
from torch.nn import functional as F

import qlinear
from qlinear import QLinear, cpu, ops, paths, reference
from qlinear.format import FORMATS

ROUNDED = [name for name, fmt in FORMATS.items() if fmt.quantized_activations]
BLOCKS = [name for name, fmt in FORMATS.items() if fmt.block]
KEPT = [name for name in FORMATS if name not in ROUNDED + BLOCKS]
MANY = 40


def kept_layer(scheme: str = "w4a16", dtype: torch.dtype = torch.bfloat16, **options: object) -> QLinear:
    return QLinear.from_float(float_layer(dtype=dtype), scheme, prune="magnitude", **options).keep_dense()


def tokens(m: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(m, K, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scheme", KEPT)
def test_many_tokens_are_multiplied_by_the_copy(scheme: str, dtype: torch.dtype) -> None:
    q = kept_layer(scheme, dtype)
    x = tokens(MANY, dtype)
    assert torch.equal(q.weight_dense, q.dequantize(dtype))
    assert same_bits(q(x), F.linear(x, q.weight_dense, q.bias))
    assert relative_error(q(x), reference.matmul(x, q.packed, q.bias)) <= FORMATS[scheme].max_error(dtype)


def test_few_tokens_are_multiplied_by_the_packed_weight() -> None:
    q, plain = kept_layer("w4a16"), QLinear.from_float(float_layer(), "w4a16")
    for m in (1, cpu.KEPT_TOKENS):
        assert same_bits(q(tokens(m)), plain(tokens(m)))
    q.weight_dense.zero_()
    assert q(tokens(cpu.KEPT_TOKENS)).abs().max() > 0.5
    assert same_bits(q(tokens(cpu.KEPT_TOKENS + 1)), q.bias.expand(cpu.KEPT_TOKENS + 1, N))


def test_another_dtype_does_not_use_it() -> None:
    q = kept_layer("w4a16")
    q.weight_dense.fill_(torch.nan)
    assert q(tokens(MANY, torch.float32)).isfinite().all()


@pytest.mark.parametrize("scheme", ROUNDED)
def test_a_scheme_that_quantizes_activations_refuses(scheme: str) -> None:
    q = QLinear.from_float(float_layer(), scheme, prune="magnitude")
    with pytest.raises(ValueError, match="quantizes activations"):
        q.keep_dense()
    assert q.weight_dense is None and q.dense_dtype is None


@pytest.mark.parametrize("scheme", BLOCKS)
def test_blocks_refuse_because_many_tokens_skip_them_too(scheme: str) -> None:
    q = QLinear.from_float(float_layer(), scheme, prune="magnitude")
    dense = f", or take {FORMATS[scheme].dense}" if FORMATS[scheme].dense else ""
    with pytest.raises(ValueError, match=rf"^{scheme} skips blocks .*; leave keep_dense out{dense}$"):
        q.keep_dense()
    assert q.weight_dense is None and q.dense_dtype is None
    model = nn.Sequential(float_layer(n=K), float_layer())
    with pytest.raises(ValueError, match=rf"layer '1' \({scheme}\): {scheme} skips blocks"):
        qlinear.convert(model, {"0": "w4a16", "1": scheme}, keep_dense=True, prune="magnitude")
    assert all(type(layer) is nn.Linear for layer in model)


@pytest.mark.parametrize("scheme", BLOCKS)
def test_the_operator_multiplies_by_no_copy_of_blocks(scheme: str) -> None:
    q, x = QLinear.from_float(float_layer(), scheme, prune="magnitude"), tokens(MANY)
    assert same_bits(ops.linear(x, q.packed, q.bias, torch.full((N, K), torch.nan).bfloat16()), q(x))


def test_float32_refuses_but_for_a_compute_dtype() -> None:
    with pytest.raises(ValueError, match=r"float16 or bfloat16, got torch.float32"):
        kept_layer(dtype=torch.float32)
    q = QLinear.from_float(float_layer(dtype=torch.float32), "w4a16", torch.bfloat16).keep_dense()
    x = tokens(MANY, torch.float32)
    assert q.weight_dense.dtype == torch.bfloat16
    assert torch.equal(q(x), F.linear(x.bfloat16(), q.weight_dense, q.bias.bfloat16()).float())


def test_it_is_never_saved() -> None:
    q = kept_layer("w4a16")
    plain = QLinear.from_float(float_layer(), "w4a16")
    assert q.state_dict().keys() == plain.state_dict().keys()
    buffer = io.BytesIO()
    torch.save(q, buffer)
    # The copy alone takes 2 bytes a weight.
    assert buffer.tell() < N * K * 2
    assert q.__getstate__()["weight_dense"] is None and q.weight_dense is not None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("how", [copy.deepcopy, lambda q: pickle.loads(pickle.dumps(q))], ids=["deepcopy", "pickle"])
def test_a_copied_layer_has_its_own(how, dtype: torch.dtype) -> None:
    q = kept_layer("w4a16", dtype)
    twin = how(q)
    assert torch.equal(twin.weight_dense, q.weight_dense)
    assert twin.weight_dense.data_ptr() != q.weight_dense.data_ptr()
    assert how(q.unprepare()).weight_dense is None


def test_it_goes_and_comes_with_the_layout() -> None:
    q = kept_layer("w4a16")
    before = q.weight_dense.clone()
    assert q.unprepare().weight_dense is None
    assert torch.equal(q.prepare().weight_dense, before)
    again = q.weight_dense
    assert q.prepare().keep_dense().weight_dense is again
    assert q.drop_dense().weight_dense is None and q.prepare().weight_dense is None


def test_asked_for_while_plain_it_prepares() -> None:
    q = QLinear.from_float(float_layer(), "w4a16").unprepare().keep_dense()
    assert q.layout == "cpu" and q.weight_dense is not None


def test_loading_other_weights_makes_another() -> None:
    q, other = kept_layer("w4a16"), QLinear.from_float(nn.Linear(K, N).bfloat16(), "w4a16")
    q.load_state_dict(other.state_dict())
    assert torch.equal(q.weight_dense, other.dequantize())


def test_other_dtypes_of_the_layer() -> None:
    q = kept_layer("w4a16").half()
    # From the codes, not from bfloat16.
    assert torch.equal(q.weight_dense, q.dequantize(torch.float16))
    assert q.float().weight_dense is None
    assert q.keep_dense(torch.bfloat16).weight_dense.dtype == torch.bfloat16
    computes = QLinear.from_float(float_layer(dtype=torch.float32), "w4a16", torch.bfloat16).keep_dense().double()
    assert computes.weight_dense.dtype == torch.bfloat16
    assert kept_layer("w4a16").to("meta").weight_dense is None


def test_convert_keeps_copies_and_inspect_counts_them() -> None:
    model = qlinear.convert(mlp().bfloat16(), {"head": None, "*": "w4a16-g32"}, keep_dense=True)
    report = qlinear.inspect(model)
    for row, layer in zip([r for r in report.rows if r.scheme], (model.up, model.down), strict=True):
        assert row.kept_copy == "bfloat16" and row.bytes_after == layer.nbytes
        assert row.bytes_after == layer.packed.nbytes + 2 * layer.in_features * layer.out_features
        names = {1: "aten::_weight_int4pack_mm_for_cpu", cpu.KEPT_TOKENS + 1: "F.linear on the kept copy"}
        assert row.paths == names
    assert "cpu layout, bfloat16 copy" in str(report) and "larger" in str(report)
    assert not list(model.up.named_parameters())[1:] and "weight_dense" not in dict(model.state_dict())


def test_a_failed_conversion_leaves_no_copies() -> None:
    model = mlp().bfloat16()
    with pytest.raises(ValueError, match=r"layer 'down' \(w8a8\): .*quantizes activations"):
        qlinear.convert(model, {"down": "w8a8", "*": "w4a16"}, keep_dense=True)
    assert all(type(m) is nn.Linear for m in (model.up, model.down, model.head))


def test_gradients_and_compile_go_through_it() -> None:
    q = kept_layer("w4a16")
    x = tokens(MANY).requires_grad_()
    q(x).sum().backward()
    assert relative_error(x.grad, q.dequantize().double().sum(0).expand(MANY, K)) <= 1e-2
    compiled = torch.compile(q, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), q(x)) and torch.equal(compiled(x[:1]), q(x[:1]))


@pytest.mark.parametrize("scheme", ["w4a16-g32-asym", "w8a16", "w8a16-2:4"])
def test_on_a_gpu_it_is_used_beyond_the_crossover(scheme: str, device: torch.device) -> None:
    """Through the interpreter where there is no GPU."""
    from qlinear.kernels.tuned import fused_tokens_on

    fmt = FORMATS[scheme]
    most = fused_tokens_on(device, N, K, fmt, torch.float16, kept=True)
    packed = QLinear.from_float(float_layer(dtype=torch.float16), scheme, prune="magnitude").packed.to_layout("triton")
    packed = to_device(packed, device)
    dense = torch.zeros(N, K, dtype=torch.float16, device=device)

    def product(m: int) -> torch.Tensor:
        return ops._linear_cuda(tokens(m, torch.float16).to(device), packed, None, dense)

    assert product(most + 1).abs().max() == 0 and product(3).abs().max() > 0.5
    assert paths.path(fmt, torch.float16, most + 1, torch.device("cuda"), "plain", K, N, True)[0].endswith("kept copy")


def test_fragments_are_multiplied_as_they_are_up_to_their_own_number_of_tokens() -> None:
    """As ``ops`` does it: the copy is beside a layout that nobody gets unasked."""
    fmt, cuda, few = FORMATS["w4a16-2:4"], torch.device("cuda"), paths.FRAGMENT_TOKENS
    ways = paths.paths(fmt, torch.float16, cuda, "mma.sp", K, N, kept=True)
    assert ways == {1: "Triton mma.sp (unverified)", few + 1: "F.linear on the kept copy"}
