"""A model's whole tensors by the names of its Hugging Face folder: for the engines, and to save the folder."""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cai_ray.compat.pytorch import persistent_buffers
from cai_ray.storage import files
from cai_ray.train.models import base_model
from cai_ray.train.runtime.engine import Trained, gatherer
from cai_ray.train.runtime.ranks import rank, world_size

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)

Gather = Callable[[list[nn.Parameter]], AbstractContextManager[Any]]


def state_items(model: nn.Module, gather: Gather | None = None) -> Iterator[tuple[str, Tensor]]:
    """Yields a model's tensors one by one, named as in a plain folder, adapters merged, a tied head included.

    A tensor is valid until the next one is asked for: copy it to keep it.

    Args:
        gather: makes the given parameters whole while its context lasts (ZeRO-3). All ranks iterate alike.
    """
    gather = gather or (lambda _: nullcontext())
    model = base_model(model)
    adapters = {f"{name}.": module for name, module in model.named_modules() if hasattr(module, "lora_A")}
    for name, parameter in model.named_parameters():
        if "lora_" in name or ".original_module." in name:
            continue
        owner = next((p for p in adapters if name.startswith(p)), None)
        if owner is not None and name == f"{owner}base_layer.weight":
            layer: Any = adapters[owner]
            with gather([parameter, *(p for n, p in layer.named_parameters() if "lora_" in n)]):
                merged = parameter.detach().clone()
                if not layer.merged:
                    for adapter in layer.active_adapters:
                        merged += layer.get_delta_weight(adapter).detach().to(merged.dtype)
                yield f"{owner}weight", merged
            continue
        with gather([parameter]):
            plain = name.replace(".base_layer.", ".").replace(".modules_to_save.default.", ".")
            yield plain, parameter.detach()
    for prefix, module in model.named_modules():
        for name, buffer in persistent_buffers(module):
            yield f"{prefix}.{name}" if prefix else name, buffer
    head = model.get_output_embeddings()
    if head is not None and head.weight is model.get_input_embeddings().weight:
        name = next(n for n, module in model.named_modules() if module is head)
        with gather([head.weight]):
            yield f"{name}.weight", head.weight.detach()


def save_folder(model: nn.Module, source: str, out: str, state: Mapping[str, Tensor] | None = None) -> None:
    """Writes a Hugging Face folder: configuration, safetensors, and the tokenizer and chat template of `source`.

    Args:
        source: the folder or id that the model was loaded from.
        out: any URI. The folder is written elsewhere and copied, so that a local `out` never holds half a model.
        state: the tensors (`state_items`), if the model's own are partitioned over ranks.
    """
    base = base_model(model)
    items = state.items() if state is not None else state_items(model)
    tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in items}
    if base.config.get_text_config().tie_word_embeddings:
        tensors.pop("lm_head.weight", None)  # the loader ties it to the embedding again
    with tempfile.TemporaryDirectory() as folder:
        mend_generation_config(base)
        base.save_pretrained(folder, state_dict=tensors)
        copy_tokenizer(source, folder)
        files.upload_folder(folder, out)


def mend_generation_config(model: Any) -> None:
    """Makes a model's generation configuration one that transformers saves: it loads more than it saves.

    Published models often name a temperature and leave out `do_sample`, which is then set. What is still refused loses
    everything but its token ids. A folder's defaults for sampling must never cost the weights that were trained.
    """
    given = getattr(model, "generation_config", None)
    if given is None or _can_be_saved(given):
        return
    sampling = copy.deepcopy(given)
    if sampling.do_sample is None:
        sampling.do_sample = True
    ids = {k: v for k, v in given.to_dict().items() if k.endswith("_token_id") and _is_token_id(v)}
    model.generation_config = sampling if _can_be_saved(sampling) else type(given)(**ids)


def _can_be_saved(config: Any) -> bool:
    try:
        config.validate(strict=True)
    except ValueError:
        return False
    return True


def _is_token_id(value: Any) -> bool:
    ids = value if isinstance(value, list) else [value]
    return all(isinstance(i, int) and i >= 0 for i in ids)


def copy_tokenizer(source: str, folder: str) -> None:
    """Copies the tokenizer files of a folder unchanged; of an id, saves them as transformers loads them."""
    if Path(source).is_dir():
        for name in TOKENIZER_FILES:
            if (Path(source) / name).exists():
                shutil.copy(Path(source) / name, folder)
    else:
        from cai_ray.prompts.tokenizers import load_tokenizer

        load_tokenizer(source).save_pretrained(folder)


def gathered_state(trained: Trained) -> Iterator[tuple[str, Tensor]]:
    """Yields a trained model's whole tensors one by one (`state_items`); every rank iterates to the end."""
    with torch.no_grad():
        yield from state_items(trained.module, gatherer(trained))


def save_model(trained: Trained, source: str, uri: str) -> None:
    """Writes a Hugging Face folder with the tokenizer of `source` to a URI; every rank calls it, rank 0 writes."""
    state: dict[str, Tensor] = {}
    for name, tensor in gathered_state(trained):
        if rank() == 0:
            state[name] = tensor.detach().to("cpu", copy=True)
    if rank() == 0:
        save_folder(trained.module, source, uri, state)
    if world_size() > 1:
        dist.barrier()
