"""Two (or more) samples of the SL-CAI policy per prompt, to be judged by the constitution.

    ray job submit --working-dir . -- python jobs/compare.py jobs/configs/llama-8b-8gpu.yaml --out s3://bucket/run

Needs `sft`. A job that was stopped is submitted again as it was, and goes on where it stopped.
Arguments are those of `cai-ray compare`: a configuration, `--set key=value`, `--out`, `--overwrite`, `--check`.
"""

from __future__ import annotations

import sys

from cai_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["compare", *sys.argv[1:]]))
