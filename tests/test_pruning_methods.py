"""Each method against a plain float64 re-statement of its paper, and against the others where papers rank them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import qlinear
from qlinear.format import FORMATS
from qlinear.grid import exact
from qlinear.packing import dequantize_codes
from qlinear.pruning import Pattern
from qlinear.pruning.rounding import Rounding
from qlinear.pruning.sparsegpt import sweep
from qlinear.quantize import quantize

PATTERNS = ("unstructured", "2:4", "1:4", "4:8", "block4", "block8x4")


def inputs(k: int, tokens: int = 512, seed: int = 0) -> Tensor:
    """Correlated inputs whose columns have very different sizes, as those of language models do."""
    g = torch.Generator().manual_seed(seed)
    mixed = torch.randn(tokens, k, generator=g) @ torch.randn(k, k, generator=g) / k**0.5
    return (mixed + 0.3 * torch.randn(tokens, k, generator=g)) * torch.randn(k, generator=g).mul(0.7).exp()


def linear(n: int, k: int, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(k, n, bias=False)


def keep_highest(scores: Tensor, count: int) -> Tensor:
    """The straightforward mask: everything but the ``count`` lowest of a flat list."""
    flat = scores.flatten()
    kept = torch.ones_like(flat)
    kept[flat.sort(stable=True).indices[:count]] = 0
    return kept.view_as(scores)


def explicit_sparsegpt(
    weight: Tensor, hessian: Tensor, pattern: Pattern, share: float, block: int, damping: float, scheme: str | None
) -> Tensor:
    """Algorithm 1 of arXiv:2301.00774 with no Cholesky factor: the remaining submatrix is inverted at each column."""
    w, h = weight.double().clone(), hessian.double().clone()
    h += damping * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
    n, k = w.shape
    fmt = FORMATS[scheme] if scheme else None
    kept = torch.ones_like(w)
    removed = 0
    for j in range(k):
        if j % block == 0:
            ends = range(j, min(j + block, k))
            scores = torch.stack([w[:, i] ** 2 / torch.linalg.inv(h[i:, i:])[0, 0] for i in ends], dim=1)
            if pattern.kind == "unstructured":
                count = round(share * n * ends[-1] + share * n) - removed
                kept[:, j : ends[-1] + 1] = keep_highest(scores, count)
                removed += count
            elif pattern.kind == "block":
                tall, wide = pattern.rows, pattern.columns
                sums = scores.unflatten(1, (-1, wide)).sum(2).unflatten(0, (-1, tall)).sum(1)
                count = round(share * sums.shape[0] * ((ends[-1] + 1) // wide)) - removed
                mask = keep_highest(sums, count)
                kept[:, j : ends[-1] + 1] = mask.repeat_interleave(tall, 0).repeat_interleave(wide, 1)
                removed += count
        if pattern.kind == "n:m" and j % pattern.m == 0:
            kept[:, j : j + pattern.m] = group_mask(w, h, j, pattern)
        if fmt is not None and j % (fmt.group_size or k) == 0:
            group = slice(j, j + (fmt.group_size or k))
            if fmt.group_size:
                future = pruned_only(w, h, kept, group, pattern)
            else:
                future = explicit_sparsegpt(weight, hessian, pattern, share, block, damping, None)
            codes = quantize(future.float(), fmt)
            # float32 scales are shortened to 16 bits, so that a float32 weight holds their products exactly.
            scale = (exact(codes.scale) if codes.scale.dtype == torch.float32 else codes.scale).double()[:, 0]
            zero = torch.full_like(scale, fmt.offset) if codes.zero_point is None else codes.zero_point.double()[:, 0]
        new = w[:, j] * kept[:, j]
        if fmt is not None:
            new = ((new / scale).round() + zero).clamp(0, fmt.max_code).sub(zero) * scale
        inverse = torch.linalg.inv(h[j:, j:])
        w[:, j:] -= torch.outer((w[:, j] - new) / inverse[0, 0], inverse[0])
        w[:, j] = new
    return w


def pruned_only(w: Tensor, h: Tensor, kept: Tensor, group: slice, pattern: Pattern) -> Tensor:
    """The columns of a group after they were pruned and not rounded: what their scales are chosen for."""
    w, kept = w.clone(), kept.clone()
    for j in range(len(h))[group]:
        if pattern.kind == "n:m" and j % pattern.m == 0:
            kept[:, j : j + pattern.m] = group_mask(w, h, j, pattern)
        new, inverse = w[:, j] * kept[:, j], torch.linalg.inv(h[j:, j:])
        w[:, j:] -= torch.outer((w[:, j] - new) / inverse[0, 0], inverse[0])
        w[:, j] = new
    return w[:, group]


def group_mask(w: Tensor, h: Tensor, j: int, pattern: Pattern) -> Tensor:
    columns = range(j, j + pattern.m)
    scores = torch.stack([w[:, i] ** 2 / torch.linalg.inv(h[i:, i:])[0, 0] for i in columns], dim=1)
    return torch.stack([keep_highest(row, pattern.m - pattern.n) for row in scores])


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("block", [16, 48], ids=["blocks-of-16", "one-block"])
def test_sparsegpt_is_the_explicit_inverse_hessian_update(pattern: str, block: int) -> None:
    x = inputs(48).double()
    weight, kind = linear(16, 48).weight.detach().double(), Pattern.parse(pattern)
    share = kind.sparsity(None if kind.m else 0.5)
    want = explicit_sparsegpt(weight, x.t() @ x, kind, share, block, 0.01, None)
    got = sweep(weight, x.t() @ x, kind, share, block_size=block)
    assert torch.equal(got == 0, want == 0)
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)
    single = sweep(weight.float(), (x.t() @ x).float(), kind, share, block_size=block)
    torch.testing.assert_close(single.double(), want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("shrinkage", [0.0, 0.25])
def test_prune_shrinks_correlations_and_then_sweeps(shrinkage: float) -> None:
    x, layer = inputs(48), linear(16, 48)
    hessian, weight = x.double().t() @ x.double(), layer.weight.detach().double()
    shrunk = hessian * (1 - shrinkage) + hessian.diagonal().diag() * shrinkage
    want = explicit_sparsegpt(weight, shrunk, Pattern.parse("2:4"), 0.5, 48, 0.01, None)
    qlinear.prune(layer, "sparsegpt", None, "2:4", [x[:300], x[300:]], shrinkage=shrinkage)
    torch.testing.assert_close(layer.weight.detach().double(), want, rtol=1e-3, atol=1e-4)


def test_shrinkage_goes_from_sparsegpt_to_wanda() -> None:
    x = inputs(48)
    layers = {share: linear(16, 48) for share in (0.0, 1 - 1e-6)}
    for share, layer in layers.items():
        qlinear.prune(layer, "sparsegpt", None, "2:4", [x], shrinkage=share, damping=1e-6)
    wanda = linear(16, 48)
    qlinear.prune(wanda, "wanda", None, "2:4", [x])
    torch.testing.assert_close(layers[1 - 1e-6].weight, wanda.weight, rtol=1e-3, atol=1e-4)
    assert not torch.equal(layers[0.0].weight == 0, wanda.weight == 0)


@pytest.mark.parametrize("scheme", ["w4a16-g32", "w4a16-g32-asym", "w4a16-channel", "w8a16-g32"])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_sparsegpt_with_rounding_is_the_explicit_update(pattern: str, scheme: str) -> None:
    x = inputs(64).double()
    weight, kind = linear(16, 64).weight.detach().double(), Pattern.parse(pattern)
    want = explicit_sparsegpt(weight, x.t() @ x, kind, 0.5, 32, 0.01, scheme)
    rounding = Rounding(scheme, torch.float32)
    got = sweep(weight, x.t() @ x, kind, 0.5, rounding=rounding, block_size=32)
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("share", [0.3, 0.5, 0.75])
def test_magnitude_ranks_a_layer_or_the_model(share: float) -> None:
    model = nn.Sequential(linear(24, 40, 1), nn.ReLU(), linear(10, 24, 2))
    originals = [model[0].weight.detach().double(), model[2].weight.detach().double() * 3]
    with torch.no_grad():
        model[2].weight.mul_(3)
    both = torch.cat([w.flatten() for w in originals])
    qlinear.prune(model, "magnitude", share, scope="global")
    want = both * keep_highest(both.abs(), round(share * len(both)))
    got = torch.cat([model[0].weight.detach().flatten(), model[2].weight.detach().flatten()])
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-7)
    layer = linear(24, 40, 1)
    qlinear.prune(layer, "magnitude", share)
    want = originals[0] * keep_highest(originals[0].abs(), round(share * originals[0].numel()))
    assert torch.equal(layer.weight.double(), want)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "block8"])
def test_wanda_ranks_weight_times_input_norm(pattern: str) -> None:
    layer, x = linear(16, 48), inputs(48)
    weight = layer.weight.detach().double()
    scores = weight.abs() * x.double().square().sum(0).sqrt()
    if pattern == "unstructured":
        kept = torch.stack([keep_highest(row, 24) for row in scores])
    elif pattern == "2:4":
        kept = torch.stack([keep_highest(row, 2) for row in scores.view(-1, 4)]).view(16, 48)
    else:
        sums = scores.unflatten(1, (-1, 8)).sum(2).unflatten(0, (-1, 8)).sum(1)
        kept = keep_highest(sums, 6).repeat_interleave(8, 0).repeat_interleave(8, 1)
    qlinear.prune(layer, "wanda", 0.5, pattern, [x[:200], x[200:]])
    assert torch.equal(layer.weight.double(), weight * kept)


def test_wanda_reads_what_the_pruned_layers_before_it_put_out() -> None:
    model, x = nn.Sequential(linear(24, 32, 1), nn.ReLU(), linear(8, 24, 2)), inputs(32)
    weight = model[2].weight.detach().double()
    qlinear.prune(model, "wanda", 0.5, calibration=[x])
    seen = torch.relu(x @ model[0].weight.detach().t()).double()
    kept = torch.stack([keep_highest(row, 12) for row in weight.abs() * seen.square().sum(0).sqrt()])
    assert torch.equal(model[2].weight.double(), weight * kept)


class Scaled(nn.Module):
    """Layers that read one tensor, which is changed in place between them; ``blocks``: as a list that is a chain."""

    def __init__(self, blocks: bool) -> None:
        super().__init__()
        self.blocks, self.scale = blocks, torch.tensor([100.0, 0.01]).repeat(12)
        self.layers = nn.ModuleList([linear(24, 24, 1), linear(24, 24, 2)])
        self.inputs: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        if self.blocks:
            x = self.layers[0](x)
            x.mul_(self.scale)
        else:
            x = x.clone()
            self.layers[0](x)
            x.mul_(self.scale)
        self.inputs.append(x.clone())
        return self.layers[1](x)


@pytest.mark.parametrize(
    ("blocks", "inference"),
    # Tensors of inference mode do not count their changes: a chain's outputs are not watched there.
    [(False, False), (True, False), (False, True)],
    ids=["one-input", "output-of-a-block", "one-input-inference-mode"],
)
def test_wanda_reads_inputs_that_were_changed_in_place(blocks: bool, inference: bool) -> None:
    model, x = Scaled(blocks), inputs(24)
    weight = model.layers[1].weight.detach().clone()
    with torch.inference_mode(inference):
        qlinear.prune(model, "wanda", 0.5, calibration=[x])
    real = model.inputs[0]
    kept = torch.stack([keep_highest(row, 12) for row in weight.abs() * real.square().sum(0).sqrt()])
    assert torch.equal(model.layers[1].weight.detach(), weight * kept)


def test_gradient_is_the_first_order_taylor_term() -> None:
    model, x = nn.Sequential(linear(24, 32, 1), nn.Tanh(), linear(8, 24, 2)), inputs(32)
    batches = list(x.split(128))
    scores = [torch.zeros(24, 32, dtype=torch.float64), torch.zeros(8, 24, dtype=torch.float64)]
    twin = nn.Sequential(linear(24, 32, 1), nn.Tanh(), linear(8, 24, 2)).double()
    weights = [twin[0].weight, twin[2].weight]
    for batch in batches:
        gradients = torch.autograd.grad(twin(batch.double()).square().mean(), weights)
        for score, w, grad in zip(scores, weights, gradients, strict=True):
            score += (w * grad).abs().detach()
    model[0].weight.grad = mine = torch.ones(24, 32)
    model[2].weight.requires_grad_(False)
    qlinear.prune(model, "gradient", 0.5, calibration=batches, loss=lambda m, batch: m(batch).square().mean())
    for layer, w, score in zip((model[0], model[2]), weights, scores, strict=True):
        want = (w.detach() * keep_highest(score, round(0.5 * score.numel()))).float()
        assert torch.equal(layer.weight, want)
    assert model[0].weight.grad is mine and not model[2].weight.requires_grad and model[2].weight.grad is None


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_on_correlated_inputs_each_method_is_better_than_the_simpler_one(pattern: str) -> None:
    for seed in range(5):
        x = inputs(96, tokens=1024, seed=seed)
        errors = {}
        for method in ("magnitude", "wanda", "sparsegpt"):
            layer = linear(64, 96, seed)
            want = x @ layer.weight.detach().t()
            qlinear.prune(layer, method, 0.5, pattern, [x])
            errors[method] = float((x @ layer.weight.detach().t() - want).norm() / want.norm())
        assert errors["sparsegpt"] < 0.9 * errors["wanda"] < 0.9 * 0.9 * errors["magnitude"], errors


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scheme", ["w4a16", "w4a16-g32-asym", "w4a16-channel", "w8a16", "w8a8", "w4a8"])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_convert_finds_the_codes_of_the_sweep(scheme: str, pattern: str, dtype: torch.dtype) -> None:
    x, layer = inputs(160), linear(48, 160).to(dtype)
    chosen = sweep(layer.weight.detach(), x.t() @ x, Pattern.parse(pattern), 0.5, rounding=Rounding(scheme, dtype))
    qlinear.prune(layer, "sparsegpt", 0.5, pattern, [x.to(dtype).float().to(dtype)], scheme=scheme)
    direct = nn.Linear(160, 48, bias=False, dtype=dtype)
    direct.weight.data = chosen.to(dtype)
    for pruned in (layer, direct):
        codes = quantize(pruned.weight.detach(), FORMATS[scheme])
        back = dequantize_codes(*codes, FORMATS[scheme], torch.float32)
        assert torch.equal(back.to(dtype), pruned.weight.detach())
        assert torch.equal(qlinear.convert(nn.Sequential(pruned), scheme)[0].dequantize(), pruned.weight.detach())
    if dtype == torch.float32:
        assert torch.equal(back, chosen)
    assert float((layer.weight == 0).float().mean()) >= 0.5


@pytest.mark.parametrize("scheme", ["w4a16-g32", "w4a16", "w4a16-g64-asym", "w4a16-channel"])
def test_rounding_in_the_sweep_beats_rounding_after_it(scheme: str) -> None:
    x = inputs(128, tokens=1024)
    errors = []
    for rounding in (scheme, None):
        layer = linear(64, 128)
        want = x @ layer.weight.detach().t()
        qlinear.prune(layer, "sparsegpt", None, "2:4", [x], scheme=rounding)
        weight = qlinear.convert(layer, scheme).dequantize()
        errors.append(float((x @ weight.t() - want).norm() / want.norm()))
    assert errors[0] < errors[1]


def test_inputs_never_seen_go_first_and_a_singular_hessian_is_damped() -> None:
    x = inputs(32, tokens=8)
    x[:, 5] = 0
    layer = linear(16, 32)
    qlinear.prune(layer, "sparsegpt", 0.5, calibration=[x])
    assert bool((layer.weight[:, 5] == 0).all()) and int((layer.weight == 0).sum()) == 256
    assert bool(layer.weight.isfinite().all())
