"""The ``qlinear`` command. Exit codes: 0 good, 1 a check or gate failed, 2 bad input or usage."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
import torch

import qlinear
from qlinear.cli_options import DTYPES, JSON, maybe_json
from qlinear.cli_prune import prune
from qlinear.tables import by_pattern
from qlinear.tuning import check_device

_SCHEME_HELP = (
    "A scheme for every linear layer, or PATTERN=SCHEME (repeatable, first match wins; SCHEME 'none' leaves a layer)."
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(qlinear.__version__, prog_name="qlinear")
def cli() -> None:
    """Small, fast linear layers for PyTorch models: int8 and packed int4.

    MODEL is a Hugging Face folder, a .gguf file, or a folder that `qlinear convert` wrote.
    """


@cli.command()
@click.option("--model", metavar="PATH_OR_HUB_ID", help="Another model than the built-in SmolLM2-135M-Instruct.")
@click.option("--no-download", is_flag=True, help="Never fetch the built-in model (93 MB, once).")
@click.option("--seed", default=0, show_default=True, help="Of the off-grid twin that quality is measured on.")
@JSON
def demo(model: str | None, no_download: bool, seed: int, json_path: Path | None) -> None:
    """Takes a real language model through the schemes: size, quality, speed, and text written with each."""
    from qlinear.demo.run import run_demo

    run_demo(model=model, json_path=json_path, no_download=no_download, seed=seed)


@cli.command()
@click.argument("source", metavar="SRC")
@click.argument("target", metavar="DST", type=click.Path(path_type=Path))
@click.option("--scheme", "schemes", multiple=True, required=True, help=_SCHEME_HELP)
@click.option("--dtype", type=click.Choice(DTYPES), help="Load the float model in this dtype (its own by default).")
@click.option("--device", default="cpu", show_default=True, help="Where to quantize, for example cuda.")
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
    model, tokenizer = _load(source, dtype, device)
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


@cli.command()
@click.argument("model")
@JSON
def inspect(model: str, json_path: Path | None) -> None:
    """Lists every parameter of MODEL: scheme, bytes before and after, or why it is in float."""
    report = qlinear.inspect(_load(model)[0])
    click.echo(report)
    maybe_json(json_path, {"model": model, **report.to_dict()})


@cli.command()
@click.argument("model")
@click.option("--reference", metavar="MODEL", help="The float model; needed where MODEL is already converted.")
@click.option("--scheme", "schemes", multiple=True, help=_SCHEME_HELP + " Needed where MODEL is float.")
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
    first, tokenizer = _load(model, dtype)
    if reference is None:
        original, _ = _load(model, dtype)
        quantized = qlinear.convert(first, _what(schemes))
    else:
        original, tokenizer = _load(reference, dtype)
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


@cli.command()
@click.argument("model", required=False)
@click.option("--layer", "layers", multiple=True, metavar="NxK", help="out_features x in_features; may be repeated.")
@click.option("--scheme", "schemes", multiple=True, help="For --layer and a float MODEL (default: w4a16); repeatable.")
@click.option("--tokens", default="1,16,64,128,256", show_default=True, help="Separated by commas; 256: many.")
@click.option("--dtype", type=click.Choice(DTYPES), default="bfloat16", show_default=True, help="Of activations.")
@click.option("--time-limit", default=300.0, show_default=True, type=click.FloatRange(0), help="In seconds.")
@click.option("--device", default="cuda", show_default=True)
@click.option("--again", is_flag=True, help="Also measure what is known already.")
@click.option("--clear", is_flag=True, help="Remove every table that is kept, and measure nothing.")
@click.option(
    "--install", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Keep this table instead."
)
@JSON
def tune(
    model: str | None,
    layers: tuple[str, ...],
    schemes: tuple[str, ...],
    tokens: str,
    dtype: str,
    time_limit: float,
    device: str,
    again: bool,
    clear: bool,
    install: Path | None,
    json_path: Path | None,
) -> None:
    """Measures the kernels for the layers of MODEL, or for --layer shapes, on the GPU that is here.

    Tile sizes, buffers, the split along in_features, and the number of tokens from which the vendor's matmul is faster:
    what is found is kept under $QLINEAR_CACHE (~/.cache/qlinear/tuned) for this GPU, Triton and these kernels, and used
    from then on. The same command goes on where --time-limit ended it. `qlinear doctor` names the table in use.
    """
    if clear or install:
        from qlinear.kernels import tuned

        if clear:
            click.echo(f"removed {tuned.clear()} tuned tables from {tuned.folder()}")
        if install:
            table = tuned.install(install)
            click.echo(f"{len(table)} entries are kept in {table.path}")
        return
    if (model is None) == (not layers):
        raise ValueError("give either MODEL or --layer NxK")
    report = qlinear.tune(
        [_shape(text) for text in layers] if model is None else _load_for(model, device),
        schemes or ("w4a16",),
        dtype=getattr(torch, dtype),
        tokens=[_count(text) for text in tokens.split(",")],
        time_limit=time_limit,
        again=again,
        device=device,
    )
    click.echo(report)
    maybe_json(json_path, report.to_dict())


@cli.command()
@JSON
def doctor(json_path: Path | None) -> None:
    """Versions, devices, and the path each scheme takes here and why. Exit code 1 if one computes wrongly."""
    from qlinear.doctor import diagnose

    diagnosis = diagnose()
    click.echo(diagnosis)
    maybe_json(json_path, diagnosis.to_dict())
    if not diagnosis.ok:
        sys.exit(1)


cli.add_command(prune)


def _load(model: str, dtype: str | None = None, device: str = "cpu") -> tuple[Any, Any]:
    """A model and its tokenizer (None where it has none), converted or float."""
    from qlinear.demo.source import load_any

    return load_any(model, dtype, device)


def _load_for(model: str, device: str) -> Any:
    """A model whose layers are tuned; nothing is loaded where they cannot be."""
    check_device(torch.device(device))
    return _load(model)[0]


def _shape(text: str) -> tuple[int, int]:
    n, _, k = text.lower().partition("x")
    return _count(n), _count(k)


def _count(text: str) -> int:
    if not text.strip().isdigit() or int(text) < 1:
        raise ValueError(f"{text!r} is no positive number (a layer is NxK, for example 4096x4096)")
    return int(text)


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


def main(arguments: list[str] | None = None) -> None:
    """Runs the command; what goes wrong with its input is one line on standard error and exit code 2."""
    try:
        cli.main(arguments, prog_name="qlinear", standalone_mode=False)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except (KeyboardInterrupt, click.Abort):
        click.echo("qlinear: interrupted", err=True)
        sys.exit(130)
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        if os.environ.get("QLINEAR_DEBUG"):
            raise
        click.echo(f"qlinear: {' '.join(str(error).split()) or type(error).__name__}", err=True)
        sys.exit(2)
