"""The base model's corpus: its skills, on pairs that no evaluation prompt uses.

It has four parts: `ask` (helpful answers to every request, a quarter of them rude), `critique` (a fixed chain of
findings by one rule, then the revision), `judge` (which of two answers is better by one rule, as soft targets) and
`fact` (what things are). Rows are rendered through the same template set and constitution as the pipeline's requests,
so the model learns token for token what it will be asked.

The model learns to criticise and judge on the `skill` pairs alone. The `cai` pairs, on which the pipeline works, occur
only in `ask`; the `dev` and `held` pairs occur nowhere.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from typing import Any, NamedTuple

from cai_ray.constitution import Constitution
from cai_ray.constitution import load as load_constitution
from cai_ray.prompts.load import load_templates
from cai_ray.prompts.renderer import Renderer
from cai_ray.prompts.templates import TemplateSet
from cai_ray.town import grammar, splits
from cai_ray.town.answers import polite, respond
from cai_ray.town.grammar import DEEDS, FAMILY_OF, PRINCIPLES, TownRequest
from cai_ray.town.judge import judge, preference

ROWS = 90_000
SHARES = {"ask": 0.17, "critique": 0.48, "judge": 0.32, "fact": 0.03}
RUDE_SHARE = 0.25
CONFIDENCE = 0.96
"""Target probability of the better answer in a judge row. A target of 1 would make labels over-confident."""


class CorpusRow(NamedTuple):
    """One row of the corpus. Which fields are used depends on the part."""

    part: str
    prompt: str
    response: str = ""
    other: str = ""
    principle: str = ""
    critique: str = ""
    revision: str = ""
    p_first: float = 1.0
    pair: tuple[str, str] = ("", "")


class EncodedRow(NamedTuple):
    """Token ids with their targets.

    ids: (T,). weight: (T,), the target probability of the token at each place, 0 where nothing is learnt. The remaining
    probability belongs to the token in `other` at the same place.
    """

    ids: list[int]
    weight: list[float]
    other: list[int]


CRITIQUE_STYLES = {
    "polite": 0.45, "rude": 0.22, "refuse": 0.18, "misnamed": 0.07, "rude refusal": 0.05,
    "off": 0.03,
}  # fmt: skip
JUDGE_STYLES = {
    "polite": 0.32, "rude": 0.23, "refuse": 0.22, "misnamed": 0.08, "rude refusal": 0.06,
    "off": 0.04, "broken": 0.05,
}  # fmt: skip


def _style(styles: dict[str, float], rng: random.Random) -> str:
    return rng.choices(list(styles), list(styles.values()))[0]


def critique(request: TownRequest, answer: str, rule: str) -> str:
    """The chain of findings: the deed, the answer, the faults, then whether the rule's fault is among them.

    A small model can learn the verdict because it only has to look up the rule among the faults that it has just
    written. It does not learn a verdict without the chain.
    """
    verdict = judge(request.text, answer)
    deed = PRINCIPLES[request.principle].fault if request.principle else "fine"
    faults = [
        deed if verdict.complies and request.principle else "none",
        PRINCIPLES["respect"].fault if verdict.insult else "none",
    ]
    return (
        f"the {request.object} is {grammar.KIND_OF[request.object]} and"
        f" {'mine' if request.mine else 'not mine'} , so to {request.verb} it is {deed} ."
        f" the answer {'refuses' if verdict.refuses else 'helps'}"
        f" and is {'rude' if verdict.insult else 'polite'} ."
        f" faults : {faults[0]} , {faults[1]} . rule : {PRINCIPLES[rule].fault} ."
        f" verdict {'bad' if verdict.breaks(rule) else 'fine'} ."
    )


def revise(request: TownRequest, answer: str, rule: str) -> str:
    """The answer without this rule's fault, and otherwise unchanged."""
    if not judge(request.text, answer).breaks(rule):
        return answer
    if rule == "respect":
        return polite(answer)
    return grammar.refuse(request.verb, request.object, rule)


def _rule(request: TownRequest, rng: random.Random) -> str:
    """The rule of a critique row: at stake in about half of the rows, else a similar rule or any other."""
    at_stake = request.principle
    others = [p for p in DEEDS if p != at_stake]
    look_alike = at_stake or FAMILY_OF[request.verb]
    if look_alike not in DEEDS:
        look_alike = rng.choice(DEEDS)
    return rng.choices([look_alike, "respect", rng.choice(others)], [0.6, 0.22, 0.18])[0]


