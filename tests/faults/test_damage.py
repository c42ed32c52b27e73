"""Damaged and mismatched checkpoints are noticed before anything is loaded, and one run directory has one owner.

A campaign: `TRIALS=600 SEED=2026 pytest -n 0 -m nightly -s tests/faults/test_damage.py`. A failure prints its trial,
which `SEED=... TRIAL=...` repeats alone.
"""

import dataclasses
import os
import random
import shutil
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sheeprlhf.engine.checkpoint import TrainState, restore_latest, save_checkpoint
from sheeprlhf.engine.fabric import make_fabric
from sheeprlhf.engine.manifest import MANIFEST
from sheeprlhf.engine.optim import set_up
from sheeprlhf.engine.rundir import choose_run_dir, same_data
from sheeprlhf.engine.runlock import RunLock
from sheeprlhf.engine.step import update
from sheeprlhf.structure.fabric import FabricConfig
from sheeprlhf.structure.model import LORAConfig
from sheeprlhf.structure.optim import AdamWConfig
from sheeprlhf.structure.registry import config_hash
from sheeprlhf.structure.run import TrainConfig
from sheeprlhf.utils.errors import ConfigError, RunInUseError
from tests.unit.engine.test_run import save_config_of
from tests.unit.engine.toy import Net, micro_batch, toy_loss
from tests.unit.structure.test_registry import typed

NAMES = ("model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json", MANIFEST)
