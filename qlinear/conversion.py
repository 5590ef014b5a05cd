"""``convert``: swaps the linear layers of a model for quantized ones, in place, all or nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils.prune import BasePruningMethod
from tqdm import tqdm

from qlinear.float_layers import float_matrix, float_parameter
from qlinear.format import Scheme
from qlinear.linear import QLinear
from qlinear.selection import Candidate, choose
from qlinear.sparse import pays
from qlinear.undo import Undo

#: A scheme for every linear layer, or an ordered mapping of name patterns to schemes (None leaves a layer in float).
What = str | Scheme | Mapping[str, str | Scheme | None]

#: Weights from which the work is long enough for a progress bar (on a terminal).
_LONG = 50_000_000


def convert(
    model: nn.Module,
    what: What,
    *,
    compute_dtype: torch.dtype | None = None,
    keep_dense: bool = False,
    progress: bool | None = None,
    prune: str | None = None,
) -> nn.Module:
    """Swaps ``nn.Linear`` and Hugging Face ``Conv1D`` for :class:`~qlinear.QLinear`, in place; returns the root.

    Args:
        model: any module; when it is itself a linear layer, the new layer is returned.
        what: a scheme, or an ordered mapping from patterns to schemes. A pattern is a glob over the layer's dotted name
            (``"*.mlp.*"``) or a regular expression after ``re:`` that must match the whole name; the first that matches
            wins, and None leaves the layer in float. A layer whose weight is tied to another module (an ``lm_head``
            tied to the embedding) is left alone unless a pattern is its exact name. The output head
            (``get_output_embeddings()``), which :func:`qlinear.prune` leaves alone unless it is asked for by its exact
            name, takes the dense scheme of the same codes in the place of a sparse one (``w4a16`` of ``w4a16-2:4``,
            float of ``w16a16-2:4``), unless it is pruned too or a pattern is its exact name.
        compute_dtype: compute in this dtype, whatever the input's: ``torch.bfloat16`` makes a float32 model fast on
            a CPU.
        keep_dense: keep a 16-bit copy of every converted weight for many tokens (:meth:`QLinear.keep_dense`): long
            prompts are as fast as in 16 bit, and the model takes more memory than it did. Not of block schemes.
        progress: a progress bar on standard error; None shows it where the work is long.
        prune: how a weight is brought into the pattern of a sparse scheme, for example ``"magnitude"``; None where the
            model is pruned already, or no layer's scheme is sparse. Layers with a dense scheme are not pruned, nor is
            an output head that was not asked for by its exact name.

    A module used twice is converted once. Peak extra memory is one layer: what is replaced is kept in a temporary
    file until the end. Any failure leaves the model exactly as it was.

    Raises:
        ValueError: unknown scheme, a pattern that matches no linear layer, nothing to convert, a layer that was
            asked for and cannot be converted, or cannot keep a copy, a weight that does not have the pattern of its
            sparse scheme, or ``prune`` where no scheme is sparse; the message names the layer or the schemes.
    """
    jobs = _jobs(model, what, prune)
    quiet = no_bar([job.layer.module for job in jobs], progress)
    with Undo(model) as undo:
        for job in tqdm(jobs, desc="quantizing", unit="layer", disable=quiet):
            layer = job.layer
            try:
                new = QLinear.from_float(layer.module, job.scheme, compute_dtype, job.prune)
                if keep_dense:
                    new.keep_dense()
            except (ValueError, TypeError, RuntimeError) as error:
                raise type(error)(f"layer {layer.name!r} ({job.scheme}): {error}") from error
            _keep_hooks(layer.module, new)
            if "" in layer.names:
                return new
            # The undo log takes the layer over, so that its weight is freed before the next one is made.
            undo.replace(layer.names, layer.module, new)
            if layer.tied_to is not None:
                undo.untie(model)
            del layer.module
    return model


@dataclass(frozen=True)
class _Job:
    """One layer to convert."""

    layer: Candidate
    scheme: Scheme
    prune: str | None


def _jobs(model: nn.Module, what: What, prune: str | None) -> list[_Job]:
    """What is to be done to each layer; raises a ValueError where that is nothing, or ``prune`` has nothing to do."""
    asked = [(c, c.asked) for c in choose(model, _rules(what), "convert") if c.asked is not None]
    jobs = []
    for choice, scheme in asked:
        if not choice.head_in_passing:
            jobs.append(_Job(choice.layer, scheme, prune))
        elif (own := _head_scheme(choice.layer.module, scheme)) is not None:
            jobs.append(_Job(choice.layer, own, None))
    if not jobs:
        choice, scheme = asked[0]
        raise ValueError(
            f"nothing to convert but the output head {choice.layer.name!r}, which is not pruned for {scheme} and stays "
            "in float unless it is asked for by its exact name"
        )
    if prune is not None and not any(job.scheme.format.sparsity for job in jobs):
        names = ", ".join(sorted({str(job.scheme) for job in jobs}))
        sparse = any(scheme.format.sparsity for _, scheme in asked)
        head = "; the output head has to be asked for by its exact name" if sparse else ""
        raise ValueError(
            f"prune={prune!r} brings weights into the pattern of a sparse scheme (such as w4a16-2:4), and {names} has "
            f"none: prune the model with qlinear.prune, or leave the argument out{head}"
        )
    return jobs


def _head_scheme(head: nn.Module, scheme: Scheme) -> Scheme | None:
    """The scheme of an output head that was not asked for by name, as ``prune`` leaves it; None leaves it in float."""
    weight, dense = float_matrix(head), scheme.format.dense
    if scheme.format.sparsity is None or weight.is_meta or pays(weight, scheme.format):
        return scheme
    return None if dense is None else Scheme.parse(dense.name)


def no_bar(layers: Iterable[nn.Module], progress: bool | None) -> bool | None:
    """What tqdm's ``disable`` takes: None is a bar on a terminal, where the work on these layers is long."""
    weights = sum(float_parameter(layer).numel() for layer in layers)
    return (True if weights < _LONG else None) if progress is None else not progress


