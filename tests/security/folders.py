"""Folders of models, adapters and checkpoints that a stranger has spoiled, and how each is loaded."""

import json
import os
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sheeprlhf.engine.checkpoint import read_tensors
from sheeprlhf.engine.manifest import verify_manifest
from sheeprlhf.model.adapter import read_adapter_config
from sheeprlhf.model.folder.load import load_causal_lm, load_tokenizer
from sheeprlhf.structure.model import ModelConfig
from tests.security.guard import Payload, pickled

Attempt = Callable[[], object]
Spoil = Callable[[Path], object]
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED = "pytorch_model.bin"


def model_of(folder: Path) -> torch.nn.Module:
    """Load the tokenizer and the model, as every task does; the model."""
    cfg = ModelConfig(config_name="auto", repo_name=str(folder))
    tokenizer = load_tokenizer(cfg)
    return load_causal_lm(cfg, vocabulary=len(tokenizer), longest=32)


def assert_is(model: torch.nn.Module, folder: Path) -> None:
    """What was loaded has the weights of the safetensors file of a folder, and computes with them."""
    weights, expected = model.state_dict(), load_file(folder / WEIGHTS)
    assert expected and expected.keys() - weights.keys() == set()
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
    assert weights.keys() - expected.keys() <= {"lm_head.weight"}  # tied
    ids = torch.arange(9)[None]
    plain = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(ids).logits, plain.eval()(ids).logits, rtol=0, atol=1e-5)


