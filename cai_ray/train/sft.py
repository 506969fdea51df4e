"""Stage `sft`: the SL-CAI policy, trained on revisions mixed with samples on helpfulness prompts.

It reads the rows of `revise` and writes the records it trained on, the model and its metrics. The loss is the negative
log-likelihood of the answers' tokens, ends included, divided by the tokens of the global batch. Every epoch has an
explicit shuffle of its own, the same on every rank: each rank knows the whole batch and takes its share of it.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from cai_ray.config.training import SftConfig, TrainConfig
from cai_ray.errors import InputError
from cai_ray.judging.quality import kind
from cai_ray.prompts.load import load_templates
from cai_ray.prompts.renderer import Renderer
from cai_ray.prompts.templates import TemplateSet
from cai_ray.storage.arrow import to_table
from cai_ray.storage.models import folder_sha, model_sha
from cai_ray.storage.records import SftRow, derive_id
from cai_ray.storage.run import Run
from cai_ray.train.batches import Example, pad, rank_micro_batches
from cai_ray.train.dialogues import Dialogues, check_fits, context_length, pack, render, shuffled
from cai_ray.train.losses import sft_loss
from cai_ray.train.models import load_policy
from cai_ray.train.runtime.checkpoints import checkpoint_due, restore, save_checkpoint
from cai_ray.train.runtime.engine import Trained, distribute
from cai_ray.train.runtime.group import fit, location
from cai_ray.train.runtime.metrics import Log
from cai_ray.train.runtime.ranks import device, global_sum, rank, to_device, world_size
from cai_ray.train.sequences import sequence_logprobs
from cai_ray.train.weights.state import save_model


def run(run: Run) -> dict[str, Any]:
    """Trains the SL-CAI policy; returns the stage's part of the manifest.

    Raises:
        InputError: no row can be trained on, or a row does not fit a micro-batch.
    """
    import ray

    cfg, templates = run.config.sft, load_templates(run.config.templates)
    columns = ["id", "messages", "kind", "response", "truncated", "steps", "error"]
    revised = run.rows("revise", columns)
    kinds: Counter[str] = Counter()
    cut: Counter[str] = Counter({"truncated": 0, "no_text": 0})
    records = to_records(revised, cfg, run.config.seed, templates.critiques, kinds, cut)
    if not records:
        dropped = f", or take a kind out of sft.drop={list(cfg.drop)}" if cfg.drop else ""
        if cut.total():
            dropped += f"; {cut.total()} texts were cut off, so raise revise.max_tokens={run.config.revise.max_tokens}"
            dropped += " or set sft.truncated: keep" if cut["truncated"] else ""
        raise InputError(
            f"{run.path('revise')}: no row can be trained on; look at its `error` column{dropped}"
        )
    source = run.model(cfg.init)
    renderer, limit = Renderer(source, templates.chat_template), context_length(source)
    rendered = [(r, render_record(r, renderer, templates, limit)) for r in records]
    fitting = [(record, example) for record, example in rendered if example is not None]
    if not fitting:
        raise InputError(f"sft: no row fits the context of {source} ({limit} tokens)")
    data = pack(example for _, example in fitting)
    check_fits("sft", max(data.lengths), cfg.micro_batch_tokens)
    run.write_rows("sft", to_table([record for record, _ in fitting], SftRow))

    extra = {"data": ray.put(data), "model": location(run, cfg.init), "pad_id": renderer.pad_id}
    extra["inputs"] = data.sha
    result = fit(run, "sft", loop, cfg, extra)
    return {
        "rows_in": len(revised),
        "rows_out": len(fitting),
        "errors": sum(1 for row in revised if row["error"]),
        "left_out_too_long": len(records) - len(fitting),
        "left_out_cut": dict(cut),
        "revisions": {
            "kept": {k: n for k, n in kinds.items() if k not in cfg.drop},
            "dropped": {k: n for k, n in kinds.items() if k in cfg.drop},
        },
        "tokens": {"trained": sum(data.lengths) * cfg.epochs},
        "init_sha": model_sha(source),
        "model_sha": folder_sha(run.path("sft", "model")),
        **result,
    }


def render_record(
    record: dict[str, Any], renderer: Renderer, templates: TemplateSet, limit: int
) -> Example | None:
    """The tokens of a row of schema `sft`; None if it does not fit the context of `limit` tokens."""
    *conversation, answer = record["messages"]
    return render(renderer, templates, conversation, answer["content"], limit, record["truncated"])


def to_records(
    rows: list[dict[str, Any]],
    cfg: SftConfig,
    seed: int,
    critiques: Sequence[str] = (),
    kinds: Counter[str] | None = None,
    left_out: Counter[str] | None = None,
) -> list[dict[str, Any]]:
    """Rows of schema `sft` from rows of schema `revisions`; rows with an error are left out.

    A revised row gives its last revision, every round's, or those of the first rounds (`sft.revisions`), without kinds
    in `sft.drop`. Helpfulness samples are drawn by their ids, at most `helpful_per_revision` times as many as there are
    revisions.

    Args:
        critiques: rules of the template set that tell a critique from a revision.
        kinds: counts the revisions by kind (`judging.quality.kind`), including those left out by kind.
        left_out: counts the texts that are left out because they were cut off (`truncated`), or because the cut fell
            before they began, so that there is nothing to train on (`no_text`).
    """
    kinds, left_out = (Counter() if c is None else c for c in (kinds, left_out))
    good = [row for row in rows if not row["error"]]
    revisions, helpful = [], []
    for row in good:
        if row["kind"] == "helpful":
            if row["truncated"] and not row["response"]:
                left_out["no_text"] += 1
            else:
                helpful.append(_record(row, row["response"], "helpful", truncated=row["truncated"]))
        else:
            revisions += _revisions(row, cfg, critiques, kinds, left_out)
    if revisions:
        helpful.sort(key=lambda r: derive_id(seed, "helpful", r["id"]))
        helpful = helpful[: round(cfg.helpful_per_revision * len(revisions))]
    return sorted(revisions + helpful, key=lambda r: r["id"])


def _revisions(
    row: dict[str, Any], cfg: SftConfig, critiques: Sequence[str], kinds: Counter[str], left_out: Counter[str]
) -> list[dict[str, Any]]:
    """What is trained on of a revised row; counts as `to_records` says."""
    rounds = [s for s in row["steps"] if cfg.revisions != "up_to_n" or s["round"] <= cfg.up_to]
    steps = [s for s in rounds if not s.get("left_out")]
    before = [row["response"], *(s["revision"] for s in steps)]
    pairs, records = list(zip(steps, before, strict=False)), []
    for step, response in pairs[-1:] if cfg.revisions == "final" else pairs:
        truncated = bool(step.get("revision_truncated"))
        if truncated and cfg.truncated == "drop":
            left_out["truncated"] += 1
            continue
        revision_kind = kind(step["revision"], response, step.get("critique") or "", critiques)
        kinds[revision_kind] += 1
        if revision_kind not in cfg.drop:
            records.append(_record(row, step["revision"], "revision", step["round"], truncated))
    if steps:
        return records
    if rounds or (row["truncated"] and not row["response"]):  # no round made a revision
        left_out["no_text"] += 1
        return []
    if row["truncated"] and cfg.truncated == "drop":
        left_out["truncated"] += 1
        return []
    kinds["sound"] += 1  # every slot was a disabled principle's: the response needed no revision
    return [_record(row, row["response"], "revision", truncated=row["truncated"])]


def _record(
    row: dict[str, Any], response: str, kind: str, number: int = 0, truncated: bool = False
) -> dict[str, Any]:
    return {
        "id": derive_id("sft", row["id"], number),
        "messages": [*row["messages"], {"role": "assistant", "content": response}],
        "kind": kind,
        "truncated": truncated,
        "source_id": row["id"],
    }


def loop(args: dict[str, Any]) -> dict[str, Any]:
    """Trains on one rank, from the last checkpoint if there is one; `args` is what `run` gives to `fit`."""
    import ray

    run: Run = args["run"]
    cfg, seed = run.config.sft, run.config.seed
    data: Dialogues = ray.get(args["data"])
    lengths = data.lengths
    per_epoch = -(-len(data) // cfg.batch_size)
    total = cfg.epochs * per_epoch
    every = cfg.checkpoint_every or per_epoch

    source = run.model(args["model"])
    policy = distribute(load_policy(source, cfg), cfg, total)
    state = restore({"policy": policy}) or {"step": 0, "rows": []}
    log = Log(run, "sft", total, state["rows"])
    for step in range(state["step"], total):
        started = time.perf_counter()
        epoch, place = divmod(step, per_epoch)
        order = shuffled(len(data), seed, "sft", epoch)
        batch = order[place * cfg.batch_size : (place + 1) * cfg.batch_size]
        learning_rate = policy.lr
        loss, grad_norm = update(policy, data, batch, cfg, args["pad_id"])
        log.add(
            step + 1,
            {
                "sft/loss": loss,
                "sft/epoch": epoch + 1,
                "sft/grad_norm": grad_norm,
                "sft/learning_rate": learning_rate,
                "tokens/per_s": sum(lengths[i] for i in batch) / (time.perf_counter() - started),
            },
        )
        if checkpoint_due(step + 1, every) or step + 1 == total:
            save_checkpoint({"policy": policy}, {"step": step + 1, "rows": log.rows}, step + 1)
    log.close()
    save_model(policy, source, run.path("sft", "model"))
    last = log.rows[-per_epoch:]
    return {"steps": total, "loss": sum(r["sft/loss"] for r in last) / len(last)}


def update(
    policy: Trained, data: Dialogues, batch: list[int], cfg: TrainConfig, pad_id: int
) -> tuple[float, float]:
    """Takes one optimizer step on a global batch of rows; returns the mean loss per token and the gradient's norm."""

    examples = [data[i] for i in batch]
    tokens = sum(sum(example.mask) for example in examples)
    total = torch.zeros((), dtype=torch.float64, device=device())
    lengths = [len(example.ids) for example in examples]
    for group in rank_micro_batches(lengths, cfg.micro_batch_tokens, rank(), world_size()):
        rows = to_device(pad([examples[i] for i in group], pad_id))
        loss = sft_loss(sequence_logprobs(policy, rows), rows["loss_mask"], tokens)
        policy.backward(loss * world_size())
        total += loss.detach()  # not read before the end: the host would wait for the GPU
    return float(global_sum(total)), policy.step()
