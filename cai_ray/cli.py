"""The command `cai-ray`. Heavy packages are imported by the command that needs them: `--help` is instant."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from errno import EACCES, EDQUOT, EFBIG, ENOSPC, EROFS
from typing import Any, NoReturn, TypeVar

from cai_ray import __version__
from cai_ray.errors import (
    EXIT_DONE,
    EXIT_FAULT,
    EXIT_INPUT,
    EXIT_INTERRUPTED,
    EXIT_STOPPED,
    InputError,
    Stopped,
    Unavailable,
)
from cai_ray.stages import POLICIES, STAGES, stages_of

T = TypeVar("T")

STAGE_HELP = {name: stage.help for name, stage in STAGES.items() if not stage.before}


def main(argv: list[str] | None = None) -> int:
    """Runs a command; the exit codes are those of cai_ray.errors."""
    args = parser().parse_args(argv)
    try:
        return args.function(args) or EXIT_DONE
    except InputError as e:
        print(f"cai-ray: {' '.join(str(e).split())}", file=sys.stderr)
        return EXIT_INPUT
    except Stopped as e:
        print(f"cai-ray: stopped: {e}", file=sys.stderr)
        return EXIT_STOPPED
    except Unavailable as e:
        print(f"cai-ray: {e}", file=sys.stderr)
        return EXIT_FAULT
    except KeyboardInterrupt:
        print("cai-ray: interrupted; the same command goes on from here", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_DONE
    except Exception as e:
        refused = _find(e, _refused_by_system)
        if refused is None:
            from cai_ray.storage import filesystems

            if (told := _find(e, filesystems.refusal)) is None:
                raise
            print(f"cai-ray: {told}; the same command goes on from here", file=sys.stderr)
            return EXIT_INPUT
        name = refused.filename  # Ray puts other texts there
        place = f" ({name})" if isinstance(name, str) and os.path.isabs(name) else ""
        print(
            f"cai-ray: the output cannot be written{place}: {os.strerror(refused.errno or 0)}; "
            "free space or choose another --out, and run the same command again",
            file=sys.stderr,
        )
        return EXIT_INPUT


def _refused_by_system(e: BaseException) -> OSError | None:
    """What the system refused to write: disk full, quota, read-only, forbidden."""
    return e if isinstance(e, OSError) and e.errno in (ENOSPC, EDQUOT, EROFS, EACCES, EFBIG) else None


def _find(error: BaseException, what: Callable[[BaseException], T | None]) -> T | None:
    """The first that is found of an error, of what caused it, and of what Ray wrapped in it."""
    seen: list[Any] = []
    left: list[Any] = [error]
    while left:
        e = left.pop()
        if not isinstance(e, BaseException) or any(e is s for s in seen):
            continue
        if (found := what(e)) is not None:
            return found
        seen.append(e)
        # Ray's errors of a task, of training workers (by rank) and of its training controller.
        workers = getattr(e, "worker_failures", None) or {}
        left += [e.__cause__, getattr(e, "cause", None), getattr(e, "controller_failure", None)]
        left += workers.values()
    return None


class _Parser(argparse.ArgumentParser):
    """What argparse refuses is bad input like any other: one line, and no usage before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_INPUT, f"cai-ray: {' '.join(message.split())}; see `{self.prog} --help`\n")


