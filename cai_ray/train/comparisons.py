"""What `rm` and `dpo` share: comparisons to train on, with AI labels (soft) and human ones.

A prompt's comparisons are all trained on or all held out. pairs.py makes micro-batches of them.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import numpy as np
from torch import Tensor

from cai_ray.config.training import PreferenceConfig
from cai_ray.data.left_out import LeftOut
from cai_ray.data.training import training_comparisons
from cai_ray.errors import InputError
from cai_ray.prompts.load import load_templates
from cai_ray.prompts.models import run_renderer
from cai_ray.prompts.renderer import Renderer
from cai_ray.prompts.templates import TemplateSet
from cai_ray.storage.files import open_new
from cai_ray.storage.records import derive_id, derive_seed
from cai_ray.storage.run import Run
from cai_ray.train.batches import Example
from cai_ray.train.dialogues import TOKENS, Dialogues, Packer, as_numpy, longest_row, render, tell_long_rows

# Metrics of the last evaluation that the manifest keeps, and their names there.
EVAL = {
    f"eval/{source}_{what}": f"{what}_{source}"
    for source in ("ai", "human")
    for what in ("accuracy", "loss", "n")
}


@dataclass(frozen=True)
class ComparisonData:
    """The comparisons of a stage, rendered and split into those to train on and those held out.

    They are in the order of their ids; several raters' equal answers to one comparison all count.
    """

    ids: np.ndarray
    """(comparisons,) of bytes."""
    p_a: np.ndarray
    """(comparisons,) float64, the labels."""
    human: np.ndarray
    """(comparisons,) bool: whether a person gave the label."""
    responses: Dialogues
    """Dialogues 2i (response a) and 2i + 1 (response b) belong to comparison i."""
    train: list[int]
    held_out: list[int]
    pad_id: int
    counts: dict[str, Any]
    """Counts that the manifest keeps."""

    def shared(self) -> dict[str, Any]:
        """What `fit` gives to every rank; `pairs.load_pairs` reads it."""
        import ray

        arrays = [hashlib.sha256(a.tobytes()).hexdigest() for a in (self.ids, self.p_a, self.human)]
        return {
            "responses": ray.put(self.responses),
            "p_a": ray.put(self.p_a),
            "human": ray.put(self.human),
            "train": self.train,
            "held_out": self.held_out,
            "pad_id": self.pad_id,
            "inputs": derive_id(self.responses.sha, arrays),
        }


def load_comparisons(run: Run, stage: Literal["rm", "dpo"], model: str) -> ComparisonData:
    """Renders the run's comparisons with a model's tokenizer and the template set.

    Args:
        model: a role, folder or id.

    Raises:
        InputError: no comparison is left to train on, or too many rows of a source of human ones cannot be used.
    """
    cfg: PreferenceConfig = getattr(run.config, stage)
    seed, file = run.config.seed, run.path(stage, TOKENS)
    columns = ["id", "messages", "response_a", "response_b", "truncated_a", "truncated_b", "p_a", "error"]
    left_out, about = Counter({"error": 0, "identical": 0, "min_margin": 0, "too_long": 0}), Counter[str]()
    human_left_out = LeftOut(run.config.max_error_rate)
    labels = run.each_row("label", columns)
    rows = chain(
        ai_comparisons(labels, cfg, seed, left_out), _human_comparisons(run, cfg, about, human_left_out)
    )
    templates = load_templates(run.config.templates)
    folder = run.model(model)
    renderer, limit = run_renderer(run, model, folder), longest_row(folder, cfg)
    ids: list[bytes] = []
    p_a, human, held = array("d"), array("b"), array("b")
    with open_new(file) as tokens:
        packer = Packer(tokens.write)
        for row in rows:
            if pair := render_pair(row, renderer, templates, limit, left_out):
                for example in pair:
                    packer.add(example)
                ids.append(row["id"].encode())
                p_a.append(row["p_a"])
                human.append(row["source"] == "human")
                held.append(is_held_out(row, cfg.eval_fraction, seed))
    order = np.argsort(np.array(ids), kind="stable")
    train, held_out = (np.flatnonzero(as_numpy(held)[order] == part).tolist() for part in (0, 1))
    read = len(ids) + left_out.total()
    if not train:
        raise InputError(
            f"{stage}: no comparison can be trained on ({read} labels, left out: {dict(left_out)})"
        )
    responses = packer.dialogues(file).ordered(np.repeat(2 * order, 2) + np.tile([0, 1], len(order)))
    sizes = np.asarray(responses.lengths).reshape(-1, 2).sum(1).tolist()  # both responses of a comparison
    tell_long_rows(stage, sizes, cfg.micro_batch_tokens)
    of_people = as_numpy(human)[order].astype(bool)
    counts = {
        "rows_in": read,
        "rows_out": len(ids),
        "errors": left_out["error"],
        "left_out": dict(left_out),
        "human_left_out": dict(human_left_out),
        "rows_ai": int((~of_people).sum()),
        "rows_human": int(of_people.sum()),
        "human_labels": dict(about),
        "tokens": {"trained": responses.tokens * cfg.epochs},
    }
    return ComparisonData(
        np.array(ids)[order], as_numpy(p_a)[order], of_people, responses, train, held_out, renderer.pad_id, counts
    )  # fmt: skip


def _human_comparisons(
    run: Run, cfg: PreferenceConfig, about: Counter[str], left_out: LeftOut
) -> Iterator[dict[str, Any]]:
    """The comparisons of people, counted by what they are about; `left_out` counts rows that cannot be used."""
    for source in cfg.human:
        for row in training_comparisons(run.config, source, left_out):
            about[source.about] += 1
            yield dict(row)


def render_pair(
    row: Mapping[str, Any], renderer: Renderer, templates: TemplateSet, limit: int, left_out: Counter[str]
) -> tuple[Example, Example] | None:
    """The tokens of a comparison's two responses; None if one is longer than `limit` tokens or cannot be encoded, which
    `left_out` counts."""
    pair, reasons = [], Counter[str]()
    for side in ("a", "b"):
        truncated = bool(row.get(f"truncated_{side}"))  # human answers are complete
        response = row[f"response_{side}"]
        pair.append(render(renderer, templates, row["messages"], response, limit, truncated, reasons))
    a, b = pair
    if a is None or b is None:
        left_out[reasons.most_common(1)[0][0]] += 1
        return None
    return a, b


def ai_comparisons(
    labels: Iterable[dict[str, Any]], cfg: PreferenceConfig, seed: int, left_out: Counter[str]
) -> Iterator[dict[str, Any]]:
    """The AI labels to train on.

    Args:
        left_out: counts the labels that are left out, by reason.
    """
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
            yield {**label, "p_a": p_a, "source": "ai"}


def is_held_out(row: Mapping[str, Any], fraction: float, seed: int) -> bool:
    """Whether a comparison is evaluated on, and not trained on. A prompt's comparisons stay together.

    Args:
        fraction: expected share of prompts that are held out.
    """
    return derive_seed(seed, "rm eval", row["messages"]) / 2**31 < fraction


def add_sums(sums: dict[str, Tensor], new: Mapping[str, Tensor]) -> None:
    """Adds numbers to the sums of the same names, in double precision."""
    for key, value in new.items():
        sums[key] = sums.get(key, 0.0) + value.detach().double()


def means(group: str, sums: Mapping[str, float]) -> dict[str, float]:
    """Means per source from sums over comparisons: `ai/loss` becomes `rm/ai_loss`. A source without rows has none."""
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
    """The manifest's part of the last row of metrics."""
    return {name: rows[-1][key] for key, name in EVAL.items() if key in rows[-1]}
