"""Files are hashed once, and never taken for what they were."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from cai_ray.storage import files, hashes
from cai_ray.storage.hashes import file_hashes
from cai_ray.storage.models import folder_sha


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are read, as they are; the cache is the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    names: list[str] = []
    sha = hashes._sha

    def noted(fs: object, path: str) -> str:
        names.append(Path(path).name)
        return sha(fs, path)  # type: ignore[arg-type]

    monkeypatch.setattr(hashes, "_sha", noted)
    monkeypatch.setattr(hashes, "_of_this_process", {})
    return names


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    (folder / "below").mkdir(parents=True)
    for name in (
        "config.json",
        "model-1.safetensors",
        "model-2.safetensors",
        "README.md",
        "below/config.json",
    ):
        (folder / name).write_text(f"content of {name}")
    return folder


def settle(monkeypatch: pytest.MonkeyPatch, seconds: float = 3600) -> None:
    """Makes all that was written until now old."""
    now = time.time_ns
    monkeypatch.setattr(hashes.time, "time_ns", lambda: now() + int(seconds * 1e9))


def test_a_model_is_read_once(model: Path, read: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    settle(monkeypatch)
    sha = folder_sha(model)
    hashes._of_this_process.clear()  # the cache is for other processes, too
    assert sorted(read) == ["config.json", "model-1.safetensors", "model-2.safetensors"]
    read.clear()
    assert folder_sha(model) == sha == folder_sha(f"{model}/") and read == []


CHANGES = {
    "another size": lambda file: file.write_text("longer than it was"),
    "the same size": lambda file: file.write_text("CONTENT of model-1.safetensors"),
    "another time alone": lambda file: os.utime(file, (1, 1)),
    "a time set back": lambda file: _replace_content(file),
    "another file in its place": lambda file: _move_in(file),
}


def _replace_content(file: Path) -> None:
    stat = file.stat()
    file.write_text("CONTENT of model-1.safetensors")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def _move_in(file: Path) -> None:
    other = file.with_name("other")
    other.write_text("CONTENT of model-1.safetensors")
    os.utime(other, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns))
    other.replace(file)


@pytest.mark.parametrize("change", CHANGES)
def test_only_what_changed_is_read_again(
    model: Path, read: list[str], monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    settle(monkeypatch)
    sha = folder_sha(model)
    read.clear()
    time.sleep(0.02)  # a step of the file system's clock
    CHANGES[change](model / "model-1.safetensors")
    assert (folder_sha(model) == sha) == (change == "another time alone")
    assert read == ["model-1.safetensors"]


def test_names_and_contents_decide_alone(model: Path, read: list[str], tmp_path: Path) -> None:
    sha = folder_sha(model)
    files.upload_folder(model, str(tmp_path / "copy"))
    assert folder_sha(tmp_path / "copy") == sha
    (tmp_path / "copy" / "README.md").write_text("of no influence")
    assert folder_sha(tmp_path / "copy") == sha
    (tmp_path / "copy" / "config.json").rename(tmp_path / "copy" / "configuration.json")
    assert folder_sha(tmp_path / "copy") != sha


def test_what_was_written_just_now_is_read_each_time(model: Path, read: list[str]) -> None:
    """It may change again within a step of the clock."""
    for _ in range(2):
        read.clear()
        folder_sha(model)
        assert len(read) == 3


def test_a_file_that_changes_while_it_is_read_is_not_kept(
    model: Path, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settle(monkeypatch)
    sha, file = hashes._sha, model / "config.json"

    def changing(fs: object, path: str) -> str:
        found = sha(fs, path)  # type: ignore[arg-type]
        if path.endswith("config.json"):
            time.sleep(0.02)
            file.write_text("changed meanwhile")
        return found

    with monkeypatch.context() as patch:
        patch.setattr(hashes, "_sha", changing)
        before = folder_sha(model)
    read.clear()
    assert folder_sha(model) != before and read == ["config.json"]


@pytest.mark.parametrize("damage", [b"", b"[1]", b"{ torn", b'{"x": 1}', b'{"x": {"sha": 1}}', b"\xff"])
def test_a_damaged_cache_is_no_cache(
    model: Path, read: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: bytes
) -> None:
    settle(monkeypatch)
    sha = folder_sha(model)
    cache = tmp_path / "cache" / "cai_ray" / "hashes.json"
    assert len(json.loads(cache.read_text())) == 3
    cache.write_bytes(damage)
    hashes._of_this_process.clear()  # as in another process
    read.clear()
    assert folder_sha(model) == sha and len(read) == 3
    assert len(json.loads(cache.read_text())) == 3


def test_no_place_for_a_cache(
    model: Path, read: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each process reads a file once all the same."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    settle(monkeypatch)
    assert folder_sha(model) == folder_sha(model) and len(read) == 3


def test_a_folder_below_counts_where_it_is_asked_for(model: Path, read: list[str]) -> None:
    assert set(file_hashes(model)) == {
        "README.md",
        "config.json",
        "model-1.safetensors",
        "model-2.safetensors",
    }
    assert "below/config.json" in file_hashes(model, recursive=True)


def test_a_remote_folder(far: str, tmp_path: Path, read: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    uri = files.join(far, "model")
    files.write_bytes(files.join(uri, "config.json"), b"{}")
    sha = folder_sha(uri)
    assert folder_sha(uri) == sha and read == ["config.json"] * 2  # the store's clock may be another
    settle(monkeypatch)
    assert folder_sha(uri) == sha
    read.clear()
    assert folder_sha(uri) == sha and read == []
    time.sleep(0.02)
    files.write_bytes(files.join(uri, "config.json"), b"[]")
    assert folder_sha(uri) != sha
