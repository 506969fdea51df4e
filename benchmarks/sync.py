"""Weight sync in a run's PPO: seconds of a send, seconds of its proof, and how far engine and trainer are apart.

    python benchmarks/sync.py RUN

Reads what the `ppo` stage of RUN measured; each number is over its steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
from typing import Any

from cai_ray.storage.run import open_run


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="run directory whose ppo stage is done")
    steps = open_run(parser.parse_args().run).metrics("ppo")
    if not steps:
        parser.exit(2, "this run has no metrics of ppo; run `cai-ray ppo` first\n")
    print(
        json.dumps(
            {
                "benchmark": "sync",
                "send_s": middle(steps, "sync/send_s"),
                "send_s_max": largest(steps, "sync/send_s"),
                "prove_s": middle(steps, "sync/prove_s"),
                "prove_s_max": largest(steps, "sync/prove_s"),
                "logprob_gap": middle(steps, "rollout/logprob_gap"),
                "logprob_gap_max": largest(steps, "rollout/logprob_gap"),
                "steps": len(steps),
            }
        )
    )


def values(steps: list[dict[str, Any]], key: str) -> list[float]:
    return [step[key] for step in steps if isinstance(step.get(key), int | float)]


def middle(steps: list[dict[str, Any]], key: str) -> float | None:
    return statistics.median(found) if (found := values(steps, key)) else None


def largest(steps: list[dict[str, Any]], key: str) -> float | None:
    return max(values(steps, key), default=None)


if __name__ == "__main__":
    main()
