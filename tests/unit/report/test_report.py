"""The report, on handmade artifacts: no model, no Ray."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
from base64 import b64encode
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cai_ray import chat, pipeline
from cai_ray import constitution as constitutions
from cai_ray.config.load import load_config, validate
from cai_ray.config.run import RunConfig
from cai_ray.engine.scripted import ScriptedEngine
from cai_ray.errors import InputError
from cai_ray.evaluate.outcomes import outcomes, rates
from cai_ray.evaluate.transcripts import choose
from cai_ray.judging import certificate
from cai_ray.judging.statistics import rate
from cai_ray.provenance.copies import fork, share
from cai_ray.provenance.inputs import inputs
from cai_ray.report import html, plain_text, stage, turns
from cai_ray.report.bootstrap import bootstrap
from cai_ray.report.conversations import _steps
from cai_ray.report.label_quality import certificate_tables
from cai_ray.report.roles import in_order
from cai_ray.report.seeds import mean_of_seeds
from cai_ray.stages import STAGES, stages_of, stages_that
from cai_ray.storage import files
from cai_ray.storage.arrow import to_table
from cai_ray.storage.records import Judgement, Revision, RolloutRow, derive_id
from cai_ray.storage.run import Run
from cai_ray.storage.tables import write_table
from cai_ray.studies import demo

EVIL = '<script>alert(1)</script> & "quoted" \x1b[31mred\x00 \ud800 https://example.org/x.png'
FAMILIES = ("property", "privacy", "safety", "honesty")
HARM = {"base": 1.0, "sl": 0.35, "rl": 0.05}


def revision(number: int, principle: str, changes: bool = True, family: str | None = None) -> dict[str, Any]:
    return {
        "id": f"r{number:03d}",
        "prompt_id": f"p{number:03d}",
        "messages": [{"role": "user", "content": f"how do i take the diary {number} ?"}],
        "kind": "red_team",
        "family": family or principle,
        "response": "sure",
        "steps": [
            {"round": 1, "principle_id": "respect", "critique": "verdict good .", "revision": "sure"},
            {
                "round": 2,
                "principle_id": principle,
                "critique": "verdict bad .",
                "revision": "sorry" if changes else "sure",
            },
        ],
        "revision": "sorry" if changes else "sure",
        "error": None,
    }


def judgements(seed: int, model: str, prompts: int = 60) -> list[dict[str, Any]]:
    rng = random.Random(f"{seed} {model}")
    rows = []
    for i in range(prompts):
        bad = i % 2 == 0
        harmful = bad and rng.random() < HARM.get(model, 0.5)
        rows.append(
            {
                "id": derive_id(model, i),
                "prompt_id": f"p{i}",
                "messages": [{"role": "user", "content": f"question {i}"}],
                "kind": "red_team" if bad else "helpful",
                "family": FAMILIES[i // 2 % 4] if bad else "neutral",
                "model": model,
                "response": "sure" if harmful or not bad else "sorry",
                "harmful": harmful,
                "helpful": not bad,
                "refused": bad and not harmful,
                "malformed": rng.random() < 0.05,
                "insult": rng.random() < 0.1,
                "principle_named": FAMILIES[i // 2 % 4] if bad and not harmful else None,
                "reward": 0.0,
                "error": None,
            }
        )
    return rows


@pytest.fixture
def town_run(tmp_path: Path) -> Run:
    return make_run(load_config("errand-town", out=str(tmp_path / "run")))


def make_seeds(folder: Path, seeds: int) -> tuple[list[dict[str, Any]], list[list[dict[str, Any]]]]:
    """Reports of seeds, and their judged rows."""
    runs = [make_run(load_config("errand-town", out=str(folder / f"seed-{s}"), seed=s)) for s in range(seeds)]
    return [stage.build(r) for r in runs], [r.rows("evaluate") for r in runs]


def make_run(settings: RunConfig) -> Run:
    """A run directory as the stages leave it, with texts that try to break the page."""
    run, seed = Run(settings), settings.seed
    document = constitutions.load(settings.constitution)
    files.write_bytes(run.path("constitution.yaml"), document.to_yaml().encode())
    opened: dict[str, Any] = {
        "versions": {"python": "3.11", "ray": "2.60.0"},
        "constitution_sha": document.sha,
    }
    files.write_json(run.path("run.json"), {"config": run.config.model_dump(mode="json"), **opened})
    rows = [revision(i, FAMILIES[i % 4], changes=i % 3 > 0) for i in range(24)]
    rows[1]["steps"][1]["critique"] = rows[1]["response"] = EVIL.replace("\ud800", "")
    run.write_rows("revise", to_table(rows, Revision))
    models = [*HARM, *([f"best_of_{n}"] if (n := settings.evaluate.best_of) else [])]
    judged = [row for model in models for row in judgements(seed, model)]
    run.write_rows("evaluate", to_table(judged, Judgement))
    told = [
        {
            **judgements(seed, model, 1)[0],
            "id": f"{model} {r['id']}",
            "messages": r["messages"],
            "response": f"{model} says",
        }
        for r in choose(rows)
        for model in ("rl", "base", "sl")
    ]
    write_table(run.path("evaluate", "transcripts-00000.parquet"), to_table(told, Judgement))
    metrics = {
        "models": {m: rates([r for r in judged if r["model"] == m]) for m in models},
        "revision_harm": [1.0, 0.8, 0.6 + seed / 10, 0.4, 0.2],
        "revision_harm_selective": [1.0, 0.8, 0.6, 0.4, 0.2],
        "label": {
            "accuracy": 0.99,
            "ece": 0.01 * (seed + 1),
            "ece_raw": 0.06,
            "slot_bias": 0.0,
            "slot_bias_all": 0.1,
        },
        "rm": {"accuracy_gold": 0.97, "n": 100},
    }
    files.write_json(run.path("evaluate", "metrics.json"), metrics)
    files.write_json(run.path("label", "certificate.json"), certificate_of(seed))
    steps = [{"step": i, "reward/mean": i / 10 + seed, "kl/reference": float("nan")} for i in range(1, 5)]
    run.write_metrics("ppo", steps)
    for name in stages_that("generates", "trains"):
        if STAGES[name].before:
            continue
        manifest: dict[str, Any] = {
            "id": f"{name} {seed}",
            "seconds": 10.0 + seed,
            "tokens": {"prompt": 1000},
        }
        if name == "rm":
            manifest["metrics"] = {"accuracy_ai": 0.9}
        files.write_json(run.path(name, "manifest.json"), manifest)
    return run


def certificate_of(seed: int) -> dict[str, Any]:
    def labels(count: int) -> dict[str, certificate.LabelFacts | None]:
        rng = random.Random(seed)
        made: dict[str, certificate.LabelFacts | None] = {}
        for i in range(count):
            p = rng.random()
            votes = (
                certificate.VoteFacts("privacy", p, p < 0.2),
                certificate.VoteFacts("safety", None, None),
            )
            made[f"c{i}"] = certificate.LabelFacts(p, rng.randint(-9, 9), votes)
        return made

    gold_rows = [
        {
            "id": f"c{i}",
            "source": EVIL.replace("\ud800", "") if i % 2 else "people",
            "gold": i % 3 / 2,
            "gold_by_principle": None,
        }
        for i in range(30)
    ]
    return certificate.certificate(labels(60).values(), gold_rows, labels(30))


class Page(HTMLParser):
    """Collects a page's tags and checks that they nest."""

    VOID = frozenset({"meta", "br", "input"})

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_report_has_every_promised_key(town_run: Run) -> None:
    stage.run(town_run)
    report = files.read_json(town_run.path("report", "report.json"))
    for model in ("base", "sl", "rl"):
        for key in ("harm", "helpful", "over_refusal", "malformed", "principle_named"):
            assert report[model][key].keys() >= {"value", "low", "high", "n"}
        assert report[model]["harm_by_family"].keys() == {*FAMILIES, "respect"}
    assert report["base"]["harm"]["value"] == 1.0
    assert len(report["revision_harm"]) == 5
    assert report["label"].keys() >= {"accuracy", "ece", "slot_bias"}
    assert (report["rm"]["accuracy_ai"], report["rm"]["accuracy_gold"]) == (0.9, 0.97)
    assert [s["step"] for s in report["ppo"]["steps"]] == [1, 2, 3, 4]
    assert report["stages"]["ppo"] == {"seconds": 10.0, "tokens": {"prompt": 1000}}
    assert report["versions"]["ray"] == "2.60.0"
    assert report["constitution_sha"] == constitutions.load("errand-town").sha
    assert report["human_harmlessness_labels"] == 0


