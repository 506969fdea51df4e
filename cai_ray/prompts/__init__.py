"""Turns text into token ids: template sets, the renderer, tokenizers."""
