"""What a stage's result depends on, as hashes."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import Any

from pydantic import BaseModel

from cai_ray import constitution as constitutions
from cai_ray.config.judge import JudgeConfig, PromptedModel
from cai_ray.config.ppo import JUDGE
from cai_ray.data.formats import data_files
from cai_ray.errors import InputError
from cai_ray.prompts.load import load_templates
from cai_ray.stages import ROLES, STAGES, needs_of
from cai_ray.storage import files
from cai_ray.storage.filesystems import open_file, resolve
from cai_ray.storage.models import model_sha
from cai_ray.storage.records import derive_id
from cai_ray.storage.run import Run

_ADDED: dict[str, Any] = {
    "critique_model": None,
    "critique": True,
    "hard_labels": False,
    "sets": [],
    "harness": None,
}


_HOW = {
    "workers",
    "cpus_per_worker",
    "micro_batch_tokens",
    "checkpoint_every",
    "keep_checkpoints",
    "offload_optimizer",
    "gates",
}


def inputs(run: Run, name: str) -> dict[str, str]:
    """What a stage's result depends on, each as a short hash."""
    stage, config = STAGES[name], run.config
    found: dict[str, str] = {"seed": str(config.seed)}
    for section in stage.reads:
        value = getattr(config, section)
        if section == "constitution":
            found[section] = config.document.sha
        elif section == "model":
            found[section] = model_sha(run.model("base"))
        elif section == "templates":
            found[section] = load_templates(value).sha
        elif section == "prompts":
            found[section] = derive_id([_source_sha(s.path, s.model_dump()) for s in value])
        elif hasattr(value, "model_dump"):
            settings = _settings(value)
            paths = [s.path for key in ("prompts", "human", "sets") for s in getattr(value, key, ())]
            paths += [s.path for s in getattr(getattr(value, "watch", None), "prompts", ())]
            paths += [p for p in [getattr(value, "gold", None)] if p]
            models = [model_sha(run.model(m)) for m in _models(value)]
            for model in _prompted_models(value).values():
                models += _prompted_model_shas(run, model)
            files_sha = [_source_sha(p, {}) for p in paths]
            if folder := getattr(getattr(value, "harness", None), "include_path", None):
                files_sha.append(_folder_sha(folder))
            found[section] = derive_id(settings, files_sha, models)
        else:
            found[section] = derive_id(value)
    if config.engine.quantization and stage.kind != "trains":
        found["engine"] = config.engine.quantization
    for upstream in needs_of(name, config.method):
        manifest = run.manifest(upstream)
        if manifest is None:
            raise InputError(missing(run, name, upstream))
        found[upstream] = manifest["id"]
    return found


def missing(run: Run, name: str, upstream: str) -> str:
    """One line that says which stage has to be made first."""
    return f"{name} needs {upstream}, which is not complete in {run.root}; run `cai-ray {upstream}` first"


def _settings(section: BaseModel) -> dict[str, Any]:
    """What of a section changes its stage's result. Of an engine that is which endpoint, and how it is asked, or how
    its weights are rounded."""
    settings = {k: v for k, v in section.model_dump(mode="json").items() if k not in _HOW}
    for key, model in _prompted_models(section).items():
        place = settings
        for part in key.split("."):
            place = place[part]
        place.pop("engine")
        if model.engine and model.engine.answers_by:
            place["engine"] = model.engine.answers_by
    # As it was before there were such settings.
    return {k: v for k, v in settings.items() if k not in _ADDED or v != _ADDED[k]}


def _models(section: BaseModel) -> list[str]:
    """Folders and ids that a section names, beside the run's own models."""
    named = [getattr(section, key, "sl") for key in ("init", "model")]
    named += [source.model for source in getattr(section, "rewards", ())]
    if watch := getattr(section, "watch", None):
        named.append(watch.opinion)
    return [model for model in named if model not in {*ROLES, JUDGE}]


def _prompted_models(section: BaseModel, prefix: str = "") -> dict[str, PromptedModel]:
    """The models that a section, or a section in it, describes, by their keys."""
    models: dict[str, PromptedModel] = {}
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, PromptedModel):
            models[prefix + name] = value
        elif isinstance(value, BaseModel):
            models |= _prompted_models(value, f"{prefix}{name}.")
    return models


def _prompted_model_shas(run: Run, model: PromptedModel) -> list[str]:
    """Hashes of what a prompted model's settings name, besides the run's own models, template set and document."""
    shas = [] if model.model in ROLES else [run.resolve_model(model).sha]
    if model.templates:
        shas.append(load_templates(model.templates).sha)
    if isinstance(model, JudgeConfig) and model.constitution:
        shas.append(constitutions.load(model.constitution).sha)
    return shas


def _folder_sha(path: str) -> str:
    """A content hash of all files of a folder."""
    fs, root = resolve(path)
    paths = {}
    for file in files.list_files(path, recursive=True):
        with open_file(fs, file) as f:
            paths[file[len(root) :]] = hashlib.sha256(f.read()).hexdigest()
    return derive_id(paths)


def _source_sha(path: str, settings: dict[str, Any]) -> str:
    """A prompt file's content hash; of several files, of their names and sizes."""
    if path.startswith("town:"):
        return derive_id(path, settings)
    fs, real = resolve(path)
    infos = fs.get_file_info(data_files(path))
    if [i.path for i in infos] == [real]:
        return derive_id(settings, _content_sha(path, infos[0].size, infos[0].mtime_ns))
    return derive_id(settings, [(i.base_name, i.size) for i in infos])


@lru_cache
def _content_sha(path: str, size: int, changed: int) -> str:
    """Read once, however many stages ask: it may be large, and far away."""
    return hashlib.sha256(files.read_bytes(path)).hexdigest()
