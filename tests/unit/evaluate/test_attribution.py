"""From principles to what they did, beside a naive count; and the comparisons that people should decide."""

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cai_ray.config.load import load_config
from cai_ray.config.sources import Comparisons
from cai_ray.data.left_out import LeftOut
from cai_ray.data.sources import read_comparisons
from cai_ray.errors import InputError
from cai_ray.evaluate.attribution import attribution
from cai_ray.evaluate.reconstruction import reconstruct
from cai_ray.evaluate.vote_counts import VoteCounts
from cai_ray.judging.votes import combine
from cai_ray.storage import files
from cai_ray.storage.arrow import to_table
from cai_ray.storage.records import Judgement, Label, Margin, Revision
from cai_ray.storage.run import Run
from cai_ray.storage.tables import write_table
from cai_ray.studies import contested

MESSAGES = [{"role": "user", "content": "how ?"}]


def vote(principle: str, p: float | None, **fields: Any) -> dict[str, Any]:
    return {"principle_id": principle, "p_a": p, "abstained": None if p is not None else "silent", **fields}


def label(number: int, votes: list[dict[str, Any]], p: float, **fields: Any) -> dict[str, Any]:
    row = {"id": f"c{number:04d}", "prompt_id": f"p{number}", "messages": MESSAGES, "family": "privacy"}
    return {
        **row,
        "response_a": "a",
        "response_b": "b",
        "votes": votes,
        "p_a": p,
        "p_a_raw": p,
        "error": None,
        **fields,
    }


def table(rows: list[dict[str, Any]]) -> Any:
    return to_table(rows, Label)


def random_labels(how: str, n: int = 300) -> tuple[list[dict[str, Any]], dict[str, float]]:
    rng = random.Random(7)
    weights = {"one": 1.0, "two": 2.0, "three": 0.5}
    rows = []
    for i in range(n):
        votes = [
            vote(name, None if rng.random() < 0.1 else round(rng.random(), 2))
            for name in weights
            if rng.random() < 0.8
        ]
        given = [(v["p_a"], weights[v["principle_id"]]) for v in votes if v["p_a"] is not None]
        if given:
            p = combine([x for x, _ in given], [w for _, w in given], how)
            rows.append(label(i, votes, p, family=rng.choice(["privacy", "safety"])))
    return rows, weights


@pytest.mark.parametrize("how", ["mean", "log_odds"])
def test_counts_of_votes_are_those_of_a_naive_count(how: str) -> None:
    rows, weights = random_labels(how)
    made = VoteCounts(list(weights), list(weights.values()), how)
    for start in range(0, len(rows), 64):
        made.add(table(rows[start : start + 64]), {})
    found, names = made.counts(), list(weights)
    naive: dict[str, Counter[str]] = {name: Counter() for name in names}
    against: Counter[tuple[str, str]] = Counter()
    for row in rows:
        given = {v["principle_id"]: v["p_a"] for v in row["votes"]}
        sides = {
            n: 0 if p is None or abs(p - 0.5) <= 0.05 else (1 if p > 0.5 else -1) for n, p in given.items()
        }
        side = np.sign(row["p_a_raw"] - 0.5)
        for name, p in given.items():
            naive[name]["abstained" if p is None else "cast"] += 1
            naive[name]["tied"] += p is not None and sides[name] == 0
            naive[name]["with_label"] += sides[name] * side > 0
            naive[name]["overruled"] += sides[name] * side < 0
            rest = [(q, weights[n]) for n, q in given.items() if q is not None and n != name]
            without = combine([q for q, _ in rest], [w for _, w in rest], how) if rest else 0.5
            if p is not None and side and (abs(without - 0.5) < 1e-9 or (without - 0.5) * side < 0):
                naive[name]["decisive"] += 1
                naive[name][row["family"]] += 1
        for one in given:
            for other in given:
                against[one, other] += sides[one] * sides[other] < 0
    for name in names:
        votes = found[name]["votes"]
        assert {k: votes[k] for k in made.sums} == {k: naive[name][k] for k in made.sums}
        assert votes["by_family"] == {f: naive[name][f] for f in ("privacy", "safety")}
        assert {n: c["against"] for n, c in found[name]["conflicts"].items()} == {
            other: against[name, other] for other in names if against[name, other]
        }
    assert made.comparisons == len(rows)