def parser() -> argparse.ArgumentParser:
    top = _Parser(
        prog="cai-ray",
        description="Constitutional AI on Ray: from a written constitution to a trained policy.",
    )
    top.add_argument("--version", action="version", version=f"cai-ray {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="the whole pipeline on the embedded world, on this machine")
    demo.add_argument("--out", default="demo", help="directory of the results (default: demo)")
    demo.add_argument("--seeds", type=_positive, default=1, help="so many seeds, one run each (default: 1)")
    demo.add_argument(
        "--controls", action="store_true", help="also shuffled labels, best of n, and respect alone"
    )
    demo.add_argument("--overwrite", action="store_true", help="make stages again whose inputs changed")
    demo.add_argument("--json", action="store_true", help="print the report as the last line of stdout")
    demo.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting")
    demo.set_defaults(function=_demo)

    run = _with_config(commands.add_parser("run", help="all stages in order; what is done is skipped"))
    run.add_argument("--until", choices=list(STAGE_HELP), help="stop after this stage")
    run.add_argument(
        "--keep", type=_stages, default=[], metavar="STAGE,…",
        help="complete stages that stay as they are though their inputs changed",
    )  # fmt: skip
    _with_estimate(run).set_defaults(function=_run)
    for name, text in STAGE_HELP.items():
        stage = _with_config(commands.add_parser(name, help=text))
        stage.set_defaults(function=_stage)
        if name != "report":
            _with_estimate(stage)
        else:
            stage.add_argument(
                "other",
                nargs="?",
                help="with two run directories: the second beside the first (--out: also as a page)",
            )
            stage.add_argument("--json", action="store_true", help="of two runs: as JSON")
            stage.set_defaults(function=_report)

    redteam = commands.add_parser(
        "redteam", help="more red-team prompts, written by the model after the run's own"
    )
    _with_config(redteam).set_defaults(function=_stage)

    ablate = _with_config(
        commands.add_parser("ablate", help="the same run without a principle, and what that changes"),
        check=False,
    )
    ablate.add_argument("--without", nargs="+", required=True, metavar="ID", help="principles to leave out")
    ablate.add_argument("--seeds", type=_positive, default=1, help="so many seeds (default: 1)")
    ablate.add_argument("--overwrite", action="store_true", help="make stages again whose inputs changed")
    ablate.add_argument("--json", action="store_true")
    ablate.set_defaults(function=_ablate)

    status = commands.add_parser("status", help="what is done in a run directory")
    status.add_argument("run")
    status.add_argument("--json", action="store_true")
    status.set_defaults(function=_status)

    export = commands.add_parser(
        "export", help="models and datasets of a run with their cards, as the Hugging Face world expects them"
    )
    export.add_argument("run")
    export.add_argument("--out", help="folder of the export, any URI (default: RUN/export)")
    export.set_defaults(function=_export)

    explain = commands.add_parser("explain", help="the chain behind a row: steps, votes, rewards, answers")
    explain.add_argument("run")
    explain.add_argument("id", help="of a prompt, revision, comparison or judged answer, or how it begins")
    explain.add_argument("--json", action="store_true")
    explain.set_defaults(function=_explain)

    contested = commands.add_parser(
        "contested", help="comparisons where orders or principles disagree, for people to decide"
    )
    contested.add_argument("run")
    contested.add_argument(
        "--out", required=True, metavar="FILE", help="JSON lines; `preferred` is to be filled in"
    )
    contested.add_argument("--limit", type=_positive, default=100, help="so many at most (default: 100)")
    contested.set_defaults(function=_contested)

    chat = commands.add_parser("chat", help="talk to a run's policy")
    chat.add_argument("run")
    chat.add_argument("--model", default="rl", choices=POLICIES, help="which policy (default: rl)")
    chat.set_defaults(function=_chat)

    serve = commands.add_parser("serve", help="policy and critic endpoints of a run")
    serve.add_argument("run", nargs="?", help="run directory; with --update-constitution it may be left out")
    serve.add_argument("--host", type=_host, default="127.0.0.1")
    serve.add_argument("--port", type=_port, default=8000)
    serve.add_argument(
        "--models",
        type=_names,
        metavar="NAME,…",
        help="of base, sl, rl (default: the one furthest in training)",
    )
    serve.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="NAME=FOLDER",
        help="a LoRA adapter on the first model",
    )
    serve.add_argument(
        "--token-file", help="file of keys, or of one token (default: the token in CAI_RAY_TOKEN)"
    )
    serve.add_argument("--no-auth", action="store_true", help="no token; on loopback only")
    serve.add_argument("--log-prompts", action="store_true", help="texts of requests go to the log")
    serve.add_argument("--metrics-port", type=_port, help="where Prometheus reads (default: Ray's choice)")
    serve.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="docs/serving.md lists them"
    )
    serve.add_argument(
        "--write-config", metavar="FILE", help="write a file for `serve deploy`; start nothing"
    )
    serve.add_argument(
        "--update-constitution", metavar="FILE",
        help="put another constitution into the run's servers, or into the one at --host and --port",
    )  # fmt: skip
    serve.add_argument("--add-token", metavar="NAME", help="print a new token; its hash goes to --token-file")
    serve.add_argument(
        "--admin", action="store_true", help="with --add-token: one that may change the constitution"
    )
    serve.set_defaults(function=_serve)

    document = commands.add_parser("constitution", help="look at a constitution, check it, compare two")
    actions = document.add_subparsers(dest="action", required=True, metavar="ACTION")
    show = actions.add_parser("show", help="its principles, with their hashes")
    show.add_argument("file", help="YAML or Markdown, or the name of one that ships with the package")
    show.add_argument("--json", action="store_true")
    show.set_defaults(function=_constitution_show)
    lint = actions.add_parser(
        "lint", help="slips of form, wording and balance; exit code 3 if one is an error"
    )
    lint.add_argument("files", nargs="+", metavar="FILE")
    lint.add_argument(
        "--config", help="also contradictions, as this configuration's feedback model sees them"
    )
    lint.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting")
    lint.add_argument("--strict", action="store_true", help="exit code 3 for warnings, too")
    lint.add_argument("--json", action="store_true")
    lint.set_defaults(function=_constitution_lint)
    diff = actions.add_parser("diff", help="what an edit changes, principle by principle and word by word")
    diff.add_argument("before")
    diff.add_argument("after")
    diff.add_argument("--run", help="also what it would cost to bring this run up to date with AFTER")
    diff.add_argument("--json", action="store_true")
    diff.set_defaults(function=_constitution_diff)
    votes = actions.add_parser(
        "import", help="a draft from what people voted for (a Polis export), with weights"
    )
    votes.add_argument("comments", help="comments.csv of the export")
    votes.add_argument("votes", help="participants-votes.csv of the export")
    votes.add_argument("--out", required=True, help="file of the draft, in YAML")
    votes.add_argument("--name", default="draft", help="name of the constitution (default: draft)")
    votes.add_argument(
        "--least", type=float, default=0.6, help="least group-informed consensus, 0 to 1 (default: 0.6)"
    )
    votes.add_argument("--most", type=_positive, default=0, help="so many principles at most (default: all)")
    votes.set_defaults(function=_constitution_import)
    test = _with_config(
        actions.add_parser(
            "test", help="which principle the critic finds at stake in the document's examples"
        ),
        check=False,
    )
    test.add_argument("--constitution", metavar="FILE", help="another than the configuration's")
    test.add_argument("--json", action="store_true")
    test.set_defaults(function=_constitution_test)
    schema = actions.add_parser("schema", help="the JSON Schema of the YAML form, for editors")
    schema.set_defaults(function=_constitution_schema)

    town = commands.add_parser(
        "town", help="the embedded world: make its base model again, measure its skills"
    )
    actions = town.add_subparsers(dest="action", required=True, metavar="ACTION")
    build = actions.add_parser("build", help="train the base model from scratch")
    build.add_argument("--out", required=True, help="folder of the model")
    build.add_argument("--seed", type=int, default=0)
    build.set_defaults(function=_town_build)
    check = actions.add_parser("check", help="critic and judge skills on development pairs")
    check.add_argument("--model", default="town", help="model folder (default: the shipped one)")
    check.set_defaults(function=_town_check)
    return top


