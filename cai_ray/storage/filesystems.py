"""The file system behind a path or URI: a disk, S3 or what speaks its protocol, Google Cloud Storage.

What is particular to an object store is said here. A bucket is looked at once, when it is first named, so that what is
wrong with it is one line within seconds; after that, requests that fail are tried again for half a minute.
"""

from __future__ import annotations

import io
import os
import re
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from itertools import count, islice
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from cai_ray.errors import InputError

T = TypeVar("T")

COPY_BYTES = 32 << 20
"""Read and sent at a time."""
_WHOLE_BYTES = 8 << 20
"""Up to this size a Parquet file is read in one piece, which is one request."""
# Waits of 0.05 s, 0.1 s, 0.2 s, … between attempts: 25 s in all; at the first look 0.75 s.
_ATTEMPTS, _FIRST_ATTEMPTS = 10, 5
_CONNECT_S, _ANSWER_S, _FIRST_ANSWER_S = 2.0, 20.0, 3.0
_GCS_S = timedelta(seconds=60)
_FIRST_GCS_S = timedelta(seconds=5)

_stores: dict[tuple[str | None, ...], pafs.FileSystem] = {}


def resolve(uri: str | Path) -> tuple[pafs.FileSystem, str]:
    """The file system of a URI or plain path, and the path on it.

    Raises:
        InputError: the scheme is unknown; a bucket does not exist, is closed to these credentials, or does not answer.
    """
    text = str(uri)
    scheme, separator, place = text.partition("://")
    if not separator:
        return pafs.LocalFileSystem(), os.path.abspath(os.path.expanduser(text))
    if scheme in ("s3", "gs", "gcs"):
        return _store(scheme, place, text), place.rstrip("/")
    try:
        return pafs.FileSystem.from_uri(text)
    except (pa.ArrowException, OSError, ValueError) as e:
        raise InputError(
            f"{text}: cannot be opened ({' '.join(str(e).split())}); use a path, s3:// or gs://"
        ) from e


def is_local(fs: pafs.FileSystem) -> bool:
    return isinstance(fs, pafs.LocalFileSystem)


def make_parent(fs: pafs.FileSystem, path: str) -> None:
    """The folder that a file is to be written to. Where there are only objects, nothing has to be made."""
    if not _has_objects(fs):
        fs.create_dir(os.path.dirname(path), recursive=True)


def copy_file(from_fs: pafs.FileSystem, source: str, fs: pafs.FileSystem, target: str) -> None:
    """Copies a file; what is at `target` in the end is whole, unless it is on a disk."""
    make_parent(fs, target)
    if fs is from_fs and from_fs.get_file_info(source).size < 5 << 30:  # more is not copied within S3 at once
        fs.copy_file(source, target)
        return
    with open_file(from_fs, source) as f:
        out = fs.open_output_stream(target, compression=None)
        try:
            while block := f.read(COPY_BYTES):
                out.write(block)
        except BaseException:
            out.close()  # there is no way to give an upload up, so it is ended and taken back
            fs.delete_file(target)
            raise
        out.close()


def open_file(fs: pafs.FileSystem, path: str) -> pa.NativeFile:
    """A file to be read from anywhere in it, by this thread: Parquet files have functions of their own."""
    f = fs.open_input_file(path)
    return f if is_local(fs) else pa.PythonFile(_Patient(f), mode="r")


class _Patient(io.RawIOBase):
    """Tries again where S3's client does not: if an error's text is longer than the piece that was asked for, the
    client cannot hold it, and takes the answer for broken."""

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
        wanted = left if size is None or size < 0 else min(size, left)
        data = _again(lambda: self.file.read_at(wanted, self.place)) if wanted else b""
        self.place += len(data)
        return data

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self.file.close()
        super().close()


def _again(read: Callable[[], T]) -> T:
    for attempt in count():
        try:
            return read()
        except OSError as e:
            _wait_after(e, attempt)
    raise AssertionError


def _wait_after(error: OSError, attempt: int) -> None:
    if attempt == _ATTEMPTS or "Failed to flush response stream" not in str(error):
        raise error
    time.sleep(0.05 * 2**attempt)


