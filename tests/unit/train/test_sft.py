"""What stage `sft` reads: rows one by one, and what it writes of them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from cai_ray.config.training import SftConfig
from cai_ray.prompts.load import load_templates
from cai_ray.prompts.renderer import Renderer
from cai_ray.storage import sorting
from cai_ray.storage.arrow import to_table
from cai_ray.storage.files import list_files
from cai_ray.storage.records import Revision
from cai_ray.storage.run import Run
from cai_ray.train import sft
from cai_ray.train.sft_records import choose_records, to_records
from tests import tiny
from tests.ray import training
from tests.ray.engines import town_config


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(town_config(out=str(tmp_path)))


def test_tokens_and_rows_are_in_the_order_of_the_records(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the order of the revisions: shuffles of an epoch count on it."""
    monkeypatch.setattr(sorting, "_RANGE_ROWS", 5)
    monkeypatch.setattr(sorting, "PART_BYTES", 2000)
    rows, cfg = training.revisions(60), SftConfig(revisions="all", helpful_per_revision=0.2)
    rows[4]["error"] = "the first response is empty"
    rows[7]["steps"][0]["revision"] = "word " * 5000  # longer than the context
    for part, some in enumerate((rows[30:][::-1], rows[:30])):
        run.write_rows("revise", to_table(some, Revision), part)
    read = run.each_row("revise")
    choice = choose_records(read, cfg, 0)
    renderer, templates = Renderer(tiny.tokenizer()), load_templates("general")
    data = sft.write_records(
        run, to_records(read, cfg, choice.ids), renderer, templates, 4096, choice.ids, Counter()
    )

    wanted = [r for r in training.sft_records(rows, cfg) if len(r["messages"][-1]["content"]) < 5000]
    assert (choice.rows, choice.errors, len(choice.ids)) == (60, 1, len(wanted) + 1)
    assert list(run.each_row("sft")) == wanted and len(list_files(run.path("sft"), ".parquet")) > 2
    rendered = [sft.render_record(record, renderer, templates, 4096) for record in wanted]
    assert [data[i] for i in range(len(data))] == rendered


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0, 9.0])
def test_helpful_samples_are_drawn_by_their_ids(share: float) -> None:
    rows = training.revisions(30)
    few = {r["id"] for r in training.sft_records(rows, SftConfig(helpful_per_revision=share))}
    more = {r["id"] for r in training.sft_records(rows, SftConfig(helpful_per_revision=share + 0.2))}
    assert few <= more and len(few) == 20 + min(10, round(share * 20))


def test_nothing_to_train_on_is_no_record() -> None:
    rows: list[dict[str, Any]] = [{**row, "error": "refused"} for row in training.revisions(3)]
    choice = choose_records(rows, SftConfig(), 0)
    assert not choice.ids and (choice.rows, choice.errors) == (3, 3)
    helpful = [row for row in training.revisions(6) if row["kind"] == "helpful"]
    assert len(choose_records(helpful, SftConfig(helpful_per_revision=0.0), 0).ids) == 2
