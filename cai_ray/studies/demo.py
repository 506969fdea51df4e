"""Runs the whole pipeline on the embedded world, for one seed or several, and reports on it: `cai-ray demo`."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

from cai_ray import pipeline
from cai_ray.cluster.connect import disconnect
from cai_ray.config.load import load_config, validate
from cai_ray.config.run import RunConfig
from cai_ray.errors import InputError
from cai_ray.provenance.copies import share
from cai_ray.report import plain_text
from cai_ray.report import stage as report_stage
from cai_ray.report.roles import title_of
from cai_ray.report.seeds import mean_of_seeds
from cai_ray.report.terminal import print_table
from cai_ray.stages import stages_of
from cai_ray.storage import files
from cai_ray.storage.run import Run

CONFIG = "errand-town"
BEST_OF = 4
KEPT = "respect"
"""The one principle that stays enabled in the third control."""


def run(
    out: str,
    seeds: int = 1,
    controls: bool = False,
    overrides: Sequence[str] = (),
    overwrite: bool = False,
) -> dict[str, Any]:
    """Runs the demo into OUT/seed-K, writes OUT/report and prints its summary. Stages that are done are skipped.

    Args:
        controls: adds for each seed a policy trained on shuffled labels, best of n of the SL-CAI policy, and a policy
            of a constitution with one enabled principle.
        overrides: `a.b=value` settings on the packaged configuration.
        overwrite: runs stages again whose inputs changed.

    Returns:
        The report over all seeds, as in OUT/report/report.json.

    Raises:
        InputError: `out` is empty, an override sets what the demo sets itself, or see `pipeline.run_stages`.
    """
    check(out, overrides)
    started = time.time()
    reports, rows = [], []
    try:
        for seed in range(seeds):
            done, report, judged = run_seed(out, seed, overrides, overwrite)
            if controls:
                _add_controls(done, report, judged, overwrite)
            reports.append(report)
            rows.append(judged)
    finally:
        disconnect()
    report = mean_of_seeds(reports, rows)
    folder = files.join(out, "report")
    report_stage.write(folder, report)
    _show(report, folder, time.time() - started)
    return report


def check(out: str, overrides: Sequence[str]) -> None:
    """Raises InputError for an override of `out` or `seed`, which the demo sets itself, or an empty `out`."""
    if not out.strip():  # else the runs would be in the root of the file system
        raise InputError("--out is empty; name a directory for the demo's runs")
    options = {"seed": "--seeds N, which runs the seeds 0 to N-1", "out": "--out DIR"}
    for item in overrides:
        key = item.partition("=")[0].split(".")[0].strip()
        if key in options:
            raise InputError(f"--set {item}: the demo sets {key} itself; use {options[key]}")


def run_seed(
    out: str, seed: int, overrides: Sequence[str], overwrite: bool = False
) -> tuple[Run, dict[str, Any], list[dict[str, Any]]]:
    """Runs one seed into OUT/seed-K. Returns the run, its report and its judged rows."""
    settings = load_config(CONFIG, list(overrides), out=files.join(out, f"seed-{seed}"), seed=seed)
    done = _run(settings, f"seed {seed}", overwrite)
    return done, *_result(done)


def add(
    done: Run,
    report: dict[str, Any],
    judged: list[dict[str, Any]],
    name: str,
    sections: dict[str, Any],
    *,
    out: str,
    policy: str = "rl",
    overwrite: bool = False,
) -> None:
    """Runs a seed with changed settings, and adds one of its policies to the seed's report and rows under a name.

    Stages that the change does not affect are copied.
    """
    data = done.config.model_dump(mode="json")
    for key, value in sections.items():
        data[key] = {**data[key], **value} if isinstance(value, dict) else value
    settings = validate({**data, "out": out}, CONFIG)
    share(done, settings)
    other, rows = _result(_run(settings, f"seed {settings.seed}, {title_of(name)}", overwrite))
    report[name] = other[policy]
    report["models"].append(name)
    judged.extend({**row, "model": name} for row in rows if row["model"] == policy)


def _add_controls(done: Run, report: dict[str, Any], judged: list[dict[str, Any]], overwrite: bool) -> None:
    """Runs the controls of one seed and adds their policies to its report and rows."""
    where, best = files.join(done.root, "controls"), f"best_of_{BEST_OF}"
    labels = "dpo" if done.config.method == "dpo" else "rm"
    controls: dict[str, tuple[str, dict[str, Any]]] = {"shuffled": ("rl", {labels: {"shuffle_labels": True}})}
    # The run itself may have a best of n, and without a reward model there is none.
    if not done.config.evaluate.best_of and done.config.method == "ppo":
        controls[best] = (best, {"evaluate": {"best_of": BEST_OF}})
    others = [p.id for p in done.config.document.principles if p.id != KEPT]
    controls[f"{KEPT}_only"] = ("rl", {"without": others})
    for name, (policy, sections) in controls.items():
        add(
            done, report, judged, name, sections,
            out=files.join(where, name), policy=policy, overwrite=overwrite,
        )  # fmt: skip


def _run(settings: RunConfig, who: str, overwrite: bool) -> Run:
    def say(line: str) -> None:
        print(f"[{who}] {line}", file=sys.stderr, flush=True)

    return pipeline.run_stages(settings, stages_of(settings.method), overwrite=overwrite, say=say)


def _result(run: Run) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    return files.read_json(run.path("report", "report.json")), run.rows("evaluate")


def _show(report: dict[str, Any], folder: str, seconds: float) -> None:
    seeds = report["seeds"]
    over = f"mean of {len(seeds)} seeds" if len(seeds) > 1 else f"seed {seeds[0]}"
    print(f"\nConstitutional AI on Errand Town, held-out prompts, {over}; percent, with 95% intervals\n")
    print_table(plain_text.results_rows(report), head=True, plain=plain_text.results(report))
    if report["certificate"]:
        print(f"\n{plain_text.certificate(report['certificate'])}")
    print(f"\nhuman harmlessness labels: {report['human_harmlessness_labels']}\n")
    for number, item in enumerate(report["transcripts"], 1):
        print(plain_text.transcript(item, number), end="\n\n")
    print(f"report: {files.join(folder, 'index.html')}  ({seconds:.0f} s)", flush=True)
