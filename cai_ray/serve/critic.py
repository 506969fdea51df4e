"""The critic: the feedback model asked by the constitution, and the reward model.

Both are Ray Serve deployments behind the ingress, and answer with plain data. What is the request's fault comes back
as `{"fault": …}`, since an exception that crosses processes loses its type.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from typing import Any

from cai_ray.cluster import uses_gpu
from cai_ray.constitution import Constitution, Principle
from cai_ray.engine import Engine, make_engine
from cai_ray.errors import RowError
from cai_ray.generate.examine import comparison, judge_by, make_examine
from cai_ray.prompts import Message, load_templates
from cai_ray.storage import Run


class Critic:
    """Which principles a response breaks, and which of two responses keeps them better."""

    def __init__(self, run: Run):
        config = run.config
        self.constitution = run.constitution()
        self.examine = make_examine(config, self.constitution)
        self.engine: Engine = make_engine(
            run.model(config.label.model), self.examine.templates, config.engine, uses_gpu(config)
        )

    async def critique(self, messages: list[Message], principles: list[str] | None, max_tokens: int) -> Any:
        """Critique and revision by each principle, and how far the revision is preferred: that is what is at stake."""
        chosen = choose_principles(self.constitution, principles)
        if isinstance(chosen, dict):
            return chosen
        try:
            found = await asyncio.gather(*(self._examine(messages, p, max_tokens) for p in chosen))
        except RowError as e:
            return {"fault": str(e)}
        found = sorted(found, key=lambda f: -f["p_at_stake"])
        top = found[0] if found[0]["at_stake"] else None
        return {
            "object": "critique",
            "principle": _name(self.constitution[top["principle"]["id"]]) if top else None,
            "critique": top["critique"] if top else None,
            "principles": found,
        }

    async def _examine(
        self, messages: list[Message], principle: Principle, max_tokens: int
    ) -> dict[str, Any]:
        response = str(messages[-1]["content"])
        found = await self.examine(self.engine, messages[:-1], response, principle, max_tokens)
        return {"principle": _name(principle), **found}

    async def compare(
        self, messages: list[Message], response_a: str, response_b: str, principles: list[str] | None
    ) -> Any:
        """The soft preference between two responses, per principle and overall, both orders averaged."""
        chosen = choose_principles(self.constitution, principles)
        if isinstance(chosen, dict):
            return chosen
        try:
            judge = judge_by(self.examine.judge, chosen)
            label = await judge(self.engine, comparison(messages, response_a, response_b))
        except RowError as e:
            return {"fault": str(e)}
        votes = {v["principle_id"]: v for v in label["votes"]}
        given = [v for v in votes.values() if v["p_a"] is not None]  # the others abstained
        decisive = max(given, key=lambda v: abs(v["p_a"] - 0.5), default=None)
        return {
            "object": "comparison",
            "p_a": label["p_a"],
            "slot_bias": label["slot_bias"],
            "principle": _name(self.constitution[decisive["principle_id"]]) if decisive else None,
            # Equal responses are not asked about: no principle can prefer one.
            "principles": [
                {"principle": _name(p), "p_a": votes[p.id]["p_a"] if votes else 0.5} for p in chosen
            ],
        }

    def check_health(self) -> None:
        """Serve replaces the replica when its engine is dead."""
        llm = getattr(self.engine, "llm", None)
        if llm is not None and llm.errored:
            raise RuntimeError("the critic's engine is dead")


class Scorer:
    """The reward model: one number per response, centred and scaled as `reward_head.json` says."""

    def __init__(self, run: Run):
        import torch

        from cai_ray.prompts import Renderer
        from cai_ray.train.models import load_reward_model, reward_scale

        torch.set_num_threads(1)
        path = run.model("rm")
        self.device = "cuda" if uses_gpu(run.config) else "cpu"
        self.model = load_reward_model(path, run.config.rm, trainable=False).to(self.device).eval()
        self.scale = reward_scale(path)
        self.renderer = Renderer(path, load_templates(run.config.templates).chat_template)
        self.templates = load_templates(run.config.templates)
        self.context = int(self.model.config.get_text_config().max_position_embeddings)
        self.busy = threading.Lock()

    async def score(self, messages: list[Message]) -> Any:
        try:
            asked = [*self.templates.answer_messages(messages[:-1]), messages[-1]]
            ids, _ = self.renderer.dialogue_ids(asked)
        except RowError as e:
            return {"fault": str(e)}
        if len(ids) > self.context:
            return {"fault": f"the conversation is {len(ids)} tokens; the reward model reads {self.context}"}
        raw = await asyncio.to_thread(self._forward, ids)
        return {"object": "score", "score": (raw - self.scale.mean) / self.scale.std, "raw_score": raw}

    def _forward(self, ids: Sequence[int]) -> float:
        import torch

        from cai_ray.train.batches import pad
        from cai_ray.train.models import score_last, sequence_values

        batch = {k: v.to(self.device) for k, v in pad([list(ids)], self.renderer.pad_id).items()}
        with self.busy, torch.inference_mode():
            return float(score_last(sequence_values(self.model, batch), batch["attention_mask"]))


def choose_principles(constitution: Constitution, ids: list[str] | None) -> list[Principle] | dict[str, Any]:
    """The enabled principles, or those named; a fault where one is not there."""
    if ids is None:
        return constitution.enabled
    known = {p.id: p for p in constitution.principles}
    missing = [i for i in ids if i not in known]
    if missing:
        return {"fault": f"no principle {missing[0]!r}; there are: {', '.join(known)}", "param": "principles"}
    return [known[i] for i in dict.fromkeys(ids)]


def _name(principle: Principle) -> dict[str, str]:
    return {"id": principle.id, "title": principle.title}
