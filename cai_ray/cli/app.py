"""The command `cai-ray`: the list of its commands, and `main`, which runs one of them.

A command is a function whose parameters are its arguments and options, and whose docstring is its help. It imports
heavy packages after its arguments are parsed, so that `--help` is instant. For the same reason the files of commands do
without `from __future__ import annotations`: Typer would have to evaluate every one of them.
"""

import sys
from collections.abc import Sequence
from typing import Annotated

import typer
from typer.main import get_command

from cai_ray import __version__
from cai_ray.cli import config, constitution, init, results, run, serve, studies, town
from cai_ray.cli.failures import report_failure, usage_line
from cai_ray.cli.options import EstimateCommand, new_app
from cai_ray.errors import EXIT_DONE, EXIT_INPUT
from cai_ray.stages import STAGES

app = new_app("Constitutional AI on Ray: from a written constitution to a trained policy.")

app.command("demo")(studies.demo)
app.command("init", cls=init.InitCommand)(init.init)
app.command("run", cls=EstimateCommand)(run.run)
for _name, _stage in STAGES.items():
    app.command(_name, help=_stage.help, cls=EstimateCommand)(run.stage_command(_name))
app.command("ablate", cls=studies.AblateCommand)(studies.ablate)
app.command("contested")(studies.contested)
app.command("status")(results.status)
app.command("explain")(results.explain)
app.command("export")(results.export)
app.command("chat")(serve.chat)
app.command("serve")(serve.serve)
app.add_typer(constitution.app, name="constitution")
app.add_typer(config.app, name="config")
app.add_typer(town.app, name="town")


def print_version(asked: bool) -> None:
    if asked:
        print(f"cai-ray {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=print_version, help="Print the version."),
    ] = False,
) -> None:
    """Takes the options that stand before a command."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code (see cai_ray.errors).

    Args:
        argv: the arguments; None stands for those of this process.
    """
    command = get_command(app)
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        with command.make_context("cai-ray", arguments) as context:
            return command.invoke(context) or EXIT_DONE
    except typer.Exit as e:
        return e.exit_code
    except typer.TyperException as e:
        print(usage_line(e, command, arguments), file=sys.stderr)
        return EXIT_INPUT
    except (Exception, KeyboardInterrupt) as e:
        return report_failure(e)
