"""The cards of an exported run: README.md of models and datasets, as the Hugging Face Hub reads them.

The metadata is huggingface_hub's, the text a template of our own. Its `from_template` escapes nothing, so the template
is filled here, where whatever is not ours (principles, names, settings) is text and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml
from huggingface_hub import CardData, DatasetCard, DatasetCardData, ModelCard, ModelCardData

from cai_ray.export import snippets
from cai_ray.export.card_facts import (
    RunFacts,
    hub_id,
    policy_results,
    public_name,
    reviser_name,
    reward_model_results,
    row_counts,
    settings,
)
from cai_ray.export.markdown import Markdown, render
from cai_ray.export.roles import role_of
from cai_ray.report.label_quality import certificate_facts

_TAGS = ["constitutional-ai", "cai_ray"]


def model_card(role: str, facts: RunFacts, end: str = "", scale: dict[str, float] | None = None) -> str:
    """README.md of a model.

    Args:
        role: `sl`, `rm` or `rl`.
        end: of a reward model, the token that ends an answer.
        scale: of a reward model, its reward_head.json.
    """
    config = facts.config
    described = role_of(role, config.method, reviser_name(config))
    data = ModelCardData(
        base_model=hub_id(config.model),
        library_name="transformers",
        pipeline_tag=described.pipeline_tag,
        tags=[*_TAGS, *described.tags],
    )
    if role == "rm":
        use = snippets.reward_model(facts.example, end, scale or {})
    else:
        use = snippets.policy(facts.example, config.evaluate.max_tokens)
    card = _filled(
        "model_card.md",
        data,
        facts,
        role=described,
        use=use,
        counts=row_counts(facts, described.stages),
        settings=yaml.safe_dump(settings(config, described.stages), sort_keys=False, allow_unicode=True),
        reward_model_results=reward_model_results(facts) if role == "rm" else None,
    )
    return str(ModelCard(card))


def dataset_card(facts: RunFacts, rows: dict[str, int], left_out: dict[str, int]) -> str:
    """README.md of the folder of datasets.

    Args:
        rows: how many rows each configuration has.
        left_out: how many labels are in no row, by the reason.
    """
    configs = [
        {"config_name": name, "data_files": [{"split": "train", "path": f"data/{name}/*.parquet"}]}
        for name in rows
    ]
    data = DatasetCardData(tags=[*_TAGS, "synthetic"], configs=configs)
    card = _filled(
        "dataset_card.md",
        data,
        facts,
        rows=rows,
        reviser=reviser_name(facts.config),
        left_out=", ".join(f"{number} {why}" for why, number in left_out.items()),
        use=snippets.dataset(next(reversed(rows))),
        label_quality=certificate_facts(facts.certificate) if facts.certificate else [],
    )
    return str(DatasetCard(card))


def run_card(facts: RunFacts, written: Sequence[str], missing: Sequence[str]) -> str:
    """README.md of the whole export, which has no metadata."""
    return _filled("run_card.md", CardData(), facts, written=written, missing=missing)


def _filled(template: str, data: CardData, facts: RunFacts, **more: Any) -> str:
    """A card as text.

    Args:
        more: what this template needs beside what all of them need.
    """
    return render(
        template,
        metadata=Markdown(data.to_yaml()),
        name=facts.config.name,
        base_model=public_name(facts.config.model),
        seed=facts.config.seed,
        constitution=facts.constitution,
        results=policy_results(facts),
        judged_by_town=facts.config.evaluate.gold == "town",
        **more,
    )