# Arrow's own threads read Parquet files, and must hold nothing of Python's (no `open_file`, no bytes): one that lets go
# of it while the interpreter ends takes the process down with it.


def read_parquet(
    fs: pafs.FileSystem, path: str, columns: list[str] | None = None, group: int | None = None
) -> pa.Table:
    """A Parquet file, or one of its row groups."""

    def read() -> pa.Table:
        with fs.open_input_file(path) as f:
            if group is not None:
                return _parquet(f, pre_buffer=True).read_row_group(group, columns=columns)
            whole = not is_local(fs) and f.size() <= _WHOLE_BYTES
            source = pa.BufferReader(f.read_buffer(f.size())) if whole else f
            return _parquet(source, pre_buffer=not whole).read(columns=columns)

    return _again(read)


def iter_parquet(
    fs: pafs.FileSystem, path: str, rows: int, columns: list[str] | None = None
) -> Iterator[pa.Table]:
    """A Parquet file, so many rows at a time: it may be larger than memory."""
    given = 0
    for attempt in count():
        try:
            with fs.open_input_file(path) as f:
                file = _parquet(f, pre_buffer=not is_local(fs))
                for batch in islice(file.iter_batches(rows, columns=columns), given, None):
                    given += 1
                    yield pa.Table.from_batches([batch])
            return
        except OSError as e:
            _wait_after(e, attempt)


def _parquet(source: pa.NativeFile, pre_buffer: bool) -> pq.ParquetFile:
    return pq.ParquetFile(source, pre_buffer=pre_buffer, page_checksum_verification=True)


def refusal(error: BaseException) -> str | None:
    """What an object store says that it cannot do, in one line, also where Ray wrapped the error; None otherwise."""
    text = str(error)
    if told := re.search(r"(?:bucket '([^']+)': )?AWS Error (\w+)([^\n]*)", text):
        return _reason(f"s3://{told[1]}" if told[1] else "s3", told[2], told[3])
    told = re.search(r"google::cloud::Status\((\w+): ([^\n]{,300})", text)
    return f"gs: {told[1]} ({told[2]})" if told else None


def damage(error: OSError | pa.ArrowInvalid) -> str | None:
    """What is wrong with a Parquet file, in one line; None where it is the system or the store that failed."""
    if isinstance(error, OSError) and (error.errno or refusal(error)):
        return None
    return " ".join(str(error).split())


def _has_objects(fs: pafs.FileSystem) -> bool:
    return fs.type_name in ("s3", "gcs")


def _store(scheme: str, place: str, uri: str) -> pafs.FileSystem:
    bucket = place.split("/")[0]
    if not bucket:
        raise InputError(f"{uri}: names no bucket; give {scheme}://bucket/folder")
    if "?" in place:
        raise InputError(f"{uri}: settings are not read from a URI; take ?… out, and see docs/storage.md")
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None
    key = (scheme, bucket, endpoint)
    if key not in _stores:
        _stores[key] = _open_s3(bucket, endpoint, place) if scheme == "s3" else _open_gcs(bucket)
    return _stores[key]


