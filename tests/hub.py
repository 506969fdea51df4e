"""A small hub on this machine: the part of the Hugging Face hub's API that its library asks for, over local folders.

The library itself is the real one; only its endpoint and its cache are others.
"""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

TOKEN = "hf_token_of_the_tests"
"""The one token that has access to what is gated."""

Files = dict[str, bytes]


class Published(NamedTuple):
    """A repository: its commits with their files, and the commits that branches and tags name."""

    commits: dict[str, Files]
    revisions: dict[str, str]
    gated: bool


class Hub:
    """Serves what is published, until it is closed."""

    def __init__(self) -> None:
        self.repos: dict[str, Published] = {}
        self.requests: list[str] = []
        """Method and path of every request."""
        hub = self

        class Handler(_Handler):
            published = hub

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def publish(
        self, name: str, content: Path | Files, *revisions: str, dataset: bool = False, gated: bool = False
    ) -> str:
        """Publishes the files of a folder as a new commit, which `main` and the other revisions then name."""
        if isinstance(content, Path):
            folder = content
            content = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        key = f"datasets/{name}" if dataset else name
        repo = self.repos.setdefault(key, Published({}, {}, gated))
        digest = hashlib.sha1(repr((sorted(content.items()), len(repo.commits))).encode())
        repo.commits[digest.hexdigest()] = content
        for revision in ("main", *revisions):
            repo.revisions[revision] = digest.hexdigest()
        return digest.hexdigest()

    def downloads(self) -> list[str]:
        """The paths of all files that were sent so far."""
        return [
            r.split("/resolve/")[1].split("/", 1)[1]
            for r in self.requests
            if r.startswith("GET") and "/resolve/" in r
        ]

    def close(self) -> None:
        """Ends the server: from now on nobody answers at its address."""
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    published: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def log_message(self, *args: Any) -> None:
        pass

    def _answer(self, body: bool) -> None:
        self.published.requests.append(f"{self.command} {self.path}")
        path = unquote(urlsplit(self.path).path)
        if path.startswith("/api/"):
            self._describe(path.removeprefix("/api/").removeprefix("models/"))
        else:
            name, _, rest = path.strip("/").partition("/resolve/")
            self._send_file(name, rest, body)

    def _describe(self, path: str) -> None:
        """A repository's commit, or the list of its files."""
        for part in ("/revision/", "/tree/", ""):
            if not part or part in path:
                name, _, revision = path.partition(part) if part else (path, "", "main")
                break
        if (found := self._find(name, revision)) is None:
            return
        commit, files = found
        if part == "/tree/":
            rows = [
                {"type": "file", "path": n, "size": len(data), "oid": _blob(data)}
                for n, data in sorted(files.items())
            ]
            self._send(json.dumps(rows).encode())
        else:
            siblings = [{"rfilename": n} for n in sorted(files)]
            short = name.removeprefix("datasets/")
            self._send(json.dumps({"id": short, "sha": commit, "siblings": siblings}).encode())

    def _send_file(self, name: str, rest: str, body: bool) -> None:
        repo = self.published.repos.get(name)
        if repo and repo.gated and (authorization := self.headers.get("Authorization")) != f"Bearer {TOKEN}":
            self._refuse(403 if authorization else 401, "GatedRepo")
            return
        known = sorted(repo.revisions, key=len, reverse=True) if repo else []
        revision = next((r for r in known if rest.startswith(f"{r}/")), rest.partition("/")[0])
        if (found := self._find(name, revision)) is None:
            return
        commit, files = found
        data = files.get(rest[len(revision) + 1 :])
        if data is None:
            self._refuse(404, "EntryNotFound", commit)
        else:
            self._send(data, {"X-Repo-Commit": commit, "ETag": f'"{_blob(data)}"'}, body)

    def _find(self, name: str, revision: str) -> tuple[str, Files] | None:
        """A commit and its files; None after an answer that says what is not there."""
        repo = self.published.repos.get(name)
        if repo is None:
            self._refuse(401, "RepoNotFound")
            return None
        commit = repo.revisions.get(revision, revision)
        if commit not in repo.commits:
            self._refuse(404, "RevisionNotFound")
            return None
        return commit, repo.commits[commit]

    def _refuse(self, status: int, code: str, commit: str = "") -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": code} | (
            {"X-Repo-Commit": commit} if commit else {}
        )
        self._send(b"", headers, status=status)

    def _send(
        self, data: bytes, headers: dict[str, str] | None = None, body: bool = True, status: int = 200
    ) -> None:
        self.send_response(status)
        for key, value in {**(headers or {}), "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(data)


def _blob(data: bytes) -> str:
    """Git's name of a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
