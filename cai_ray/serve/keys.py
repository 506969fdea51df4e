"""Who may ask: bearer tokens, of which the server keeps hashes alone."""

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
    """Of the token, in hexadecimal."""
    admin: bool = False
    """Whether it may also put a constitution into the server."""


def read_keys(token_file: str | None, *, no_auth: bool, host: str) -> tuple[Key, ...]:
    """The keys of a file, or the one of the environment; none where authentication is switched off.

    Raises:
        InputError: there is no token or one that no client can send, authentication is off on an address that
            others reach, or it is off and a token is given.
    """
    if no_auth and token_file is not None:
        raise InputError(
            f"--token-file {token_file} with --no-auth: the token would not be asked for; drop one"
        )
    if no_auth:
        if host not in _LOOPBACK:
            raise InputError(
                f"--no-auth with --host {host}: others can reach it; set a token or use 127.0.0.1"
            )
        return ()
    if token_file is not None:
        return read_file(token_file)
    token = read_token()
    return (Key(name="environment", sha256=hash_token(token), admin=True),)


def read_token() -> str:
    """The token of the environment.

    Raises:
        InputError: it is not set, or no client can send it.
    """
    token = os.environ.get(TOKEN_VARIABLE, "").strip()
    if not token:
        raise InputError(
            f"no bearer token: {TOKEN_VARIABLE} is not set; set one, give --token-file, or --no-auth on loopback"
        )
    _check_sendable(token, TOKEN_VARIABLE)
    return token


def read_file(path: str) -> tuple[Key, ...]:
    """Keys of a file: lines of a name, `sha256:` with the token's hash and perhaps `admin`; or one plain token."""
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
    found = [_LINE.fullmatch(line) for line in lines]
    if len(lines) == 1 and found[0] is None and "sha256:" not in lines[0]:
        token = text.strip()
        if " " in token:
            raise InputError(_unsendable(f"--token-file {path}"))
        _check_sendable(token, f"--token-file {path}")
        return (Key(name="file", sha256=hash_token(token), admin=True),)
    keys = []
    for number, match in enumerate(found, 1):
        if match is None:
            # The line is not repeated: it may be a token.
            raise InputError(
                f"{_unsendable(f'--token-file {path}')}; or keys, each in a line `NAME sha256:… [admin]`, which line "
                f"{number} is not"
            )
        keys.append(Key(name=match["name"], sha256=match["sha256"], admin=bool(match["admin"])))
    if twice := next((k.name for k in keys if sum(k.name == o.name for o in keys) > 1), None):
        raise InputError(f"--token-file {path}: two keys are named {twice!r}; give each a name of its own")
    return tuple(keys)


def add_key(path: str, name: str, admin: bool) -> str:
    """Makes a token, adds its hash to a file, and returns it: it is kept nowhere.

    Raises:
        InputError: the name is no single word or is taken, or the file is no file of keys.
    """
    if not re.fullmatch(r"[\w.@-]+", name):
        raise InputError(f"--add-token {name!r}: a name of letters, digits and . @ - is needed")
    file = Path(path)
    if file.exists():
        keys = read_file(path) if file.read_text(encoding="utf-8", errors="replace").strip() else ()
        if any(k.name == name for k in keys):
            raise InputError(f"--add-token {name}: {path} has a key of this name; choose another")
    token = f"cai-{secrets.token_urlsafe(32)}"
    line = f"{name} sha256:{hash_token(token)}{' admin' * admin}\n"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    with os.fdopen(descriptor, "a", encoding="utf-8") as f:
        f.write(line)
    return token


def hash_token(token: str) -> str:
    """What is kept instead of the token. Tokens are long and random, so that a plain hash is enough."""
    return hashlib.sha256(token.encode()).hexdigest()


def find_key(header: bytes, keys: Sequence[Key]) -> Key | None:
    """The key of an Authorization header."""
    scheme, _, given = header.partition(b" ")
    # Hashes are compared, in constant time and with every key: neither a token's length nor its start can be probed.
    asked = hashlib.sha256(given.strip()).hexdigest()
    same = [key for key in keys if hmac.compare_digest(asked, key.sha256)]
    return same[0] if same and scheme.lower() == b"bearer" else None


def _check_sendable(token: str, where: str) -> None:
    # A header is one line of ASCII. It may have spaces, but a file with them holds something else than a token.
    if not (token.isascii() and token.isprintable()):
        raise InputError(_unsendable(where))


def _unsendable(where: str) -> str:
    return (
        f"{where}: holds no token that a client can send; make one with `openssl rand -hex 32`: "
        "a single line of ASCII without spaces"
    )
