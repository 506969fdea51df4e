"""Studies: questions about a constitution or a run that take runs, or a model's answers, to settle.

A study computes plain data (which the commands print with `--json`), and `lines` shows it on a terminal.
"""
