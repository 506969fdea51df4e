"""A run directory of artifacts, on any file system that pyarrow knows (plain paths, file://, s3://, gs://).

A stage's artifact is visible when its `manifest.json` is there, which is written last, and in one step. Whatever
lies beside no manifest is a leftover of an attempt that was killed.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import yaml
from safetensors import SafetensorError, safe_open

from cai_ray import constitution as constitutions
from cai_ray.config import RunConfig, validate
from cai_ray.constitution import Constitution
from cai_ray.errors import InputError
from cai_ray.filesystems import (
    COPY_BYTES,
    copy_file,
    damage,
    is_local,
    iter_parquet,
    make_parent,
    open_file,
    read_parquet,
)
from cai_ray.filesystems import resolve as resolve


def join(uri: str | Path, *parts: str) -> str:
    base = str(uri).rstrip("/")
    return "/".join([f"{base}//" if base.endswith(":") else base, *parts])


def exists(uri: str | Path) -> bool:
    fs, path = resolve(uri)
    return fs.get_file_info(path).type != pafs.FileType.NotFound


def list_files(uri: str | Path, suffix: str = "", recursive: bool = False) -> list[str]:
    """Paths of the files below a folder, sorted, without the scheme."""
    fs, path = resolve(uri)
    found = fs.get_file_info(pafs.FileSelector(path, recursive=recursive, allow_not_found=True))
    return sorted(f.path for f in found if f.type == pafs.FileType.File and f.path.endswith(suffix))


def delete(uri: str | Path) -> None:
    fs, path = resolve(uri)
    kind = fs.get_file_info(path).type
    if kind == pafs.FileType.Directory:
        with suppress(
            FileNotFoundError
        ):  # a folder that is nothing but the names of its objects is gone with them
            fs.delete_dir(path)
    elif kind == pafs.FileType.File:
        fs.delete_file(path)


def read_bytes(uri: str | Path) -> bytes:
    fs, path = resolve(uri)
    with open_file(fs, path) as f:  # in one piece: a stream is read from an object store by small ones
        return f.read()


def write_bytes(uri: str | Path, data: bytes) -> None:
    """Writes a file that is there whole or not at all."""
    fs, path = resolve(uri)
    make_parent(fs, path)
    if not is_local(fs):  # object stores publish an object when it is closed
        with fs.open_output_stream(path, compression=None) as f:
            f.write(data)
        return
    folder, name = os.path.split(path)
    temporary = f"{folder}/.{name}.{os.getpid()}"
    try:
        with open(temporary, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError:
        Path(temporary).unlink(missing_ok=True)
        raise


def copy(source: str | Path, target: str | Path) -> None:
    """Copies a file to another place, each on any file system."""
    copy_file(*resolve(source), *resolve(target))


def read_json(uri: str | Path) -> Any:
    return json.loads(read_bytes(uri))


def write_json(uri: str | Path, value: Any) -> None:
    write_bytes(uri, (json.dumps(value, indent=1, ensure_ascii=False, sort_keys=True) + "\n").encode())


def write_table(uri: str | Path, table: pa.Table, row_group_rows: int | None = None) -> None:
    sink = pa.BufferOutputStream()
    # Without checksums most flipped bits are read as other data.
    pq.write_table(table, sink, compression="zstd", row_group_size=row_group_rows, write_page_checksum=True)
    write_bytes(uri, sink.getvalue().to_pybytes())


def read_tables(uri: str | Path, columns: list[str] | None = None, name: str = "part") -> pa.Table:
    """All `name`-*.parquet of a folder as one table, in the order of their ids."""
    fs, _ = resolve(uri)
    tables = [read_rows(fs, file, columns) for file in list_rows(uri, name)]
    if not tables:
        raise InputError(f"{uri}: holds no rows ({name}-*.parquet)")
    table = pa.concat_tables(tables)
    return table.sort_by("id") if "id" in table.column_names else table


def iter_tables(
    uri: str | Path, columns: list[str] | None = None, name: str = "part", rows: int = 4096
) -> Iterator[pa.Table]:
    """All `name`-*.parquet of a folder, some rows at a time: what a run has may be larger than memory."""
    fs, _ = resolve(uri)
    for file in list_rows(uri, name):
        with _mendable(file):
            yield from iter_parquet(fs, file, rows, columns)


def read_rows(fs: pafs.FileSystem, path: str, columns: list[str] | None = None) -> pa.Table:
    """A file of rows that a run wrote.

    Raises:
        InputError: it is damaged.
    """
    with _mendable(path):
        return read_parquet(fs, path, columns)


@contextmanager
def _mendable(path: str) -> Iterator[None]:
    """What a stage wrote it writes again: all of it once it is done, until then what its journal lacks."""
    try:
        yield
    except (OSError, pa.ArrowInvalid) as e:
        if (told := damage(e)) is None:
            raise
        raise InputError(
            f"{path}: is damaged ({told}); delete it, and its stage's manifest.json if there is one, and run the "
            "stage again"
        ) from e


def list_rows(uri: str | Path, name: str = "part") -> list[str]:
    """Paths of `name`-*.parquet of a folder, sorted, without the scheme."""
    return [f for f in list_files(uri, ".parquet") if os.path.basename(f).startswith(f"{name}-")]


def has_rows(uri: str | Path, name: str = "part") -> bool:
    """Whether a folder holds `name`-*.parquet."""
    return bool(list_rows(uri, name))


def delete_rows(uri: str | Path, name: str = "part") -> None:
    """Removes `name`-*.parquet from a folder."""
    fs, _ = resolve(uri)
    for path in list_rows(uri, name):
        fs.delete_file(path)


def upload_folder(source: str | Path, uri: str) -> None:
    """Makes a folder at `uri` the same as another, each on any file system; a no-op where both are the same place.

    What was there and is not in `source` is removed: half a model may be left of an attempt with other shards.
    """
    from_fs, from_path = resolve(source)
    fs, path = resolve(uri)
    if is_local(fs) and is_local(from_fs) and from_path == path:
        return
    names = [f[len(from_path) + 1 :] for f in list_files(source, recursive=True)]
    for old in list_files(uri, recursive=True):
        if old[len(path) + 1 :] not in names:
            fs.delete_file(old)
    for name in names:
        copy_file(from_fs, f"{from_path}/{name}", fs, f"{path}/{name}")


def local_folder(uri: str | Path) -> str:
    """A local path of a folder: itself where it is local, else a copy made once per content on this node.

    Raises:
        InputError: nothing is there, and it is not local.
    """
    fs, path = resolve(uri)
    if is_local(fs):
        return path
    infos = fs.get_file_info(pafs.FileSelector(path, recursive=True, allow_not_found=True))
    infos = [i for i in infos if i.is_file]
    if not infos:
        raise InputError(f"{uri}: no such folder")
    stamp = hashlib.sha256(repr(sorted((i.path, i.size, i.mtime_ns) for i in infos)).encode()).hexdigest()[
        :16
    ]
    target = Path(tempfile.gettempdir()) / f"cai_ray-{os.getuid()}" / stamp
    if target.exists():
        return str(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with _alone(target.with_suffix(".lock")):
        if not target.exists():  # another process of this node may have been first
            partial = target.with_suffix(".part")
            shutil.rmtree(partial, ignore_errors=True)  # of one that was killed
            for info in infos:
                copy_file(fs, info.path, pafs.LocalFileSystem(), f"{partial}/{info.path[len(path) + 1 :]}")
            partial.rename(target)
    return str(target)


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """One process of the node at a time; also a killed one lets go."""
    with lock.open("w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield


def local_model(uri: str) -> str:
    """A model's folder on this node, or its id: a name that is no folder is one of the Hugging Face hub, which its
    library resolves and caches.

    Raises:
        InputError: nothing is at a URI; a folder has no configuration, or no weights, or some that are not whole.
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
    """Before an engine is started with it; of the weights only the headers are read."""
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
                f"model {uri}: {name} is not whole ({e}); {again}, or `git lfs pull` where it is a pointer to the file"
            ) from e


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
    """Content hash of a model folder; for an id of the hub, a hash of its name."""
    return folder_sha(model) if exists(model) else hashlib.sha256(model.encode()).hexdigest()[:16]


