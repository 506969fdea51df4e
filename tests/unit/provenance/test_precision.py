"""`dtype: auto` is decided at a run's first start, and kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cai_ray.config.load import load_config
from cai_ray.config.run import RunConfig
from cai_ray.provenance import precision
from cai_ray.provenance.inputs import own_inputs
from cai_ray.provenance.precision import bf16_unit, decide_precision
from cai_ray.storage.run import Run

AUTO = ("engine", "sft", "rm", "dpo", "ppo")


@pytest.fixture(autouse=True)
def _on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "on_gpu", lambda engine: engine.device == "gpu")
    monkeypatch.setattr(precision, "uses_gpu", lambda config: config.engine.device == "gpu")


def processor(monkeypatch: pytest.MonkeyPatch, unit: str | None) -> None:
    monkeypatch.setattr(precision, "bf16_unit", lambda: unit)


def load(out: Path, *overrides: str, **top: Any) -> RunConfig:
    auto = [f"{section}.dtype=auto" for section in AUTO]
    return load_config("errand-town", [*auto, *overrides], out=str(out), **top)


@pytest.mark.parametrize(
    ("cpuinfo", "unit"),
    [
        ("processor\t: 0\nflags\t\t: fpu avx2 avx512_bf16 amx_bf16 amx_tile\n", "amx_bf16"),
        ("processor\t: 0\nflags\t\t: fpu avx2 avx512f avx512_bf16\n", "avx512_bf16"),
        ("processor\t: 0\nFeatures\t: fp asimd bf16 i8mm\n", "bf16"),
        ("processor\t: 0\nmodel name\t: amx_bf16\nflags\t\t: fpu avx2 avx512f\n", None),
        ("", None),
    ],
)
def test_the_units_of_a_processor_are_read(tmp_path: Path, cpuinfo: str, unit: str | None) -> None:
    (tmp_path / "cpuinfo").write_text(cpuinfo)
    assert bf16_unit(str(tmp_path / "cpuinfo")) == unit
    assert bf16_unit(str(tmp_path / "none")) is None


@pytest.mark.parametrize(("unit", "dtype"), [("amx_bf16", "bfloat16"), (None, "float32")])
def test_auto_is_what_the_processor_is_good_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unit: str | None, dtype: str
) -> None:
    processor(monkeypatch, unit)
    judge = 'label.judge.engine={"max_num_seqs": 4}'
    endpoint = (
        'evaluate.judge={"model": "m", "engine": {"kind": "openai", "base_url": "https://x.example/v1"}}'
    )
    decided = decide_precision(load(tmp_path, judge, "evaluate.gold=null", endpoint))
    config = decided.config
    assert all(getattr(config, section).dtype == dtype for section in AUTO)
    assert config.label.judge.engine is not None and config.label.judge.engine.dtype == dtype
    assert config.rollout_engine.dtype == dtype
    assert decided.precision == dict.fromkeys((*AUTO, "label.judge.engine"), dtype)
    assert decided.line.startswith(f"dtype auto: {dtype}") and "processor has" in decided.line
    assert ("float32" in decided.line.partition("master")[2]) == (dtype == "bfloat16")


def test_what_is_set_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    processor(monkeypatch, "amx_bf16")
    decided = decide_precision(load_config("errand-town", out=str(tmp_path)))
    assert decided.config == load_config("errand-town", out=str(tmp_path)), "the demo's precision is set"
    assert decided.precision == {} and decided.line == ""
    config = decide_precision(load(tmp_path, "sft.dtype=float32")).config
    assert (config.sft.dtype, config.rm.dtype) == ("float32", "bfloat16")


def test_a_run_keeps_its_precision_on_another_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor(monkeypatch, "amx_bf16")
    begun = decide_precision(load(tmp_path))
    (tmp_path / "run.json").write_text(
        json.dumps({"config": begun.config.model_dump(mode="json"), "precision": begun.precision})
    )
    processor(monkeypatch, None)
    resumed = decide_precision(load(tmp_path))
    assert resumed.config == begun.config and resumed.precision == begun.precision
    assert "bfloat16" in resumed.line and "as this run began" in resumed.line
    other = decide_precision(load(tmp_path / "other"))
    assert other.config.sft.dtype == "float32"
    # What was not asked for then is decided now.
    more = decide_precision(load(tmp_path, 'label.judge.engine={"max_num_seqs": 4}'))
    assert more.precision == {**begun.precision, "label.judge.engine": "float32"}


def test_a_damaged_note_is_decided_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    processor(monkeypatch, None)
    for text in ("{ torn", '{"precision": 3}', '{"precision": {"sft": "int1"}}'):
        (tmp_path / "run.json").write_text(text)
        assert decide_precision(load(tmp_path)).config.sft.dtype == "float32"


def test_results_depend_on_the_decided_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashes = {}
    for unit in ("amx_bf16", None):
        processor(monkeypatch, unit)
        hashes[unit] = own_inputs(Run(decide_precision(load(tmp_path)).config), "sft")
    same = load_config("errand-town", ["engine.dtype=float32"], out=str(tmp_path))
    assert hashes["amx_bf16"]["sft"] != hashes[None]["sft"] == own_inputs(Run(same), "sft")["sft"]


def test_on_a_gpu_an_engine_takes_the_checkpoints_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor(monkeypatch, None)
    decided = decide_precision(load(tmp_path, "engine.device=gpu"))
    assert decided.config.engine.dtype == "auto" == decided.precision["engine"]
    assert decided.config.sft.dtype == "bfloat16" and "on GPUs" in decided.line
