"""Inside vLLM's worker: the model it runs, its reload, and its cache.

vllm 0.29.0: a class that `worker_extension_cls` names gets the worker's attributes, which are vLLM's own business. No
public call loads named tensors into a running model, clears the blocks of keys and values, or says what a model's
loader consumed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from vllm.config import set_current_vllm_config
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload


def worker_model(worker: Any) -> Any:
    """The model of a worker, a torch module with `load_weights`."""
    return worker.model_runner.get_model()


def start_reload(worker: Any) -> None:
    """Prepares the model for new tensors; each layer is packed for its kernels when its tensors are complete."""
    initialize_layerwise_reload(worker_model(worker))


def load_tensors(worker: Any, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Loads some of the model's tensors, named as in its folder, between `start_reload` and `finish_reload`."""
    with set_current_vllm_config(worker.vllm_config):
        worker_model(worker).load_weights(tensors)


def finish_reload(worker: Any) -> None:
    """Packs what is not packed yet; the model computes with the new tensors from now on."""
    with set_current_vllm_config(worker.vllm_config):
        finalize_layerwise_reload(worker_model(worker), worker.model_runner.model_config)
    worker.model_runner.reset_lora_state()


def clear_cache(worker: Any) -> None:
    """Sets all blocks of keys and values to zero."""
    for layer in worker.model_runner.kv_caches:
        layer.zero_()