class Run:
    """A run directory and its resolved configuration. Plain data: it travels to Ray workers as it is."""

    def __init__(self, config: RunConfig):
        self.config = config
        out = config.out.replace("{name}", config.name)
        if not out.strip():
            raise InputError("out: is empty; name a run directory, for example --out runs/first")
        if "{" in out or "}" in out:
            raise InputError(
                f"out {config.out}: only {{name}} may stand in braces; choose another with --out"
            )
        self.root = out if "://" in out else os.path.abspath(os.path.expanduser(out))

    def path(self, *parts: str) -> str:
        return join(self.root, *parts)

    def feedback(self) -> Run:
        """The run as its feedback model is asked: `label.engine`, where it is given, is the engine."""
        engine = self.config.label.engine
        return Run(self.config.model_copy(update={"engine": engine})) if engine else self

    def constitution(self) -> Constitution:
        """The one that the run was made with: its own copy, wherever the original went."""
        copy = self.path("constitution.yaml")
        if exists(copy):
            return constitutions.parse(yaml.safe_load(read_bytes(copy)), copy)
        return self.config.document

    def manifest(self, stage: str) -> dict[str, Any] | None:
        """The stage's manifest, or None while the stage is not complete.

        Raises:
            InputError: it is damaged.
        """
        folder = self.path(stage)
        return read_object(join(folder, "manifest.json"), f"delete {folder} and run the stage again")

    def facts(self, stage: str, name: str) -> dict[str, Any]:
        """What a finished stage keeps beside its rows, such as `certificate.json`.

        Raises:
            InputError: it is missing or damaged.
        """
        uri, remedy = self.path(stage, name), f"make it again with {_again(stage)}"
        found = read_object(uri, remedy)
        if found is None:
            raise InputError(f"{uri}: is missing; {remedy}")
        return found

    def metrics(self, stage: str) -> list[dict[str, Any]]:
        """A stage's metrics.jsonl; nothing where there is none.

        Raises:
            InputError: it is damaged.
        """
        uri, remedy = self.path(stage, "metrics.jsonl"), f"make it again with {_again(stage)}"
        try:
            rows = [json.loads(line) for line in read_bytes(uri).splitlines() if line.strip()]
        except FileNotFoundError:
            return []
        except ValueError as e:
            raise InputError(f"{uri}: is damaged ({e}); {remedy}") from e
        if not all(isinstance(row, dict) for row in rows):
            raise InputError(f"{uri}: an object is needed in each line; {remedy}")
        return rows

    def rows(self, stage: str, columns: list[str] | None = None, name: str = "part") -> list[dict[str, Any]]:
        """A stage's rows, in the order of their ids."""
        return read_tables(self.path(stage), columns, name).to_pylist()

    def each_row(
        self, stage: str, columns: list[str] | None = None, name: str = "part"
    ) -> Iterator[dict[str, Any]]:
        """A stage's rows one by one, in no order."""
        for table in iter_tables(self.path(stage), columns, name):
            yield from table.to_pylist()

    def rows_where(
        self, stage: str, column: str, values: Collection[str], name: str = "part"
    ) -> Iterator[dict[str, Any]]:
        """A stage's rows whose column has one of the values, in no order."""
        wanted = pa.array(sorted(values), pa.string())
        for table in iter_tables(self.path(stage), None, name):
            yield from table.filter(pc.is_in(table[column], wanted)).to_pylist()

    def write_rows(self, stage: str, table: pa.Table, part: int = 0) -> None:
        write_table(self.path(stage, f"part-{part:05d}.parquet"), table)

    def locate(self, which: str) -> str:
        """Path, URI or id of a model by its role (`base`, `sl`, `rm`, `rl`), or of a folder or id as it is.

        An endpoint knows its models by name alone: there `base` is `model` as it is configured.
        """
        if self.config.engine.kind == "openai":
            return self.config.model if which == "base" else which
        roles = {"base": self.config.model, "sl": self.path("sft", "model"), "rm": self.path("rm", "model")}
        uri = {**roles, "rl": self.path(self.config.method, "model")}.get(which, which)
        if uri == "town":  # the base model of the embedded world, which ships with the package
            return str(Path(__file__).parent / "town" / "base")
        return uri

    def model(self, which: str) -> str:
        """`locate`, on this node: where it is remote, a copy of it."""
        return local_model(self.locate(which)) if self.config.engine.kind != "openai" else self.locate(which)

    def check_model(self, which: str) -> None:
        """Raises what `model` does, of a model that is here: none is fetched for it."""
        if self.config.engine.kind != "openai" and is_local(resolve(self.locate(which))[0]):
            self.model(which)

    def write_metrics(self, stage: str, rows: Iterable[dict[str, Any]]) -> None:
        """Replaces a stage's metrics.jsonl (object stores cannot append)."""
        text = "".join(json.dumps(row, sort_keys=True) + "\n" for row in rows)
        write_bytes(self.path(stage, "metrics.jsonl"), text.encode())


