"""QLinear: construction and forward."""

import pytest
import torch
from layers import SCHEMES, K, N, float_layer, layer, native
from models import relative_error
from torch import nn
from transformers.pytorch_utils import Conv1D

import qlinear
from qlinear import QLinear, reference


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_from_float(scheme, dtype, bias):
    linear = float_layer(bias, dtype).eval()
    before = linear.weight.detach().clone()
    q = QLinear.from_float(linear, scheme, prune="magnitude")
    assert torch.equal(linear.weight, before)
    assert (q.in_features, q.out_features, q.scheme, q.training) == (K, N, scheme, False)
    assert q.bias is linear.bias
    expected = qlinear.pack(linear.weight, scheme, layout="plain", prune="magnitude")
    assert torch.equal(q.dequantize(), expected.dequantize(dtype)) and q.dequantize().dtype == dtype
    x = torch.randn(4, K).to(dtype)
    y = q(x)
    assert y.dtype == dtype
    bound = qlinear.FORMATS[scheme].max_error(dtype)
    assert relative_error(y, reference.matmul(x, expected, linear.bias)) <= bound


@pytest.mark.parametrize("scheme", SCHEMES)
def test_from_conv1d(scheme):
    torch.manual_seed(0)
    conv = Conv1D(N, K)
    nn.init.normal_(conv.bias)
    q = QLinear.from_float(conv, scheme, prune="magnitude")
    assert (q.in_features, q.out_features) == (K, N) and q.bias is conv.bias
    expected = qlinear.pack(conv.weight.detach().t(), scheme, layout="plain", prune="magnitude")
    assert torch.equal(q.dequantize(), expected.dequantize(torch.float32))
    x = torch.randn(2, 3, K)
    if q.format.sparsity is None:
        assert relative_error(q(x), conv(x).double()) < (0.2 if "w4" in scheme else 0.03)
    else:
        assert relative_error(q(x), reference.matmul(x, expected, conv.bias)) <= q.format.max_error(torch.float32)


@pytest.mark.parametrize("shape", [(K,), (1, K), (2, 3, K), (0, K), (3, 0, K), (2, 1, 2, K)], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_any_leading_dimensions(scheme, shape):
    q = layer(scheme)
    x = torch.randn(shape).bfloat16()
    y = q(x)
    assert y.shape == (*shape[:-1], N)
    if x.numel():
        assert relative_error(y, reference.matmul(x, q.packed, q.bias)) <= 6e-3


def test_more_than_the_last_dimension_may_be_strided():
    q = layer("w8a16")
    x = torch.randn(3, K, 5).bfloat16().transpose(1, 2)
    assert relative_error(q(x), reference.matmul(x, q.packed, q.bias)) <= 6e-3


def test_forward_in_both_layouts_agrees():
    for scheme in SCHEMES:
        q = layer(scheme)
        x = torch.randn(5, K).bfloat16()
        prepared = q(x)
        assert q.layout == native(scheme)
        q.unprepare()
        assert q.layout == "plain" and relative_error(q(x), prepared.double()) < 6e-3


def test_what_cannot_be_made_raises():
    with pytest.raises(TypeError, match=r"made from nn.Linear or transformers' Conv1D, got Embedding"):
        QLinear.from_float(nn.Embedding(3, 4), "w8a16")
    with pytest.raises(ValueError, match="meta"):
        QLinear.from_float(nn.Linear(3, 4, device="meta"), "w8a16")
    with pytest.raises(ValueError, match="does not exist"):
        QLinear.from_float(nn.Linear(3, 4), "w7a16")
    with pytest.raises(ValueError, match="does not exist"):
        QLinear(3, 4, "w7a16")
    broken = nn.Linear(3, 4)
    broken.weight.data[1, 2] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        QLinear.from_float(broken, "w8a16")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_extra_repr_tells_the_truth(scheme):
    q = layer(scheme, bias=False)
    for _ in range(2):
        buffers = sum(b.nbytes for b in q.buffers())
        expected = f"in_features=200, out_features=70, bias=False, scheme={scheme}, layout={q.layout}, bytes={buffers}"
        assert repr(q) == f"QLinear({expected})"
        q.unprepare()
    assert buffers == q.format.weight_bytes(N, K, density=q.packed.density)


def test_it_says_what_nn_linear_says():
    q = QLinear(3, 4, "w8a16", bias=True, device="meta", dtype=torch.float16)
    assert (q.in_features, q.out_features, q.bias.shape, q.bias.dtype) == (3, 4, (4,), torch.float16)
    assert QLinear(3, 4, "w8a16", bias=False, device="meta").bias is None
    assert [name for name, _ in q.named_parameters()] == ["bias"]
    assert isinstance(q, nn.Module) and not isinstance(q, nn.Linear)
