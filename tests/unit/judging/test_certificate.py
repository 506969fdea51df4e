"""The labels' certificate and its gates, against plain loops: docs/method.md items 5 and 6."""

import json
import random
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from cai_ray import cli, pipeline
from cai_ray.config.generation import LabelGates
from cai_ray.config.load import load_config
from cai_ray.data.gold_comparisons import read_gold_comparisons
from cai_ray.errors import EXIT_STOPPED, InputError, Stopped
from cai_ray.judging import certificate
from cai_ray.judging.calibration import measure_calibration, reliability
from cai_ray.judging.certificate import Agreement, LabelFacts, LengthBias, VoteFacts, VoteTally
from cai_ray.judging.gates import failed_gates
from cai_ray.stages import STAGES, Stage
from cai_ray.storage import files
from cai_ray.storage.arrow import to_table
from cai_ray.storage.records import Label
from cai_ray.storage.run import Run

PRINCIPLES = ("honesty", "privacy", "safety")


def drawn(n: int, seed: int = 0) -> dict[str, LabelFacts | None]:
    rng = random.Random(seed)
    found: dict[str, LabelFacts | None] = {}
    for i in range(n):
        votes = tuple(
            VoteFacts(p, None, None) if rng.random() < 0.1 else VoteFacts(p, rng.random(), rng.random() < 0.3)
            for p in PRINCIPLES
        )
        found[f"c{i:03d}"] = LabelFacts(rng.random(), rng.randint(-5, 5), votes)
    return found


def counted(measure: Any, given: Iterable[Any]) -> Any:
    for one in given:
        measure.add(one)
    return measure


def gold_of(labels: dict[str, LabelFacts | None], seed: int = 1) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    return [
        {
            "id": id_,
            "source": rng.choice(["people", "judge"]),
            "gold": rng.choice([0.0, 0.5, 1.0]),
            "gold_by_principle": {p: rng.choice([0.0, 0.5, 1.0]) for p in PRINCIPLES},
        }
        for id_ in labels
    ]


def test_item_05_slot_bias_is_over_the_votes_that_were_swapped() -> None:
    votes = [
        VoteFacts("a", 0.9, False),
        VoteFacts("a", 0.5, True),
        VoteFacts("b", 0.6, None),
        VoteFacts("b", None, None),
    ]
    assert counted(VoteTally(), votes).slot_bias == 0.5
    assert VoteTally().slot_bias is None
    found = certificate.certificate([LabelFacts(0.9, 3, tuple(votes))])
    assert found["slot_bias"] == found["principles"]["a"]["slot_bias"] == 0.5
    assert found["principles"]["b"] == {
        "votes": 2, "slot_bias": None, "ties": 0.0, "abstentions": 0.5,
    }  # fmt: skip


def test_item_05_slot_bias_is_over_decisive_votes_where_gold_is_given() -> None:
    """A principle that has no preference on a pair may lean to a slot: on decided pairs it must not."""
    votes = (VoteFacts("privacy", 0.9, False), VoteFacts("safety", 0.5, True))
    row = {"id": "x", "source": "s", "gold": 1.0, "gold_by_principle": {"privacy": 1.0, "safety": 0.5}}
    label_ = {"x": LabelFacts(0.9, 3, votes)}
    assert certificate.certificate(label_.values())["slot_bias"] == 0.5
    assert certificate.against_gold([row], label_)["slot_bias"] == 0.0
    assert certificate.against_gold([{**row, "gold_by_principle": None}], label_)["slot_bias"] == 0.5


def test_agreement_is_over_comparisons_on_which_both_prefer_one() -> None:
    labels = drawn(80)
    rows = [x for x in labels.values() if x]
    found = counted(Agreement(), rows).summary()
    means = []
    for i, a in enumerate(PRINCIPLES):
        for b in PRINCIPLES[i + 1 :]:
            same = n = 0
            for row in rows:
                p, q = (next(v.p for v in row.votes if v.principle == x) for x in (a, b))
                if p is not None and q is not None and abs(p - 0.5) > 0.05 and abs(q - 0.5) > 0.05:
                    n += 1
                    same += (p > 0.5) == (q > 0.5)
            assert found["pairs"][a][b] == {"agreement": pytest.approx(same / n), "n": n}
            means.append(same / n)
    assert found["mean"] == pytest.approx(sum(means) / 3)
    assert Agreement().summary() == {"mean": None, "pairs": {}}


