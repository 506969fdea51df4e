"""Engines: messages in, text and log-probabilities out."""
