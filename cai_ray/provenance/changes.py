"""What has changed since a stage was made, and how that is said."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from contextlib import suppress
from typing import Any

from cai_ray.config.fingerprint import result_settings
from cai_ray.config.run import RunConfig
from cai_ray.config.section import Section
from cai_ray.errors import InputError
from cai_ray.provenance.inputs import inputs
from cai_ray.stages import STAGES, needs_of, stages_of
from cai_ray.storage.run import Run, open_run


def check_changes(run: Run, stages: list[str], overwrite: bool, keep: Collection[str] = ()) -> None:
    """Checks before anything starts that no completed stage that is to be run or read has other inputs.

    Raises:
        InputError: one has, `overwrite` is not given, and it is not among those to `keep`.
    """
    if overwrite:
        return
    # Red-team prompts come first: once they are written they are mostly named as a source, which changes what they
    # came from.
    for name in [*(n for n in stages if STAGES[n].before), *stages_of(run.config.method)]:
        done = run.manifest(name)
        if done is None or name in keep:
            continue
        try:
            now = inputs(run, name)
        except InputError:  # what it read is gone, and will be made again
            continue
        then = done["inputs"]
        needs = needs_of(name, run.config.method)
        if name not in stages and not any(name in needs_of(s, run.config.method) for s in stages):
            # Not touched now: it may wait to be made again, but a directory holds one configuration.
            then, now = ({k: v for k, v in d.items() if k not in needs} for d in (then, now))
        if then != now:
            raise InputError(describe_change(run, name, then, now))


def changed_inputs(run: Run, name: str) -> list[str]:
    """The names of a completed stage's inputs that are not what they were; none of a stage that is not complete."""
    done = run.manifest(name)
    return changed_keys(done["inputs"], inputs(run, name)) if done else []


def describe_change(run: Run, name: str, then: dict[str, str], now: dict[str, str]) -> str:
    """One line that says which inputs of a stage changed, with the settings by name, and what to do."""
    keys = changed_keys(then, now)
    settings = ""
    with suppress(InputError):  # run.json is damaged: only the sections are named then
        before = open_run(run.root).config
        lines = [
            d
            for key in setting_keys(keys)
            for d in differences(key, settings_of(before, key), settings_of(run.config, key))
        ]
        settings = f" ({'; '.join(lines[:4])})" if lines else ""
    return (
        f"{run.root}: {name} was made with other inputs: {', '.join(keys)} changed{settings}; "
        "--overwrite makes it again, --out chooses another directory"
    )


def setting_keys(names: Sequence[str]) -> list[str]:
    """The keys of the configuration behind inputs: the document is decided by `without`, too."""
    return [*names, "without"] if "constitution" in names else list(names)


def settings_of(config: RunConfig, key: str) -> Any:
    """What of a setting or section of the configuration decides results, as plain data; None of another input."""
    value = getattr(config, key, None)
    if isinstance(value, Section):
        return result_settings(value, paths=True)
    if isinstance(value, tuple):
        return [result_settings(part, paths=True) if isinstance(part, Section) else part for part in value]
    return value


def differences(key: str, old: Any, new: Any) -> list[str]:
    """The settings below `key` that differ, each as `section.key: old → new`."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            d
            for k in sorted(old.keys() | new.keys())
            for d in differences(f"{key}.{k}", old.get(k), new.get(k))
        ]
    return [] if old == new else [f"{key}: {json.dumps(old)[:60]} → {json.dumps(new)[:60]}"]


def changed_keys(then: dict[str, str], now: dict[str, str]) -> list[str]:
    """The names of the inputs that differ."""
    return sorted(key for key in then.keys() | now.keys() if then.get(key) != now.get(key))
