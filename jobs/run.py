"""The whole pipeline, stage by stage; what is already done is skipped.

    ray job submit --working-dir . -- python jobs/run.py jobs/configs/llama-8b-8gpu.yaml --out s3://bucket/run

A job that was stopped is submitted again as it was, and goes on where it stopped.
Arguments are those of `cai-ray run`: a configuration, `--set key=value`, `--out`, `--overwrite`, `--check`.
"""

from __future__ import annotations

import sys

from cai_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["run", *sys.argv[1:]]))
