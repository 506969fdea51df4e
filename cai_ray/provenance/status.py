"""How far a run is."""

from __future__ import annotations

from typing import Any

from cai_ray.cluster import cost
from cai_ray.stages import stages_of
from cai_ray.storage import files
from cai_ray.storage.run import Run

_SHOWN = ("seconds", "rows_out", "errors", "finished")


def status(run: Run) -> list[dict[str, Any]]:
    """Each stage of a run with its state (`done`, `partial` or `missing`) and what it has cost until now."""
    rows: list[dict[str, Any]] = []
    names = stages_of(run.config.method)
    spent = cost.by_stage(run, names)
    for name in names:
        manifest = run.manifest(name)
        if manifest:
            facts = {key: manifest[key] for key in _SHOWN if key in manifest}
            rows.append({"stage": name, "state": "done", **facts})
        else:
            rows.append({"stage": name, "state": "partial" if files.exists(run.path(name)) else "missing"})
        if name in spent:
            held = spent[name]
            rows[-1] |= {key: getattr(held, key) for key in ("wall_seconds", "cpu_seconds", "gpu_seconds")}
            rows[-1]["money"] = cost.money(held, name, run.config.prices)
    return rows
