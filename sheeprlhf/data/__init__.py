"""Batches, tokenised datasets and the order in which training reads them."""
