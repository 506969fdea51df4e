"""The engine's side of a weight sync, in vLLM's worker: receives named tensors, and says what it received.

Imported by vLLM's processes alone (`weight_sync.WORKER`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from vllm.config import set_current_vllm_config
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from cai_ray.train.weights.proof import digest
from cai_ray.train.weights.sync import Packed, unpack
from cai_ray.train.weights.transfer import join_gloo


class SyncWorker:
    """Called by `collective_rpc` on every worker of an engine."""

    model_runner: Any
    vllm_config: Any
    _sync_received: dict[str, tuple[int, tuple[int, ...], torch.dtype]]
    _sync_loaded: set[str]
    _sync_usual: Callable[..., Any] | None = None

    def sync_record(self) -> None:
        """Notes from now on what the model's loader takes: what never comes this far leaves no digest."""
        model = self.model_runner.get_model()
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
        initialize_layerwise_reload(self.model_runner.get_model())

    def sync_load(self, chunk: list[Packed]) -> None:
        with set_current_vllm_config(self.vllm_config):
            self.model_runner.get_model().load_weights(unpack(chunk))

    def sync_finish(self) -> None:
        with set_current_vllm_config(self.vllm_config):
            finalize_layerwise_reload(self.model_runner.get_model(), self.model_runner.model_config)
        self.model_runner.reset_lora_state()

    def sync_clear_cache(self) -> None:
        for layer in self.model_runner.kv_caches:
            layer.zero_()

    def sync_held(self) -> tuple[dict[str, int], list[str]]:
        """Digests by the names of the sender, and the parameters that the last load did not fill."""
        parameters = dict(self.model_runner.get_model().named_parameters())
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


class GlooTransfer(NCCLWeightTransferEngine):
    """vLLM's NCCL back end with gloo in NCCL's place: for CPUs, where the whole way but the wire is proved so."""

    def init_transfer_engine(self, init_info: Any) -> None:
        self.model_update_group = join_gloo(
            master_address=init_info.master_address,
            master_port=init_info.master_port,
            world_size=init_info.world_size,
            rank=init_info.rank_offset + self.parallel_config.rank,
        )

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))  # there is no device to wait for

    def receive_weights(self, update_info: Any) -> None:
        for name, dtype, shape in zip(
            update_info.names, update_info.dtype_names, update_info.shapes, strict=True
        ):
            tensor = torch.empty(shape, dtype=getattr(torch, dtype))
            self.model_update_group.broadcast(tensor)
            self.model.load_weights([(name, tensor)])


if "gloo" not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine("gloo", GlooTransfer)