def safetensors(path: Path, header: bytes | dict[str, Any], data: bytes = b"", *, length: int | None = None) -> None:
    """A file with this header, whatever it says."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def one(**entry: Any) -> dict[str, Any]:
    """A header of one tensor of two numbers."""
    return {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | entry}


def merged(name: str, **entries: Any) -> Spoil:
    """Add entries to a JSON file."""

    def spoil(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | entries))

    return spoil


def sharded(folder: Path, shard: str, *, content: str = "") -> None:
    """An index instead of one file; it names one shard."""
    names = json.loads((folder / WEIGHTS).read_bytes()[8:].split(b"}}")[0] + b"}}").keys() - {"__metadata__"}
    (folder / INDEX).write_text(content or json.dumps({"weight_map": dict.fromkeys(names, shard)}))
    (folder / WEIGHTS).rename(folder.parent / "outside.safetensors")


def linked(name: str, target: str) -> Spoil:
    """A link instead of a file; `target` is from the folder."""

    def spoil(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return spoil


def piped(name: str) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return spoil


def written(name: str, content: bytes) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)

    return spoil


def moved_out(folder: Path) -> None:
    shutil.move(folder / WEIGHTS, folder.parent / "outside.safetensors")
    (folder / WEIGHTS).symlink_to("../outside.safetensors")


def sparse(name: str, size: int, start: bytes = b"") -> Spoil:
    def spoil(folder: Path) -> None:
        with (folder / name).open("wb") as file:
            file.write(start)
            file.truncate(size)

    return spoil


def at_weights(header: bytes | dict[str, Any], data: bytes = b"\0" * 8, *, length: int | None = None) -> Spoil:
    return lambda folder: safetensors(folder / WEIGHTS, header, data, length=length)


def hard_link(folder: Path) -> None:
    (folder.parent / "secret").write_text("a text that is nobody's business")
    (folder / WEIGHTS).unlink()
    os.link(folder.parent / "secret", folder / WEIGHTS)


SPOILT: dict[str, Spoil] = {
    "header of 2^63 bytes": at_weights(one(), length=1 << 63),
    "header of 50 MB": sparse(WEIGHTS, 60_000_000, struct.pack("<Q", 50_000_000) + b"{"),
    "header longer than the file": at_weights(one(), length=5_000),
    "header no JSON": at_weights(b"{" + b"x" * 50),
    "header deep": at_weights(b'{"w":' + b"[" * 200_000),
    "header with a key twice": at_weights(b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"w":{}}'),
    "tensor named as a path": at_weights({"\n../../x": one()["w"]}),
    "tensor without a shape": at_weights({"w": {"dtype": "F32"}}),
    "tensor huge": at_weights(one(shape=[1 << 40, 1 << 40])),
    "tensor negative": at_weights(one(shape=[-2, -1])),
    "tensor of objects": at_weights(one(dtype="O")),
    "tensor beyond the file": at_weights(one(shape=[1 << 30], data_offsets=[0, 1 << 32])),
    "tensors over each other": at_weights(one() | {"v": one()["w"]}),
    "tensors apart": at_weights(one() | {"v": one()["w"] | {"data_offsets": [12, 20]}}, b"\0" * 20),
    "bytes behind the tensors": at_weights(one(), b"\0" * 64),
    "bytes missing": at_weights(one(), b"\0" * 4),
    "shapes of another model": lambda folder: save_file({"model.norm.weight": torch.zeros(3)}, folder / WEIGHTS),
    "empty": written(WEIGHTS, b""),
    "weights a link out of the folder": moved_out,
    "weights a link to a device": linked(WEIGHTS, "/dev/zero"),
    "weights a link to itself": linked(WEIGHTS, WEIGHTS),
    "weights a pipe": piped(WEIGHTS),
    "weights a hard link": hard_link,
    "weights a folder": lambda folder: ((folder / WEIGHTS).unlink(), (folder / WEIGHTS).mkdir()),
    "config a link to a file of the user's": linked("config.json", "/etc/passwd"),
    "config a pipe": piped("config.json"),
    "tokenizer a link to a device": linked("tokenizer.json", "/dev/zero"),
    "vocabulary a pipe": piped("vocab.json"),
    "template a link to a file of the user's": linked("chat_template.jinja", "/etc/passwd"),
    "two names that differ in case": written("Model.safetensors", b"x"),
    "config deep": written("config.json", b'{"a":' + b"[" * 100_000),
    "config of 100 MB": sparse("config.json", 100_000_000),
    "config a list": written("config.json", b"[]"),
    "a million layers": merged("config.json", num_hidden_layers=1_000_000),
    "more layers than weights": merged("config.json", num_hidden_layers=5_000),
    "a vocabulary of a billion": merged("config.json", vocab_size=10**9),
    "width of a trillion": merged("config.json", hidden_size=10**12),
    "shard above": lambda folder: sharded(folder, "../outside.safetensors"),
    "shard absolute": lambda folder: sharded(folder, str(folder.parent / "outside.safetensors")),
    "shard below": lambda folder: sharded(folder, "a/b.safetensors"),
    "shard with two dots": lambda folder: sharded(folder, "a..safetensors"),
    "shard a pickle": lambda folder: sharded(folder, "pytorch_model-00001-of-00001.bin"),
    "shard missing": lambda folder: sharded(folder, "model-00001-of-00001.safetensors"),
    "shard of numbers": lambda folder: sharded(folder, "", content='{"weight_map": {"a": 1}}'),
    "index a list": lambda folder: sharded(folder, "", content="[]"),
    "adapters beside the model": written("adapter_config.json", b'{"base_model_name_or_path": "somebody/else"}'),
    "weights named by the config": merged("config.json", transformers_weights="adapter_model.bin"),
    "attention from elsewhere": merged("config.json", _attn_implementation_internal="somebody/kernel"),
    "attention of a part from elsewhere": merged("config.json", attn_implementation={"": "somebody/kernel:fn"}),
    "experts from elsewhere": merged("config.json", _experts_implementation="somebody/kernel"),
    "trust in a part": merged("config.json", keypoint_detector_config={"trust_remote_code": True}),
    "backbone from elsewhere": merged("config.json", backbone="somebody/else", use_pretrained_backbone=True),
    "number format a function": merged("config.json", torch_dtype="load"),
    "tokenizer class a function": merged("tokenizer_config.json", tokenizer_class="pipeline"),
    "tokenizer file named": merged("tokenizer_config.json", tokenizer_file="/etc/passwd"),
    "vocabulary file named": merged("tokenizer_config.json", vocab_file="../outside"),
    "tokenizer files named": merged("tokenizer_config.json", fast_tokenizer_files=["tokenizer.9.json"]),
    "trust in the tokenizer": merged("tokenizer_config.json", trust_remote_code=True),
    "tokenizer of sentencepiece alone": lambda folder: (folder / "tokenizer.json").rename(folder / "tokenizer.model"),
    "template named as a path": merged(
        "tokenizer_config.json", chat_template=[{"name": "../../x", "template": "{{ messages }}"}]
    ),
    "template file of an odd name": written("additional_chat_templates/a b.jinja", b"x"),
    "template of 70 kB": written("chat_template.jinja", b"{#" + b"a" * 70_000 + b"#}"),
}


def pickled_shard(folder: Path, shard: str) -> None:
    """An index instead of one pickled file; it names one shard."""
    names = torch.load(folder / PICKLED, weights_only=True)
    (folder / f"{PICKLED}.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, shard)}))
    (folder / PICKLED).rename(folder.parent / "outside.bin")


def saved(content: Callable[[dict[str, torch.Tensor]], Any], *, zipped: bool = True) -> Spoil:
    """Other content in the pickled file, made of its tensors."""

    def spoil(folder: Path) -> None:
        tensors = torch.load(folder / PICKLED, weights_only=True)
        torch.save(content(tensors), folder / PICKLED, _use_new_zipfile_serialization=zipped)

    return spoil


def compressed(folder: Path) -> None:
    with zipfile.ZipFile(folder / PICKLED) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(folder / PICKLED, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)


def pickled_outside(folder: Path) -> None:
    shutil.move(folder / PICKLED, folder.parent / "outside.bin")
    (folder / PICKLED).symlink_to("../outside.bin")


SPOILT_PICKLES: dict[str, Spoil] = {
    "pickled weights a link out of the folder": pickled_outside,
    "pickled weights a link to a device": linked(PICKLED, "/dev/zero"),
    "pickled weights a pipe": piped(PICKLED),
    "pickled weights empty": written(PICKLED, b""),
    "pickled weights cut": lambda folder: os.truncate(folder / PICKLED, 5_000),
    "pickled weights compressed": compressed,
    "pickled shard above": lambda folder: pickled_shard(folder, "../outside.bin"),
    "pickled shard absolute": lambda folder: pickled_shard(folder, str(folder.parent / "outside.bin")),
    "pickled shard missing": lambda folder: pickled_shard(folder, "pytorch_model-00001-of-00001.bin"),
    "pickled tensor larger than its bytes": saved(lambda tensors: tensors | {"w": torch.zeros(1).expand(1 << 40)}),
    "pickled tensors of the same bytes": saved(
        lambda tensors: tensors | dict.fromkeys((f"w{i}" for i in range(5000)), torch.zeros(5000))
    ),
    "pickled tensor named as a path": saved(lambda tensors: tensors | {"\n../../x": torch.zeros(2)}),
    "pickled tensor of another device": saved(lambda tensors: tensors | {"w": torch.zeros(2, device="meta")}),
    "pickled list": saved(lambda tensors: list(tensors.values())),
    "pickled objects beside tensors": saved(lambda tensors: tensors | {"epoch": 3}, zipped=False),
}


def spoilt_models(good: Path, place: Path, sentinels: Path) -> Iterator[tuple[str, Attempt]]:
    """Each folder with one thing wrong."""
    for number, (name, spoil) in enumerate(SPOILT.items()):
        folder = place / str(number) / "model"
        shutil.copytree(good, folder)
        spoil(folder)
        yield name, lambda folder=folder: model_of(folder)


def pickles(good: Path, place: Path, sentinels: Path) -> Iterator[tuple[str, Attempt]]:
    """Pickles of several kinds under the names of files that we read, and under their own."""
    plain = pickled(sentinels / "pickle")
    torch.save({"w": torch.zeros(2), "p": Payload(sentinels / "torch")}, place / "torch.pt")
    torch.save(Payload(sentinels / "old"), place / "old.pt", _use_new_zipfile_serialization=False)
    np.save(place / "objects.npy", np.array([Payload(sentinels / "numpy")], dtype=object), allow_pickle=True)
    contents = {
        "pickle": plain,
        "pickle of protocol 0": pickled(sentinels / "zero", 0),
        "torch": (place / "torch.pt").read_bytes(),
        "torch of old": (place / "old.pt").read_bytes(),
        "numpy objects": (place / "objects.npy").read_bytes(),
    }
    files = [(WEIGHTS, content, kind) for kind, content in contents.items()]
    files += [(name, plain, "pickle") for name in ("config.json", "tokenizer.json", "tokenizer_config.json")]
    files += [(name, plain, "pickle") for name in ("generation_config.json", "chat_template.jinja")]
    for number, (name, content, kind) in enumerate(files):
        folder = place / f"pickle-{number}"
        shutil.copytree(good, folder)
        (folder / name).write_bytes(content)
        yield f"{kind} as {name}", lambda folder=folder: model_of(folder)
    for name in ("pytorch_model.bin", "model.pt", ".metadata", "rng_state.pth"):
        folder = place / f"alone-{name}"
        shutil.copytree(good, folder)
        (folder / WEIGHTS).unlink()
        (folder / name).write_bytes(contents["torch"])
        yield f"{name} alone", lambda folder=folder: model_of(folder)
    for kind, content in contents.items():  # pytorch_model.bin is read, by a reader that knows tensors alone
        folder = place / f"{kind}-alone"
        shutil.copytree(good, folder)
        (folder / WEIGHTS).unlink()
        (folder / PICKLED).write_bytes(content)
        yield f"{kind} as {PICKLED} alone", lambda folder=folder: model_of(folder)
    for name, spoil in SPOILT_PICKLES.items():
        folder = place / name / "model"
        shutil.copytree(good, folder)
        torch.save(load_file(folder / WEIGHTS), folder / PICKLED)
        (folder / WEIGHTS).unlink()
        spoil(folder)
        yield name, lambda folder=folder: model_of(folder)
    adapter = place / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}')
    (adapter / "adapter_model.bin").write_bytes(contents["torch"])
    yield "adapter_model.bin alone", lambda: read_adapter_config(adapter)
    for kind, content in contents.items():
        path = place / f"{kind}.safetensors"
        path.write_bytes(content)
        yield f"{kind} in a checkpoint", lambda path=path: read_tensors(path)
    (place / "MANIFEST.json").write_bytes(plain)
    yield "pickle as MANIFEST.json", lambda: verify_manifest(place)
