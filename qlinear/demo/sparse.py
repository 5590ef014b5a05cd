"""``qlinear demo --sparse``: two real models, pruned in every way: quality, size and time, in tables and a picture."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn
from tqdm import tqdm

import qlinear
from qlinear.demo.sparse_times import linear_bytes, neuron_times, times_table
from qlinear.demo.subjects import Subject, encoder, language_model
from qlinear.doctor import versions
from qlinear.format import FORMATS
from qlinear.pruning import METHODS
from qlinear.selection import head_names
from qlinear.tables import human_bytes, table, write_json

#: The share of neurons that goes from the models that are timed.
_TIMED = 0.25


@dataclass(frozen=True)
class Plan:
    """One pattern at one sparsity, and the schemes that the pruned model is converted to; None is float."""

    pattern: str
    sparsity: float
    schemes: tuple[str | None, ...] = (None,)
    methods: tuple[str, ...] = METHODS


_TWO_FOUR = Plan("2:4", 0.5, (None, "w8a16-2:4", "w4a16-2:4"))
_BLOCKS = (None, "w8a16-block64", "w4a16-block64")
#: Both models have 1536 neurons in each MLP, and widths stay multiples of 128: one and three of twelve go.
_NEURONS = (Plan("neurons", 1 / 12), Plan("neurons", _TIMED, (None, "w8a16", "w4a16")))
PLANS = {
    "encoder": (
        *(Plan("unstructured", share) for share in (0.3, 0.5, 0.7)),
        _TWO_FOUR,
        *(Plan("block64", share, _BLOCKS) for share in (0.25, 0.5)),
        *_NEURONS,
        Plan("neurons", 0.5),
    ),
    # Fewer: each takes four times as long as the encoder's.
    "language model": (
        *(Plan("unstructured", share) for share in (0.3, 0.5)),
        _TWO_FOUR,
        Plan("block64", 0.1),
        Plan("block64", 0.25, _BLOCKS),
        *_NEURONS,
    ),
}


@dataclass(frozen=True)
class Result:
    """One pruned model."""

    model: str
    pattern: str
    sparsity: float
    method: str
    #: ``float`` where it was not converted.
    scheme: str
    #: Of the layers that were pruned, as they are held in memory.
    linear_bytes: int
    quality: dict[str, float]


def run_sparse_demo(
    json_path: Path | None = None,
    picture: Path = Path("qlinear-sparse.png"),
    no_download: bool = False,
    models: Sequence[str] = ("encoder", "language model"),
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Prunes, measures, prints the tables through ``say``, writes the picture, and returns what ``json_path`` gets.

    Raises:
        qlinear.demo.wheels.SourceError: a model or a text cannot be had, or a package is missing.
    """
    from qlinear.demo.sparse_plot import plot, require_matplotlib

    require_matplotlib()
    load: dict[str, Callable[[bool, Callable[[str], None]], Subject]]
    load = {"encoder": encoder, "language model": language_model}
    data: dict[str, Any] = {"versions": versions(), "models": []}
    for kind in models:
        subject = load[kind](no_download, say)
        quality = subject.measure(subject.model)
        whole = Result(subject.name, "none", 0.0, "none", "float", _bytes(subject.model), quality)
        results = list(_results(subject, PLANS[kind]))
        say(_tables(subject, whole, results))
        times = neuron_times(subject, _pruned(subject, Plan("neurons", _TIMED), "magnitude"), _TIMED)
        say(f"\n{times_table(times, _TIMED)}")
        data["models"].append(
            {
                "float": asdict(whole),
                "labels": subject.labels,
                "pruned": [asdict(r) for r in results],
                "neurons_25_percent": [asdict(each) for each in times],
            }
        )
        if json_path is not None:
            write_json(json_path, data)
    plot(data["models"], picture)
    say(f"\nwrote {picture}")
    return data


