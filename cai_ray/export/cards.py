"""The cards of an exported run: README.md of models and datasets, as the Hugging Face Hub reads them.

Whatever is not ours (principles, names, settings) is text and nothing else: the front matter is written by a YAML
library, the rest is escaped.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import yaml

from cai_ray.config.run import RunConfig
from cai_ray.constitution import Constitution
from cai_ray.export import snippets
from cai_ray.report import text
from cai_ray.report.markdown import escaped, fence, page, table
from cai_ray.stages import upstream_of


class Facts(NamedTuple):
    """What the cards of one run say."""

    config: RunConfig
    constitution: Constitution
    manifests: dict[str, dict[str, Any]]
    """Of the stages that are done, and of one another."""
    report: dict[str, Any] | None
    certificate: dict[str, Any] | None
    example: list[dict[str, str]]
    """A conversation as the policy was trained to read it: with the messages that the template set puts around it."""


class Kind(NamedTuple):
    title: str
    about: str
    settings: tuple[str, ...]
    """Sections of the configuration that made it."""
    tags: tuple[str, ...]
    pipeline: str
    limits: tuple[str, ...]


_POLICY_LIMITS = (
    "It can still help with what the constitution forbids, and decline what it allows. The intervals above are over "
    "prompts of one kind; they say nothing about other prompts, languages, longer conversations or attacks.",
    "The labels are a model's opinion of a short document. What that model does not see, and what the document's "
    "authors did not think of, nobody taught this policy.",
)
KINDS = {
    "sl": Kind(
        "SL-CAI policy",
        "A language model, fine-tuned on its own answers after it had criticised and revised them by a constitution.",
        (*upstream_of("sft", "ppo"), "sft"),
        ("sft",),
        "text-generation",
        _POLICY_LIMITS,
    ),
    "rm": Kind(
        "reward model",
        "It scores answers. It was trained on a feedback model's soft preferences by a constitution, and on human "
        "comparisons of helpfulness where there were any.",
        tuple(s for s in (*upstream_of("rm", "ppo"), "rm") if s not in (*upstream_of("sft", "ppo"), "sft")),
        ("reward-model",),
        "text-classification",
        (
            "A score means something beside other answers to the same prompt; it is no probability of harm.",
            "A policy that is trained against it finds its faults. It was made for answers like those of the SL-CAI "
            "policy of the same run.",
            "It has the feedback model's blind spots: nobody checked its labels one by one.",
        ),
    ),
    "rl": Kind(
        "RL-CAI policy",
        "The SL-CAI policy after reinforcement learning (PPO) against the reward model of the same run.",
        (*upstream_of("ppo", "ppo"), "ppo"),
        ("ppo", "rlaif"),
        "text-generation",
        (
            *_POLICY_LIMITS,
            "It was trained against a learnt reward: answers may please the reward model more than a reader.",
        ),
    ),
}
KINDS["dpo"] = KINDS["rl"]._replace(
    about="The SL-CAI policy after direct preference optimisation (DPO) on a feedback model's soft preferences by a "
    "constitution, and on human comparisons of helpfulness where there were any.",
    settings=(*upstream_of("dpo", "dpo"), "dpo"),
    tags=("dpo", "rlaif"),
    limits=_POLICY_LIMITS,
)
# Where things lie on the machine that made them, and how the work was shared out, are nobody else's matter.
_PRIVATE = {
    "prompts", "human", "gold", "gold_limit", "gates", "engine", "workers", "cpus_per_worker",
    "checkpoint_every", "keep_checkpoints", "offload_optimizer", "micro_batch_tokens", "rollout_engines",
    "deadline_s", "save_rollouts", "rewards", "watch",
}  # fmt: skip
_COUNTS = {
    "revise": "prompts answered, criticised and revised",
    "sft": "rows of supervised fine-tuning",
    "compare": "pairs of answers",
    "label": "AI labels",
    "rm": "comparisons the reward model was trained and tested on",
    "ppo": "answers sampled in PPO",
    "dpo": "comparisons the policy was trained and tested on",
}


def model_card(role: str, facts: Facts, end: str = "", scale: dict[str, float] | None = None) -> str:
    """README.md of a model.

    Args:
        role: `sl`, `rm` or `rl`.
        end: of a reward model, the token that ends an answer.
        scale: of a reward model, its reward_head.json.
    """
    config = facts.config
    kind = KINDS["dpo" if role == "rl" and config.method == "dpo" else role]
    front: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": kind.pipeline}
    if hub := _hub_id(config.model):
        front["base_model"] = hub
    front["tags"] = ["constitutional-ai", "cai_ray", *kind.tags]
    parts = [
        f"# {escaped(config.name)}: {kind.title}",
        f"{kind.about} Made by [Constitutional AI](https://arxiv.org/abs/2212.08073) with cai_ray from "
        f"{escaped(_public(config.model))}, seed {config.seed}.",
        "## Use",
        snippets.reward_model(facts.example, end, scale or {})
        if role == "rm"
        else snippets.policy(facts.example, config.evaluate.max_tokens),
        "## Constitution",
        principles(facts.constitution),
        "## Data and settings",
        counts(facts, kind.settings),
        fence(yaml.safe_dump(_settings(config, kind.settings), sort_keys=False, allow_unicode=True), "yaml"),
        "## Results",
        _reward_results(facts) if role == "rm" else _results(facts),
        "## Limitations",
        "\n".join(f"- {line}" for line in (*kind.limits, _judged(config))),
        "## License",
        "None is stated: that is up to whoever publishes this model, within the license of the model it was made from.",
    ]
    return page(front, parts)


def dataset_card(facts: Facts, rows: dict[str, int], left_out: dict[str, int]) -> str:
    """README.md of the folder of datasets.

    Args:
        rows: how many rows each configuration has.
        left_out: of the labels, how many are in no row, and why.
    """
    config = facts.config
    front: dict[str, Any] = {
        "tags": ["constitutional-ai", "cai_ray", "synthetic"],
        "configs": [
            {"config_name": name, "data_files": [{"split": "train", "path": f"data/{name}/*.parquet"}]}
            for name in rows
        ],
    }
    parts = [
        f"# {escaped(config.name)}: what Constitutional AI was trained on",
        "Texts of language models, and the prompts they answer. They hold answers that do harm, on purpose: the first "
        "`response` of a revision, and what was `rejected`.",
        "\n".join(f"- `{name}` ({rows[name]} rows): {_DATASETS[name]}" for name in rows),
    ]
    if left_out:
        said = ", ".join(f"{number} {why}" for why, number in left_out.items())
        parts.append(f"Labels that are in no row of `preferences`: {said}.")
    name = next(reversed(rows))
    load = f"""\