def test_length_bias_of_a_labeller_that_likes_length() -> None:
    longer = [LabelFacts(0.5 + n / 20, n, ()) for n in (-8, -4, 2, 6)]
    found = counted(LengthBias(), longer).summary()
    assert found == {"longer_preferred": 1.0, "correlation": pytest.approx(1.0), "n": 4}
    tie, same_length = LabelFacts(0.52, 9, ()), LabelFacts(0.9, 0, ())
    assert counted(LengthBias(), [tie, same_length]).summary() == {
        "longer_preferred": None, "correlation": None, "n": 0,
    }  # fmt: skip
    rows = [x for x in drawn(200).values() if x]
    found = counted(LengthBias(), rows).summary()
    kept = [(r.p, r.longer) for r in rows if r.longer != 0 and abs(r.p - 0.5) > 0.05]
    mean_p, mean_n = (sum(c) / len(kept) for c in zip(*kept, strict=True))
    cov = sum((p - mean_p) * (n - mean_n) for p, n in kept)
    spread = (sum((p - mean_p) ** 2 for p, _ in kept) * sum((n - mean_n) ** 2 for _, n in kept)) ** 0.5
    assert found["correlation"] == pytest.approx(cov / spread)
    assert found["longer_preferred"] == pytest.approx(sum((p > 0.5) == (n > 0) for p, n in kept) / len(kept))


def test_quality_against_a_plain_loop() -> None:
    rng = random.Random(3)
    pairs = [(rng.random(), rng.random() < 0.6) for _ in range(300)]
    found = measure_calibration(pairs, scale=2.0)
    assert found["n"] == 300
    assert found["accuracy"] == pytest.approx(sum((p > 0.5) == y for p, y in pairs) / 300)
    squared = [p * p / (p * p + (1 - p) * (1 - p)) for p, _ in pairs]  # log-odds doubled
    for name, probabilities in (("raw", [p for p, _ in pairs]), ("scaled", squared)):
        both = list(zip(probabilities, [y for _, y in pairs], strict=True))
        assert found[name]["brier"] == pytest.approx(sum((p - y) ** 2 for p, y in both) / 300)
        ece = 0.0
        for i, row in enumerate(found[name]["reliability"]):
            low, high = 0.5 + i * 0.05, 0.55 + i * 0.05
            cell = [(max(p, 1 - p), (p > 0.5) == y) for p, y in both if low <= max(p, 1 - p) < high]
            assert row["n"] == len(cell) and row["low"] == pytest.approx(low)
            if cell:
                confidence, right = sum(c for c, _ in cell) / len(cell), sum(r for _, r in cell) / len(cell)
                assert (row["probability"], row["share"]) == pytest.approx((confidence, right))
                ece += len(cell) / 300 * abs(confidence - right)
        assert found[name]["ece"] == pytest.approx(ece)
    assert measure_calibration([]) == {"n": 0, "accuracy": None, "raw": None, "scaled": None}


def test_item_01_the_order_of_the_responses_does_not_matter_to_the_quality() -> None:
    """Ties included: what is exactly one half is half right, whichever response is the better one."""
    pairs = [(0.5, True), (0.5, False), (0.5, False), (0.8, True), (0.3, True)]
    swapped = [(1 - p, not y) for p, y in pairs]
    assert measure_calibration(pairs)["accuracy"] == measure_calibration(swapped)["accuracy"] == 2.5 / 5
    assert measure_calibration(pairs)["raw"]["ece"] == pytest.approx(
        measure_calibration(swapped)["raw"]["ece"]
    )
    assert reliability([0.5], [False])[0]["share"] == 0.5