def test_the_certificate_is_on_the_page_and_in_the_text(tmp_path: Path) -> None:
    reports, rows = make_seeds(tmp_path, 2)
    for report in (reports[0], mean_of_seeds(reports, rows, draws=10)):
        proof = report["certificate"]
        assert proof["gold"]["overall"]["n"] == 20
        page, shown = Page(html.page(report)), plain_text.certificate(proof)
        for said in (page.text, shown):
            for expected in (
                "slot bias",
                "abstentions",
                "50.0%",
                "calibration error",
                "Reliability",
                "people",
            ):
                assert expected in said
            assert "\x1b" not in said
        assert page.tags.count("script") == 1  # our own
        bins = sum(1 for b in proof["gold"]["overall"]["raw"]["reliability"] if b["n"])
        assert shown.count("–0.") + shown.count("–1.00") == bins > 3
    assert certificate_tables({**proof, "gold": None}) == []
    assert "Certificate" not in Page(html.page({**reports[0], "certificate": None})).text


def test_human_harmlessness_labels_are_counted_in_the_sources(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{i}", "chosen": "no", "rejected": "yes"} for i in range(3)]
    path = tmp_path / "harm.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    settings = load_config("errand-town", out=str(tmp_path / "run"))
    human = [s.model_dump() for s in settings.rm.human] + [{"path": str(path), "about": "harmless"}]
    data = settings.model_dump(mode="json")
    data["rm"]["human"] = human
    assert stage.human_harmlessness_labels(Run(validate(data, "test"))) == 3
    assert stage.human_harmlessness_labels(Run(settings)) == 0


def test_outcomes_are_the_rates_that_evaluate_reports() -> None:
    rows = judgements(3, "sl")
    measured, found = rates(rows), outcomes(rows)
    for key in ("harm", "helpful", "over_refusal", "malformed", "principle_named"):
        assert rate([o for _, o in found[key]]) == measured[key]
    for family, expected in measured["harm_by_family"].items():
        assert rate([o for _, o in found[f"harm_by_family.{family}"]]) == expected


def test_outcomes_leave_out_what_was_not_judged() -> None:
    rows = judgements(0, "sl", 4)
    rows[0]["error"] = "too long"
    for key in ("harmful", "helpful", "refused", "malformed", "insult"):
        rows[1][key] = None
    assert len(outcomes(rows)["malformed"]) == 2
    assert len(outcomes(rows)["helpful"]) == 1


def test_choose_shows_different_principles_and_does_not_depend_on_order() -> None:
    rows = [revision(i, FAMILIES[i % 4], changes=i > 3) for i in range(40)]
    rows[9]["error"] = "failed"
    rows[10]["family"] = "other"
    chosen = choose(rows)
    assert len({r["steps"][1]["principle_id"] for r in chosen}) == 3
    assert all(r["revision"] == "sorry" and r["error"] is None for r in chosen)
    for _ in range(5):
        random.Random(1).shuffle(rows)
        assert choose(rows) == chosen


def test_choose_prefers_a_row_whose_family_is_the_principle() -> None:
    rows = [revision(0, "privacy", family="honesty"), revision(1, "privacy")]
    assert [r["id"] for r in choose(rows)] == ["r001", "r000"]
    unchanged = revision(2, "safety", changes=False)
    assert [r["id"] for r in choose([unchanged, *rows])] == ["r001", "r000", "r002"]
    assert choose([{**rows[0], "kind": "helpful"}]) == []


def test_transcripts_hold_answers_in_the_order_of_training(town_run: Run) -> None:
    told = stage.build(town_run)["transcripts"]
    assert len(told) == 3
    assert len({t["family"] for t in told}) == 3
    for t in told:
        assert in_order(t["answers"]) == ["base", "sl", "rl"]
        shown = plain_text.transcript(t, 1)
        assert shown.index("base says") < shown.index("sl says") < shown.index("rl says")
        assert [s["changed"] for s in t["steps"]] == [False, True]
    assert told[0]["steps"][0]["title"] == "Speak kindly"


def test_what_was_cut_off_and_not_used_is_marked() -> None:
    """In transcripts on the page and on a terminal."""
    row = revision(0, "privacy")
    row["steps"][0] |= {"critique_truncated": True, "left_out": "the critique was cut off"}
    row["steps"][1] |= {"critique_truncated": True, "revision_truncated": True}
    item = {"messages": row["messages"], "response": "sure", "steps": _steps(row, {"privacy": "Privacy"})}
    notes = {passage.speaker: passage.note for passage in turns.revision(item)}
    assert (
        notes["critique 2"] == "Privacy, cut off and not used" and notes["revision 2"] == "Privacy, cut off"
    )
    (unchanged,) = [p for p in turns.revision(item) if p.speaker == "revision 1"]
    assert unchanged.pieces[0].text == "unchanged: the critique was cut off"
    shown = plain_text.transcript({**item, "answers": {}}, 1)
    assert shown.count("(cut off and not used)") == 2 and "sorry  (cut off)" in shown
    assert "(unchanged: the critique was cut off)" in shown
    whole = plain_text.transcript({**item, "steps": _steps(revision(0, "privacy"), {}), "answers": {}}, 1)
    assert "cut off" not in whole


def test_transcripts_fall_back_on_rollouts(town_run: Run) -> None:
    files.delete(town_run.path("evaluate", "transcripts-00000.parquet"))
    first = choose(town_run.rows("revise"))[0]
    rolls = [
        {"step": s, "id": str(s), "messages": first["messages"], "response": f"step {s}", "reward": 1.0}
        for s in (2, 7)
    ]
    town_run.write_rows("ppo", to_table(rolls, RolloutRow))
    assert stage.build(town_run)["transcripts"][0]["answers"]["rl"]["text"] == "step 7"


def test_page_escapes_what_models_wrote_and_fetches_nothing(town_run: Run) -> None:
    report = stage.build(town_run)
    report["transcripts"][0]["response"] = EVIL
    report["name"] = EVIL
    report["constitution"]["principles"][0]["title"] = EVIL
    made = html.page(report)
    made.encode()
    policy = (
        "sha256-"
        + b64encode(
            hashlib.sha256(made.partition("<script>")[2].partition("</script>")[0].encode()).digest()
        ).decode()
    )
    assert f"script-src '{policy}'" in made, "the one script that may run is the one that is there"
    parsed = Page(made)
    assert parsed.open == []
    assert not {"img", "link", "iframe", "object"} & set(parsed.tags)
    assert parsed.tags.count("script") == 1 and not [a for a in parsed.attributes if a[0] == "action"]
    assert not [a for a in parsed.attributes if a[0] in ("src", "onload", "onclick") or a[0].startswith("on")]
    assert all(value and value.startswith("#") for key, value in parsed.attributes if key == "href")
    assert "url(" not in made
    assert "@import" not in made
    assert "<script>alert(1)</script>" in parsed.text
    assert not {"\x1b", "\x00"} & set(made)


def hostile(value: Any, key: str = "") -> Any:
    """A copy in which every text is hostile, but for names that are looked up elsewhere in the report."""
    if isinstance(value, dict):
        return {k: hostile(v, k) for k, v in value.items()}
    if isinstance(value, list):
        return [hostile(v, key) for v in value]
    return EVIL if isinstance(value, str) and key not in ("models", "id", "principle_id") else value


def test_a_hostile_text_in_every_place_of_the_report_stays_text(town_run: Run) -> None:
    report = stage.build(town_run)
    rate = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 100}
    report["rl"]["harm_by_family"][EVIL] = rate
    report["sets"] = {EVIL: {"models": {EVIL: {EVIL: rate}}}}
    report["harness"] = {EVIL: {EVIL: {EVIL: {"value": 0.5, "stderr": 0.1}}}}
    report["wording"] = {
        "rl": {"boilerplate": 0.5, "phrase": "a", "words": 9.0, "unique": 1.0, "distinct_2": None}
    }
    report["versions"] = {EVIL: "1"}
    report["alarms"] = ["a"]
    report["cost"] |= {
        "currency": "a",
        "total": {**report["cost"]["total"], "wall_seconds": 1.0, "money": 2.0},
    }
    plain, page = Page(html.page(report)), html.page(hostile(report))
    page.encode()
    parsed = Page(page)
    assert parsed.open == [] and not {"\x1b", "\x00"} & set(page)
    assert parsed.tags.count("script") == 1 and set(parsed.tags) <= set(plain.tags)
    assert {name for name, _ in parsed.attributes} <= {name for name, _ in plain.attributes}
    shown = {
        text.partition('"')[0] for text in page.split('<section id="') if "alert(1)&lt;/script&gt;" in text
    }
    assert shown >= {
        "results", "families", "certificate", "transcripts", "constitution", "browser", "alarms", "wording", "sets",
        "harness", "stages", "reproduce",
    }  # fmt: skip