def _results(subject: Subject, plans: Sequence[Plan]) -> Iterator[Result]:
    jobs = [(plan, method) for plan in plans for method in plan.methods]
    for plan, method in tqdm(jobs, desc=subject.name, unit="model", disable=None):
        pruned = _pruned(subject, plan, method)
        for scheme in plan.schemes:
            model = copy.deepcopy(pruned)
            if method == "sparsegpt" and scheme is not None and FORMATS[scheme].sparsity and FORMATS[scheme].bits == 4:
                # Rounded in the same sweep, so that later weights make good for earlier ones' rounding too.
                model = _pruned(subject, plan, method, _dense(scheme))
            if scheme is not None:
                model = _convert(subject, model, scheme)
            size = _bytes(model, plan, scheme)
            _keep_dense(model)
            quality = subject.measure(model)
            yield Result(subject.name, plan.pattern, plan.sparsity, method, scheme or "float", size, quality)


def _keep_dense(model: nn.Module) -> None:
    """Lets a CPU multiply texts by 16-bit copies: the same numbers, which are not expanded again for every text.

    Blocks are not expanded: those that are stored are multiplied.
    """
    for module in model.modules():
        if isinstance(module, qlinear.QLinear) and module.float_dtype.itemsize == 2 and not module.format.block:
            module.keep_dense()


def _dense(scheme: str) -> str:
    """The scheme of the same codes without sparsity."""
    dense = FORMATS[scheme].dense
    assert dense is not None
    return dense.name


def _pruned(subject: Subject, plan: Plan, method: str, scheme: str | None = None) -> Any:
    model = copy.deepcopy(subject.model)
    if method == "gradient":
        model.requires_grad_(True)
    qlinear.prune(
        model,
        method,
        {**dict.fromkeys(subject.unused), "*": plan.sparsity},
        plan.pattern,
        subject.calibration,
        loss=subject.loss if method == "gradient" else None,
        scheme=scheme,
        progress=False,
    )
    return model.requires_grad_(False)


def _convert(subject: Subject, model: Any, scheme: str) -> Any:
    """Converts what was pruned; an output head was not, and stays in float in every scheme."""
    left = [*subject.unused, *head_names(model)]
    return qlinear.convert(model, {**dict.fromkeys(left), "*": scheme}, progress=False)


def _bytes(model: nn.Module, plan: Plan | None = None, scheme: str | None = None) -> int:
    """Bytes of the linear layers but the output head's; of a float model with zeros, in the pattern's own format."""
    holds = f"w16a16-{plan.pattern}" if plan is not None and scheme is None else ""
    if holds in FORMATS and plan is not None:
        fmt = FORMATS[holds]
        layers = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features < 10_000]
        density = 1 - plan.sparsity
        return sum(fmt.weight_bytes(m.out_features, m.in_features, density=density) for m in layers)
    return linear_bytes(model)


def _tables(subject: Subject, whole: Result, results: Sequence[Result]) -> str:
    metric = next(iter(whole.quality))

    def cell(result: Result) -> str:
        labels = f" ({result.quality[subject.labels]:.3f})" if subject.labels else ""
        return f"{result.quality[metric]:.3f}{labels}"

    header = ("pattern", "removed", "scheme", "linear layers", *METHODS)
    rows: list[tuple[str, ...]] = [
        ("none", "", "float", human_bytes(whole.linear_bytes), cell(whole), *[""] * (len(METHODS) - 1))
    ]
    keys = dict.fromkeys((r.pattern, r.sparsity, r.scheme) for r in results)
    for pattern, sparsity, scheme in keys:
        mine = {r.method: r for r in results if (r.pattern, r.sparsity, r.scheme) == (pattern, sparsity, scheme)}
        size = human_bytes(next(iter(mine.values())).linear_bytes)
        rows.append((pattern, f"{sparsity:.0%}", scheme, size, *(cell(mine[m]) if m in mine else "" for m in METHODS)))
    better = "lower is better" if subject.lower_is_better else "higher is better, 1 is the float model"
    labels = "; in brackets the correlation with people's ratings" if subject.labels else ""
    title = f"\n{subject.name}: {metric} ({better}){labels}; sizes with floats in 16 bit"
    return f"{title}\n{table(header, rows, right=range(3, len(header)))}\n{subject.note}"
