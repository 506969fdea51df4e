"""The bearer tokens of clients. The server keeps only their hashes."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from cai_ray.config.section import Section
from cai_ray.errors import InputError

TOKEN_VARIABLE = "CAI_RAY_TOKEN"
_LOOPBACK = {"127.0.0.1", "::1", "localhost"}
_LINE = re.compile(r"(?P<name>\S+) sha256:(?P<sha256>[0-9a-f]{64})(?P<admin> admin)?")


class Key(Section):
    name: str = Field(min_length=1)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    """SHA-256 of the token, in hexadecimal."""
    admin: bool = False
    """Whether the key may also change the server's constitution."""


def read_keys(token_file: str | None, *, no_auth: bool, host: str) -> tuple[Key, ...]:
    """The keys of a file, or the key in the environment; none if authentication is off.

    Raises:
        InputError: there is no token, or one that no client can send; or authentication is off although a token is
            given, or although others can reach the address.
    """
    if no_auth and token_file is not None:
        raise InputError(
            f"--token-file {token_file} with --no-auth: the token would not be checked; leave one out"
        )
    if no_auth:
        if host not in _LOOPBACK:
            raise InputError(
                f"--no-auth with --host {host}: others can reach this address; set a token or use 127.0.0.1"
            )
        return ()
    if token_file is not None:
        return read_file(token_file)
    token = read_token()
    return (Key(name="environment", sha256=hash_token(token), admin=True),)


def read_token() -> str:
    """The token in the environment variable CAI_RAY_TOKEN.

    Raises:
        InputError: it is not set, or no client can send it.
    """
    token = os.environ.get(TOKEN_VARIABLE, "").strip()
    if not token:
        raise InputError(
            f"no bearer token: {TOKEN_VARIABLE} is not set; set it, give --token-file, or use --no-auth on a loopback "
            "address"
        )
    _check_sendable(token, TOKEN_VARIABLE)
    return token


def read_file(path: str) -> tuple[Key, ...]:
    """The keys in a file: a line `NAME sha256:HASH [admin]` for each, or a single plain token."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(
            f"--token-file {path}: cannot be read ({e}); give a file with keys or a token"
        ) from e
    lines = [line.strip() for line in text.splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    if not lines:
        raise InputError(f"--token-file {path} is empty; `cai-ray serve --add-token NAME` adds one to it")
    matches = [_LINE.fullmatch(line) for line in lines]
    if len(lines) == 1 and matches[0] is None and "sha256:" not in lines[0]:
        token = text.strip()
        if " " in token:
            raise InputError(_unsendable(f"--token-file {path}"))
        _check_sendable(token, f"--token-file {path}")
        return (Key(name="file", sha256=hash_token(token), admin=True),)
    keys = []
    for number, match in enumerate(matches, 1):
        if match is None:
            # The message does not show the line, which may be a token.
            raise InputError(
                f"{_unsendable(f'--token-file {path}')}; or give keys, each in a line `NAME sha256:… [admin]`, "
                f"which line {number} is not"
            )
        keys.append(Key(name=match["name"], sha256=match["sha256"], admin=bool(match["admin"])))
    if twice := next((k.name for k in keys if sum(k.name == o.name for o in keys) > 1), None):
        raise InputError(f"--token-file {path}: two keys are named {twice!r}; give each its own name")
    return tuple(keys)


def add_key(path: str, name: str, admin: bool) -> str:
    """Makes a token, adds its hash to a file, and returns the token, which is stored nowhere.

    Raises:
        InputError: the name is not a single word or is taken, or the file is not a file of keys.
    """
    if not re.fullmatch(r"[\w.@-]+", name):
        raise InputError(
            f"--add-token {name!r}: the name may have letters, digits and . @ - only; choose another"
        )
    file = Path(path)
    if file.exists():
        keys = read_file(path) if file.read_text(encoding="utf-8", errors="replace").strip() else ()
        if any(k.name == name for k in keys):
            raise InputError(f"--add-token {name}: {path} already has a key of this name; choose another")
    token = f"cai-{secrets.token_urlsafe(32)}"
    line = f"{name} sha256:{hash_token(token)}{' admin' * admin}\n"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    with os.fdopen(descriptor, "a", encoding="utf-8") as f:
        f.write(line)
    return token


def hash_token(token: str) -> str:
    """The hash that is stored instead of the token. Tokens are long and random, so a plain hash is enough."""
    return hashlib.sha256(token.encode()).hexdigest()


def find_key(header: bytes, keys: Sequence[Key]) -> Key | None:
    """The key that an Authorization header shows, if it is one of these."""
    scheme, _, token = header.partition(b" ")
    # Hashes are compared in constant time and with every key, so neither a token's length nor its start can be probed.
    sha256 = hashlib.sha256(token.strip()).hexdigest()
    matches = [key for key in keys if hmac.compare_digest(sha256, key.sha256)]
    return matches[0] if matches and scheme.lower() == b"bearer" else None


def _check_sendable(token: str, where: str) -> None:
    # A header is one line of ASCII. It may have spaces, but a file with spaces holds something other than a token.
    if not (token.isascii() and token.isprintable()):
        raise InputError(_unsendable(where))


def _unsendable(where: str) -> str:
    return (
        f"{where} holds no token that a client can send; make one with `openssl rand -hex 32`: "
        "a single line of ASCII without spaces"
    )