def _again(stage: str) -> str:
    return f"`cai-ray {stage} CONFIG --overwrite`"


def read_object(uri: str | Path, remedy: str) -> dict[str, Any] | None:
    """A JSON object that was written by a run; None where there is no such file.

    Raises:
        InputError: something else is there.
    """
    fs, path = resolve(uri)
    try:  # and not looked for first: an object store would be asked twice
        value = read_json(uri)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as e:
        if is_local(fs) and os.path.isdir(path):
            raise InputError(f"{uri}: is no file; {remedy}") from e
        raise
    except (ValueError, RecursionError) as e:
        raise InputError(f"{uri}: is no JSON ({e}); {remedy}") from e
    if not isinstance(value, dict) or not value:
        raise InputError(f"{uri}: a JSON object with content is needed; {remedy}")
    return value


def open_run(uri: str) -> Run:
    """The run in a directory, as `run.json` describes it.

    Raises:
        InputError: the directory is no run, or its run.json is damaged.
    """
    give = "give the directory that `cai-ray run` wrote"
    if not uri.strip():  # else it would be the root of the file system
        raise InputError(f"the run directory is empty; {give}")
    path = join(uri, "run.json")
    remedy = f"delete it and run `cai-ray run CONFIG --out {uri}` again, which keeps what is done"
    try:
        value = read_object(path, remedy)
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e}); {give}") from e
    if value is None:
        raise InputError(f"{uri}: no run here (run.json is missing); {give}")
    if not isinstance(value.get("config"), dict):
        raise InputError(f"{path}: holds no configuration; {remedy}")
    try:
        config = validate(value["config"], path)
    except InputError as e:
        raise InputError(f"{e}; {remedy}") from e
    return Run(config.model_copy(update={"out": uri}))
