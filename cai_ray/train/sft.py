"""Stage `sft`: the SL-CAI policy, trained on revisions mixed with samples on helpfulness prompts.

It writes the records it trained on (sft_records.py), the model and its metrics. The loss is the negative log-likelihood
of the answers' tokens, ends included, divided by the tokens of the global batch. Every epoch has an explicit shuffle of
its own, the same on every rank: each rank knows the whole batch and takes its share of it.
"""

from __future__ import annotations

import time
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch

from cai_ray.config.training import TrainConfig
from cai_ray.errors import InputError
from cai_ray.prompts.load import load_templates
from cai_ray.prompts.models import run_renderer
from cai_ray.prompts.renderer import Renderer
from cai_ray.prompts.templates import TemplateSet
from cai_ray.storage.arrow import schema_of, to_tables
from cai_ray.storage.files import open_new
from cai_ray.storage.ids import id_number
from cai_ray.storage.models import folder_sha, model_sha
from cai_ray.storage.records import SftRow
from cai_ray.storage.run import Run
from cai_ray.storage.sorting import SortedWriter
from cai_ray.train.batches import Example, pad, rank_micro_batches
from cai_ray.train.dialogues import (
    TOKENS,
    Dialogues,
    Packer,
    as_numpy,
    longest_row,
    render,
    shuffled,
    tell_long_rows,
)
from cai_ray.train.losses import sft_loss
from cai_ray.train.models import load_policy
from cai_ray.train.runtime.checkpoints import checkpoint_due, restore, save_checkpoint
from cai_ray.train.runtime.engine import Trained, distribute
from cai_ray.train.runtime.group import fit, location
from cai_ray.train.runtime.metrics import Log
from cai_ray.train.runtime.ranks import device, global_sum, rank, to_device, world_size
from cai_ray.train.sequences import sequence_logprobs
from cai_ray.train.sft_records import choose_records, to_records
from cai_ray.train.weights.state import save_model


def run(run: Run) -> dict[str, Any]:
    """Trains the SL-CAI policy; returns the stage's part of the manifest.

    Raises:
        InputError: no row can be trained on.
    """
    import ray

    cfg, templates = run.config.sft, load_templates(run.config.templates)
    rows = run.each_row("revise", ["id", "messages", "kind", "response", "truncated", "steps", "error"])
    choice = choose_records(rows, cfg, run.config.seed, templates.critiques)
    kinds, cut = choice.kinds, choice.cut
    if not choice.ids:
        dropped = f", or take a kind out of sft.drop={list(cfg.drop)}" if cfg.drop else ""
        if cut.total():
            dropped += f"; {cut.total()} texts were cut off, so raise revise.max_tokens={run.config.revise.max_tokens}"
            dropped += " or set sft.truncated: keep" if cut["truncated"] else ""
        raise InputError(
            f"{run.path('revise')}: no row can be trained on; look at its `error` column{dropped}"
        )
    source = run.model(cfg.init)
    renderer, limit = run_renderer(run, cfg.init, source), longest_row(source, cfg)
    left_out: Counter[str] = Counter()
    records = to_records(rows, cfg, choice.ids)
    data = write_records(run, records, renderer, templates, limit, choice.ids, left_out)
    if not len(data):
        raise InputError(
            f"sft: no row can be rendered in the {limit} tokens that {source} and sft.max_length allow "
            f"(left out: {dict(left_out)})"
        )
    tell_long_rows("sft", data.lengths, cfg.micro_batch_tokens)

    extra = {"data": ray.put(data), "model": location(run, cfg.init), "pad_id": renderer.pad_id}
    extra["inputs"] = data.sha
    result = fit(run, "sft", loop, cfg, extra)
    return {
        "rows_in": choice.rows,
        "rows_out": len(data),
        "errors": choice.errors,
        "left_out_too_long": left_out["too_long"],
        "left_out_refused": left_out["refused"],
        "left_out_cut": dict(cut),
        "revisions": {
            "kept": {k: n for k, n in kinds.items() if k not in cfg.drop},
            "dropped": {k: n for k, n in kinds.items() if k in cfg.drop},
        },
        "tokens": {"trained": data.tokens * cfg.epochs},
        "init_sha": model_sha(run.locate(cfg.init)),
        "model_sha": folder_sha(run.path("sft", "model")),
        **result,
    }


def write_records(
    run: Run,
    records: Iterable[dict[str, Any]],
    renderer: Renderer,
    templates: TemplateSet,
    limit: int,
    ids: Iterable[str],
    left_out: Counter[str],
) -> Dialogues:
    """Writes the records of at most `limit` tokens, and their tokens, both in the order of their ids.

    Args:
        ids: those of the records.
        left_out: counts the records that are left out (`render`).
    """
    schema, order, file = schema_of(SftRow), array("Q"), run.path("sft", TOKENS)
    with SortedWriter(run.path("sft"), schema, ids) as rows, open_new(file) as tokens:
        packer = Packer(tokens.write)

        def fitting() -> Iterator[dict[str, Any]]:
            for record in records:
                if (example := render_record(record, renderer, templates, limit, left_out)) is not None:
                    packer.add(example)
                    order.append(id_number(record["id"]))
                    yield record

        for table in to_tables(fitting(), schema):
            rows.add(table)
        for _ in rows.write():
            pass
    return packer.dialogues(file).ordered(np.argsort(as_numpy(order)))


def render_record(
    record: dict[str, Any],
    renderer: Renderer,
    templates: TemplateSet,
    limit: int,
    left_out: Counter[str] | None = None,
) -> Example | None:
    """The tokens of a row of schema `sft`; None if it is left out (`render`)."""
    *conversation, answer = record["messages"]
    return render(renderer, templates, conversation, answer["content"], limit, record["truncated"], left_out)


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
