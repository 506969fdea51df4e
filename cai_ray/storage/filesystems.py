"""The file system behind a path or URI: a disk, S3 or a compatible store, Google Cloud Storage.

object_stores.py opens the stores; what else is particular to them is said here.
"""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable, Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from cai_ray.errors import InputError
from cai_ray.storage import hub
from cai_ray.storage.object_stores import ATTEMPTS, open_store, refusal

T = TypeVar("T")

COPY_BYTES = 32 << 20
"""Bytes that are read and sent at a time."""
_WHOLE_BYTES = 8 << 20
"""Up to this size a Parquet file is read in one piece, with one request."""


def resolve(uri: str | Path) -> tuple[pafs.FileSystem, str]:
    """The file system of a URI or plain path, and the path on it.

    Raises:
        InputError: the scheme is unknown; a bucket does not exist, is closed to these credentials, or does not answer;
            a dataset of the hub, of which this node gets a copy, cannot be fetched.
    """
    text = str(uri)
    scheme, separator, place = text.partition("://")
    if not separator:
        return pafs.LocalFileSystem(), os.path.abspath(os.path.expanduser(text))
    if scheme in ("s3", "gs", "gcs"):
        return open_store(scheme, place, text), place.rstrip("/")
    if scheme == "hf":
        return pafs.LocalFileSystem(), hub.fetch_dataset(hub.parse_dataset(text))
    try:
        return pafs.FileSystem.from_uri(text)
    except (pa.ArrowException, OSError, ValueError) as e:
        raise InputError(
            f"{text}: cannot be opened ({' '.join(str(e).split())}); use a path, s3:// or gs://"
        ) from e


def is_local(fs: pafs.FileSystem) -> bool:
    return isinstance(fs, pafs.LocalFileSystem)


def make_parent(fs: pafs.FileSystem, path: str) -> None:
    """Creates the folder of a file. An object store has no folders, so nothing is done there."""
    if not _has_objects(fs):
        fs.create_dir(os.path.dirname(path), recursive=True)


def copy_file(from_fs: pafs.FileSystem, source: str, fs: pafs.FileSystem, target: str) -> None:
    """Copies a file. An object store never has half a copy at `target`; a disk may, if this is interrupted."""
    make_parent(fs, target)
    if fs is from_fs and from_fs.get_file_info(source).size < 5 << 30:  # S3 copies no larger object at once
        fs.copy_file(source, target)
        return
    with open_file(from_fs, source) as f:
        out = fs.open_output_stream(target, compression=None)
        try:
            while block := f.read(COPY_BYTES):
                out.write(block)
        except BaseException:
            out.close()  # an upload cannot be abandoned, so it is ended and deleted
            fs.delete_file(target)
            raise
        out.close()


def open_file(fs: pafs.FileSystem, path: str) -> pa.NativeFile:
    """Opens a file for random access by this thread. For Parquet files, use the functions below."""
    f = fs.open_input_file(path)
    return f if is_local(fs) else pa.PythonFile(_RetryingFile(f), mode="r")


class _RetryingFile(io.RawIOBase):
    """Retries reads that S3's client gives up on: if an error's text is longer than the requested piece, the client
    has no room for it and takes the answer for broken."""

    def __init__(self, file: pa.NativeFile):
        self.file, self.length, self.place = file, file.size(), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.place

    def seek(self, offset: int, whence: int = 0) -> int:
        self.place = offset + (0, self.place, self.length)[whence]
        return self.place

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self.length - self.place)
        length = left if size is None or size < 0 else min(size, left)
        data = _retry(lambda: self.file.read_at(length, self.place)) if length else b""
        self.place += len(data)
        return data

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self.file.close()
        super().close()


def _retry(read: Callable[[], T]) -> T:
    for attempt in count():
        try:
            return read()
        except OSError as e:
            _wait_after(e, attempt)
    raise AssertionError


def _wait_after(error: OSError, attempt: int) -> None:
    if attempt == ATTEMPTS or "Failed to flush response stream" not in str(error):
        raise error
    time.sleep(0.05 * 2**attempt)


# Arrow's own threads read Parquet files, and must not hold Python objects (no `open_file`, no bytes): a thread that
# releases one while the interpreter shuts down crashes the process.


def read_parquet(
    fs: pafs.FileSystem, path: str, columns: list[str] | None = None, group: int | None = None
) -> pa.Table:
    """Reads a Parquet file, or one of its row groups."""

    def read() -> pa.Table:
        with fs.open_input_file(path) as f:
            if group is not None:
                return _parquet(f, pre_buffer=True).read_row_group(group, columns=columns)
            whole = not is_local(fs) and f.size() <= _WHOLE_BYTES
            source = pa.BufferReader(f.read_buffer(f.size())) if whole else f
            return _parquet(source, pre_buffer=not whole).read(columns=columns)

    return _retry(read)


def iter_parquet(
    fs: pafs.FileSystem, path: str, rows: int, columns: list[str] | None = None
) -> Iterator[pa.Table]:
    """Reads a Parquet file `rows` rows at a time: it may be larger than memory."""
    yielded = 0
    for attempt in count():
        try:
            with fs.open_input_file(path) as f:
                file = _parquet(f, pre_buffer=not is_local(fs))
                for batch in islice(file.iter_batches(rows, columns=columns), yielded, None):
                    yielded += 1
                    yield pa.Table.from_batches([batch])
            return
        except OSError as e:
            _wait_after(e, attempt)


def _parquet(source: pa.NativeFile, pre_buffer: bool) -> pq.ParquetFile:
    return pq.ParquetFile(source, pre_buffer=pre_buffer, page_checksum_verification=True)


def damage(error: OSError | pa.ArrowInvalid) -> str | None:
    """What is wrong with a Parquet file, in one line; None if the system or the store failed instead."""
    if isinstance(error, OSError) and (error.errno or refusal(error)):
        return None
    return " ".join(str(error).split())


def _has_objects(fs: pafs.FileSystem) -> bool:
    return fs.type_name in ("s3", "gcs")
