"""The engine's side of a weight sync, in vLLM's worker: it receives named tensors and says what it received.

Only vLLM's processes import it (`rollout_engine.WORKER`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from cai_ray.compat.vllm_gloo import register_gloo
from cai_ray.compat.vllm_worker import clear_cache, finish_reload, load_tensors, start_reload, worker_model
from cai_ray.train.weights.object_store import Packed, unpack
from cai_ray.train.weights.proof import digest


class SyncWorker:
    """Methods that vLLM's worker gains; `collective_rpc` calls them on every worker of an engine."""

    _sync_received: dict[str, tuple[int, tuple[int, ...], torch.dtype]]
    _sync_loaded: set[str]
    _sync_original_load: Callable[..., Any] | None = None

    def sync_record_loads(self) -> None:
        """Records what the model's loader consumes from now on: a tensor that never comes this far has no digest."""
        model = worker_model(self)
        self._sync_received, self._sync_loaded = {}, set()
        if self._sync_original_load is not None:
            return
        self._sync_original_load = original = model.load_weights

        def recording_load(weights: Iterable[tuple[str, Tensor]]) -> Any:
            def recorded() -> Iterator[tuple[str, Tensor]]:
                for name, tensor in weights:
                    self._sync_received[name] = (digest(tensor), tuple(tensor.shape), tensor.dtype)
                    yield name, tensor

            loaded = original(recorded())
            self._sync_loaded |= set(loaded or ())
            return loaded

        model.load_weights = recording_load

    def sync_start(self) -> None:
        """Prepares the model for new tensors."""
        self.sync_record_loads()
        start_reload(self)

    def sync_load(self, chunk: list[Packed]) -> None:
        """Loads some tensors."""
        load_tensors(self, unpack(chunk))

    def sync_finish(self) -> None:
        """Ends the load: the model computes with the new tensors from now on."""
        finish_reload(self)

    def sync_clear_cache(self) -> None:
        """Sets the cached keys and values to zero."""
        clear_cache(self)

    def sync_report(self) -> tuple[dict[str, int], list[str]]:
        """Digests by the sender's names, and the names of parameters that the last load did not fill."""
        parameters = dict(worker_model(self).named_parameters())
        received = getattr(self, "_sync_received", {})
        digests = {}
        for name, (received_digest, shape, dtype) in received.items():
            own = parameters.get(name)
            digests[name] = received_digest
            # Embeddings are padded with rows at the end; packed weights are empty, fused ones have other names.
            if (
                own is not None
                and own.dtype == dtype
                and shape
                and own.shape[1:] == shape[1:]
                and len(own) >= shape[0]
            ):
                digests[name] = digest(own[: shape[0]])
        return digests, sorted(parameters.keys() - getattr(self, "_sync_loaded", set()))


register_gloo()