def _with_config(command: argparse.ArgumentParser, check: bool = True) -> argparse.ArgumentParser:
    command.add_argument(
        "config", help="configuration in YAML, or the name of one that ships with the package"
    )
    command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting")
    command.add_argument("--out", help="run directory, any URI")
    if not check:
        return command
    command.add_argument("--overwrite", action="store_true", help="make stages again whose inputs changed")
    command.add_argument(
        "--check", action="store_true", help="validate everything, estimate memory, start nothing"
    )
    return command


def _with_estimate(command: argparse.ArgumentParser) -> argparse.ArgumentParser:
    command.add_argument(
        "--estimate", nargs="?", type=_positive, const=32, metavar="PROMPTS",
        help="what it would take, from a sample of so many prompts that is run beside the run (default: 32)",
    )  # fmt: skip
    command.add_argument("--json", action="store_true", help="of --estimate: as JSON")
    return command


def _load(args: argparse.Namespace) -> Any:
    from cai_ray.config.load import load_config

    return load_config(args.config, args.set, out=args.out)


def _run(args: argparse.Namespace) -> int:
    return _run_stages(args, None, force=False)


def _stage(args: argparse.Namespace) -> int:
    # A single stage that is asked for with --overwrite is made again even where nothing changed.
    return _run_stages(args, [args.command], force=args.overwrite)


def _report(args: argparse.Namespace) -> int:
    if args.other is None:
        return _stage(args)
    from cai_ray.report import compare
    from cai_ray.storage import files
    from cai_ray.storage.run import open_run

    found = compare.compare(open_run(args.config), open_run(args.other))
    if args.out:
        files.write_bytes(files.join(args.out, "index.html"), compare.page(found).encode())
    for line in [json.dumps(found)] if args.json else compare.lines(found):
        print(line)
    return EXIT_DONE


