"""Takes back a half-done change to a model: what makes ``convert`` and ``prune`` all or nothing."""

from __future__ import annotations

import copy
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from qlinear.float_layers import float_parameter


class _Kept:
    """A parameter whose data waits in a file; the very object comes back where somebody else still holds it."""

    def __init__(self, parameter: Tensor, file: Path) -> None:
        # A copy, because torch.save writes the whole storage of a view: that of a file's every weight, perhaps.
        torch.save(parameter.detach().to("cpu", copy=True), file)
        self._file, self._device, self._requires_grad = file, parameter.device, parameter.requires_grad
        self._original = weakref.ref(parameter)
        self._loaded: Tensor | None = None

    def holds(self, parameter: Tensor) -> bool:
        return self._original() is parameter

    def recall(self) -> Any:
        """The parameter; layers that shared it share it again."""
        if self._loaded is None:
            self._loaded = self._original()
        if self._loaded is None:
            self._loaded = nn.Parameter(self.data(), self._requires_grad)
        return self._loaded

    def data(self) -> Tensor:
        found: Tensor = torch.load(self._file).to(self._device)
        return found


class Undo:
    """Changes a model, and takes every change back when its ``with`` block raises.

    Weights wait in temporary files rather than in memory, so that a model is never held twice. Where somebody else
    still holds the original layer or weight, that very object is put back.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._steps: list[Callable[[], None]] = []
        self._kept: list[_Kept] = []
        self._folder = tempfile.TemporaryDirectory(prefix="qlinear-undo-")

    def __enter__(self) -> Undo:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is not None:
                for step in reversed(self._steps):
                    step()
        finally:
            self._steps.clear()
            self._folder.cleanup()

    def replace(self, names: list[str], old: nn.Module, new: nn.Module) -> None:
        """Puts ``new`` at each dotted name in place of ``old``, a linear layer."""
        # A layer with a mask of torch.nn.utils.prune is more than its weight: it is held as it is.
        self._steps.append(self._reviver(names, old) if "weight" in old._parameters else lambda: self._put(names, old))
        self._put(names, new)

    def set(self, owner: object, name: str, value: object) -> None:
        """Sets an attribute; the data of a parameter waits in a file."""
        old = getattr(owner, name)
        if isinstance(old, nn.Parameter):
            kept = self._keep(old)
            self._steps.append(lambda: setattr(owner, name, kept.recall()))
        else:
            self._steps.append(lambda: setattr(owner, name, old))
        setattr(owner, name, value)

    def keep(self, tensor: Tensor) -> None:
        """Called before the data of a tensor is changed in place."""
        kept = self._keep(tensor)

        @torch.no_grad()
        def back() -> None:
            tensor.copy_(kept.data())

        self._steps.append(back)

    def keep_members(self, module: nn.Module) -> None:
        """Called before parameters, buffers or hooks of a module are replaced by others (not changed in place)."""
        members = {key: copy.copy(value) for key, value in module.__dict__.items() if isinstance(value, dict)}
        plain = {key: value for key, value in module.__dict__.items() if not isinstance(value, dict)}

        def back() -> None:
            # The very dicts: the handles of hooks remove them from there.
            for key, value in members.items():
                module.__dict__[key].clear()
                module.__dict__[key].update(value)
            for key in [k for k in module.__dict__ if k not in members]:
                del module.__dict__[key]
            module.__dict__.update(plain)

        self._steps.append(back)

    def untie(self, model: nn.Module) -> None:
        """Tells a Hugging Face config that its lm_head is no longer tied; ``tie_weights`` would tie it again."""
        config = getattr(model, "config", None)
        if config is not None and getattr(config, "tie_word_embeddings", False):
            self.set(config, "tie_word_embeddings", False)

    def _keep(self, parameter: Tensor) -> _Kept:
        kept = next((k for k in self._kept if k.holds(parameter)), None)
        if kept is None:
            kept = _Kept(parameter, Path(self._folder.name) / str(len(self._kept)))
            self._kept.append(kept)
        return kept

    def _reviver(self, names: list[str], layer: nn.Module) -> Callable[[], None]:
        """What puts a layer back without holding it or its weight meanwhile."""
        shell, original, kept = copy.copy(layer), weakref.ref(layer), self._keep(float_parameter(layer))
        shell._parameters = {**layer._parameters, "weight": None}

        def back() -> None:
            module = original()
            if module is None:
                module = shell
                module._parameters["weight"] = kept.recall()
            self._put(names, module)

        return back

    def _put(self, names: list[str], module: nn.Module) -> None:
        for name in names:
            self._model.set_submodule(name, module)
