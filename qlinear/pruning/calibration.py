"""What calibration batches do to the inputs of layers: column norms (Wanda) and ``X.T X`` (SparseGPT)."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qlinear.validation import call


def version_of(x: Tensor) -> int | None:
    """A number that grows with each change in place; None for tensors of inference mode, which count none."""
    return None if x.is_inference() else x._version


@dataclass
class _Sums:
    """Over the tokens a layer has seen: ``second`` is ``sum(x * x)`` ``[K]`` or ``sum(x x^T)`` ``[K, K]``."""

    second: Tensor | None = None
    tokens: int = 0

    def add(self, second: Tensor, tokens: int) -> None:
        self.second = second.clone() if self.second is None else self.second.add_(second)
        self.tokens += tokens

    def finished(self, name: str) -> Tensor:
        if self.second is None or not self.tokens:
            raise ValueError(f"layer {name!r} got no input from the calibration batches; leave it out with a mapping")
        if not bool(torch.isfinite(self.second).all()):
            raise ValueError(f"layer {name!r}: the calibration batches make inputs that are NaN or infinite")
        return self.second


class Collector:
    """Gathers the sums of each layer's inputs while batches run: ``outer`` for ``X.T X``, else squares by column."""

    def __init__(self, layers: Mapping[str, nn.Module], outer: bool) -> None:
        self._layers, self._outer = layers, outer
        self._sums = {name: _Sums() for name in layers}
        #: The newest input, its version and what was computed of it: q, k and v read one tensor, as gate and up do.
        self._newest: tuple[weakref.ref[Tensor], int | None, Tensor, int] | None = None
        #: Positions ``[batch, length]`` that are no padding; None where all count.
        self._real: Tensor | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        handles = [m.register_forward_pre_hook(self._hook(name)) for name, m in self._layers.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def start(self, batch: Any) -> None:
        """Called before each batch."""
        self._newest = None
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        self._real = mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None

    def results(self) -> dict[str, Tensor]:
        """The sums by the layers' names.

        Raises:
            ValueError: a layer saw no token, or one that is not finite.
        """
        return {name: sums.finished(name) for name, sums in self._sums.items()}

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            x = inputs[0]
            newest, version = self._newest, version_of(x)
            if newest is None or newest[0]() is not x or version is None or newest[1] != version:
                newest = self._newest = (weakref.ref(x), version, *self._reduce(x.detach()))
            self._sums[name].add(*newest[2:])

        return hook

    def _reduce(self, x: Tensor) -> tuple[Tensor, int]:
        """The sums of one input ``[..., K]`` and its number of tokens."""
        if self._real is not None and x.shape[:-1] == self._real.shape:
            x = x[self._real]
        x = x.reshape(-1, x.shape[-1]).to(torch.promote_types(x.dtype, torch.float32))
        return x.t() @ x if self._outer else x.square().sum(0), x.shape[0]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients, no key-value cache (blocks are run more than once); all restored."""
    modes = [(m, m.training) for m in model.modules()]
    config: Any = getattr(model, "config", None)
    cache = getattr(config, "use_cache", None)
    with ExitStack() as stack:
        for module, mode in modes:
            stack.callback(setattr, module, "training", mode)
        if cache:
            stack.callback(setattr, config, "use_cache", cache)
            config.use_cache = False
        model.eval()
        stack.enter_context(torch.no_grad())
        yield


def through_model(model: nn.Module, layers: Mapping[str, nn.Module], batches: Sequence[Any], outer: bool) -> Collector:
    """The statistics of some layers, from whole forward passes."""
    collector = Collector(layers, outer)
    with collector.listening():
        for batch in batches:
            collector.start(batch)
            call(model, batch)
    return collector
