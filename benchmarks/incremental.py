"""What an edit of one principle of 16 costs in engine calls, the comparisons kept.

    python benchmarks/incremental.py [--prompts N]

A run of the embedded world up to its labels, by a constitution of 16 principles that all vote (its five, under several
names). Then one is edited, one added, one removed, each in a copy of that run, by
`cai-ray run … --until label --keep revise,sft,compare --overwrite`. The last line is JSON: `edited`, `added`, `removed`
are the engine calls of stage `label` over those of labelling the same from nothing, and `predicted` what
`cai-ray constitution diff … --run` said of them before.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from cai_ray import constitution as constitutions
from cai_ray.constitution import Constitution
from cai_ray.provenance.versions import versions
from cai_ray.storage import files

PRINCIPLES = 16
KEEP = "revise,sft,compare"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=int, default=200)
    args = parser.parse_args()
    load = os.getloadavg()[0]
    first = document(PRINCIPLES)
    one, others = first.principles[3], [p for p in first.principles if p.id != first.principles[3].id]
    reworded = one.model_copy(update={"comparison": one.comparison.replace("which", "what")})
    edits = {
        "edited": [*others, reworded],
        "added": list(document(PRINCIPLES + 1).principles),
        "removed": others,
    }
    with tempfile.TemporaryDirectory(prefix="cai-ray-incremental-") as folder:
        whole = Path(folder) / "run"
        run(first, whole, args.prompts)
        each = label_calls(whole) / PRINCIPLES  # of one principle, from nothing
        found, predicted = {}, {}
        for name, principles in edits.items():
            after, out = first.model_copy(update={"principles": tuple(principles)}), Path(folder) / name
            files.upload_folder(whole, str(out))
            predicted[name] = forecast(out, after) / (each * len(principles))
            run(after, out, args.prompts, "--overwrite", "--keep", KEEP)
            found[name] = label_calls(out) / (each * len(principles))
    print(
        json.dumps(
            {
                "benchmark": "incremental",
                **{name: round(share, 4) for name, share in found.items()},
                "predicted": {name: round(share, 4) for name, share in predicted.items()},
                "calls_from_nothing": round(each * PRINCIPLES),
                "principles": PRINCIPLES,
                "prompts": args.prompts,
                "load_before": round(load, 2),
                "versions": versions(),
            }
        )
    )
    return 0


def document(count: int) -> Constitution:
    """The principles of Errand Town in turn, each under a name of its own."""
    town = constitutions.load("errand-town")
    principles = [
        p.model_copy(update={"id": f"{p.id}-{i}"})
        for i, p in ((i, town.principles[i % len(town.principles)]) for i in range(count))
    ]
    return town.model_copy(update={"principles": tuple(principles)})


def run(constitution: Constitution, out: Path, prompts: int, *options: str) -> None:
    file = write(constitution, out)
    limits = [f"{key}={prompts}" for key in ("revise.limit", "compare.limit")]
    settings = [f"constitution={file}", "label.gold=null", "sft.epochs=1", *limits]
    command(
        "run",
        "errand-town",
        "--out",
        str(out),
        "--until",
        "label",
        *options,
        *(f"--set={s}" for s in settings),
    )


def forecast(out: Path, after: Constitution) -> int:
    """Engine calls of stage `label` with the comparisons kept, as `diff` foretells them."""
    said = command(
        "constitution",
        "diff",
        str(out / "constitution.yaml"),
        str(write(after, out)),
        "--run",
        str(out),
        "--json",
    )
    return next(row["calls"] for row in json.loads(said)["cost"]["kept"] if row["stage"] == "label")


def label_calls(out: Path) -> int:
    return int(files.read_json(out / "label" / "manifest.json")["calls"])


def write(constitution: Constitution, out: Path) -> Path:
    file = out.with_suffix(".yaml")
    file.write_text(constitution.to_yaml(), encoding="utf-8")
    return file


def command(*arguments: str) -> str:
    """What a command prints."""
    done = subprocess.run(
        [sys.executable, "-m", "cai_ray", *arguments], stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
