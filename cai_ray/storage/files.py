"""Files behind a path or URI: read them, write them (whole or not at all), copy and list them."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs

from cai_ray.errors import InputError
from cai_ray.storage.filesystems import (
    copy_file,
    is_local,
    make_parent,
    open_file,
    resolve,
)


def join(uri: str | Path, *parts: str) -> str:
    base = str(uri).rstrip("/")
    return "/".join([f"{base}//" if base.endswith(":") else base, *parts])


def exists(uri: str | Path) -> bool:
    fs, path = resolve(uri)
    return fs.get_file_info(path).type != pafs.FileType.NotFound


def list_files(uri: str | Path, suffix: str = "", recursive: bool = False) -> list[str]:
    """Paths of the files below a folder, sorted, without the scheme."""
    fs, path = resolve(uri)
    infos = fs.get_file_info(pafs.FileSelector(path, recursive=recursive, allow_not_found=True))
    return sorted(f.path for f in infos if f.type == pafs.FileType.File and f.path.endswith(suffix))


def delete(uri: str | Path) -> None:
    fs, path = resolve(uri)
    kind = fs.get_file_info(path).type
    if kind == pafs.FileType.Directory:
        # In an object store, a folder is only the common name of its objects, and vanishes with them.
        with suppress(FileNotFoundError):
            fs.delete_dir(path)
    elif kind == pafs.FileType.File:
        fs.delete_file(path)


def read_bytes(uri: str | Path) -> bytes:
    fs, path = resolve(uri)
    with open_file(fs, path) as f:  # in one piece: a stream would be many small requests
        return f.read()


def write_bytes(uri: str | Path, data: bytes) -> None:
    """Writes a file, whole or not at all."""
    with open_new(uri) as f:
        f.write(data)


@contextmanager
def open_new(uri: str | Path) -> Iterator[Any]:
    """Opens a file to write to. It appears when the block ends, whole; if the block fails, it does not appear."""
    fs, path = resolve(uri)
    make_parent(fs, path)
    if not is_local(fs):
        yield from _open_object(fs, path)
        return
    folder, name = os.path.split(path)
    temporary = f"{folder}/.{name}.{os.getpid()}"
    try:
        with open(temporary, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _open_object(fs: pafs.FileSystem, path: str) -> Iterator[Any]:
    """An object store publishes an object when it is closed, and cannot abandon one: it is deleted then."""
    with fs.open_output_stream(path, compression=None) as f:
        try:
            yield f
        except BaseException:
            f.close()
            fs.delete_file(path)
            raise


def copy(source: str | Path, target: str | Path) -> None:
    """Copies a file to another place, each on any file system."""
    copy_file(*resolve(source), *resolve(target))


def read_json(uri: str | Path) -> Any:
    return json.loads(read_bytes(uri))


def write_json(uri: str | Path, value: Any) -> None:
    write_bytes(uri, (json.dumps(value, indent=1, ensure_ascii=False, sort_keys=True) + "\n").encode())


def upload_folder(source: str | Path, uri: str) -> None:
    """Makes the folder at `uri` equal to `source`, each on any file system; does nothing if both are the same place.

    Files that `source` does not have are deleted: an earlier attempt may have left shards of a model there.
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
    """A local path of a folder: the folder itself, or for a remote one a copy, made once per content on this node.

    Raises:
        InputError: a remote folder does not exist.
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
    with locked(target.with_suffix(".lock")):
        if not target.exists():  # another process of this node may have been first
            partial = target.with_suffix(".part")
            shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed
            for info in infos:
                copy_file(fs, info.path, pafs.LocalFileSystem(), f"{partial}/{info.path[len(path) + 1 :]}")
            partial.rename(target)
    return str(target)


@contextmanager
def locked(lock: Path) -> Iterator[None]:
    """Lets in one process of the node at a time. A process that is killed releases the lock, too."""
    with lock.open("w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield


def read_object(uri: str | Path, remedy: str) -> dict[str, Any] | None:
    """Reads a JSON object that a run wrote; None if there is no such file.

    Args:
        remedy: what to do if it is damaged; the error says so.

    Raises:
        InputError: it is not a JSON object with content.
    """
    fs, path = resolve(uri)
    try:  # without a check for existence first, which would be another request to an object store
        value = read_json(uri)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as e:
        if is_local(fs) and os.path.isdir(path):
            raise InputError(f"{uri}: is not a file; {remedy}") from e
        raise
    except (ValueError, RecursionError) as e:
        raise InputError(f"{uri}: is not valid JSON ({e}); {remedy}") from e
    if not isinstance(value, dict) or not value:
        raise InputError(f"{uri}: a JSON object with content is needed; {remedy}")
    return value
