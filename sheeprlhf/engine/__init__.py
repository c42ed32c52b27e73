"""Plumbing that knows no algorithm: runs, optimizer steps, checkpoints, metrics."""
