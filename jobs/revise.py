"""Draft, critique, revise: what the SL-CAI policy will learn from, each revision with its principle.

    ray job submit --working-dir . -- python jobs/revise.py jobs/configs/llama-8b-8gpu.yaml --out s3://bucket/run

Needs nothing but the configuration. A job that was stopped is submitted again as it was, and goes on where it stopped.
Arguments are those of `cai-ray revise`: a configuration, `--set key=value`, `--out`, `--overwrite`, `--check`.
"""

from __future__ import annotations

import sys

from cai_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["revise", *sys.argv[1:]]))