def _run_stages(args: argparse.Namespace, names: list[str] | None, force: bool) -> int:
    """Without names: those of the configuration's method, up to `--until`."""
    from cai_ray import pipeline
    from cai_ray.cluster.connect import disconnect

    config, keep = _load(args), getattr(args, "keep", [])
    if names is None:
        names = stages_of(config.method)
        if args.until and args.until not in names:
            raise InputError(
                f"--until {args.until} is no stage of method={config.method}; use one of {', '.join(names)}"
            )
        names = names[: names.index(args.until) + 1] if args.until else names
    if args.check:
        from cai_ray.estimate.fit import memory_lines
        from cai_ray.estimate.shape import elsewhere
        from cai_ray.storage.run import Run

        for line in memory_lines(config):
            print(line)
        model_elsewhere = elsewhere(config)
        pipeline.check_inputs(config, names, model_elsewhere=model_elsewhere)
        pipeline.check_run(Run(config), names, args.overwrite, keep)
        if model_elsewhere:
            print(f"not seen from here: weights, tokenizer and chat template of {config.model}")
        print("ok: nothing was started")
        return EXIT_DONE
    if getattr(args, "estimate", None):
        return _estimate(args, config, names)
    try:
        run = pipeline.run_stages(config, names, overwrite=args.overwrite, force=force, keep=keep)
    finally:
        disconnect()
    print(run.root)
    return EXIT_DONE


def _estimate(args: argparse.Namespace, config: Any, names: list[str]) -> int:
    from cai_ray.cluster.connect import disconnect
    from cai_ray.estimate import estimate, lines

    def say(line: str) -> None:
        print(f"[sample] {line}", file=sys.stderr, flush=True)

    try:
        found = estimate(config, names, args.estimate, say)
    finally:
        disconnect()
    for line in [json.dumps(found)] if args.json else lines(found):
        print(line)
    return EXIT_DONE


def _demo(args: argparse.Namespace) -> int:
    from cai_ray.studies import demo

    report = demo.run(args.out, args.seeds, args.controls, args.set, args.overwrite)
    if args.json:
        print(json.dumps(report, ensure_ascii=False))
    return EXIT_DONE


def _ablate(args: argparse.Namespace) -> int:
    from cai_ray.cluster.connect import disconnect
    from cai_ray.studies import ablate

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    try:
        found = ablate.ablate(_load(args), args.without, args.seeds, overwrite=args.overwrite, say=say)
    finally:
        disconnect()
    for line in [json.dumps(found)] if args.json else ablate.lines(found):
        print(line)
    return EXIT_DONE


def _status(args: argparse.Namespace) -> int:
    from cai_ray.provenance.status import status
    from cai_ray.report import text
    from cai_ray.storage.run import open_run

    run = open_run(args.run)
    rows = status(run)
    if args.json:
        print(json.dumps(rows))
        return EXIT_DONE
    currency = run.config.prices.currency if run.config.prices else None
    table = []
    for row in rows:
        times = [row.get(key) for key in ("wall_seconds", "cpu_seconds", "gpu_seconds")]
        times[0] = times[0] or row.get("seconds")
        held = [
            f"{text.duration(t)}{unit}" if t else ""
            for t, unit in zip(times, ("", " CPU", " GPU"), strict=True)
        ]
        count = f"{row['rows_out']} rows" if "rows_out" in row else ""
        errors = f"{row['errors']} errors" if row.get("errors") else ""
        table.append(
            [row["stage"], row["state"], *held, text.price(row.get("money"), currency), count, errors]
        )
    kept = [i for i in range(len(table[0])) if any(row[i] for row in table)]
    print("\n".join(text.columns([[row[i] for i in kept] for row in table])))
    return EXIT_DONE


def _export(args: argparse.Namespace) -> int:
    from cai_ray.export.folders import export
    from cai_ray.storage.run import open_run

    run = open_run(args.run)
    out = run.path("export") if args.out is None else args.out
    done = export(run, out)
    for line in done.missing:
        print(f"not exported: {line}", file=sys.stderr)
    print(out)
    return EXIT_DONE


def _explain(args: argparse.Namespace) -> int:
    from cai_ray.report.explain import explain, lines
    from cai_ray.storage.run import open_run

    run = open_run(args.run)
    told = explain(run, run.constitution(), args.id)
    for line in [json.dumps(told, ensure_ascii=False)] if args.json else lines(told):
        print(line)
    return EXIT_DONE


