"""pytorch_model.bin is converted once, without running code, and is the same model afterwards."""

import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from sheeprlhf.model.folder.load import load_causal_lm
from sheeprlhf.model.folder.weights import check_weights
from sheeprlhf.structure.model import ModelConfig
from sheeprlhf.utils.errors import ModelError
from tests.support.models import VOCAB, ModelFolder

PICKLED, INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SHEEPRLHF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "converted"


def load(folder: Path, said: list[str] | None = None) -> PreTrainedModel:
    cfg = ModelConfig(config_name="auto", repo_name=str(folder))
    return load_causal_lm(cfg, vocabulary=VOCAB, longest=32, say=(said if said is not None else []).append)


def without_weights(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.safetensors"))
    return target


def assert_same(model: PreTrainedModel, folder: Path) -> None:
    """The weights are those of plain transformers, and so are the logits."""
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    weights, ids = model.state_dict(), torch.arange(9)[None]
    for name, tensor in plain.state_dict().items():
        assert torch.equal(weights[name], tensor), name
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(ids).logits, plain(ids).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "opt", "gpt2", "qwen3"])
def test_one_file(architecture: str, zipped: bool, tmp_path: Path, model_folder: ModelFolder, cache: Path) -> None:
    """Of torch's format of today and of before 1.6; llama, opt and gpt2 have tied tensors that share memory."""
    plain = AutoModelForCausalLM.from_pretrained(model_folder(architecture))
    folder = without_weights(model_folder(architecture), tmp_path / "model")
    torch.save(plain.state_dict(), folder / PICKLED, _use_new_zipfile_serialization=zipped)
    said: list[str] = []
    model = load(folder, said)
    assert_same(model, model_folder(architecture))
    assert model.name_or_path == model.config._name_or_path == str(folder)
    [line] = said
    [converted] = [path for path in cache.iterdir() if path.is_dir()]
    assert str(converted) in line and PICKLED not in {path.name for path in converted.iterdir()}

    before = os.stat(converted / "model.safetensors").st_mtime_ns
    said.clear()
    assert_same(load(folder, said), model_folder(architecture))
    assert said == [] and os.stat(converted / "model.safetensors").st_mtime_ns == before


def test_a_changed_file_is_converted_again(tmp_path: Path, model_folder: ModelFolder) -> None:
    weights = load_file(model_folder() / "model.safetensors")
    folder = without_weights(model_folder(), tmp_path / "model")
    torch.save(weights, folder / PICKLED)
    os.utime(folder / PICKLED, ns=(1, 1))
    load(folder)
    weights["model.norm.weight"] = torch.full((16,), 3.0)
    torch.save(weights, folder / PICKLED)
    os.utime(folder / PICKLED, ns=(1, 1))  # the same time and size, as an archive without times leaves them
    assert torch.equal(load(folder).state_dict()["model.norm.weight"], torch.full((16,), 3.0))


def test_names_without_the_backbones_prefix(tmp_path: Path, model_folder: ModelFolder) -> None:
    """As older checkpoints have them; the head is tied and not there."""
    weights = load_file(model_folder("opt") / "model.safetensors")
    folder = without_weights(model_folder("opt"), tmp_path / "model")
    torch.save({name.removeprefix("model."): tensor for name, tensor in weights.items()}, folder / PICKLED)
    assert_same(load(folder), model_folder("opt"))


def sharded(folder: Path, target: Path, weights: dict[str, torch.Tensor]) -> Path:
    """Two shards and their index."""
    without_weights(folder, target)
    names = sorted(weights)
    parts = {f"pytorch_model-0000{i + 1}-of-00002.bin": names[i::2] for i in range(2)}
    for file, part in parts.items():
        torch.save({name: weights[name] for name in part}, target / file)
    where = {name: file for file, part in parts.items() for name in part}
    (target / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return target


def test_shards(tmp_path: Path, model_folder: ModelFolder) -> None:
    folder = sharded(model_folder("opt"), tmp_path / "model", load_file(model_folder("opt") / "model.safetensors"))
    assert_same(load(folder), model_folder("opt"))
    (folder / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(ModelError, match=r"00002-of-00002\.bin is missing"):
        load(folder)


def test_what_is_missing_is_named_before_the_weights_are_loaded(tmp_path: Path, model_folder: ModelFolder) -> None:
    """Converted files without embedding and head are no model."""
    weights = load_file(model_folder("opt") / "model.safetensors")
    del weights["model.decoder.embed_tokens.weight"]
    folder = without_weights(model_folder("opt"), tmp_path / "model")
    torch.save(weights, folder / PICKLED)
    with pytest.raises(ModelError, match=r"model\.decoder\.embed_tokens\.weight"):
        check_weights(ModelConfig(config_name="auto", repo_name=str(folder)))


def compressed(path: Path) -> None:
    torch.save({"w": torch.zeros(10_000)}, path)
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)


BAD: dict[str, Callable[[Path], Any]] = {
    "is empty": lambda path: path.write_bytes(b""),
    "damaged": lambda path: path.write_bytes(b"x" * 100),
    "compressed": compressed,
    "no named tensors": lambda path: torch.save([torch.zeros(2)], path),
    "not a tensor but dict": lambda path: torch.save({"state_dict": {"w": torch.zeros(2)}}, path),
    "is named": lambda path: torch.save({"a b": torch.zeros(2)}, path),
    "plain numbers": lambda path: torch.save({"w": torch.zeros(1).expand(1 << 40)}, path),
    "more than 4 times": lambda path: torch.save(dict.fromkeys(map(str, range(50)), torch.zeros(10_000)), path),
    "not stored as plain": lambda path: torch.save({"w": torch.eye(2).to_sparse()}, path),
}


@pytest.mark.parametrize("said", BAD)
def test_what_is_no_file_of_weights_is_rejected(said: str, tmp_path: Path, model_folder: ModelFolder) -> None:
    folder = without_weights(model_folder(), tmp_path / "model")
    BAD[said](folder / PICKLED)
    with pytest.raises(ModelError, match=f"{PICKLED}.*{said}"):
        load(folder)
