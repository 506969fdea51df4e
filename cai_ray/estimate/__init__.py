"""What a run would take, from a small sample that is really run (`cai-ray run CONFIG --estimate`)."""

from cai_ray.estimate.report import estimate, lines

__all__ = ["estimate", "lines"]
