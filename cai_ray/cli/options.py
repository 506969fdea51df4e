"""Arguments and options that several commands share, and how their values are read."""

from __future__ import annotations

from itertools import zip_longest
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from cai_ray.errors import InputError
from cai_ray.stages import STAGES


class Group(TyperGroup):
    """A group of commands whose help shows what each command does in full, on as many lines as that takes."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, command.help or "") for name, command in self.commands.items()])


def new_app(help: str) -> typer.Typer:
    """A group of commands. Its help is plain text: drawing it with Rich would double the time that it takes."""
    return typer.Typer(
        help=help,
        cls=Group,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    )


def positive(text: str | int) -> int:
    return whole_number(text, "must be a whole number of at least 1")


def port(text: str | int) -> int:
    return whole_number(text, "must be a port from 1 to 65535", 65535)


def whole_number(text: str | int, rule: str, most: float = float("inf")) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if not 1 <= value <= most:
        raise ValueError(f"{text!r} {rule}")
    return value


def stage_name(text: str) -> str:
    """The name of a stage that a run has.

    Raises:
        ValueError: there is no such stage.
    """
    names = [name for name, stage in STAGES.items() if not stage.before]
    if text not in names:
        raise ValueError(f"{text!r} is not a stage; use one of {', '.join(names)}")
    return text


def listed(text: str | None) -> list[str]:
    """The names in a list that is separated by commas."""
    return [name for name in (text or "").split(",") if name]


def listed_stages(text: str | None, option: str) -> list[str]:
    """The stages in a list that is separated by commas.

    Raises:
        InputError: one of them is not a stage.
    """
    try:
        return [stage_name(name) for name in listed(text)]
    except ValueError as e:
        raise InputError(f"{option}: {e}") from e


Config = Annotated[
    str,
    typer.Argument(
        metavar="CONFIG", help="Configuration in YAML, or the name of one that ships with the package."
    ),
]
RunFolder = Annotated[str, typer.Argument(metavar="RUN", help="Run directory.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a setting; may be repeated.")
]
Out = Annotated[str | None, typer.Option("--out", metavar="URI", help="Run directory.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Run completed stages again if their inputs changed.")
]
Check = Annotated[
    bool,
    typer.Option("--check", help="Validate everything and estimate the memory needed, but start nothing."),
]
Probe = Annotated[
    bool,
    typer.Option(
        "--probe",
        help="With --check: take a small random copy of each model through all steps, in a minute or two.",
    ),
]
Estimate = Annotated[
    int | None,
    typer.Option(
        "--estimate",
        metavar="[PROMPTS]",
        parser=positive,
        help="Estimate time and cost from a sample of this many prompts (32 if no number is given). "
        "The sample runs beside the run.",
    ),
]
EstimateJson = Annotated[bool, typer.Option("--json", help="Print the estimate as JSON.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Seeds = Annotated[int, typer.Option("--seeds", metavar="N", parser=positive, help="Number of seeds.")]


class ListsCommand(TyperCommand):
    """A command of which some options take several values, up to the next option."""

    lists: tuple[str, ...] = ()

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        words: list[str] = []
        option = ""  # the one that takes further values
        for word in args:
            if word.startswith("-"):
                option = word if word in self.lists else ""
                words.append(word)
            elif option and words[-1] != option:
                words += [option, word]
            else:
                words.append(word)
        return super().parse_args(ctx, words)


class EstimateCommand(TyperCommand):
    """A command whose option `--estimate` may stand without a number."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        words = []
        for word, following in zip_longest(args, args[1:], fillvalue=""):
            words.append(word)
            if word == "--estimate" and not following.removeprefix("-").isdigit():
                words.append("32")
        return super().parse_args(ctx, words)
