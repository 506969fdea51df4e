"""Evaluation: what the policies do on held-out prompts, measured from outside the training."""
