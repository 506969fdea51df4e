"""Models and datasets of the Hugging Face hub, each at one commit.

A model is named `org/name` or `org/name@revision`; a dataset, or a file or folder in it,
`hf://datasets/org/name@revision/folder/file.jsonl`. Without a revision it is `main`. Files are kept in the library's
own cache (HF_HOME), so that nothing is fetched twice on a node.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal, NamedTuple, TypeVar

from cai_ray.errors import InputError

T = TypeVar("T")

DATASETS = "hf://datasets/"
ROWS = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".csv.gz", ".parquet", ".arrow")
"""How files of rows end: in a folder of a dataset, these alone are fetched."""

_ID = r"(?P<name>[\w-][\w.-]*(?:/[\w-][\w.-]*)?)(?:@(?P<revision>[\w.-]+(?:/[\w.-]+)*))?"
_MODEL = re.compile(_ID)
_DATASET = re.compile(
    r"(?P<name>[\w-][\w.-]*/[\w-][\w.-]*)(?:@(?P<revision>refs/\w+/[\w.-]+|[\w.-]+))?(?:/(?P<inside>.*))?"
)
_MARK = re.compile(r"([*?[])")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_TIMEOUT_S = 10
_SMALL = ("*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt")
"""Configuration and tokenizer."""
_WEIGHTS = ("*.safetensors",)
_NOT_FOR_TRANSFORMERS = ("*/*", "consolidated*", "*pytorch_model*", "tf_model*", "flax_model*")
"""Copies of the weights in other forms, and all folders, which hold such copies."""


class Repo(NamedTuple):
    """A model or dataset of the hub."""

    kind: Literal["model", "dataset"]
    name: str
    revision: str | None = None
    """Branch, tag or commit; None: main."""
    inside: str = ""
    """The file, folder or pattern of a dataset."""

    @property
    def pinned(self) -> bool:
        """Whether the revision is a commit, which never changes."""
        return self.revision is not None and _COMMIT.fullmatch(self.revision) is not None

    @property
    def whole(self) -> Repo:
        """The repository without what is named in it."""
        return self._replace(inside="")

    @property
    def page(self) -> str:
        """Its page in a browser."""
        from huggingface_hub import constants

        return f"{constants.ENDPOINT}/{'datasets/' if self.kind == 'dataset' else ''}{self.name}"

    def __str__(self) -> str:
        """The name as settings have it."""
        text = self.name + (f"@{self.revision}" if self.revision else "")
        if self.kind == "model":
            return text
        return DATASETS + text + (f"/{self.inside}" if self.inside else "")


def parse_model(name: str) -> Repo | None:
    """The hub's model of this name; None for what is a path or a URI by its form."""
    match = _MODEL.fullmatch(name)
    return Repo("model", match["name"], match["revision"]) if match else None


def parse_dataset(uri: str) -> Repo:
    """The dataset that a URI names, with the file, folder or pattern in it.

    Raises:
        InputError: the URI has another form.
    """
    match = _DATASET.fullmatch(uri.removeprefix(DATASETS)) if uri.startswith(DATASETS) else None
    if match is None:
        raise InputError(
            f"{uri}: write a dataset of the hub as {DATASETS}ORG/NAME or {DATASETS}ORG/NAME/FILE"
        )
    return Repo("dataset", match["name"], match["revision"], (match["inside"] or "").strip("/"))


@lru_cache(maxsize=256)
def pin(repo: Repo) -> Repo:
    """The repository at the commit that its revision names now; if the hub cannot be reached, at the cache's.

    Raises:
        InputError: there is no such repository or revision, or the hub cannot be reached and the cache has no copy.
    """
    if repo.pinned:
        return repo
    from huggingface_hub import HfApi

    resolved = _ask(
        repo, lambda: HfApi().resolve_revision(repo.name, repo_type=repo.kind, revision=repo.revision)
    )
    return repo._replace(revision=resolved.resolved)


