"""Content hashes of files, each read once.

A model of 70 billion parameters takes minutes to read, and every stage and check asks whether it has changed. So the
hash of a file is kept in the user's cache folder, with what changes when the file does: its size and times, and on a
disk its inode. A file that was written just now is hashed anew each time, since a second change could bear the same
time. The cache may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs

from cai_ray.storage.files import locked
from cai_ray.storage.filesystems import COPY_BYTES, is_local, open_file, resolve

_SETTLED_NS = 3_000_000_000
"""A file is settled this long after its last change: file systems and stores give times in steps of up to a second."""
_SETTLED_REMOTE_NS = 60_000_000_000
"""For stores, whose clock may differ from this machine's."""
_ENTRIES = 10_000
_READERS = 4
_BLOCK = 8 << 20
_of_this_process: dict[str, Any] = {}
"""What this process has hashed: all that is kept where there is no place for a cache."""


def file_hashes(
    uri: str | Path, chosen: Callable[[str], bool] = lambda path: True, recursive: bool = False
) -> dict[str, str]:
    """The SHA-256 of each file of a folder, by its path in the folder.

    Args:
        chosen: called with the path of a file; tells whether it counts.
    """
    fs, root = resolve(uri)
    infos = fs.get_file_info(pafs.FileSelector(root, recursive=recursive, allow_not_found=True))
    stamps = {i.path: _stamp(fs, i) for i in infos if i.is_file and chosen(i.path)}
    cached = _read_cache() | _of_this_process
    known = {path: cached.get(_key(fs, path)) for path in stamps}
    missing = [path for path, stamp in stamps.items() if (known[path] or {}).get("stamp") != stamp]
    with ThreadPoolExecutor(_READERS) as pool:  # hashing leaves the interpreter to other threads
        hashed = dict(zip(missing, pool.map(lambda path: _sha(fs, path), missing), strict=True))
    settled = {
        _key(fs, path): {"stamp": stamps[path], "sha": sha}
        for path, sha in hashed.items()
        if _is_settled(fs, path, stamps[path])
    }
    if settled:
        _of_this_process.update(settled)
        _add_to_cache(settled)
    shas = {path: hashed.get(path) or known[path]["sha"] for path in stamps}  # type: ignore[index]
    return {path[len(root) :].strip("/"): shas[path] for path in sorted(shas)}


def _stamp(fs: pafs.FileSystem, info: pafs.FileInfo) -> list[int]:
    """What changes when a file does. The time of a file's inode cannot be set back."""
    if not is_local(fs):
        return [info.size, info.mtime_ns or 0]
    stat = os.stat(info.path)
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_dev]


def _is_settled(fs: pafs.FileSystem, path: str, before: list[int]) -> bool:
    """Whether a file that was hashed has not changed meanwhile, and will have another stamp when it does."""
    if before[1] == 0 or _stamp(fs, fs.get_file_info(path)) != before:
        return False
    return time.time_ns() - max(before[1:3]) > (_SETTLED_NS if is_local(fs) else _SETTLED_REMOTE_NS)


def _sha(fs: pafs.FileSystem, path: str) -> str:
    digest = hashlib.sha256()
    with open_file(fs, path) as f:
        while block := f.read(_BLOCK if is_local(fs) else COPY_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _key(fs: pafs.FileSystem, path: str) -> str:
    if is_local(fs):
        return os.path.realpath(path)
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    return f"{fs.type_name}://{endpoint}/{path}"


def _cache_file() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "cai_ray" / "hashes.json"


def _read_cache() -> dict[str, Any]:
    """What was hashed before; nothing if the cache is missing, damaged, or not a cache."""
    with suppress(OSError, ValueError, RecursionError):
        cached = json.loads(_cache_file().read_bytes())
        if isinstance(cached, dict):
            return {key: entry for key, entry in cached.items() if _is_entry(entry)}
    return {}


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("sha"), str) and "stamp" in entry


def _add_to_cache(entries: dict[str, Any]) -> None:
    """Adds to the cache; where there is no place for one, the next process reads the files again."""
    file = _cache_file()
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with locked(file.with_suffix(".lock")):
            cached = _read_cache()
            merged = {k: v for k, v in cached.items() if k not in entries} | entries
            newest = dict(list(merged.items())[-_ENTRIES:])
            temporary = file.with_suffix(f".{os.getpid()}")
            temporary.write_text(json.dumps(newest))
            temporary.replace(file)
