"""What is shown of how far a stage is: its line, and what stands beside its bar."""

from __future__ import annotations

import math
import time

import pytest

from cai_ray.cluster.progress import Progress
from cai_ray.generate.row_counts import Totals
from cai_ray.generate.row_progress import RowProgress, SetProgress
from cai_ray.train.runtime import metrics
from cai_ray.train.runtime.metrics import RECENT, progress, step_seconds

NOTHING = Totals({}, {})
PPO = {
    "reward/mean": 0.8312,
    "kl/reference": 1.94,
    "ppo/ratio": 1.0,
    "time/sample_s": 3.0,
    "tokens/per_s": 5234.0,
}


def test_ppo_says_reward_kl_speed_and_time_left() -> None:
    assert progress("ppo", 12, 100, PPO, 8.2) == (
        "ppo: step 12 of 100, reward 0.831, KL 1.94, 5.2k tokens/s, 12 min left"
    )


def test_sft_and_rm_say_loss_and_accuracy() -> None:
    sft = {"sft/loss": 1.5, "sft/grad_norm": 2.0, "tokens/per_s": 870.4}
    assert progress("sft", 1, 9, sft) == "sft: step 1 of 9, loss 1.5, 870 tokens/s"
    rm = {"rm/ai_loss": 0.61, "rm/ai_accuracy": 0.7, "rm/human_loss": 0.5, "rm/human_accuracy": 0.8}
    assert progress("rm", 9, 9, rm | {"rm/ai_n": 3, "tokens/per_s": 2.3e6}, 1.0) == (
        "rm: step 9 of 9, loss 0.61, accuracy 0.7, human loss 0.5, human accuracy 0.8, 2.3M tokens/s"
    )


@pytest.mark.parametrize(
    ("seconds", "says"),
    [
        (0.4, "0 s"),
        (59, "59 s"),
        (61, "1 min"),
        (59.6 * 60, "1 h 0 min"),
        (3 * 3600 + 1200, "3 h 20 min"),
        (53 * 3600, "2 d 5 h"),
    ],
)
def test_time_left_is_said_in_units_that_people_use(seconds: float, says: str) -> None:
    assert progress("sft", 1, 2, {}, seconds) == f"sft: step 1 of 2, {says} left"


def test_a_loss_that_is_no_number_is_said() -> None:
    assert "loss nan" in progress("sft", 1, 2, {"sft/loss": math.nan})


def test_time_of_a_step_is_that_of_the_recent_ones() -> None:
    """The first end has the start-up before it, which no later step has."""
    assert step_seconds([]) is None
    assert step_seconds([100.0]) is None
    assert step_seconds([100.0, 102.0]) == 2
    assert step_seconds([100.0, 101.0, 106.0]) == 3  # a checkpoint's time is part of it
    assert RECENT > 10, "one long step does not make hours of minutes"


def test_rows_say_how_many_failed_and_the_time_left_of_all_sets() -> None:
    first, second = SetProgress("revise", 40, 0.5), SetProgress("revise helpful", 60, 0.5)
    rows = RowProgress({"part": first, "helpful": second})
    shown = rows._progress(10.2, NOTHING)
    assert shown.line == "revise: 0 of 40 rows, 10 s"
    first.add([None] * 39 + ["too long"])
    second.add([None, "too long"])
    shown = rows._progress(20.0, NOTHING)
    assert shown.line == "revise helpful: 2 of 60 rows, 1 failed, 20 s, 28 s left"
    assert shown[:4] == ("revise helpful", 2, 60, "rows")
    assert shown.details == "2.1 rows/s, 1 failed, 28 s left"


def test_rows_are_counted_as_they_finish() -> None:
    """A slice of rows comes back when the last of them is done; the actors' reports come every second."""
    first, second = SetProgress("revise", 368, 0.5), SetProgress("revise helpful", 60, 0.5, finished_before=8)
    rows = RowProgress({"part": first, "helpful": second})
    shown = rows._progress(12.0, Totals({}, {}, 80, 80, 5120, 0, 0, 9.0))
    assert shown.line == "revise: 0 of 368 rows, 80 under way, 5,120 tokens, 12 s"
    assert shown.details == "80 under way, 569 tokens/s"
    shown = rows._progress(70.0, Totals({"part": 92}, {"part": 3}, 80, 80, 33_000, 23_000, 5_750_000, 64.0))
    assert shown[:4] == ("revise", 92, 368, "rows")
    line, _, left = shown.line.rpartition(", ")
    assert line == "revise: 92 of 368 rows, 80 under way, 33,000 tokens, 3 failed, 70 s"
    assert left in ("2 min left", "3 min left")
    # Rows of both sets are left over, and those that were finished before are not counted twice.
    first.add([None] * 368)
    shown = rows._progress(90.0, Totals({"part": 368, "helpful": 10}, {}, 42, 80, 1, 1, 1, 80.0))
    assert shown[:3] == ("revise helpful", 18, 60)
    second.add([None] * 60)
    assert rows._progress(91.0, Totals({"part": 368, "helpful": 55}, {}, 0, 80, 1, 1, 1, 81.0))[1] == 60


def test_no_row_is_left_in_no_time() -> None:
    rows = RowProgress({"part": SetProgress("revise", 20_000, 0.5)})
    totals = Totals({"part": 19_999}, {}, 1, 80, 2_000_100, 1_999_900, 200_000_000, 1.0)
    assert rows._progress(2.0, totals).line.endswith(", 1 s left")
    assert rows._progress(2.0, totals._replace(finished={"part": 20_000}, under_way=0)).line.endswith(
        ", 0 s left"
    )


def test_what_rank_0_reports_is_a_line_and_its_warnings(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    store: dict[tuple[str, str], bytes] = {}
    monkeypatch.setattr(metrics, "put", lambda key, name, value: store.update({(key, name): value}))
    monkeypatch.setattr(metrics, "get", lambda key, name: store.get((key, name)))
    monkeypatch.setattr(metrics, "forget", lambda key: store.clear())
    monkeypatch.setattr(metrics, "_driver_key", "")
    with metrics.progress_lines("sft-1"):
        metrics.report_to("sft-1")
        metrics.report_progress(Progress("sft", 1, 3, "steps", "loss 2.5", "sft: step 1 of 3, loss 2.5"))
        shown, deadline = "", time.monotonic() + 60
        while "step" not in shown and time.monotonic() < deadline:
            time.sleep(0.05)
            shown += capfd.readouterr().err
        metrics.warn("a dashboard is away")
    assert shown + capfd.readouterr().err == "  sft: step 1 of 3, loss 2.5\n  warning: a dashboard is away\n"
    assert not store
