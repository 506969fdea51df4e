"""What PPO's loop goes on from after a stop."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from cai_ray.config.ppo import PpoConfig
from cai_ray.constitution import load as load_constitution
from cai_ray.storage import files
from cai_ray.storage.run import Run
from cai_ray.storage.tables import delete_rows
from cai_ray.train.advantages import next_kl_coef
from cai_ray.train.ppo.alarms import Snapshot
from cai_ray.train.ppo.rollout_engine import Rollout
from cai_ray.train.runtime.checkpoints import checkpoint_due, restore, save_checkpoint, wait_until_saved
from cai_ray.train.runtime.ranks import rank

if TYPE_CHECKING:
    from cai_ray.train.ppo.rollouts import Rollouts
    from cai_ray.train.ppo.scoring import Models
    from cai_ray.train.ppo.watch import Watch
    from cai_ray.train.runtime.metrics import Log


@dataclass
class State:
    """The loop's own part of a checkpoint, beside models, optimizers, schedules and random numbers.

    The prompts of each step and the seeds of their responses follow from the step alone (`experience.draw`).
    """

    kl_coef: float
    """Coefficient of the KL penalty in the next step."""
    step: int = 0
    """Steps that are done."""
    log: list[dict[str, Any]] = field(default_factory=list)
    """Metrics of these steps, one row each."""
    tokens: int = 0
    """Tokens that the policy has generated in them."""
    prompts_consumed: int = 0
    ahead: list[Rollout] | None = None
    """Responses for the next step that were sampled with older weights (`ppo.async_steps`)."""
    snapshots: list[Snapshot] = field(default_factory=list)
    reward_scales: list[tuple[float, float]] = field(default_factory=list)
    """Mean and standard deviation of each reward model's reference set."""
    constitution_sha: str = ""

    @classmethod
    def restore(cls, models: Models, cfg: PpoConfig) -> State:
        """Loads the last checkpoint into the models and returns its state; without one, the state of a new run."""
        saved = restore(models.trained)
        return cls(**saved) if saved else cls(kl_coef=cfg.kl_coef)

    def finish_step(self, tokens: int, kl_reference: float, cfg: PpoConfig) -> None:
        """Counts a step and sets the KL coefficient of the next one.

        Args:
            tokens: generated in the step.
            kl_reference: mean over its responses of the KL from the reference, summed over their tokens.
        """
        self.step += 1
        self.tokens += tokens
        self.prompts_consumed += cfg.rollout_batch
        self.kl_coef = next_kl_coef(
            self.kl_coef,
            kl_reference,
            target=cfg.kl_target,
            horizon=cfg.kl_horizon,
            rows=cfg.rollout_batch,
        )

    def save_if_due(
        self, run: Run, models: Models, log: Log, rollouts: Rollouts, watch: Watch, last: bool
    ) -> None:
        """Saves a checkpoint if one is due or an alarm may end the stage; every rank calls it alike.

        After an alarm the same command goes on from this checkpoint, so it must count before the stage ends.

        Args:
            last: whether this was the last step, after which the stage's result is written anyway.
        """
        alarmed = watch.alarmed_at(self.step)
        due = checkpoint_due(self.step, run.config.ppo.checkpoint_every or 10)
        if not alarmed and (last or not due):
            return
        self.log = log.rows
        self.ahead = rollouts.ahead(self.step)
        self.snapshots = watch.history
        self.reward_scales = [
            (scale.mean, scale.std) for scale in (reward.scale for reward in models.rewards)
        ]
        self.constitution_sha = load_constitution(run.config.constitution).sha
        save_checkpoint(models.trained, self.to_checkpoint(), self.step)
        watch.saved()
        if alarmed:
            wait_until_saved()
            log.write()

    def summary(self, cfg: PpoConfig, log: Log) -> dict[str, Any]:
        """What the manifest says of the steps: their number of rollouts and tokens, and the metrics of the last."""
        last = {k: v for k, v in log.rows[-1].items() if k != "step"} if log.rows else {}
        return {"metrics": last, "tokens": self.tokens, "rollouts": self.step * cfg.rollout_batch}

    def to_checkpoint(self) -> dict[str, Any]:
        """The fields by their names, as `restore` takes them back."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


def clear_leftovers(run: Run) -> None:
    """Deletes what an attempt that died before its first checkpoint left: rollouts, snapshots and their models.

    A run that begins at step 0 writes the same rows again and would mix them with these. Rank 0 deletes. An attempt
    with other settings never gets here: `provenance/attempts.py` asks for `--overwrite`.
    """
    if rank() == 0:
        for name in ("part", "snapshot"):
            delete_rows(run.path("ppo"), name)
        files.delete(run.path("ppo", "snapshots"))
