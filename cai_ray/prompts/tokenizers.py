"""Loads tokenizers, and makes copies of them in which no text is special."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from uuid import uuid4

from cai_ray.errors import InputError

_BYTE = re.compile("<0x[0-9A-F]{2}>")


def load_tokenizer(model: str | Path) -> Any:
    """Loads a model's tokenizer; raises InputError if there is none."""
    path = Path(model)
    if path.exists() and not any(
        (path / f).exists() for f in ("tokenizer.json", "tokenizer.model", "vocab.json")
    ):
        raise InputError(f"model {model}: the folder has no tokenizer; save one there with save_pretrained()")
    if not path.exists() and str(model).startswith((".", "/", "~")):
        raise InputError(f"model {model}: no such folder")
    try:
        if _is_plain(path):
            from transformers import PreTrainedTokenizerFast

            return PreTrainedTokenizerFast.from_pretrained(str(model))
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(str(model), trust_remote_code=False)
    except Exception as e:  # a broken file makes transformers raise almost anything
        reason = (str(e).splitlines() or [type(e).__name__])[0]
        raise InputError(f"model {model}: its tokenizer cannot be loaded ({reason})") from e


def _is_plain(folder: Path) -> bool:
    """Whether AutoTokenizer would use the tokenizer.json as it is.

    It does for a Llama whose tokenizer has no class of its own (it gives other families one). Importing AutoTokenizer
    takes 3 s, which commands that only check or skip should not spend.
    """
    try:
        family, named = (
            json.loads((folder / name).read_text())[key]
            for name, key in (("config.json", "model_type"), ("tokenizer_config.json", "tokenizer_class"))
        )
    except (OSError, ValueError, LookupError, TypeError):
        return False
    plain = family == "llama" and named in ("PreTrainedTokenizerFast", "TokenizersBackend")
    return plain and (folder / "tokenizer.json").exists()


def without_control_tokens(tokenizer: Any, control: set[int]) -> Any:
    """A copy of the tokenizer in which no text is special.

    Without added tokens no text is looked up before it is encoded. But many vocabularies contain the control tokens,
    too: a unigram model finds whatever is in its vocabulary, and a BPE model whatever its merges lead to (or, with
    `ignore_merges`, any whole word). The copy cannot reach them.
    """
    from tokenizers import Tokenizer

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise InputError(
            f"model {tokenizer.name_or_path}: a fast tokenizer (tokenizer.json) is needed, so that text can be "
            "encoded without special tokens"
        )
    data = json.loads(backend.to_str())
    data.update(added_tokens=[], post_processor=None, truncation=None, padding=None)
    model = data["model"]
    vocab = model["vocab"]
    if isinstance(
        vocab, list
    ):  # unigram: a piece's place is its id, so it stays, by a name that nobody writes
        for i, piece in enumerate(vocab):
            if i in control:
                piece[0] = f"\ue000{uuid4().hex}\ue001"
            elif model.get("byte_fallback") and _BYTE.fullmatch(piece[0]):
                # Byte pieces are for characters without a piece, not for a text that reads "<0x0A>".
                piece[1] = -1e6
    else:
        removed = {text for text, i in vocab.items() if i in control} - {model.get("unk_token")}
        model["vocab"] = {text: i for text, i in vocab.items() if text not in removed}
        if "merges" in model:
            merges = (m.split(" ", 1) if isinstance(m, str) else m for m in model["merges"])
            model["merges"] = [[a, b] for a, b in merges if removed.isdisjoint((a, b, a + b))]
    return Tokenizer.from_str(json.dumps(data))
