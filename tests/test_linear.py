"""QLinear: construction, forward, state dicts, copies, conversions of dtype and device."""

import copy
import io
import pickle

import pytest
import torch
from models import CPU_LEVELS, bits, relative_error, run_python, same_bits
from torch import nn
from transformers.pytorch_utils import Conv1D

import qlinear
from qlinear import QLinear, reference

SCHEMES = sorted(qlinear.FORMATS)
N, K = 70, 200


def float_layer(bias=True, dtype=torch.bfloat16, n=N, k=K):
    torch.manual_seed(0)
    return nn.Linear(k, n, bias=bias).to(dtype)


def layer(scheme="w4a16", **kwargs):
    return QLinear.from_float(float_layer(**kwargs), scheme, prune="magnitude")


def native(scheme):
    """What the CPU computes with: sparse weights are plain there."""
    return "cpu" if qlinear.FORMATS[scheme].sparsity is None else "plain"


def plain_bits(q):
    """The weight's plain tensors as bytes."""
    plain = q.packed.to_layout("plain")
    return [bits(t) for t in plain.tensors if t is not None]


def assert_same_weight(a, b):
    assert all(torch.equal(x, y) for x, y in zip(plain_bits(a), plain_bits(b), strict=True))


# --- construction and forward


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
    assert relative_error(q(x), reference.matmul(x, expected, conv.bias)) <= q.format.max_error(torch.float32)
    if q.format.sparsity is None:
        assert relative_error(q(x), conv(x).double()) < (0.2 if "w4" in scheme else 0.03)


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


# --- state dicts


@pytest.mark.parametrize("scheme", SCHEMES)
def test_state_dict_is_plain_whatever_the_layout(scheme):
    q = layer(scheme)
    prepared = q.state_dict()
    names = ["bias", "weight_packed", "weight_scale"] + ["weight_zero_point"] * ("asym" in scheme)
    names += ["weight_index"] * (q.format.sparsity is not None)
    assert sorted(prepared) == sorted(names)
    assert prepared["weight_packed"].dtype == torch.int32
    q.unprepare()
    plain = q.state_dict()
    assert all(same_bits(prepared[name], plain[name]) for name in names)
    q.prepare()
    q.prepare()
    assert all(same_bits(t, plain[name]) for name, t in q.state_dict().items())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_strict_load_into_a_module_built_on_meta(scheme):
    q = layer(scheme)
    fresh = QLinear(K, N, scheme, device="meta", dtype=torch.bfloat16)
    # How many blocks or weights are stored is up to the weight.
    fixed = q.format.sparsity in (None, "2:4")
    for name, tensor in q.state_dict().items() if fixed else ():
        assert (fresh.state_dict()[name].shape, fresh.state_dict()[name].dtype) == (tensor.shape, tensor.dtype)
    fresh.load_state_dict(q.state_dict(), strict=True, assign=True)
    assert fresh.layout == "plain"
    fresh.prepare()
    assert_same_weight(q, fresh)
    x = torch.randn(4, K).bfloat16()
    assert same_bits(fresh(x), q(x))


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_load_into_a_prepared_module(scheme, assign):
    q, other = layer(scheme), QLinear.from_float(nn.Linear(K, N).bfloat16(), scheme, prune="magnitude")
    state = q.state_dict()
    other.load_state_dict(state, assign=assign)
    assert other.layout == q.layout
    assert_same_weight(q, other)
    x = torch.randn(4, K).bfloat16()
    assert same_bits(other(x), q(x))
    assert all(same_bits(t, state[name]) for name, t in q.state_dict().items())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_scales_of_another_dtype_are_loaded_as_they_are(scheme):
    """A checkpoint of a float16 model loaded into a module that was built for bfloat16: no scale is rounded."""
    q = layer(scheme, dtype=torch.float16)
    for fresh in (QLinear(K, N, scheme, dtype=torch.bfloat16), layer(scheme, dtype=torch.bfloat16)):
        fresh.load_state_dict(q.state_dict())
        assert_same_weight(q, fresh)


@pytest.mark.parametrize("prepared", [True, False], ids=["prepared", "plain"])
def test_a_state_dict_that_does_not_fit_raises_and_changes_nothing(prepared):
    q = layer("w4a16-g32-asym")
    if not prepared:
        q.unprepare()
    before = {name: t.clone() for name, t in q.state_dict().items()}

    def unchanged():
        return q.layout == ("cpu" if prepared else "plain") and all(
            same_bits(t, before[name]) for name, t in q.state_dict().items()
        )

    for scheme, n, k in (("w4a16-g32-asym", N, K + 32), ("w4a16-g64-asym", N, K), ("w8a16", N, K)):
        wrong = QLinear.from_float(nn.Linear(k, n), scheme, prune="magnitude").state_dict()
        wrong.pop("bias")
        with pytest.raises(RuntimeError, match=r"size mismatch|Missing|Unexpected"):
            q.load_state_dict({**wrong, "bias": before["bias"]})
        # A tensor of the right shape may have been loaded before the error, as in nn.Linear; scales keep their dtype.
        assert q.weight_scale.dtype == torch.bfloat16
    q.load_state_dict(before)
    with pytest.raises(RuntimeError, match=r"Missing key.*weight_zero_point"):
        q.load_state_dict({name: t for name, t in before.items() if name != "weight_zero_point"})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*weight_g_idx"):
        q.load_state_dict({**before, "weight_g_idx": torch.zeros(3)})
    assert unchanged()


