"""Commands that make runs for a question: the demo, a run without a principle, and comparisons for people."""

import json
import sys
from typing import Annotated

import typer

from cai_ray.cli.options import (
    Config,
    Json,
    ListsCommand,
    Out,
    Overrides,
    Overwrite,
    RunFolder,
    Seeds,
    positive,
)


def demo(
    out: Annotated[str, typer.Option("--out", metavar="DIR", help="Directory of the results.")] = "demo",
    seeds: Seeds = 1,
    controls: Annotated[
        bool,
        typer.Option(
            "--controls", help="Also train on shuffled labels and on one principle, and try best of n."
        ),
    ] = False,
    overwrite: Overwrite = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the report as the last line of stdout.")
    ] = False,
    overrides: Overrides = None,
) -> None:
    """Run the whole pipeline on the embedded world, on this machine."""
    from cai_ray.studies import demo

    report = demo.run(out, seeds, controls, overrides or (), overwrite)
    if as_json:
        print(json.dumps(report, ensure_ascii=False))


class AblateCommand(ListsCommand):
    lists = ("--without",)


def ablate(
    config: Config,
    without: Annotated[
        list[str],
        typer.Option("--without", metavar="ID…", show_default=False, help="Principles to leave out."),
    ],
    overrides: Overrides = None,
    out: Out = None,
    seeds: Seeds = 1,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Repeat a run without some principles, and show what that changes."""
    from cai_ray.cluster.connect import disconnect
    from cai_ray.config.load import load_config
    from cai_ray.studies import ablate

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    settings = load_config(config, overrides or [], out=out)
    try:
        result = ablate.ablate(settings, without, seeds, overwrite=overwrite, say=say)
    finally:
        disconnect()
    for line in [json.dumps(result)] if as_json else ablate.lines(result):
        print(line)


def contested(
    run: RunFolder,
    out: Annotated[
        str,
        typer.Option(
            "--out",
            metavar="FILE",
            help="Where to write the comparisons as JSON lines; people fill in `preferred`.",
        ),
    ],
    limit: Annotated[
        int, typer.Option("--limit", metavar="N", parser=positive, help="Largest number of comparisons.")
    ] = 100,
) -> None:
    """Write comparisons where orders or principles disagree, for people to decide."""
    from cai_ray.storage.run import open_run
    from cai_ray.studies.contested import export

    opened = open_run(run)
    counts = export(opened, opened.constitution(), out, limit)
    print(
        f"{counts['written']} written; contested are, by reason: principles disagree {counts['principles']}, "
        f"orders disagree {counts['orders']}, near one half {counts['unsure']}"
    )
