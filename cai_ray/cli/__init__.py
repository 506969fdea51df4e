"""The command line: one file per group of commands. app.py lists every command with the function behind it."""

from cai_ray.cli.app import main

__all__ = ["main"]
