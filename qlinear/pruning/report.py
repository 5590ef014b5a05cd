"""What sparsity there is in a model, and what it would be worth in each format that could hold it: a prediction."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from qlinear.float_layers import float_matrix
from qlinear.format import FORMATS, Format
from qlinear.machines import MACHINES, STREAMED
from qlinear.selection import Candidate, candidates
from qlinear.sparse import holds, pays, stored_share
from qlinear.tables import digits, human_bytes, table

#: Instructions for each weight, stored or not, of the kernels that may take longer to expand their bytes than to read
#: them, by architecture: `python -m bench audit --arch all` counts them (float16, up to 16 tokens), and tests compare.
SLOTS = {
    "sm_80": {"w8a16-unstructured": 18.8, "w16a16-unstructured": 14.8},
    "sm_89": {"w8a16-unstructured": 19.1, "w16a16-unstructured": 14.8},
    "sm_90": {
        "w4a16-2:4": 2.89,
        "w4a16-asym-2:4": 3.03,
        "w8a16-unstructured": 18.8,
        "w16a16-unstructured": 14.7,
    },
    "sm_100": {
        "w4a16-g64": 2.73,
        "w4a16-g64-asym": 2.81,
        "w4a16-2:4": 3.31,
        "w4a16-asym-2:4": 3.32,
        "w8a16-2:4": 3.99,
        "w8a16-unstructured": 18.5,
        "w16a16-unstructured": 15.0,
    },
}
#: What a layer is taken in, where nothing else is said: as it is.
FLOAT = "float"
#: Layers that are named before the rest of them is counted.
_NAMED = 4


@dataclass(frozen=True)
class LayerSparsity:
    """One linear layer: its share of zeros, its bytes now, and predicted bytes in each format that could hold it."""

    name: str
    shape: tuple[int, int]
    sparsity: float
    bytes_now: int
    #: Predicted bytes by the name of the scheme, over every format whose pattern the weight has; an output head has it
    #: where ``convert`` takes it so without being told.
    predicted: dict[str, int]
    #: Whether it is the model's output head.
    head: bool = False

    @property
    def weights(self) -> int:
        """Zeros among them."""
        return self.shape[0] * self.shape[1]

    @property
    def smallest(self) -> str:
        """The scheme of the fewest bytes."""
        return min(self.predicted, key=lambda name: self.predicted[name])

    def smallest_of(self, bits: int) -> str | None:
        """The scheme of the fewest bytes among those of so many bits a stored weight."""
        own = {name: size for name, size in self.predicted.items() if FORMATS[name].bits == bits}
        return min(own, key=lambda name: own[name]) if own else None

    def taken_in(self, scheme: str) -> str:
        """The scheme itself where the layer can hold it, else the dense one of the same codes, else ``"float"``."""
        dense = FORMATS[scheme].dense if scheme in FORMATS else None
        found = (name for name in (scheme, dense and dense.name) if name in self.predicted)
        return next(found, FLOAT)

    def bytes_in(self, scheme: str) -> int:
        """Predicted bytes as :meth:`taken_in` says."""
        return self.predicted.get(self.taken_in(scheme), self.bytes_now)


@dataclass(frozen=True)
class SparsityReport:
    """Sparsity by layer and predictions; ``print`` shows a table, :meth:`to_dict` gives plain data.

    Times are predictions, not measurements: bytes over the bandwidth of ``machine``, which is what a layer costs that
    multiplies few tokens with a kernel bound by memory, or where that is more the instructions that expand them.
    """

    layers: list[LayerSparsity]
    machine: str

    @property
    def sparsity(self) -> float:
        """The share of zeros over all linear layers."""
        return sum(layer.sparsity * layer.weights for layer in self.layers) / self.weights

    @property
    def weights(self) -> int:
        """All weights, zeros among them."""
        return sum(layer.weights for layer in self.layers)

    def cannot_hold(self) -> dict[str, list[str]]:
        """The layers without the pattern, for each sparse scheme that some layers can hold and some cannot.

        ``convert`` raises there. An output head is none of them: it is given a dense scheme.
        """
        others = [layer for layer in self.layers if not layer.head]
        found = {name: [layer.name for layer in others if name not in layer.predicted] for name in self.totals()}
        return {name: layers for name, layers in found.items() if layers}

    def totals(self) -> dict[str, int]:
        """Predicted bytes of all layers together, for each format that one of them at least could hold.

        A layer that cannot hold a sparse format is taken in the dense one of the same codes, or as it is where that is
        float. ``convert`` takes an output head so; other layers have to be given that scheme: see :meth:`cannot_hold`.
        """
        names = [name for name in FORMATS if any(name in layer.predicted for layer in self.layers)]
        return {name: sum(layer.bytes_in(name) for layer in self.layers) for name in names}

    def times(self) -> dict[str, float]:
        """Predicted microseconds of all layers one after the other, for the formats of :meth:`totals`."""
        return {name: sum(self.layer_microseconds(layer, name) for layer in self.layers) for name in self.totals()}

    def microseconds(self, size: float, scheme: str = FLOAT, weights: int = 0) -> float:
        """The predicted time on the machine to read so many bytes once, or to expand so many weights of a scheme."""
        machine = MACHINES[self.machine]
        slots = SLOTS[machine.arch].get(scheme, 0.0)
        return 1e6 * max(size / machine.stream_bytes_per_s, slots * weights / machine.slots_per_s)

    def layer_microseconds(self, layer: LayerSparsity, scheme: str) -> float:
        """:meth:`microseconds` of one layer, in what :meth:`LayerSparsity.taken_in` says."""
        return self.microseconds(layer.bytes_in(scheme), layer.taken_in(scheme), layer.weights)

    def outdone(self) -> dict[str, dict[str, Any]]:
        """The sparse schemes that a dense one is faster than: ``{sparse: {"by": dense, "smaller": bool}}``.

        Both over the layers that can hold the sparse one: what cannot is dense in either case. One that is smaller
        too, if there is any; of several the one of the most bits.
        """
        found = {}
        for name in self.totals():
            if FORMATS[name].sparsity is not None:
                better = self._better(name, [layer for layer in self.layers if name in layer.predicted])
                if better is not None:
                    found[name] = better
        return found

    def _better(self, sparse: str, layers: Sequence[LayerSparsity]) -> dict[str, Any] | None:
        names = [name for name in layers[0].predicted if FORMATS[name].sparsity is None]
        sizes = {name: sum(layer.predicted[name] for layer in layers) for name in (sparse, *names)}
        times = {name: sum(self.layer_microseconds(layer, name) for layer in layers) for name in sizes}

        def rank(name: str) -> tuple[bool, int, bool]:
            fmt = FORMATS[name]
            return sizes[name] < sizes[sparse], fmt.bits, not fmt.quantized_activations

        faster = [name for name in names if times[name] < times[sparse]]
        if not faster:
            return None
        best = max(faster, key=rank)
        return {"by": best, "smaller": sizes[best] < sizes[sparse]}

    def to_dict(self) -> dict[str, Any]:
        """Plain data.

        ``{"machine", "sparsity", "predicted_bytes", "predicted_microseconds", "cannot_hold", "outdone", "layers"}``.
        """
        layers = [
            asdict(layer)
            | {"predicted_microseconds": {name: self.layer_microseconds(layer, name) for name in layer.predicted}}
            for layer in self.layers
        ]
        together = {"predicted_bytes": self.totals(), "predicted_microseconds": self.times()}
        head = {"machine": self.machine, "sparsity": self.sparsity}
        return {**head, **together, "cannot_hold": self.cannot_hold(), "outdone": self.outdone(), "layers": layers}

    def __str__(self) -> str:
        lines = [
            self._layer_table(),
            f"zeros over all: {self.sparsity:.1%}. Predicted for all layers together, one read of the weights:",
            self._total_table(),
            *self._remarks(),
            f"predictions: bytes over {STREAMED:.0%} of the data sheet's bandwidth or, where that is more, the "
            "instructions that expand them; nothing was measured",
        ]
        return "\n".join(lines)

    def _layer_table(self) -> str:
        bits = sorted({fmt.bits for fmt in FORMATS.values()}, reverse=True)
        on = f"us on {self.machine}"
        header = ("layer", "shape", "zeros", "float", on, *(text for b in bits for text in (f"best of {b} bits", on)))
        rows = []
        for layer in self.layers:
            cells = [layer.name, "x".join(map(str, layer.shape)), f"{layer.sparsity:.1%}", human_bytes(layer.bytes_now)]
            cells.append(digits(self.layer_microseconds(layer, FLOAT)))
            for best in map(layer.smallest_of, bits):
                held = "-" if best is None else f"{best} {human_bytes(layer.predicted[best])}"
                cells += [held, "" if best is None else digits(self.layer_microseconds(layer, best))]
            rows.append(cells)
        return table(header, rows, right=(2, 3, 4, *range(6, len(header), 2)))

    def _total_table(self) -> str:
        now, times = sum(layer.bytes_now for layer in self.layers), self.times()
        rows = [("float, as it is", human_bytes(now), digits(self.microseconds(now)), "1.00", "")]
        for name, size in sorted(self.totals().items(), key=lambda item: item[1]):
            held = sum(name in layer.predicted for layer in self.layers)
            share = "all" if held == len(self.layers) else f"{held} of {len(self.layers)}"
            rows.append((name, human_bytes(size), digits(times[name]), f"{now / size:.2f}", share))
        header = ("scheme", "bytes", f"us on {self.machine}", "times smaller", "layers in it")
        return table(header, rows, right=(1, 2, 3, 4))

    def _remarks(self) -> Iterator[str]:
        """Which layers have no pattern, and where a dense format is better."""
        for head in (layer for layer in self.layers if layer.head):
            unpruned = [name for name in self.totals() if name not in head.predicted]
            if unpruned:
                yield (
                    f"the output head, {head.name}, is not pruned for {', '.join(unpruned)}: counted, and converted, "
                    "in the dense scheme of the same codes; where those are 16-bit floats, as it is"
                )
        alike: dict[tuple[str, ...], list[str]] = {}
        for scheme, absent in self.cannot_hold().items():
            alike.setdefault(tuple(absent), []).append(scheme)
        for names, schemes in alike.items():
            first = next(layer for layer in self.layers if layer.name == names[0])
            dense = first.taken_in(schemes[0])
            rules = dict.fromkeys(names[:_NAMED], None if dense == FLOAT else dense)
            some, left = ", ".join(rules), len(names) - len(rules)
            mapping = ", ".join(f"{name!r}: {rule!r}" for name, rule in rules.items())
            yield (
                f"without the pattern of {', '.join(schemes)}: {some}{f' and {left} more' if left else ''}. Counted in "
                "the dense scheme of the same codes, 16-bit floats as they are; to convert so: "
                f"{{{mapping}{', ...' if left else ''}, '*': {schemes[0]!r}}}"
            )
        for name, better in self.outdone().items():
            how = "smaller and faster" if better["smaller"] else "faster, and larger"
            yield f"{name}: {better['by']} without sparsity is {how}"


def report(model: nn.Module, machine: str = "H200", formats: Mapping[str, Format] = FORMATS) -> SparsityReport:
    """The sparsity of a float model's linear layers and what each format would make of it, before converting.

    Works on any model: zeros in the weights are all it looks at, whoever made them. Nothing is run.

    Args:
        model: a float model; layers that are converted already are not listed.
        machine: the GPU whose memory bandwidth turns bytes into a time: one of
            :data:`qlinear.machines.MACHINES`.
        formats: the formats to predict; all that exist.

    Raises:
        ValueError: an unknown machine, or no linear layer in float.
    """
    if machine not in MACHINES:
        raise ValueError(f"machine {machine!r} is not known; the machines are: {', '.join(MACHINES)}")
    layers = [_layer(c, formats) for c in candidates(model) if c.tied_to is None]
    if not layers:
        raise ValueError("the model has no linear layer in float")
    return SparsityReport(layers, machine)


def _layer(layer: Candidate, formats: Mapping[str, Format]) -> LayerSparsity:
    weight, taken = float_matrix(layer.module), pays if layer.head else holds
    predicted = {name: _bytes(fmt, weight) for name, fmt in formats.items() if taken(weight, fmt)}
    n, k = weight.shape
    zeros = float((weight == 0).double().mean())
    return LayerSparsity(layer.name, (n, k), zeros, weight.numel() * weight.element_size(), predicted, layer.head)


def _bytes(fmt: Format, weight: Tensor) -> int:
    n, k = weight.shape
    scale_bytes = fmt.scale_dtype(weight.dtype).itemsize
    return fmt.weight_bytes(n, k, scale_bytes, density=stored_share(weight, fmt))
