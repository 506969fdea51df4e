"""The small run of the end-to-end tests, for what is done with it on a cluster."""

from __future__ import annotations

from tests.e2e.conftest import served_run, town_run

__all__ = ["served_run", "town_run"]
