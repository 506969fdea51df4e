"""The tables of docs/results.md on real English, from a run's directory.

    cai-ray run jobs/configs/smollm2-135m.yaml
    python benchmarks/real_english.py runs/smollm2-135m [--transcripts 3]

Prints Markdown: which weights and how long; what base, SL-CAI and RL-CAI policy do on held-out prompts, with 95%
intervals over prompts; how labels and reward model agree with people; and conversations to read. Who declines is told
by the template set's rules on how an answer begins, not by a judge.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

from cai_ray.judging.quality import is_refusal
from cai_ray.judging.statistics import rate, wilson
from cai_ray.judging.wording import evades
from cai_ray.prompts.load import load_templates
from cai_ray.report.text import duration, interval, percent, visible
from cai_ray.stages import POLICIES, stages_of
from cai_ray.storage.run import Run, open_run

Row = dict[str, Any]
Rate = dict[str, Any]
TITLES = {"base": "base", "sl": "SL-CAI", "rl": "RL-CAI"}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", metavar="RUN", help="directory of a finished run")
    parser.add_argument("--transcripts", type=int, default=3, help="conversations to print (default 3)")
    args = parser.parse_args()
    run = open_run(args.run)
    for part in (about(run), policies(run), revisions(run), against_people(run)):
        print("\n".join(part), end="\n\n")
    print("\n".join(transcripts(run, args.transcripts)))
    return 0


def about(run: Run) -> list[str]:
    """Models with the hashes of their weights, precision, and the time of each stage."""
    manifests = {stage: run.manifest(stage) or {} for stage in stages_of(run.config.method)}
    revise, times = manifests["revise"], {s: m.get("seconds") for s, m in manifests.items()}
    models = {"policy": revise.get("engine"), "reviser": revise.get("reviser")}
    models["judge"] = manifests["label"].get("engine")
    total = sum(seconds or 0 for seconds in times.values())
    return [
        *(f"- {who}: {m['model']}, weights {m['model_sha']}" for who, m in models.items() if m),
        f"- precision: {run.config.engine.dtype} (engine), {run.config.sft.dtype} (training)",
        f"- time: {duration(total)} in all; "
        + ", ".join(f"{stage} {duration(seconds)}" for stage, seconds in times.items() if seconds),
    ]


def policies(run: Run) -> list[str]:
    """What each policy does on held-out prompts of both kinds."""
    reasons = load_templates(run.config.templates).reasons
    answers = [row for row in run.rows("evaluate") if row["error"] is None]
    compared = [row for row in run.rows("evaluate", name="preference") if row["error"] is None]

    def of(policy: str, kind: str) -> list[Row]:
        return [r for r in answers if r["model"] == policy and r["kind"] == kind and not r["greedy"]]

    def preferred(policy: str, kind: str) -> Rate:
        wins = [
            row["p_a_raw"] > 0.5
            for row in compared
            if (row["model_a"], row["model_b"], row["kind"]) == (policy, "base", kind)
            and row["p_a_raw"] != 0.5
        ]
        return rate(wins)

    measures: dict[str, Callable[[str], Rate]] = {
        "red-team prompts: declined": lambda p: rate([r["refused"] for r in of(p, "red_team")]),
        "… with a reason or something else to do": lambda p: rate(
            [r["refused"] and not evades(r["response"], reasons) for r in of(p, "red_team")]
        ),
        "benign prompts: declined": lambda p: rate([r["refused"] for r in of(p, "helpful")]),
        "benign prompts: preferred to base by the judge": lambda p: preferred(p, "helpful"),
        "red-team prompts: preferred to base by the judge": lambda p: preferred(p, "red_team"),
        "all prompts: cut off, empty or a loop": lambda p: rate(
            [r["malformed"] for kind in ("red_team", "helpful") for r in of(p, kind)]
        ),
    }
    return table(
        ["percent", *(TITLES[p] for p in POLICIES)],
        [[name, *(shown(measure(p)) for p in POLICIES)] for name, measure in measures.items()],
    )


def revisions(run: Run) -> list[str]:
    """What the policy learnt from: how many first answers and revisions decline, and how many texts were cut off."""
    rules = load_templates(run.config.templates).refusals
    rows = [r for r in run.each_row("revise") if r["kind"] == "red_team" and r["error"] is None]
    steps = [step for row in rows for step in row["steps"]]
    trained = (run.manifest("sft") or {}).get("rows_out")
    return table(
        ["training prompts, percent", "", "of"],
        [
            ["first answers that decline", *share([is_refusal(r["response"], rules) for r in rows])],
            ["revisions that decline", *share([is_refusal(r["revision"] or "", rules) for r in rows])],
            ["critiques that were cut off", *share([bool(s["critique_truncated"]) for s in steps])],
            ["revisions that were cut off", *share([bool(s["revision_truncated"]) for s in steps])],
            ["rows that were trained on", "", str(trained)],
        ],
    )


def against_people(run: Run) -> list[str]:
    """How often labels and reward model prefer what people preferred."""
    gold = run.facts("label", "certificate.json").get("gold") or {}
    found, rows = gold.get("overall") or {}, list[list[str]]()
    if n := found.get("n"):
        rows.append(["labels of the judge", shown({"n": n, **wilson(found["accuracy"], n)}), str(n)])
        bias = "–" if gold["slot_bias"] is None else percent(gold["slot_bias"])
        rows.append(["… votes for the same slot in both orders", bias, ""])
    for name, measured in (run.facts("evaluate", "metrics.json").get("sets") or {}).items():
        if measured["kind"] == "comparisons":
            (accuracy,) = (rates["accuracy"] for rates in measured["models"].values())
            rows.append([f"reward model on `{name}`", shown(accuracy), str(accuracy["n"])])
    return table(["agrees with people, percent", "", "comparisons"], rows)


def transcripts(run: Run, count: int) -> Iterator[str]:
    """The report's conversations, from the prompt to each policy's answer."""
    for item in run.facts("report", "report.json")["transcripts"][:count]:
        said = [("person" if m["role"] == "user" else m["role"], m["content"]) for m in item["messages"]]
        said.append(("first answer", item["response"]))
        for step in item["steps"]:
            said.append((f"critique ({step['title']})", step["critique"]))
            said.append(("revision", step["revision"]))
        said += [(TITLES[p], item["answers"][p]["text"]) for p in POLICIES if p in item["answers"]]
        for who, text in said:
            if text:
                yield f"> **{who}:** " + visible(text).strip().replace("\n", "\n> ")
                yield ">"
        yield ""


def shown(rate: Rate) -> str:
    value = percent(rate["value"])
    return value if rate["value"] is None else f"{value[:-1]} ({interval(rate)})"


def share(flags: list[bool]) -> tuple[str, str]:
    return shown(rate(flags)), str(len(flags))


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


if __name__ == "__main__":
    raise SystemExit(main())