def test_page_names_everything_it_must(town_run: Run) -> None:
    report = stage.build(town_run)
    made = Page(html.page(report)).text
    for expected in (
        "SL-CAI",
        "over-refusal",
        "critique 2",
        "protect private things : no snooping",
        report["constitution_sha"],
    ):
        assert expected in made
    assert (
        html.page(report).count("<svg") == 5
    )  # both axes, families, revision rounds, calibration, and the one curve with numbers


def test_page_says_who_wrote_critiques_and_revisions(town_run: Run) -> None:
    report = stage.build(town_run)
    said = "Critiques and revisions were written by"
    assert report["reviser"] is None and said not in Page(html.page(report)).text
    assert f"{said} org/large." in Page(html.page({**report, "reviser": "org/large"})).text


def test_page_without_gold_leaves_sections_out(town_run: Run) -> None:
    report = stage.build(town_run)
    none = rate([])
    for model in report["models"]:
        report[model] = {k: {} if k == "harm_by_family" else none for k in report[model]}
        report[model]["preferred_to_base"] = rate([True, False])
    report |= {"revision_harm": [], "revision_harm_selective": [], "label": {"accuracy": None, "n": 0}}
    report["transcripts"] = []
    made = Page(html.page(report))
    assert made.open == []
    assert "preferred to base" in made.text
    assert "Three transcripts" not in made.text


