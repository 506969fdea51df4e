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
from cai_ray.train.weights.proof import digest
from cai_ray.train.weights.sync import Packed, unpack


class SyncWorker:
    """Called by `collective_rpc` on every worker of an engine."""

    _sync_received: dict[str, tuple[int, tuple[int, ...], torch.dtype]]
    _sync_loaded: set[str]
    _sync_usual: Callable[..., Any] | None = None

    def sync_record(self) -> None:
        """Notes from now on what the model's loader takes: what never comes this far leaves no digest."""
        model = worker_model(self)
        self._sync_received, self._sync_loaded = {}, set()
        if self._sync_usual is not None:
            return
        self._sync_usual = usual = model.load_weights

        def noting(weights: Iterable[tuple[str, Tensor]]) -> Any:
            def seen() -> Iterator[tuple[str, Tensor]]:
                for name, tensor in weights:
                    self._sync_received[name] = (digest(tensor), tuple(tensor.shape), tensor.dtype)
                    yield name, tensor

            loaded = usual(seen())
            self._sync_loaded |= set(loaded or ())
            return loaded

        model.load_weights = noting

    def sync_start(self) -> None:
        self.sync_record()
        start_reload(self)

    def sync_load(self, chunk: list[Packed]) -> None:
        load_tensors(self, unpack(chunk))

    def sync_finish(self) -> None:
        finish_reload(self)

    def sync_clear_cache(self) -> None:
        clear_cache(self)

    def sync_held(self) -> tuple[dict[str, int], list[str]]:
        """Digests by the names of the sender, and the parameters that the last load did not fill."""
        parameters = dict(worker_model(self).named_parameters())
        received = getattr(self, "_sync_received", {})
        digests = {}
        for name, (of_bytes, shape, dtype) in received.items():
            own = parameters.get(name)
            digests[name] = of_bytes
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
