"""`cai-ray init`: from a model and data to a configuration that runs."""

import sys
from typing import Annotated, Literal

import typer

from cai_ray.cli.options import ListsCommand
from cai_ray.errors import InputError


class InitCommand(ListsCommand):
    lists = ("--data", "--red-team", "--helpful")


_SOURCE = "FILE…"


def init(
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="MODEL", help="Model folder, or an id of the Hugging Face hub."),
    ] = None,
    red_team: Annotated[
        list[str] | None,
        typer.Option(
            "--red-team", metavar=_SOURCE, help="Red-team prompts: files, folders, or datasets of the hub."
        ),
    ] = None,
    helpful: Annotated[
        list[str] | None, typer.Option("--helpful", metavar=_SOURCE, help="Helpfulness prompts.")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option("--data", metavar=_SOURCE, help="Prompts whose rows or name tell their kind."),
    ] = None,
    out: Annotated[
        str,
        typer.Option("--out", metavar="FILE", help="The configuration. Its data go to a folder beside it."),
    ] = "my.yaml",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that exist.")] = False,
) -> None:
    """Write a configuration for a model and data of your own. On a terminal it asks for what is not given."""
    ask = _ask if sys.stdin.isatty() else None
    model = model or (ask and ask("Model (folder or hub id)"))
    if ask and model and not (red_team or helpful or data):
        red_team = ask("Red-team prompts (files, folders or datasets)").split()
        helpful = ask("Helpful prompts (may be empty)").split()
    sources: list[tuple[str, Literal["red_team", "helpful"] | None]] = [
        *((path, "red_team") for path in red_team or ()),
        *((path, "helpful") for path in helpful or ()),
        *((path, None) for path in data or ()),
    ]
    if not model:
        raise InputError("init: --model is missing; give a model folder or an id of the Hugging Face hub")
    if not sources:
        raise InputError(
            "init: no data; give red-team prompts with --red-team, and helpful ones with --helpful"
        )
    from cai_ray.begin.start import begin

    written = begin(model, sources, out, overwrite=overwrite, ask=ask, say=_say)
    print(written.config)
    _say(f"next: cai-ray run {written.config} --check")


def _ask(question: str) -> str:
    print(f"{question}: ", end="", file=sys.stderr, flush=True)
    if not (line := sys.stdin.readline()):
        raise InputError("init: no answer; give --model, and data with --red-team, --helpful or --data")
    return line.strip()


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
