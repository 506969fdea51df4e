"""Checkpoints of a group of ranks, saved while training goes on and restored by any number of ranks.

Each rank writes its shard into a folder of its node, and Ray Train copies the shards to the run's storage while the
loop goes on. A checkpoint counts when all shards are there and Ray Train's own record names it. A group that dies
before that goes on from the checkpoint before.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cai_ray.cluster.holder import Holder
from cai_ray.compat.deepspeed import convert_to_universal, loading_universal
from cai_ray.errors import InputError, OverBudget
from cai_ray.storage.records import derive_id
from cai_ray.train.runtime.ranks import device, from_first, global_sum, rank, world_size

if TYPE_CHECKING:
    from cai_ray.train.runtime.engine import Trained


def save_checkpoint(engines: Mapping[str, Trained], state: dict[str, Any], step: int) -> None:
    """Saves models, optimizers, schedules, random numbers and the loop's `state`; every rank calls it alike.

    It returns when the shards are written on their nodes. Uploads do not overlap: the next checkpoint waits for the one
    before. Ray Train waits for the last before it ends the loop.

    Args:
        state: what this rank's loop needs to go on; anything that torch.save takes.

    Raises:
        OverBudget: the budget is spent (`checkpoint_due`). This checkpoint counts by then.
    """
    from ray.train import Checkpoint, CheckpointUploadMode, report

    wait_until_saved()
    folder = _scratch() / f"rank-{rank()}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for tag, trained in engines.items():
        (folder / tag).mkdir()
        trained.engine.save_checkpoint(
            str(folder), tag=tag, save_latest=False, exclude_frozen_parameters=_has_adapter(trained)
        )
    random = {"torch": torch.get_rng_state()}
    if device().type == "cuda":
        random["cuda"] = torch.cuda.get_rng_state()
    own = {"state": state, "random": random, "step": step, "world_size": world_size()}
    torch.save(own, folder / f"loop-{rank()}.pt")
    # Ray Train deletes the folder after copying it.
    report(
        {"step": step},
        checkpoint=Checkpoint.from_directory(folder),
        checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
    )
    if _stop_reason:
        wait_until_saved()
        raise OverBudget(_stop_reason)


def checkpoint_due(step: int, every: int) -> bool:
    """Says whether to save after this step: every `every` steps, and at once if a node will go or the budget is spent.

    Every rank calls it after every step and gets the same answer.
    """
    return _budget_is_spent() or _preemption_announced() or step % every == 0


_holder: Holder | None = None
_stop_reason: str | None = None


def watch_budget(holder: Holder | None) -> None:
    """Lets `checkpoint_due` know when the run's budget is spent.

    Args:
        holder: this rank's holder, which hears of it; None if the run has no budget.
    """
    global _holder, _stop_reason
    _holder, _stop_reason = holder, None


def _budget_is_spent() -> bool:
    """True if any rank's holder heard so; then `_stop_reason` says which limit was reached."""
    global _stop_reason
    if _holder is None:
        return False
    if global_sum(torch.tensor(float(_holder.stop_reason is not None))):
        _stop_reason = from_first(_holder.read_budget() or _holder.stop_reason)
    return _stop_reason is not None


_last_notice: Any = None


def _preemption_announced() -> bool:
    """True once for each notice that nodes of the group will be taken away, as spot markets do.

    The group trains on until they are. Then Ray Train starts it again elsewhere.
    """
    global _last_notice
    if os.environ.get("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER") == "0":  # nobody would notify
        return False
    from ray.train import get_preemption_info

    notice = get_preemption_info()  # rank 0's, on every rank
    new = notice is not None and notice != _last_notice
    _last_notice = notice
    return new


def wait_until_saved() -> None:
    """Waits until the last checkpoint counts: a group that dies now goes on from it."""
    from ray.train import CheckpointConsistencyMode, get_all_reported_checkpoints

    get_all_reported_checkpoints(consistency_mode=CheckpointConsistencyMode.COMMITTED)


def restore(engines: Mapping[str, Trained]) -> dict[str, Any] | None:
    """Loads the last checkpoint into the engines and returns the loop's state; None if there is no checkpoint.

    If the number of ranks changed, each rank takes rank 0's loop state and its own shard of the models.

    Raises:
        InputError: DeepSpeed cannot share the checkpoint out among another number of ranks.
    """
    from ray.train import get_checkpoint, get_context

    if get_context().get_local_rank() == 0:  # no rank saves before all have come here
        shutil.rmtree(_scratch(), ignore_errors=True)  # leftovers of a killed group
    checkpoint = get_checkpoint()
    if checkpoint is None:
        return None
    with checkpoint.as_directory() as folder:
        own = _read(folder, 0)
        if (saved_by := own["world_size"]) == world_size():
            own = _read(folder, rank())
            for tag, trained in engines.items():
                _load(trained, folder, tag)
        else:
            for tag, trained in engines.items():
                _load_resharded(trained, folder, tag, saved_by)
    torch.set_rng_state(own["random"]["torch"])
    if "cuda" in own["random"]:
        torch.cuda.set_rng_state(own["random"]["cuda"])
    return own["state"]


def _read(folder: str, of_rank: int) -> dict[str, Any]:
    return torch.load(Path(folder) / f"loop-{of_rank}.pt", weights_only=False, map_location="cpu")


def _load(trained: Trained, folder: str, tag: str) -> None:
    path, _ = trained.engine.load_checkpoint(folder, tag=tag, load_module_strict=not _has_adapter(trained))
    if path is None:
        raise RuntimeError(f"checkpoint {folder}: {tag} cannot be loaded")


def _has_adapter(trained: Trained) -> bool:
    return hasattr(trained.module, "get_base_model")


# ------------------------------------------------------------------------------------------ another number of ranks


def _load_resharded(trained: Trained, folder: str, tag: str, saved_by: int) -> None:
    """Loads what another number of ranks saved, through DeepSpeed's universal checkpoint.

    Raises:
        InputError: DeepSpeed cannot convert it.
    """
    if trained.zero_stage == 0:  # nothing is spread over ranks
        _load(trained, folder, tag)
    else:
        with _universal(folder, tag, saved_by) as converted, loading_universal(trained.engine):
            _load(trained, converted, tag)


@contextmanager
def _universal(folder: str, tag: str, saved_by: int) -> Iterator[str]:
    """A copy of a checkpoint with one whole file per parameter and moment; each node makes one and deletes it."""
    from ray.train import get_context
    from ray.train.collective import barrier

    first = get_context().get_local_rank() == 0
    converted = _scratch() / "universal"
    if first:
        try:
            convert_to_universal(os.path.join(folder, tag), str(converted / tag))
        except (AssertionError, LookupError, NotImplementedError, ValueError) as e:
            raise InputError(
                f"a checkpoint that {saved_by} workers saved cannot be shared out among {world_size()} "
                f"({type(e).__name__}: {e}); use workers={saved_by}"
            ) from e
    barrier()
    try:
        yield str(converted)
        barrier()
    finally:
        if first:
            shutil.rmtree(converted)


def _scratch() -> Path:
    """This run's folder on this node, for checkpoints that are written or converted."""
    from ray.train import get_context

    run = derive_id(get_context().get_storage().experiment_fs_path)
    return Path(tempfile.gettempdir()) / f"cai_ray-{os.getuid()}" / "checkpoints" / run
