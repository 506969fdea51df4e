"""Where text becomes token ids: template sets, the renderer, tokenizers."""
