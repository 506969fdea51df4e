"""Prompts and human comparisons, from the files that people have."""
