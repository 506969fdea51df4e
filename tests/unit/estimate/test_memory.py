"""The memory arithmetic against models that are really built, and against the numbers everybody knows."""

from __future__ import annotations

from pathlib import Path

import pytest

from cai_ray.config.engine import EngineConfig
from cai_ray.config.load import load_config, validate
from cai_ray.config.run import RunConfig
from cai_ray.config.training import LoraConfig, TrainConfig
from cai_ray.errors import InputError
from cai_ray.estimate import fit, memory
from cai_ray.estimate.shape import Shape, shape_of
from tests import tiny

LLAMA_8B = Path(__file__).parents[3] / "jobs" / "configs" / "llama-8b-8gpu.yaml"


def load(*overrides: str) -> RunConfig:
    return load_config(LLAMA_8B, list(overrides))


@pytest.fixture(scope="module")
def llama_8b() -> Shape:
    return shape_of(load(), "base")


def test_parameters_of_llama_8b(llama_8b: Shape) -> None:
    assert llama_8b.params == 8_030_261_248
    assert llama_8b.head == 128_256 * 4096


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_trained_parameter_costs_16_bytes(llama_8b: Shape, dtype: str) -> None:
    parts = memory.trained(llama_8b, TrainConfig(dtype=dtype, zero_stage=0), gpu=True)
    states = parts["weights"] + parts["gradients"] + parts["optimizer"]
    assert states == 16 * llama_8b.params


def test_zero_divides_optimizer_then_gradients_then_weights(llama_8b: Shape) -> None:
    for stage in range(4):
        parts = memory.trained(llama_8b, TrainConfig(dtype="bfloat16", zero_stage=stage, workers=8), gpu=True)
        shares = [8 if stage >= least else 1 for least in (1, 2, 3)]
        found = [parts["optimizer"] * 1 / 12, parts["gradients"] / 2, parts["weights"] / 2]
        assert found == [pytest.approx(llama_8b.params / n) for n in shares]


def test_full_ppo_of_8b_is_some_290_gb() -> None:
    cfg = load("ppo.lora=null", "ppo.workers=1", "ppo.zero_stage=0")
    need = next(
        n
        for n in memory.memory_needs(cfg, lambda role: shape_of(cfg, role), gpu=True)
        if (n.stage, n.role) == ("ppo", "trainer")
    )
    held = sum(need.parts[k] for k in ("weights", "gradients", "optimizer", "frozen"))
    assert held / 1e9 == pytest.approx(280, abs=10)


def test_dpo_keeps_one_model() -> None:
    cfg = load("method=dpo", "dpo.dtype=bfloat16", "dpo.zero_stage=0", "dpo.workers=1")
    needs = memory.memory_needs(cfg, lambda role: shape_of(cfg, role), gpu=True)
    stages = [n.stage for n in needs]
    assert "dpo" in stages and not {"rm", "ppo"} & set(stages)
    parts = needs[stages.index("dpo")].parts
    assert sum(parts[k] for k in ("weights", "gradients", "optimizer")) == 16 * 8_030_261_248
    assert "frozen" not in parts, "the reference is a column of numbers"


def test_an_engine_over_several_gpus_and_quantised(llama_8b: Shape) -> None:
    def need(**settings: object) -> memory.MemoryNeed:
        return memory.engine_need(
            "label", "engine", llama_8b, EngineConfig.model_validate(settings), gpu=True
        )

    alone, split = need(), need(tensor_parallel=2, pipeline_parallel=4)
    assert (alone.gpus, split.gpus) == (1, 8)
    for part in ("weights", "kv cache"):
        assert split.parts[part] == alone.parts[part] / 8
    assert alone.parts["weights"] == 2 * llama_8b.params
    assert need(quantization="fp8").parts["weights"] == llama_8b.params


def test_rollouts_have_the_trainers_precision() -> None:
    cfg = load("engine.quantization=fp8", "ppo.dtype=bfloat16")
    found = {
        (n.stage, n.role): n.parts["weights"]
        for n in memory.memory_needs(cfg, lambda role: shape_of(cfg, role), gpu=True)
    }
    assert found["ppo", "rollouts"] == 2 * found["revise", "engine"]


