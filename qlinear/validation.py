"""``validate``: what quantization did to a model, per layer and end to end, against the float model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from qlinear.linear import QLinear
from qlinear.tables import table

#: Metrics a gate can bound, and whether a larger value is better.
_BETTER_LARGER = {
    "snr_db": True,
    "relative_error": False,
    "max_error": False,
    "kl": False,
    "top1_agreement": True,
    "output_relative_error": False,
}


@dataclass(frozen=True)
class LayerError:
    """The error of one layer's output on the activations the float model feeds it.

    ``snr_db`` is ``10 log10(|y|^2 / |y - y_q|^2)``, ``relative_error`` ``|y - y_q| / |y|`` and ``max_error`` the
    largest absolute difference, in the output's own units. All are NaN, which passes no gate, if the layer never ran.
    """

    name: str
    scheme: str
    snr_db: float
    relative_error: float
    max_error: float


@dataclass(frozen=True)
class Validation:
    """Errors per layer and end to end.

    ``kl`` is the mean of KL(reference || quantized) over positions, in nats, and ``top1_agreement`` the share of
    positions whose largest logit is the same; both are None where the model's output is not logits.
    ``output_relative_error`` compares whatever the output is.
    """

    layers: list[LayerError]
    kl: float | None
    top1_agreement: float | None
    output_relative_error: float
    positions: int

    def failures(self, bounds: Mapping[str, float]) -> list[str]:
        """What breaks the bounds, a sentence each. Layer metrics must hold for every layer.

        Args:
            bounds: for example ``{"kl": 0.1, "top1_agreement": 0.9, "snr_db": 20}``: minimum for ``snr_db`` and
                ``top1_agreement``, maximum for the others.

        Raises:
            ValueError: a bound's name is no metric, or its metric was not measured.
        """
        broken = []
        for metric, bound in bounds.items():
            if metric not in _BETTER_LARGER:
                raise ValueError(f"{metric!r} is not a metric; the metrics are: {', '.join(_BETTER_LARGER)}")
            for where, value in self._values(metric):
                if value is None:
                    raise ValueError(f"{metric!r} was not measured: the model's output is not logits")
                good = value >= bound if _BETTER_LARGER[metric] else value <= bound
                if not good:  # NaN fails too
                    sign = "<" if _BETTER_LARGER[metric] else ">"
                    broken.append(f"{where}: {metric} {value:.4g} {sign} {bound:g}")
        return broken

    def passes(self, bounds: Mapping[str, float]) -> bool:
        """Whether every bound holds: see :meth:`failures`."""
        return not self.failures(bounds)

    def _values(self, metric: str) -> list[tuple[str, float | None]]:
        if metric in ("snr_db", "relative_error", "max_error"):
            return [(layer.name, getattr(layer, metric)) for layer in self.layers]
        return [("end to end", getattr(self, metric))]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        rows = [
            (e.name, e.scheme, f"{e.snr_db:.1f}", f"{e.relative_error:.2%}", f"{e.max_error:.3g}") for e in self.layers
        ]
        text = table(("layer", "scheme", "SNR dB", "relative", "largest"), rows, right=(2, 3, 4))
        end = f"end to end over {self.positions} positions: relative error {self.output_relative_error:.2%}"
        if self.kl is not None and self.top1_agreement is not None:
            end += f", KL {self.kl:.4f} nats, top-1 agreement {self.top1_agreement:.2%}"
        return f"{text}\n{end}"


@dataclass
class _Sums:
    """Sums of one comparison; never the tensors themselves, so that memory does not grow with the batches."""

    signal: float = 0.0
    noise: float = 0.0
    largest: float = 0.0
    seen: bool = False

    def add(self, wanted: Tensor, got: Tensor) -> None:
        wanted, got = wanted.detach().double(), got.detach().double()
        self.signal += wanted.square().sum().item()
        self.noise += (wanted - got).square().sum().item()
        # `max` keeps a NaN only on one side; a NaN difference has to show.
        difference = (wanted - got).abs().max().item() if wanted.numel() else 0.0
        self.largest = difference if math.isnan(difference) else max(self.largest, difference)
        self.seen = True

    @property
    def relative(self) -> float:
        return math.sqrt(self.noise / self.signal) if self.signal > 0 else (0.0 if self.noise == 0 else math.inf)

    @property
    def snr_db(self) -> float:
        return (
            math.inf
            if self.noise == 0
            else (20 * math.log10(1 / self.relative) if self.relative < math.inf else -math.inf)
        )

    def error(self, name: str, scheme: str) -> LayerError:
        """NaN where nothing was compared: a layer that never ran is not a layer without an error."""
        values = (self.snr_db, self.relative, self.largest) if self.seen else (math.nan, math.nan, math.nan)
        return LayerError(name, scheme, *values)


@dataclass
class _EndToEnd:
    output: _Sums = field(default_factory=_Sums)
    kl: float = 0.0
    agree: int = 0
    positions: int = 0
    logits: bool = True


def validate(
    model: nn.Module, reference: nn.Module, batches: Iterable[Any], *, progress: bool | None = None
) -> Validation:
    """Compares a converted model with the float model it was made from.

    Each quantized layer is fed the very activations its float twin gets in ``reference``, so that errors of earlier
    layers do not mix in; end to end, both models run on their own. Modes are put to ``eval`` for the run and
    restored.

    Args:
        model: the converted model.
        reference: the float model, with its layers under the same names.
        batches: what the models are called with: a mapping (keyword arguments), a tuple (positional) or one tensor.
            Positions whose ``attention_mask`` is 0 do not count towards KL and agreement.

    Raises:
        ValueError: no quantized layer, a layer without its twin in ``reference``, or no batches.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, QLinear)}
    twins = dict(reference.named_modules())
    missing = [name for name in layers if name not in twins]
    if not layers or missing:
        found = f"{missing[0]!r} is not in the reference" if missing else "the model has no quantized layer"
        raise ValueError(f"{found}; validate compares a converted model with the float model it was made from")
    sums = {name: _Sums() for name in layers}
    total = _EndToEnd()
    handles = [twins[name].register_forward_hook(_compare(layer, sums[name])) for name, layer in layers.items()]
    modes = [(m, m.training) for m in (*model.modules(), *reference.modules())]
    model.eval(), reference.eval()
    try:
        with torch.no_grad():
            for batch in tqdm(
                batches, desc="validating", unit="batch", disable=None if progress is None else not progress
            ):
                _add_outputs(total, call(reference, batch), call(model, batch), batch)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes:
            module.training = mode
    if not total.output.signal and not total.positions:
        raise ValueError("there were no batches to validate on")
    errors = [s.error(n, layers[n].scheme) for n, s in sums.items()]
    kl = total.kl / total.positions if total.logits and total.positions else None
    agreement = total.agree / total.positions if total.logits and total.positions else None
    return Validation(errors, kl, agreement, total.output.relative, total.positions)


