"""`cai-ray constitution`: show a constitution, check it, compare two, draft one from votes, test its examples."""

import json
from typing import Annotated, Any

import typer

from cai_ray.cli.options import Config, Json, Out, Overrides, new_app, positive
from cai_ray.errors import EXIT_DONE, EXIT_STOPPED

app = new_app("Show a constitution, check it, compare two.")

FILE_HELP = "YAML or Markdown, or the name of one that ships with the package."


@app.command("show")
def show(
    file: Annotated[str, typer.Argument(metavar="FILE", help=FILE_HELP)],
    as_json: Json = False,
) -> None:
    """Show its principles, with their hashes."""
    from cai_ray import constitution

    document = constitution.load(file)
    if as_json:
        principles = [{**p.model_dump(mode="json"), "sha": p.sha} for p in document.principles]
        print(json.dumps({**document.model_dump(mode="json"), "principles": principles, "sha": document.sha}))
        return
    print(f"{document.name}  version {document.version}  {document.sha}")
    for about in (document.description, document.source, *document.sources):
        if about:
            print(about)
    for section in document.sections:
        print(f"\n{section.title}  (section, priority {section.priority})\n  {section.text}")
    for p in document.principles:
        facts = [f"weight {p.weight:g}"] + [f"priority {p.priority}"] * bool(p.priority)
        facts += ["off"] * (not p.enabled) + [p.form] * (p.form == "negative") + list(p.families or p.tags)
        print(f"\n{p.id}  {p.sha}  {p.title}  ({', '.join(facts)})\n  {p.text}")


@app.command("lint")
def lint(
    files: Annotated[list[str], typer.Argument(metavar="FILE", show_default=False, help=FILE_HELP)],
    config: Annotated[
        str | None,
        typer.Option(
            "--config",
            metavar="CONFIG",
            help="Also find contradictions between principles, with this configuration's feedback model.",
        ),
    ] = None,
    overrides: Overrides = None,
    strict: Annotated[bool, typer.Option("--strict", help="End with exit code 3 for warnings, too.")] = False,
    as_json: Json = False,
) -> int:
    """Find slips of form, wording and balance; exit code 3 if one is an error."""
    from cai_ray import constitution
    from cai_ray.constitution import lint

    findings = {file: lint.lint(constitution.load(file)) for file in files}
    if config:
        for file, contradictions in _contradictions(config, overrides or [], files).items():
            findings[file] += contradictions
    counts = {
        level: sum(f.level == level for items in findings.values() for f in items) for level in lint.LEVELS
    }
    if as_json:
        print(json.dumps({file: [f._asdict() for f in items] for file, items in findings.items()}))
    else:
        for file, items in findings.items():
            for f in items:
                place = f"{file}: {f.principle}" if f.principle else file
                print(f"{f.level:8} {place}: {f.message}; {f.remedy}")
        print(", ".join(f"{count} {level}s" for level, count in counts.items()))
    failed = counts["error"] or (strict and counts["warning"])
    return EXIT_STOPPED if failed else EXIT_DONE


def _contradictions(config: str, overrides: list[str], files: list[str]) -> dict[str, list[Any]]:
    """Contradictions in each file, found by the engine of a configuration. The rows behind them are not kept."""
    import tempfile

    from cai_ray import constitution
    from cai_ray.cluster.connect import connect, disconnect
    from cai_ray.config.load import load_config
    from cai_ray.storage.pins import pin
    from cai_ray.storage.run import Run
    from cai_ray.studies.contradictions import contradictions

    findings = {}
    with tempfile.TemporaryDirectory(prefix="cai-ray-lint-") as folder:
        settings = pin(load_config(config, overrides)).config
        try:
            connect(settings)
            for number, file in enumerate(files):
                run = Run(settings.model_copy(update={"out": f"{folder}/{number}"}))
                findings[file] = contradictions(run, constitution.load(file))
        finally:
            disconnect()
    return findings


