"""TRL to compare with, in an environment of its own: this interpreter's packages and, before them, a folder.

torch and transformers are then the same on both sides, and TRL's release is whichever the benchmark asks for. The
folder is filled by pip the first time and kept under the temporary directory.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

# What TRL needs beyond our own dependencies.
BESIDE = ("datasets==5.2.0", "dill==0.4.1", "multiprocess==0.70.19", "xxhash==4.1.0")


def trl(version: str) -> dict[str, str]:
    """Environment variables of a process that imports this release of TRL."""
    packages = (f"trl=={version}", *BESIDE)
    folder = Path(tempfile.gettempdir()) / "-".join(("cai-ray-baseline", *packages)).replace("==", "-")
    if not folder.exists():
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=folder.name) as scratch:
            made = Path(scratch) / "packages"
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(made)]
            subprocess.run([*command, *packages], check=True, stdout=sys.stderr)
            made.rename(folder)  # there as a whole or not at all
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    return {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
