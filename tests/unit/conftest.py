"""What several unit tests need."""

from __future__ import annotations

import sys
from pathlib import Path

import pyarrow.fs as pafs
import pytest

from cai_ray.storage import filesystems


class Remote(pafs.SubTreeFileSystem):
    """A file system that is not this machine's, as far as anyone can see."""


@pytest.fixture
def far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A URI on another file system."""
    resolve, local = filesystems.resolve, Remote(str(tmp_path), pafs.LocalFileSystem())

    def resolve_far(uri: str | Path) -> tuple[pafs.FileSystem, str]:
        text = str(uri)
        return (local, text.removeprefix("far://")) if text.startswith("far://") else resolve(uri)

    for name, module in list(sys.modules.items()):
        if name.startswith(("cai_ray.", "tests.")) and getattr(module, "resolve", None) is resolve:
            monkeypatch.setattr(module, "resolve", resolve_far)
    return "far://bucket/run"