class _S3(pafs.S3FileSystem):
    """Ray Train sends its storage to the workers, and S3FileSystem forgets how it tries again when it is pickled."""

    def __init__(self, region: str | None, endpoint: str | None, first: bool = False):
        self.arguments = (region, endpoint)
        super().__init__(
            region=region,
            endpoint_override=endpoint,
            connect_timeout=_CONNECT_S,
            request_timeout=_FIRST_ANSWER_S if first else _ANSWER_S,
            retry_strategy=pafs.AwsDefaultS3RetryStrategy(_FIRST_ATTEMPTS if first else _ATTEMPTS),
            # A small file is one request, of three.
            allow_delayed_open=True,
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return _S3, self.arguments


def _open_s3(bucket: str, endpoint: str | None, place: str) -> pafs.FileSystem:
    """Credentials and region are found by AWS's own chain."""
    try:
        region = None if endpoint else _region(bucket)
        first = _S3(region, endpoint, first=True)
        try:
            first.get_file_info(pafs.FileSelector(f"{place.rstrip('/')}/.none"))
        except FileNotFoundError:  # as it should be
            pass
        except OSError as e:
            # One object may be open where the bucket may not be listed.
            if "AccessDenied" not in str(e) and "ACCESS_DENIED" not in str(e):
                raise
            if place == bucket or not first.get_file_info(place).is_file:
                raise
    except (OSError, pa.ArrowException) as e:
        told = re.search(r"AWS Error (\w+)([^\n]*)", str(e))
        code, more = (told[1], told[2]) if told else ("", " ".join(str(e).split()))
        if not told and "not found" in more:  # of `resolve_s3_region`
            code = "NO_SUCH_BUCKET"
        raise InputError(_reason(f"s3://{bucket}", code, more, endpoint)) from e
    return _S3(region, endpoint)


def _region(bucket: str) -> str | None:
    """Of a bucket, which is not always that of the machine; None for what the environment says, where S3 does not."""
    try:
        return pafs.resolve_s3_region(bucket)
    except OSError as e:
        if "not found" in str(e) or not (os.environ.keys() & {"AWS_REGION", "AWS_DEFAULT_REGION"}):
            raise
        return None


def _open_gcs(bucket: str) -> pafs.FileSystem:
    """Credentials are found by Google's own chain; where its libraries are told of an emulator, so is this."""
    options: dict[str, Any] = {}
    if emulator := os.environ.get("STORAGE_EMULATOR_HOST"):
        scheme, _, host = emulator.rpartition("://")
        options = {"anonymous": True, "scheme": scheme or "http", "endpoint_override": host}
    try:
        found = pafs.GcsFileSystem(retry_time_limit=_FIRST_GCS_S, **options).get_file_info(bucket)
    except (OSError, pa.ArrowException) as e:
        raise InputError(
            f"gs://{bucket}: cannot be opened ({' '.join(str(e).split())[:300]}); check the credentials "
            "(GOOGLE_APPLICATION_CREDENTIALS) and the network"
        ) from e
    if found.type == pafs.FileType.NotFound:
        raise InputError(f"gs://{bucket}: the bucket does not exist; create it, or name another")
    return pafs.GcsFileSystem(retry_time_limit=_GCS_S, **options)


_DENIED = (
    "ACCESS_DENIED", "INVALID_ACCESS_KEY_ID", "SIGNATURE_DOES_NOT_MATCH", "INVALID_CLIENT_TOKEN_ID", "EXPIRED_TOKEN",
    "UNRECOGNIZED_CLIENT", "MISSING_AUTHENTICATION_TOKEN", "INVALID_SIGNATURE",
)  # fmt: skip
_AWAY = (
    "NETWORK_CONNECTION", "REQUEST_TIMEOUT", "SERVICE_UNAVAILABLE", "SLOW_DOWN", "INTERNAL_FAILURE", "THROTTLING",
)  # fmt: skip


def _reason(place: str, code: str, more: str, endpoint: str | None = None) -> str:
    """What went wrong and the remedy, from S3's code."""
    if code == "NO_SUCH_BUCKET":
        return f"{place}: the bucket does not exist; create it, or name another"
    if code in _DENIED or "HTTP status 403" in more:
        if not _has_credentials():
            return (
                f"{place}: access is denied, and no credentials are found; set AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY or AWS_PROFILE, or give the machine a role"
            )
        return f"{place}: access is denied to these credentials ({code}); give them the right, or set others"
    if code in _AWAY or "HTTP status 5" in more:
        server = endpoint or "S3"
        detail = more.rpartition("Details: ")[2].strip(" :") or code
        return f"{place}: {server} does not answer ({detail}); check the network and AWS_ENDPOINT_URL"
    return f"{place}: cannot be opened ({code}{more.rstrip()[:300]}); check the bucket, its region and AWS_ENDPOINT_URL"


def _has_credentials() -> bool:
    """Whether anything of AWS's chain but a machine's role is set."""
    named = (
        "AWS_ACCESS_KEY_ID", "AWS_PROFILE", "AWS_WEB_IDENTITY_TOKEN_FILE",
        "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    )  # fmt: skip
    file = os.environ.get("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials")
    return any(os.environ.get(name) for name in named) or os.path.exists(os.path.expanduser(file))
