"""Model folders: fetches them to this node, checks that they are whole, hashes them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from cai_ray.config.engine import EngineConfig
from cai_ray.errors import InputError
from cai_ray.storage import hub
from cai_ray.storage.files import exists, list_files, local_folder, read_object
from cai_ray.storage.filesystems import is_local, resolve
from cai_ray.storage.hashes import file_hashes
from cai_ray.storage.records import derive_id


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
    chat_template: str | None = None
    """The name of one of the model's chat templates; None is the default one."""
    has_own_templates: bool = True
    """Whether the template set was chosen for this model, rather than for the run's own models."""
    keeps_thoughts: bool = False
    """Whether the run keeps the thoughts that answers begin with (`thinking: keep`)."""
    today: str | None = None
    """The day that the chat template is told, as YYYY-MM-DD: the same for the whole run."""

    @property
    def is_served(self) -> bool:
        """Whether the model is at an endpoint, which knows it by its name alone."""
        return self.engine.kind == "openai"

    def fetch(self, weights: bool = True) -> str:
        """The location on this node: if the model is remote, a copy of it is made first (`local_model`)."""
        return self.location if self.is_served else local_model(self.location, weights)

    def check(self) -> None:
        """Raises what `fetch` raises for a model on this machine or the hub. No remote weights are fetched."""
        if not self.is_served and is_local(resolve(self.location)[0]):
            self.fetch(weights=False)

    @property
    def sha(self) -> str:
        """Content hash of the model folder; of the hub's, a hash of id and commit; at an endpoint, of its name."""
        return model_sha(self.location)


def hub_model(name: str) -> hub.Repo | None:
    """The hub's model of this name; None if the name is a URI or an existing folder.

    Raises:
        InputError: it is neither a folder nor the name of a model.
    """
    if "://" in name or exists(name):
        return None
    if (repo := hub.parse_model(name)) is None:
        raise InputError(
            f"model {name}: no such folder; give a Hugging Face folder, or an id such as org/name"
        )
    return repo


def local_model(uri: str, weights: bool = True) -> str:
    """A model's folder on this node. What is not a folder or URI is a model of the Hugging Face hub.

    Args:
        weights: False leaves out the weights of a hub's model, where configuration and tokenizer are enough.

    Raises:
        InputError: there is no such folder or model; it has no configuration or no weights, or they are damaged.
    """
    if repo := hub_model(uri):
        folder = hub.fetch_model(repo, weights)
        if weights:
            _check_model(uri, folder)
        return folder
    try:
        folder = local_folder(uri)
    except InputError as e:
        raise InputError(f"model {e}; give a Hugging Face folder or id") from e
    _check_model(uri, folder)
    return folder


def model_config(location: str) -> dict[str, Any] | None:
    """The config.json of a model's folder (any URI) or hub id; None if there is none to be had.

    Raises:
        InputError: it is damaged.
    """
    again = "copy the folder again"
    if "://" in location or exists(location):
        return read_object(os.path.join(location, "config.json"), again)
    if (repo := hub.parse_model(location)) is None:
        return None
    try:
        folder = hub.config_folder(repo)
    except hub.Unreachable:
        return None
    return read_object(os.path.join(folder, "config.json"), again) if folder else None


def context_length(model: str) -> int | None:
    """The number of positions of a model folder or id (`max_position_embeddings`); None if it names none.

    Of a model that also reads images it is that of its language model, which its config.json may leave to the class.

    Raises:
        InputError: its config.json cannot be loaded.
    """
    place = Path(model) / "config.json"
    if place.exists() and (length := _positions(json.loads(place.read_text(encoding="utf-8")))):
        return length
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError) as e:
        raise InputError(f"model {model}: its config.json cannot be loaded ({str(e).splitlines()[0]})") from e
    return _positions(config.get_text_config().to_dict())


def _positions(config: dict[str, Any]) -> int | None:
    text = {**config, **(config.get("text_config") or {})}
    return text.get("max_position_embeddings") or text.get("n_positions") or None


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
    """Content hash of a model folder (weights, configuration, tokenizer). Files that were hashed before, and have not
    changed, are not read again (hashes.py)."""
    suffixes = (".safetensors", ".json", ".jinja", ".model", ".bin", ".txt")
    return derive_id(file_hashes(uri, lambda path: path.endswith(suffixes)))


def model_sha(location: str) -> str:
    """Content hash of a model folder; of the hub's model, a hash of its id and commit."""
    if "://" not in location and not exists(location):
        return hashlib.sha256(location.encode()).hexdigest()[:16]
    return folder_sha(local_model(location))
