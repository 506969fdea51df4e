"""`cai-ray init`: from a model and data to a configuration that runs."""
