"""QLinear: state dicts, copies and pickles."""

import copy
import io
import pickle

import pytest
import torch
from layers import (
    SCHEMES,
    K,
    N,
    assert_same_weight,
    layer,
)
from models import CPU_LEVELS, run_python, same_bits
from torch import nn

from qlinear import QLinear


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
    assert q.layout == "cpu" and list(q._buffers)[:3] == ["weight_packed", "weight_scale", "weight_zero_point"]


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
            assert q.layout == ("plain" if q.format.sparsity in ("2:4", "unstructured") else "cpu"), scheme
            assert torch.equal(q.dequantize(), expected), scheme
            x = torch.randn(4, 200, dtype=torch.bfloat16)
            y = qlinear.reference.matmul(x, q.packed, q.bias)
            assert (q(x).double() - y).norm() / y.norm() <= 6e-3, scheme
    print(torch.backends.cpu.get_cpu_capability())
    """
    code = code.replace("import sys,", "import qlinear.reference, sys,")
    shown = run_python(code, str(tmp_path), ATEN_CPU_CAPABILITY=level, OMP_NUM_THREADS="1")
    assert shown.strip().lower() == level
