"""The Ray cluster: how it is joined, what has room on it, what a stage uses of it."""
