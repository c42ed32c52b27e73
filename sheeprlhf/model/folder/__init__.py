"""Model folders and hub models: files to weights, tokenizers and models."""