def test_adapter_is_counted_as_peft_makes_it(tmp_path: Path) -> None:
    from cai_ray.train.models import load_policy

    folder = tiny.save_model(tmp_path / "model")
    cfg = TrainConfig(lora=LoraConfig(rank=4))
    model = load_policy(str(folder), cfg)
    made = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert memory.adapter(shape_of(_tiny(folder), "base"), cfg) == made


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_tiny_models_are_counted_as_they_are(tmp_path: Path, family: tiny.Family) -> None:
    from cai_ray.train.models import load_policy

    folder = tiny.save_model(tmp_path / family, family)
    shape = shape_of(_tiny(folder), "base")
    assert shape.params == sum(p.numel() for p in load_policy(str(folder), TrainConfig()).parameters())


def test_activations_are_an_estimate_from_above(tmp_path: Path) -> None:
    """Against the bytes that autograd really keeps between forward and backward."""
    import torch

    from cai_ray.train.models import load_policy

    folder = tiny.save_model(tmp_path / "model")
    model = load_policy(str(folder), TrainConfig())
    weights = {p.data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.randint(5, 200, (4, 128))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        hidden = model.model(input_ids=ids).last_hidden_state
    assert hidden.requires_grad
    cfg = TrainConfig(micro_batch_tokens=ids.numel())
    estimate = memory.trained(shape_of(_tiny(folder), "base"), cfg, gpu=False)["activations"]
    assert 0.7 * estimate <= sum(kept.values()) <= 1.15 * estimate


def test_the_shipped_8b_configuration_fits() -> None:
    lines = fit.memory_lines(load())
    assert lines[-1] == "fits on 8 GPUs of 79 GiB"
    assert any(line.startswith("ppo      rollouts") for line in lines)


@pytest.mark.parametrize(
    "setting",
    ["ppo.lora=null", "sft.gradient_checkpointing=false", "check.gpu_gib=15", "ppo.rollout_engines=5"],
)
def test_what_does_not_fit_is_said_with_a_remedy_that_does(setting: str) -> None:
    with pytest.raises(InputError, match="what fits: ") as told:
        fit.memory_lines(load(setting))
    stage = str(told.value).split(" ")[0].rstrip(":")
    remedy = str(told.value).split("what fits: ")[1].split(", or ")[0].split(" ")
    cfg = load(setting, *remedy)
    needs = [
        n for n in memory.memory_needs(cfg, lambda role: shape_of(cfg, role), gpu=True) if n.stage == stage
    ]
    assert fit.misfits(needs, 8, cfg.check.gpu_gib or 0) == []


def test_an_unknown_model_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"check\.model"):
        fit.memory_lines(load("check.model=null", "model=nobody/nothing"))


def _tiny(folder: Path) -> RunConfig:
    return validate(
        {"name": "t", "model": str(folder), "constitution": "harmless", "prompts": [{"path": "x"}]}, "test"
    )


def test_a_reviser_needs_room_of_its_own_unless_it_is_at_an_endpoint() -> None:
    def engines(*overrides: str) -> list[tuple[str, float]]:
        cfg = load(*overrides)
        needs = memory.memory_needs(cfg, lambda role: shape_of(cfg, "base"), gpu=True)
        return [(n.stage, n.parts["weights"]) for n in needs if n.stage in ("revise", "reviser")]

    served = "revise.reviser={model: big, engine: {kind: openai, base_url: 'http://h/v1'}}"
    assert engines() == engines(served) and len(engines()) == 1
    quantised = "revise.reviser={model: big, engine: {quantization: fp8}}"
    (_, whole), (stage, half) = engines(quantised)
    assert stage == "reviser" and half == pytest.approx(whole / 2)


def test_a_reviser_that_does_not_fit_is_one_line() -> None:
    cfg = load("check.gpu_gib=40", "ppo.lora={rank: 4}", "sft.zero_stage=3", "rm.zero_stage=3")
    needs = [memory.MemoryNeed("reviser", "engine", 1, 1, {"weights": 50.0 * memory.GIB})]
    line = fit._remedies(cfg, lambda role: shape_of(cfg, "base"), needs, 8, 40.0)
    assert line == "use a smaller model or larger GPUs" or line.startswith("what fits: ")
