"""The built wheel has everything that the commands need, away from this checkout."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.e2e.command import ROOT, cai_ray, environment, refused


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as `pip wheel` does, with the build's own requirements."""
    folder = tmp_path_factory.mktemp("wheel")
    _pip("wheel", "--no-deps", "--wheel-dir", str(folder), str(ROOT))
    (built,) = folder.glob("cai_ray-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    _pip("install", "--no-deps", "--target", str(folder), str(wheel))
    return folder


def test_the_wheel_is_whole(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = set(archive.namelist())
    tracked = {
        str(p.relative_to(ROOT))
        for p in (ROOT / "cai_ray").rglob("*")
        if p.is_file() and "__pycache__" not in p.parts
    }
    assert tracked <= packed
    assert not [n for n in packed if n.startswith(("tests/", "jobs/", "benchmarks/", "docs/"))]


def test_data_is_found_from_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    script = """
import json
from cai_ray import constitution, pipeline
from cai_ray.config.load import load_config
from cai_ray.prompts.load import load_templates
from cai_ray.storage.run import Run
loaded = load_config("errand-town")
pipeline.check_inputs(loaded)
names = [constitution.load(n).name for n in ("errand-town", "harmless")]
names += [load_templates(n).name for n in ("errand-town", "general")]
print(json.dumps([names, Run(loaded).model("base")]))
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=environment(PYTHONPATH=str(installed)),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    names, base = json.loads(done.stdout.splitlines()[-1])
    assert names == ["errand-town", "harmless", "errand-town", "general"]
    assert Path(base).is_relative_to(installed)  # the installed copy, not the checkout
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert (Path(base) / name).exists(), name


def test_commands_work_from_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    away = {"cwd": tmp_path, "env": environment(PYTHONPATH=str(installed))}
    done = cai_ray("run", "errand-town", "--check", **away)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "ok: nothing was started"
    # The configuration writes below the working directory: there, and nothing beside the package.
    assert not list(tmp_path.rglob("manifest.json"))
    assert "no such file" in refused(cai_ray("run", "nowhere", "--check", **away))
    command = [sys.executable, str(installed / "bin" / "cai-ray"), "--version"]
    said = subprocess.run(command, env=away["env"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert said.stdout.startswith("cai-ray "), said.stderr


def _pip(*words: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", words[0], "--quiet", *words[1:]],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
