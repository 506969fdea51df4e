"""The comparisons that `rm` and `dpo` read: one by one, in the order of their ids."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cai_ray.errors import InputError
from cai_ray.storage.run import Run
from cai_ray.train import comparisons
from cai_ray.train.dialogues import TOKENS, render
from tests.ray import training


def make(tmp_path: Path, count: int = 24, **section: object) -> Run:
    human = tmp_path / "human.jsonl"
    pairs = [{"prompt": f"how to read {i}", "chosen": "ask her", "rejected": "why ask"} for i in range(5)]
    human.write_text("".join(json.dumps(pair) + "\n" for pair in [*pairs, pairs[0]]))
    given = {"init": "base", "human": [{"path": str(human)}], **section}
    run = training.make_run(tmp_path, "qwen2", rm=given)
    rows = training.labels(count)
    rows[0]["error"] = "no verdict"
    rows[1]["response_b"] = rows[1]["response_a"]
    rows[2]["response_b"] = "word " * 5000  # longer than the context
    training.write(run, "label", rows[::-1])
    return run


def test_comparisons_come_with_their_responses_in_the_order_of_their_ids(tmp_path: Path) -> None:
    from cai_ray.prompts.load import load_templates
    from cai_ray.prompts.renderer import Renderer

    run = make(tmp_path)
    data = comparisons.load_comparisons(run, "rm", run.config.model)
    ids = [id.decode() for id in data.ids]
    assert ids == sorted(ids) and len(ids) == 21 + 6, "two people's equal answers both count"
    rows = {row["id"]: row for row in training.labels()}
    renderer, templates = Renderer(run.config.model), load_templates(run.config.templates)
    for i, id in enumerate(ids):
        assert data.human[i] == (id not in rows)
        if row := rows.get(id):
            assert data.p_a[i] == row["p_a"]
            for side, key in enumerate(("response_a", "response_b")):
                example = render(renderer, templates, row["messages"], row[key], 4096)
                assert data.responses[2 * i + side] == example
    assert sorted(data.train + data.held_out) == list(range(27))
    assert data.counts["left_out"] == {"error": 1, "identical": 1, "min_margin": 0, "too_long": 1}
    assert (data.counts["rows_in"], data.counts["rows_out"], data.counts["errors"]) == (30, 27, 1)
    assert (data.counts["rows_ai"], data.counts["rows_human"]) == (21, 6)
    assert Path(run.path("rm", TOKENS)).stat().st_size == 4 * data.responses.tokens


def test_no_comparison_is_left_to_train_on(tmp_path: Path) -> None:
    run = make(tmp_path, 3, human=[])
    with pytest.raises(
        InputError, match=r"rm: no comparison can be trained on \(3 labels, left out: .*error"
    ):
        comparisons.load_comparisons(run, "rm", run.config.model)
