"""``python -m bench``: what can be measured here. Versions and commit come first, correctness before any number."""

from __future__ import annotations

import importlib.util
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
@click.option("--seconds", default=0.3, show_default=True, help="Per side and row.")
@_JSON
def sparse(seconds: float, path: Path | None) -> None:
    """One block-sparse layer of 4096x4096 in bfloat16 against dense ones, by the share of zero blocks."""
    from bench.sparse import measure, show

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = measure(torch.bfloat16, device, seconds=seconds)
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


@cli.command()
@click.option("--models", help="Separated by commas; on a CPU by default SmolLM2's layers and 4096x4096, else all.")
@click.option("--schemes", help="Separated by commas; int4, int8 and int8 x int8 by default.")
@click.option("--tokens", help="Numbers of tokens M, separated by commas; 1,16,128 on a CPU.")
@click.option("--dtype", "dtypes", default="bfloat16", show_default=True, help="Or float16, float32, several.")
@click.option("--device", help="cuda or cpu; the GPU if there is one.")
@click.option("--seconds", default=0.3, show_default=True, help="Per side and row.")
@click.option("--threads", type=click.IntRange(1), help="Of a CPU; as many as torch takes by default.")
@click.option("--peers/--no-peers", "peers", default=True, help="Compare with every peer that is installed.")
@click.option("--peer", "names", multiple=True, help="Only this one; may be repeated.")
@click.option("--plots", type=click.Path(file_okay=False, path_type=Path), help="Write pictures into this folder.")
@_JSON
def matmul(
    models: str | None,
    schemes: str | None,
    tokens: str | None,
    dtypes: str,
    device: str | None,
    seconds: float,
    threads: int | None,
    peers: bool,
    names: tuple[str, ...],
    plots: Path | None,
    path: Path | None,
) -> None:
    """One product: schemes against 16-bit F.linear, the machine's floor and every peer, correctness checked first."""
    from bench import matmul as bench
    from bench.peers import choose
    from bench.peers import versions as peer_versions
    from bench.plots import plot, show

    if plots is not None and importlib.util.find_spec("matplotlib") is None:
        raise click.ClickException("--plots needs matplotlib: pip install 'qlinear[bench]'")
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        jobs = bench.jobs(models, schemes, tokens, dtypes, device, seconds, choose(names or None) if peers else ())
    except ValueError as error:
        raise click.ClickException(str(error)) from None
    rows = [row for layers, settings in jobs for row in bench.measure(layers, settings)]
    _report(show(rows), {"peers": peer_versions(), "rows": rows}, path)
    for picture in plot(rows, plots) if plots is not None else ():
        click.echo(f"wrote {picture}")
    if any(row["us"] is None for row in rows):
        raise click.ClickException("some results are wrong or could not be computed: see the notes above")


@cli.command()
@click.option("--schemes", default="w4a16,w8a8", show_default=True, help="Separated by commas.")
@_JSON
def coldstart(schemes: str, path: Path | None) -> None:
    """What the first call costs in a fresh process: imports, compiling with an empty and a filled Triton cache."""
    from bench.coldstart import measure, show
    from qlinear.format import FORMATS

    names = tuple(schemes.split(","))
    if unknown := [name for name in names if name not in FORMATS]:
        raise click.ClickException(f"there is no scheme {unknown[0]!r}; the schemes are: {', '.join(FORMATS)}")
    rows = list(measure("cuda" if torch.cuda.is_available() else "cpu", names))
    _report(show(rows), {"rows": rows}, path)


@cli.command()
@click.option("--arch", "archs", multiple=True, default=("sm_90",), show_default=True, help="May be repeated, or: all.")
@click.option("--models", help="Separated by commas; all of bench/problems.py by default.")
@click.option("--schemes", help="Separated by commas; all by default.")
@click.option("--dump", type=click.Path(file_okay=False, path_type=Path), help="Keep the cubins in this folder.")
@_JSON
def audit(
    archs: tuple[str, ...], models: str | None, schemes: str | None, dump: Path | None, path: Path | None
) -> None:
    """What every kernel that ships costs, from its machine code, and times predicted from it; needs no GPU."""
    from bench.audit import CAPABILITIES
    from bench.audit_tables import run
    from bench.problems import LAYERS
    from qlinear.format import FORMATS

    chosen = list(CAPABILITIES) if "all" in archs else archs
    names = schemes.split(",") if schemes else list(FORMATS)
    for what, given, known in (("architecture", chosen, CAPABILITIES), ("scheme", names, FORMATS)):
        if unknown := [name for name in given if name not in known]:
            raise click.ClickException(f"there is no {what} {unknown[0]!r} here, but: {', '.join(known)}")
    try:
        text, data = run(chosen, models.split(",") if models else list(LAYERS), names, dump)
    except ValueError as error:
        raise click.ClickException(str(error)) from None
    _report(text, data, path)


@cli.command()
@click.option(
    "--out", "folder", required=True, type=click.Path(file_okay=False, path_type=Path), help="For the results."
)
@click.option("--minutes", default=8.0, show_default=True, type=click.FloatRange(1.0), help="At most.")
@click.option("--stage", "names", multiple=True, help="Only this one; may be repeated.")
@click.option("--again", is_flag=True, help="Also stages that failed, lack something or are of another commit.")
def gpu(folder: Path, minutes: float, names: tuple[str, ...], again: bool) -> None:
    """Everything on a GPU: tests, numerics, determinism, speed against the vendor's, launches, tuning; resumable."""
    from bench.gpu import STAGES, good, run

    if not torch.cuda.is_available():
        click.echo("Error: no CUDA or ROCm device is here; this command measures one", err=True)
        raise SystemExit(2)
    known = [stage.name for stage in STAGES]
    if unknown := [name for name in names if name not in known]:
        raise click.ClickException(f"there is no stage {unknown[0]!r}; the stages are: {', '.join(known)}")
    stages = [stage for stage in STAGES if not names or stage.name in names]
    results = run(folder, minutes, stages, again=again)
    click.echo((folder / "summary.md").read_text())
    if not good(results, stages):
        raise click.ClickException(f"not everything is right or done: see {folder / 'summary.md'}")


def _report(text: str, data: dict[str, Any], path: Path | None) -> None:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    machine = devices()
    click.echo(f"qlinear {commit}; torch {torch.__version__}; {'; '.join(machine)}\n{text}")
    if path is not None:
        write_json(path, {"commit": commit, "versions": versions(), "devices": machine, **data})


cli()
