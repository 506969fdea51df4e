"""`cai-ray run` and a command for each stage, such as `cai-ray revise`.

A stage's work is in the module that the table of stages names for it, in the function `run`; what it means to run
stages (their order, what is done already, what changed) is in cai_ray/pipeline.py.
"""

import json
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from cai_ray.cli.options import (
    Check,
    Config,
    Estimate,
    EstimateJson,
    Out,
    Overrides,
    Overwrite,
    Probe,
    listed_stages,
    stage_name,
)
from cai_ray.errors import InputError
from cai_ray.stages import stages_of

if TYPE_CHECKING:
    from cai_ray.config.run import RunConfig


def run(
    config: Config,
    overrides: Overrides = None,
    out: Out = None,
    overwrite: Overwrite = False,
    check: Check = False,
    until: Annotated[
        str | None,
        typer.Option("--until", metavar="STAGE", parser=stage_name, help="Stop after this stage."),
    ] = None,
    keep: Annotated[
        str | None,
        typer.Option(
            "--keep",
            metavar="STAGE,…",
            help="Leave these completed stages as they are, even if their inputs changed.",
        ),
    ] = None,
    estimate: Estimate = None,
    as_json: EstimateJson = False,
    probe: Probe = False,
) -> None:
    """Run all stages in order; completed ones are skipped."""
    _check_options(check, probe)
    settings = _load(config, overrides, out)
    names = stages_of(settings.method)
    if until:
        if until not in names:
            raise InputError(
                f"--until {until} is not a stage of method={settings.method}; use one of {', '.join(names)}"
            )
        names = names[: names.index(until) + 1]
    kept = listed_stages(keep, "--keep")
    if check:
        print_check(settings, names, overwrite, kept, probe)
    elif estimate:
        print_estimate(settings, names, estimate, as_json)
    else:
        start(settings, names, overwrite=overwrite, keep=kept)


def stage_command(name: str) -> Callable[..., None]:
    """The function behind the command of a stage."""
    if name == "report":
        return report

    def stage(
        config: Config,
        overrides: Overrides = None,
        out: Out = None,
        overwrite: Overwrite = False,
        check: Check = False,
        estimate: Estimate = None,
        as_json: EstimateJson = False,
        probe: Probe = False,
    ) -> None:
        _check_options(check, probe)
        settings = _load(config, overrides, out)
        if check:
            print_check(settings, [name], overwrite, probe=probe)
        elif estimate:
            print_estimate(settings, [name], estimate, as_json)
        else:
            start(settings, [name], overwrite=overwrite, force=overwrite)

    def stage_without_estimate(
        config: Config,
        overrides: Overrides = None,
        out: Out = None,
        overwrite: Overwrite = False,
        check: Check = False,
        probe: Probe = False,
    ) -> None:
        stage(config, overrides, out, overwrite, check, probe=probe)

    return stage_without_estimate if name == "redteam" else stage


def report(
    config: Annotated[
        str,
        typer.Argument(
            metavar="CONFIG", help="Configuration of a run; or, with OTHER, the directory of the first run."
        ),
    ],
    other: Annotated[
        str | None,
        typer.Argument(metavar="OTHER", help="Directory of a second run, to compare with the first."),
    ] = None,
    overrides: Overrides = None,
    out: Annotated[
        str | None,
        typer.Option("--out", metavar="URI", help="Run directory; or the folder for a comparison's page."),
    ] = None,
    overwrite: Overwrite = False,
    check: Check = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a comparison as JSON.")] = False,
) -> None:
    if other is not None:
        compare_runs(config, other, out, as_json)
        return
    settings = _load(config, overrides, out)
    if check:
        print_check(settings, ["report"], overwrite)
    else:
        start(settings, ["report"], overwrite=overwrite, force=overwrite)


def _check_options(check: bool, probe: bool) -> None:
    if probe and not check:
        raise InputError("--probe goes with --check; add it")


def _load(config: str, overrides: Sequence[str] | None, out: str | None) -> "RunConfig":
    from cai_ray.config.load import load_config

    return load_config(config, list(overrides or ()), out=out)


def start(
    settings: "RunConfig",
    names: Sequence[str],
    *,
    overwrite: bool,
    force: bool = False,
    keep: Sequence[str] = (),
) -> None:
    """Runs stages and prints the run directory.

    Args:
        force: run them again even where nothing changed, as `cai-ray STAGE --overwrite` asks.
    """
    from cai_ray import pipeline
    from cai_ray.cluster.connect import disconnect

    try:
        done = pipeline.run_stages(settings, names, overwrite=overwrite, force=force, keep=keep)
    finally:
        disconnect()
    print(done.root)


def print_check(
    settings: "RunConfig",
    names: Sequence[str],
    overwrite: bool,
    keep: Sequence[str] = (),
    probe: bool = False,
) -> None:
    """`--check`: validates everything that can be known before a start."""
    from cai_ray import pipeline
    from cai_ray.estimate.fit import memory_lines
    from cai_ray.estimate.shape import elsewhere
    from cai_ray.provenance.precision import decide_precision
    from cai_ray.storage.pins import pin
    from cai_ray.storage.run import Run

    model_elsewhere = elsewhere(settings)
    decided = decide_precision(pin(settings, models=not model_elsewhere).config)
    settings = decided.config
    for line in memory_lines(settings):
        print(line)
    pipeline.check_inputs(settings, names, model_elsewhere, say=print, renders=True, probed=probe)
    pipeline.check_run(Run(settings), list(names), overwrite, keep)
    if probe:
        from cai_ray.train.families.probe import probe as try_models

        try_models(Run(settings), names, lambda line: print(line, flush=True))
    if model_elsewhere:
        print(f"not seen from here: weights, tokenizer and chat template of {settings.model}")
    if decided.line:
        print(decided.line)
    print("ok: nothing was started")


def print_estimate(settings: "RunConfig", names: Sequence[str], prompts: int, as_json: bool) -> None:
    """`--estimate`: time and cost of these stages, from a sample."""
    from cai_ray.cluster.connect import disconnect
    from cai_ray.estimate import estimate, lines

    def say(line: str) -> None:
        print(f"[sample] {line}", file=sys.stderr, flush=True)

    try:
        result = estimate(settings, list(names), prompts, say)
    finally:
        disconnect()
    for line in [json.dumps(result)] if as_json else lines(result):
        print(line)


def compare_runs(first: str, second: str, out: str | None, as_json: bool) -> None:
    """`cai-ray report RUN OTHER`: what the second run changed, and on request a page of it."""
    from cai_ray.report import side_by_side
    from cai_ray.storage import files
    from cai_ray.storage.run import open_run

    comparison = side_by_side.compare(open_run(first), open_run(second))
    if out:
        files.write_bytes(files.join(out, "index.html"), side_by_side.page(comparison).encode())
    for line in [json.dumps(comparison)] if as_json else side_by_side.lines(comparison):
        print(line)