def prepare(model: nn.Module, layout: str | None = None) -> nn.Module:
    """Puts every quantized layer into the layout its device computes with: after loading plain weights by hand.

    ``layout="cpu"`` before ``torch.export``, ``torch.jit.trace``, AOTInductor or ``share_memory`` of a model with
    ``w8a8`` layers on a CPU: their fastest layouts, ``fbgemm`` and ``onednn``, have no storage to read or share.

    Raises:
        ValueError: a layer has no such layout; it is named, and all layers are in the layouts they were in.
    """
    done: list[tuple[QLinear, str]] = []
    for name, module in model.named_modules():
        if not isinstance(module, QLinear):
            continue
        done.append((module, module.layout))
        try:
            module.prepare(layout)
        except ValueError as error:
            for changed, before in done:
                changed.prepare(before)
            raise ValueError(f"layer {name!r}: {error}") from None
    return model


def unprepare(model: nn.Module) -> nn.Module:
    """Puts every quantized layer back into the plain layout: before a library moves its buffers by hand."""
    for module in model.modules():
        if isinstance(module, QLinear):
            module.unprepare()
    return model


def _rules(what: What) -> list[tuple[str | None, Scheme | None]]:
    if isinstance(what, Mapping):
        if not what:
            raise ValueError("the mapping of patterns to schemes is empty")
        return [(pattern, None if scheme is None else Scheme.parse(scheme)) for pattern, scheme in what.items()]
    return [(None, Scheme.parse(what))]


def _keep_hooks(old: nn.Module, new: nn.Module) -> None:
    """Forward hooks that someone put on the layer go on working; a torch.nn.utils.prune mask is in the weight now."""
    for key, value in old.__dict__.items():
        if key.startswith(("_forward_", "_backward_")) and isinstance(value, dict):
            hooks = {i: hook for i, hook in value.items() if not isinstance(hook, BasePruningMethod)}
            # The very dict otherwise: a hook's handle removes it from there.
            new.__dict__[key] = value if len(hooks) == len(value) else type(value)(hooks)
    new._is_full_backward_hook = old._is_full_backward_hook