def test_gold_by_principle_and_by_source() -> None:
    labels = drawn(60)
    labels["c000"] = None
    gold = gold_of(labels)
    found = certificate.against_gold(gold, labels)
    assert (found["comparisons"], found["errors"]) == (60, 1)
    decided = [(labels[g["id"]], g) for g in gold[1:] if g["gold"] != 0.5]
    assert found["overall"]["n"] == len(decided) == sum(q["n"] for q in found["by_source"].values())
    for source, quality in found["by_source"].items():
        own = [(x.p > 0.5) == (g["gold"] == 1) for x, g in decided if x and g["source"] == source]
        assert quality["accuracy"] == pytest.approx(sum(own) / len(own))
    for i, principle in enumerate(PRINCIPLES):
        own = []
        for g in gold[1:]:
            row = labels[g["id"]]
            vote, known = row and row.votes[i], g["gold_by_principle"][principle]
            if vote and vote.p is not None and known != 0.5:
                own.append((vote.p > 0.5) == (known == 1))
        assert found["by_principle"][principle]["n"] == len(own)
        assert found["by_principle"][principle]["accuracy"] == pytest.approx(sum(own) / len(own))
    assert found["scale"] > 0
    unnamed = [{**g, "gold_by_principle": None} for g in gold]
    assert certificate.against_gold(unnamed, labels)["by_principle"] == {}


