"""What sparsity there is in a model, and what it would be worth in each format that could hold it: a prediction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from qlinear.conversion import candidates
from qlinear.float_layers import float_tensor, is_conv1d
from qlinear.format import FORMATS, Format
from qlinear.machines import MACHINES, STREAMED
from qlinear.masks import block_sums
from qlinear.patterns import Pattern
from qlinear.tables import human_bytes, table

#: Instructions for each weight, stored or not, of the kernels that may take longer to expand their bytes than to read
#: them: `python -m bench audit` counts them (sm_90, float16, up to 16 tokens), and a test compares.
SLOTS = {
    "w4a16-2:4": 2.89,
    "w4a16-asym-2:4": 3.03,
    "w8a16-unstructured": 18.8,
    "w16a16-unstructured": 14.7,
}


def holds(fmt: Format, weight: Tensor) -> bool:
    """Whether a weight ``[N, K]`` has a format's pattern, as ``convert`` asks: no non-zero lost, something left out."""
    pattern = _pattern(fmt)
    return pattern is None or (pattern.holds(weight) and stored_share(fmt, weight) < 1)


def stored_share(fmt: Format, weight: Tensor) -> float:
    """The share of weights (of blocks, in a block format) that a format stores of ``weight`` ``[N, K]``."""
    pattern = _pattern(fmt)
    if pattern is None:
        return 1.0
    if pattern.kind == "n:m":
        return pattern.n / pattern.m
    units = block_sums((weight != 0).float(), pattern) if pattern.kind == "block" else weight
    return float((units != 0).float().mean())


def _pattern(fmt: Format) -> Pattern | None:
    return None if fmt.sparsity is None else Pattern.parse(fmt.sparsity)


def _bytes(fmt: Format, weight: Tensor) -> int:
    n, k = weight.shape
    scale_bytes = fmt.scale_dtype(weight.dtype).itemsize
    return fmt.weight_bytes(n, k, scale_bytes, density=stored_share(fmt, weight))


@dataclass(frozen=True)
class LayerSparsity:
    """One linear layer: its share of zeros, its bytes now, and predicted bytes in each format that could hold it."""

    name: str
    shape: tuple[int, int]
    sparsity: float
    bytes_now: int
    #: Predicted bytes by the name of the scheme, over every format whose pattern the weight has.
    predicted: dict[str, int]

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

    def totals(self) -> dict[str, int]:
        """Predicted bytes of all layers together, for each format that could hold every one of them."""
        names = [name for name in FORMATS if all(name in layer.predicted for layer in self.layers)]
        return {name: sum(layer.predicted[name] for layer in self.layers) for name in names}

    @property
    def weights(self) -> int:
        """All weights, zeros among them."""
        return sum(layer.weights for layer in self.layers)

    def microseconds(self, size: float, scheme: str = "", weights: int = 0) -> float:
        """The predicted time on the machine to read so many bytes once, or to expand so many weights of a scheme."""
        machine = MACHINES[self.machine]
        return 1e6 * max(size / machine.stream_bytes_per_s, SLOTS.get(scheme, 0.0) * weights / machine.slots_per_s)

    def outdone(self) -> dict[str, dict[str, Any]]:
        """The sparse schemes that a dense one is faster than: ``{sparse: {"by": dense, "smaller": bool}}``.

        One that is smaller too, if there is any; of several the one of the most bits.
        """
        sizes = self.totals()
        times = {name: self.microseconds(size, name, self.weights) for name, size in sizes.items()}
        dense = [FORMATS[name] for name in sizes if FORMATS[name].sparsity is None]

        def rank(name: str, fmt: Format) -> tuple[bool, int, bool]:
            return sizes[fmt.name] < sizes[name], fmt.bits, not fmt.quantized_activations

        found = {}
        for name in sizes:
            faster = [fmt for fmt in dense if FORMATS[name].sparsity and times[fmt.name] < times[name]]
            if faster:
                best = max(faster, key=partial(rank, name))
                found[name] = {"by": best.name, "smaller": sizes[best.name] < sizes[name]}
        return found

    def to_dict(self) -> dict[str, Any]:
        """``{"machine", "sparsity", "predicted_bytes", "predicted_microseconds", "outdone", "layers"}``; plain data."""

        def times(sizes: Mapping[str, int], weights: int) -> dict[str, float]:
            return {name: self.microseconds(size, name, weights) for name, size in sizes.items()}

        layers = [
            asdict(layer) | {"predicted_microseconds": times(layer.predicted, layer.weights)} for layer in self.layers
        ]
        totals = self.totals()
        together = {"predicted_bytes": totals, "predicted_microseconds": times(totals, self.weights)}
        head = {"machine": self.machine, "sparsity": self.sparsity}
        return {**head, **together, "outdone": self.outdone(), "layers": layers}

    def __str__(self) -> str:
        bits = sorted({fmt.bits for fmt in FORMATS.values()}, reverse=True)
        header = ("layer", "shape", "zeros", "float", *(f"best of {b} bits" for b in bits))
        rows = [
            (e.name, "x".join(map(str, e.shape)), f"{e.sparsity:.1%}", human_bytes(e.bytes_now),
             *(self._cell(e, e.smallest_of(b)) for b in bits))
            for e in self.layers
        ]  # fmt: skip
        lines = [table(header, rows, right=(2, 3))]
        lines.append(
            f"zeros over all: {self.sparsity:.1%}. Predicted for all layers together, one read of the weights:"
        )
        now = sum(layer.bytes_now for layer in self.layers)
        totals = sorted(self.totals().items(), key=lambda item: item[1])
        summary = [("float, as it is", human_bytes(now), f"{self.microseconds(now):.1f}", "1.00")]
        for name, size in totals:
            time = self.microseconds(size, name, self.weights)
            summary.append((name, human_bytes(size), f"{time:.1f}", f"{now / size:.2f}"))
        lines.append(table(("scheme", "bytes", f"us on {self.machine}", "times smaller"), summary, right=(1, 2, 3)))
        for name, better in self.outdone().items():
            how = "smaller and faster" if better["smaller"] else "faster, and larger"
            lines.append(f"{name}: {better['by']} without sparsity is {how}")
        lines.append(
            f"predictions: bytes over {STREAMED:.0%} of the data sheet's bandwidth or, where that is more, the "
            "instructions that expand them; nothing was measured"
        )
        return "\n".join(lines)

    @staticmethod
    def _cell(layer: LayerSparsity, name: str | None) -> str:
        return "-" if name is None else f"{name} {human_bytes(layer.predicted[name])}"


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
    layers = [_layer(c.name, c.module, formats) for c in candidates(model) if c.tied_to is None]
    if not layers:
        raise ValueError("the model has no linear layer in float")
    return SparsityReport(layers, machine)


def _layer(name: str, module: nn.Module, formats: Mapping[str, Format]) -> LayerSparsity:
    weight = float_tensor(module)
    assert weight is not None
    weight = weight.detach().t() if is_conv1d(module) else weight.detach()
    predicted = {key: _bytes(fmt, weight) for key, fmt in formats.items() if holds(fmt, weight)}
    n, k = weight.shape
    zeros = float((weight == 0).double().mean())
    return LayerSparsity(name, (n, k), zeros, weight.numel() * weight.element_size(), predicted)
