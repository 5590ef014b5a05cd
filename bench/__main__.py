"""``python -m bench``: what can be measured here. Versions and commit come first, correctness before any number."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import torch

from bench import options
from bench.options import JSON, SECONDS
from qlinear.doctor import devices, versions
from qlinear.machines import MACHINES
from qlinear.tables import write_json

_ARCHS = tuple(dict.fromkeys(machine.arch for machine in MACHINES.values()))


@click.group()
def cli() -> None:
    """Benchmarks of qlinear on this machine."""


@cli.command()
@click.option("--seconds", default=1.5, show_default=True, type=SECONDS, help="Per side and row.")
@click.option("--rounds", default=9, show_default=True, type=options.COUNT)
@JSON
def linear(seconds: float, rounds: int, path: Path | None) -> None:
    """One linear layer on the CPU: schemes against F.linear in bfloat16 and float32, for M = 1, 16, 128."""
    from bench.linear import SHAPES, measure, show

    rows = [row for dtype in (torch.bfloat16, torch.float32) for row in measure(dtype, SHAPES, seconds, rounds)]
    _report(show(rows), {"rows": rows}, path)


@cli.command()
@click.option("--seconds", default=0.3, show_default=True, type=SECONDS, help="Per side and row.")
@JSON
def sparse(seconds: float, path: Path | None) -> None:
    """One block-sparse layer of 4096x4096 in bfloat16 against dense ones, by the share of zero blocks."""
    from bench.sparse import measure, show

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = measure(torch.bfloat16, device, seconds=seconds)
    _report(show(rows), {"rows": rows}, path)


@cli.command()
@click.option("--rounds", default=7, show_default=True, type=options.COUNT)
@click.option("--tokens", default=24, show_default=True, type=options.COUNT)
@click.option("--nf4/--no-nf4", default=True, help="Compare with bitsandbytes (pip install 'qlinear[bench]').")
@JSON
def decode(rounds: int, tokens: int, nf4: bool, path: Path | None) -> None:
    """Greedy decoding of SmolLM2-135M at batch 1 in bfloat16 on the CPU, against float and bitsandbytes' nf4."""
    from bench.decode import measure, show
    from qlinear.demo.source import find_model, load_model

    if nf4 and importlib.util.find_spec("bitsandbytes") is None:
        raise click.UsageError("nf4 needs bitsandbytes: pip install 'qlinear[bench]', or give --no-nf4")
    model, _ = load_model(find_model(), torch.bfloat16)
    rates = measure(model, rounds, tokens, nf4)
    _report(show(rates), {"tokens_per_second": rates}, path)


@cli.command()
@click.option(
    "--seeds", default="0,1,2", show_default=True, type=options.SEEDS, help="Of the twin, separated by commas."
)
@click.option("--schemes", type=options.DENSE_SCHEMES, help="Separated by commas; every int4 scheme by default.")
@JSON
def rounding(seeds: tuple[int, ...], schemes: tuple[str, ...] | None, path: Path | None) -> None:
    """Perplexity of SmolLM2-135M with int4 weights: qlinear's rounding against plain absmax (a minute a row)."""
    from bench.rounding import SCHEMES, measure, show
    from qlinear.demo.source import find_model, load_model
    from qlinear.demo.text import sample_ids

    source = find_model()
    ids = sample_ids(load_model(source)[1])
    rows = measure(lambda: load_model(source, torch.bfloat16)[0], ids, seeds, schemes or SCHEMES)
    _report(show(rows), {"rows": rows}, path)


