"""The feedback model's soft preference on each comparison, principle by principle, in both orders.

    ray job submit --working-dir . -- python jobs/label.py jobs/configs/llama-8b-8gpu.yaml --out s3://bucket/run

Needs `compare`. A job that was stopped is submitted again as it was, and goes on where it stopped.
Arguments are those of `cai-ray label`: a configuration, `--set key=value`, `--out`, `--overwrite`, `--check`.
"""

from __future__ import annotations

import sys

from cai_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["label", *sys.argv[1:]]))
