"""The steps that a family is taken through: one update of every trainer, saved and loaded again; PPO with its engine.

They are the stages' own functions, without Ray: this process is the only rank, and vLLM runs in a second process, as in
PPO. Models are tiny, so that a step takes a second.
"""

from __future__ import annotations

import math
import os
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from cai_ray.config.ppo import PpoConfig
from cai_ray.config.training import DpoConfig, LoraConfig, RmConfig, SftConfig, TrainConfig
from cai_ray.engine.vllm import engine_args
from cai_ray.errors import InputError
from cai_ray.prompts.messages import Message
from cai_ray.prompts.renderer import Renderer
from cai_ray.train import dpo, rm, sft
from cai_ray.train.batches import Example, pad
from cai_ray.train.dialogues import pack
from cai_ray.train.families.examine import Case
from cai_ray.train.families.process import Remote, StepError
from cai_ray.train.models import (
    RewardScale,
    load_policy,
    load_reference,
    load_reward_model,
    load_value_model,
)
from cai_ray.train.pairs import Pairs
from cai_ray.train.ppo.experience import make_batch, make_targets, plan_epochs
from cai_ray.train.ppo.rewards import Reward
from cai_ray.train.ppo.rollout_engine import Request, Rollout
from cai_ray.train.ppo.rollouts import most_moved
from cai_ray.train.ppo.scoring import Models, check_gap, probe_logprobs, score
from cai_ray.train.ppo.update import update_policy, update_value
from cai_ray.train.runtime.engine import Trained, distribute
from cai_ray.train.runtime.ranks import to_device
from cai_ray.train.sequences import score_last, sequence_logprobs, sequence_values
from cai_ray.train.weights import object_store
from cai_ray.train.weights.proof import TOLERANCE, EngineWeights, digests_of, prove
from cai_ray.train.weights.state import gathered_state, save_model

DIALOGUES = (
    ("name a colour", "red"),
    ("what goes with rice? say it slowly and in many words, please", "beans, or peas and a little salt"),
    ("name a colour", "the sky has one, and so has grass"),
    ("what goes with rice? say it slowly and in many words, please", "no"),
)
"""Made-up turns of user and assistant. The first two are comparison a and b of one pair, the last two of another."""
ANSWER_TOKENS = 12
ENGINE_TIMEOUT_S = 240.0


