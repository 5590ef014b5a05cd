"""A kept copy of a 2:4 weight in PyTorch's semi-structured form: when it is taken, and that a layer bears it.

Without a GPU cuSPARSELt is played by two functions that hold a weight in as many bytes as it does.
"""

from __future__ import annotations

import copy
import io
import pickle
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from helpers import random_tokens, to_device
from layers import float_layer
from models import relative_error, same_bits
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import qlinear
from qlinear import QLinear, ops, paths, reference, semi_structured
from qlinear.format import FORMATS
from qlinear.kernels import graphs
from qlinear.kernels.tuned import fused_tokens_on
from qlinear.semi_structured import Choice, choose
from qlinear.sparse import prune_weight

FMT = FORMATS["w16a16-2:4"]
#: What cuSPARSELt takes, and a number of tokens that it does not.
N, K, MANY = 64, 192, 43
NAME = "PyTorch's semi-structured matmul on the kept copy"
DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
CPU = torch.device("cpu")


def compressed(dense: Tensor) -> Tensor:
    """The two kept of every four weights, then their places, four bits for each four weights: ``[N, 9/16 K]``."""
    groups = dense.unflatten(1, (-1, 4))
    places = (groups == 0).to(torch.uint8).sort(dim=2, stable=True).indices[..., :2].sort(dim=2).values
    nibbles = (places[..., 0] | places[..., 1] << 2).unflatten(1, (-1, 4))
    words = (nibbles << torch.arange(0, 16, 4)).sum(2).to(torch.int16)
    return torch.cat((groups.gather(2, places).flatten(1), words.view(dense.dtype)), dim=1)


