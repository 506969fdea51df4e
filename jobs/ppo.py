"""The RL-CAI policy: PPO against the reward model, with a KL penalty towards the SL-CAI policy.

    ray job submit --working-dir . -- python jobs/ppo.py jobs/configs/llama-8b-8gpu.yaml --out s3://bucket/run

Needs `rm`. A job that was stopped is submitted again as it was, and goes on where it stopped.
Arguments are those of `cai-ray ppo`: a configuration, `--set key=value`, `--out`, `--overwrite`, `--check`.
"""

from __future__ import annotations

import sys

from cai_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["ppo", *sys.argv[1:]]))
