"""Errand Town: a language of 300 words in which a 1.3 M parameter model does all of Constitutional AI.

The world has an exact judge, so what a constitution changes can be measured to the row.
`grammar` says what exists, `splits` which requests are for what, `answers` writes good and bad answers, and `judge`
decides which are right. `corpus` and `tokenizer` are what the base model in `BASE` was made from
(studies/train_base.py, studies/check_base.py).
"""

from pathlib import Path

BASE = str(Path(__file__).parent / "base")
"""Folder of the shipped base model (Hugging Face layout)."""
