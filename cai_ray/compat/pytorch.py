"""Buffers of a torch module that belong to its state.

torch 2.13.0: which buffers a module does not save is private; `state_dict` shows it only by what is missing there.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn


def persistent_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A module's own buffers that a saved model holds, without those of its submodules."""
    for name, buffer in module.named_buffers(recurse=False):
        if name not in module._non_persistent_buffers_set:
            yield name, buffer
