"""Tensor files that ranks write together have the bytes that safetensors writes."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sheeprlhf.engine.fabric import make_fabric
from sheeprlhf.engine.parts import create_tensor_file, write_rows, write_together
from sheeprlhf.structure.run import FabricConfig
from sheeprlhf.utils.errors import CheckpointError

DTYPES = ("int64", "float64", "float32", "int32", "bfloat16", "float16", "int16", "int8", "uint8", "bool")


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_the_bytes_are_those_of_save_file(metadata: dict[str, str] | None, tmp_path: Path) -> None:
    tensors = {
        f"{name}.{shape}": torch.arange(torch.Size(shape).numel()).reshape(shape).to(getattr(torch, name))
        for name in DTYPES
        for shape in ((), (3,), (2, 3), (0, 4))
    }
    save_file(tensors, tmp_path / "expected", metadata)
    create_tensor_file(tmp_path, "ours", tensors, metadata)
    write_rows(make_fabric(FabricConfig()), tmp_path / "ours", tensors, tensors, metadata=metadata)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "expected").read_bytes()


@pytest.mark.parametrize("place", ["create", "fill", "finish"])
def test_an_error_anywhere_leaves_nothing(place: str, tmp_path: Path) -> None:
    def step(name: str) -> None:
        if name == place:
            raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match="No space left"):
        write_together(
            make_fabric(FabricConfig()),
            tmp_path / "folder",
            lambda _: step("create"),
            lambda _, seen: step("fill"),
            lambda _: step("finish"),
        )
    assert list(tmp_path.iterdir()) == []
