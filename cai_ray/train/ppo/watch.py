"""Snapshots of the policy while PPO runs, rated by a second opinion that PPO does not train against.

Every `ppo.watch.every` steps the policy answers development prompts. The second opinion on its responses comes from
a judge, which compares them with the SL-CAI policy's, or from another reward model. The embedded world's exact judge
is never used here (`evaluate` reads the same responses afterwards). The snapshot with the best opinion is the
stage's result. An alarm shows when the policy leaves what its reward stands for (alarms.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cai_ray.data.sources import read_prompts
from cai_ray.errors import InputError, Stopped
from cai_ray.prompts.cut import decode_answer
from cai_ray.prompts.load import load_templates
from cai_ray.prompts.renderer import Renderer
from cai_ray.storage import files
from cai_ray.storage.arrow import to_table
from cai_ray.storage.records import SnapshotRow, derive_id, derive_seed
from cai_ray.storage.run import Run
from cai_ray.storage.tables import write_table
from cai_ray.train.batches import rank_micro_batches
from cai_ray.train.ppo.alarms import Snapshot, alarms, best_of, measure
from cai_ray.train.ppo.experience import make_batch
from cai_ray.train.ppo.prompts import Prompt, encode_prompts
from cai_ray.train.ppo.rewards import Reader, Reward, combined, load_reward, make_reader, raw_scores
from cai_ray.train.ppo.rollout_engine import Request
from cai_ray.train.ppo.rollouts import Rollouts
from cai_ray.train.ppo.scoring import Models
from cai_ray.train.runtime.metrics import warn
from cai_ray.train.runtime.ranks import from_first, rank, world_size
from cai_ray.train.weights.state import save_model


def read_watch_prompts(run: Run, renderer: Renderer, readers: Sequence[Reader]) -> list[Prompt]:
    """The development prompts with their token ids.

    Args:
        readers: readers of the reward models that read text (`rewards.make_readers`).

    Raises:
        InputError: no prompt can be used.
    """
    cfg = run.config.ppo.watch
    if not cfg.asks_judge and (second := make_reader(run, run.config.ppo, renderer, cfg.opinion)):
        readers = [*readers, second]
    rows = read_prompts(cfg.prompts, run.config.seed)
    rows = sorted(rows, key=lambda row: derive_id(run.config.seed, "watch", row["id"]))[: cfg.limit]
    ready = list(encode_prompts(run, renderer, rows, readers))
    if not ready:
        raise InputError("ppo.watch.prompts: no prompt can be encoded and fits the context; give others")
    return ready


class Watch:
    """Measures the policy every `ppo.watch.every` steps and keeps its best model; with 0 it does nothing.

    Every rank has one and makes every call alike.

    Args:
        args: what the loop was given: `watch_prompts`, and `judge`, the judge's actor, if that gives the second
            opinion.
        rollouts: whose engines answer the prompts; they hold the policy's weights and are idle.
        history: the snapshots of the checkpoint that the run goes on from.
    """

    def __init__(
        self,
        run: Run,
        args: dict[str, Any],
        renderer: Renderer,
        models: Models,
        rollouts: Rollouts,
        history: Sequence[Snapshot],
    ):
        self.run, self.cfg, self.renderer = run, run.config.ppo, renderer
        self.policy, self.rewards, self.rollouts = models.policy, models.rewards, rollouts
        self.history = [Snapshot(*s) for s in history]
        self.before: list[str] = []
        """The SL-CAI policy's responses."""
        self._needed = self._best() if self.history else 0
        """The best of the last checkpoint that counts."""
        watch = self.cfg.watch
        if not watch.every:
            return
        self.prompts: list[Prompt] = args["watch_prompts"]
        self.judge = args["judge"]
        self.refusals = load_templates(run.config.templates).refusals
        self.second = None if watch.asks_judge else load_reward(run, self.cfg, renderer, watch.opinion)
        if self.history:
            rows = self.run.rows("ppo", name="snapshot")
            first = {row["prompt_id"]: row["response"] for row in rows if row["step"] == 0}
            self.before = [first[p["id"]] for p in self.prompts]

    def start(self) -> None:
        """Measures the SL-CAI policy, which the engines hold, if there is no snapshot yet."""
        if self.cfg.watch.every and not self.history:
            self.take_snapshot(0)

    def snapshot_if_due(self, step: int, total: int) -> dict[str, float]:
        """Takes a snapshot every `ppo.watch.every` steps and after the last step; returns its metrics, or none."""
        every = self.cfg.watch.every
        return self.take_snapshot(step) if every and (step % every == 0 or step == total) else {}

    def take_snapshot(self, step: int) -> dict[str, float]:
        """Measures the policy after so many steps, which the engines hold as weights number `step`.

        Its model is kept if it is the best until now.

        Raises:
            Stopped: the judge answers about no response.
        """
        cfg = self.cfg
        requests = [
            Request(p["ids"], derive_seed(self.run.config.seed, "watch", p["id"])) for p in self.prompts
        ]
        rollouts = self.rollouts.sample(requests, step)
        batch = make_batch([p["ids"] for p in self.prompts], rollouts)
        texts = [decode_answer(self.renderer, r.ids, r.truncated) for r in rollouts]
        conversations = [p["messages"] for p in self.prompts]
        groups = rank_micro_batches(batch.lengths, cfg.micro_batch_tokens, rank(), world_size())

        def scores(models: Sequence[Reward]) -> list[float]:
            raw = raw_scores(models, batch, conversations, groups, cfg)
            return combined(raw, models, cfg.reward_clip).tolist()

        reward = scores(self.rewards)
        opinions: Sequence[float | None] = (
            self._labels(texts) if self.second is None else scores([self.second])
        )
        labelled = [o for o in opinions if o is not None]
        if not labelled:
            raise Stopped(f"step {step}: the judge answers about none of {len(texts)} development responses")
        snapshot = measure(
            step,
            texts,
            reward=sum(reward) / len(reward),
            opinion=sum(labelled) / len(labelled),
            lengths=[len(r.ids) for r in rollouts],
            truncated=[r.truncated for r in rollouts],
            benign=[p["kind"] == "helpful" for p in self.prompts],
            refusals=self.refusals,
        )
        if not self.history:
            self.before = texts
        if rank() == 0:
            self._write(step, texts, [r.truncated for r in rollouts], reward, opinions)
        self.history.append(snapshot)
        if self._best() == step:
            save_model(self.policy, self.run.model("sl"), self._folder(step))
        raised = self.alarms()
        for alarm in raised if rank() == 0 else ():
            warn(f"ppo: step {step}: {alarm}")
        return self._numbers(snapshot) | {"watch/alarms": len(raised)}

    def alarms(self) -> list[str]:
        """The alarms of the last snapshot; none before there is one."""
        return alarms(self.history, self.cfg.watch) if self.history else []

    def alarmed_at(self, step: int) -> bool:
        """Says whether a snapshot was taken after this step and raised an alarm."""
        return bool(self.history) and self.history[-1].step == step and bool(self.alarms())

    def ends(self) -> bool:
        """Says whether an alarm ends the stage with the best snapshot as its result.

        Raises:
            Stopped: it ends the stage without a result.
        """
        raised = self.alarms()
        if raised and self.cfg.watch.on_alarm == "stop":
            raise Stopped(
                f"ppo, step {self.history[-1].step}: {'; '.join(raised)}. With ppo.watch.on_alarm=finish the same "
                f"command takes the best snapshot (step {self._best()}), with on_alarm=log or a wider bound it goes on"
            )
        return bool(raised) and self.cfg.watch.on_alarm == "finish"

    def publish(self, step: int) -> int:
        """Writes the stage's model: the best snapshot, or without snapshots the policy after the last step.

        Args:
            step: the steps that are done.

        Returns:
            The step that the model is from.

        Raises:
            Stopped: an alarm ends the stage without a result (`ends`).
        """
        if not self.history:
            save_model(self.policy, self.run.model("sl"), self.run.path("ppo", "model"))
            return step
        self.ends()
        best = self._best()
        if rank() == 0:
            files.upload_folder(self._folder(best), self.run.path("ppo", "model"))
        self._keep_models({best})
        return best

    def saved(self) -> None:
        """Removes models that are no longer needed, once a checkpoint is on its way and the one before it counts.

        Models that either calls the best stay: a run that goes on from the earlier one may judge later steps otherwise.
        """
        if self.history:
            self._keep_models({self._needed, self._best()})
            self._needed = self._best()

    def _labels(self, texts: list[str]) -> list[float | None]:
        """P(the judge prefers each response to the SL-CAI policy's); one half for the SL-CAI policy itself.

        Rank 0 asks the judge.
        """
        import ray

        if not self.history:
            return [0.5] * len(texts)
        pairs = [
            {
                "id": derive_id("snapshot", p["id"], text, before),
                "messages": p["messages"],
                "response_a": text,
                "response_b": before,
            }
            for p, text, before in zip(self.prompts, texts, self.before, strict=True)
        ]
        labels: list[float | None] = from_first(
            ray.get(self.judge.prefer.remote(pairs)) if rank() == 0 else None
        )
        return labels

    def _best(self) -> int:
        """The step of the best snapshot."""
        return self.history[best_of(self.history)].step

    def _keep_models(self, steps: set[int]) -> None:
        """Removes the models of all other snapshots; rank 0 does it."""
        for snapshot in self.history if rank() == 0 else ():
            if snapshot.step not in steps:
                files.delete(self._folder(snapshot.step))

    def _folder(self, step: int) -> str:
        return self.run.path("ppo", "snapshots", f"step-{step:06d}")

    def _write(
        self,
        step: int,
        texts: list[str],
        truncated: list[bool],
        reward: list[float],
        opinions: Sequence[float | None],
    ) -> None:
        rows = [
            {
                "id": derive_id("snapshot", step, p["id"]),
                "step": step,
                "prompt_id": p["id"],
                **{key: p[key] for key in ("messages", "kind", "family")},
                "response": text,
                "truncated": is_truncated,
                "reward": score,
                "opinion": opinion,
            }
            for p, text, is_truncated, score, opinion in zip(
                self.prompts, texts, truncated, reward, opinions, strict=True
            )
        ]
        table = to_table(rows, SnapshotRow)
        write_table(self.run.path("ppo", f"snapshot-{step:05d}.parquet"), table)

    def _numbers(self, snapshot: Snapshot) -> dict[str, float]:
        share = max(snapshot.phrases.values(), default=0.0)
        numbers = snapshot._asdict() | {"boilerplate": share}
        return {
            f"watch/{name}": value
            for name, value in numbers.items()
            if isinstance(value, int | float) and name != "step"
        }
