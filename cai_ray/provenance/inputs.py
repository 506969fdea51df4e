"""What a stage's result depends on, as hashes.

Files, folders and models are compared by their content. Settings that only change how a stage runs are left out
(config/section.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

from cai_ray import constitution as constitutions
from cai_ray.config.fingerprint import Content, fingerprint, named_contents, result_settings
from cai_ray.config.judge import PromptedModel
from cai_ray.config.ppo import JUDGE
from cai_ray.config.section import Section
from cai_ray.data.formats import data_files
from cai_ray.data.training import held_out_sources
from cai_ray.errors import InputError
from cai_ray.prompts.load import load_templates
from cai_ray.stages import ROLES, STAGES, needs_of
from cai_ray.storage import files, hub
from cai_ray.storage.filesystems import resolve
from cai_ray.storage.hashes import file_hashes
from cai_ray.storage.models import model_sha
from cai_ray.storage.records import derive_id
from cai_ray.storage.run import Run


def inputs(run: Run, name: str) -> dict[str, str]:
    """What a stage's result depends on: each input by name with a short hash.

    Raises:
        InputError: a stage that it reads is not complete, or a file or model is not there.
    """
    upstream = {}
    for need in needs_of(name, run.config.method):
        manifest = run.manifest(need)
        if manifest is None:
            raise InputError(missing(run, name, need))
        upstream[need] = manifest["id"]
    return own_inputs(run, name) | upstream


def own_inputs(run: Run, name: str) -> dict[str, str]:
    """The inputs of a stage that are no other stage's results.

    Raises:
        InputError: a file or model is not there.
    """
    config, hashes = run.config, {"seed": str(run.config.seed)}
    base = cache(lambda: model_sha(run.locate("base")))  # read once: it may be large
    for key in STAGES[name].reads:
        value: Any = config.rollout_engine if (name, key) == ("ppo", "engine") else getattr(config, key)
        if key == "model":
            hashes[key] = base()
        elif key == "constitution":
            hashes[key] = config.document.sha
        elif key in ("template_args", "chat_template") and not value:
            continue  # as if there were no such setting
        elif key == "templates":
            hashes[key] = load_templates(value).sha
        elif isinstance(value, Section):
            hashes[key] = _fingerprint(run, value, base)
        elif isinstance(value, tuple):
            hashes[key] = derive_id([_fingerprint(run, part, base) for part in value])
        else:
            hashes[key] = derive_id(value)
    # `evaluate.overlap: drop` leaves out of training what is held out.
    if STAGES[name].training_data and (held_out := held_out_sources(config)):
        hashes["held_out"] = derive_id([_fingerprint(run, part, base) for part in held_out])
    if name == "ppo" and config.ppo.watch.asks_judge:
        hashes["watch_document"] = config.document_of(config.watch_judge).sha
    return hashes


def missing(run: Run, name: str, upstream: str) -> str:
    """One line that says which stage has to be made first."""
    return f"{name} needs {upstream}, which is not complete in {run.root}; run `cai-ray {upstream}` first"


def _fingerprint(run: Run, section: Section, base: Callable[[], str]) -> str:
    return fingerprint(section, tuple(_content(run, named, base) for named in named_contents(section)))


def _content(run: Run, named: Content, base: Callable[[], str]) -> str:
    """The hash of what a setting names. A model that the run makes stands for itself: its stage is an input, too."""
    value = named.value
    if named.kind == "engine":
        assert isinstance(named.section, PromptedModel)
        return derive_id(result_settings(run.resolve_model(named.section).engine))
    if value is None:
        return ""
    if named.kind == "folder":
        return _folder_sha(value)
    if named.kind == "files":
        return _files_sha(value)
    if named.kind == "templates":
        return load_templates(value).sha
    if named.kind == "constitution":
        return constitutions.load(value).sha
    if isinstance(named.section, PromptedModel) and (model := run.resolve_model(named.section)).is_served:
        return model.location  # an endpoint knows it by its name alone
    if value == "base":
        return base()
    return value if value in ROLES or value == JUDGE else model_sha(run.locate(value))


def _folder_sha(path: str) -> str:
    """A content hash of all files of a folder."""
    return derive_id(file_hashes(path, recursive=True))


def _files_sha(path: str) -> str:
    """The content hash of a file of rows; of several files, a hash of their names and sizes."""
    if path.startswith(("town:", hub.DATASETS)):  # a commit of the hub says what is in it
        return path
    fs, real = resolve(path)
    infos: list[Any] = fs.get_file_info(data_files(path))
    if [i.path for i in infos] == [real]:
        return derive_id(_content_sha(path, infos[0].size, infos[0].mtime_ns))
    return derive_id([(i.base_name, i.size) for i in infos])


@lru_cache
def _content_sha(path: str, size: int, changed: int) -> str:
    """Read once, however many stages ask: the file may be large, and far away."""
    return hashlib.sha256(files.read_bytes(path)).hexdigest()
