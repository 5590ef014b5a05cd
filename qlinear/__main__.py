"""``python -m qlinear``: the command line."""

from qlinear.cli import main

main()
