"""The shape of a model, read from its config.json without its weights."""

from __future__ import annotations

import ast
from functools import lru_cache
from typing import Any, NamedTuple

from cai_ray.config.run import RunConfig
from cai_ray.errors import InputError
from cai_ray.storage import hub
from cai_ray.storage.models import hub_model, local_model
from cai_ray.storage.run import Run


class Shape(NamedTuple):
    """What determines how much memory a model needs."""

    params: int
    layers: int
    hidden: int
    kv: int
    """Numbers in one token's keys (or values) in one layer."""
    intermediate: int
    vocab: int
    head: int
    """Parameters of the output head, which reward and value models do not have; 0 if it is tied."""
    context: int
    whole_logits: bool
    """Whether training computes all logits of a micro-batch at once (train/models.py)."""
    linear: tuple[tuple[str, int, int], ...]
    """Name, inputs and outputs of each linear layer that an adapter can be added to."""


def shape_of(config: RunConfig, role: str) -> Shape:
    """The shape of a model by its role. A model that is not trained yet has the shape of the one it starts from."""
    run = Run(config)
    name = run.locate(run.starts_from(role))
    fields = config.check.model if name == config.model else None
    return _shape(name, tuple(sorted((k, repr(v)) for k, v in (fields or {}).items())))


@lru_cache(maxsize=16)
def _shape(name: str, fields: tuple[tuple[str, str], ...]) -> Shape:
    import torch
    from transformers import AutoModelForCausalLM

    from cai_ray.train.models import scales_logits

    config = _read_config(name, {k: ast.literal_eval(v) for k, v in fields})
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as e:  # the architecture's code may raise anything on impossible numbers
        raise InputError(
            f"model {name}: its config.json does not describe a causal language model ({e})"
        ) from e
    text = config.get_text_config()
    heads = text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    output = model.get_output_embeddings()
    tied = output is not None and output.weight is model.get_input_embeddings().weight
    tied = tied or bool(text.tie_word_embeddings)
    return Shape(
        params=sum(p.numel() for p in model.parameters()),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        kv=(getattr(text, "num_key_value_heads", None) or heads) * head_dim,
        intermediate=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        vocab=text.vocab_size,
        head=0 if tied or output is None else output.weight.numel(),
        context=getattr(text, "max_position_embeddings", 4096),
        whole_logits=scales_logits(text),
        linear=tuple(
            (path.rsplit(".", 1)[-1], module.in_features, module.out_features)
            for path, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and module is not output
        ),
    )


def elsewhere(config: RunConfig) -> bool:
    """Whether the base model is only where the run will be, so that `check.model` alone describes it here."""
    repo = hub_model(Run(config).locate("base")) if config.check.model is not None else None
    return repo is not None and hub.config_folder(repo, download=False) is None


def _read_config(name: str, given: dict[str, Any]) -> Any:
    """config.json from the folder or the cache, else from the given fields, else from the hub.

    Raises:
        InputError: none of these has it.
    """
    from transformers import AutoConfig

    repo = hub_model(name)
    folder = hub.config_folder(repo, download=False) if repo else local_model(name)
    if folder is None and "model_type" in given:
        try:
            return AutoConfig.for_model(given.pop("model_type"), **given)
        except (ValueError, TypeError) as e:
            raise InputError(f"check.model: {e}; give the fields of the model's config.json") from e
    if folder is None and repo is not None:
        try:
            folder = hub.config_folder(repo)
        except hub.Unreachable as e:
            fields = "or give the fields of its config.json (model_type, hidden_size, …) under check.model"
            raise InputError(f"{e}; {fields}") from e
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as e:
        reason = (str(e).splitlines() or [type(e).__name__])[0]
        raise InputError(f"model {name}: its config.json cannot be used ({reason})") from e
