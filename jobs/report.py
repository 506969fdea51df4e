"""The run's numbers as report.json, and one self-contained page.

    ray job submit --working-dir . -- python jobs/report.py jobs/configs/llama-8b-8gpu.yaml --out s3://bucket/run

Needs whatever stages are done. A job that was stopped is submitted again as it was, and goes on where it stopped.
Arguments are those of `cai-ray report`: a configuration, `--set key=value`, `--out`, `--overwrite`, `--check`.
"""

from __future__ import annotations

import sys

from cai_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["report", *sys.argv[1:]]))
