"""What is reported of a run beside the same run without a principle."""

from pathlib import Path
from typing import Any

import pytest

from cai_ray.config.load import load_config
from cai_ray.errors import InputError
from cai_ray.prompts.load import load_templates
from cai_ray.storage import files
from cai_ray.storage.arrow import to_table
from cai_ray.storage.records import Judgement, Label
from cai_ray.storage.run import Run
from cai_ray.storage.tables import has_rows
from cai_ray.studies import ablate

FAMILIES = ("privacy", "safety")


def judged(base: dict[str, list[int]], final: dict[str, list[int]]) -> list[dict[str, Any]]:
    """Rows of schema `judgements`: for each family and prompt whether the answer is harmful."""
    return [
        {
            "id": f"{model}-{family}-{i}", "prompt_id": f"{family}-{i}", "model": model, "kind": "red_team",
            "family": family, "harmful": bool(harm), "refused": not harm,
            "principle_named": None if harm else family, "malformed": False,
        }
        for model, answers in (("base", base), ("rl", final))
        for family, flags in answers.items()
        for i, harm in enumerate(flags)
    ]  # fmt: skip


def made(out: Path, rows: list[dict[str, Any]], calls: int = 10) -> Run:
    run = Run(load_config("errand-town", out=str(out)))
    run.write_rows("evaluate", to_table(rows, Judgement))
    for stage in ("revise", "label"):
        files.write_json(run.path(stage, "manifest.json"), {"calls": calls})
    return run


def test_the_effect_is_a_difference_in_differences(tmp_path: Path) -> None:
    # By chance the base model's answers are less harmful in the second run: that is no effect of the principle.
    full = made(
        tmp_path / "a", judged(dict.fromkeys(FAMILIES, [1] * 8), {"privacy": [0] * 8, "safety": [0] * 8})
    )
    base = {"privacy": [1] * 8, "safety": [1, 1, 1, 1, 0, 0, 0, 0]}
    less = made(tmp_path / "b", judged(base, {"privacy": [1] * 6 + [0] * 2, "safety": [0] * 8}), calls=3)
    found = ablate.compare([(full, less)], ["privacy"])
    assert found["did"]["privacy"]["value"] == pytest.approx(0.75)
    assert 0.4 < found["did"]["privacy"]["low"] < 0.75 < found["did"]["privacy"]["high"] <= 1
    assert found["did"]["safety"]["value"] == pytest.approx(0.5)  # 0 - 1/2, less 0 - 1
    assert found["harm"]["privacy"] == {"full": 0.0, "without": 0.75}
    assert (found["turned"]["value"], found["turned"]["n"]) == (0.75, 8)
    assert (found["turned_others"]["value"], found["turned_others"]["n"]) == (0.0, 8)
    assert found["calls"]["label"] == {"full": 10, "without": 3}
    assert "privacy" in "\n".join(ablate.lines(found))


def test_seeds_count_alike_and_prompts_are_drawn_together(tmp_path: Path) -> None:
    none, all_ = {"privacy": [0] * 8}, {"privacy": [1] * 8}
    pairs = [
        (made(tmp_path / f"{i}", judged(all_, none)), made(tmp_path / f"{i}x", judged(all_, after)))
        for i, after in enumerate((none, all_))
    ]
    did = ablate.compare(pairs, ["privacy"])["did"]["privacy"]
    assert (did["value"], did["low"], did["high"], did["n"]) == (0.5, 0.5, 0.5, 8)


def test_a_run_without_a_principle_lies_in_the_run_and_borrows_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[Any] = []

    def run(config: Any, overwrite: bool, say: Any) -> Run:
        ran.append(config)
        if config.without:
            assert has_rows(files.join(config.out, "label", "before"))
        done = made(Path(config.out), judged({"privacy": [1]}, {"privacy": [0]}))
        done.config = config
        done.write_rows("label", to_table([], Label))
        return done

    monkeypatch.setattr(ablate, "_run", run)
    config = load_config("errand-town", out=str(tmp_path / "run"))
    found = ablate.ablate(config, ["privacy"], 2, say=lambda _: None)
    assert [(c.seed, c.without) for c in ran] == [(0, ()), (0, ("privacy",)), (1, ()), (1, ("privacy",))]
    assert found["runs"][1]["without"] == f"{tmp_path}/run/seed-1/without/privacy"
    with pytest.raises(InputError, match="privavy"):
        ablate.ablate(config, ["privavy"], say=lambda _: None)
    assert len(ran) == 4


def test_where_nobody_judges_harm_declining_is_the_behaviour(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unjudged(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{**row, "harmful": None, "principle_named": None} for row in rows]

    full = made(tmp_path / "a", unjudged(judged({"privacy": [1] * 4}, {"privacy": [0] * 4})))
    less = made(tmp_path / "b", unjudged(judged({"privacy": [1] * 4}, {"privacy": [1, 1, 1, 0]})))
    found = ablate.compare([(full, less)], ["privacy"])
    assert found["did"]["privacy"]["value"] == 0.75 and found["turned"]["n"] == 0
    bare = load_templates("general").model_copy(update={"refusals": ()})
    monkeypatch.setattr(ablate, "load_templates", lambda _: bare)
    config = load_config("errand-town", out=str(tmp_path / "run"))
    no_gold = config.evaluate.model_copy(update={"gold": None})
    with pytest.raises(InputError, match="has no `refusals`, which recognise answers that decline"):
        ablate.ablate(config.model_copy(update={"evaluate": no_gold}), ["privacy"], say=lambda _: None)
