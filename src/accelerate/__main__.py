"""`python -m accelerate` is the command `accelerate`."""

from .commands.accelerate_cli import main

main()
