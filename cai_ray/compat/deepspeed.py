"""DeepSpeed's start, its clipping at ZeRO stage 0, and checkpoints for another number of ranks.

deepspeed 0.19.8: each function says what has no public setting.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


def skip_shared_memory_extension() -> None:
    """Keeps DeepSpeed from compiling its shared-memory communication at the first start.

    The compilation takes 40 s and training on CPUs does not use the result. DeepSpeed looks it up in a private table.
    """
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def skip_compiler() -> None:
    """Keeps DeepSpeed from loading torch's compiler at each start.

    DeepSpeed imports all its optimizers, and one of them (Muon, which is not used here) compiles its functions as it
    is imported. That loads a thousand modules in each worker.
    """
    from deepspeed.runtime import compiler

    compiler.compile = lambda: lambda function: function


def keep_grad_norm(engine: Any, max_grad_norm: float) -> None:
    """Lets an engine of ZeRO stage 0 clip as torch does and remember the norm for `get_global_grad_norm`.

    By itself stage 0 clips and forgets the norm. Other stages keep it.
    """

    def clip() -> None:
        engine._global_grad_norm = nn.utils.clip_grad_norm_(engine.module.parameters(), max_grad_norm)

    engine.clip_fp32_gradients = clip


@contextmanager
def loading_universal(engine: Any) -> Iterator[None]:
    """Within, `engine.load_checkpoint` reads a universal checkpoint.

    That is a setting of the engine's start, when it is not known yet which checkpoint will be loaded.
    """
    engine._config.load_universal_checkpoint = True
    try:
        yield
    finally:
        engine._config.load_universal_checkpoint = False


def convert_to_universal(source: str, target: str) -> None:
    """Converts a checkpoint into files that hold one whole parameter or moment each.

    DeepSpeed has a command for it and no function; this calls the command's, in this process, which holds torch and
    perhaps a GPU and must not fork.

    Raises:
        AssertionError, LookupError, NotImplementedError, ValueError: DeepSpeed cannot convert it.
    """
    from deepspeed.checkpoint import ds_to_universal

    options = {"num_extract_workers": 1, "num_merge_workers": 1, "inject_missing_state": True}
    options |= {"strict": True, "keep_temp_folder": False}
    ds_to_universal.main(Namespace(input_folder=source, output_folder=target, **options))
