"""The semi-structured copy of a 2:4 weight on a GPU; without one see ``test_semi_structured.py``."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from helpers import random_tokens
from layers import float_layer
from models import relative_error
from torch import Tensor

import qlinear
from qlinear import QLinear, semi_structured
from qlinear.format import FORMATS
from qlinear.kernels.graphs import capture
from qlinear.kernels.tuned import fused_tokens_on
from qlinear.semi_structured import choose
from qlinear.sparse import prune_weight

pytestmark = pytest.mark.gpu

FMT = FORMATS["w16a16-2:4"]
N, K = 512, 1024
NAME = "PyTorch's semi-structured matmul on the kept copy"
DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


def kept_layer(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, **options: bool) -> QLinear:
    """A layer with the semi-structured copy, whether it is faster or not."""
    monkeypatch.setattr(semi_structured, "choose", partial(choose, seconds=lambda *_: (2.0, 1.0)))
    linear = float_layer(dtype=dtype, n=N, k=K, **options).cuda()
    q = QLinear.from_float(linear, "w16a16-2:4", prune="magnitude").keep_dense()
    if not semi_structured.is_made(q.weight_dense, K):
        reason = semi_structured.choose(q.weight_dense, FMT).reason
        assert not reason.startswith("wrong"), reason
        pytest.skip(reason)
    return q


@DTYPES
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_many_tokens_on_a_gpu(dtype: torch.dtype, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    q = kept_layer(dtype, monkeypatch, bias=bias)
    assert q.weight_dense.nbytes < 0.6 * 2 * N * K
    most = fused_tokens_on(q.weight_packed.device, N, K, FMT, dtype, kept=True)
    weight, added = q.dequantize(torch.float64), q.bias.double() if bias else 0.0
    for m in (most + 1, most + 8, 5000):
        x = random_tokens(m, K, dtype, torch.device("cuda"))
        for shaped in (x, x.view(1, m, K), x.repeat(1, 2)[:, K:]):
            y = q(shaped)
            assert y.shape == (*shaped.shape[:-1], N)
            assert relative_error(y.view(m, N), x.double() @ weight.t() + added) <= FMT.max_error(dtype)
    x = random_tokens(3, K, dtype, torch.device("cuda"))
    assert torch.equal(q(x), copy.deepcopy(q).drop_dense()(x))
    assert qlinear.inspect(q).rows[0].paths.popitem() == (most + 1, NAME)


def test_compile_graphs_and_moves_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    q = kept_layer(torch.float16, monkeypatch)
    x = random_tokens(5003, K, torch.float16, torch.device("cuda"))
    with torch.no_grad():
        wanted = q(x)
        bound = FMT.max_error(torch.float16)
        assert relative_error(torch.compile(q, fullgraph=True)(x), wanted.double()) <= bound
        held: list[Tensor] = []
        graph = capture([lambda: held.append(q(x))], x.device)
        held[-1].zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert relative_error(held[-1], wanted.double()) <= bound
        assert relative_error(q.cpu().cuda()(x), wanted.double()) <= bound
    learned = x.clone().requires_grad_()
    q(learned).sum().backward()
    assert relative_error(learned.grad, q.dequantize().double().sum(0).expand_as(x)) <= 1e-2


def test_the_faster_is_kept_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    kept_layer(torch.float16, monkeypatch)
    dense = prune_weight(torch.randn(2048, 2048).half(), FMT, "magnitude").cuda()
    found = choose(dense, FMT)
    assert found.seconds is not None, found.reason
    first, second = found.seconds
    assert first > 0 and second > 0 and semi_structured.is_made(found.copy, 2048) == (second < first)
    assert choose(dense, FMT).seconds == found.seconds