class Steps:
    """Takes one folder through steps of the table (`table.STEPS`), in a process of its own (`examine.examine`)."""

    def __init__(self, case: Case):
        os.environ.setdefault("LOCAL_RANK", "0")
        dist.init_process_group("nccl" if case.gpu else "gloo", store=dist.HashStore(), rank=0, world_size=1)
        self._case = case
        self._renderer = renderer = Renderer(case.folder, case.chat_template)
        turns = [
            (Message(role="user", content=user), Message(role="assistant", content=answer))
            for user, answer in DIALOGUES
        ]
        self._prompts = [renderer.prompt_ids([user]) for user, _ in turns]
        self._dialogues = pack(Example(*renderer.dialogue_ids(list(turn))) for turn in turns)
        labels, human = np.asarray([0.9, 0.2]), np.zeros(2, bool)
        self._pairs = Pairs(self._dialogues, labels, human, renderer.pad_id)
        self._pool: EnginePool | None = None

    def run(self, step: str) -> None:
        """Takes a step; whatever it raises is the reason why the family is refused."""
        name, _, lora = step.partition("_")
        trainers = {"sft": self._sft, "rm": self._rm, "dpo": self._dpo, "ppo": self._ppo}
        try:
            if name == "engine":
                self._engine()
            else:
                trainers[name]({"lora": LoraConfig(rank=4, alpha=8)} if lora else {})
        except InputError as e:
            raise StepError(self._reason(e, self._case.folder)) from e

    def _engine(self) -> None:
        for rollout in self._open_engine().sample(self._requests(), None):
            if not rollout.ids or not all(map(math.isfinite, rollout.logprobs)):
                raise StepError("the engine's log-probabilities are not numbers")

    def _sft(self, changes: dict[str, Any]) -> None:
        cfg = SftConfig(**self._settings(), **changes)
        policy = distribute(load_policy(self._case.folder, cfg), cfg, 1)
        _, norm = sft.update(policy, self._dialogues, [0, 1, 2, 3], cfg, self._renderer.pad_id)
        self._check_update(policy, norm, self._logprobs, load_policy)

    def _rm(self, changes: dict[str, Any]) -> None:
        cfg = RmConfig(**self._settings(), **changes)
        model = distribute(load_reward_model(self._case.folder, cfg), cfg, 1)
        _, norm = rm.update(model, self._pairs, [0, 1], cfg)
        self._check_update(model, norm, self._scores, load_reward_model)

    def _dpo(self, changes: dict[str, Any]) -> None:
        cfg = DpoConfig(**self._settings(), **changes)
        policy = distribute(load_policy(self._case.folder, cfg), cfg, 1)
        reference = dpo.response_logprobs(policy, self._pairs, cfg)
        _, norm = dpo.update(policy, self._pairs, reference, [0, 1], cfg)
        self._check_update(policy, norm, self._logprobs, load_policy)

    def _ppo(self, changes: dict[str, Any]) -> None:
        """Two sends of the policy's weights, and between them a step on what the engine sampled."""
        sizes = {"rollout_batch": len(DIALOGUES), "minibatch": 2, "max_tokens": ANSWER_TOKENS}
        settings = {**self._settings(), **sizes, "epochs": 1, "steps": 1, "value_init": "policy", **changes}
        cfg = PpoConfig(**settings)
        pool = self._open_engine()
        try:
            self._ppo_step(pool, cfg)
        except Exception:  # perhaps half of the weights arrived: the next step gets an engine of its own
            pool.close()
            self._pool = None
            raise

    def _ppo_step(self, pool: EnginePool, cfg: PpoConfig) -> None:
        folder, pad_id = self._case.folder, self._renderer.pad_id
        models = Models(
            policy=distribute(load_policy(folder, cfg), cfg, 2),
            value=self._value_model(cfg),
            reference=None if cfg.lora else load_reference(folder, cfg),
            rewards=[Reward("made up", _Remainder(), RewardScale(0.0, 1.0), 1.0, pad_id, None)],
        )
        self._send(models.policy, pool, cfg, self._prompts, None)
        batch = make_batch(self._prompts, pool.sample(self._requests(), pool.version))
        plan = plan_epochs(batch.lengths, cfg, seed=0, step=0)[0]
        scores, _, _ = score(models, batch, [], plan, cfg, pad_id)
        check_gap(scores, batch, fresh=True, cfg=cfg)
        targets = make_targets(batch, scores, cfg, cfg.kl_coef)
        probes = self._prompts + most_moved(batch, targets)
        before = probe_logprobs(models.policy, probes, cfg, pad_id)
        update_policy(models.policy, batch, targets, plan, cfg, pad_id)
        if models.value:
            update_value(models.value, batch, targets, plan, cfg, pad_id, cfg.value_clip)
        self._send(models.policy, pool, cfg, probes, before)

    def _value_model(self, cfg: PpoConfig) -> Trained | None:
        """None for a family without a class that scores: its runs take the value model from a reward model."""
        from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, AutoConfig

        if (
            type(AutoConfig.from_pretrained(self._case.folder))
            not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
        ):
            return None
        return distribute(load_value_model(self._case.folder, cfg, from_reward=False), cfg, 2)

    def _send(
        self,
        policy: Trained,
        pool: EnginePool,
        cfg: PpoConfig,
        probes: list[list[int]],
        before: list[Tensor] | None,
    ) -> None:
        """Sends the policy's weights and proves that they arrived (`rollouts.send_and_prove`)."""
        now = probe_logprobs(policy, probes, cfg, self._renderer.pad_id)
        pool.load(list(object_store.pack(gathered_state(policy), cfg.dtype)))
        digests = digests_of(gathered_state(policy), cfg.dtype)
        prove(pool, digests, pool.version, probes, now, before, TOLERANCE[cfg.dtype])

    def _open_engine(self) -> EnginePool:
        if self._pool is None:
            engine = self._case.engine.model_copy(update={"dtype": self._case.dtype})
            arguments = engine_args(self._case.folder, engine, self._case.gpu)
            if self._case.gpu:  # the trainer is on the same one
                arguments.setdefault("gpu_memory_utilization", 0.4)
            self._pool = EnginePool(self._case.folder, arguments, self._renderer.end_id)
        return self._pool

    def _requests(self) -> list[Request]:
        return [Request(ids, seed) for seed, ids in enumerate(self._prompts)]

    def _settings(self) -> dict[str, Any]:
        return {"dtype": self._case.dtype, "learning_rate": 1e-3, "micro_batch_tokens": 4096}

    def _check_update(self, trained: Trained, norm: float, numbers: Any, load: Any) -> None:
        """Checks that an update took place, and that what is saved is loaded again by transformers as it is here.

        Args:
            norm: the gradient's norm.
            numbers: what to compare, from a model.
            load: loads the saved folder as a frozen model (models.py).
        """
        if not (math.isfinite(norm) and norm > 0):
            raise StepError(f"the gradient's norm is {norm:g}")
        dtype = self._case.dtype
        with TemporaryDirectory() as out, torch.no_grad():
            save_model(trained, self._case.folder, out)
            here = numbers(trained.module)
            try:
                loaded = load(out, TrainConfig(dtype=dtype), trainable=False)
            except InputError as e:
                raise StepError(f"what was saved is not whole: {self._reason(e, out)}") from e
            there = numbers(loaded)
        gap = float((here - there).abs().mean())
        if not gap <= TOLERANCE[dtype].mean:
            raise StepError(f"what was saved and loaded again differs by {gap:.2g} in the mean")

    def _reason(self, error: InputError, folder: str) -> str:
        """An error about a folder without the folder, which is a copy, and without its remedy."""
        return str(error).removeprefix(f"model {folder}: ").partition("; ")[0]

    def _logprobs(self, model: nn.Module) -> Tensor:
        batch = self._rows()
        return sequence_logprobs(model, batch)[batch["loss_mask"] > 0].float().cpu()

    def _scores(self, model: nn.Module) -> Tensor:
        batch = self._rows()
        return score_last(sequence_values(model, batch), batch["attention_mask"]).float().cpu()

    def _rows(self) -> dict[str, Tensor]:
        rows = self._dialogues
        return to_device(pad([rows[i] for i in range(len(rows))], self._renderer.pad_id))