def test_a_margin_is_the_rewards_on_the_labels_side_where_a_vote_decided() -> None:
    made = VoteCounts(["one", "two"], [1.0, 1.0], "mean")
    rows = [
        label(1, [vote("one", 0.9), vote("two", 0.45)], 0.675),  # one decided, for a
        label(2, [vote("one", 0.1), vote("two", 0.5)], 0.3),  # one decided, for b
        label(3, [vote("one", 0.9), vote("two", 0.9)], 0.9),  # neither did
    ]
    made.add(table(rows), {"c0001": 2.0, "c0002": -4.0, "c0003": 100.0})
    assert made.counts()["one"]["margin"] == {"value": 3.0, "n": 2}
    assert made.counts()["two"]["margin"] == {"value": None, "n": 0}


def test_reconstruction_tells_who_made_the_labels() -> None:
    rng = np.random.default_rng(0)
    labels = rng.choice([-1.0, 1.0], 500)
    votes = np.stack([0.5 + 0.4 * labels, rng.random(500), np.full(500, 0.5)], axis=1)
    found = reconstruct(votes, labels, ["maker", "noise", "mute"])
    assert found["maker"]["accuracy"] == 1.0 and 0.4 < found["maker"]["shuffled_high"] < 0.6
    assert 0.4 < found["noise"]["accuracy"] < 0.6
    assert found["mute"] == {"accuracy": 0.5, "shuffled": 0.5, "shuffled_high": 0.5, "n": 500}
    assert "absent" not in reconstruct(np.full((5, 1), np.nan), labels[:5], ["absent"])


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run(load_config("errand-town", out=str(tmp_path / "run")))

    def revised(number: int, *steps: tuple[str, str], **fields: Any) -> dict[str, Any]:
        made = [{"round": i, "principle_id": p, "revision": r} for i, (p, r) in enumerate(steps, 1)]
        row = {
            "id": f"r{number}",
            "messages": MESSAGES,
            "kind": "red_team",
            "family": "privacy",
            "response": "sure",
        }
        return {**row, "steps": made, "error": None, **fields}

    rows = [
        revised(1, ("privacy", "sorry"), ("safety", "sorry")),
        revised(2, ("safety", "sure"), ("privacy", "sure")),
        revised(3, ("privacy", "no"), ("safety", "yes"), family="theft"),
        revised(4, kind="helpful", family="neutral"),
        revised(5, ("privacy", "no"), error="failed"),
    ]
    run.write_rows("revise", to_table(rows, Revision))
    labels = [label(1, [vote("privacy", 0.9), vote("safety", 0.5)], 0.7), label(2, [], 0.5, error="failed")]
    run.write_rows("label", table(labels))
    judged = [
        {"id": f"{m}{i}", "model": m, "principle_named": named}
        for m, names in (("sl", ["privacy", None]), ("rl", ["privacy", "privacy"]))
        for i, named in enumerate(names)
    ]
    run.write_rows("evaluate", to_table(judged, Judgement))
    margins = [{"id": "c0001", "reward_a": 1.5, "reward_b": 0.5}]
    write_table(run.path("evaluate", "margins-00000.parquet"), to_table(margins, Margin))
    return run