def _contested(args: argparse.Namespace) -> int:
    from cai_ray.storage.run import open_run
    from cai_ray.studies.contested import export

    run = open_run(args.run)
    found = export(run, run.constitution(), args.out, args.limit)
    print(
        f"{found['written']} written; contested are, by reason: principles disagree {found['principles']}, "
        f"orders disagree {found['orders']}, near one half {found['unsure']}"
    )
    return EXIT_DONE


def _chat(args: argparse.Namespace) -> int:
    from cai_ray import chat
    from cai_ray.storage.run import open_run

    return chat.run(open_run(args.run), args.model)


def _serve(args: argparse.Namespace) -> int:
    from cai_ray.serve import keys

    if args.add_token is not None:
        if not args.token_file:
            raise InputError(f"--add-token {args.add_token}: name the file for its hash with --token-file")
        print(keys.add_key(args.token_file, args.add_token, args.admin))
        return EXIT_DONE
    from cai_ray.serve import app, settings

    if args.update_constitution is not None:
        token = None if args.no_auth or args.run else keys.read_token()
        where = (args.run, args.host, args.port)
        print(json.dumps(app.update_constitution(args.update_constitution, *where, token)))
        return EXIT_DONE
    if args.run is None:
        raise InputError("serve: give a run's directory")
    given: dict[str, Any] = {
        "run": args.run,
        "keys": keys.read_keys(args.token_file, no_auth=args.no_auth, host=args.host),
        "no_auth": args.no_auth,
        "log_prompts": args.log_prompts,
    }
    if args.models:
        given["models"] = args.models
    if args.adapter:
        given["adapters"] = dict(_adapter(item) for item in args.adapter)
    found = settings.load(given, args.set)
    if args.write_config is not None:
        app.write_config(found, args.host, args.port, args.write_config)
        print(args.write_config)
        return EXIT_DONE
    app.serve(found, args.host, args.port, args.metrics_port)
    return EXIT_DONE


def _adapter(item: str) -> tuple[str, str]:
    name, equals, folder = item.partition("=")
    if not (name and equals and folder):
        raise InputError(f"--adapter {item}: write it as NAME=FOLDER")
    return name, folder


def _constitution_show(args: argparse.Namespace) -> int:
    from cai_ray import constitution

    document = constitution.load(args.file)
    if args.json:
        principles = [{**p.model_dump(mode="json"), "sha": p.sha} for p in document.principles]
        print(json.dumps({**document.model_dump(mode="json"), "principles": principles, "sha": document.sha}))
        return EXIT_DONE
    print(f"{document.name}  version {document.version}  {document.sha}")
    for about in (document.description, document.source, *document.sources):
        if about:
            print(about)
    for p in document.principles:
        facts = [f"weight {p.weight:g}"] + [f"priority {p.priority}"] * bool(p.priority)
        facts += ["off"] * (not p.enabled) + [p.form] * (p.form == "negative") + list(p.families or p.tags)
        print(f"\n{p.id}  {p.sha}  {p.title}  ({', '.join(facts)})\n  {p.text}")
    return EXIT_DONE


def _constitution_lint(args: argparse.Namespace) -> int:
    from cai_ray import constitution
    from cai_ray.constitution.lint import LEVELS, lint

    found = {file: lint(constitution.load(file)) for file in args.files}
    if args.config:
        for file, more in _contradictions(args).items():
            found[file] += more
    counts = {level: sum(f.level == level for fs in found.values() for f in fs) for level in LEVELS}
    if args.json:
        print(json.dumps({file: [f._asdict() for f in fs] for file, fs in found.items()}))
    else:
        for file, findings in found.items():
            for f in findings:
                where = f"{file}: {f.principle}" if f.principle else file
                print(f"{f.level:8} {where}: {f.message}; {f.remedy}")
        print(", ".join(f"{count} {level}s" for level, count in counts.items()))
    failed = counts["error"] or (args.strict and counts["warning"])
    return EXIT_STOPPED if failed else EXIT_DONE


def _contradictions(args: argparse.Namespace) -> dict[str, list[Any]]:
    """Of each file, by the engine of a configuration; its rows are of no use to anybody afterwards."""
    import tempfile

    from cai_ray import constitution
    from cai_ray.cluster.connect import connect, disconnect
    from cai_ray.config.load import load_config
    from cai_ray.storage.run import Run
    from cai_ray.studies.contradictions import contradictions

    found = {}
    with tempfile.TemporaryDirectory(prefix="cai-ray-lint-") as folder:
        settings = load_config(args.config, args.set)
        try:
            connect(settings)
            for number, file in enumerate(args.files):
                run = Run(settings.model_copy(update={"out": f"{folder}/{number}"}))
                found[file] = contradictions(run, constitution.load(file))
        finally:
            disconnect()
    return found


