"""What each part of the method is worth, on the embedded world: one part changed, and what the policy then does.

    python benchmarks/ablations.py --out DIR [--seeds N] [--split dev|held] [--only NAME …] [--set KEY=VALUE …]

Means over the seeds, with 95% intervals over prompts. Stages that a change does not reach are the full run's; what is
done is skipped, so that a table is finished by the same command. Choices are made on `dev`, the final table on `held`.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from typing import Any

from cai_ray.cluster.connect import disconnect
from cai_ray.provenance.versions import versions
from cai_ray.report.seeds import mean_of_seeds
from cai_ray.report.text import columns, interval, percent
from cai_ray.stages import POLICIES, ROLES
from cai_ray.storage import files
from cai_ray.studies import demo

# A model that has never revised without a critique fails at many rows: a finding, and no reason to stop.
NO_CRITIQUE = {"revise": {"critique": False}, "max_error_rate": 1.0}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "no_critique_sl": ("SL-CAI, revised without critiques", NO_CRITIQUE),
    "no_critique": ("revised without critiques", NO_CRITIQUE),
    "hard_labels": ("AI labels rounded to 0 or 1", {"rm": {"hard_labels": True}}),
    "shuffled": ("half of the AI labels flipped", {"rm": {"shuffle_labels": True}}),
    "kl_0.02": ("KL coefficient 0.02", {"ppo": {"kl_coef": 0.02}}),
    "kl_0.5": ("KL coefficient 0.5", {"ppo": {"kl_coef": 0.5}}),
    "rloo": (
        "group baseline, 4 samples",
        {"ppo": {"advantage": "rloo", "group": 4, "value_warmup_steps": 0}},
    ),
    "with_dpo": ("DPO for reward model and PPO", {"method": "dpo"}),
    "with_dpo_hard_labels": ("DPO, labels rounded", {"method": "dpo", "dpo": {"hard_labels": True}}),
    "with_dpo_shuffled": (
        "DPO, half of the labels flipped",
        {"method": "dpo", "dpo": {"shuffle_labels": True}},
    ),
}
FULL = {role: ROLES[role].title for role in POLICIES} | {"rl": "RL-CAI, the full method"}
RATES = {"harm": "harm", "helpful": "helpful", "over_refusal": "over-refusal", "malformed": "malformed"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="ablations", help="directory of the runs (default: ablations)")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--split", choices=("dev", "held"), default="dev", help="prompts to evaluate on")
    parser.add_argument("--only", nargs="+", default=list(VARIANTS), choices=VARIANTS, metavar="NAME")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="for all runs")
    args = parser.parse_args()
    load, started = os.getloadavg()[0], time.time()
    overrides = [f"evaluate.prompts=[{{path: 'town:{args.split}'}}]", *args.set]
    demo.check(args.out, args.set)
    reports, rows = [], []
    try:
        for seed in range(args.seeds):
            done, report, judged = demo.run_seed(files.join(args.out, args.split), seed, overrides)
            for name in args.only:
                folder, policy = name.removesuffix("_sl"), "sl" if name.endswith("_sl") else "rl"
                where = files.join(done.root, "ablations", folder)
                demo.add(done, report, judged, name, VARIANTS[name][1], out=where, policy=policy)
            reports.append(report)
            rows.append(judged)
    finally:
        disconnect()
    report = mean_of_seeds(reports, rows)
    titles = FULL | {name: VARIANTS[name][0] for name in args.only}
    table = [["percent", *RATES.values()]]
    for name, title in titles.items():
        cells = [f"{percent(r['value'])}  {interval(r)}".rstrip() for r in (report[name][k] for k in RATES)]
        table.append([title, *cells])
    print(f"\nprompts of town:{args.split}, seeds 0 to {args.seeds - 1}\n")
    print("\n".join(columns(table)), flush=True)
    found = {
        name: {k: {**report[name][k], "seeds": [r[name][k]["value"] for r in reports]} for k in RATES}
        for name in titles
    }
    print(
        json.dumps(
            {
                "benchmark": "ablations",
                "split": args.split,
                "seeds": args.seeds,
                "variants": found,
                "settings": {name: VARIANTS[name][1] for name in args.only},
                "seconds": round(time.time() - started),
                "versions": versions(),
                "load_before": round(load, 2),
            }
        )
    )


if __name__ == "__main__":
    main()
