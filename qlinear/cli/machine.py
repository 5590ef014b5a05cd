"""Commands about the machine they run on: demo, tune, doctor."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click
import torch
from click.core import ParameterSource

import qlinear
from qlinear.cli.options import DTYPES, FILE, JSON, device_option, load, maybe_json
from qlinear.tuning import check_device, check_time_limit


def _seconds(_: click.Context, __: click.Parameter, value: float) -> float:
    """``--time-limit``, checked before anything is loaded: click's own range lets NaN through."""
    check_time_limit(value)
    return value


@click.command()
@click.option("--model", metavar="PATH_OR_HUB_ID", help="Another model than the built-in SmolLM2-135M-Instruct.")
@click.option("--no-download", is_flag=True, help="Never fetch the built-in models and texts (93 MB, once).")
@click.option("--seed", default=0, show_default=True, help="Of the off-grid twin that quality is measured on.")
@click.option("--sparse", is_flag=True, help="Pruning instead: methods, patterns, int8 and int4 (112 MB more, once).")
@click.option("--picture", type=FILE, default="qlinear-sparse.png", show_default=True, help="What --sparse draws.")
@JSON
def demo(model: str | None, no_download: bool, seed: int, sparse: bool, picture: Path, json_path: Path | None) -> None:
    """Takes a real language model through the schemes: size, quality, speed, and text written with each.

    With --sparse a language model and a sentence encoder are pruned instead, by every method and pattern, with and
    without int8 and int4: quality and size in tables and a picture.
    """
    if sparse:
        from qlinear.demo.sparse import run_sparse_demo

        if model is not None:
            raise ValueError("--sparse shows its own two models; prune another with `qlinear prune`")
        run_sparse_demo(json_path, picture, no_download)
        return
    from qlinear.demo.run import run_demo

    run_demo(model=model, json_path=json_path, no_download=no_download, seed=seed)


@click.command()
@click.argument("model", required=False)
@click.option("--layer", "layers", multiple=True, metavar="NxK", help="out_features x in_features; may be repeated.")
@click.option("--scheme", "schemes", multiple=True, help="For --layer and a float MODEL (default: w4a16); repeatable.")
@click.option("--tokens", default="1,16,64,128,256", show_default=True, help="By commas; each stands for its bucket.")
@click.option("--dtype", type=click.Choice(DTYPES), default="bfloat16", show_default=True, help="Of activations.")
@click.option("--time-limit", default=300.0, show_default=True, callback=_seconds, help="In seconds.")
@device_option("cuda", "The GPU to measure.")
@click.option("--again", is_flag=True, help="Also measure what is known already.")
@click.option("--clear", is_flag=True, help="Remove every table that is kept, and measure nothing.")
@click.option(
    "--install", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Keep this table instead."
)
@JSON
@click.pass_context
def tune(
    context: click.Context,
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

        _refuse_others(context, "clear", "install")
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
        tokens=_tokens(tokens),
        time_limit=time_limit,
        again=again,
        device=device,
    )
    click.echo(report)
    maybe_json(json_path, report.to_dict())


@click.command()
@JSON
def doctor(json_path: Path | None) -> None:
    """Versions, devices, and the path each scheme takes here and why. Exit code 1 if one computes wrongly."""
    from qlinear.doctor import diagnose

    diagnosis = diagnose()
    click.echo(diagnosis)
    maybe_json(json_path, diagnosis.to_dict())
    if not diagnosis.ok:
        sys.exit(1)


def _load_for(model: str, device: str) -> Any:
    """A model whose layers are tuned; nothing is loaded where they cannot be."""
    check_device(torch.device(device))
    return load(model)[0]


def _refuse_others(context: click.Context, *names: str) -> None:
    """Raises a ValueError where anything else was given than these options, which measure nothing."""
    for parameter in context.command.params:
        name = parameter.name or ""
        if name not in names and context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            given = "MODEL" if isinstance(parameter, click.Argument) else parameter.opts[0]
            option = next(f"--{other}" for other in names if context.params[other])
            raise ValueError(f"{option} measures nothing: it does not go with {given}")


def _shape(text: str) -> tuple[int, int]:
    n, _, k = text.lower().partition("x")
    found = _count(n), _count(k)
    if 0 in found:
        raise ValueError(f"--layer {text}: a layer is NxK in whole numbers from 1 on, for example 4096x4096")
    return found


def _tokens(text: str) -> list[int]:
    found = [_count(part) for part in text.split(",")]
    if 0 in found:
        raise ValueError(f"--tokens {text}: wanted whole numbers from 1 on, separated by commas, for example 1,16,256")
    return found


def _count(text: str) -> int:
    """A positive number, or 0 where the text is none."""
    return int(text) if text.strip().isdecimal() else 0
