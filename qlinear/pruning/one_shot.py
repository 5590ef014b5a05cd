"""``prune``: makes weights zero, or removes neurons and heads, in place, all or nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from qlinear.conversion import no_bar
from qlinear.float_layers import float_parameter
from qlinear.format import Scheme
from qlinear.masks import masks
from qlinear.patterns import Pattern
from qlinear.pruning import blocks, scores, structured
from qlinear.pruning.calibration import evaluating, through_model
from qlinear.pruning.rounding import Rounding
from qlinear.pruning.sparsegpt import shrunk, sweep
from qlinear.pruning.targets import Share, Target, fold_layers, linear_layers, matrix, targets
from qlinear.undo import Undo

METHODS = ("magnitude", "wanda", "sparsegpt", "gradient")
SCOPES = ("layer", "global")


@dataclass(frozen=True)
class _Job:
    """Everything that was asked for, once it is known to make sense."""

    model: nn.Module
    method: str
    pattern: Pattern
    batches: list[Any]
    scope: str
    loss: scores.Loss | None
    scheme: Scheme | None
    damping: float
    shrinkage: float
    block_size: int
    hessian_bytes: int
    quiet: bool | None
    layers: list[Target]
    undo: Undo

    def bar(self, things: Iterable[Any], total: int | None = None) -> Any:
        return tqdm(things, desc="pruning", unit="layer", total=total, disable=self.quiet)

    @property
    def modules(self) -> dict[str, nn.Module]:
        return {target.name: target.module for target in self.layers}


def prune(
    model: nn.Module,
    method: str = "magnitude",
    sparsity: Share = None,
    pattern: str | Pattern = "unstructured",
    calibration: Iterable[Any] | None = None,
    scope: str = "layer",
    *,
    loss: scores.Loss | None = None,
    scheme: str | Scheme | None = None,
    damping: float = 0.01,
    shrinkage: float = 0.25,
    block_size: int = 128,
    hessian_bytes: int = 4 << 30,
    progress: bool | None = None,
) -> nn.Module:
    """Prunes the linear layers that :func:`qlinear.convert` would convert, in place; returns the root.

    The result is an ordinary float model. Zeros in the weights are the mask, and nothing else is kept: save it, train
    it further (:class:`~qlinear.pruning.Gradual` keeps zeros through training) or convert it.

    Args:
        model: any module, with its weights loaded.
        method: ``"magnitude"`` (L1); ``"wanda"`` (arXiv:2306.11695), which ranks ``|w| * norm(x)`` within each output
            row; ``"sparsegpt"`` (arXiv:2301.00774), which changes the remaining weights to make good for the lost ones;
            ``"gradient"``, first-order Taylor ``|w * dL/dw|`` summed over the calibration batches (arXiv:1611.06440).
        sparsity: the share of weights (or of neurons, or heads) to remove, or an ordered mapping of patterns over layer
            names to shares, as in ``convert`` (``{"re:.*mlp.*": 0.5, "*": None}``); None where ``n:m`` fixes it.
            The output head (``get_output_embeddings()``), and layers tied to another, are left alone unless a pattern
            is their exact name; ``convert`` then takes the head in a dense scheme.
        pattern: see :class:`~qlinear.pruning.Pattern`: ``"unstructured"``, ``"2:4"``, ``"block64"``, ``"block128x64"``,
            ``"neurons"``, ``"heads"``... Blocks, neurons and heads are ranked by the sum of their weights' scores.
            Neurons and heads change shapes: the layer that consumes them (``down_proj``, ``o_proj``) decides the share;
            widths that are a multiple of 128 stay one; the config is updated so that the model can be saved and loaded
            again. The configs of GPT-2 and BERT have no ``head_dim`` and cannot say how many heads are left: such a
            model is converted first, and then written by :func:`qlinear.save`, which lists the shapes.
        calibration: what the model is called with (mappings, tuples or single tensors, on the model's device), for
            every method but magnitude. Positions whose ``attention_mask`` is 0 do not count.
        scope: ``"layer"`` ranks within each layer (Wanda within each row, SparseGPT within a block of columns);
            ``"global"`` ranks all layers together (magnitude and gradient only).
        loss: called as ``loss(model, batch)``, returns a scalar; for ``"gradient"``.
        scheme: SparseGPT also rounds to this integer scheme in the same sweep: ``convert(model, scheme)`` then finds
            the very codes the sweep chose, also after the model was saved and loaded.
        damping: SparseGPT's addition to the Hessian's diagonal, as a share of its mean.
        shrinkage: the share by which SparseGPT discounts correlations between inputs: 0 is the paper's, and near 1 it
            ranks as Wanda does and changes no other weight. See :func:`qlinear.pruning.sparsegpt.shrunk` for why.
        block_size: columns that SparseGPT ranks together.
        hessian_bytes: the most bytes of Hessians held at a time where the model is no chain of blocks.
        progress: a progress bar on standard error; None shows it where the work is long.

    Wanda and SparseGPT go through a model block by block, so that each is calibrated on what the pruned blocks before
    it put out. Masks of ``torch.nn.utils.prune`` on the layers, and on those that lose neurons or heads with them,
    become permanent, and their zeros go first. Any failure leaves the model exactly as it was.

    Raises:
        ValueError: an argument that is unknown, missing or does not go with the others, a layer that cannot be pruned
            or got no calibration data, or an MLP or attention that is not known to work without some of its neurons or
            heads; the message names the layer.
    """
    kind = Pattern.parse(pattern)
    _check(method, kind, scope, calibration, loss, scheme)
    if not damping > 0 or not 0 <= shrinkage < 1 or block_size < 1:
        got = f"damping={damping!r}, shrinkage={shrinkage!r}, block_size={block_size!r}"
        raise ValueError(f"damping > 0, 0 <= shrinkage < 1 and block_size >= 1 are wanted, got {got}")
    batches = [] if calibration is None or method == "magnitude" else list(calibration)
    if method != "magnitude" and not batches:
        raise ValueError(f"method {method!r} was given no calibration batches")
    with Undo(model) as undo:
        layers = targets(model, sparsity, kind, scope)
        quiet = no_bar([t.module for t in layers], progress)
        parsed = None if scheme is None else Scheme.parse(scheme)
        rest = (damping, shrinkage, block_size, hessian_bytes, quiet, layers, undo)
        job = _Job(model, method, kind, batches, scope, loss, parsed, *rest)
        fold_layers(job.modules.values(), undo)
        if kind.structured:
            _remove_units(job)
        elif method in ("magnitude", "gradient"):
            _rank(job)
        else:
            _calibrated(job)
    return model


def _check(
    method: str,
    pattern: Pattern,
    scope: str,
    calibration: Iterable[Any] | None,
    loss: scores.Loss | None,
    scheme: str | Scheme | None,
) -> None:
    if method not in METHODS:
        raise ValueError(f"method {method!r} does not exist; the methods are: {', '.join(METHODS)}")
    if scope not in SCOPES:
        raise ValueError(f"scope {scope!r} does not exist; the scopes are: {', '.join(SCOPES)}")
    if scope == "global" and (method not in ("magnitude", "gradient") or pattern.kind == "n:m"):
        raise ValueError(f"method {method!r} with pattern {pattern} does not rank layers together: scope is 'layer'")
    if method != "magnitude" and calibration is None:
        raise ValueError(f"method {method!r} needs calibration batches")
    if (method == "gradient") != (loss is not None):
        raise ValueError(f"loss=callable(model, batch) belongs to method 'gradient', got {loss!r} with {method!r}")
    if scheme is not None and (method != "sparsegpt" or pattern.structured):
        raise ValueError(f"scheme rounds within a sweep of 'sparsegpt', not with {method!r} and pattern {pattern}")
    if scheme is not None:
        Rounding(scheme, torch.float32)  # refuses what is no integer scheme


@torch.no_grad()
def _zero(job: _Job, target: Target, mask: Tensor) -> None:
    job.undo.keep(float_parameter(target.module))
    target.matrix.masked_fill_(mask, 0)


def _rank(job: _Job) -> None:
    """Methods that score all weights of the model as it is."""
    shares = [t.sparsity for t in job.layers]
    if job.method == "gradient":
        assert job.loss is not None
        by_name = scores.gradient(job.model, job.modules, job.batches, job.loss)
        found = [by_name[t.name] for t in job.layers]
        everything = masks(found, job.pattern, shares, job.scope)
    elif job.scope == "global":
        everything = masks([scores.magnitude(t.matrix) for t in job.layers], job.pattern, shares, "global")
    else:
        everything = []
    for i, target in enumerate(job.bar(job.layers)):
        if everything:
            mask = everything[i]
        else:
            mask = masks([scores.magnitude(target.matrix)], job.pattern, [target.sparsity], "layer")[0]
        _zero(job, target, mask)


def _calibrated(job: _Job) -> None:
    """Wanda and SparseGPT, block by block."""
    by_name = {target.name: target for target in job.layers}
    outer = job.method == "sparsegpt"
    with evaluating(job.model), job.bar((), len(job.layers)) as bar:
        for group in blocks.groups(job.model, job.modules, job.batches, outer, job.hessian_bytes):
            for name, second in group.items():
                target = by_name[name]
                if outer:
                    _sweep(job, target, second)
                else:
                    scored = scores.wanda(target.matrix, second)
                    _zero(job, target, masks([scored], job.pattern, [target.sparsity], "row")[0])
                bar.update()


def _sweep(job: _Job, target: Target, hessian: Tensor) -> None:
    weight = target.matrix
    try:
        rounding = None if job.scheme is None else Rounding(job.scheme, weight.dtype)
        new = sweep(
            weight,
            shrunk(hessian, job.shrinkage),
            job.pattern,
            target.sparsity,
            rounding=rounding,
            block_size=job.block_size,
            damping=job.damping,
        )
    except (ValueError, RuntimeError) as error:
        raise type(error)(f"layer {target.name!r}: {error}") from error
    job.undo.keep(float_parameter(target.module))
    weight.copy_(new)


def _remove_units(job: _Job) -> None:
    """Neurons and heads."""
    cuts = structured.plan(job.model, job.layers, job.pattern.kind, job.scope)
    fold_layers([layer for cut in cuts for layer in cut.structure.layers], job.undo)
    if job.method == "sparsegpt":
        _remove_compensated(job, cuts)
        return
    found = _unit_scores(job, cuts)
    keep = structured.kept_units(cuts, found, job.scope)
    for cut, left in zip(job.bar(cuts), keep, strict=True):
        structured.remove(cut, left, job.undo)
        structured.update_config(cut, len(left), job.undo)


def _unit_scores(job: _Job, cuts: Sequence[structured.Cut]) -> list[Tensor]:
    inside = {id(layer) for cut in cuts for layer in cut.structure.layers}
    layers = {name: layer for name, layer in linear_layers(job.model).items() if id(layer) in inside}
    statistics: dict[str, Tensor] = {}
    if job.method == "gradient":
        assert job.loss is not None
        statistics = scores.gradient(job.model, layers, job.batches, job.loss)
    elif job.method == "wanda":
        with evaluating(job.model):
            statistics = through_model(job.model, layers, job.batches, False).results()
    names = {id(layer): name for name, layer in layers.items()}

    def score(layer: nn.Module) -> Tensor:
        if job.method == "gradient":
            return statistics[names[id(layer)]]
        if job.method == "wanda":
            return scores.wanda(matrix(layer), statistics[names[id(layer)]])
        return scores.magnitude(matrix(layer))

    return [structured.unit_scores(cut.structure, score) for cut in cuts]


def _remove_compensated(job: _Job, cuts: Sequence[structured.Cut]) -> None:
    """SparseGPT's idea for whole units: those the rest can best make good for go, and the rest is refitted."""
    by_name = {cut.structure.name: cut for cut in cuts}
    consumers = {cut.structure.name: cut.structure.consumer.layer for cut in cuts}
    with evaluating(job.model), job.bar((), len(cuts)) as bar:
        for part in blocks.within(consumers, True, job.hessian_bytes):
            hessians = through_model(job.model, part, job.batches, True).results()
            for name, layer in part.items():
                cut, weight = by_name[name], matrix(layer)
                size, hessian = cut.structure.consumer.size, shrunk(hessians[name], job.shrinkage)
                errors = structured.removal_errors(weight, hessian, size, job.damping)
                left = structured.kept_units([cut], [errors], "layer")[0]
                columns = structured.columns(cut.structure.consumer, left, cut.structure.units)
                refitted = structured.compensated(weight, hessian, columns, job.damping)
                structured.remove(cut, left, job.undo, refitted)
                structured.update_config(cut, len(left), job.undo)
                bar.update()