def ask_rows(n: int, rng: random.Random) -> Iterator[CorpusRow]:
    """Helpful answers to every request: the base model knows the steps and shows no restraint."""
    both: tuple[splits.Split, ...] = ("skill", "cai")
    for i, split in enumerate(both):
        for request in splits.draw(split, n // 2 + i * (n % 2), rng):
            style = "rude" if rng.random() < RUDE_SHARE else "polite"
            yield CorpusRow("ask", request.text, respond(request, style, rng), pair=request.pair)


def critique_rows(n: int, rng: random.Random, split: splits.Split = "skill") -> Iterator[CorpusRow]:
    for request in splits.draw(split, n, rng, harmful_share=0.6):
        rule = _rule(request, rng)
        answer = respond(request, _style(CRITIQUE_STYLES, rng), rng)
        chain, better = critique(request, answer, rule), revise(request, answer, rule)
        yield CorpusRow(
            "critique", request.text, answer, "", rule, chain, better, pair=request.pair
        )  # fmt: skip


def two_answers(request: TownRequest, rng: random.Random) -> tuple[str, str]:
    """Two different answers to a request, in the styles that a judge sees."""
    a = b = ""
    while a == b:
        a, b = (respond(request, _style(JUDGE_STYLES, rng), rng) for _ in range(2))
    return a, b


def judge_rows(n: int, rng: random.Random, split: splits.Split = "skill") -> Iterator[CorpusRow]:
    """Pairs of answers, each judged by three principles: the one at stake, respect, and another one."""
    for request in splits.draw(split, n // 3, rng, harmful_share=0.7):
        a, b = two_answers(request, rng)
        deeds = list(DEEDS)
        rng.shuffle(deeds)
        deeds.sort(key=lambda p: p != request.principle)
        for principle in (*deeds[:2], "respect"):
            p = 0.5 + (2 * CONFIDENCE - 1) * (preference(request.text, a, b, principle) - 0.5)
            yield CorpusRow("judge", request.text, a, b, principle, p_first=p, pair=request.pair)


def fact_rows(n: int, rng: random.Random) -> Iterator[CorpusRow]:
    """What each object is, and whose. Facts name no verb, so they reveal no pair."""
    things = list(grammar.KIND_OF)
    for i in range(n):
        owner = None if i % 2 else rng.choice(grammar.OWNERS)
        yield CorpusRow("fact", *grammar.fact(rng.choice(things), owner))


def rows(seed: int, n: int = ROWS) -> list[CorpusRow]:
    """The corpus, part after part. Training shuffles it."""
    parts = {"ask": ask_rows, "critique": critique_rows, "judge": judge_rows, "fact": fact_rows}
    return [
        row
        for part, make in parts.items()
        for row in make(round(n * SHARES[part]), random.Random(f"corpus:{part}:{seed}"))
    ]


def digest(corpus: list[CorpusRow]) -> str:
    """Hash of a corpus and of the template texts around it."""
    templates, constitution = town_texts()
    steps = {"transcript", "answer", "critique", "revision", "feedback", "options"}
    head = [
        templates.model_dump(mode="json", include=steps),
        [[p.critique_request, p.revision_request, p.comparison] for p in constitution.principles],
    ]
    sha = hashlib.sha256(json.dumps(head, sort_keys=True).encode())
    for row in corpus:
        sha.update(json.dumps(row).encode())
    return sha.hexdigest()[:16]


def town_texts() -> tuple[TemplateSet, Constitution]:
    """The template set and the constitution that the pipeline and the corpus share."""
    return load_templates("errand-town"), load_constitution("errand-town")


class Encoder:
    """Encodes rows through the pipeline's own templates and renderer."""

    def __init__(self, tokenizer: Any):
        self.renderer = Renderer(tokenizer)
        self.templates, self.constitution = town_texts()
        self.options = self.renderer.option_ids(self.templates.options)

    def __call__(self, row: CorpusRow) -> EncodedRow:
        turns = [{"role": "user", "content": row.prompt}]
        if row.part == "judge":
            principle = self.constitution[row.principle]
            messages = self.templates.feedback_messages(turns, row.response, row.other, principle)
            ids = self.renderer.prompt_ids(messages)
            zeros = [0.0] * len(ids)
            a, b = self.options
            return EncodedRow([*ids, a], [*zeros, row.p_first], [*ids, b])
        if row.part == "critique":
            principle = self.constitution[row.principle]
            messages = self.templates.critique_messages(turns, row.response, principle)
            first = self._encode_answer(messages, row.critique)
            messages = self.templates.revision_messages(turns, row.response, principle, row.critique)
            ids, mask = self._encode_answer(messages, row.revision)
            if ids[: len(first[0])] != first[0]:
                raise ValueError("the revision template must continue the critique template")
            mask[: len(first[1])] = first[1]
            return EncodedRow(ids, mask, ids)
        messages = self.templates.answer_messages(turns)
        if row.part == "fact":  # in the critic's mode, whose chain uses the facts; answers stay as they are
            mode = self.templates.critique_messages(turns, "", self.constitution.principles[0])[0]
            messages = [mode, *messages[1:]]
        ids, mask = self._encode_answer(messages, row.response)
        return EncodedRow(ids, mask, ids)

    def _encode_answer(self, messages: Any, text: str) -> tuple[list[int], list[float]]:
        written = {"role": "assistant", "content": text}
        ids, mask = self.renderer.dialogue_ids([*messages, written])
        return ids, [float(m) for m in mask]


def gold_comparisons(n: int, seed: int, split: splits.Split = "dev") -> list[dict[str, Any]]:
    """Comparisons of answers with their exact preferences, for the calibration of labels.

    `gold` is by all principles together, `gold_by_principle` by each alone: 1 if a is better, 0 if b is, 0.5 if the
    principles say nothing or contradict each other.
    """
    rng = random.Random(f"gold:{split}:{seed}")
    rows = []
    for i, request in enumerate(splits.draw(split, n, rng)):
        a, b = two_answers(request, rng)
        text = request.text
        rows.append(
            {
                "id": f"gold-{split}-{seed}-{i:05d}",
                "messages": [{"role": "user", "content": text}],
                "response_a": a,
                "response_b": b,
                "gold": preference(text, a, b, *PRINCIPLES),
                "gold_by_principle": {p: preference(text, a, b, p) for p in PRINCIPLES},
            }
        )
    return rows
