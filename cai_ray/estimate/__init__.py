"""What a run would take: memory by arithmetic (`--check`), time and money from a sample that is run (`--estimate`)."""

from cai_ray.estimate.report import estimate, lines

__all__ = ["estimate", "lines"]