class EnginePool:
    """One rollout engine in a process of its own, as the proof asks for it (`ppo.pool.Pool`)."""

    epoch = 0

    def __init__(self, folder: str, arguments: dict[str, Any], end_id: int):
        self.version = 0
        factory = "cai_ray.train.ppo.rollout_engine:RolloutEngine"
        self._engine = Remote(factory, (folder, arguments, end_id), ENGINE_TIMEOUT_S)
        self._call = partial(self._engine.call)

    def load(self, chunks: list[Any]) -> None:
        """Loads packed tensors as the next version."""
        self.version += 1
        self._call("load", self.epoch, self.version, chunks)

    def sample(self, requests: list[Request], version: int | None) -> list[Rollout]:
        """One response per request; version None: with the weights that the engine was started with."""
        return self._call("sample", self.epoch, version, requests, 1.0, ANSWER_TOKENS)  # type: ignore[no-any-return]

    def report(self, probes: list[list[int]], version: int) -> list[tuple[EngineWeights, list[list[float]]]]:
        return [self._call("report", self.epoch, version, probes)]

    def close(self) -> None:
        self._engine.close()


class _Remainder(nn.Module):
    """A made-up reward: a number that depends on the token alone."""

    def forward(self, input_ids: Tensor, **_: Tensor) -> Tensor:
        return (input_ids % 7).float() - 3
