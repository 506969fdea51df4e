"""The stages of a run, one after the other.

A stage is complete when its manifest is there, which is written last. It stays as it is while it would have the same
inputs today (provenance/inputs.py): the settings that it reads, the constitution, the model, and the stages before it.
"""

from __future__ import annotations

import os
import sys
import time
import uuid
from collections.abc import Callable, Collection, Iterable
from contextlib import nullcontext, suppress
from importlib import import_module
from itertools import takewhile
from typing import Any

from cai_ray.cluster import cost
from cai_ray.cluster.meter import Meter
from cai_ray.config.run import RunConfig
from cai_ray.errors import InputError, OverBudget
from cai_ray.provenance.attempts import ATTEMPT, begin_attempt, check_attempt, check_attempts
from cai_ray.provenance.changes import changed_inputs, check_changes, describe_change
from cai_ray.provenance.inputs import inputs, missing
from cai_ray.provenance.precision import decide_precision
from cai_ray.provenance.versions import versions
from cai_ray.stages import STAGES, has_stage, needs_of, stages_of
from cai_ray.storage import files
from cai_ray.storage.object_stores import refusal
from cai_ray.storage.pins import COMMITS, pin
from cai_ray.storage.records import derive_id
from cai_ray.storage.run import Run
from cai_ray.train.checks.families import check_families

Say = Callable[[str], None]


def run_stages(
    config: RunConfig,
    stages: Iterable[str],
    *,
    overwrite: bool = False,
    force: bool = False,
    keep: Collection[str] = (),
    say: Say = lambda text: print(text, file=sys.stderr, flush=True),
) -> Run:
    """Runs the named stages in order and skips those that are complete.

    Args:
        overwrite: replace stages whose inputs changed.
        force: replace the named stages even if they are complete.
        keep: complete stages that stay as they are although their inputs changed; later manifests say so.

    Raises:
        InputError: an input is at fault, or a complete stage has other inputs and `overwrite` is not given.
    """
    config, commits = pin(config)
    decided = decide_precision(config)
    run, config = Run(decided.config), decided.config
    stages = list(stages)
    check_inputs(config, stages, say=say)
    check_run(run, stages, overwrite, keep)
    _write_run(run, {COMMITS: commits, "precision": decided.precision})
    if decided.line:
        say(decided.line)
    for name in stages:
        if name in keep and (changed := changed_inputs(run, name)):
            say(f"{name}: kept as it is, though {', '.join(changed)} changed")
        else:
            run_stage(run, name, overwrite=overwrite, force=force, keep=keep, say=say)
    return run


def check_inputs(
    config: RunConfig,
    stages: Collection[str] = (),
    model_elsewhere: bool = False,
    say: Say = lambda _: None,
    renders: bool = False,
    probed: bool = False,
) -> None:
    """Checks everything that can be known before any work (docs/method.md, item 38).

    Args:
        stages: those that are about to run; the settings of the others are checked as well.
        model_elsewhere: the models are not on this machine, so that neither they nor the options' tokens are checked.
        say: is told which rows of the data are left out, and other warnings.
        renders: whether it is told how many prompts the chat template refuses or exceed the context, too.
        probed: whether the models' families are tried out beside this, and need not be looked up.

    Raises:
        InputError: a setting, file, model, endpoint key or package that a stage needs is missing or cannot be used,
            an evaluation prompt is also a training prompt, or the output cannot be written.
    """
    from cai_ray.data.preflight import Preflight
    from cai_ray.train.runtime import sinks

    sinks.check(config.sinks)
    _check_method(config, stages)
    _ = config.document
    run = Run(config)
    preflight = Preflight(run, stages, not model_elsewhere, say, renders)
    for name in [*(n for n in stages if STAGES[n].before), *stages_of(config.method)]:
        if STAGES[name].checks:
            _checks(name).check(run, preflight)
    given = config.check.model if model_elsewhere else None
    for warning in [] if probed else check_families(run, stages, given):
        say(warning)
    _check_writable(run)


def check_run(run: Run, stages: list[str], overwrite: bool, keep: Collection[str] = ()) -> None:
    """Checks that the run directory lets these stages run: what they read is there, and has not changed.

    Raises:
        InputError: an earlier stage is missing, a stage was made or begun with other inputs and `overwrite` is not
            given, or one to keep is not complete.
    """
    for name in keep:
        if run.manifest(name) is None:
            raise InputError(f"--keep {name}: it is not complete in {run.root}; leave it out")
    for place, name in enumerate(stages):
        for upstream in needs_of(name, run.config.method):
            if upstream not in stages[:place] and run.manifest(upstream) is None:
                raise InputError(missing(run, name, upstream))
    check_changes(run, stages, overwrite, keep)
    if not overwrite:
        check_attempts(run, stages)


def run_stage(
    run: Run, name: str, *, overwrite: bool, force: bool, keep: Collection[str] = (), say: Say
) -> None:
    """Runs one stage, or skips it if it is complete.

    Raises:
        InputError: it has other inputs than before and neither `overwrite` nor `force` is given.
        Stopped: the labels do not pass `label.gates` (after `label`, and before what is trained on them), or the
            budget is spent, before the stage or while it runs.
    """
    from cai_ray.generate.text_lengths import describe_lengths
    from cai_ray.judging.gates import check_gates

    now, done = inputs(run, name), run.manifest(name)
    if done:
        cost.settle(run, name, derive_id(done["inputs"]), done["id"])
    if done and done["inputs"] == now and not force:
        _clear(run, name)  # the stage may have been killed before it came to that
        say(f"{name}: done before ({done['seconds']:.0f} s), skipped")
    else:
        if name in ("rm", "dpo"):  # trained on labels, and perhaps run alone after a gate stopped the run
            check_gates(run)
        if done and not (overwrite or force):
            raise InputError(describe_change(run, name, done["inputs"], now))
        if not done and not overwrite:  # now all that it reads is there
            check_attempt(run, name, now)
        manifest = _make(run, name, now, done, keep, say)
        rows = f", {manifest['rows_out']} rows" if "rows_out" in manifest else ""
        errors = f", {manifest['errors']} errors" if manifest.get("errors") else ""
        say(f"{name}: done in {manifest['seconds']:.0f} s{rows}{errors}")
        if texts := manifest.get("texts"):
            say(describe_lengths(name, texts))
    if name == "label":  # it is complete, whatever a gate says: with other gates the run goes on from here
        check_gates(run)


