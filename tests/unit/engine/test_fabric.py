"""What a Fabric of ours sets up besides itself."""

import os

import pytest

from sheeprlhf.engine.fabric import make_fabric
from sheeprlhf.structure.fabric import FabricConfig

CAPACITY = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"


def test_few_compiled_kernels_are_kept_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed rows come in hundreds of lengths, and oneDNN keeps kernels for each: gigabytes in a long bf16 run."""
    monkeypatch.setenv(CAPACITY, "7")
    make_fabric(FabricConfig())
    assert os.environ[CAPACITY] == "7"
    monkeypatch.delenv(CAPACITY)
    make_fabric(FabricConfig())
    assert 0 < int(os.environ[CAPACITY]) < 1024
