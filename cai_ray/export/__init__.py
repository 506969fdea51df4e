"""A run as the Hugging Face world expects it."""