def _constitution_diff(args: argparse.Namespace) -> int:
    from cai_ray import constitution
    from cai_ray.constitution.differences import differences, lines

    before, after = constitution.load(args.before), constitution.load(args.after)
    changes = differences(before, after)
    found: dict[str, Any] = {
        "before": before.sha,
        "after": after.sha,
        "changes": [c._asdict() for c in changes],
    }
    if args.run:
        from cai_ray.report.text import columns
        from cai_ray.storage.run import open_run
        from cai_ray.studies import edit_cost

        run = open_run(args.run)
        found["cost"] = edit_cost.cost(run, after)
    if args.json:
        print(json.dumps(found, ensure_ascii=False))
        return EXIT_DONE
    for line in lines(changes):
        print(line)
    same = len(after.principles) - sum(c.what != "removed" for c in changes)
    print(f"{len(changes)} principles differ, {same} are the same; {before.sha} -> {after.sha}")
    if args.run:
        print()
        print("\n".join(columns(edit_cost.lines(found["cost"], run.root))))
    return EXIT_DONE


def _constitution_import(args: argparse.Namespace) -> int:
    from cai_ray.constitution.polis import draft
    from cai_ray.storage import files

    document = draft(args.comments, args.votes, args.name, args.least, args.most)
    files.write_bytes(args.out, document.to_yaml().encode())
    print(f"{len(document.principles)} principles; look at them with: cai-ray constitution lint {args.out}")
    return EXIT_DONE


def _constitution_test(args: argparse.Namespace) -> int:
    from cai_ray import constitution
    from cai_ray.cluster.connect import connect, disconnect
    from cai_ray.report.text import columns, interval, percent
    from cai_ray.storage.run import Run
    from cai_ray.studies import examples

    config = _load(args)
    document = constitution.load(args.constitution or config.constitution)
    try:
        connect(config)
        found = examples.run(Run(config), document)
    finally:
        disconnect()
    if args.json:
        print(json.dumps(found))
        return EXIT_DONE
    table = [["", "recall", "", "specificity", ""]]
    for name, rates in {**found["by_principle"], "all": found}.items():
        pairs = [rates[kind] for kind in ("recall", "specificity")]
        table.append([name, *(text for r in pairs for text in (percent(r["value"]), interval(r)))])
    print("\n".join(columns(table)))
    mixed = [
        f"{q} for {p}: {percent(share)}"
        for q, row in found["confusion"].items()
        for p, share in row.items()
        if p != q and share
    ]
    print("taken for another, of a principle's violating examples: " + ("; ".join(mixed) or "none"))
    print(f"{found['examples']} examples, {found['errors']} errors")
    return EXIT_DONE


def _constitution_schema(args: argparse.Namespace) -> int:
    from cai_ray.constitution.document import schema

    print(json.dumps(schema(), indent=2))
    return EXIT_DONE


def _town_build(args: argparse.Namespace) -> int:
    from cai_ray.studies import train_base

    print(json.dumps(train_base.build(args.out, seed=args.seed)))
    return EXIT_DONE


def _town_check(args: argparse.Namespace) -> int:
    from cai_ray.studies import check_base as check
    from cai_ray.town import BASE

    print(json.dumps(check.check(str(BASE) if args.model == "town" else args.model)))
    return EXIT_DONE


def _positive(text: str) -> int:
    return _whole(text, "must be a whole number of at least 1")


def _stages(text: str) -> list[str]:
    names = [name for name in text.split(",") if name]
    for name in names:
        if name not in STAGE_HELP:
            raise argparse.ArgumentTypeError(f"{name!r} is no stage; use {', '.join(STAGE_HELP)}")
    return names


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _port(text: str) -> int:
    return _whole(text, "must be a port from 1 to 65535", 65535)


def _whole(text: str, rule: str, most: float = float("inf")) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if not 1 <= value <= most:
        raise argparse.ArgumentTypeError(f"{text!r} {rule}")
    return value


def _host(text: str) -> str:
    # To a socket, no name at all means every address of the machine.
    if not text.strip():
        raise argparse.ArgumentTypeError(
            "is empty; 127.0.0.1 is this machine alone, 0.0.0.0 all of its addresses"
        )
    return text


if __name__ == "__main__":
    sys.exit(main())
