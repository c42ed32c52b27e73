"""The embedded data and model, and the scripts that build them."""
