"""Gates: bounds on the labels' certificate, which stop a run before anything is trained on bad labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cai_ray.config.generation import LabelGates
from cai_ray.errors import Stopped
from cai_ray.storage.run import Run


def check_gates(run: Run) -> None:
    """Compares the run's certificate with `label.gates`.

    Raises:
        Stopped: the certificate does not pass a gate.
        InputError: the certificate is missing or damaged.
    """
    gates = run.config.label.gates
    path = run.path("label", "certificate.json")
    if gates == LabelGates():
        return
    if failures := failed_gates(run.facts("label", "certificate.json"), gates):
        raise Stopped(
            f"{'; '.join(failures)}; see {path}. The labels are kept: another bound needs no new ones"
        )


def failed_gates(certificate: Mapping[str, Any], gates: LabelGates) -> list[str]:
    """The gates that are not passed: which one, the value, and by how much."""
    overall = (certificate["gold"] or {}).get("overall") or {}
    values = {
        "max_slot_bias": certificate["slot_bias"],
        "max_ece": (overall.get("raw") or {}).get("ece"),
        "min_accuracy": overall.get("accuracy"),
    }
    failures = []
    for name, value in values.items():
        bound = getattr(gates, name)
        if bound is None:
            continue
        if value is None:
            failures.append(f"label.gates.{name}={bound:g}: nothing was measured")
            continue
        over, side = (bound - value, "below") if name.startswith("min") else (value - bound, "above")
        if over > 0:
            what = name.partition("_")[2].replace("_", " ")
            failures.append(f"label.gates.{name}={bound:g}: {what} is {value:.4g}, {over:.2g} {side}")
    return failures
