"""The town's tokenizer: one token for each word of the world, bytes for any other text.

The modes, turn marks and options are added tokens and never in the model's own vocabulary. So an encoder without added
tokens, which encodes contents, cannot produce them, whatever a content says. Decoding gives back the text that was
encoded, with odd spaces and line breaks; only a literal "▁" comes back as a space.
"""

from __future__ import annotations

from typing import Any

from cai_ray.town import grammar

SPECIAL = (
    "<pad>", "<end>", "<answer>", "<critic>", "<judge>", "<user>", "<assistant>", "<A>", "<B>",
)  # fmt: skip

CHAT_TEMPLATE = """\
{%- if messages[0].role != 'system' %}{{ '<answer>' }}{% endif %}
{%- for message in messages %}
{%- if message.role == 'system' %}{{ message.content }}
{%- elif message.role == 'user' %}{{ '<user>' + message.content }}
{%- elif message.role == 'assistant' %}{{ '<assistant>' + message.content + '<end>' }}
{%- else %}{{ raise_exception('unknown role ' + message.role) }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"""


def build() -> Any:
    """The tokenizer as a transformers object, with the chat template in it.

    Each word begins with a space ("▁word"), and every text is given one, so that a word is the same token everywhere.
    The normalizer does this rather than `Metaspace`, which would leave the space out before a text that begins with
    one, and lose it in decoding.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    texts = [f"▁{word}" for word in grammar.words()] + ["▁"] + [f"<0x{i:02X}>" for i in range(256)]
    vocab = {text: i for i, text in enumerate(texts)}
    tokenizer = Tokenizer(models.BPE(vocab, [], ignore_merges=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="never", split=True)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Replace("▁", " "),
            decoders.Strip(" ", 1, 0),
        ]
    )
    # Spaces beside a mark belong to it, so that templates can be written legibly.
    tokenizer.add_special_tokens(
        [AddedToken(t, lstrip=True, rstrip=True, normalized=False, special=True) for t in SPECIAL]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<end>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
        model_max_length=512,
        chat_template=CHAT_TEMPLATE,
    )
