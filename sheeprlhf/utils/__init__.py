"""Small pure helpers that everything may import."""
