"""vLLM's weight-transfer interface with gloo in NCCL's place: for CPUs, where all but the wire is tested with it.

vllm 0.29.0: between processes the interface knows NCCL only. Both sides, the engine's and the trainer's, are derived
from NCCL's here with their private parts, and registered in vLLM's factory, whose registry is private. Importing this
module imports vllm.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import ParamMeta
from vllm.distributed.weight_transfer.nccl_engine import (
    NCCLTrainerWeightTransferEngine,
    NCCLWeightTransferEngine,
)

TIMEOUT = timedelta(minutes=10)
"""Limit on the time until all processes have joined, and on the time for one tensor."""


class GlooGroup:
    """The trainer's rank 0 and all engines' workers, beside torch's own groups."""

    def __init__(self, group: Any):
        self._group = group

    def broadcast(self, tensor: Tensor) -> None:
        """Sends a tensor from rank 0 to all; in place on the others."""
        from torch.distributed import BroadcastOptions

        options = BroadcastOptions()
        options.rootRank = 0
        self._group.broadcast([tensor], options).wait()


def join_gloo(*, master_address: str, master_port: int, world_size: int, rank: int) -> GlooGroup:
    """Joins the group; returns when all have joined."""
    from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore

    store = TCPStore(master_address, master_port, world_size, rank == 0, timeout=TIMEOUT)
    return GlooGroup(ProcessGroupGloo(PrefixStore("weights", store), rank, world_size, TIMEOUT))


class GlooTransfer(NCCLWeightTransferEngine):
    """The engine's side."""

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


class GlooTrainer(NCCLTrainerWeightTransferEngine):
    """The trainer's side."""

    @classmethod
    def trainer_init(cls, init_info: Any, *, client: Any, source: Any = None) -> Any:
        trainer = cls(client=client, source=source, is_sender=init_info.is_sender, packed=False)
        if trainer.is_sender:
            address = {
                "master_address": init_info.master_address,
                "master_port": init_info.master_port,
                "world_size": init_info.world_size,
            }
            # The engines' call returns when all have joined.
            with ThreadPoolExecutor(1) as thread:
                joined = thread.submit(client.init_weight_transfer_engine, address | {"rank_offset": 1})
                trainer.model_update_group = join_gloo(rank=0, **address)
                joined.result()
        return trainer

    def _broadcast(self, source: Any, meta: list[ParamMeta]) -> None:
        for _, tensor in self._checked_iter(source, meta) if self.is_sender else source:
            if self.is_sender:
                self.model_update_group.broadcast(tensor.contiguous())


def register_gloo() -> None:
    """Makes `gloo` a back end that vLLM's WeightTransferConfig may name in this process."""
    if "gloo" not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine("gloo", GlooTransfer)