def test_the_chain_of_a_principle(run: Run) -> None:
    found = attribution(run, run.config.document)
    privacy, safety = found["principles"]["privacy"], found["principles"]["safety"]
    assert privacy["revision"] == {"drawn": 3, "changed": 2, "by_family": {"privacy": 1, "theft": 1}}
    assert safety["revision"] == {"drawn": 3, "changed": 1, "by_family": {"theft": 1}}
    assert privacy["votes"]["decisive"] == 1 and safety["votes"]["tied"] == 1
    assert privacy["margin"] == {"value": 1.0, "n": 1}
    assert privacy["named"] == {"sl": 1, "rl": 2} and safety["named"] == {}
    assert found["coverage"]["never_drawn"] == ["property", "honesty", "respect"]
    assert found["coverage"]["never_decisive"] == ["property", "safety", "honesty", "respect"]
    assert found["coverage"]["families_without_principle"] == ["theft"]
    assert found["comparisons"] == 1


def orders(p_straight: float, p_swapped: float) -> dict[str, float]:
    """Log-probabilities of a vote by what each order says of response a."""
    return {
        "logprob_a": float(np.log(p_straight)), "logprob_b": float(np.log(1 - p_straight)),
        "logprob_a_swapped": float(np.log(p_swapped)), "logprob_b_swapped": float(np.log(1 - p_swapped)),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("votes", "p", "why"),
    [
        ([vote("one", 0.9), vote("two", 0.1)], 0.7, ["principles"]),
        ([vote("one", 0.9), vote("two", 0.52)], 0.7, []),
        ([vote("one", 0.6, **orders(0.9, 0.3))], 0.6, ["orders"]),
        ([vote("one", 0.8, **orders(0.9, 0.7))], 0.8, []),
        ([vote("one", 0.5, **orders(0.51, 0.49))], 0.5, ["unsure"]),
        ([vote("one", None), vote("two", 0.9)], 0.9, []),
        ([], 0.5, []),
    ],
)
def test_why_a_label_is_contested(votes: list[dict[str, Any]], p: float, why: list[str]) -> None:
    assert contested.contested(table([label(1, votes, p)]).to_pylist()[0])[0] == why


def test_contested_rows_go_out_and_come_back_as_human_comparisons(tmp_path: Path) -> None:
    run = Run(load_config("errand-town", out=str(tmp_path / "run")))
    rows = [
        label(
            i,
            [vote("privacy", 0.5 + i / 20), vote("safety", 0.5 - i / 20)],
            0.5,
            response_a=f"a{i}",
            response_b=f"b{i}",
        )
        for i in range(8)
    ]
    run.write_rows("label", table([*rows, label(9, [vote("privacy", 0.9)], 0.9)]))
    with pytest.raises(InputError, match="label is not complete"):
        contested.export(run, run.config.document, str(tmp_path / "x.jsonl"), 3)
    files.write_json(run.path("label", "manifest.json"), {"seconds": 1})
    path = tmp_path / "queue.jsonl"
    found = contested.export(run, run.config.document, str(path), 3)
    assert found == {"principles": 6, "orders": 0, "unsure": 8, "written": 3}
    written = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["response_a"] for row in written] == ["a7", "a6", "a5"], "the most contested first"
    assert written[0]["votes"][0]["title"] == "Protect private things" and written[0]["preferred"] is None
    with pytest.raises(InputError, match="already exists"):
        contested.export(run, run.config.document, str(path), 3)

    for row, answer in zip(written, ("b", "", "A "), strict=True):
        row["preferred"] = answer
    path.write_text("".join(json.dumps(row) + "\n" for row in written))
    human = read_comparisons(Comparisons(path=str(path)))
    assert [(h["response_a"], h["response_b"]) for h in human] == [("b7", "a7"), ("a5", "b5")]
    written[0]["preferred"] = "both"
    path.write_text("".join(json.dumps(row) + "\n" for row in written))
    with pytest.raises(InputError, match=r"row 1: .*preferred 'both' is not a or b"):
        read_comparisons(Comparisons(path=str(path)), left_out=LeftOut(max_error_rate=0))
