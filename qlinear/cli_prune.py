"""The command ``qlinear prune``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from qlinear.cli_options import DTYPES, FILE, JSON, maybe_json
from qlinear.pruning import METHODS, SCOPES

_SHARE_HELP = (
    "The share of weights, neurons or heads to remove, or PATTERN=SHARE (repeatable, first match wins; 'none' leaves a "
    "layer); n:m patterns need none."
)


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
@click.option("--device", default="cpu", show_default=True, help="Where to prune, for example cuda.")
@click.option("--overwrite", is_flag=True, help="Replace DST if it exists.")
@JSON
def prune(source: str, target: Path, json_path: Path | None, **options: Any) -> None:
    """Prunes the language model SRC and writes it, in float, to the Hugging Face folder DST.

    Then `qlinear convert DST OUT --scheme ...` quantizes it. The table printed predicts what each scheme would make
    of it.
    """
    from qlinear.demo.prune import prune_folder

    report = prune_folder(source, target, **options)
    click.echo(report)
    click.echo(f"wrote {target}")
    maybe_json(json_path, {"source": source, "folder": str(target), **report.to_dict()})
