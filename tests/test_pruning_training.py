"""Pruning while training: the schedule, zeros that survive optimizers, resuming."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.utils.prune as torch_prune
from models import tiny_gpt2
from torch import Tensor, nn

import qlinear
from qlinear.pruning import Gradual, KeepZeros, Pattern


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 8))


def train(net: nn.Module, optimizer: torch.optim.Optimizer, pruner: KeepZeros | None, steps: range) -> None:
    for step in steps:
        x = torch.randn(16, 24, generator=torch.Generator().manual_seed(step))
        (net(x) - x[:, :8].sin()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if pruner is not None:
            pruner.step()


def zeros(net: nn.Module) -> list[float]:
    return [float((m.weight == 0).float().mean()) for m in net.modules() if isinstance(m, nn.Linear)]


OPTIMIZERS = {
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adam": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_schedule_is_zhu_and_guptas_cubic(optimizer: str) -> None:
    net = model()
    pruner = Gradual(net, 0.8, begin=3, end=23, every=5, initial=0.1)
    opt, gone = OPTIMIZERS[optimizer](net.parameters()), torch.zeros(40, 24, dtype=torch.bool)
    share = 0.0
    for step in range(1, 30):
        train(net, opt, pruner, range(step, step + 1))
        if step in (3, 8, 13, 18, 23):
            share = 0.8 + (0.1 - 0.8) * (1 - (step - 3) / 20) ** 3
        for layer, found in zip((net[0], net[2]), zeros(net), strict=True):
            assert round(found * layer.weight.numel()) == round(share * layer.weight.numel())
        assert bool((net[0].weight == 0)[gone].all()), "a pruned weight came back"
        gone = net[0].weight == 0
    assert share == pytest.approx(0.8)


@pytest.mark.parametrize("pattern", ["2:4", "block8", "unstructured"])
def test_every_pattern_holds_at_the_end(pattern: str) -> None:
    net, kind = model(), Pattern.parse(pattern)
    pruner = Gradual(
        net, 0.5, pattern, begin=1, end=10, every=3, scope="global" if kind.kind == "unstructured" else "layer"
    )
    train(net, OPTIMIZERS["adam"](net.parameters()), pruner, range(20))
    weights = [net[0].weight.detach(), net[2].weight.detach()]
    assert all(kind.holds(w) for w in weights)
    if kind.kind == "unstructured":
        assert sum(int((w == 0).sum()) for w in weights) == round(0.5 * sum(w.numel() for w in weights))
    if kind.kind == "block":
        blocks = [b for w in weights for rows in w.split(8) for b in rows.split(8, 1)]
        assert sum(bool((b == 0).all()) for b in blocks) == round(15 / 2) + round(5 / 2)


def test_it_resumes_where_it_stopped() -> None:
    whole = model()
    pruner, opt = Gradual(whole, 0.8, begin=2, end=12, every=2), None
    opt = OPTIMIZERS["adam"](whole.parameters())
    train(whole, opt, pruner, range(7))
    file = io.BytesIO()
    torch.save([whole.state_dict(), opt.state_dict(), pruner.state_dict()], file)
    train(whole, opt, pruner, range(7, 16))
    file.seek(0)
    states = torch.load(file)
    resumed = model()
    again, opt = Gradual(resumed, 0.8, begin=2, end=12, every=2), OPTIMIZERS["adam"](resumed.parameters())
    # The pruner's first: it holds the masks itself.
    again.load_state_dict(states[2])
    resumed.load_state_dict(states[0]), opt.load_state_dict(states[1])
    train(resumed, opt, again, range(7, 16))
    assert again.steps == pruner.steps == 16
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    with pytest.raises(ValueError, match="other layers"):
        Gradual(nn.Sequential(nn.Linear(3, 3)), 0.5, end=2).load_state_dict(states[2])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_pruned_model_keeps_its_zeros_through_fine_tuning(optimizer: str) -> None:
    net = model()
    opt = OPTIMIZERS[optimizer](net.parameters())
    train(net, opt, None, range(5))  # momentum before pruning pushes pruned weights afterwards
    qlinear.prune(net, "magnitude", None, "2:4")
    masks = [net[0].weight == 0, net[2].weight == 0]
    freed = copy.deepcopy(net)
    pruner, start = KeepZeros(net), net[0].weight.detach().clone()
    train(net, opt, pruner, range(5, 15))
    assert torch.equal(net[0].weight == 0, masks[0]) and torch.equal(net[2].weight == 0, masks[1])
    assert not torch.equal(net[0].weight, start)
    train(freed, OPTIMIZERS[optimizer](freed.parameters()), None, range(5, 7))
    assert not torch.equal(freed[0].weight == 0, masks[0]), "the check above checks nothing"


def test_conv1d_and_masks_of_torch_prune_are_kept() -> None:
    net = tiny_gpt2()
    layer = net.transformer.h[0].mlp.c_fc
    torch_prune.l1_unstructured(layer, "weight", 0.5)
    mask: Tensor = layer.weight == 0
    pruner = KeepZeros(net)
    assert isinstance(layer.weight, nn.Parameter) and torch.equal(layer.weight == 0, mask)
    with torch.no_grad():
        layer.weight.add_(1)
    pruner.step()
    assert torch.equal(layer.weight == 0, mask)


@pytest.mark.parametrize("pattern", ["unstructured", "block8", "2:4"])
@pytest.mark.parametrize("maker", ["torch mask", "pruner"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_what_is_zero_at_the_start_stays_zero(maker: str, pattern: str, scope: str) -> None:
    net = model()
    if maker == "pruner":
        qlinear.prune(net, "magnitude", {"0": 0.6})
    else:
        torch_prune.l1_unstructured(net[0], "weight", 0.6)
    start = net[0].weight.detach() == 0
    pruner = Gradual(net, 0.5, pattern, begin=2, end=12, every=2, scope="layer" if pattern == "2:4" else scope)
    opt = OPTIMIZERS["momentum"](net.parameters())
    for step in range(15):
        train(net, opt, pruner, range(step, step + 1))
        assert bool((net[0].weight == 0)[start].all()), f"a weight came back at step {step + 1}"


@pytest.mark.parametrize("final", [0.3, 0.8])
def test_the_present_share_is_the_floor_of_the_schedule(final: float) -> None:
    net = model()
    qlinear.prune(net, "magnitude", {"0": 0.5})
    pruner, opt = Gradual(net, final, begin=1, end=20), OPTIMIZERS["momentum"](net.parameters())
    for step in range(1, 23):
        train(net, opt, pruner, range(step, step + 1))
        share = pruner.share(final, step)
        counts = [int((layer.weight == 0).sum()) for layer in (net[0], net[2])]
        assert counts == [max(480, round(share * 960)), round(share * 320)]


def test_a_layer_initialized_to_zero_is_trained_and_a_masked_one_is_not() -> None:
    net = model()
    nn.init.zeros_(net[2].weight)
    pruner = Gradual(net, 0.5, begin=3, end=8)
    train(net, OPTIMIZERS["momentum"](net.parameters()), pruner, range(10))
    assert zeros(net) == [0.5, 0.5]
    net = model()
    torch_prune.l1_unstructured(net[2], "weight", 1.0)
    pruner = Gradual(net, 0.5, begin=3, end=8)
    train(net, OPTIMIZERS["momentum"](net.parameters()), pruner, range(10))
    assert zeros(net)[1] == 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"begin": 5, "end": 5}, "begin < end"),
        ({"end": 5, "every": 0}, "every >= 1"),
        ({"end": 5, "initial": 1.0}, "initial"),
        ({"end": 5, "scope": "row"}, "scope"),
        ({"end": 5, "pattern": "neurons"}, "changes shapes"),
        ({"end": 5, "sparsity": 2}, "between 0 and 1"),
        ({"end": 5, "sparsity": {"0": 0.5, "2": 0.8}, "scope": "global"}, "got 0.5 for '0' and 0.8 for '2'"),
        ({"end": 5, "pattern": "2:4", "scope": "global"}, "does not rank layers together"),
    ],
    ids=str,
)
def test_an_impossible_schedule_is_refused(arguments: dict[str, object], message: str) -> None:
    net = model()
    torch_prune.l1_unstructured(net[0], "weight", 0.5)
    with pytest.raises(ValueError, match=message):
        Gradual(net, **{"sparsity": 0.5, **arguments})
    assert "weight_mask" in dict(net[0].named_buffers()), "a failure took the mask"
    with pytest.raises(ValueError, match="prune it first"):
        KeepZeros(model())
