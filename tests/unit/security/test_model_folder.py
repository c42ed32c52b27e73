"""The checks of model folders, and the reader of safetensors headers."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save, save_file

from sheeprlhf.security.model_folder import INDEX, read_header, weights_of
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


WHOLE = save({"a": torch.zeros(2, 3), "b": torch.zeros(5, dtype=torch.int64)})


def test_names_formats_and_shapes(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(WHOLE)
    found = read_header(tmp_path / "x.safetensors")
    assert {name: (facts.dtype, facts.shape) for name, facts in found.items()} == {
        "a": ("F32", (2, 3)),
        "b": ("I64", (5,)),
    }


@pytest.mark.parametrize("content", [WHOLE + b"x", WHOLE[:-1]], ids=["one byte more", "one byte less"])
def test_the_size_is_that_of_the_file(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=rf"it declares {len(WHOLE)} bytes and has {len(content)}"):
        read_header(tmp_path / "x.safetensors")


@pytest.mark.parametrize("places", [([0, 8], [4, 12]), ([0, 8], [12, 20])], ids=["overlap", "gap"])
def test_tensors_lie_end_to_end(places: tuple[list[int], list[int]], tmp_path: Path) -> None:
    header = {name: {"dtype": "F32", "shape": [2], "data_offsets": at} for name, at in zip("ab", places, strict=True)}
    text = json.dumps(header).encode()
    (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(places[1][1]))
    with pytest.raises(ValueError, match="overlap"):
        read_header(tmp_path / "x.safetensors")
