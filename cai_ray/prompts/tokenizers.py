"""Loads tokenizers, and makes copies of them in which no text is special."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple
from uuid import uuid4

from cai_ray.errors import InputError

_BYTE = re.compile("<0x[0-9A-F]{2}>")
# Added tokens that are plain text: blanks and words; signs such as "{" and "<="; and tags of HTML, of which some
# vocabularies have dozens.
_TEXT = re.compile(
    r"[^<>\[\]{}|＜＞｜]*|\W{1,3}"
    r"|</?(a|b|blockquote|br|caption|code|div|em|h[1-6]|i|img|li|ol|p|pre|s|span|strong|sub|sup"
    r"|table|tbody|td|tfoot|th|thead|tr|u|ul)>"
)

# What tokenizers treat differently: blanks, line breaks, numbers, letters beyond ASCII.
_SAMPLE = "It's 12345 + 678 = 13,023?\n\n  Ünï, 你好 🙂\tx_y  "

_NEVER = -1e6  # the score of a piece that a unigram model takes only if it has no other

Place = Literal["start", "token", "text"]
"""Where a text stands: at the very start, behind a control token, or behind other text."""


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

        return _as_saved(AutoTokenizer.from_pretrained(str(model), trust_remote_code=False), path)
    except Exception as e:  # a broken file makes transformers raise almost anything
        reason = (str(e).splitlines() or [type(e).__name__])[0]
        raise InputError(f"model {model}: its tokenizer cannot be loaded ({reason})") from e


def _as_saved(loaded: Any, folder: Path) -> Any:
    """The tokenizer of a folder that has no config.json, as its tokenizer.json describes it.

    There a name of a class in tokenizer_config.json is all that says which family it is, and transformers may have
    built it anew by the rules of another: a byte-level tokenizer by a class of SentencePiece loses every blank.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    file = folder / "tokenizer.json"
    backend = getattr(loaded, "backend_tokenizer", None)
    if backend is None or not file.exists() or (folder / "config.json").exists():
        return loaded
    saved, rebuilt = (
        tokenizer.encode(_SAMPLE, add_special_tokens=False).ids
        for tokenizer in (Tokenizer.from_file(str(file)), backend)
    )
    return loaded if saved == rebuilt else PreTrainedTokenizerFast.from_pretrained(str(folder))


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


class PlainText(NamedTuple):
    """Copies of a tokenizer in which no text is a control token."""

    backends: Mapping[Place, Any]
    """By where the text to be encoded stands."""
    kept: frozenset[int]
    """Ids of added tokens that are looked up in every text, such as runs of blanks."""


def without_control_tokens(tokenizer: Any, control: set[int]) -> PlainText:
    """Copies of the tokenizer in which no text is a control token.

    Added tokens are not looked up, except those that are plain text themselves. But many vocabularies contain the
    control tokens, too: a unigram model finds whatever is in its vocabulary, and a BPE model whatever its merges lead
    to (or, with `ignore_merges`, any whole word). The copies cannot reach them.

    Raises:
        InputError: the tokenizer is not a fast one.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise InputError(
            f"model {tokenizer.name_or_path}: a fast tokenizer (tokenizer.json) is needed, so that text can be "
            "encoded without special tokens"
        )
    data = json.loads(backend.to_str())
    kept = [
        t
        for t in data["added_tokens"]
        if t["id"] not in control and not is_control(t["content"], t["special"])
    ]
    data.update(added_tokens=kept, post_processor=None, truncation=None, padding=None)
    _remove_control(data["model"], control)
    return PlainText(_by_place(data, kept), frozenset(t["id"] for t in kept))


def is_control(content: str, special: bool) -> bool:
    """Whether an added token is kept out of contents: all that are special, or look like marks and are not signs or tags
    of HTML."""
    return special or not _TEXT.fullmatch(content)


def _remove_control(model: dict[str, Any], control: set[int]) -> None:
    """Puts control tokens out of a model's reach."""
    vocab = model["vocab"]
    if isinstance(
        vocab, list
    ):  # unigram: a piece's place is its id, so it stays, by a name that nobody writes
        for i, piece in enumerate(vocab):
            if i in control:
                piece[0] = f"\ue000{uuid4().hex}\ue001"
            elif model.get("byte_fallback") and _BYTE.fullmatch(piece[0]):
                # Byte pieces are for characters without a piece, not for a text that reads "<0x0A>".
                piece[1] = _NEVER
    else:
        removed = {text for text, i in vocab.items() if i in control} - {model.get("unk_token")}
        model["vocab"] = {text: i for text, i in vocab.items() if text not in removed}
        if "merges" in model:
            merges = (m.split(" ", 1) if isinstance(m, str) else m for m in model["merges"])
            model["merges"] = [[a, b] for a, b in merges if removed.isdisjoint((a, b, a + b))]


def _by_place(data: dict[str, Any], kept: list[Any]) -> dict[Place, Any]:
    """Tokenizers that put a blank before a text where the tokenizer of `data` would, were it the whole text's."""
    from tokenizers import Tokenizer

    _put_into_vocabulary(kept, data["model"]["vocab"])
    first = Tokenizer.from_str(json.dumps(data))
    made: dict[Place, Any] = {"start": first, "token": first, "text": first}
    for step in _steps(data["pre_tokenizer"], "pretokenizers"):
        if step["type"] == "Metaspace" and step["prepend_scheme"] == "first":
            step["prepend_scheme"] = "never"
            made["token"] = made["text"] = Tokenizer.from_str(json.dumps(data))
    if any(step["type"] == "Prepend" for step in _steps(data["normalizer"], "normalizers")):
        rest = [step for step in _steps(data["normalizer"], "normalizers") if step["type"] != "Prepend"]
        data["normalizer"] = {"type": "Sequence", "normalizers": rest}
        made["text"] = Tokenizer.from_str(json.dumps(data))
    return made


def _put_into_vocabulary(added: list[Any], vocab: dict[str, int] | list[Any]) -> None:
    """Puts added tokens into a model's vocabulary: without it they would be given other ids."""
    for token in added:
        if isinstance(vocab, dict):
            vocab.setdefault(token["content"], token["id"])
            continue
        while len(vocab) <= token["id"]:
            vocab.append([f"\ue000{uuid4().hex}\ue001", _NEVER])
        if vocab[token["id"]][0] != token["content"]:
            vocab[token["id"]] = [token["content"], _NEVER]


def _steps(part: dict[str, Any] | None, name: str) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer."""
    if part is None:
        return []
    return (
        [inner for step in part[name] for inner in _steps(step, name)]
        if part["type"] == "Sequence"
        else [part]
    )