from datasets import load_dataset

rows = load_dataset(".", "{name}", split="train")  # this folder, or its id on the Hub"""
    parts += ["## Use", fence(load, "python"), "## Constitution", principles(facts.constitution)]
    if facts.certificate:
        head = ["", "value", "what it is"]
        parts += ["## How good the labels are", table(head, text.certificate_facts(facts.certificate))]
    parts += [
        "## Limitations",
        "- The preferences are a model's, by the principles above: `p_chosen` is its probability and no human's.\n"
        "- Prompts are the conversations alone, without the messages that the run's templates put around them.\n"
        "- Prompts come from the sources of the run; their licenses and what people wrote into them come along.",
        "## License",
        "None is stated: that is up to whoever publishes this, within the licenses of the prompts and of the models.",
    ]
    return page(front, parts)


def folder_card(facts: Facts, written: Sequence[str], missing: Sequence[str]) -> str:
    """README.md of the whole export."""
    parts = [
        f"# {escaped(facts.config.name)}: Constitutional AI",
        f"A run of cai_ray from {escaped(_public(facts.config.model))} by the constitution "
        f"{escaped(facts.constitution.name)} {escaped(facts.constitution.version)} (`{facts.constitution.sha}`, "
        "`constitution.yaml`). Each folder has a card of its own.",
        "\n".join(f"- `{place}`" for place in written),
    ]
    if missing:
        parts.append("Not in here:\n\n" + "\n".join(f"- {line}" for line in missing))
    return page({}, [*parts, "## Results", _results(facts)])


# -------------------------------------------------------------------------------------------------------- sections

