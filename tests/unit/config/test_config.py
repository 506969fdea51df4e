"""Configuration and constitution: what is accepted, what is said otherwise, what a hash covers."""

from pathlib import Path

import pytest

from cai_ray import constitution
from cai_ray.config.load import load_config, validate
from cai_ray.errors import InputError


def test_overrides_reach_nested_values_and_read_numbers_as_people_write_them() -> None:
    loaded = load_config(
        "errand-town", ["ppo.kl_coef=1e-3", "label.judge.clamp=null", "sft.lora.rank=4"], seed=5
    )
    assert loaded.ppo.kl_coef == 1e-3 and loaded.label.judge.clamp is None and loaded.seed == 5
    assert loaded.sft.lora and loaded.sft.lora.rank == 4


def test_an_unknown_key_names_the_nearest() -> None:
    with pytest.raises(InputError, match=r"unknown key 'sft.lora.rnak'; did you mean 'rank'"):
        load_config("errand-town", ["sft.lora.rnak=4"])
    with pytest.raises(InputError, match="unknown key 'pompts'; did you mean 'prompts'"):
        load_config("errand-town", ["pompts=1"])
    with pytest.raises(InputError, match=r"unknown key 'label.principles'; did you mean 'judge.principles'"):
        load_config("errand-town", ["label.principles=all"])


def test_what_does_not_divide_is_said_with_what_would() -> None:
    with pytest.raises(InputError, match=r"multiple of ppo.minibatch"):
        load_config("errand-town", ["ppo.minibatch=100"])


def test_a_resolved_configuration_reads_back_as_itself() -> None:
    loaded = load_config("errand-town")
    assert validate(loaded.model_dump(mode="json"), "x") == loaded


@pytest.mark.parametrize("name", ["errand-town", "harmless"])
def test_shipped_constitutions_are_valid_and_round_trip(tmp_path: Path, name: str) -> None:
    document = constitution.load(name)
    (tmp_path / "c.yaml").write_text(document.to_yaml())
    assert constitution.load(tmp_path / "c.yaml") == document
    assert document.sha == constitution.load(tmp_path / "c.yaml").sha


def test_the_hash_covers_what_matters() -> None:
    document = constitution.load("errand-town")

    def with_first(**update: object) -> str:
        first, *others = document.principles
        return document.model_copy(update={"principles": (first.model_copy(update=update), *others)}).sha

    assert with_first(source="elsewhere", tags=("x",), title="Other") == document.sha
    hashes = {
        with_first(**u)
        for u in (
            {"text": "x"},
            {"comparison": "x"},
            {"weight": 2.0},
            {"enabled": False},
            {"critique_request": "x"},
        )
    }
    assert len(hashes) == 5 and document.sha not in hashes


def test_harmless_has_16_principles_each_with_its_source() -> None:
    principles = constitution.load("harmless").principles
    assert len(principles) == 16
    assert all(p.source for p in principles)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[1, 2]", "a mapping"),
        ("name: x\nprinciples: []", "principles"),
        ("{unclosed", "cannot be read"),
        ("name: x\nprinciples: [{id: a b}]", "principles.0"),
    ],
)
def test_a_bad_constitution_is_one_clear_error(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(InputError, match=says):
        constitution.load(tmp_path / "c.yaml")


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("label.judge.clamp=[0.7, 0.3]", "two rising probabilities"),
        ("label.judge.clamp=[0.1, 2]", "two rising probabilities"),
        ("sft.betas=[5, 7]", "less than 1"),
        ("ppo.kl_coef=.inf", "finite"),
        ("engine.block_size=-5", "greater than 0"),
        ("ppo.advantage=rloo", "set group to 2 or more"),
        ("ppo.group=7", "not a multiple of group"),
        ("sft.init=rl", "not made yet"),
        ("rm.init=rm", "not made yet"),
        ("label.judge.model=rm", "not made yet"),
    ],
)
def test_values_that_no_stage_could_use(override: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        load_config("errand-town", [override])


def test_two_principles_with_one_id(tmp_path: Path) -> None:
    document = constitution.load("errand-town").to_yaml()
    (tmp_path / "c.yaml").write_text(document.replace("id: privacy", "id: property"))
    with pytest.raises(InputError, match="occurs twice"):
        constitution.load(tmp_path / "c.yaml")
