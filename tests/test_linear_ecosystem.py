"""QLinear inside accelerate, FSDP2, distributed checkpoints and transformers."""

import copy

import pytest
import torch
from models import bits, logits, run_python, same_bits, tiny_llama
from torch import nn

import qlinear
from qlinear import QLinear

accelerate = pytest.importorskip("accelerate")

WHAT = {"*.self_attn.*": "w4a16-g32-asym", "*.mlp.*": "w8a16", "lm_head": "w8a8"}


@pytest.fixture(scope="module")
def original():
    model = qlinear.convert(tiny_llama().bfloat16(), WHAT)
    with torch.no_grad():
        return model, logits(model)


@pytest.fixture
def converted(original):
    return copy.deepcopy(original[0])


def on_meta(model):
    """A model of the same shape as an application builds it before loading: quantized, plain, without data."""
    with accelerate.init_empty_weights():
        fresh = tiny_llama().bfloat16()
    for name, module in model.named_modules():
        if isinstance(module, QLinear):
            parent, _, child = name.rpartition(".")
            sizes = (module.in_features, module.out_features, module.scheme, module.bias is not None)
            setattr(fresh.get_submodule(parent), child, QLinear(*sizes, device="meta", dtype=torch.bfloat16))
    return fresh.eval()


def assert_same_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert list(a) == list(b)
    for name in a:
        assert same_bits(a[name], b[name]), name


def close(y, expected):
    """Plain and prepared layers differ by a rounding of bfloat16."""
    return float((y.float() - expected.float()).norm() / expected.float().norm()) < 2e-2


