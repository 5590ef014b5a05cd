"""The ``qlinear`` command. Exit codes: 0 good, 1 a check or gate failed, 2 bad input or usage."""

from __future__ import annotations

import os
import sys

import click
from safetensors import SafetensorError

import qlinear
from qlinear.cli import machine, models


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(qlinear.__version__, prog_name="qlinear")
def cli() -> None:
    """Small, fast linear layers for PyTorch models: int8, packed int4, fp8 and pruned weights.

    MODEL is a Hugging Face folder, a .gguf file, or a folder that `qlinear convert` wrote.
    """


for command in (
    machine.demo, models.convert, models.prune, models.inspect, models.validate, machine.tune, machine.doctor
):  # fmt: skip
    cli.add_command(command)


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
    except (ValueError, TypeError, OSError, ImportError, RuntimeError, SafetensorError) as error:
        if os.environ.get("QLINEAR_DEBUG"):
            raise
        click.echo(f"qlinear: {' '.join(str(error).split()) or type(error).__name__}", err=True)
        sys.exit(2)