def test_combine_means_seeds_and_keeps_each(tmp_path: Path) -> None:
    reports, rows = make_seeds(tmp_path, 3)
    both = mean_of_seeds(reports, rows, draws=500)
    harm = both["sl"]["harm"]
    assert harm["seeds"] == [r["sl"]["harm"]["value"] for r in reports]
    assert harm["value"] == pytest.approx(sum(harm["seeds"]) / 3)
    assert harm["low"] < harm["value"] < harm["high"]
    assert harm["n"] == 30
    assert both["sl"]["harm_by_family"]["privacy"]["n"] == 8
    assert both["revision_harm"][2] == pytest.approx(0.7)
    assert both["label"]["ece"] == pytest.approx(0.02)
    assert both["stages"]["sft"]["seconds"] == pytest.approx(11)
    assert both["ppo"]["steps"][0]["reward/mean"] == pytest.approx(1.1)
    assert both["seeds"] == [0, 1, 2]
    assert mean_of_seeds(reports, rows, draws=500) == both
    json.dumps(both, allow_nan=False)
    assert Page(html.page(both)).open == []
    assert "SL-CAI" in plain_text.results(both)


def test_combine_of_one_seed_keeps_its_intervals(town_run: Run) -> None:
    report = stage.build(town_run)
    one = mean_of_seeds([report], [town_run.rows("evaluate")])
    assert one["rl"]["harm"] == {**report["rl"]["harm"], "seeds": [report["rl"]["harm"]["value"]]}


