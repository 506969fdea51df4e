"""Checkpoints of a group of ranks: saved beside training, saved before a node goes, restored by any number of ranks.

Each rank writes its share into a folder of its node, and Ray Train copies the shares to the run's storage while the
loop goes on. A checkpoint counts when all shares are there and Ray Train's own record names it; a group that dies
before that goes on from the one before.
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

from cai_ray.cluster.meter import Holder
from cai_ray.compat.deepspeed import convert_to_universal, loading_universal
from cai_ray.errors import InputError, OverBudget
from cai_ray.storage.records import derive_id
from cai_ray.train.runtime.ranks import device, from_first, global_sum, rank, world_size

if TYPE_CHECKING:
    from cai_ray.train.runtime.engine import Trained


def save_checkpoint(engines: Mapping[str, Trained], state: dict[str, Any], step: int) -> None:
    """Saves models, optimizers, schedules, random numbers and the loop's `state`; every rank calls it alike.

    It returns when the shares are written on their nodes. One checkpoint is on its way at a time: the next one waits
    for it. Ray Train waits for the last before it ends the loop.

    Args:
        state: what the loop needs to go on, of this rank (anything that torch.save takes).

    Raises:
        OverBudget: the budget is spent (`checkpoint_due` said so), and this checkpoint counts.
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
    # Ray Train deletes the folder when it is copied.
    report(
        {"step": step},
        checkpoint=Checkpoint.from_directory(folder),
        checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
    )
    if _spent:
        wait_until_saved()
        raise OverBudget(_spent)


def checkpoint_due(step: int, every: int) -> bool:
    """Whether to save after this step: every so many, and at once where one of the group's nodes is about to go or the
    budget is spent.

    Every rank calls it after every step, and all get the same answer.
    """
    return _told_to_stop() or _told_to_go() or step % every == 0


_holder: Holder | None = None
_spent: str | None = None


def heed(holder: Holder | None) -> None:
    """Who is told when the budget is spent: this rank's holder. None where the run has no budget."""
    global _holder, _spent
    _holder, _spent = holder, None


def _told_to_stop() -> bool:
    """Whether any rank was told that the budget is spent."""
    global _spent
    if _holder is None:
        return False
    if global_sum(torch.tensor(float(_holder.told is not None))):
        _spent = from_first(_holder.look() or _holder.told)
    return _spent is not None


_answered: Any = None


def _told_to_go() -> bool:
    """True once for each notice that nodes of the group are to be taken away, as those of a spot market are.

    The group trains on until they are: then Ray Train starts it again elsewhere.
    """
    global _answered
    if os.environ.get("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER") == "0":  # nobody would tell
        return False
    from ray.train import get_preemption_info

    told = get_preemption_info()  # rank 0's, on every rank
    new = told is not None and told != _answered
    _answered = told
    return new


def wait_until_saved() -> None:
    """Returns when the last checkpoint counts: a group that dies now goes on from it."""
    from ray.train import CheckpointConsistencyMode, get_all_reported_checkpoints

    get_all_reported_checkpoints(consistency_mode=CheckpointConsistencyMode.COMMITTED)


def restore(engines: Mapping[str, Trained]) -> dict[str, Any] | None:
    """Loads the last checkpoint into the engines and returns the loop's state; None where there is none.

    Ranks that are not as many as saved it take what rank 0 had, and their share of what all had.
    """
    from ray.train import get_checkpoint, get_context

    if get_context().get_local_rank() == 0:  # no rank can be at a first checkpoint before all have come here
        shutil.rmtree(_scratch(), ignore_errors=True)  # what a killed group left
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
                _load_share(trained, folder, tag, saved_by)
    torch.set_rng_state(own["random"]["torch"])
    if "cuda" in own["random"]:
        torch.cuda.set_rng_state(own["random"]["cuda"])
    return own["state"]


def _read(folder: str, of: int) -> dict[str, Any]:
    return torch.load(Path(folder) / f"loop-{of}.pt", weights_only=False, map_location="cpu")


def _load(trained: Trained, folder: str, tag: str) -> None:
    path, _ = trained.engine.load_checkpoint(folder, tag=tag, load_module_strict=not _has_adapter(trained))
    if path is None:
        raise RuntimeError(f"checkpoint {folder}: {tag} cannot be loaded")


def _has_adapter(trained: Trained) -> bool:
    return hasattr(trained.module, "get_base_model")


# ------------------------------------------------------------------------------------------ another number of ranks


def _load_share(trained: Trained, folder: str, tag: str, saved_by: int) -> None:
    """Loads what another number of ranks saved, through DeepSpeed's universal checkpoint.

    Raises:
        InputError: DeepSpeed cannot.
    """
    if trained.zero_stage == 0:  # nothing is spread over ranks
        _load(trained, folder, tag)
    else:
        with _universal(folder, tag, saved_by) as converted, loading_universal(trained.engine):
            _load(trained, converted, tag)


@contextmanager
def _universal(folder: str, tag: str, saved_by: int) -> Iterator[str]:
    """A checkpoint with a file for each parameter and moment, whole: made once on each node, gone afterwards."""
    from ray.train import get_context
    from ray.train.collective import barrier

    first = get_context().get_local_rank() == 0
    made = _scratch() / "universal"
    if first:
        try:
            convert_to_universal(os.path.join(folder, tag), str(made / tag))
        except (AssertionError, LookupError, NotImplementedError, ValueError) as e:
            raise InputError(
                f"a checkpoint that {saved_by} workers saved cannot be shared out among {world_size()} "
                f"({type(e).__name__}: {e}); use workers={saved_by}"
            ) from e
    barrier()
    try:
        yield str(made)
        barrier()
    finally:
        if first:
            shutil.rmtree(made)


def _scratch() -> Path:
    """This run's folder on this node, for checkpoints that are made or taken apart."""
    from ray.train import get_context

    run = derive_id(get_context().get_storage().experiment_fs_path)
    return Path(tempfile.gettempdir()) / f"cai_ray-{os.getuid()}" / "checkpoints" / run