def _compare(layer: QLinear, sums: _Sums) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        # Past __call__, so that a model can be compared with itself: its own hooks would call this one again.
        sums.add(output, layer.forward(*inputs))

    return hook


def call(model: nn.Module, batch: Any) -> Any:
    """Calls a model with a mapping (keyword arguments), a tuple (positional) or one tensor."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple) else model(batch)


def _output(result: Any) -> tuple[Tensor, bool]:
    """The tensor to compare, and whether it is logits."""
    if isinstance(result, Tensor):
        return result, True
    if getattr(result, "logits", None) is not None:
        return result.logits, True
    first = result[0]
    return first, False


def _add_outputs(total: _EndToEnd, wanted_result: Any, got_result: Any, batch: Any) -> None:
    (wanted, logits), (got, _) = _output(wanted_result), _output(got_result)
    total.output.add(wanted, got)
    total.logits = total.logits and logits
    wanted, got = wanted.float().reshape(-1, wanted.shape[-1]), got.float().reshape(-1, got.shape[-1])
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if mask is not None and mask.numel() == wanted.shape[0]:
        wanted, got = wanted[mask.flatten().bool()], got[mask.flatten().bool()]
    total.positions += wanted.shape[0]
    if logits:
        p, q = wanted.log_softmax(-1), got.log_softmax(-1)
        total.kl += (p.exp() * (p - q)).sum().item()
        total.agree += int((wanted.argmax(-1) == got.argmax(-1)).sum())
