"""Model folders: fetches them to this node, checks that they are whole, hashes them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from cai_ray.config.engine import EngineConfig
from cai_ray.errors import InputError
from cai_ray.storage.files import exists, list_files, local_folder, read_object
from cai_ray.storage.filesystems import (
    COPY_BYTES,
    is_local,
    open_file,
    resolve,
)


class ResolvedModel(NamedTuple):
    """A model that is prompted, with everything that its settings leave to the run (`Run.resolve_model`)."""

    name: str
    """Its role, folder or id, as the settings have it; at an endpoint, the name it is served by."""
    location: str
    """Path, URI or hub id; at an endpoint, the name it is served by."""
    engine: EngineConfig
    templates: str
    """The template set, by name or path."""
    template_args: Mapping[str, Any] = {}
    """Arguments of the model's chat template."""

    @property
    def is_served(self) -> bool:
        """Whether the model is at an endpoint, which knows it by its name alone."""
        return self.engine.kind == "openai"

    def fetch(self) -> str:
        """The location on this node: if the model is remote, a copy of it is made first."""
        return self.location if self.is_served else local_model(self.location)

    def check(self) -> None:
        """Raises what `fetch` raises for a model on this machine. No remote model is fetched."""
        if not self.is_served and is_local(resolve(self.location)[0]):
            self.fetch()

    @property
    def sha(self) -> str:
        """Content hash of the model folder; for an id or the name at an endpoint, a hash of it."""
        return model_sha(self.fetch())


def local_model(uri: str) -> str:
    """A model's folder on this node, or its id: a name that is not a folder is an id of the Hugging Face hub, whose
    library resolves and caches it.

    Raises:
        InputError: a URI does not exist; a folder has no configuration or no weights, or its weights are damaged.
    """
    if "://" not in uri and not exists(uri):
        return uri
    try:
        folder = local_folder(uri)
    except InputError as e:
        raise InputError(f"model {e}; give a Hugging Face folder or id") from e
    _check_model(uri, folder)
    return folder


def _check_model(uri: str, folder: str) -> None:
    """Checks a model folder before an engine is started with it; only the headers of the weights are read."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    if "config.json" not in names:
        raise InputError(f"model {uri}: the folder has no config.json; give a Hugging Face model folder")
    weights = {name for name in names if name.endswith(".safetensors")}
    if not weights:
        raise InputError(
            f"model {uri}: the folder has no .safetensors weights; save them with save_pretrained()"
        )
    again = "copy or make it again"
    index = read_object(os.path.join(folder, "model.safetensors.index.json"), again) or {}
    if missing := sorted({*index.get("weight_map", {}).values()} - weights):
        raise InputError(f"model {uri}: {missing[0]} is missing, which its index names; {again}")
    for name in sorted(weights):
        try:
            with safe_open(os.path.join(folder, name), "np"):
                pass
        except (SafetensorError, OSError) as e:
            raise InputError(
                f"model {uri}: {name} is not whole ({e}); {again}, or run `git lfs pull` if it is a pointer to the file"
            ) from e


def weight_bytes(uri: str) -> int | None:
    """The size of a model folder's weights; None of an id, whose folder is not known before it is fetched."""
    fs, _ = resolve(uri)
    if weights := list_files(uri, ".safetensors"):
        return sum(info.size for info in fs.get_file_info(weights))
    return None


def folder_sha(uri: str | Path) -> str:
    """Content hash of a model folder (weights, configuration, tokenizer)."""
    fs, root = resolve(uri)
    digest = hashlib.sha256()
    for path in list_files(uri):
        if path.endswith((".safetensors", ".json", ".jinja", ".model", ".bin", ".txt")):
            digest.update(os.path.relpath(path, root).encode())
            with open_file(fs, path) as f:
                while block := f.read(COPY_BYTES):
                    digest.update(block)
    return digest.hexdigest()[:16]


def model_sha(model: str) -> str:
    """Content hash of a model folder; for a hub id, a hash of the id."""
    return folder_sha(model) if exists(model) else hashlib.sha256(model.encode()).hexdigest()[:16]
