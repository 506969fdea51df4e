"""What several unit tests need."""

from __future__ import annotations

from pathlib import Path

import pyarrow.fs as pafs
import pytest

from cai_ray import storage


class Remote(pafs.SubTreeFileSystem):
    """A file system that is not this machine's, as far as anyone can see."""


@pytest.fixture
def far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A URI on another file system."""
    local, resolve = Remote(str(tmp_path), pafs.LocalFileSystem()), storage.resolve

    def resolve_far(uri: str | Path) -> tuple[pafs.FileSystem, str]:
        text = str(uri)
        return (local, text.removeprefix("far://")) if text.startswith("far://") else resolve(uri)

    monkeypatch.setattr(storage, "resolve", resolve_far)
    return "far://bucket/run"
