"""Stage `rm`: the reward (preference) model, on AI labels (soft) and human comparisons (hard).

Both responses of a comparison are in the same micro-batch; the loss is the soft Bradley-Terry cross-entropy over
the comparisons of the global batch. Scores are read at the last token that the policy emits. After training the
scores of a fixed reference set give the centre and scale that `reward_head.json` keeps beside the weights.
"""

from __future__ import annotations

import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from cai_ray import storage
from cai_ray.config import RmConfig, TrainConfig
from cai_ray.errors import InputError
from cai_ray.generate.sources import read_comparisons
from cai_ray.prompts import Renderer, load_templates
from cai_ray.records import derive_id, derive_seed
from cai_ray.storage import Run
from cai_ray.train.batches import pad, rank_micro_batches
from cai_ray.train.dialogues import Dialogues, check_fits, context_length, pack, render, shuffled
from cai_ray.train.losses import preference_metrics, soft_bradley_terry

if TYPE_CHECKING:
    from cai_ray.train.fit import Trained

# Comparisons whose two responses are the reference set that rewards are centred and scaled on.
REFERENCE = 256
# What the report shows of the last evaluation.
EVAL = {
    f"eval/{source}_{what}": f"{what}_{source}"
    for source in ("ai", "human")
    for what in ("accuracy", "loss", "n")
}


def run(run: Run) -> dict[str, Any]:
    import ray

    from cai_ray.train import fit

    cfg, seed = run.config.rm, run.config.seed
    columns = ["id", "messages", "response_a", "response_b", "truncated_a", "truncated_b", "p_a", "error"]
    labels = run.rows("label", columns)
    ai, left_out = ai_comparisons(labels, cfg, seed)
    human = [{**row, "about": source.about} for source in cfg.human for row in read_comparisons(source, seed)]
    rows, responses, too_long = _render(run, ai + human)
    train, held = split(rows, cfg.eval_fraction, seed)
    if not train:
        raise InputError(
            f"rm: no comparison can be trained on ({len(labels)} labels, left out: {dict(left_out)})"
        )
    check_fits("rm", 2 * max(responses.lengths), cfg.micro_batch_tokens)
    extra = {
        "responses": ray.put(responses),
        "p_a": ray.put(np.asarray([row["p_a"] for row in rows])),
        "human": ray.put(np.asarray([row["source"] == "human" for row in rows])),
        "train": train,
        "held": held,
        "reference": reference(rows, seed),
        "model": fit.location(run, cfg.init),
        "pad_id": rows[0]["pad_id"],
        "inputs": derive_id(responses.sha, [(row["id"], row["p_a"], row["source"]) for row in rows]),
    }
    result = fit.fit(run, "rm", loop, cfg, extra)
    return {
        "rows_in": len(labels) + len(human),
        "rows_out": len(rows),
        "errors": left_out["error"],
        "left_out": {**left_out, "too_long": too_long},
        "rows_ai": sum(row["source"] == "ai" for row in rows),
        "rows_human": sum(row["source"] == "human" for row in rows),
        "human_labels": dict(Counter(row["about"] for row in human)),
        "tokens": {"trained": sum(responses.lengths) * cfg.epochs},
        "init_sha": storage.model_sha(run.model(cfg.init)),
        "model_sha": storage.folder_sha(run.path("rm", "model")),
        **result,
    }


def ai_comparisons(
    labels: list[dict[str, Any]], cfg: RmConfig, seed: int
) -> tuple[list[dict[str, Any]], Counter[str]]:
    """The AI labels to train on, and how many were left out for which reason."""
    rows, left_out = [], Counter({"error": 0, "identical": 0, "min_margin": 0})
    for label in labels:
        if label["error"] or label["p_a"] is None:
            left_out["error"] += 1
        elif label["response_a"] == label["response_b"]:
            left_out["identical"] += 1
        elif abs(label["p_a"] - 0.5) < cfg.min_margin:
            left_out["min_margin"] += 1
        else:
            p_a = label["p_a"]
            if cfg.shuffle_labels and derive_seed(seed, "shuffle_labels", label["id"]) % 2:
                p_a = 1 - p_a
            rows.append({**label, "p_a": p_a, "source": "ai"})
    return rows, left_out


