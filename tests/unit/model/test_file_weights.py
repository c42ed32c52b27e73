"""Models whose weights stay in their files: everything but the numbers is that of a loaded model."""

import copy
from collections.abc import Callable
from pathlib import Path
from shutil import copytree

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from sheeprlhf.model.folder.load import load_causal_lm
from sheeprlhf.model.folder.weights import FileParameter, content, drop_placeholders
from sheeprlhf.structure.model import AutoModelConfig
from sheeprlhf.utils.errors import ModelError
from tests.support.models import make_model_folder

ModelFolder = Callable[..., Path]


def load(folder: Path, *, in_files: bool, **options: object) -> tuple[torch.nn.Module, list[str]]:
    said: list[str] = []
    cfg = AutoModelConfig(repo_name=str(folder), **options)
    return load_causal_lm(cfg, vocabulary=260, longest=64, in_files=in_files, say=said.append), said


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_a_model_in_files_is_the_loaded_one(architecture: str, model_folder: ModelFolder) -> None:
    (whole, _), (ours, said) = (load(model_folder(architecture), in_files=in_files) for in_files in (False, True))
    assert said == []
    expected, found = whole.state_dict(keep_vars=True), ours.state_dict(keep_vars=True)
    assert list(found) == list(expected)
    assert all(isinstance(tensor, FileParameter) for tensor in found.values())
    for name, tensor in expected.items():
        assert torch.equal(content(found[name]), tensor.detach())
        assert not torch.equal(found[name].detach(), tensor.detach()) or tensor.ndim == 1
    for ours_buffer, buffer in zip(ours.buffers(), whole.buffers(), strict=True):
        assert torch.equal(ours_buffer, buffer)
    assert ours.generation_config.to_dict() == whole.generation_config.to_dict()
    assert ours.name_or_path == whole.name_or_path


def test_copies_and_tied_weights_stay_in_files(model_folder: ModelFolder) -> None:
    model = copy.deepcopy(load(model_folder(), in_files=True)[0])
    assert model.lm_head.weight is model.model.embed_tokens.weight
    sources = drop_placeholders(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert all(parameter.is_meta for parameter in model.parameters())
    assert set(sources) == {name for name, _ in model.named_parameters()}
    name = "model.layers.1.mlp.up_proj.weight"
    expected = load_file(model_folder() / "model.safetensors")[name]
    part = (slice(5, 12), slice(2, 9))
    assert torch.equal(sources[name].read(part), expected[part])


@pytest.mark.parametrize("options", [{"resize_embeddings": True}, {}], ids=["resized", "experts"])
def test_weights_that_are_computed_are_loaded(options: dict[str, bool], tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path / "model", "llama" if options else "mixtral")
    model, said = load(folder, in_files=True, **options)
    assert len(said) == 1
    assert not any(isinstance(parameter, FileParameter) for parameter in model.parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_halves_are_read_in_the_models_format(dtype: str, tmp_path: Path, model_folder: ModelFolder) -> None:
    copytree(model_folder(), tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    halves = {name: tensor.half() for name, tensor in load_file(path).items()}
    save_file(halves, path, {"format": "pt"})
    model, _ = load(tmp_path / "model", in_files=True, dtype=dtype)
    for name, parameter in model.named_parameters():
        assert torch.equal(content(parameter), halves[name].to(getattr(torch, dtype)))


def test_missing_weights_are_reported_alike(tmp_path: Path, model_folder: ModelFolder) -> None:
    copytree(model_folder(), tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"model.norm.weight": torch.ones(3), "model.layers.7.x": torch.ones(1)}, path, {"format": "pt"})
    messages = []
    for in_files in (False, True):
        with pytest.raises(ModelError) as caught:
            load(tmp_path / "model", in_files=in_files)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert "model.norm.weight" in messages[0]


def test_a_reward_model_stays_in_its_files(tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path / "model", scores=True)
    cfg = AutoModelConfig(repo_name=str(folder))
    auto = AutoModelForSequenceClassification
    model = load_causal_lm(cfg, vocabulary=260, longest=64, auto=auto, in_files=True)
    assert torch.equal(content(model.score.weight), load_file(folder / "model.safetensors")["score.weight"])
