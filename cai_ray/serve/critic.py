"""The critic, which asks the feedback model by the constitution, and the reward model.

Both are Ray Serve deployments behind the ingress, and answer with plain data. If a request is at fault, the answer is
`{"fault": …}`, since an exception loses its type on the way between processes.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from typing import Any

from cai_ray.cluster.connect import on_gpu, prepare_engine, uses_gpu
from cai_ray.cluster.threads import Crowd
from cai_ray.config.judge import JudgeConfig
from cai_ray.constitution import Constitution, Principle
from cai_ray.engine.make import make_engine
from cai_ray.engine.protocol import Engine
from cai_ray.errors import RowError
from cai_ray.generate.draw import draw
from cai_ray.generate.examine import Examine, comparison, judge_by, make_examine
from cai_ray.prompts.load import load_templates
from cai_ray.prompts.messages import Message
from cai_ray.serve.constitutions import KEPT
from cai_ray.storage.models import model_sha
from cai_ray.storage.records import derive_id
from cai_ray.storage.run import Run


class Critic:
    """Says which principles a response breaks, how to improve it, and which of two responses follows them better.

    Each call brings its constitution. So a new one needs no restart, and a request ends with the one it began with.
    """

    def __init__(self, run: Run, judge: JudgeConfig, crowd: Crowd):
        self.config, self.judge = run.config, judge
        model = run.resolve_model(judge)
        prepare_engine(model.engine, on_gpu(model.engine), crowd)
        self.sha = model.sha
        self.examiners: dict[str, Examine] = {}
        self.engine: Engine = make_engine(model, on_gpu(model.engine))

    def describe(self) -> dict[str, Any]:
        return {"sha": self.sha}

    async def critique(
        self,
        document: Constitution,
        messages: list[Message],
        principles: list[str] | None,
        max_tokens: int,
    ) -> Any:
        """Critique and revision by each principle, and whether it is at stake: how far the revision is preferred."""
        try:
            findings = await self._examine(document, messages, principles, max_tokens)
        except InvalidRequest as e:
            return e.answer
        top = findings[0] if findings[0]["at_stake"] else None
        return {
            "object": "critique",
            "principle": top and top["principle"],
            "p_at_stake": findings[0]["p_at_stake"],
            "critique": top and top["critique"],
            "principles": findings,
        }

    async def revise(
        self,
        document: Constitution,
        messages: list[Message],
        principles: list[str] | None,
        max_tokens: int,
        rounds: int,
        choose: str,
        seed: int,
    ) -> Any:
        """The revision after rounds of critique and revision, with the steps."""
        conversation, current, steps = messages[:-1], messages[-1]["content"], []
        try:
            chosen = choose_principles(document, principles)
            row = derive_id("served", messages)
            drawn = [p.id for p in draw(chosen, rounds, seed=seed, row_id=row, replacement=True) if p]
            for number in range(rounds):
                ids = [p.id for p in chosen] if choose == "at_stake" else [drawn[number]]
                turns = [*conversation, Message(role="assistant", content=current)]
                top, *_ = await self._examine(document, turns, ids, max_tokens)
                if choose == "at_stake" and not top["at_stake"]:
                    break
                if not top["revision"].strip():
                    raise RowError("a revision is empty")
                steps.append({"round": number + 1, **top})
                current = top["revision"]
        except InvalidRequest as e:
            return e.answer
        except RowError as e:
            return {"fault": str(e)}
        return {"object": "revision", "revision": current, "changed": bool(steps), "steps": steps}

    async def compare(
        self,
        document: Constitution,
        messages: list[Message],
        response_a: str,
        response_b: str,
        principles: list[str] | None,
    ) -> Any:
        """The soft preference between two responses by each principle and overall, averaged over both orders."""
        try:
            chosen = choose_principles(document, principles)
            judge = judge_by(self._examiner(document).judge, chosen)
            label = await judge(self.engine, comparison(messages, response_a, response_b))
        except InvalidRequest as e:
            return e.answer
        except RowError as e:
            return {"fault": str(e)}
        votes = {v["principle_id"]: v for v in label["votes"] or ()}
        decided = [v for v in votes.values() if v["p_a"] is not None]  # the others abstained
        decisive = max(decided, key=lambda v: abs((v["p_a"] or 0.0) - 0.5), default=None)
        return {
            "object": "comparison",
            "p_a": label["p_a"],
            "slot_bias": label["slot_bias"],
            "principle": name(document[decisive["principle_id"]]) if decisive else None,
            # The model is not asked about equal responses: no principle can prefer one.
            "principles": [
                {"principle": name(p), "p_a": votes[p.id]["p_a"] if votes else 0.5} for p in chosen
            ],
        }

    async def _examine(
        self, document: Constitution, messages: list[Message], principles: list[str] | None, max_tokens: int
    ) -> list[dict[str, Any]]:
        """What each principle finds, the one most at stake first."""
        examine = self._examiner(document)
        chosen = choose_principles(document, principles)
        response = str(messages[-1]["content"])
        try:
            findings = await asyncio.gather(
                *(examine(self.engine, messages[:-1], response, p, max_tokens) for p in chosen)
            )
        except RowError as e:
            raise InvalidRequest(str(e)) from e
        rows = [{"principle": name(p), **f} for p, f in zip(chosen, findings, strict=True)]
        return sorted(rows, key=lambda row: -row["p_at_stake"])

    def _examiner(self, document: Constitution) -> Examine:
        sha = document.sha
        if sha not in self.examiners:
            if len(self.examiners) >= 2 * KEPT:
                self.examiners.clear()
            self.examiners[sha] = make_examine(self.config, self.judge, document)
        return self.examiners[sha]

    def check_health(self) -> None:
        """Fails if the engine is dead, so that Serve replaces the replica."""
        llm = getattr(self.engine, "llm", None)
        if llm is not None and llm.errored:
            raise RuntimeError("the critic's engine is dead")


class InvalidRequest(Exception):
    """A request is at fault. `answer` is what the critic answers to it."""

    def __init__(self, message: str, param: str | None = None):
        super().__init__(message)
        self.answer = {"fault": message, "param": param}


class Scorer:
    """The reward model: one number per response, centred and scaled as `reward_head.json` says."""

    def __init__(self, run: Run):
        import torch

        from cai_ray.prompts.models import run_renderer
        from cai_ray.train.models import load_reward_model, reward_scale

        torch.set_num_threads(1)
        path = run.model("rm")
        self.sha = model_sha(path)
        self.device = "cuda" if uses_gpu(run.config) else "cpu"
        self.model = load_reward_model(path, run.config.rm, trainable=False).to(self.device).eval()
        self.scale = reward_scale(path)
        self.renderer = run_renderer(run, "rm", path)
        self.templates = load_templates(run.config.templates)
        self.context = int(self.model.config.get_text_config().max_position_embeddings)
        self.busy = threading.Lock()

    def describe(self) -> dict[str, Any]:
        return {"sha": self.sha}

    async def score(self, messages: list[Message]) -> Any:
        try:
            dialogue = [*self.templates.answer_messages(messages[:-1]), messages[-1]]
            ids, _ = self.renderer.dialogue_ids(dialogue)
        except RowError as e:
            return {"fault": str(e)}
        if len(ids) > self.context:
            return {
                "fault": f"the conversation has {len(ids)} tokens; the reward model reads at most {self.context}"
            }
        raw = await asyncio.to_thread(self._forward, ids)
        return {"object": "score", "score": (raw - self.scale.mean) / self.scale.std, "raw_score": raw}

    def _forward(self, ids: Sequence[int]) -> float:
        import torch

        from cai_ray.train.batches import pad
        from cai_ray.train.sequences import score_last, sequence_values

        batch = {k: v.to(self.device) for k, v in pad([list(ids)], self.renderer.pad_id).items()}
        with self.busy, torch.inference_mode():
            return float(score_last(sequence_values(self.model, batch), batch["attention_mask"]))


def choose_principles(document: Constitution, ids: list[str] | None) -> list[Principle]:
    """The enabled principles; or those named, even if they are disabled.

    Raises:
        InvalidRequest: there is no such principle.
    """
    if ids is None:
        return document.enabled
    by_id = {p.id: p for p in document.principles}
    missing = [i for i in ids if i not in by_id]
    if missing:
        raise InvalidRequest(f"no principle {missing[0]!r}; there are: {', '.join(by_id)}", "principles")
    return [by_id[i].model_copy(update={"enabled": True}) for i in dict.fromkeys(ids)]


def name(principle: Principle) -> dict[str, str]:
    return {"id": principle.id, "title": principle.title}
