"""The object store of a local cluster holds the weights that PPO sends, as far as memory has room."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from cai_ray.cluster.object_store import LEAST, object_store_bytes
from cai_ray.config.load import load_config
from cai_ray.config.run import RunConfig

GIB = 1 << 30


def of(model: Path | str, *overrides: str) -> RunConfig:
    return load_config("errand-town", [f"model={model}", *overrides])


def has(monkeypatch: pytest.MonkeyPatch, memory: int, shared: int) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=memory))
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=shared, f_frsize=1))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder with weights of 2 GiB, which take no room on the disk."""
    with (tmp_path / "model.safetensors").open("wb") as f:
        f.truncate(2 * GIB)
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def test_it_has_room_for_two_versions_of_the_weights(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    has(monkeypatch, memory=256 * GIB, shared=128 * GIB)
    assert object_store_bytes(of(model)) == LEAST + 8 * GIB
    assert object_store_bytes(of("town")) < LEAST + (64 << 20)


def test_weights_that_take_another_way_need_no_room(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    has(monkeypatch, memory=256 * GIB, shared=128 * GIB)
    assert object_store_bytes(of(model, "method=dpo")) == LEAST
    assert object_store_bytes(of(model, "ppo.weight_sync=gloo")) == LEAST


def test_memory_bounds_it(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    has(monkeypatch, memory=12 * GIB, shared=128 * GIB)
    assert object_store_bytes(of(model)) == 4 * GIB
    has(monkeypatch, memory=256 * GIB, shared=5 * GIB)
    assert object_store_bytes(of(model)) < 5 * GIB
    assert object_store_bytes(of("some/model-of-the-hub")) < 5 * GIB, "its size is not known yet"


def test_a_small_shared_memory_is_no_hindrance(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    has(monkeypatch, memory=16 * GIB, shared=64 << 20)
    assert object_store_bytes(of(model)) == LEAST
