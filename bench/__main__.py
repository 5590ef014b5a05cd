"""``python -m bench``: what can be measured here. Versions and commit come first, correctness before any number."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import click
import torch

from qlinear.doctor import devices, versions
from qlinear.tables import write_json

_FILE = click.Path(dir_okay=False, path_type=Path)
_JSON = click.option("--json", "path", type=_FILE, help="Also write the rows here.")


@click.group()
def cli() -> None:
    """Benchmarks of qlinear on this machine."""


@cli.command()
@click.option("--seconds", default=1.5, show_default=True, help="Per side and row.")
@click.option("--rounds", default=9, show_default=True)
@_JSON
def linear(seconds: float, rounds: int, path: Path | None) -> None:
    """One linear layer on the CPU: schemes against F.linear in bfloat16 and float32, for M = 1, 16, 128."""
    from bench.linear import SHAPES, measure, show

    rows = [row for dtype in (torch.bfloat16, torch.float32) for row in measure(dtype, SHAPES, seconds, rounds)]
    _report(show(rows), {"rows": rows}, path)


@cli.command()
@click.option("--rounds", default=7, show_default=True)
@click.option("--tokens", default=24, show_default=True)
@click.option("--nf4/--no-nf4", default=True, help="Compare with bitsandbytes (pip install 'qlinear[bench]').")
@_JSON
def decode(rounds: int, tokens: int, nf4: bool, path: Path | None) -> None:
    """Greedy decoding of SmolLM2-135M at batch 1 in bfloat16 on the CPU, against float and bitsandbytes' nf4."""
    from bench.decode import measure, show
    from qlinear.demo.source import find_model, load_model

    model, _ = load_model(find_model(), torch.bfloat16)
    rates = measure(model, rounds, tokens, nf4)
    _report(show(rates), {"tokens_per_second": rates}, path)


@cli.command()
@click.option("--seeds", default="0,1,2", show_default=True, help="Of the off-grid twin, separated by commas.")
@click.option("--schemes", default=None, help="Separated by commas; every int4 scheme by default.")
@_JSON
def rounding(seeds: str, schemes: str | None, path: Path | None) -> None:
    """Perplexity of SmolLM2-135M with int4 weights: qlinear's rounding against plain absmax (a minute a row)."""
    from bench.rounding import SCHEMES, measure, show
    from qlinear.demo.source import find_model, load_model
    from qlinear.demo.text import sample_ids

    source = find_model()
    ids = sample_ids(load_model(source)[1])
    names = schemes.split(",") if schemes else SCHEMES
    rows = measure(lambda: load_model(source, torch.bfloat16)[0], ids, [int(s) for s in seeds.split(",")], names)
    _report(show(rows), {"rows": rows}, path)


def _report(text: str, data: dict[str, Any], path: Path | None) -> None:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    machine = devices()
    click.echo(f"qlinear {commit}; torch {torch.__version__}; {'; '.join(machine)}\n{text}")
    if path is not None:
        write_json(path, {"commit": commit, "versions": versions(), "devices": machine, **data})


cli()
