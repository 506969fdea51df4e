"""Errand Town: a language of 300 words in which a 1.3 M parameter model does all of Constitutional AI.

The world has an exact judge, so what a constitution changes can be measured to the row.
`grammar` says what exists, `judge` what is right, `corpus` and `base` make the base model that is
shipped in `BASE`, `data` writes what a pipeline run on the town needs, `check` measures skills.
"""

from pathlib import Path

BASE = str(Path(__file__).parent / "base")
"""Folder of the shipped base model (Hugging Face layout)."""
