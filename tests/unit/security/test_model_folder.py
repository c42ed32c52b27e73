"""Folders of models are looked at before a library opens them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sheeprlhf.security.model_folder import INDEX, weights_of
from sheeprlhf.utils.errors import ModelError


@pytest.mark.parametrize("shard", ["../outside.safetensors", "sub/inside.safetensors", "a..safetensors", "weights.bin"])
def test_a_shard_is_a_plain_name(shard: str, tmp_path: Path) -> None:
    """Whether such a file is there or not."""
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    save_file({"x": torch.zeros(1)}, folder / shard)
    (folder / INDEX).write_text(json.dumps({"weight_map": {"x": shard}}))
    with pytest.raises(ModelError, match=r"\.safetensors"):
        weights_of(folder)