def test_inside_a_model_names_have_their_prefix():
    model = nn.ModuleDict({"a": layer("w4a16-asym"), "b": layer("w8a8", bias=False)})
    names = {"a.bias", "a.weight_packed", "a.weight_scale", "a.weight_zero_point", "b.weight_packed", "b.weight_scale"}
    assert set(model.state_dict()) == names
    other = nn.ModuleDict({"a": layer("w4a16-asym"), "b": layer("w8a8", bias=False)})
    other["a"].weight_packed.zero_()
    other.load_state_dict(model.state_dict())
    assert_same_weight(model["a"], other["a"])


# --- copies


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda q: pickle.loads(pickle.dumps(q)),
    "torch.save": lambda q: _saved(q),
    "deepcopy of unprepared": lambda q: copy.deepcopy(q.unprepare()),
}


def _saved(q):
    buffer = io.BytesIO()
    torch.save(q, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_copies_are_equal_and_independent(scheme, how):
    q = layer(scheme)
    x = torch.randn(4, K).bfloat16()
    twin = COPIES[how](q)
    assert twin.layout == q.layout and repr(twin) == repr(q)
    assert_same_weight(q, twin)
    y = q(x)
    assert same_bits(twin(x), y)
    twin.weight_packed.zero_()
    twin.weight_scale.zero_()
    twin.bias.data.zero_()
    assert same_bits(q(x), y)


def test_a_copy_of_a_model_shares_what_the_model_shares():
    q = layer("w4a16")
    twin = copy.deepcopy(nn.ModuleList([q, q]))
    assert twin[0] is twin[1] and twin[0] is not q


def test_a_prepared_pickle_holds_the_plain_layout():
    q = layer("w4a16")
    state = q.__getstate__()
    assert state["_buffers"]["weight_packed"].dtype == torch.int32
    assert q.layout == "cpu" and list(q._buffers) == [
        "weight_packed",
        "weight_scale",
        "weight_zero_point",
        "weight_index",
    ]


@pytest.mark.parametrize("level", CPU_LEVELS)
def test_a_file_is_read_the_same_by_another_cpu(level, tmp_path):
    """int4 packed here, for this instruction set, and loaded by a process that runs another."""
    saved = {}
    for scheme in SCHEMES:
        q = layer(scheme)
        torch.save(q, tmp_path / f"{scheme}.pt")
        torch.save(q.state_dict(), tmp_path / f"{scheme}.state.pt")
        saved[scheme] = q.dequantize()
    torch.save(saved, tmp_path / "expected.pt")
    code = """
    import sys, pathlib, torch, qlinear
    folder = pathlib.Path(sys.argv[1])
    for scheme, expected in torch.load(folder / "expected.pt").items():
        whole = torch.load(folder / f"{scheme}.pt", weights_only=False)
        parts = qlinear.QLinear(200, 70, scheme, device="meta", dtype=torch.bfloat16)
        parts.load_state_dict(torch.load(folder / f"{scheme}.state.pt"), assign=True)
        parts.prepare()
        for q in (whole, parts):
            assert q.layout == ("plain" if q.format.sparsity else "cpu"), scheme
            assert torch.equal(q.dequantize(), expected), scheme
            x = torch.randn(4, 200, dtype=torch.bfloat16)
            y = qlinear.reference.matmul(x, q.packed, q.bias)
            assert (q(x).double() - y).norm() / y.norm() <= 6e-3, scheme
    print(torch.backends.cpu.get_cpu_capability())
    """
    code = code.replace("import sys,", "import qlinear.reference, sys,")
    shown = run_python(code, str(tmp_path), ATEN_CPU_CAPABILITY=level, OMP_NUM_THREADS="1")
    assert shown.strip().lower() == level


# --- dtype and device

CASTS = {
    "half": lambda m: m.half(),
    "float": lambda m: m.float(),
    "to(cpu, float32)": lambda m: m.to("cpu", torch.float32),
    "to(tensor)": lambda m: m.to(torch.zeros(1, dtype=torch.float16)),
    "half and back": lambda m: m.half().bfloat16(),
}


@pytest.mark.parametrize("prepared", [True, False], ids=["prepared", "plain"])
@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_to_dtype_never_changes_codes_or_scales(scheme, cast, prepared):
    for dtype in (torch.bfloat16, torch.float32):
        q = layer(scheme, dtype=dtype)
        if not prepared:
            q.unprepare()
        before, layout, buffers = plain_bits(q), q.layout, [(b.dtype, bits(b)) for b in q.buffers()]
        model = CASTS[cast](nn.Sequential(q))
        assert model[0] is q and q.layout == layout
        assert all(torch.equal(a, b) for a, b in zip(plain_bits(q), before, strict=True))
        assert all(a.dtype == d and torch.equal(bits(a), b) for a, (d, b) in zip(q.buffers(), buffers, strict=True))


def test_to_dtype_changes_the_bias_and_the_result():
    q = layer("w8a16")
    for dtype in (torch.float16, torch.float32, torch.bfloat16):
        q.to(dtype)
        assert q.bias.dtype == dtype and q(torch.randn(2, K, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("prepared", [True, False], ids=["prepared", "plain"])
def test_type_is_refused_and_changes_nothing(prepared):
    q = layer("w4a16-asym")
    if not prepared:
        q.unprepare()
    before = plain_bits(q)
    with pytest.raises(ValueError, match=r"packed weights cannot become torch.float16; use .to\(dtype\)"):
        q.type(torch.float16)
    assert all(torch.equal(a, b) for a, b in zip(plain_bits(q), before, strict=True))
    assert q.bias.dtype == torch.bfloat16 and q.weight_scale.dtype == torch.bfloat16


def test_to_meta_and_to_empty():
    q = layer("w4a16-g32-asym")
    state = q.state_dict()
    meta = copy.deepcopy(q).to("meta")
    assert meta.layout == "plain" and meta.prepare().layout == "plain"
    assert {n: t.shape for n, t in meta.state_dict().items()} == {n: t.shape for n, t in state.items()}
    assert meta(torch.empty(2, 3, K, device="meta", dtype=torch.bfloat16)).shape == (2, 3, N)
    meta.to_empty(device="cpu").load_state_dict(state)
    meta.prepare()
    assert_same_weight(meta, q)


def test_share_memory_keeps_the_layout_and_the_result():
    q = layer("w4a16")
    x = torch.randn(4, K).bfloat16()
    y = q(x)
    q.share_memory()
    assert all(t.is_shared() for t in (q.weight_packed, q.weight_scale, q.bias))
    assert q.layout == "cpu" and same_bits(q(x), y)


def test_requires_grad_is_about_the_bias_only():
    q = layer("w8a16").requires_grad_(False)
    assert not q.bias.requires_grad and not q(torch.randn(2, K).bfloat16()).requires_grad
    q.zero_grad()
    assert q.train().training and not q.eval().training


# --- autocast and compute_dtype


@pytest.mark.parametrize("scheme", ["w8a16", "w4a16-g64", "w8a8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_computes_in_its_dtype(scheme, dtype):
    linear = float_layer(dtype=torch.float32)
    q = QLinear.from_float(linear, scheme, prune="magnitude")
    x = torch.randn(4, K)
    with torch.autocast("cpu", dtype):
        y, expected = q(x), linear(x)
    assert y.dtype == expected.dtype == dtype
    assert same_bits(y, q(x.to(dtype)))
    with torch.autocast("cpu", enabled=False):
        assert q(x).dtype == torch.float32


@pytest.mark.parametrize("scheme", SCHEMES)
def test_compute_dtype_is_inside_only(scheme):
    linear = float_layer(dtype=torch.float32)
    q = QLinear.from_float(linear, scheme, compute_dtype=torch.bfloat16, prune="magnitude")
    assert q.layout == native(scheme) and q.weight_scale.dtype == torch.bfloat16
    assert q.dequantize().dtype == torch.float32
    x = torch.randn(4, K)
    y = q(x)
    assert y.dtype == torch.float32 and q.bias.dtype == torch.float32
    assert relative_error(y, reference.matmul(x.bfloat16(), q.packed, linear.bias)) <= 6e-3
    fresh = QLinear(K, N, scheme, device="meta", dtype=torch.float32, compute_dtype=torch.bfloat16)
    fresh.load_state_dict(q.state_dict(), assign=True)
    assert same_bits(fresh.prepare()(x), y)
    assert copy.deepcopy(q).compute_dtype == torch.bfloat16


def test_compute_dtype_passes_gradients():
    q = QLinear.from_float(float_layer(dtype=torch.float32), "w8a16", compute_dtype=torch.bfloat16)
    x = torch.randn(4, K, requires_grad=True)
    q(x).sum().backward()
    expected = torch.ones(4, N).double() @ q.dequantize(torch.float64)
    assert x.grad.dtype == torch.float32 and relative_error(x.grad, expected) < 6e-3


def test_threads_share_one_layer():
    from concurrent.futures import ThreadPoolExecutor

    q = layer("w4a16-g32")
    inputs = [torch.randn(3, K).bfloat16() for _ in range(16)]
    alone = [q(x) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(q, inputs))
    assert all(same_bits(a, b) for a, b in zip(alone, together, strict=True))
