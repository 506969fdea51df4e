"""cai_ray: Constitutional AI on Ray, from a written document to a trained and served policy."""

__version__ = "0.1.0"
