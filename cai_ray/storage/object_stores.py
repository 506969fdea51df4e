"""Object stores: S3 or a compatible store, and Google Cloud Storage.

A bucket is checked once, when it is first named, so that problems are reported in one line within seconds. After that,
failed requests are retried for half a minute.
"""

from __future__ import annotations

import os
import re
from datetime import timedelta
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from cai_ray.errors import InputError

# Between attempts it waits 0.05 s, 0.1 s, 0.2 s, …: 25 s in all; 0.75 s when a bucket is first named.
ATTEMPTS, _FIRST_ATTEMPTS = 10, 5
_CONNECT_S, _ANSWER_S, _FIRST_ANSWER_S = 2.0, 20.0, 3.0
_GCS_S = timedelta(seconds=60)
_FIRST_GCS_S = timedelta(seconds=5)

_stores: dict[tuple[str | None, ...], pafs.FileSystem] = {}


def open_store(scheme: str, place: str, uri: str) -> pafs.FileSystem:
    """The file system of a bucket, opened once per process.

    Args:
        scheme: s3, gs or gcs.
        place: the bucket and the path in it.

    Raises:
        InputError: the bucket does not exist, is closed to these credentials, or does not answer.
    """
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
    """S3FileSystem loses its retry settings when it is pickled, and Ray Train sends its storage to the workers."""

    def __init__(self, region: str | None, endpoint: str | None, first: bool = False):
        self.arguments = (region, endpoint)
        super().__init__(
            region=region,
            endpoint_override=endpoint,
            connect_timeout=_CONNECT_S,
            request_timeout=_FIRST_ANSWER_S if first else _ANSWER_S,
            retry_strategy=pafs.AwsDefaultS3RetryStrategy(_FIRST_ATTEMPTS if first else ATTEMPTS),
            # A small file takes one request then, and not three.
            allow_delayed_open=True,
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return _S3, self.arguments


def _open_s3(bucket: str, endpoint: str | None, place: str) -> pafs.FileSystem:
    """Opens S3 with the credentials and the region that AWS's own chain finds."""
    try:
        region = None if endpoint else _region(bucket)
        first = _S3(region, endpoint, first=True)
        try:
            first.get_file_info(pafs.FileSelector(f"{place.rstrip('/')}/.none"))
        except FileNotFoundError:  # as expected
            pass
        except OSError as e:
            # An object may be readable where the bucket may not be listed.
            if "AccessDenied" not in str(e) and "ACCESS_DENIED" not in str(e):
                raise
            if place == bucket or not first.get_file_info(place).is_file:
                raise
    except (OSError, pa.ArrowException) as e:
        match = re.search(r"AWS Error (\w+)([^\n]*)", str(e))
        code, more = (match[1], match[2]) if match else ("", " ".join(str(e).split()))
        if not match and "not found" in more:  # raised by `resolve_s3_region`
            code = "NO_SUCH_BUCKET"
        raise InputError(_reason(f"s3://{bucket}", code, more, endpoint)) from e
    return _S3(region, endpoint)


def _region(bucket: str) -> str | None:
    """The region of a bucket; None if S3 does not tell and the environment sets one."""
    try:
        return pafs.resolve_s3_region(bucket)
    except OSError as e:
        if "not found" in str(e) or not (os.environ.keys() & {"AWS_REGION", "AWS_DEFAULT_REGION"}):
            raise
        return None


def _open_gcs(bucket: str) -> pafs.FileSystem:
    """Opens Google Cloud Storage with the credentials that Google's own chain finds, or the emulator that
    STORAGE_EMULATOR_HOST names."""
    options: dict[str, Any] = {}
    if emulator := os.environ.get("STORAGE_EMULATOR_HOST"):
        scheme, _, host = emulator.rpartition("://")
        options = {"anonymous": True, "scheme": scheme or "http", "endpoint_override": host}
    try:
        info = pafs.GcsFileSystem(retry_time_limit=_FIRST_GCS_S, **options).get_file_info(bucket)
    except (OSError, pa.ArrowException) as e:
        raise InputError(
            f"gs://{bucket}: cannot be opened ({' '.join(str(e).split())[:300]}); check the credentials "
            "(GOOGLE_APPLICATION_CREDENTIALS) and the network"
        ) from e
    if info.type == pafs.FileType.NotFound:
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
    """What went wrong and what to do, by S3's error code."""
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
    """Whether AWS's chain finds credentials other than a machine's role."""
    variables = (
        "AWS_ACCESS_KEY_ID", "AWS_PROFILE", "AWS_WEB_IDENTITY_TOKEN_FILE",
        "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    )  # fmt: skip
    file = os.environ.get("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials")
    return any(os.environ.get(name) for name in variables) or os.path.exists(os.path.expanduser(file))


def refusal(error: BaseException) -> str | None:
    """The object store's refusal that an error reports, in one line; None for other errors. Ray may have wrapped it."""
    text = str(error)
    if match := re.search(r"(?:bucket '([^']+)': )?AWS Error (\w+)([^\n]*)", text):
        return _reason(f"s3://{match[1]}" if match[1] else "s3", match[2], match[3])
    match = re.search(r"google::cloud::Status\((\w+): ([^\n]{,300})", text)
    return f"gs: {match[1]} ({match[2]})" if match else None
