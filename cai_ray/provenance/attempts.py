"""What an unfinished stage was begun with: RUN/STAGE/attempt.json, from its first attempt until it is complete.

A stopped stage goes on if it has the same inputs today. If not, what it has made so far is deleted with `--overwrite`
alone, and one line names the setting that changed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from cai_ray.config.fingerprint import layout_settings
from cai_ray.errors import InputError
from cai_ray.provenance.changes import changed_keys, differences, setting_keys, settings_of
from cai_ray.provenance.inputs import inputs
from cai_ray.stages import STAGES
from cai_ray.storage import files
from cai_ray.storage.filesystems import resolve
from cai_ray.storage.run import Run
from cai_ray.storage.tables import has_rows

ATTEMPT = "attempt.json"


def check_attempts(run: Run, stages: Iterable[str]) -> None:
    """`check_attempt` for those stages that are not complete, as far as what they read is there by now."""
    for name in stages:
        # Without an attempt nothing is hashed: what the stage reads may be large.
        if run.manifest(name) is None and (attempt := _read(run, name)):
            try:
                now = inputs(run, name)
            except InputError:  # what it reads is made before it: it is checked then
                continue
            _check(run, name, attempt, now)


def check_attempt(run: Run, name: str, now: dict[str, str]) -> None:
    """Checks that an unfinished stage can go on with the inputs `now`, if it has made anything that would be lost.

    Raises:
        InputError: it was begun with other inputs, or its checkpoints with settings that they depend on.
    """
    if attempt := _read(run, name):
        _check(run, name, attempt, now)


def _check(run: Run, name: str, attempt: dict[str, Any], now: dict[str, str]) -> None:
    if _fits(run, name, attempt, now) or not _has_work(run, name):
        return
    begun = "its checkpoints were" if STAGES[name].kind == "trains" else "its rows were"
    remedy = "set it back to go on from there, or begin the stage again with --overwrite"
    keys = changed_keys(attempt["inputs"], now)
    if not keys:
        changes = differences(name, attempt["layout"], _layout(run, name))
        raise InputError(
            f"{run.root}: {name}: {begun} made with other settings ({'; '.join(changes)}); {remedy}"
        )
    then = attempt["settings"]
    settings = [
        d
        for key in setting_keys(keys)
        if key in then
        for d in differences(key, then[key], settings_of(run.config, key))
    ]
    named = f" ({'; '.join(settings[:4])})" if settings else ""
    raise InputError(
        f"{run.root}: {name} is not complete, and {begun} made with other inputs: {', '.join(keys)} changed{named}; "
        f"{remedy}"
    )


def begin_attempt(run: Run, name: str, now: dict[str, str]) -> None:
    """Notes what a stage is begun with. What an attempt with other inputs left of a training stage is deleted."""
    attempt = _read(run, name)
    if attempt and STAGES[name].kind == "trains" and not _fits(run, name, attempt, now):
        files.delete(run.path(name))
    settings = {key: settings_of(run.config, key) for key in setting_keys(STAGES[name].reads)}
    note = {"inputs": now, "settings": settings | {"seed": run.config.seed}, "layout": _layout(run, name)}
    files.write_json(run.path(name, ATTEMPT), note)


def _read(run: Run, name: str) -> dict[str, Any] | None:
    return files.read_object(run.path(name, ATTEMPT), f"delete {run.path(name)} and run the stage again")


def _fits(run: Run, name: str, attempt: dict[str, Any], now: dict[str, str]) -> bool:
    return attempt["inputs"] == now and attempt["layout"] == _layout(run, name)


def _layout(run: Run, name: str) -> dict[str, Any]:
    return layout_settings(getattr(run.config, name)) if STAGES[name].kind == "trains" else {}


def _has_work(run: Run, name: str) -> bool:
    """Says whether an unfinished stage has checkpoints, rollouts or finished rows."""
    if STAGES[name].kind != "trains":
        rows = files.list_files(run.path(name, "journal"), ".parquet", recursive=True)
        return any(path.rsplit("/", 1)[1].startswith("done-") for path in rows)
    return bool(checkpointed(run, name)) or (name == "ppo" and has_rows(run.path(name)))


def checkpointed(run: Run, name: str) -> set[str]:
    """The names by which Ray Train finds checkpoints of a stage: RUN/STAGE/checkpoints/NAME/checkpoint_…/…"""
    _, folder = resolve(run.path(name, "checkpoints"))
    inside = [
        path[len(folder) :].strip("/")
        for path in files.list_files(run.path(name, "checkpoints"), recursive=True)
    ]
    return {path.split("/")[0] for path in inside if "/checkpoint_" in path.rpartition("/")[0]}
