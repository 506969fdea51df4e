"""Comparisons to train on, AI labels (soft) and human ones: what `rm` and `dpo` share.

Both responses of a comparison are in the same micro-batch, since its loss is of the two, but not in the same pass
forward: rows of a pass are of like length, and the two responses may not be. A prompt's comparisons are all trained on
or all held out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cai_ray.config.training import PreferenceConfig, TrainConfig
from cai_ray.data.sources import read_comparisons
from cai_ray.errors import InputError
from cai_ray.prompts.load import load_templates
from cai_ray.prompts.renderer import Renderer
from cai_ray.storage.records import derive_id, derive_seed
from cai_ray.storage.run import Run
from cai_ray.train.batches import cut_alike, deal, longest_first, pad, take
from cai_ray.train.dialogues import Dialogues, check_fits, context_length, pack, render
from cai_ray.train.runtime.ranks import rank, to_device, world_size

# What the report shows of the last evaluation.
EVAL = {
    f"eval/{source}_{what}": f"{what}_{source}"
    for source in ("ai", "human")
    for what in ("accuracy", "loss", "n")
}


@dataclass(frozen=True)
class Comparisons:
    """What a stage trains on: rendered, and divided."""

    rows: list[dict[str, Any]]
    """In the order of their ids: id, messages, p_a, source."""
    responses: Dialogues
    """Row i's are dialogues 2i (a) and 2i + 1 (b)."""
    train: list[int]
    held: list[int]
    pad_id: int
    counts: dict[str, Any]
    """For the manifest."""

    def shared(self) -> dict[str, Any]:
        """What every rank is given (`fit.fit`): `pairs` reads it."""
        import ray

        rows = self.rows
        return {
            "responses": ray.put(self.responses),
            "p_a": ray.put(np.asarray([row["p_a"] for row in rows])),
            "human": ray.put(np.asarray([row["source"] == "human" for row in rows])),
            "train": self.train,
            "held": self.held,
            "pad_id": self.pad_id,
            "inputs": derive_id(self.responses.sha, [(r["id"], r["p_a"], r["source"]) for r in rows]),
        }


def read(run: Run, stage: Literal["rm", "dpo"], model: str) -> Comparisons:
    """The run's comparisons as a model's tokenizer and the template set render them.

    Raises:
        InputError: none is left to train on, or one is longer than a micro-batch.
    """
    cfg: PreferenceConfig = getattr(run.config, stage)
    seed = run.config.seed
    columns = ["id", "messages", "response_a", "response_b", "truncated_a", "truncated_b", "p_a", "error"]
    labels = run.rows("label", columns)
    ai, left_out = ai_comparisons(labels, cfg, seed)
    human = [{**row, "about": source.about} for source in cfg.human for row in read_comparisons(source, seed)]
    templates = load_templates(run.config.templates)
    renderer, limit = Renderer(model, templates.chat_template), context_length(model)
    rows, examples = [], []
    for row in sorted(ai + human, key=lambda row: row["id"]):  # raters who agree word for word all count
        pair = []
        for side in ("a", "b"):
            cut = bool(row.get(f"truncated_{side}"))  # human answers are whole
            response = row[f"response_{side}"]
            pair.append(render(renderer, templates, row["messages"], response, limit, cut))
        if pair[0] is not None and pair[1] is not None:
            examples += pair
            rows.append({k: row[k] for k in ("id", "messages", "p_a", "source")})
    train, held = split(rows, cfg.eval_fraction, seed)
    if not train:
        raise InputError(
            f"{stage}: no comparison can be trained on ({len(labels)} labels, left out: {dict(left_out)})"
        )
    responses = pack(e for e in examples if e is not None)
    check_fits(stage, 2 * max(responses.lengths), cfg.micro_batch_tokens)
    counts = {
        "rows_in": len(labels) + len(human),
        "rows_out": len(rows),
        "errors": left_out["error"],
        "left_out": {**left_out, "too_long": len(ai) + len(human) - len(rows)},
        "rows_ai": sum(row["source"] == "ai" for row in rows),
        "rows_human": sum(row["source"] == "human" for row in rows),
        "human_labels": dict(Counter(row["about"] for row in human)),
        "tokens": {"trained": sum(responses.lengths) * cfg.epochs},
    }
    return Comparisons(rows, responses, train, held, renderer.pad_id, counts)