def _make(
    run: Run, name: str, now: dict[str, str], done: dict[str, Any] | None, keep: Collection[str], say: Say
) -> dict[str, Any]:
    """Makes a stage with the inputs `now` and writes its manifest; `done` is that of a result that is replaced."""
    from cai_ray.generate import reuse

    stage = STAGES[name]
    if on_cluster := stage.kind != "reads":  # before anything is deleted: there may be no cluster, or no room
        _join_cluster(run, name)
    before = reuse.content(run, name) if done and name in reuse.STAGES else None
    _clear_the_way(run, name, now, done)
    say(f"{name}: started")
    started, identity = time.time(), derive_id(now)
    try:
        with Meter(run, name, identity) if on_cluster else nullcontext():
            result = import_module(stage.module).run(run)
    except OverBudget as e:  # what was under way has cost something, too
        raise OverBudget(f"{name}: {cost.over_budget(run.config, cost.attempts(run)) or e}") from e
    if left_out := cost.left_out(run, name, identity):
        asked = "reviser" if "reviser" in result else "engine"  # the policy is never at an endpoint
        result = {**result, asked: {**result.get(asked, {}), "left_out": left_out}}
    manifest = {
        "stage": name,
        "id": uuid.uuid4().hex[:12],
        "inputs": now,
        "seconds": round(time.time() - started, 2),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "constitution_sha": run.config.document.sha,
        "today": run.today,
        "versions": versions(),
        **result,
    }
    if on_cluster:
        manifest["resources"] = cost.resources(run, name, identity)
    if done and before and reuse.content(run, name) == before:
        manifest["id"] = done["id"]  # the same rows: what was made of them stands
    # All stages before this one, not only those that it reads: what it reads was made from them.
    earlier = takewhile(lambda other: other != name, STAGES)
    if kept := {k: changed for k in earlier if k in keep and (changed := changed_inputs(run, k))}:
        manifest["kept"] = kept
    files.write_json(run.path(name, "manifest.json"), manifest)
    cost.settle(run, name, identity, manifest["id"])
    _clear(run, name)
    return manifest


def _join_cluster(run: Run, name: str) -> None:
    """Raises OverBudget or InputError if there is no budget, no cluster or no room for the stage."""
    from cai_ray.cluster.connect import connect

    if run.config.budget.given and (over := cost.over_budget(run.config, cost.attempts(run))):
        raise OverBudget(f"before {name}: {over}")
    connect(run.config)
    _checks(name).check_room(run)


def _clear_the_way(run: Run, name: str, now: dict[str, str], done: dict[str, Any] | None) -> None:
    """Removes the result that is replaced; rows that could be reused are set aside for the new attempt."""
    from cai_ray.generate import journal, reuse

    if done and (done["inputs"] == now or name not in reuse.STAGES):
        files.delete(run.path(name))  # asked for anew, or with nothing in it that could be reused
    elif done:
        reuse.set_aside(run, name)
    if STAGES[name].kind != "trains":  # trainers find by themselves what a killed attempt left
        journal.begin(run, name, now)
    begin_attempt(run, name, now)


def _clear(run: Run, name: str) -> None:
    """Removes what only an unfinished stage needs. Optimizer states are most of a run's size."""
    from cai_ray.generate import journal, reuse

    for leftover in ("checkpoints", "tokens", journal.FOLDER, reuse.FOLDER, ATTEMPT):
        files.delete(run.path(name, leftover))


def _write_run(run: Run, decided: dict[str, Any]) -> None:
    """Writes run.json, and the constitution beside the results.

    Args:
        decided: what the first start decides for all later ones: commits of the hub (storage/pins.py), precisions
            (provenance/precision.py).
    """
    document, config = run.config.document, run.config
    files.write_bytes(run.path("constitution.yaml"), document.to_yaml().encode())
    about = {
        "versions": versions(),
        "seed": config.seed,
        "constitution_sha": document.sha,
        "today": run.today,
    }
    files.write_json(run.path("run.json"), {"config": config.model_dump(mode="json"), **about, **decided})


def _checks(name: str) -> Any:
    """The module with `check` and `check_room` of a stage."""
    return import_module(STAGES[name].checks)


def _check_method(config: RunConfig, stages: Iterable[str]) -> None:
    for name in stages:
        if not has_stage(config.method, name):
            raise InputError(
                f"{name} is not a stage of method={config.method}; set method={STAGES[name].method}, and choose "
                "another --out if this run has the other policy"
            )


def _check_writable(run: Run) -> None:
    probe = run.path(f".probe-{uuid.uuid4().hex[:8]}")
    try:
        files.write_bytes(probe, b"")
        files.delete(probe)
        with suppress(OSError):  # the folder is not empty, or not local
            os.rmdir(run.root)
    except OSError as e:
        raise InputError(
            f"out {run.root}: cannot be written ({e.strerror or refusal(e) or e}); choose another with --out"
        ) from e
