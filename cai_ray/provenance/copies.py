"""Stages that a run takes over from another."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress

from cai_ray.config.run import RunConfig
from cai_ray.errors import InputError
from cai_ray.provenance.inputs import inputs
from cai_ray.stages import stages_of
from cai_ray.storage import files
from cai_ray.storage.filesystems import resolve
from cai_ray.storage.run import Run

_UNFINISHED = ("checkpoints/", "tokens/", "journal/", "before/")
"""Folders of a stage that only matter until it is complete."""


def fork(run: Run, config: RunConfig, stages: Iterable[str]) -> Run:
    """Begins a run with completed stages of another: their artifacts and manifests are copied.

    The new configuration may differ in what later stages read. Stages that were copied before are left as they are.

    Raises:
        InputError: a stage is not complete in the first run.
    """
    new = Run(config)
    for name in stages:
        manifest, present = run.manifest(name), new.manifest(name)
        if manifest is None:
            raise InputError(f"{run.root}: {name} is not complete; run `cai-ray {name}` first")
        if present and present["id"] == manifest["id"]:
            continue
        files.delete(new.path(name))
        _, source = resolve(run.path(name))
        for path in files.list_files(run.path(name), recursive=True):
            inside = path[len(source) :].strip("/")
            if inside != "manifest.json" and not inside.startswith(_UNFINISHED):
                files.copy(run.path(name, inside), new.path(name, inside))
        files.write_json(new.path(name, "manifest.json"), manifest)
    return new


def share(run: Run, config: RunConfig) -> Run:
    """Begins a run with those stages of another that have the same inputs in both (`fork`)."""
    new = Run(config)
    for name in stages_of(config.method):
        manifest = run.manifest(name)
        with suppress(InputError):  # what the stage reads is not made yet
            if manifest and manifest.get("inputs") == inputs(new, name):
                fork(run, config, [name])
    return new
