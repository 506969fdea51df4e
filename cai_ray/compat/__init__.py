"""Everything that touches private parts of Ray, vLLM, DeepSpeed or transformers, by pinned version."""