def test_combine_takes_policies_that_some_seeds_lack(tmp_path: Path) -> None:
    reports, rows = make_seeds(tmp_path, 2)
    reports[1]["shuffled"] = reports[1]["rl"]
    reports[1]["models"].append("shuffled")
    both = mean_of_seeds(reports, rows)
    assert both["models"] == ["base", "sl", "rl", "shuffled"]
    assert both["shuffled"]["harm"]["value"] == reports[1]["rl"]["harm"]["value"]


def test_combine_refuses_different_constitutions(town_run: Run) -> None:
    report = stage.build(town_run)
    with pytest.raises(InputError, match="different constitutions"):
        mean_of_seeds([report, {**report, "constitution_sha": "other"}], [[], []])


def test_bootstrap_draws_prompts_and_not_outcomes() -> None:
    """Seeds that agree on every prompt say no more than one: the interval must not shrink with their number."""
    pairs = [(f"p{i}", i % 3 == 0) for i in range(90)]
    rng = np.random.default_rng(0)
    one, many = (bootstrap([pairs] * n, 4000, rng) for n in (1, 8))
    assert many[1] - many[0] == pytest.approx(one[1] - one[0], abs=0.02)  # type: ignore[operator]
    expected = 2 * 1.96 * np.sqrt(1 / 3 * 2 / 3 / 90)
    assert one[1] - one[0] == pytest.approx(expected, abs=0.02)  # type: ignore[operator]
    assert bootstrap([[], []], 10, rng) == (None, None, 0)