_DATASETS = {
    "revisions": "`prompt` and `completion` as messages; `completion` is the last revision (of helpfulness prompts the "
    "response), `response` the first answer, `steps` the critiques and revisions with their principles.",
    "sft": "`messages`: what the SL-CAI policy was trained on. Where `truncated`, the answer has no end.",
    "preferences": "`prompt`, `chosen` and `rejected` as messages; `p_chosen` is the label the reward model was given "
    "(at least 0.5), `p_chosen_raw` the same before clamping, `votes` each principle's.",
}


def principles(constitution: Constitution) -> str:
    lines = [
        f"{escaped(constitution.name)}, version {escaped(constitution.version)}, hash `{constitution.sha}`:\n"
    ]
    for p in constitution.principles:
        source = f" ({escaped(p.source)})" if p.source else ""
        off = "" if p.enabled else " Not enabled in this run."
        lines.append(f"- **{escaped(p.title)}** (`{p.id}`): {escaped(p.text)}{source}{off}")
    return "\n".join(lines)


def counts(facts: Facts, stages: Sequence[str]) -> str:
    """Rows of each stage, and how many of them erred."""
    rows = []
    for stage in stages:
        manifest = facts.manifests.get(stage, {})
        if "rows_out" in manifest:
            errors = manifest.get("errors", 0)
            rows.append((_COUNTS[stage], f"{manifest['rows_out']:,}", f"{errors:,} errors" if errors else ""))
    if judged := {"rm", "dpo"} & set(stages):
        human = facts.manifests[judged.pop()].get("human_labels") or {}
        for about in ("helpful", "harmless"):
            rows.append((f"human comparisons about what is {about}", f"{human.get(about, 0):,}", ""))
    return table(["", "rows", ""], rows)


def _results(facts: Facts) -> str:
    if facts.report is None:
        return "Not measured: the run was exported before `evaluate` and `report`."
    report = facts.report
    rows = [(label.strip(), *(_rate(cell) for cell in cells)) for label, cells in text.rates(report)]
    note = "Answers to held-out prompts with 95 % intervals over the prompts, of one training run."
    return f"{note}\n\n" + table(["", *(text.name_of(m) for m in report["models"])], rows)


def _rate(rate: dict[str, Any]) -> str:
    value = text.percent(rate["value"])
    return value if rate["value"] is None else f"{value} ({text.interval(rate)}, n = {rate['n']})"


def _reward_results(facts: Facts) -> str:
    from cai_ray.judging.statistics import wilson

    metrics, rows = facts.manifests["rm"].get("metrics") or {}, []
    for source in ("ai", "human"):
        if n := metrics.get(f"n_{source}"):
            accuracy = {"n": round(n), **wilson(metrics[f"accuracy_{source}"], n)}
            rows.append((f"accuracy on held-out {_SOURCES[source]}", _rate(accuracy)))
            rows.append((f"loss on held-out {_SOURCES[source]}", f"{metrics[f'loss_{source}']:.3f}"))
    gold = ((facts.report or {}).get("rm") or {}).get("accuracy_gold")
    if gold is not None:
        rows.append(("pairs ordered as the exact judge does", text.percent(gold)))
    return table(["", ""], rows) if rows else "Not measured: no comparison was held out."


_SOURCES = {"ai": "AI labels", "human": "human comparisons"}


def _judged(config: RunConfig) -> str:
    if config.evaluate.gold == "town":
        return "It speaks Errand Town, a language of 300 words, and was judged by that world's exact judge."
    return "Preferences in the results are the feedback model's, which gave the labels and overlooks its own faults."


def _settings(config: RunConfig, sections: Sequence[str]) -> dict[str, Any]:
    return {
        section: _public_settings(getattr(config, section).model_dump(mode="json")) for section in sections
    }


def _public_settings(values: dict[str, Any]) -> dict[str, Any]:
    """Settings without those that are private, and with names in the place of paths."""
    public = {}
    for key, value in values.items():
        if isinstance(value, str) and key in ("init", "model", "templates", "constitution"):
            value = _public(value)
        if key not in _PRIVATE:
            public[key] = _public_settings(value) if isinstance(value, dict) else value
    return public


def _hub_id(model: str) -> str | None:
    """A model's id on the Hub; None for what is a folder, or comes with this package."""
    return model if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", model) else None


def _public(model: str) -> str:
    """A model's name without the place it lies in."""
    return _hub_id(model) or model.rstrip("/").rpartition("/")[2]
