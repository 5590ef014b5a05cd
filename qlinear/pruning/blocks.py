"""Walks through a model while it is pruned, so that later layers are calibrated on what earlier ones now put out.

A chain is a list of blocks each of which reads the output of the one before: the decoder layers of a language model, or
the children of an ``nn.Sequential``. Its blocks are run one at a time on stored inputs, as SparseGPT's authors do,
which costs about three forward passes in all. What is no chain is measured by whole passes of the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qlinear.float_layers import float_shape
from qlinear.pruning.calibration import Collector, through_model, version_of
from qlinear.validation import call

Layers = dict[str, nn.Module]


def groups(
    model: nn.Module, layers: Layers, batches: Sequence[Any], outer: bool, memory: int
) -> Iterator[dict[str, Tensor]]:
    """The statistics of all layers, group by group; each group may be changed before the next is asked for.

    ``memory`` is the most bytes the ``[K, K]`` sums of a group may take together where the model is no chain of blocks.
    """
    for chain, members in _segments(model, layers):
        captured = _capture(model, chain, batches) if chain is not None else None
        if captured is None:
            for part in within(members, outer, memory):
                yield through_model(model, part, batches, outer).results()
            continue
        for block in captured.blocks:
            inside = {id(m) for m in block.modules()}
            own = {name: module for name, module in members.items() if id(module) in inside}
            if own:
                collector = Collector(own, outer)
                with collector.listening():
                    captured.run(block, batches, collector)
                yield collector.results()
            captured.advance(block, batches)


def _segments(model: nn.Module, layers: Layers) -> Iterator[tuple[nn.Module | None, Layers]]:
    """The layers in the order of the model, cut into possible chains and what lies between them."""
    loose: Layers = {}
    inside: dict[int, nn.Module] = {}
    names = {id(module): name for name, module in layers.items()}
    members: dict[int, Layers] = {}
    for module in model.modules():
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and id(module) not in inside:
            own = {names[id(m)]: m for m in module.modules() if id(m) in names and id(m) not in inside}
            if len(module) > 1 and own:
                inside.update((id(m), module) for m in module.modules())
                members[id(module)] = own
                if loose:
                    yield None, loose
                    loose = {}
                yield module, own
        if id(module) in names and id(module) not in inside:
            loose[names[id(module)]] = module
    if loose:
        yield None, loose


def within(layers: Mapping[str, nn.Module], outer: bool, memory: int) -> Iterator[Layers]:
    """Parts of the layers whose statistics fit into ``memory`` bytes together; at least one layer each."""
    part: Layers = {}
    used = 0
    for name, module in layers.items():
        cost = 4 * float_shape(module)[1] ** 2 if outer else 0
        if part and used + cost > memory:
            yield part
            part, used = {}, 0
        part[name] = module
        used += cost
    yield part


@dataclass
class _Captured:
    """A chain with the inputs of its next block, batch by batch, and what else each block is called with."""

    blocks: list[nn.Module]
    hidden: list[Tensor] = field(default_factory=list)
    rest: dict[tuple[int, int], tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=dict)

    def run(self, block: nn.Module, batches: Sequence[Any], collector: Collector) -> None:
        for i, batch in enumerate(batches):
            collector.start(batch)
            self.output(block, i)

    def advance(self, block: nn.Module, batches: Sequence[Any]) -> None:
        """Replaces the stored inputs by this block's outputs: after it was pruned."""
        for i in range(len(batches)):
            self.hidden[i] = self.output(block, i)

    def output(self, block: nn.Module, i: int) -> Tensor:
        args, kwargs = self.rest[id(block), i]
        # A copy: a block may begin with an operation in place.
        hidden = self.hidden[i].clone()
        args = tuple(hidden if a is _HERE else a for a in args)
        return _first(block(*args, **{k: hidden if v is _HERE else v for k, v in kwargs.items()}))


#: Stands where the hidden state goes in the arguments of a block.
_HERE = object()


class _NoChainError(Exception):
    """The blocks do not read each other's outputs, in order, once each."""


class _LastBlockDone(Exception):
    """Stops a forward pass that only the blocks of a chain are watched in."""


def _first(output: Any) -> Tensor:
    found = output if isinstance(output, Tensor) else output[0] if isinstance(output, tuple) and output else None
    if not isinstance(found, Tensor):
        raise _NoChainError
    return found


def _capture(model: nn.Module, chain: nn.Module, batches: Sequence[Any]) -> _Captured | None:
    """The inputs of a chain's blocks for all batches, or None where it is found to be none."""
    captured = _Captured(list(chain.children()))
    if len({id(b) for b in captured.blocks}) < len(captured.blocks):
        return None
    watch = _Watch(captured)
    handles = [b.register_forward_pre_hook(watch.before, with_kwargs=True) for b in captured.blocks]
    handles += [b.register_forward_hook(watch.after) for b in captured.blocks]
    try:
        for batch in batches:
            watch.start()
            # What comes after the last block is not needed.
            with suppress(_LastBlockDone):
                call(model, batch)
            watch.finish()
    except _NoChainError:
        return None
    finally:
        for handle in handles:
            handle.remove()
    return captured if watch.replays() else None


class _Watch:
    """Hooks on the blocks of a chain that record one forward pass after the other."""

    def __init__(self, captured: _Captured) -> None:
        self._captured, self._batch = captured, -1
        self._calls: list[nn.Module] = []
        self._last: Tensor | None = None
        self._version: int | None = None
        self._wanted: Tensor | None = None

    def start(self) -> None:
        self._batch, self._calls, self._last = self._batch + 1, [], None

    def finish(self) -> None:
        if [id(b) for b in self._calls] != [id(b) for b in self._captured.blocks]:
            raise _NoChainError

    def before(self, block: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        hidden = args[0] if args else kwargs.get("hidden_states")
        if not isinstance(hidden, Tensor):
            raise _NoChainError
        # What the model does to an output in place, a replay would leave out.
        if self._calls and (hidden is not self._last or version_of(hidden) != self._version):
            raise _NoChainError
        if not self._calls:
            self._captured.hidden.append(hidden.clone())
        self._calls.append(block)
        rest = tuple(_HERE if a is hidden else a for a in args)
        named = {key: _HERE if value is hidden else value for key, value in kwargs.items()}
        self._captured.rest[id(block), self._batch] = rest, named

    def after(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._last = _first(output)
        self._version = version_of(self._last)
        if self._wanted is None:
            self._wanted = self._last.clone()
        if block is self._captured.blocks[-1]:
            raise _LastBlockDone

    def replays(self) -> bool:
        """Whether the first block gives the same output again: it would not if it kept a state of its own."""
        try:
            again = self._captured.output(self._captured.blocks[0], 0)
        except (RuntimeError, TypeError, ValueError):
            return False
        return self._wanted is not None and torch.equal(again, self._wanted)
