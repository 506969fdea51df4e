"""Which of a policy's models are kept while PPO runs."""

from __future__ import annotations

from pathlib import Path

from cai_ray.config.run import RunConfig
from cai_ray.storage.run import Run
from cai_ray.train.ppo.alarms import Snapshot
from cai_ray.train.ppo.watch import Watch


def watch_of(folder: Path, opinions: list[float]) -> Watch:
    """A watch with a snapshot every 10 steps, and a model of each that was the best until then."""
    config = {"name": "t", "out": str(folder), "model": "m", "constitution": "harmless"}
    watch = Watch.__new__(Watch)
    watch.run = Run(RunConfig.model_validate(config | {"prompts": [{"path": "none.jsonl"}]}))
    watch.cfg, watch.history, watch._needed = watch.run.config.ppo, [], 0
    for number, opinion in enumerate(opinions):
        look(watch, 10 * number, opinion)
    return watch


def look(watch: Watch, step: int, opinion: float) -> None:
    watch.history.append(Snapshot(step, 0.0, opinion, 1.0, 0.0, None, {}))
    if watch._best() == step:
        Path(watch._folder(step)).mkdir(parents=True)


def kept(watch: Watch) -> list[str]:
    return sorted(path.name for path in Path(watch.run.path("ppo", "snapshots")).iterdir())


def test_a_model_goes_when_no_checkpoint_that_counts_calls_it_the_best(tmp_path: Path) -> None:
    watch = watch_of(tmp_path, [0.5, 0.6, 0.7])
    assert kept(watch) == ["step-000000", "step-000010", "step-000020"], "no checkpoint yet"
    watch.saved()  # it is on its way: a run that dies now starts anew, from step 0
    assert kept(watch) == ["step-000000", "step-000020"]
    look(watch, 30, 0.8)
    watch.saved()  # a run that dies now goes on from the first checkpoint, of which step 20 is the best
    assert kept(watch) == ["step-000020", "step-000030"]
    look(watch, 40, 0.1)
    watch.saved()
    assert kept(watch) == ["step-000030"]


def test_the_best_alone_is_left_at_the_end(tmp_path: Path) -> None:
    watch = watch_of(tmp_path, [0.5, 0.6, 0.4])
    (Path(watch._folder(10)) / "config.json").write_text("{}")
    assert watch.publish(20) == 10 and kept(watch) == ["step-000010"]
    assert Path(watch.run.path("ppo", "model", "config.json")).exists()