@app.command("diff")
def diff(
    before: Annotated[str, typer.Argument(metavar="BEFORE", help=FILE_HELP)],
    after: Annotated[str, typer.Argument(metavar="AFTER", help=FILE_HELP)],
    run: Annotated[
        str | None,
        typer.Option(
            "--run",
            metavar="RUN",
            help="Also estimate what it costs to bring this run up to date with AFTER.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what an edit changes, principle by principle and word by word."""
    from cai_ray import constitution
    from cai_ray.constitution.differences import differences, lines

    old, new = constitution.load(before), constitution.load(after)
    changes = differences(old, new)
    result: dict[str, Any] = {
        "before": old.sha,
        "after": new.sha,
        "changes": [c._asdict() for c in changes],
    }
    cost_table: list[list[str]] = []
    if run:
        from cai_ray.storage.run import open_run
        from cai_ray.studies import edit_cost

        opened = open_run(run)
        result["cost"] = edit_cost.cost(opened, new)
        cost_table = edit_cost.lines(result["cost"], opened.root)
    if as_json:
        print(json.dumps(result, ensure_ascii=False))
        return
    for line in lines(changes):
        print(line)
    same = len(new.principles) - sum(c.what != "removed" for c in changes)
    print(f"{len(changes)} principles differ, {same} are the same; {old.sha} -> {new.sha}")
    if cost_table:
        from cai_ray.report.terminal import print_table

        print()
        print_table(cost_table)


@app.command("import")
def import_votes(
    comments: Annotated[str, typer.Argument(metavar="COMMENTS", help="comments.csv of the export.")],
    votes: Annotated[str, typer.Argument(metavar="VOTES", help="participants-votes.csv of the export.")],
    out: Annotated[str, typer.Option("--out", metavar="FILE", help="File for the draft, in YAML.")],
    name: Annotated[str, typer.Option("--name", metavar="NAME", help="Name of the constitution.")] = "draft",
    least: Annotated[
        float,
        typer.Option("--least", metavar="SHARE", help="Lowest group-informed consensus that counts, 0 to 1."),
    ] = 0.6,
    most: Annotated[
        int | None,
        typer.Option(
            "--most",
            metavar="N",
            parser=positive,
            help="Largest number of principles.",
            show_default="all",
        ),
    ] = None,
) -> None:
    """Draft a constitution with weights from what people voted for (a Polis export)."""
    from cai_ray.constitution.polis import draft
    from cai_ray.storage import files

    document = draft(comments, votes, name, least, most or 0)
    files.write_bytes(out, document.to_yaml().encode())
    print(f"{len(document.principles)} principles; look at them with: cai-ray constitution lint {out}")


@app.command("test")
def check_examples(
    config: Config,
    overrides: Overrides = None,
    out: Out = None,
    file: Annotated[
        str | None,
        typer.Option(
            "--constitution", metavar="FILE", help="Another constitution than that of the configuration."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Test which principle the critic finds at stake in the document's examples."""
    from cai_ray import constitution
    from cai_ray.cluster.connect import connect, disconnect
    from cai_ray.config.load import load_config
    from cai_ray.storage.pins import pin
    from cai_ray.storage.run import Run
    from cai_ray.studies import examples

    settings = pin(load_config(config, overrides or [], out=out)).config
    document = constitution.load(file or settings.constitution)
    try:
        connect(settings)
        result = examples.run(Run(settings), document)
    finally:
        disconnect()
    if as_json:
        print(json.dumps(result))
    else:
        _print_test(result)


def _print_test(result: dict[str, Any]) -> None:
    from cai_ray.report.terminal import print_table
    from cai_ray.report.text import interval, percent

    table = [["", "recall", "", "specificity", ""]]
    for name, rates in {**result["by_principle"], "all": result}.items():
        pairs = [rates[kind] for kind in ("recall", "specificity")]
        table.append([name, *(text for r in pairs for text in (percent(r["value"]), interval(r)))])
    print_table(table, head=True)
    mixed = [
        f"{other} for {principle}: {percent(share)}"
        for other, row in result["confusion"].items()
        for principle, share in row.items()
        if principle != other and share
    ]
    print("taken for another, of a principle's violating examples: " + ("; ".join(mixed) or "none"))
    print(f"{result['examples']} examples, {result['errors']} errors")


@app.command("schema")
def schema() -> None:
    """Print the JSON Schema of the YAML form, for editors."""
    from cai_ray.constitution.document import schema

    print(json.dumps(schema(), indent=2))
