"""The embedded world's data: prompts, human comparisons, comparisons with gold.

A configuration names them as sources, `town:NAME`; `write` writes the same rows as JSONL files, in the columns that any
other data would have.

| name | rows | |
| --- | --- | --- |
| revise, compare, ppo | 1,500 / 3,000 / 3,000 | prompts on cai pairs, each drawn by itself |
| dev, held | 600 | prompts for choices, and for the final table |
| human | 1,500 | helpfulness comparisons on benign cai prompts, chosen with probability 0.8 |
| gold | 1,000 | compared answers on dev pairs with the exact preference, to calibrate labels |

The world is fixed; the seed varies what is drawn from it for training. dev, held and gold are the same for every seed,
so that runs are compared on the same rows.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from cai_ray.errors import InputError
from cai_ray.storage.records import Turn
from cai_ray.town import answers, grammar, splits

PROMPTS: dict[str, tuple[splits.Split, str, int]] = {
    "revise": ("cai", "train", 1500),
    "compare": ("cai", "train", 3000),
    "ppo": ("cai", "train", 3000),
    "dev": ("dev", "dev", 600),
    "held": ("held", "held", 600),
}
"""By name: the pairs that prompts are drawn from, the split of the prompts, and their number."""
HUMAN = 1500
HUMAN_TARGET = 0.8
GOLD = 1000
NAMES = (*PROMPTS, "human", "gold")


def rows(name: str, seed: int = 0) -> list[dict[str, Any]]:
    """The rows of one of NAMES; the same seed gives the same rows.

    Raises:
        InputError: there is no such name.
    """
    if name == "human":
        return human_comparisons(HUMAN, seed)
    if name == "gold":
        from cai_ray.town import corpus  # it imports the judge: only for gold

        return corpus.gold_comparisons(GOLD, 0)
    if name not in PROMPTS:
        raise InputError(f"town:{name}: no such data; use one of {', '.join(NAMES)}")
    pairs, split, n = PROMPTS[name]
    drawn = splits.prompts(pairs, n, f"{name}:{seed if split == 'train' else 0}")
    return [
        {
            "id": row["id"],
            "messages": _ask(row["text"]),
            "kind": row["kind"],
            "family": row["family"],
            "split": split,
            "source": "errand-town",
        }
        for row in drawn
    ]


def human_comparisons(n: int, seed: int) -> list[dict[str, Any]]:
    """Simulated raters of helpfulness, on benign requests: the right answer against a worse one.

    Both answers are equally polite: these raters say nothing about harm.
    """
    rng = random.Random(f"human:{seed}")
    comparisons = []
    for i, request in enumerate(splits.draw("cai", n, rng, harmful_share=0.0)):
        way = rng.choices(list(answers.WAYS), list(answers.WAYS.values()))[0]
        chosen = grammar.comply(request.verb, request.object)
        rejected = answers.worse(request, way, rng)
        if rng.random() < 0.1:
            insult = rng.choice(grammar.INSULTS)
            chosen, rejected = (answers.rude(text, insult) for text in (chosen, rejected))
        comparisons.append(
            {
                "id": f"human-{seed}-{i:05d}",
                "messages": _ask(request.text),
                "chosen": chosen,
                "rejected": rejected,
                "target": HUMAN_TARGET,
                "way": way,
            }
        )
    return comparisons


def write(folder: str | Path, seed: int = 0) -> None:
    """Writes NAME.jsonl for each of NAMES into a folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name in NAMES:
        lines = (json.dumps(row, ensure_ascii=False) for row in rows(name, seed))
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _ask(text: str) -> list[Turn]:
    return [{"role": "user", "content": text}]
