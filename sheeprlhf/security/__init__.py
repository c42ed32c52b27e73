"""Checks of files that may come from other people, and redaction of secrets. Imports no torch."""
