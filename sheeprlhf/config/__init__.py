"""Composing and checking a configuration: registry, overrides, checks, lookup of earlier runs. Imports no torch."""
