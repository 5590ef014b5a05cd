"""What a weight is worth: magnitude, Wanda and first-order Taylor scores; the lower, the earlier it goes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qlinear.float_layers import float_parameter, is_conv1d

#: The loss of a model on one calibration batch: a scalar tensor to call ``backward`` on.
Loss = Callable[[Any, Any], Tensor]


def magnitude(weight: Tensor) -> Tensor:
    """``|w|`` in float32: L1, which is additive over blocks and neurons."""
    return weight.float().abs()


def wanda(weight: Tensor, squares: Tensor) -> Tensor:
    """``|w| * norm(x)`` (Sun et al., arXiv:2306.11695) from ``squares`` ``[K]``, the sum of each input's squares."""
    return weight.float().abs() * squares.float().sqrt()


def gradient(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: Sequence[Any], loss: Loss
) -> dict[str, Tensor]:
    """``sum over batches of |w * dL/dw|`` ``[N, K]``: the first-order Taylor change of the loss (arXiv:1611.06440).

    Gradients of other parameters are not computed, and a layer's is freed as soon as it was read. Gradients that the
    caller had accumulated, and what required one, are as before afterwards.

    Raises:
        ValueError: a loss that is no finite scalar, or that does not depend on one of the layers.
    """
    sums: dict[str, Tensor] = {}

    def reader(name: str, module: nn.Module) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            assert parameter.grad is not None
            term = (parameter.detach().float() * parameter.grad.float()).abs_()
            term = term.t() if is_conv1d(module) else term
            sums[name] = sums[name].add_(term) if name in sums else term
            parameter.grad = None

        return hook

    with _only_these(model, layers):
        handles = [
            float_parameter(layer).register_post_accumulate_grad_hook(reader(name, layer))
            for name, layer in layers.items()
        ]
        try:
            for batch in batches:
                value = loss(model, batch)
                if not isinstance(value, Tensor) or value.numel() != 1 or not bool(torch.isfinite(value)):
                    raise ValueError(f"the loss of a calibration batch is a finite scalar tensor, got {value!r}")
                value.backward()
        finally:
            for handle in handles:
                handle.remove()
    for name in layers:
        if name not in sums:
            raise ValueError(f"layer {name!r} has no gradient: the loss does not depend on it")
        if not bool(torch.isfinite(sums[name]).all()):
            raise ValueError(f"layer {name!r}: its gradient is NaN or infinite on the calibration batches")
    return sums


@contextmanager
def _only_these(model: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """Only the weights of the layers require a gradient; existing gradients are put aside. All restored."""
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    wanted = {id(m.weight) for m in layers.values()}
    modes = [(m, m.training) for m in model.modules()]
    try:
        model.eval()
        for parameter, _, _ in before:
            parameter.requires_grad_(id(parameter) in wanted)
            parameter.grad = None
        with torch.enable_grad():
            yield
    finally:
        for parameter, required, grad in before:
            parameter.requires_grad_(required)
            parameter.grad = grad
        for module, mode in modes:
            module.training = mode
