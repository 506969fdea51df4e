"""The project's own files: what is declared in two places agrees, and what others read is well-formed."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCK = dict(
    line.split("==")
    for line in (ROOT / "requirements-cpu.lock").read_text().splitlines()
    if not line.startswith("#")
)


def _name(requirement: str) -> str:
    return re.split(r"[\[<>=~ ]", requirement)[0].lower().replace("_", "-")


def test_lock_holds_every_dependency_at_the_pinned_version() -> None:
    locked = {_name(k): v for k, v in LOCK.items()}
    extras = PROJECT["project"]["optional-dependencies"]
    for requirement in [*PROJECT["project"]["dependencies"], *extras["cpu"], *extras["dev"]]:
        assert _name(requirement) in locked, requirement
        if "==" in requirement:
            assert locked[_name(requirement)].split("+")[0] == requirement.split("==")[1], requirement


def test_lock_is_what_is_installed() -> None:
    for name, wanted in LOCK.items():
        if name == "setuptools":  # what built the environment may have brought another
            continue
        assert version(name) == wanted, name


def test_lock_has_no_addresses_and_none_of_the_cuda_packages() -> None:
    text = (ROOT / "requirements-cpu.lock").read_text()
    assert "://" not in text
    assert "@" not in text
    assert not {"torchvision", "torchaudio", "torchcodec", "vllm"} & set(LOCK)


def test_cpu_and_gpu_exclude_each_other() -> None:
    assert [{"extra": "cpu"}, {"extra": "gpu"}] in PROJECT["tool"]["uv"]["conflicts"]


@pytest.mark.parametrize("job", sorted((ROOT / "jobs").glob("*.py")), ids=lambda p: p.stem)
def test_every_job_is_a_command(job: Path) -> None:
    from cai_ray.cli import main

    assert f'main(["{job.stem}", *sys.argv[1:]])' in job.read_text()
    assert main([job.stem, "--help"]) == 0


def test_constitutions_at_the_root_are_the_packaged_ones() -> None:
    assert (ROOT / "constitutions").resolve() == ROOT / "cai_ray" / "constitutions"
