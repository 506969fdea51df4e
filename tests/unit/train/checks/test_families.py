"""What `--check` says of families of models, by a table made for these tests."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest

from cai_ray.cli import main
from cai_ray.config.run import RunConfig
from cai_ray.errors import InputError
from cai_ray.stages import stages_of
from cai_ray.storage.run import Run
from cai_ray.train.checks.families import check_families
from cai_ray.train.families import table
from cai_ray.train.families.table import STEPS, Family, StepResult

GOOD = dict.fromkeys(STEPS, StepResult("works"))
NO_CLASS = StepResult("refused", "no class that scores")
LOST = StepResult("refused", "4 tensors are missing")
NO_HEAD = StepResult("refused", "there is no parameter named lm_head")
DIES = StepResult("refused", "it dies")
TABLE = {
    "Good": GOOD,
    "NoScore": GOOD | {"rm": NO_CLASS, "rm_lora": NO_CLASS},
    "NoPpo": GOOD | {"ppo": NO_HEAD, "ppo_lora": NO_HEAD},
    "NoLora": GOOD | dict.fromkeys(("sft_lora", "rm_lora", "dpo_lora", "ppo_lora"), LOST),
    "OnlyLora": GOOD | {"dpo": LOST},
    "NoEngine": GOOD | dict.fromkeys(("engine", "ppo", "ppo_lora"), DIES),
    "Half": GOOD
    | dict.fromkeys(
        ("engine", "ppo", "ppo_lora"), StepResult("works", "it wants bf16", {"dtype": "bfloat16"})
    ),
    "Seeing": GOOD | {"engine": StepResult("works", "no images", {"extra": {"language_model_only": True}})},
    "Long": GOOD
    | {"ppo": StepResult("works", "other factors", {"max_model_len": "original_max_position_embeddings"})},
}


@pytest.fixture(autouse=True)
def _table(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {name: Family("", results) for name, results in TABLE.items()}
    monkeypatch.setattr(table, "families", lambda: rows)


def folder(place: Path, architecture: str, **more: Any) -> str:
    place.mkdir(parents=True, exist_ok=True)
    (place / "config.json").write_text(json.dumps({"architectures": [architecture], **more}))
    return str(place)


def checked(
    tmp_path: Path,
    architecture: str,
    changes: dict[str, Any] | None = None,
    stages: Collection[str] = (),
    **more: Any,
) -> list[str]:
    config = {
        "name": "x", "out": str(tmp_path / "run"), "constitution": "harmless", "prompts": [{"path": "p.jsonl"}],
        "model": folder(tmp_path / "model", architecture, **more), "engine": {"device": "cpu"},
    } | (changes or {})  # fmt: skip
    run = Run(RunConfig.model_validate(config))
    return check_families(run, stages or stages_of(run.config.method))


LORA = {"lora": {"rank": 4}}
CPU = {"device": "cpu"}


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("Good", {}),
        ("NoScore", {"method": "dpo"}),
        ("NoPpo", {"method": "dpo"}),
        ("NoLora", {}),
        ("OnlyLora", {"method": "dpo", "dpo": LORA}),
        ("Half", {"engine": {**CPU, "dtype": "bfloat16"}, "ppo": {"dtype": "bfloat16"}}),
        ("Seeing", {"engine": {**CPU, "extra": {"language_model_only": True, "seed": 1}}}),
    ],
)
def test_what_works_is_silent(tmp_path: Path, architecture: str, changes: dict[str, Any]) -> None:
    assert checked(tmp_path, architecture, changes) == []


@pytest.mark.parametrize(
    ("architecture", "changes", "stage", "reason", "remedy"),
    [
        ("NoScore", {}, "rm", "no class that scores", "set rm.init to a model of a family that can be a reward model, "
         "or use method: dpo"),
        ("NoPpo", {}, "ppo", "there is no parameter named lm_head", "use method: dpo"),
        ("NoLora", {"sft": LORA}, "sft", "4 tensors are missing", "train all weights (without sft.lora)"),
        ("NoLora", {"ppo": LORA}, "ppo", "4 tensors are missing", "train all weights (without ppo.lora)"),
        ("NoLora", {"method": "dpo", "dpo": LORA}, "dpo", "4 tensors", "train all weights (without dpo.lora)"),
        ("OnlyLora", {"method": "dpo"}, "dpo", "4 tensors are missing", "train an adapter (dpo.lora)"),
        ("NoEngine", {}, "revise", "it dies", "give a model of another family"),
        ("Half", {}, "revise", "it wants bf16", "engine.dtype=bfloat16"),
        ("Half", {"engine": {**CPU, "dtype": "bfloat16"}}, "ppo", "it wants bf16", "ppo.dtype=bfloat16"),
        ("Seeing", {}, "revise", "no images", 'engine.extra={"language_model_only": true}'),
    ],
)  # fmt: skip
def test_what_is_refused_is_one_line_with_reason_and_remedy(
    tmp_path: Path, architecture: str, changes: dict[str, Any], stage: str, reason: str, remedy: str
) -> None:
    with pytest.raises(InputError) as e:
        checked(tmp_path, architecture, changes)
    line = str(e.value)
    assert "\n" not in line and line.startswith(f"model {tmp_path / 'model'}: {stage} ")
    assert architecture in line and reason in line and remedy in line


def test_only_what_is_about_to_run_is_refused(tmp_path: Path) -> None:
    assert checked(tmp_path, "NoScore", stages=["revise", "sft"]) == []
    assert checked(tmp_path, "NoScore", {"sft": {"init": folder(tmp_path / "other", "Good")}}) == []
    assert checked(tmp_path, "NoScore", {"rm": {"init": folder(tmp_path / "other", "Good")}}) == []
    with pytest.raises(InputError, match=r"^rm.init .*other: rm does not work with NoScore"):
        checked(tmp_path, "Good", {"rm": {"init": folder(tmp_path / "other", "NoScore")}})


def test_a_judge_needs_an_engine_alone(tmp_path: Path) -> None:
    judge = {"model": folder(tmp_path / "judge", "NoPpo")}
    assert checked(tmp_path, "Good", {"label": {"judge": judge}}) == []
    folder(tmp_path / "judge", "NoEngine")
    with pytest.raises(InputError, match=r"^label.judge.model .*judge: label does not work with NoEngine"):
        checked(tmp_path, "Good", {"label": {"judge": judge}})
    served = {"model": "theirs", "engine": {"kind": "openai", "base_url": "http://localhost:1/v1"}}
    assert checked(tmp_path, "Good", {"label": {"judge": served}}) == []


def test_a_reviser_needs_an_engine_alone(tmp_path: Path) -> None:
    reviser = {"model": folder(tmp_path / "large", "NoPpo")}
    assert checked(tmp_path, "Good", {"revise": {"reviser": reviser}}) == []
    folder(tmp_path / "large", "NoEngine")
    with pytest.raises(
        InputError, match=r"^revise.reviser.model .*large: revise does not work with NoEngine"
    ):
        checked(tmp_path, "Good", {"revise": {"reviser": reviser}})
    assert checked(tmp_path, "Good", {"revise": {"reviser": reviser}}, stages=["sft"]) == []


def test_a_longer_context_than_the_original_one_is_refused(tmp_path: Path) -> None:
    """The bound is a number of the model's own config.json."""
    rope = {"rope_parameters": {"original_max_position_embeddings": 4096}}
    assert checked(tmp_path, "Long", {"engine": {**CPU, "max_model_len": 4096}}, **rope) == []
    for length in (None, 4097):
        with pytest.raises(InputError, match=r"ppo works with Long only with engine.max_model_len=4096"):
            checked(tmp_path, "Long", {"engine": {**CPU, "max_model_len": length}}, **rope)
    assert checked(tmp_path, "Long", stages=["revise", "sft", "rm"], **rope) == []