def sparse_mm(packed: Tensor, x: Tensor, bias: Tensor | None = None, transpose_result: bool = False) -> Tensor:
    """``torch._cslt_sparse_mm`` as PyTorch calls it; what it would not take is an error."""
    assert transpose_result and x.t().is_contiguous() and x.shape[1] % 8 == 0 < x.shape[1] and x.data_ptr() % 16 == 0
    assert x.dtype == packed.dtype and (bias is None or bias.dtype == packed.dtype)
    k = x.shape[0]
    values, words = packed[:, : k // 2].unflatten(1, (-1, 2)), packed[:, k // 2 :].contiguous().view(torch.int16)
    nibbles = (words.unsqueeze(2).int() >> torch.arange(0, 16, 4)).flatten(1) & 15
    places = torch.stack((nibbles & 3, nibbles >> 2), dim=2).long()
    dense = values.new_zeros(*values.shape[:2], 4).scatter(2, places, values).flatten(1)
    return F.linear(x.t(), dense, bias)


def pruned(dtype: torch.dtype = torch.float16) -> Tensor:
    return prune_weight(float_layer(n=N, k=K, dtype=dtype).weight.detach(), FMT, "magnitude")


def tokens(m: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return random_tokens(m, K, dtype, CPU)


@pytest.fixture
def faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU that has cuSPARSELt, twice as fast."""
    chosen = partial(choose, make=compressed, seconds=lambda *_: (2e-3, 1e-3))
    monkeypatch.setattr(semi_structured, "choose", chosen)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", sparse_mm)


def layer(scheme: str = "w16a16-2:4", dtype: torch.dtype = torch.float16, bias: bool = True) -> QLinear:
    return QLinear.from_float(float_layer(bias, dtype, N, K), scheme, prune="magnitude")


@DTYPES
def test_the_faster_of_the_two_is_kept(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "_cslt_sparse_mm", sparse_mm)
    dense, asked = pruned(dtype), []

    def seconds(times: tuple[float, float], x: Tensor, *copies: Tensor) -> tuple[float, float]:
        asked.append((x.shape, x.dtype, [c.shape for c in copies]))
        return times

    fast = choose(dense, FMT, compressed, partial(seconds, (3e-3, 2e-3)))
    assert torch.equal(fast.copy.view(torch.int16), compressed(dense).view(torch.int16))
    assert fast.reason == "1.50 times as fast as the dense copy with 2048 tokens" and fast.seconds == (3e-3, 2e-3)
    for times in ((2e-3, 3e-3), (2e-3, 2e-3)):
        slow = choose(dense, FMT, compressed, partial(seconds, times))
        assert slow.copy is dense and slow.seconds == times
    assert asked == [((semi_structured.TOKENS, K), dtype, [(N, K), (N, K * 9 // 16)])] * 3


@pytest.mark.parametrize("wrong", ["another weight", "not finite", "overflow"])
def test_wrong_numbers_keep_the_dense_copy(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "_cslt_sparse_mm", sparse_mm)
    dense = pruned() * (1e5 if wrong == "overflow" else 1)
    other = dense.clone()
    if wrong != "overflow":
        # A single weight of them all.
        other.view(-1)[other.view(-1).nonzero()[0]] = torch.nan if wrong == "not finite" else 1.0
    found = choose(dense, FMT, lambda _: compressed(other), lambda *_: (2.0, 1.0))
    assert found.copy is dense and found.reason.startswith("wrong: differs from the dense product by")
    assert found.seconds is None


def test_whatever_is_raised_keeps_the_dense_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = pruned()

    def refuse(*_: Tensor) -> Tensor:
        raise RuntimeError("not here\nfor a long reason")

    assert choose(dense, FMT, refuse) == Choice(dense, "RuntimeError: not here")
    # PyTorch without CUDA, or without cuSPARSELt.
    assert choose(dense, FMT, compressed).reason.startswith(
        "NotImplementedError: Could not run 'aten::_cslt_sparse_mm'"
    )
    monkeypatch.setattr(torch, "_cslt_sparse_mm", sparse_mm)
    assert choose(dense, FMT, compressed, refuse) == Choice(dense, "RuntimeError: not here")
    assert choose(dense, FMT) == Choice(dense, "ValueError: no sparse tensor cores on cpu")


def test_other_schemes_have_no_such_copy() -> None:
    dense = pruned()
    for name in ("w4a16", "w16a16-unstructured"):
        found = choose(dense, FORMATS[name], lambda _: pytest.fail("was made"))
        assert found == Choice(dense, f"{name} is not 2:4")


def test_what_pytorch_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own refusals are errors, and so is what it makes for CUTLASS."""
    monkeypatch.setattr(semi_structured, "_sparse_tensor_cores", lambda _: True)
    with pytest.raises(RuntimeError, match="Only CUDA tensors are currently supported"):
        semi_structured.make(pruned())
    made = SimpleNamespace(packed=compressed(pruned()), meta=None)
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", lambda _: made)
    assert semi_structured.make(pruned()) is made.packed
    for wrong in ({"meta": torch.zeros(1)}, {"packed": None}, {"packed": pruned()}):
        made.__dict__.update({"packed": compressed(pruned()), "meta": None} | wrong)
        with pytest.raises(ValueError, match="another library than cuSPARSELt"):
            semi_structured.make(pruned())


def test_where_sparse_tensor_cores_are(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.version, "hip", None)
    for capability, has in {(7, 5): False, (8, 0): True, (9, 0): True}.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        assert semi_structured._sparse_tensor_cores(cuda) == has and not semi_structured._sparse_tensor_cores(CPU)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert not semi_structured._sparse_tensor_cores(cuda)


def test_layers_that_are_alike_are_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The median of the rounds but for the first, and nothing that cannot be captured."""
    elapsed = iter([90.0, 80.0, 5.0, 1.0, 4.0, 2.0, 6.0, 9.0, 4.0, 2.0, 7.0, 3.0])
    captured: list[int] = []
    monkeypatch.setattr(semi_structured, "_measured", {})
    monkeypatch.setattr(semi_structured, "_elapsed", lambda *_: next(elapsed))
    monkeypatch.setattr(graphs, "capture", lambda calls, _: captured.append(len(calls)))
    dense = pruned()
    for _ in range(2):
        assert semi_structured.measure(tokens(8), dense, compressed(dense)) == (5.0, 2.0)
    assert captured == [1] and next(elapsed, None) is None

    def fails(*_: object) -> None:
        raise RuntimeError("cannot be captured")

    monkeypatch.setattr(graphs, "capture", fails)
    with pytest.raises(RuntimeError, match="cannot be captured"):
        semi_structured.measure(tokens(8), dense[:32], compressed(dense[:32]))


@DTYPES
def test_any_number_of_tokens_in_any_shape(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "_cslt_sparse_mm", sparse_mm)
    dense, bias = pruned(dtype), torch.linspace(-1, 1, N).to(dtype)
    made = compressed(dense)
    assert semi_structured.is_made(made, K) and not semi_structured.is_made(dense, K)
    wide, flat = tokens(48, dtype).view(16, 3 * K), tokens(9, dtype).view(-1)
    inputs = [tokens(m, dtype) for m in (0, 1, 8, 43, 48)] + [tokens(30, dtype).view(2, 3, 5, K), tokens(1, dtype)[0]]
    # Not contiguous, and at an address that cuSPARSELt does not take.
    inputs += [wide[:, K : 2 * K], flat[1 : 8 * K + 1].view(8, K)]
    for x in inputs:
        for b in (None, bias):
            y, wanted = semi_structured.linear(x, made, b), F.linear(x, dense, b)
            assert y.shape == wanted.shape and y.stride() == wanted.stride() and y.dtype == dtype
            assert x.numel() == 0 or relative_error(y, wanted.double()) <= FMT.max_error(dtype)


@DTYPES
@pytest.mark.parametrize("scheme", ["w16a16-2:4", "w4a16-asym-2:4"])
def test_a_layer_multiplies_by_it(scheme: str, dtype: torch.dtype, faster: None) -> None:
    q = layer(scheme, dtype)
    packed = q.nbytes
    q.keep_dense()
    assert q.weight_dense.shape == (N, K * 9 // 16) and q.nbytes == packed + N * K * 2 * 9 // 16
    x = tokens(MANY, dtype).view(1, MANY, K)
    y = q(x)
    assert y.shape == (1, MANY, N) and relative_error(y, reference.matmul(x, q.packed, q.bias)) <= FMT.max_error(dtype)
    assert same_bits(y[0], semi_structured.linear(x[0], q.weight_dense, q.bias))
    (row, _) = qlinear.inspect(q).rows
    assert row.kept_copy == f"{dtype} semi-structured".removeprefix("torch.") and row.bytes_after == q.nbytes
    assert row.paths == {1: NAME} and row.note.startswith(f"plain layout, {row.kept_copy} copy")
    assert QLinear.keep_dense(layer("w8a16", dtype)).weight_dense.shape == (N, K)


def test_on_a_cpu_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", lambda _: pytest.fail("was made"))
    q = layer().keep_dense()
    assert torch.equal(q.weight_dense, q.dequantize(torch.float16))
    assert qlinear.inspect(q).rows[0].kept_copy == "float16"


def test_moves_and_new_weights_make_it_anew(faster: None) -> None:
    q = layer().keep_dense()
    before = q.weight_dense.clone()
    assert q.unprepare().weight_dense is None
    assert same_bits(q.prepare().weight_dense, before)
    q.bfloat16()
    assert q.weight_dense.dtype == torch.bfloat16 and q.weight_dense.shape == before.shape
    assert q.float().weight_dense is None and q.drop_dense().dense_dtype is None
    other = QLinear.from_float(torch.nn.Linear(K, N).half(), "w16a16-2:4", prune="magnitude")
    q = layer().keep_dense()
    q.load_state_dict(other.state_dict())
    assert same_bits(q.weight_dense, compressed(other.dequantize()))
    assert copy.deepcopy(q).to("meta").weight_dense is None


@pytest.mark.parametrize("how", [copy.deepcopy, lambda q: pickle.loads(pickle.dumps(q))], ids=["deepcopy", "pickle"])
def test_it_is_not_saved_and_a_copied_layer_has_its_own(how, faster: None) -> None:
    plain = layer()
    q = layer().keep_dense()
    assert q.state_dict().keys() == plain.state_dict().keys()
    assert all(same_bits(a, b) for a, b in zip(q.state_dict().values(), plain.state_dict().values(), strict=True))
    with_copy, without = io.BytesIO(), io.BytesIO()
    torch.save(q, with_copy)
    torch.save(plain, without)
    assert abs(with_copy.tell() - without.tell()) < 1000 < q.weight_dense.nbytes
    twin = how(q)
    assert same_bits(twin.weight_dense, q.weight_dense) and twin.weight_dense.data_ptr() != q.weight_dense.data_ptr()
    assert same_bits(twin(tokens(MANY)), q(tokens(MANY)))


def test_gradients_compilation_and_dispatch_modes(faster: None) -> None:
    q, x = layer().keep_dense(), tokens(MANY)
    y = q(x)
    learned = x.clone().requires_grad_()
    found = q(learned)
    found.sum().backward()
    assert same_bits(found, y)
    assert relative_error(learned.grad, q.dequantize().double().sum(0).expand(MANY, K)) <= 1e-2
    assert torch.equal(q.bias.grad, torch.full((N,), float(MANY)).half())
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    compiled = torch.compile(q, fullgraph=True, backend="eager")
    with torch.no_grad():
        with Watch():
            assert same_bits(q(x), y)
        assert same_bits(compiled(x), y) and same_bits(compiled(x[:1]), q(x[:1]))
        exported = torch.export.export(torch.nn.Sequential(q), (x,))
        assert same_bits(exported.module()(x), y)
    assert seen[0] == "qlinear.linear.default"


def test_a_bias_in_another_dtype(faster: None) -> None:
    linear = float_layer(True, torch.float32, N, K)
    q, x = QLinear.from_float(linear, "w16a16-2:4", torch.float16, prune="magnitude").keep_dense(), tokens(MANY)
    assert q.bias.dtype == torch.float32 and q.weight_dense.dtype == torch.float16
    assert relative_error(q(x.float()), reference.matmul(x, q.packed, q.bias)) <= FMT.max_error(torch.float16)


def test_few_tokens_are_multiplied_by_the_packed_weight(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, through the interpreter where there is none; the copy is of zeros."""
    monkeypatch.setattr(torch, "_cslt_sparse_mm", lambda _, x, *rest, **__: x.new_zeros(x.shape[1], N))
    most = fused_tokens_on(device, N, K, FMT, torch.float16, kept=True)
    packed = to_device(layer(bias=False).packed.to_layout("triton"), device)
    made = compressed(pruned()).to(device)
    few, many = (ops._linear_cuda(tokens(m).to(device), packed, None, made) for m in (3, most + 1))
    assert few.abs().max() > 0.5 and many.shape == (most + 1, N) and many.abs().max() == 0
    ways = dict(paths._paths(FMT, torch.float16, "cuda", "triton", K, True, most, True))
    assert next(iter(ways)) == 1 and ways.popitem() == (most + 1, NAME) and "Triton matmul" in ways[1]
    cuda = torch.device("cuda")
    assert paths.path(FMT, torch.float16, 1, cuda, "plain", K, N, kept=True, semi_structured=True)[0] == NAME
