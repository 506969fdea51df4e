"""PPO's prompts: their token ids are one array, and each prompt is what it was."""

import pickle
from typing import Any

from cai_ray.train.ppo.prompts import Prompts


def prompt(number: int, ids: list[int]) -> dict[str, Any]:
    messages = [{"role": "user", "content": f"question {number}"}]
    return {"id": f"p{number}", "messages": messages, "kind": "helpful", "family": None, "ids": ids}


def test_a_prompt_is_what_it_was() -> None:
    given = [prompt(0, [5, 6, 7]), prompt(1, []), prompt(2, [300_000])]
    prompts = pickle.loads(pickle.dumps(Prompts(given)))
    assert [prompts[place] for place in range(len(prompts))] == given
    assert prompts.lengths == [3, 0, 1]
    assert not Prompts([])


def test_prompts_differ_by_their_token_ids_and_their_own() -> None:
    given = [prompt(0, [5, 6]), prompt(1, [7])]
    others = ([prompt(0, [5]), prompt(1, [6, 7])], [prompt(0, [5, 6]), prompt(2, [7])], given[::-1])
    assert Prompts(given).sha == Prompts(given).sha
    assert Prompts(given).sha not in [Prompts(other).sha for other in others]


def test_a_token_takes_four_bytes() -> None:
    """A list of numbers would take nine times as much in memory."""
    one, many = ([prompt(0, list(range(1000, 1000 + n)))] for n in (1, 10_001))
    grown = len(pickle.dumps(Prompts(many), protocol=5)) - len(pickle.dumps(Prompts(one), protocol=5))
    assert abs(grown - 4 * 10_000) < 100
