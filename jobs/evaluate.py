"""Base, SL-CAI and RL-CAI on held-out prompts, on both axes: harmless and helpful.

    ray job submit --working-dir . -- python jobs/evaluate.py jobs/configs/llama-8b-8gpu.yaml --out s3://bucket/run

Needs `sft` and `ppo`. A job that was stopped is submitted again as it was, and goes on where it stopped.
Arguments are those of `cai-ray evaluate`: a configuration, `--set key=value`, `--out`, `--overwrite`, `--check`.
"""

from __future__ import annotations

import sys

from cai_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
