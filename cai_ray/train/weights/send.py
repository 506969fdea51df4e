"""Sends weights from the trainer to the engines, in one of the ways that `ppo.weight_sync` names.

- `ray`: through Ray's object store, on the CPUs (object_store.py). It works on any machine, and an engine that was
  replaced is sent the weights again at once.
- `nccl`: vLLM's weight-transfer interface from GPU to GPU: one broadcast from the trainer's rank 0 to all engines.
- `gloo`: the same interface on CPUs.

With the last two, engines and trainer are one communication group. If an engine is lost, the training group restarts
from its last checkpoint and makes a new one.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from cai_ray.train.runtime.ranks import rank
from cai_ray.train.weights import object_store
from cai_ray.train.weights.object_store import Sent, cast

Way = Literal["ray", "gloo", "nccl"]
Send = Callable[[int], Sent]
"""Sends the current weights under a version number; every rank calls it alike."""


def make_sender(
    way: Way,
    pool: Any,
    tensors: Callable[[], Iterable[tuple[str, Tensor]]],
    dtype: str | None,
    span: int = 1,
) -> Send:
    """Connects the trainer with the engines of a pool.

    Args:
        pool: a `ppo.pool.Pool`; None on ranks other than 0.
        tensors: makes a pass over the weights (`state.gathered_state`), in which all ranks take part.
        dtype: floating tensors are sent as this.
        span: the GPUs, and so the workers, of each engine.
    """
    if way == "ray":
        return lambda version: object_store.send(pool, tensors(), version, dtype)
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource
    from vllm.distributed.weight_transfer.nccl_engine import (
        NCCLTrainerInitInfo,
        NCCLTrainerWeightTransferEngine,
    )

    from cai_ray.compat.vllm_gloo import GlooTrainer

    class Source(WeightSource):
        """The gathered weights as vLLM's interface reads them."""

        def __init__(self) -> None:
            # This takes a pass: under ZeRO-3 no rank knows whole shapes.
            self._metadata = [ParamMeta(n, t.dtype, tuple(t.shape)) for n, t in self]

        def metadata(self) -> list[ParamMeta]:
            return self._metadata

        def __iter__(self) -> Iterator[tuple[str, Tensor]]:
            for name, tensor in tensors():
                yield name, cast(tensor, dtype)

    client = Client(pool, span) if pool else None
    address, port = _address() if client else ("", 0)
    world_size = 1 + (client.workers if client else 0)
    info = NCCLTrainerInitInfo(address, port, world_size, packed=way == "nccl", rank=rank())
    source = Source()
    trainer_class = NCCLTrainerWeightTransferEngine if way == "nccl" else GlooTrainer
    transfer = trainer_class.trainer_init(info, client=client, source=source)
    size = sum(torch.Size(m.shape).numel() * m.dtype.itemsize for m in source.metadata())

    def send(version: int) -> Sent:
        started = time.perf_counter()
        if client:
            client.version = version
        transfer.send_weights()
        return Sent(len(source.metadata()), size, time.perf_counter() - started)

    return send


class Client:
    """The engines of a pool as vLLM's trainer side calls them (`VLLMWeightSyncClient`)."""

    def __init__(self, pool: Any, span: int):
        self._pool, self._span = pool, span
        self.version = 0
        """The number of the weights that are sent next."""

    @property
    def workers(self) -> int:
        return self._pool.size * self._span

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Lets the engines join the group; each engine's workers get ranks of their own."""
        first = init_info["rank_offset"]
        self._pool.ask(
            "connect",
            [(init_info | {"rank_offset": first + i * self._span},) for i in range(self._pool.size)],
        )

    def start_weight_update(self) -> None:
        self._all("begin")

    def update_weights(self, update_info: Any) -> None:
        self._all("receive", update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._all("finish", self.version)

    def _all(self, method: str, *arguments: Any) -> None:
        self._pool.ask(method, [arguments] * self._pool.size)


def _address() -> tuple[str, int]:
    """This node's address and a free port."""
    import ray.util

    with socket.socket() as s:
        s.bind(("", 0))
        return ray.util.get_node_ip_address(), int(s.getsockname()[1])