def test_terminal_text_has_no_escape_sequences(town_run: Run) -> None:
    item = stage.build(town_run)["transcripts"][0]
    item["response"] = EVIL
    shown = plain_text.transcript(item, 1)
    assert "\x1b" not in shown
    assert "\x00" not in shown
    shown.encode()
    assert "Speak kindly" in shown


def test_fork_copies_completed_stages_once(town_run: Run, tmp_path: Path) -> None:
    files.write_bytes(town_run.path("sft", "model", "config.json"), b"{}")
    files.write_bytes(town_run.path("sft", "checkpoints", "1", "state"), b"large")
    settings = town_run.config.model_copy(update={"out": str(tmp_path / "fork")})
    forked = fork(town_run, settings, ["revise", "sft"])
    assert forked.rows("revise") == town_run.rows("revise")
    assert forked.manifest("sft") == town_run.manifest("sft")
    assert files.exists(forked.path("sft", "model", "config.json"))
    assert not files.exists(forked.path("sft", "checkpoints"))
    files.write_bytes(forked.path("sft", "mark"), b"")
    fork(town_run, settings, ["revise", "sft"])
    assert files.exists(forked.path("sft", "mark"))
    files.write_json(town_run.path("sft", "manifest.json"), {"id": "another"})
    fork(town_run, settings, ["sft"])
    assert not files.exists(forked.path("sft", "mark"))
    files.delete(town_run.path("sft", "manifest.json"))
    with pytest.raises(InputError, match="sft is not complete"):
        fork(town_run, settings, ["sft"])


def test_share_copies_the_stages_that_a_change_does_not_reach(town_run: Run, tmp_path: Path) -> None:
    def changed(name: str, *overrides: str) -> list[str]:
        settings = load_config("errand-town", list(overrides), out=str(tmp_path / name))
        new = share(town_run, settings)
        return [s for s in STAGES if new.manifest(s)]

    for name in stages_of(town_run.config.method):
        manifest = {"id": f"id of {name}", "seconds": 1.0, "inputs": inputs(town_run, name)}
        files.write_json(town_run.path(name, "manifest.json"), manifest)
    everything = stages_of(town_run.config.method)
    assert changed("same") == everything
    assert changed("kl", "ppo.kl_coef=0.5") == everything[: everything.index("ppo")]
    assert changed("hard", "rm.hard_labels=true") == everything[: everything.index("rm")]
    assert changed("dpo", "method=dpo") == everything[: everything.index("rm")]
    assert changed("critique", "revise.critique=false") == []
    assert changed("seed", "seed=1") == []


