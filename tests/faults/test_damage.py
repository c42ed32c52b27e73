"""Damaged and mismatched checkpoints are noticed before anything is loaded, and one run directory has one owner.

A campaign: `TRIALS=600 SEED=2026 pytest -n 0 -m nightly -s tests/faults/test_damage.py`. A failure prints its trial,
which `SEED=... TRIAL=...` repeats alone.
"""

from sheeprlhf.engine.manifest import MANIFEST

NAMES = ("model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json", MANIFEST)