def ai_comparisons(
    labels: list[dict[str, Any]], cfg: PreferenceConfig, seed: int
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
        elif cfg.hard_labels and label["p_a"] == 0.5:
            left_out["tie"] += 1
        else:
            p_a = float(label["p_a"] > 0.5) if cfg.hard_labels else label["p_a"]
            if cfg.shuffle_labels and derive_seed(seed, "shuffle_labels", label["id"]) % 2:
                p_a = 1 - p_a
            rows.append({**label, "p_a": p_a, "source": "ai"})
    return rows, left_out


def split(rows: list[dict[str, Any]], fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices to train on and to evaluate on; a prompt's comparisons stay together."""
    train: list[int] = []
    held: list[int] = []
    for i, row in enumerate(rows):
        draw = derive_seed(seed, "rm eval", row["messages"]) / 2**31
        (held if draw < fraction else train).append(i)
    return train, held


class MicroBatch(NamedTuple):
    """Comparisons that go backward together."""

    pairs: list[int]
    passes: list[list[int]]
    """Their responses, as dialogues (2i and 2i + 1 of comparison i), in passes forward."""


Read = Callable[[dict[str, Tensor]], Tensor]


class Pairs:
    """The comparisons as every rank holds them."""

    def __init__(self, responses: Dialogues, p_a: np.ndarray, human: np.ndarray, pad_id: int):
        self.responses, self.p_a, self.human, self.pad_id = responses, p_a, human, pad_id
        self._lengths = responses.lengths

    def __len__(self) -> int:
        return len(self.p_a)

    def tokens(self, batch: list[int]) -> int:
        return sum(self._lengths[2 * i] + self._lengths[2 * i + 1] for i in batch)

    def micro_batches(self, batch: list[int], cfg: TrainConfig) -> list[MicroBatch]:
        """This rank's, of at most `cfg.micro_batch_tokens` with their padding; as many passes on every rank."""

        most = cfg.micro_batch_tokens
        sizes = [self._lengths[2 * i] + self._lengths[2 * i + 1] for i in batch]
        deals = deal(sizes, world_size())
        shares = [[batch[i] for i in share] for share in deals]
        filled = np.cumsum([max(sizes[i] for i in hand if i is not None) for hand in zip_longest(*deals)])
        out: list[MicroBatch] = []
        start = 0
        while start < len(filled):
            before = filled[start - 1] if start else 0
            end = int(np.searchsorted(filled, before + 0.95 * most, side="right"))  # the rest may be padding
            end = max(end, start + 1)
            while True:
                ranks, tokens = self._passes([share[start:end] for share in shares], most)
                if tokens <= most or end == start + 1:
                    break
                end = (start + end) // 2  # they have more
            out.append(ranks[rank()])
            start = end
        return out

    def _passes(self, pairs: list[list[int]], most: int) -> tuple[list[MicroBatch], int]:
        """One micro-batch of every rank, and the most tokens that any of them has with its padding."""
        rows = [longest_first((2 * i + side for i in own for side in (0, 1)), self._lengths) for own in pairs]
        lengths = [[self._lengths[row] for row in own] for own in rows]
        cuts = cut_alike(lengths, most)
        tokens = sum(
            max(own[cut.start] for own in lengths if cut.start < len(own)) * len(cut) for cut in cuts
        )
        return [
            MicroBatch(p, [take(own, cut) for cut in cuts]) for p, own in zip(pairs, rows, strict=True)
        ], tokens

    def sides(self, micro_batch: MicroBatch, read: Read) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What is read of a's and of b's, labels and sources, each (pairs,): none in a micro-batch that fills up.

        Args:
            read: gives a number for each row of padded inputs (`batches.pad`).
        """

        passes = [pad([self.responses[i] for i in rows], self.pad_id) for rows in micro_batch.passes]
        found = [read(to_device(inputs)) for inputs in passes]
        values = torch.cat([f[: len(rows)] for f, rows in zip(found, micro_batch.passes, strict=True)])
        place = {row: k for k, row in enumerate(row for rows in micro_batch.passes for row in rows)}
        pairs = micro_batch.pairs

        def tensor(numbers: Any, dtype: torch.dtype) -> Tensor:
            return torch.as_tensor(numbers, dtype=dtype).to(values.device, non_blocking=True)

        a, b = (values[tensor([place[2 * i + side] for i in pairs], torch.int64)] for side in (0, 1))
        return a, b, tensor(self.p_a[pairs], torch.float32), tensor(self.human[pairs], torch.bool)


def pairs(config: dict[str, Any]) -> Pairs:
    """From what a loop was given of `Comparisons.shared`."""
    import ray

    return Pairs(
        ray.get(config["responses"]), ray.get(config["p_a"]), ray.get(config["human"]), config["pad_id"]
    )


def add(sums: dict[str, Tensor], new: Mapping[str, Tensor]) -> None:
    for key, value in new.items():
        sums[key] = sums.get(key, 0.0) + value.detach().double()


def means(group: str, sums: Mapping[str, float]) -> dict[str, float]:
    """Sums over comparisons to means per source, `ai/loss` to `rm/ai_loss`; a source without rows is left out."""
    out: dict[str, float] = {}
    for source in ("ai", "human"):
        count = sums.get(f"{source}/n", 0)
        if count:
            out[f"{group}/{source}_n"] = count
            for key, value in sums.items():
                if key.startswith(f"{source}/") and key != f"{source}/n":
                    out[f"{group}/{key.replace('/', '_')}"] = value / count
    return out


def last_evaluation(rows: list[dict[str, Any]]) -> dict[str, float]:
    """What the manifest keeps of the last row of metrics."""
    return {what: rows[-1][key] for key, what in EVAL.items() if key in rows[-1]}
