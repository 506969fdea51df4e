"""The SL-CAI policy: fine-tunes the helpful model on revisions, mixed with helpfulness samples.

    ray job submit --working-dir . -- python jobs/sft.py jobs/configs/llama-8b-8gpu.yaml --out s3://bucket/run

Needs `revise`. A job that was stopped is submitted again as it was, and goes on where it stopped.
Arguments are those of `cai-ray sft`: a configuration, `--set key=value`, `--out`, `--overwrite`, `--check`.
"""

from __future__ import annotations

import sys

from cai_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["sft", *sys.argv[1:]]))
