"""`chat` and `demo`: talk to models."""
