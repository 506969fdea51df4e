"""Weights on their way from the trainer to the rollout engines, and the proof that they arrived."""
