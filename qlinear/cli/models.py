"""Commands that take a model: convert, prune, inspect, validate."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import click

import qlinear
from qlinear.cli.options import DTYPES, FILE, JSON, SCHEME_HELP, device_option, load, maybe_json
from qlinear.pruning import METHODS, SCOPES
from qlinear.tables import by_pattern

_SHARE_HELP = (
    "The share of weights, neurons or heads to remove, or PATTERN=SHARE (repeatable, first match wins; 'none' leaves a "
    "layer); n:m patterns need none."
)


@click.command()
@click.argument("source", metavar="SRC")
@click.argument("target", metavar="DST", type=click.Path(path_type=Path))
@click.option("--scheme", "schemes", multiple=True, required=True, help=SCHEME_HELP)
@click.option("--dtype", type=click.Choice(DTYPES), help="Load the float model in this dtype (its own by default).")
@device_option("cpu", "Where to quantize, for example cuda.")
@click.option("--overwrite", is_flag=True, help="Replace DST if it exists.")
@JSON
def convert(
    source: str,
    target: Path,
    schemes: tuple[str, ...],
    dtype: str | None,
    device: str,
    overwrite: bool,
    json_path: Path | None,
) -> None:
    """Quantizes the model SRC and writes it to the folder DST."""
    what = _what(schemes)
    if target.exists() and not overwrite and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} exists and is not empty; pass --overwrite to replace it")
    model, tokenizer = load(source, dtype, device)
    model = qlinear.convert(model, what, progress=None)
    with tempfile.TemporaryDirectory() as companions:
        if tokenizer is not None:
            tokenizer.save_pretrained(companions)
        folder = source if os.path.isdir(source) else companions
        qlinear.save(model, target, companions=folder, overwrite=overwrite)
    report = qlinear.inspect(model)
    click.echo(report)
    click.echo(f"wrote {target}")
    maybe_json(json_path, {"source": source, "folder": str(target), **report.to_dict()})


@click.command()
@click.argument("source", metavar="SRC")
@click.argument("target", metavar="DST", type=click.Path(path_type=Path))
@click.option("--method", type=click.Choice(METHODS), default="sparsegpt", show_default=True)
@click.option("--sparsity", "shares", multiple=True, metavar="SHARE", help=_SHARE_HELP)
@click.option("--pattern", default="2:4", show_default=True, help="unstructured, n:m, block<size>, neurons or heads.")
@click.option("--scope", type=click.Choice(SCOPES), default="layer", show_default=True, help="What is ranked together.")
@click.option("--scheme", help="sparsegpt: also round to this scheme in the same sweep; convert finds the same codes.")
@click.option("--text", type=FILE, help="Calibration text (Wikipedia by default: 28 MB, fetched once).")
@click.option("--samples", default=128, show_default=True, help="Windows of calibration text.")
@click.option("--length", default=512, show_default=True, help="Tokens in a window.")
@click.option("--no-download", is_flag=True, help="Never fetch the default calibration text.")
@click.option("--dtype", type=click.Choice(DTYPES), help="Load the model in this dtype (its own by default).")
@device_option("cpu", "Where to prune, for example cuda.")
@click.option("--overwrite", is_flag=True, help="Replace DST if it exists.")
@JSON
def prune(source: str, target: Path, json_path: Path | None, **options: Any) -> None:
    """Prunes the language model SRC and writes it, in float, to the Hugging Face folder DST.

    Then `qlinear convert DST OUT --scheme w4a16-2:4` quantizes it. Unless a share is given for it by its exact name the
    output head is not pruned, and convert stores it in the dense scheme of the same codes. The table printed predicts
    what each scheme would make of the model.
    """
    from qlinear.demo.prune import prune_folder

    report = prune_folder(source, target, **options)
    click.echo(report)
    click.echo(f"wrote {target}")
    maybe_json(json_path, {"source": source, "folder": str(target), **report.to_dict()})


@click.command()
@click.argument("model")
@JSON
def inspect(model: str, json_path: Path | None) -> None:
    """Lists every parameter of MODEL: scheme, bytes before and after, or why it is in float."""
    report = qlinear.inspect(load(model)[0])
    click.echo(report)
    maybe_json(json_path, {"model": model, **report.to_dict()})


@click.command()
@click.argument("model")
@click.option("--reference", metavar="MODEL", help="The float model; needed where MODEL is already converted.")
@click.option("--scheme", "schemes", multiple=True, help=SCHEME_HELP + " Needed where MODEL is float.")
@click.option(
    "--text",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Text to run on (default: Python's own manual).",
)
@click.option("--tokens", default=1024, show_default=True, help="Tokens to run on.")
@click.option(
    "--bound", "bounds", multiple=True, metavar="METRIC=VALUE", help="A gate, for example kl=0.1 or top1_agreement=0.9."
)
@click.option("--dtype", type=click.Choice(DTYPES), help="Load float models in this dtype (their own by default).")
@JSON
def validate(
    model: str,
    reference: str | None,
    schemes: tuple[str, ...],
    text: Path | None,
    tokens: int,
    bounds: tuple[str, ...],
    dtype: str | None,
    json_path: Path | None,
) -> None:
    """Compares a converted MODEL with its float reference on real text, layer by layer and end to end.

    Either MODEL was converted and --reference is the float model, or MODEL is float and --scheme says how to
    convert it. Exit code 1 when a --bound does not hold.
    """
    from qlinear.demo.text import token_windows

    if (reference is None) == (not schemes):
        raise ValueError("give either --reference (MODEL is converted) or --scheme (MODEL is float), not both")
    gates = _bounds(bounds)
    first, tokenizer = load(model, dtype)
    if reference is None:
        original, _ = load(model, dtype)
        quantized = qlinear.convert(first, _what(schemes))
    else:
        original, tokenizer = load(reference, dtype)
        quantized = first
    if tokenizer is None:
        raise ValueError(f"{reference or model} has no tokenizer: validate needs one to make tokens of text")
    batches = [{"input_ids": ids} for ids in token_windows(tokenizer, text.read_text() if text else None, tokens)]
    report = qlinear.validate(quantized, original, batches)
    failures = report.failures(gates)
    click.echo(report)
    for failure in failures:
        click.echo(f"FAILED {failure}")
    maybe_json(json_path, {"model": model, "passed": not failures, "failures": failures, **report.to_dict()})
    if failures:
        sys.exit(1)


def _what(schemes: tuple[str, ...]) -> str | dict[str, str | None]:
    """``("w4a16",)`` or ``("lm_head=none", "*=w8a16")`` as convert takes it."""
    if len(schemes) == 1 and "=" not in schemes[0]:
        return schemes[0]
    return by_pattern(schemes)


def _bounds(bounds: tuple[str, ...]) -> dict[str, float]:
    try:
        return {name: float(value) for name, value in (bound.split("=") for bound in bounds)}
    except ValueError as error:
        raise ValueError(f"a bound is METRIC=NUMBER, for example kl=0.1; got {', '.join(bounds)}") from error
