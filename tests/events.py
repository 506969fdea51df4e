"""Reads TensorBoard's event files, of which the environment has only the writer."""

from __future__ import annotations

import struct
from typing import Any

from cai_ray.storage import files
from cai_ray.storage.filesystems import resolve


def scalars(folder: str) -> list[dict[str, Any]]:
    """The numbers of all event files in a folder (any URI), a row per step; a step that stands twice gives two rows."""
    from tensorboardX.proto.event_pb2 import Event

    rows: list[dict[str, Any]] = []
    if not files.exists(folder):  # listing may meet its creation half-way
        return rows
    fs, _ = resolve(folder)
    for path in files.list_files(folder):
        with fs.open_input_stream(path) as f:
            data = f.read()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + size])
            data = data[16 + size :]
            for value in event.summary.value:
                if not rows or rows[-1]["step"] != event.step or value.tag in rows[-1]:
                    rows.append({"step": event.step})
                rows[-1][value.tag] = value.simple_value
    return rows