def fetch_model(repo: Repo, weights: bool = True) -> str:
    """The folder of a model's files on this node.

    Args:
        weights: False fetches configuration and tokenizer alone, and checks that there are weights that can be read.

    Raises:
        InputError: the model cannot be fetched, or its weights are not in safetensors files.
    """
    repo = pin(repo)
    folder = _snapshot(repo, _SMALL + (_WEIGHTS if weights else ()), _NOT_FOR_TRANSFORMERS)
    if not any(name.endswith(".safetensors") for name in os.listdir(folder)):
        names = files_of(repo)
        if "config.json" in names and not any(name.endswith(".safetensors") for name in names):
            pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth"))]
            reason = f"its weights are pickle files ({pickles[0]})" if pickles else "it has no weights"
            raise InputError(
                f"model {repo}: {reason}, and only safetensors are read; name a revision that has them (often "
                f"{repo.name}@refs/pr/1), or load the model where you trust it and give the folder of save_pretrained()"
            )
    return folder


def config_folder(repo: Repo, download: bool = True) -> str | None:
    """The folder with a model's config.json; None if it is not in the cache and is not to be downloaded.

    Raises:
        InputError: it cannot be downloaded.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    found = try_to_load_from_cache(repo.name, "config.json", revision=repo.revision or "main")
    if not isinstance(found, str):
        if not download:
            return None
        found = _ask(repo, lambda: hf_hub_download(repo.name, "config.json", revision=repo.revision))
    return os.path.dirname(found)


def fetch_dataset(repo: Repo) -> str:
    """The path on this node of a dataset's file or folder. Of a folder, the files of rows straight in it are fetched.

    A pattern (`data/train-*.parquet`) stays one: the files that match it are fetched.

    Raises:
        InputError: the dataset cannot be fetched, there is nothing of this name in it, or its rows are in folders.
    """
    repo = pin(repo)
    names, last = files_of(repo), repo.inside.rpartition("/")[2]
    if repo.inside in names or "*" in last:
        wanted = [repo.inside]
    else:
        start = f"{repo.inside}/" if repo.inside else ""
        rows = [n for n in names if n.startswith(start) and n.endswith(ROWS)]
        wanted = [n for n in rows if "/" not in n[len(start) :]]
        if not wanted:
            below = sorted({n.rpartition("/")[0] for n in rows})
            raise InputError(
                f"{repo}: its rows are in folders; name one of them ({', '.join(below[:8])})"
                if below
                else f"{repo}: no such file or folder in the dataset; look at {repo.page}/tree/main"
            )
    # What is asked for are patterns: a name with a bracket or star in it is escaped.
    patterns = tuple(_MARK.sub(r"[\1]", name) if name in names else name for name in wanted)
    local = _snapshot(repo, patterns)
    return os.path.join(local, repo.inside) if repo.inside else local


def files_of(repo: Repo) -> frozenset[str]:
    """The names of all files of a repository at a commit; if the hub cannot be asked, of those in the cache.

    Raises:
        InputError: the repository cannot be read.
    """
    if (names := _list_files(repo)) is not None:
        return names
    folder = _snapshot(repo, ("*",))
    walked = ((place, name) for place, _, names in os.walk(folder) for name in names)
    return frozenset(os.path.relpath(os.path.join(place, name), folder) for place, name in walked)


class Unreachable(InputError):
    """The hub cannot be reached from here."""


def _snapshot(repo: Repo, wanted: tuple[str, ...], ignored: tuple[str, ...] = ()) -> str:
    """The folder on this node with the wanted files of a commit. What the cache has is not asked for."""
    from huggingface_hub import errors, snapshot_download

    def get(local: bool) -> str:
        return snapshot_download(
            repo.name,
            repo_type=repo.kind,
            revision=repo.revision,
            allow_patterns=list(wanted),
            ignore_patterns=list(ignored),
            local_files_only=local,
        )

    if _known_files(repo) is not None:
        try:
            return get(local=True)
        except errors.LocalEntryNotFoundError:  # some are missing
            pass
    unreachable = _list_files(repo) is None
    folder = _ask(repo, lambda: get(local=unreachable))
    os.makedirs(folder, exist_ok=True)  # where no file was wanted, there is none
    return folder


def _known_files(repo: Repo) -> frozenset[str] | None:
    """The names of all files of a commit, if the cache has the list."""
    from huggingface_hub import errors, get_cached_repo_tree

    try:
        tree = get_cached_repo_tree(repo.name, revision=repo.revision, repo_type=repo.kind)
    except errors.CachedRepoTreeNotFoundError:
        return None
    return frozenset(file.path for file in tree)


def _list_files(repo: Repo) -> frozenset[str] | None:
    """The names of all files of a commit; None if they are not known here and nobody answers.

    The library's own listing would be tried for half a minute then.
    """
    from huggingface_hub import HfApi

    if (known := _known_files(repo)) is not None:
        return known
    api, given = HfApi(), {"revision": repo.revision, "timeout": _TIMEOUT_S}
    about: Any = api.model_info if repo.kind == "model" else api.dataset_info
    try:
        info = _ask(repo, lambda: about(repo.name, **given))
    except Unreachable:
        return None
    return frozenset(file.rfilename for file in info.siblings or ())


def _ask(repo: Repo, request: Callable[[], T]) -> T:
    """What a request to the hub returns.

    Raises:
        InputError: the hub refuses it; the line names the repository and the remedy.
        Unreachable: the hub does not answer, and the cache has no copy.
    """
    import httpx2
    from huggingface_hub import constants, errors

    what, token = f"{repo.kind} {repo}", "set HF_TOKEN to a token of an account that has access"
    try:
        return request()
    except errors.GatedRepoError as e:
        raise InputError(f"{what}: is gated; accept its licence at {repo.page} and {token}") from e
    except errors.DisabledRepoError as e:
        raise InputError(f"{what}: the hub has disabled it ({repo.page}); name another") from e
    except errors.RepositoryNotFoundError as e:
        here = "no such folder here, and " if repo.kind == "model" else ""
        raise InputError(
            f"{what}: {here}no such {repo.kind} at {constants.ENDPOINT}; correct the name, or {token} if it is private"
        ) from e
    except errors.RevisionNotFoundError as e:
        raise InputError(
            f"{what}: has no revision {repo.revision or 'main'!r}; name a branch, tag or commit of {repo.page}/commits"
        ) from e
    except errors.RemoteEntryNotFoundError as e:
        raise InputError(
            f"{what}: lacks a file that is needed ({_last_of_url(e)}); look at {repo.page}"
        ) from e
    except errors.HFValidationError as e:
        raise InputError(f"{what}: no such folder, and not a name of the hub (org/name)") from e
    except errors.HfHubHTTPError as e:
        status = e.response.status_code
        if status in (401, 403):
            raise InputError(f"{what}: the hub refuses the token ({status}); {token}") from e
        raise Unreachable(f"{what}: {constants.ENDPOINT} answered {status}; try again later") from e
    except (errors.RevisionResolutionError, errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as e:
        raise _unreachable(what) from e
    except httpx2.HTTPError as e:
        raise _unreachable(what) from e


def _unreachable(what: str) -> Unreachable:
    from huggingface_hub import constants

    here = "no such folder here, and it " if what.startswith("model") else ""
    why, remedy = f"{constants.ENDPOINT} cannot be reached", "connect this machine"
    if constants.HF_HUB_OFFLINE:
        why, remedy = "HF_HUB_OFFLINE is set", "unset it"
    return Unreachable(
        f"{what}: {here}is not in this machine's cache ({constants.HF_HUB_CACHE}), and {why}; "
        f"{remedy} for the first run, or give the path of a copy"
    )


def _last_of_url(error: Any) -> str:
    return str(error.response.url).rpartition("/")[2]
