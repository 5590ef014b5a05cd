"""Linear layers in float: ``nn.Linear`` and Hugging Face's ``Conv1D``, with or without ``torch.nn.utils.prune``."""

from __future__ import annotations

import sys

from torch import Tensor, nn


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is Hugging Face's ``Conv1D`` (GPT-2): a linear layer whose weight is ``[in, out]``."""
    library = sys.modules.get("transformers.pytorch_utils")
    return library is not None and isinstance(module, library.Conv1D)


def is_linear(module: nn.Module) -> bool:
    """Whether this is an ``nn.Linear`` or a ``Conv1D``."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def feature_counts(module: nn.Module, out_features: int, in_features: int) -> dict[str, int]:
    """The attributes by which a linear layer tells its shape, with these values."""
    names = ("nf", "nx") if is_conv1d(module) else ("out_features", "in_features")
    return dict(zip(names, (out_features, in_features), strict=True))


def float_parameter(module: nn.Module, name: str = "weight") -> Tensor:
    """The parameter behind a linear layer's weight: ``weight_orig`` where ``torch.nn.utils.prune`` put a mask on it."""
    parameter = module._parameters.get(f"{name}_orig", getattr(module, name))
    assert isinstance(parameter, Tensor)
    return parameter


def float_tensor(module: nn.Module, name: str = "weight") -> Tensor | None:
    """A linear layer's weight or bias as it is; with a mask of ``torch.nn.utils.prune`` applied as it is now.

    Such a layer's own ``weight`` is the product as of its last forward, before the optimizer's step.
    """
    mask = module._buffers.get(f"{name}_mask")
    if mask is None or f"{name}_orig" not in module._parameters:
        tensor = getattr(module, name)
        assert tensor is None or isinstance(tensor, Tensor)
        return tensor
    return float_parameter(module, name).detach() * mask


def float_matrix(module: nn.Module) -> Tensor:
    """A linear layer's weight as ``[out_features, in_features]``, as :func:`float_tensor` has it, detached."""
    weight = float_tensor(module)
    assert weight is not None
    return weight.detach().t() if is_conv1d(module) else weight.detach()


def float_shape(module: nn.Module) -> tuple[int, int]:
    """(out_features, in_features) of an ``nn.Linear`` or ``Conv1D``."""
    weight = float_parameter(module)
    n, k = reversed(weight.shape) if is_conv1d(module) else weight.shape
    return n, k
