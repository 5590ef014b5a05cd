"""Takes back a half-done change to a model: what makes ``convert`` all or nothing."""

from __future__ import annotations

import copy
import tempfile
import weakref
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor, nn


@dataclass
class _Replaced:
    names: list[str]
    #: The original layer without its weight.
    shell: nn.Module
    module: weakref.ref[nn.Module]
    weight: weakref.ref[Tensor]
    file: Path
    device: torch.device
    requires_grad: bool


class Undo:
    """Replaces modules, and puts all of them back when its ``with`` block raises.

    Weights of replaced layers wait in temporary files rather than in memory, so that a model is never held twice. Where
    somebody else still holds the original layer or weight, that very object is put back.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._replaced: list[_Replaced] = []
        self._untied: list[object] = []
        self._folder = tempfile.TemporaryDirectory(prefix="qlinear-undo-")

    def __enter__(self) -> Undo:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is not None:
                self._restore()
        finally:
            self._folder.cleanup()

    def replace(self, names: list[str], old: nn.Module, new: nn.Module) -> None:
        """Puts ``new`` at each dotted name in place of ``old``, a layer with a ``weight``."""
        weight = old.weight
        assert isinstance(weight, Tensor)
        # Layers that share a weight share its file, and share the weight again when they are put back.
        file = next((e.file for e in self._replaced if e.weight() is weight), None)
        if file is None:
            file = Path(self._folder.name) / str(len(self._replaced))
            # A copy, because torch.save writes the whole storage of a view: that of a file's every weight, perhaps.
            torch.save(weight.detach().to("cpu", copy=True), file)
        shell = copy.copy(old)
        shell._parameters = {**old._parameters, "weight": None}
        entry = (names, shell, weakref.ref(old), weakref.ref(weight), file, weight.device, weight.requires_grad)
        self._replaced.append(_Replaced(*entry))
        self._put(names, new)

    def untie(self, model: nn.Module) -> None:
        """Tells a Hugging Face config that its lm_head is no longer tied; ``tie_weights`` would tie it again."""
        config = getattr(model, "config", None)
        if config is not None and getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False
            self._untied.append(config)

    def _put(self, names: list[str], module: nn.Module) -> None:
        for name in names:
            self._model.set_submodule(name, module)

    def _restore(self) -> None:
        loaded: dict[Path, nn.Parameter] = {}
        for entry in self._replaced:
            module = entry.module()
            if module is None:
                module, weight = entry.shell, entry.weight()
                if weight is None:
                    if entry.file not in loaded:
                        loaded[entry.file] = nn.Parameter(torch.load(entry.file).to(entry.device), entry.requires_grad)
                    weight = loaded[entry.file]
                module._parameters["weight"] = weight  # type: ignore[assignment]
            self._put(entry.names, module)
        for config in self._untied:
            config.tie_word_embeddings = True  # type: ignore[attr-defined]