@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "shards"])
def test_load_checkpoint_and_dispatch_into_a_model_on_meta(original, converted, tmp_path, sharded):
    accelerate.Accelerator().save_model(converted, tmp_path, max_shard_size="60KB" if sharded else "5GB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 if sharded else True
    fresh = on_meta(converted)
    fresh = accelerate.load_checkpoint_and_dispatch(fresh, tmp_path, device_map={"": "cpu"})
    qlinear.prepare(fresh)
    assert_same_state(fresh, converted)
    with torch.no_grad():
        assert same_bits(logits(fresh), original[1])


def test_load_with_a_part_on_disk(original, converted, tmp_path):
    accelerate.Accelerator().save_model(converted, tmp_path / "model")
    devices = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu"}
    devices |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk"}
    fresh = accelerate.load_checkpoint_and_dispatch(
        on_meta(converted),
        tmp_path / "model",
        device_map=devices,
        offload_folder=tmp_path / "offload",
        offload_buffers=True,
    )
    assert fresh.lm_head.weight_packed.is_meta
    with torch.no_grad():
        assert close(logits(fresh), original[1])


def unprepare(model):
    for module in model.modules():
        if isinstance(module, QLinear):
            module.unprepare()
    return model


def offload(model, where, folder, **kwargs):
    if where == "cpu":
        return accelerate.cpu_offload(model, execution_device="cpu", **kwargs)
    return accelerate.disk_offload(model, folder, execution_device="cpu", **kwargs)


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offload_of_the_packed_weights(original, converted, tmp_path, where):
    """accelerate swaps each layer's tensors for meta ones and brings back those of the state dict: the plain layout."""
    offload(unprepare(converted), where, tmp_path, offload_buffers=True)
    assert converted.lm_head.weight_packed.is_meta
    with torch.no_grad():
        for _ in range(2):
            assert close(logits(converted), original[1])
    assert converted.lm_head.weight_packed.is_meta


def test_offload_of_a_prepared_model_is_refused_by_accelerate(converted):
    """Its meta tensors keep the prepared shape, which the state dict does not have: an error, never a wrong result."""
    offload(converted, "cpu", None, offload_buffers=True)
    with pytest.raises(ValueError, match="Trying to set a tensor of shape"):
        logits(converted)


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offload_leaves_buffers_where_they_are_by_default(original, converted, tmp_path, where):
    offload(converted, where, tmp_path)
    assert not converted.lm_head.weight_packed.is_meta and converted.model.embed_tokens.weight.is_meta
    with torch.no_grad():
        assert same_bits(logits(converted), original[1])


def test_accelerate_hooks_can_be_removed(original, converted):
    accelerate.dispatch_model(converted, device_map={"": "cpu"}, force_hooks=True)
    accelerate.hooks.remove_hook_from_submodules(converted)
    with torch.no_grad():
        assert same_bits(logits(converted), original[1])


def test_modules_of_a_dispatched_model_are_left_by_convert():
    """Its forward was replaced on the instance; swapping the layer would lose the hook."""
    model = accelerate.cpu_offload(tiny_llama(), execution_device="cpu")
    with pytest.raises(ValueError, match=r"nothing to convert.*its forward was replaced on the instance"):
        qlinear.convert(model, "w8a16")


def test_find_tied_parameters_and_sizes(converted):
    assert accelerate.utils.find_tied_parameters(converted) == []
    size = accelerate.utils.compute_module_sizes(converted)[""]
    assert size == sum(t.nbytes for t in (*converted.parameters(), *converted.buffers()))


def test_transformers_moves_and_counts_it(converted):
    state = {name: bits(t) for name, t in converted.state_dict().items() if "weight_" in name}
    assert converted.dtype == torch.bfloat16
    assert converted.get_memory_footprint() < tiny_llama().bfloat16().get_memory_footprint()
    converted.to(torch.float32)
    assert all(torch.equal(bits(t), state[name]) for name, t in converted.state_dict().items() if name in state)


def test_vector_of_parameters_and_clipping(converted):
    """Utilities that walk parameters never meet a packed weight."""
    assert all(p.is_floating_point() for p in converted.parameters())
    nn.utils.clip_grad_norm_(converted.parameters(), 1.0)
    nn.utils.parameters_to_vector(converted.parameters())


DISTRIBUTED = """
import copy, sys, tempfile, torch, torch.distributed as dist
import qlinear
from models import logits, same_bits, tiny_llama
from torch.distributed.checkpoint import state_dict as dcp_state
import torch.distributed.checkpoint as dcp
from torch.distributed.fsdp import fully_shard

folder, rank, world = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
mesh = dist.init_device_mesh("cpu", (world,))

WHAT = {"*.self_attn.*": "w4a16-g32-asym", "*.mlp.*": "w8a16", "lm_head": "w8a8"}
float_model = tiny_llama(attention_bias=True).bfloat16()
model = qlinear.convert(float_model, WHAT)
with torch.no_grad():
    expected = logits(model)
plain = {name: t.clone() for name, t in model.state_dict().items()}

def sharded():
    twin = copy.deepcopy(model)
    for layer in twin.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(twin, mesh=mesh)

def spoil(m):
    for q in m.modules():
        if isinstance(q, qlinear.QLinear):
            for t in q.buffers():
                t.zero_()

def same_state(state, what):
    assert sorted(state) == sorted(plain), (what, set(state) ^ set(plain))
    for name, t in state.items():
        t = t.full_tensor() if hasattr(t, "full_tensor") else t
        assert same_bits(t, plain[name]), (what, name)

def same_output(m, what):
    with torch.no_grad():
        assert same_bits(logits(m), expected), what

one = sharded()
same_output(one, "forward")
state = dcp_state.get_model_state_dict(one)
same_state(state, "get")
full = dcp_state.get_model_state_dict(one, options=dcp_state.StateDictOptions(full_state_dict=True))
same_state(full, "get full") if rank == 0 or full else None

two = sharded()
spoil(two)
dcp_state.set_model_state_dict(two, state)
same_state(dcp_state.get_model_state_dict(two), "set")
same_output(two, "forward after set")

three = sharded()
spoil(three)
dcp_state.set_model_state_dict(three, dict(plain), options=dcp_state.StateDictOptions(full_state_dict=True))
same_output(three, "forward after set of a full state")

four = sharded()
for m in four.modules():
    if isinstance(m, qlinear.QLinear):
        m.unprepare()
spoil(four)
options = dcp_state.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
dcp_state.set_model_state_dict(four, dict(plain) if rank == 0 else {}, options=options)
qlinear.prepare(four)
same_output(four, "forward after a broadcast")

dcp.save(dcp_state.get_model_state_dict(one), checkpoint_id=f"{folder}/checkpoint")
five = sharded()
spoil(five)
state = dcp_state.get_model_state_dict(five)
dcp.load(state, checkpoint_id=f"{folder}/checkpoint")
dcp_state.set_model_state_dict(five, state)
same_output(five, "forward after a distributed checkpoint")

x = torch.tensor([[1, 2, 3]])
one(input_ids=x).logits.float().sum().backward()
assert one.model.layers[0].self_attn.q_proj.bias.grad is not None
dist.barrier()
dist.destroy_process_group()
print("done")
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")
def test_fsdp2_and_distributed_checkpoints(tmp_path, world=2):
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(world) as pool:
        ranks = [
            pool.submit(run_python, DISTRIBUTED, str(tmp_path), str(r), str(world), OMP_NUM_THREADS="1")
            for r in range(world)
        ]
        assert all("done" in rank.result() for rank in ranks)
