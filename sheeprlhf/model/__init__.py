"""Loading, packed attention, adapters and generation for Hugging Face causal language models."""
