"""Commands that read a run: its state, the chain behind a row, and its export."""

import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cai_ray.cli.options import Json, RunFolder

if TYPE_CHECKING:
    from cai_ray.storage.run import Run


def status(run: RunFolder, as_json: Json = False) -> None:
    """Show which stages of a run are done, and what they cost."""
    from cai_ray.provenance import status
    from cai_ray.report.terminal import print_table
    from cai_ray.storage.run import open_run

    opened = open_run(run)
    rows = status.status(opened)
    if as_json:
        print(json.dumps(rows))
    else:
        print_table(_status_table(opened, rows))


def _status_table(run: "Run", rows: list[dict[str, Any]]) -> list[list[str]]:
    """One row of cells per stage; columns that are empty for all stages are left out."""
    from cai_ray.report import text

    currency = run.config.prices.currency if run.config.prices else None
    table = []
    for row in rows:
        times = [row.get(key) for key in ("wall_seconds", "cpu_seconds", "gpu_seconds")]
        times[0] = times[0] or row.get("seconds")
        durations = [
            f"{text.duration(t)}{unit}" if t else ""
            for t, unit in zip(times, ("", " CPU", " GPU"), strict=True)
        ]
        count = f"{row['rows_out']} rows" if "rows_out" in row else ""
        errors = f"{row['errors']} errors" if row.get("errors") else ""
        money = text.price(row.get("money"), currency)
        table.append([row["stage"], row["state"], *durations, money, count, errors])
    filled = [i for i in range(len(table[0])) if any(row[i] for row in table)]
    return [[row[i] for i in filled] for row in table]


def explain(
    run: RunFolder,
    id: Annotated[
        str,
        typer.Argument(
            metavar="ID",
            help="Id of a prompt, revision, comparison or judged answer, or the beginning of one.",
        ),
    ],
    as_json: Json = False,
) -> None:
    """Show the chain behind a row: steps, votes, rewards, answers."""
    from cai_ray.report.explain import explain, lines
    from cai_ray.storage.run import open_run

    opened = open_run(run)
    chain = explain(opened, opened.constitution(), id)
    for line in [json.dumps(chain, ensure_ascii=False)] if as_json else lines(chain):
        print(line)


def export(
    run: RunFolder,
    out: Annotated[
        str | None,
        typer.Option("--out", metavar="URI", help="Folder of the export.", show_default="RUN/export"),
    ] = None,
) -> None:
    """Export models and datasets with their cards, in Hugging Face form."""
    from cai_ray.export.folders import export
    from cai_ray.storage.run import open_run

    opened = open_run(run)
    folder = opened.path("export") if out is None else out
    for line in export(opened, folder).missing:
        print(f"not exported: {line}", file=sys.stderr)
    print(folder)