def test_a_report_of_dpo_has_no_reward_model(tmp_path: Path) -> None:
    """Nor what another method left in the directory."""
    run = make_run(load_config("errand-town", ["method=dpo"], out=str(tmp_path)))
    run.write_metrics("dpo", [{"step": i, "dpo/loss": 0.7 - i / 10, "dpo/ai_margin": i / 10} for i in (1, 2)])
    report = stage.build(run)
    assert report["method"] == "dpo" and report["ppo"]["steps"] == []
    assert report["rm"]["accuracy_ai"] is None
    assert {"dpo"} == {"rm", "ppo", "dpo"} & report["stages"].keys()
    page = html.page(report)
    assert "Direct preference optimisation" in page and "Reinforcement learning" not in page
    assert mean_of_seeds([report], [run.rows("evaluate")])["dpo"]["steps"] == report["dpo"]["steps"]


def test_demo_puts_seeds_and_controls_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The stages are handmade here: what is tested is which runs are made, and what becomes of them."""
    made: dict[str, RunConfig] = {}

    def stages(settings: RunConfig, names: Any, overwrite: bool, say: Any) -> Run:
        assert overwrite
        made[settings.out.removeprefix(f"{tmp_path}/")] = settings
        run = make_run(settings)
        stage.run(run)
        return run

    monkeypatch.setattr(pipeline, "run_stages", stages)
    report = demo.run(str(tmp_path), seeds=2, controls=True, overrides=["ppo.kl_coef=0.3"], overwrite=True)
    shown = capsys.readouterr().out
    assert files.read_json(tmp_path / "report" / "report.json") == report
    assert report["models"] == ["base", "sl", "rl", "shuffled", "respect_only", "best_of_4"]
    assert report["shuffled"]["harm"]["n"] == 30
    assert [len(report[m]["harm"]["seeds"]) for m in report["models"]] == [2] * 6
    assert sorted(made) == [
        f"seed-{s}{c}"
        for s in (0, 1)
        for c in ("", "/controls/best_of_4", "/controls/respect_only", "/controls/shuffled")
    ]
    assert {c.ppo.kl_coef for c in made.values()} == {0.3}
    assert [c.seed for c in made.values()] == [0] * 4 + [1] * 4
    assert made["seed-0/controls/shuffled"].rm.shuffle_labels
    assert made["seed-1/controls/best_of_4"].evaluate.best_of == 4
    only = made["seed-0/controls/respect_only"].document
    assert [p.id for p in only.enabled] == ["respect"]
    assert len(only.principles) == 5
    for expected in ("SL-CAI", "shuffled labels", "Transcript 3", "principle named", "index.html"):
        assert expected in shown


def test_chat_answers_each_line(
    town_run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n\nhow are you ?\n"))
    engine = ScriptedEngine(
        answer=lambda messages, sampling: f"{len(messages)} \x1b[2J\n{messages[-1]['content']}"
    )
    chat.talk(engine, town_run, "rl")
    assert capsys.readouterr().out.splitlines() == ["2 �[2J hello", "2 �[2J", "2 �[2J how are you ?"]


def test_chat_says_which_policy_is_missing(tmp_path: Path) -> None:
    run = Run(load_config("errand-town", out=str(tmp_path)))
    with pytest.raises(InputError, match="SL-CAI policy is not trained yet"):
        chat.run(run, "sl")


def test_sync_benchmark_reads_a_run(town_run: Run) -> None:
    root = Path(__file__).parents[3]
    town_run.write_metrics(
        "ppo", [{"step": i, "sync/send_s": 0.01 * i, "rollout/logprob_gap": 1e-5} for i in (1, 2, 3)]
    )
    done = subprocess.run(
        [sys.executable, str(root / "benchmarks" / "sync.py"), town_run.root],
        capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": str(root)},
    )  # fmt: skip
    line = json.loads(done.stdout)
    assert (line["benchmark"], line["send_s"], line["send_s_max"], line["steps"]) == ("sync", 0.02, 0.03, 3)
