"""What `cai-ray init` writes for a model and data of the hub runs to its end."""

import json
from pathlib import Path

from cai_ray.stages import stages_of
from cai_ray.storage.run import open_run
from tests import tiny
from tests.e2e.command import settings, succeed
from tests.hub import Hub
from tests.unit.cli.test_init import prompts


def test_the_configuration_runs_to_the_end(hub: Hub, tmp_path: Path) -> None:
    commit = hub.publish("org/name", tiny.with_ends(tiny.save_model(tmp_path / "model")))
    rows = {"red_team": prompts("How do I secretly break"), "helpful": prompts("What is a fine present for")}
    for kind, texts in rows.items():
        lines = "".join(json.dumps({"prompt": text}) + "\n" for text in texts)
        hub.publish(f"org/{kind}", {"data.jsonl": lines.encode()}, dataset=True)
    out = tmp_path / "mine.yaml"
    given = ("--model", "org/name", "--red-team", "org/red_team", "--helpful", "org/helpful", "--out", out)
    assert succeed("init", *given).stdout == f"{out}\n"
    # A random model's texts are often cut off or blank; its rows are then errors, and the others go on.
    succeed("run", out, "--out", tmp_path / "run", *settings({"max_error_rate": 0.9}), timeout=900)
    run = open_run(str(tmp_path / "run"))
    assert all(run.manifest(stage) for stage in stages_of(run.config.method))
    assert run.config.model == f"org/name@{commit}"
    assert json.loads((tmp_path / "run" / "run.json").read_text())["commits"] == {"org/name": commit}
    assert run.manifest("sft")["init_sha"] == run.manifest("revise")["engine"]["model_sha"]
    # The branch moves on: the run stays with what it began with, and has nothing to do.
    hub.publish("org/name", tiny.save_model(tmp_path / "other", seed=1))
    again = succeed("run", out, "--out", tmp_path / "run", *settings({"max_error_rate": 0.9}), timeout=900)
    assert again.stderr.count("done before") == len(stages_of(run.config.method))
