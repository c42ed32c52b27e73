"""Typed configuration: what a user can set, its type, default, unit and meaning. Imports no torch."""