def test_ties_errors_and_equal_responses_are_counted_apart() -> None:
    def row(id_: str, p: float | None, votes: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        return {"id": id_, "response_a": "aa", "response_b": "b", "p_a_raw": p, "votes": votes, **more}

    vote = {"principle_id": "x", "logprob_a": -1.0, "logprob_b": -2.0, "p_a": 0.7}
    swapped = {**vote, "logprob_a_swapped": -1.0, "logprob_b_swapped": -2.0}
    abstained = {"principle_id": "y"}
    rows = [
        row("1", 0.7, [swapped, abstained]),
        row("2", 0.53, [vote]),
        row("3", 0.5, []),
        row("4", None, [], error="too long"),
    ]
    found = certificate.certificate(label for _, label in certificate.read([to_table(rows, Label)]))
    keys = ("labels", "equal_responses", "errors", "votes", "slot_bias", "ties", "gold")
    assert [found[k] for k in keys] == [2, 1, 1, 3, 0.0, 0.5, None]
    assert found["abstentions"] == pytest.approx(1 / 3)
    empty = certificate.certificate([])
    assert empty["ties"] is None and empty["slot_bias"] is None
    json.dumps([found, empty], allow_nan=False)


def test_gates_say_which_and_by_how_much() -> None:
    raw = {"ece": 0.12, "brier": 0.2, "reliability": []}
    proof = {"slot_bias": 0.3, "gold": {"overall": {"accuracy": 0.8, "raw": raw, "scaled": {"ece": 0.0}}}}
    assert failed_gates(proof, LabelGates()) == []
    assert failed_gates(proof, LabelGates(max_slot_bias=0.3, max_ece=0.12, min_accuracy=0.8)) == []
    assert failed_gates(proof, LabelGates(max_slot_bias=0.25, max_ece=0.1, min_accuracy=0.9)) == [
        "label.gates.max_slot_bias=0.25: slot bias is 0.3, 0.05 above",
        "label.gates.max_ece=0.1: ece is 0.12, 0.02 above",
        "label.gates.min_accuracy=0.9: accuracy is 0.8, 0.1 below",
    ]
    nothing = {"slot_bias": None, "gold": None}
    assert failed_gates(nothing, LabelGates(max_slot_bias=1.0)) == [
        "label.gates.max_slot_bias=1: nothing was measured"
    ]


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["label.gold=null", "label.gates.min_accuracy=0.9"], "min_accuracy=0.9 needs gold comparisons"),
        (["label.gold=null", "label.gates.max_ece=0.1"], "max_ece=0.1 needs gold comparisons"),
        (
            ["label.judge.both_orders=false", "label.gates.max_slot_bias=0.1"],
            "max_slot_bias=0.1 needs both orders",
        ),
        (["label.gates.max_ece=1.5"], "less than or equal to 1"),
        (["label.gates.max_bias=0.5"], "did you mean 'max_slot_bias'"),
    ],
)
def test_item_38_a_gate_on_what_is_not_measured_is_said_at_once(overrides: list[str], says: str) -> None:
    with pytest.raises(InputError, match=says):
        load_config("errand-town", overrides)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"gold": "a"}, "row 1: a wrong gold .*gold 'a' is not a number"),
        ({"gold": 2}, "gold 2 is not a number"),
        ({"gold": None}, "row 1: .*lacks gold"),
        ({"gold": 0.5}, "no row prefers one"),
        ({"gold_by_principle": 3}, "maps ids of principles"),
        ({"gold_by_principle": {"privacy": "x"}}, "row 1: .*privacy: gold 'x'"),
        ({"response_b": 7}, "must be texts"),
    ],
)
def test_item_38_faults_of_gold_comparisons(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    good = {"messages": "how ?", "response_a": "so", "response_b": "not", "gold": 1}
    path = tmp_path / "gold.jsonl"
    path.write_text(json.dumps({**good, **change}))
    run = Run(load_config("errand-town", [f"label.gold={path}"]))
    with pytest.raises(InputError, match=says):
        read_gold_comparisons(run.config)
    path.write_text(json.dumps({**good, "gold_by_principle": {"privacy": None, "safety": 0}, "source": "me"}))
    row = read_gold_comparisons(run.config)[0]
    assert (row["gold_by_principle"], row["source"]) == ({"safety": 0.0}, "me")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stages `label`, `rm` and `dpo` that only count; `label` writes a certificate."""
    made: list[str] = []
    stages: dict[str, Stage] = {}
    for name, needs in (("label", ()), ("rm", ("label",)), ("dpo", ("label",))):
        module = ModuleType(f"gated_{name}")

        def run(run: Run, name: str = name) -> dict[str, Any]:
            made.append(name)
            if name == "label":
                proof = certificate.certificate([LabelFacts(0.9, 1, (VoteFacts("x", 0.9, True),))])
                files.write_json(run.path("label", "certificate.json"), proof)
            return {"rows_out": 1}

        module.run = run  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
        stages[name] = Stage(name, module.__name__, "reads", needs, (name,))
    for name, stage in stages.items():
        monkeypatch.setitem(STAGES, name, stage)
    return made


def go(out: Path, names: list[str], *overrides: str) -> Run:
    return pipeline.run_stages(
        load_config("errand-town", list(overrides), out=str(out)), names, say=lambda _: None
    )


@pytest.mark.parametrize(("method", "stage"), [("ppo", "rm"), ("dpo", "dpo")])
def test_a_gate_stops_before_rm_and_the_labels_are_kept(
    tmp_path: Path, calls: list[str], method: str, stage: str
) -> None:
    chosen, tight = f"method={method}", "label.gates.max_slot_bias=0.4"
    with pytest.raises(
        Stopped, match=r"max_slot_bias=0\.4: slot bias is 1, 0\.6 above; see .*certificate.json"
    ):
        go(tmp_path, ["label", stage], chosen, tight)
    assert calls == ["label"]
    for names in (["label", stage], ["label"], [stage]):
        with pytest.raises(Stopped, match="max_slot_bias"):
            go(tmp_path, names, chosen, tight)
    assert calls == ["label"], "a gate says no as long as it stands, and nothing is labelled again"
    go(tmp_path, ["label", stage], chosen, "label.gates.max_slot_bias=1.0")
    assert calls == ["label", stage], "with another bound the run goes on from its labels"


def test_a_gate_ends_the_command_with_3_and_one_line(
    tmp_path: Path, calls: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    code = cli.main(["rm", "errand-town", "--out", str(tmp_path)])
    assert code != EXIT_STOPPED, "label is not there yet"
    capsys.readouterr()
    words = ["--out", str(tmp_path), "--set", "label.gates.max_slot_bias=0.4"]
    assert cli.main(["label", "errand-town", *words]) == EXIT_STOPPED
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith("cai-ray: stopped: label.gates.max_slot_bias=0.4: slot bias is 1, 0.6 above")
    assert calls == ["label"]
