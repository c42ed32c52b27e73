"""`export`: a model folder for plain transformers."""