def _render(run: Run, rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], Dialogues, int]:
    """Comparisons in the order of their ids, and their responses: row i's are dialogues 2i (a) and 2i + 1 (b)."""
    source, templates = run.model(run.config.rm.init), load_templates(run.config.templates)
    renderer, limit = Renderer(source, templates.chat_template), context_length(source)
    kept, examples = [], []
    for row in sorted(rows, key=lambda row: row["id"]):  # raters who agree word for word all count
        pair = []
        for side in ("a", "b"):
            cut = bool(row.get(f"truncated_{side}"))  # human answers are whole
            response = row[f"response_{side}"]
            pair.append(render(renderer, templates, row["messages"], response, limit, cut))
        if pair[0] is not None and pair[1] is not None:
            examples += pair
            kept.append(
                {"pad_id": renderer.pad_id, **{k: row[k] for k in ("id", "messages", "p_a", "source")}}
            )
    return kept, pack(e for e in examples if e is not None), len(rows) - len(kept)


def split(rows: list[dict[str, Any]], fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices to train on and to evaluate on; a prompt's comparisons stay together."""
    train: list[int] = []
    held: list[int] = []
    for i, row in enumerate(rows):
        draw = derive_seed(seed, "rm eval", row["messages"]) / 2**31
        (held if draw < fraction else train).append(i)
    return train, held


def reference(rows: list[dict[str, Any]], seed: int) -> list[int]:
    """A fixed set of comparisons (docs/method.md, item 15): the policy's own samples where there are any, by id."""
    own = [i for i, row in enumerate(rows) if row["source"] == "ai"] or list(range(len(rows)))
    return sorted(own, key=lambda i: derive_id(seed, "reference", rows[i]["id"]))[:REFERENCE]


def loop(config: dict[str, Any]) -> dict[str, Any]:
    """Trains on one rank of the group."""
    import ray

    from cai_ray.train import fit
    from cai_ray.train.models import load_reward_model

    run: Run = config["run"]
    cfg, seed = run.config.rm, run.config.seed
    data = Pairs(
        ray.get(config["responses"]), ray.get(config["p_a"]), ray.get(config["human"]), config["pad_id"]
    )
    train: list[int] = config["train"]
    per_epoch = -(-len(train) // cfg.batch_size)
    total = cfg.epochs * per_epoch
    every = cfg.checkpoint_every or per_epoch

    source = run.model(config["model"])
    model = fit.distribute(load_reward_model(source, cfg), cfg, total)
    state = fit.restore({"reward": model}) or {"step": 0, "rows": []}
    log = fit.Log(run, "rm", total, state["rows"])
    for step in range(state["step"], total):
        started = time.perf_counter()
        epoch, place = divmod(step, per_epoch)
        order = shuffled(len(train), seed, "rm", epoch)
        batch = [train[i] for i in order[place * cfg.batch_size : (place + 1) * cfg.batch_size]]
        rate = model.lr
        sums, norm = update(model, data, batch, cfg)
        metrics = {
            **_means("rm", sums),
            "rm/epoch": epoch + 1,
            "rm/grad_norm": norm,
            "rm/learning_rate": rate,
            "tokens/per_s": data.tokens(batch) / (time.perf_counter() - started),
        }
        if (step + 1) % per_epoch == 0:
            metrics |= evaluate(model, data, config["held"], cfg)
        log.add(step + 1, metrics)
        if (step + 1) % every == 0 or step + 1 == total:
            fit.save_checkpoint({"reward": model}, {"step": step + 1, "rows": log.rows}, step + 1)
    log.close()
    mean, std = reward_scale(model, data, config["reference"], cfg)
    out = run.path("rm", "model")
    fit.save_model(model, source, out)
    if fit.rank() == 0:
        scale = {"mean": mean, "std": std, "n": 2 * len(config["reference"])}
        storage.write_json(storage.join(out, "reward_head.json"), scale)
    metrics = {what: log.rows[-1][key] for key, what in EVAL.items() if key in log.rows[-1]}
    return {"steps": total, "reward_mean": mean, "reward_std": std, "metrics": metrics}


def update(model: Trained, data: Pairs, batch: list[int], cfg: TrainConfig) -> tuple[dict[str, float], float]:
    """One optimizer step on a global batch of comparisons; returns sums over them and the gradient's norm."""
    from cai_ray.train import fit

    sums: dict[str, Tensor] = {}
    for group in data.micro_batches(batch, cfg):
        r_a, r_b, p_a, human = data.scores(model, group)
        loss = soft_bradley_terry(r_a, r_b, p_a).sum() / len(batch)
        model.backward(loss * fit.world_size())
        _add(sums, preference_metrics(r_a, r_b, p_a, human))
    return fit.global_sums(sums), model.step()


class Pairs:
    """The comparisons as every rank holds them."""

    def __init__(self, responses: Dialogues, p_a: np.ndarray, human: np.ndarray, pad_id: int):
        self.responses, self.p_a, self.human, self.pad_id = responses, p_a, human, pad_id
        self._lengths = responses.lengths

    def tokens(self, batch: list[int]) -> int:
        return sum(self._lengths[2 * i] + self._lengths[2 * i + 1] for i in batch)

    def micro_batches(self, batch: list[int], cfg: TrainConfig) -> list[list[int]]:
        """This rank's comparisons of a batch; a pair is as long as twice the longer of the two."""
        from cai_ray.train import fit

        lengths = [2 * max(self._lengths[2 * i], self._lengths[2 * i + 1]) for i in batch]
        groups = rank_micro_batches(lengths, cfg.micro_batch_tokens, fit.rank(), fit.world_size())
        return [[batch[i] for i in group] for group in groups]

    def scores(self, model: Trained, group: list[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Scores of both responses, labels and sources, each (pairs,); none of them in a micro-batch that fills up."""
        from cai_ray.train import fit
        from cai_ray.train.models import score_last, sequence_values

        rows = fit.to_device(
            pad([self.responses[2 * i + side] for side in (0, 1) for i in group], self.pad_id)
        )
        scores = score_last(sequence_values(model, rows), rows["attention_mask"])
        r_a, r_b = (scores[: len(group)], scores[len(group) :]) if group else (scores[:0], scores[:0])
        p_a = torch.as_tensor(self.p_a[group], dtype=torch.float32, device=scores.device)
        return r_a, r_b, p_a, torch.as_tensor(self.human[group], dtype=torch.bool, device=scores.device)


@torch.no_grad()
def evaluate(model: Trained, data: Pairs, held: list[int], cfg: RmConfig) -> dict[str, float]:
    """Loss, accuracy and margin on held-out comparisons, apart for AI and human labels (docs/method.md, item 18)."""
    from cai_ray.train import fit

    sums: dict[str, Tensor] = {}
    for group in data.micro_batches(held, cfg):
        _add(sums, preference_metrics(*data.scores(model, group)))
    return _means("eval", fit.global_sums(sums))


@torch.no_grad()
def reward_scale(model: Trained, data: Pairs, chosen: list[int], cfg: RmConfig) -> tuple[float, float]:
    """Mean and standard deviation of the scores of both responses of the chosen comparisons, over all ranks."""
    from cai_ray.train import fit

    sums = torch.zeros(3, dtype=torch.float64)
    for group in data.micro_batches(chosen, cfg):
        r_a, r_b, _, _ = data.scores(model, group)
        both = torch.cat([r_a, r_b]).double().cpu()
        sums += torch.stack([torch.tensor(float(len(both))).double(), both.sum(), both.square().sum()])
    count, first, second = fit.global_sum(sums).tolist()
    mean = first / count
    return mean, max(second / count - mean * mean, 1e-12) ** 0.5


def _add(sums: dict[str, Tensor], new: dict[str, Tensor]) -> None:
    for key, value in new.items():
        sums[key] = sums.get(key, 0.0) + value.detach().double().cpu()


def _means(group: str, sums: dict[str, float]) -> dict[str, float]:
    """Sums over comparisons to means per source, `ai/loss` to `rm/ai_loss`; a source without rows is left out."""
    out: dict[str, float] = {}
    for source in ("ai", "human"):
        count = sums.get(f"{source}/n", 0)
        if count:
            out[f"{group}/{source}_n"] = count
            for what in ("loss", "accuracy", "margin"):
                out[f"{group}/{source}_{what}"] = sums[f"{source}/{what}"] / count
    return out
