"""The policy by direct preference optimisation on the labels, in the place of rm and ppo.

    ray job submit --working-dir . -- python jobs/dpo.py jobs/configs/llama-8b-8gpu.yaml --out s3://bucket/run

Needs `label`, and `method: dpo` in the configuration. A job that was stopped is submitted again as it was, and goes on
where it stopped.
Arguments are those of `cai-ray dpo`: a configuration, `--set key=value`, `--out`, `--overwrite`, `--check`.
"""

from __future__ import annotations

import sys

from cai_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["dpo", *sys.argv[1:]]))