@pytest.mark.parametrize("architecture", ["Nonesuch", "Good with LongRoPE"])
def test_an_untested_family_is_a_warning_that_names_the_probe(tmp_path: Path, architecture: str) -> None:
    name, _, long = architecture.partition(" ")
    more = {"rope_scaling": {"type": "longrope"}} if long else {}
    (line,) = checked(tmp_path, name, **more)
    assert (
        line.startswith("warning: ")
        and architecture in line
        and "--check --probe" in line
        and "\n" not in line
    )


def test_engines_that_fail_on_cpus_are_untested_on_gpus(tmp_path: Path) -> None:
    gpu = {"engine": {"device": "gpu"}}
    for architecture in ("NoEngine", "Seeing"):
        (line,) = checked(tmp_path, architecture, gpu)
        assert f"{architecture} is untested in revise, compare, label, ppo, evaluate" in line
    with pytest.raises(InputError, match="lm_head"):
        checked(tmp_path, "NoPpo", gpu)


def test_quantised_weights_generate_and_are_not_trained(tmp_path: Path) -> None:
    quantised = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    assert checked(tmp_path, "Good", stages=["revise"], **quantised) == []
    with pytest.raises(
        InputError, match=r"^model .*: its weights are quantised \(bitsandbytes\), and sft trains whole"
    ):
        checked(tmp_path, "Good", **quantised)
    judge = {"model": folder(tmp_path / "judge", "Good", **quantised)}
    assert checked(tmp_path, "Good", {"label": {"judge": judge}}) == []


def test_a_model_elsewhere_is_known_by_the_fields_that_are_given(tmp_path: Path) -> None:
    config = {"name": "x", "out": str(tmp_path), "constitution": "harmless", "prompts": [{"path": "p.jsonl"}],
              "model": "org/nonesuch", "label": {"judge": {"model": "org/other"}}, "engine": CPU}  # fmt: skip
    run = Run(RunConfig.model_validate(config))
    stages = stages_of("ppo")
    (line,) = check_families(run, stages, {"model_type": "llama"})
    assert "LlamaForCausalLM is untested in revise, sft, compare, rm, ppo, evaluate" in line
    with pytest.raises(InputError, match="rm does not work with NoScore"):
        check_families(run, stages, {"model_type": "llama", "architectures": ["NoScore"]})
    assert check_families(run, stages, {"model_type": "nonesuch"}) == []


def test_a_config_without_an_architecture_is_left_to_others(tmp_path: Path) -> None:
    assert checked(tmp_path, "Good", {"model": str(tmp_path / "nowhere")}) == []


def test_the_command_says_it_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["run", "errand-town", "--check", "--out", str(tmp_path / "run")]
    for results, code, said in (
        (GOOD, 0, ""),
        ({}, 0, "warning: model "),
        (TABLE["NoScore"], 2, "rm does not work with LlamaForCausalLM (no class that scores)"),
    ):
        monkeypatch.setattr(table, "families", lambda row=Family("", results): {"LlamaForCausalLM": row})
        assert main(arguments) == code
        out, err = capsys.readouterr()
        assert said in (err if code else out) and ("warning" in out) == (said.startswith("warning"))
        assert err.count("\n") == (1 if code else 0)
    assert main(["run", "errand-town", "--probe", "--out", str(tmp_path / "run")]) == 2
    assert "--probe goes with --check" in capsys.readouterr().err
