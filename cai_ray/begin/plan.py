"""The settings of a first run, each with its reason: small enough to end soon on this machine.

Times follow a plain rule: so many parameters pass through a core or GPU in a second. It is wrong by a factor of a few,
which a first run can bear; `--estimate` measures.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import log2
from typing import Any, NamedTuple

from cai_ray.begin.lengths import Lengths
from cai_ray.begin.machine import Machine
from cai_ray.begin.model import ModelFacts

_CPU_RATE, _GPU_RATE = 7e9, 1e13
"""Parameters times tokens that a core and a GPU generate in a second. Training a token takes twice as long."""
_CPU_SECONDS, _GPU_SECONDS = 1200, 7200
"""About how long the first run may take."""
_PPO_SHARE = 0.4
"""Share of that time for PPO."""
_PLAIN_BATCH = 16384
"""The default of `micro_batch_tokens`."""
_MIB = 2**20


class Setting(NamedTuple):
    """A setting, its value, and why it has this value."""

    key: str
    """Its path, such as `sft.epochs`."""
    value: Any
    why: str


SAVINGS: tuple[tuple[Setting, ...], ...] = (
    (),
    (Setting("gradient_checkpointing", True, "takes less memory and more time"),),
    (
        Setting("gradient_checkpointing", True, "takes less memory and more time"),
        Setting("lora", {"rank": 32, "alpha": 64}, "training all weights does not fit into the memory"),
    ),
)
"""Settings of every training stage that save memory, from none to all."""


class Amounts(NamedTuple):
    """How much a first run does."""

    rounds: int
    epochs: int
    prompts: int
    batch: int
    ppo_steps: int
    rollouts: int
    """Responses in a step of PPO."""
    seconds: float
    """About how long this takes; engines that start and models that are loaded come on top."""


def plan(
    model: ModelFacts,
    lengths: Lengths,
    machine: Machine,
    counts: Mapping[str, int],
    saving: tuple[Setting, ...] = (),
) -> list[Setting]:
    """The settings of a first run, apart from its name, model, constitution and data.

    Args:
        counts: prompts of each part of the data, `train`, `development` and `held_out`.
        saving: one of SAVINGS.
    """
    amounts = choose_amounts(model.shape.params, lengths, machine, counts["train"])
    prompts, held = amounts.prompts, counts["held_out"]
    evaluated = min(held, max(16, prompts // 4))
    settings = [
        *_engine(model, lengths, machine),
        Setting("revise.rounds", amounts.rounds, "rounds of critique and revision; the paper has 4"),
        Setting(
            "revise.limit", prompts, f"of {counts['train']} training prompts; raise it when all goes well"
        ),
        Setting("revise.max_tokens", lengths.answer, lengths.seen),
        Setting("revise.critique_max_tokens", lengths.answer, "a critique of a few sentences"),
        Setting("sft.epochs", amounts.epochs, "passes over the revisions; one is enough for thousands"),
        *_training("sft", model, lengths, machine, amounts, saving),
        Setting("compare.limit", prompts, "as revise.limit"),
        Setting("compare.max_tokens", lengths.answer, "as revise.max_tokens"),
        Setting(
            "label.judge.principles", 1, "principles that vote on each comparison; more give better labels"
        ),
    ]
    if machine.gpus == 1:
        settings.insert(0, Setting("method", "dpo", "PPO needs a second GPU, for the engine that samples"))
        settings += _training("dpo", model, lengths, machine, amounts, saving)
    else:
        settings += _training("rm", model, lengths, machine, amounts, saving)
        settings += _ppo(machine, lengths, amounts, counts["development"])
        settings += _training("ppo", model, lengths, machine, amounts, saving)
    return [
        *settings,
        Setting("evaluate.limit", evaluated, f"of {held} held-out prompts; more narrow the intervals"),
        Setting("evaluate.max_tokens", lengths.answer, "as revise.max_tokens"),
        Setting("max_error_rate", 0.2, "of few rows, some that fail are a large share; 0.05 is strict"),
    ]


def choose_amounts(params: int, lengths: Lengths, machine: Machine, prompts: int) -> Amounts:
    """As much as the machine does in the time of a first run; always enough to go through every stage."""
    if machine.gpus:
        speed, seconds, most = machine.gpus * _GPU_RATE / params, _GPU_SECONDS, 8192
        rounds, epochs, batch, rollouts, steps = 2, 1, 64, 128, 200
    else:
        speed, seconds, most = machine.cores * _CPU_RATE / params, _CPU_SECONDS, 256
        rounds, epochs, batch, rollouts, steps = 1, 2, 8, 16, 20
    answer, dialogue = lengths.answer, lengths.prompt + lengths.answer
    # In tokens that are generated: one that is read costs half of it, one that is trained on twice.
    generated = answer * (1 + 2 * rounds) + 2 * answer
    read = (2 * rounds + 2) * (dialogue + 2 * answer)
    per_prompt = generated + 0.5 * read + 2 * dialogue * (epochs + 2)
    per_step = rollouts * (answer + 2 * 2 * dialogue + 0.5 * 2 * dialogue)
    fitting = int((1 - _PPO_SHARE) * seconds * speed / per_prompt)
    used = min(prompts, max(32, min(fitting, most)))
    done = min(steps, max(4, int(_PPO_SHARE * seconds * speed / per_step)))
    return Amounts(
        rounds,
        epochs,
        used,
        _power(min(batch, max(2, used // 4))),
        done,
        rollouts,
        (used * per_prompt + done * per_step) / speed,
    )


def _engine(model: ModelFacts, lengths: Lengths, machine: Machine) -> list[Setting]:
    why = f"the longest prompts of the steps fit; the model has {model.shape.context}"
    context = Setting("engine.max_model_len", lengths.context, why)
    if machine.gpus:
        return [
            context,
            Setting("engine.dtype", "bfloat16", "what GPUs are good at"),
            Setting("engine.max_actors", machine.gpus, "an engine on each GPU"),
        ]
    sequence = 2 * model.shape.layers * model.shape.kv * lengths.context * 4 / _MIB
    cache = -(-int(max(256, sequence, min(4 * sequence, 128 * machine.memory_gib))) // 64) * 64
    return [
        context,
        Setting("engine.max_num_seqs", 16, "more sequences at once do not help a few cores"),
        Setting("engine.kv_cache_mb", cache, f"a sequence of full length takes {max(1, round(sequence))} MB"),
    ]


def _training(
    section: str,
    model: ModelFacts,
    lengths: Lengths,
    machine: Machine,
    amounts: Amounts,
    saving: tuple[Setting, ...],
) -> list[Setting]:
    """The settings that every training stage has."""
    size = model.shape.params
    rate = 1e-4 if size < 5e8 else 3e-5 if size < 3e9 else 1e-5
    rate *= {"sft": 1, "rm": 0.5, "ppo": 0.1, "dpo": 0.05}[section]
    settings = [
        Setting("learning_rate", float(f"{rate:.1g}"), f"a usual rate for {size / 1e9:.2g} B parameters")
    ]
    if section != "ppo":
        settings.append(
            Setting("batch_size", amounts.batch, "rows in a step; 64 or more with thousands of rows")
        )
    if machine.gpus:
        workers = _power(_ppo_gpus(machine)[0] if section == "ppo" else min(machine.gpus, amounts.batch))
        settings.append(Setting("workers", workers, f"of {machine.gpus} GPUs"))
        settings.append(Setting("dtype", "bfloat16", "what GPUs are good at"))
    tokens = max(_PLAIN_BATCH if machine.gpus else 2048, lengths.context)
    if tokens != _PLAIN_BATCH:
        settings.append(Setting("micro_batch_tokens", tokens, "the longest row fits; more takes more memory"))
    return [Setting(f"{section}.{s.key}", s.value, s.why) for s in (*settings, *saving)]


def _ppo(machine: Machine, lengths: Lengths, amounts: Amounts, development: int) -> list[Setting]:
    steps = amounts.ppo_steps
    settings = [
        Setting("steps", steps, "enough to see the reward rise; hundreds for a result"),
        Setting("rollout_batch", amounts.rollouts, "responses in a step; 256 or more with GPUs"),
        Setting("minibatch", amounts.rollouts // 2, "half of rollout_batch"),
        Setting("epochs", 1, "passes over a step's responses"),
        Setting("max_tokens", lengths.answer, "as revise.max_tokens"),
    ]
    if machine.gpus:
        settings.append(Setting("rollout_engines", _ppo_gpus(machine)[1], "GPUs that sample"))
    if development and (not machine.gpus or machine.gpus >= 4):
        watched = min(development, 64 if machine.gpus else 16)
        settings += [
            Setting("watch.every", max(2, steps // 2), "steps between looks at development prompts"),
            Setting("watch.limit", watched, f"of {development} development prompts"),
        ]
    return [Setting(f"ppo.{s.key}", s.value, s.why) for s in settings]


def _ppo_gpus(machine: Machine) -> tuple[int, int]:
    """GPUs for PPO's workers and for its engines. From four GPUs on, one is left for the judge of `ppo.watch`."""
    engines = max(1, machine.gpus // 4)
    return machine.gpus - engines - (machine.gpus >= 4), engines


def _power(number: float) -> int:
    """The largest power of two that does not exceed the number."""
    return 2 ** int(log2(max(1, number)))
