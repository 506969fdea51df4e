"""The reward model, from the AI labels and, where configured, human helpfulness comparisons.

    ray job submit --working-dir . -- python jobs/rm.py jobs/configs/llama-8b-8gpu.yaml --out s3://bucket/run

Needs `label`. A job that was stopped is submitted again as it was, and goes on where it stopped.
Arguments are those of `cai-ray rm`: a configuration, `--set key=value`, `--out`, `--overwrite`, `--check`.
"""

from __future__ import annotations

import sys

from cai_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["rm", *sys.argv[1:]]))