@cli.command()
@click.option(
    "--models",
    type=options.MODELS,
    help="Separated by commas; on a CPU by default SmolLM2's layers and 4096x4096, else all.",
)
@click.option("--schemes", type=options.SCHEMES, help="Separated by commas; int4, int8 and int8 x int8 by default.")
@click.option("--tokens", type=options.COUNTS, help="Numbers of tokens M, separated by commas; 1,16,128 on a CPU.")
@click.option(
    "--dtype",
    "dtypes",
    default="bfloat16",
    show_default=True,
    type=options.DTYPES,
    help="Or float16, float32, several.",
)
@click.option("--device", type=options.DEVICE, help="cuda or cpu; the GPU if there is one.")
@click.option("--seconds", default=0.3, show_default=True, type=SECONDS, help="Per side and row.")
@click.option("--threads", type=options.THREADS, help="Of a CPU; as many as torch takes by default.")
@click.option("--peers/--no-peers", "peers", default=True, help="Compare with every peer that is installed.")
@click.option("--peer", "names", multiple=True, help="Only this one; may be repeated.")
@click.option("--plots", type=options.FOLDER, help="Write pictures into this folder.")
@JSON
def matmul(
    models: tuple[str, ...] | None,
    schemes: tuple[str, ...] | None,
    tokens: tuple[int, ...] | None,
    dtypes: tuple[str, ...],
    device: torch.device | None,
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
        raise click.UsageError("--plots needs matplotlib: pip install 'qlinear[bench]'")
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        chosen = choose(names or None) if peers else ()
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    jobs = bench.jobs(models, schemes, tokens, dtypes, device, seconds, chosen)
    rows = [row for layers, settings in jobs for row in bench.measure(layers, settings)]
    _report(show(rows), {"peers": peer_versions(), "rows": rows}, path)
    for picture in plot(rows, plots) if plots is not None else ():
        click.echo(f"wrote {picture}")
    if any(row["us"] is None for row in rows):
        raise click.ClickException("some results are wrong or could not be computed: see the notes above")


@cli.command()
@click.option(
    "--schemes", default="w4a16,w8a8", show_default=True, type=options.DENSE_SCHEMES, help="Separated by commas."
)
@click.option("--rounds", default=3, show_default=True, type=options.COUNT, help="Fresh processes of each row.")
@JSON
def coldstart(schemes: tuple[str, ...], rounds: int, path: Path | None) -> None:
    """What the first call costs in a fresh process: imports, compiling with an empty and a filled Triton cache."""
    from bench.coldstart import measure, medians, show

    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        rows = medians([row for _ in range(rounds) for row in measure(device, schemes)])
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        raise click.ClickException(" ".join(str(error).split())) from None
    _report(show(rows), {"rows": rows}, path)


@cli.command()
@click.option(
    "--arch",
    "archs",
    multiple=True,
    default=("sm_90",),
    show_default=True,
    type=click.Choice([*_ARCHS, "all"]),
    help="May be repeated.",
)
@click.option("--models", type=options.MODELS, help="Separated by commas; all of bench/problems.py by default.")
@click.option("--schemes", type=options.SCHEMES, help="Separated by commas; all by default.")
@click.option(
    "--dump",
    type=options.FOLDER,
    help="Keep the cubins in this folder: each kernel's row in --json names its own (without: null).",
)
@JSON
def audit(
    archs: tuple[str, ...],
    models: tuple[str, ...] | None,
    schemes: tuple[str, ...] | None,
    dump: Path | None,
    path: Path | None,
) -> None:
    """What every kernel that ships costs, from its machine code, and times predicted from it; needs no GPU."""
    from bench.audit_tables import run
    from bench.problems import LAYERS
    from qlinear.format import FORMATS

    chosen = _ARCHS if "all" in archs else tuple(dict.fromkeys(archs))
    _report(*run(chosen, models or tuple(LAYERS), schemes or tuple(FORMATS), dump), path)


@cli.command()
@click.option(
    "--out", "folder", required=True, type=click.Path(file_okay=False, path_type=Path), help="For the results."
)
@click.option("--minutes", default=8.0, show_default=True, type=options.MINUTES, help="At most.")
@click.option("--stage", "names", multiple=True, help="Only this one; may be repeated.")
@click.option("--again", is_flag=True, help="Also stages that failed, lack something or are of another commit.")
def gpu(folder: Path, minutes: float, names: tuple[str, ...], again: bool) -> None:
    """Everything on a GPU: tests, numerics, determinism, speed against the vendor's, launches, tuning; resumable."""
    from bench.gpu import STAGES, good, run

    if not torch.cuda.is_available():
        raise click.UsageError("no CUDA or ROCm device is here; this command measures one")
    known = [stage.name for stage in STAGES]
    if unknown := [name for name in names if name not in known]:
        raise click.UsageError(f"there is no stage {unknown[0]!r}; the stages are: {', '.join(known)}")
    try:
        options.make_writable(folder)
    except OSError as error:
        raise click.UsageError(f"cannot write {str(folder)!r}: {error.strerror or error}") from None
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


def main(arguments: list[str]) -> None:
    """Runs a command. Exit codes: 0 good, 1 something measured is wrong, 2 bad input; either is told in one line."""
    try:
        cli.main(arguments or ["--help"], prog_name="python -m bench", standalone_mode=False)
    except click.ClickException as error:
        click.echo(f"Error: {' '.join(error.format_message().split())}", err=True)
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        click.echo("Error: interrupted", err=True)
        sys.exit(130)


if __name__ == "__main__":
    main(sys.argv[1:])
