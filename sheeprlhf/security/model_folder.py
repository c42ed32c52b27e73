"""Checks of an untrusted folder of a model or of adapters, before a library opens any of its files.

Its files are plain ones inside it, of bounded size; weights are safetensors that say what they are, or
pytorch_model.bin (of adapters, adapter_model.bin), which `pickled_weights` converts without running code; its JSON asks
for no code, no other place and no file by name. Nothing else in the folder is ever opened. Imports no torch.

Chat templates are programs. A sandbox keeps them from Python, but bounds neither time nor memory: they are tried first.
"""

import hashlib
import json
import math
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from sheeprlhf.security.json_records import ADAPTER_CONFIG as ADAPTER_SCHEMA
from sheeprlhf.security.json_records import load_json
from sheeprlhf.utils.errors import ModelError, RecordError
from sheeprlhf.utils.home import PICKLED, PICKLED_INDEX
from sheeprlhf.utils.output import open_file, read_small, real_file

MAX_HEADER = 10_000_000  # bytes; of 100,000 tensors it has about as many
TENSOR_NAME = re.compile(r"[\w./-]{1,512}", re.ASCII)
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER_CONFIG, ADAPTERS, PICKLED_ADAPTERS = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
MERGED = "merged_model"  # a folder, in messages
SMALL_FILES = ("*.json", "*.jinja", "*.txt")  # what loading needs besides weights
MAX_TEMPLATE = 64 << 10
_MAX_CONFIG = 4 << 20
_MAX_VOCABULARY = 256 << 20
_MAX_DEPTH = 40
_MAX_LAYERS, _MAX_WIDTH = 10_000, 1 << 31
_LIMITS = {".jinja": MAX_TEMPLATE, ".txt": _MAX_VOCABULARY, ".json": _MAX_VOCABULARY}
_CONFIGS = ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json")
_TOKENIZERS = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("vocab.txt",))
_SHARD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,120}\.safetensors")
_PICKLED_SHARD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,120}\.bin")
_TEMPLATE_FILE = re.compile(r"[A-Za-z0-9_-]{1,64}\.jinja")
_ATTENTION = re.compile(r"[a-z0-9_|]{1,40}")
_DTYPE = re.compile(r"(?:torch\.)?(?:auto|half|double|b?float\w{1,20}|u?int\d+)")
_TOKENIZER_CLASS = re.compile(r"[A-Za-z0-9_]{0,60}Tokenizer(?:Fast)?|TokenizersBackend")
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_WIDTHS = ("vocab_size", "hidden_size", "n_embd", "d_model", "intermediate_size", "ffn_dim", "max_position_embeddings")


class TensorFacts(NamedTuple):
    """A tensor's number format, such as "F32", and its shape, as the header gives them."""

    dtype: str
    shape: tuple[int, ...]


def read_header(path: Path) -> dict[str, TensorFacts]:
    """The tensors that a safetensors file declares, without their bytes. Raises ValueError if it is none."""
    from safetensors import SafetensorError, safe_open

    with open(open_file(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as start:
        length = int.from_bytes(start.read(8), "little")
    if length > MAX_HEADER:
        raise ValueError(f"its header has {length} bytes, more than {MAX_HEADER}")
    try:
        with safe_open(path, framework="np") as file:  # checks that the tensors fill the file, without gaps
            slices = {name: file.get_slice(name) for name in file.offset_keys()}
    except SafetensorError as error:
        raise ValueError(f"it is not a safetensors file, or damaged: {error}") from error
    for name in slices:
        if not TENSOR_NAME.fullmatch(name):
            raise ValueError(f"a tensor is named {name[:80]!r}")
    return {name: TensorFacts(part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}


def merge_advice(folder: Path) -> str:
    """Return the command that merges a folder of adapters into its base model, and the folder it writes."""
    config: dict[str, Any] = {}
    with suppress(RecordError):  # reported when the folder is loaded
        config = load_json(folder / ADAPTER_CONFIG, ADAPTER_SCHEMA)
    scores = config.get("task_type") == "SEQ_CLS"
    script = (
        f"from peft import AutoPeftModelFor{'SequenceClassification' if scores else 'CausalLM'} as M, PeftConfig as C; "
        f"from transformers import AutoTokenizer as T; f = {json.dumps(str(folder))}; "
        "t = T.from_pretrained(C.from_pretrained(f).base_model_name_or_path); "
        f"M.from_pretrained(f{', num_labels=1' if scores else ''}).merge_and_unload().save_pretrained({MERGED!r}); "
        f"t.save_pretrained({MERGED!r})"
    )
    return (
        f"it has adapters and no model: merge them into the model that they were trained on, "
        f"`{shlex.join(['python', '-c', script])}`, and give {MERGED}"
    )


def folder_of(source: str, revision: str | None, *, local_only: bool) -> Path:
    """A model's folder, or a hub id's in the hub's cache with its small files. Raises OSError if there is none."""
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    nested = [f"*/{pattern}" for pattern in SMALL_FILES]
    return Path(
        snapshot_download(
            source,
            revision=revision,
            local_files_only=local_only,
            allow_patterns=[*SMALL_FILES, "additional_chat_templates/*.jinja"],
            ignore_patterns=[pattern for pattern in nested if not pattern.endswith(".jinja")],
        )
    )


def adapter_folder_of(source: str, *, local_only: bool) -> Path:
    """The hub cache's folder of adapters, whose files are fetched first. Raises OSError if it is not to be had."""
    from huggingface_hub import snapshot_download

    names = [ADAPTER_CONFIG, ADAPTERS, PICKLED_ADAPTERS]
    return Path(snapshot_download(source, local_files_only=local_only, allow_patterns=names))


def download_weights(source: str, folder: Path) -> None:
    """Bring a hub's weights, safetensors if any, into `folder_of`'s folder. Raises OSError and ModelError."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import RemoteEntryNotFoundError

    for one, index, shard in ((WEIGHTS, INDEX, _SHARD), (PICKLED, PICKLED_INDEX, _PICKLED_SHARD)):
        try:
            hf_hub_download(source, one, revision=folder.name)
            return
        except RemoteEntryNotFoundError:
            for name in _weights_files(folder, one, index, shard):
                hf_hub_download(source, name, revision=folder.name)
        if os.path.lexists(folder / index):
            return


def check_model(folder: Path) -> None:
    """Raise ModelError for a model's folder that no library should open; its weights are not looked at."""
    _check_files(folder)
    if (folder / ADAPTER_CONFIG).exists():  # transformers would load the model that it names
        if not (folder / "config.json").exists():
            raise ModelError(f"{folder}: {merge_advice(folder)}")
        raise ModelError(f"{folder} has a model and adapters in one folder: give a folder that has the model only")


def check_tokenizer(folder: Path) -> None:
    """Raise ModelError if a folder's tokenizer is not plain data, or if no library should open its files."""
    _check_files(folder)
    if not any(all((folder / name).is_file() for name in names) for names in _TOKENIZERS):
        raise ModelError(f"{folder} has no tokenizer.json, and no other kind of tokenizer is read: save it with one")


def _check_files(folder: Path) -> None:
    names = sorted(path.name for path in _read_by_libraries(folder))
    for first, second in zip(sorted(names, key=str.lower), sorted(names, key=str.lower)[1:], strict=False):
        if first.lower() == second.lower():
            raise ModelError(f"{folder} has {first} and {second}, which are one file on some systems: remove one")
    for path in _read_by_libraries(folder):
        if path.suffix == ".safetensors":
            continue  # only those that the weights are in are opened: `weights_of` looks at them
        plain_file(folder, str(path.relative_to(folder)), least=0, most=_LIMITS[path.suffix])
        if path.parent != folder and not _TEMPLATE_FILE.fullmatch(path.name):
            raise ModelError(f"{path}: a chat template may be named by letters, digits, - and _ only")
    for name in _CONFIGS:
        if name in names:
            _check_config(folder / name, read_json(folder, name))


def _read_by_libraries(folder: Path) -> Iterator[Path]:
    """Files that a library may open by itself when it is given the folder."""
    endings = (*_LIMITS, ".safetensors")
    yield from (path for path in folder.iterdir() if path.suffix in endings)
    templates = folder / "additional_chat_templates"
    if templates.is_dir():
        yield from (path for path in templates.iterdir() if path.suffix == ".jinja")


def plain_file(folder: Path, name: str, *, least: int = 1, most: int | None = None) -> Path:
    """The file that a name of a folder leads to. Raises ModelError if it is outside, missing or of another size."""
    path = folder / name
    try:
        real = real_file(path, folder)
        size = real.stat().st_size
        if size < least:
            raise OSError(f"{path} is empty")
        if most is not None and size > most:
            raise OSError(f"{path} has more than {most} bytes")
    except OSError as error:
        raise ModelError(_said(path, error)) from error
    return real


def _said(path: Path, error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return f"{path} is missing"
    text = str(error)
    return text if text.startswith(str(path)) else f"{path}: {text}"


def read_json(folder: Path, name: str, limit: int = _MAX_CONFIG) -> dict[str, Any]:
    """The object in a JSON file of a folder. Raises ModelError if it is missing, too large or none."""
    path = folder / name
    try:
        content = json.loads(read_small(plain_file(folder, name, least=0, most=limit), limit))
    except (OSError, ValueError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{path} is not JSON: {error}") from error
    except RecursionError as error:
        raise ModelError(f"{path} is nested too deeply") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds no object")
    return content


def _check_config(path: Path, content: dict[str, Any]) -> None:
    """Refuse what would name code, another place or another file; and a shape that no machine could build."""
    for key, value in _entries(path, content, 0):
        text = value if isinstance(value, str) else None
        if key in ("trust_remote_code", "use_pretrained_backbone", "transformers_weights") and value:
            raise ModelError(f"{path}: {key} asks for code or weights from elsewhere: remove it")
        if "attn_implementation" in key or "experts_implementation" in key:
            for choice in value.values() if isinstance(value, dict) else [value]:
                if isinstance(choice, str) and not _ATTENTION.fullmatch(choice):
                    raise ModelError(f"{path}: {key} names code from elsewhere ({choice[:60]!r}): remove it")
        if key in ("dtype", "torch_dtype") and text is not None and not _DTYPE.fullmatch(text):
            raise ModelError(f"{path}: {key}={text[:60]!r} is not a number format")
        if key == "tokenizer_class" and text is not None and not _TOKENIZER_CLASS.fullmatch(text):
            raise ModelError(f"{path}: {key}={text[:60]!r} is not a tokenizer")
        names_file = key.endswith(("_file", "_files")) and key != "special_tokens_map_file"  # that one is never opened
        if path.name != "config.json" and names_file and value:
            raise ModelError(f"{path}: {key} names a file: remove it, files are found by their usual names")
        limit = _MAX_LAYERS if key in _LAYERS else _MAX_WIDTH if key in _WIDTHS else None
        if path.name == "config.json" and limit and isinstance(value, int | float) and not 0 <= value <= limit:
            raise ModelError(f"{path}: {key}={value:.3g} is beyond {limit}")


def _entries(path: Path, node: Any, depth: int) -> Iterator[tuple[str, Any]]:
    """Every key of an object and of what is in it, with its value."""
    if depth > _MAX_DEPTH:
        raise ModelError(f"{path} is nested too deeply")
    if isinstance(node, dict):
        for key, value in node.items():
            yield key, value
            yield from _entries(path, value, depth + 1)
    elif isinstance(node, list):
        for value in node:
            yield from _entries(path, value, depth + 1)


def weights_of(folder: Path) -> dict[str, TensorFacts]:
    """The tensors that a model's safetensors declare; {} without any. Raises ModelError for wrong files."""
    tensors: dict[str, TensorFacts] = {}
    for name in safetensors_files(folder):
        tensors |= tensors_of(folder, name)
    if not os.path.lexists(folder / WEIGHTS) and os.path.lexists(folder / INDEX):
        for name in sorted(_weight_map(folder, INDEX).keys() - tensors.keys()):
            raise ModelError(f"{folder / INDEX} names the tensor {name[:80]!r}, which no shard has")
    return tensors


def safetensors_files(folder: Path) -> list[str]:
    """Names of the safetensors files of a model's weights, if any. Raises ModelError if the index is damaged."""
    return _weights_files(folder, WEIGHTS, INDEX, _SHARD)


def pickled_files(folder: Path) -> list[str]:
    """Names of the pickled files of a model without safetensors, if any. Raises ModelError if an index is damaged."""
    if any(os.path.lexists(folder / name) for name in (WEIGHTS, INDEX)):
        return []
    return _weights_files(folder, PICKLED, PICKLED_INDEX, _PICKLED_SHARD)


def _weights_files(folder: Path, one: str, index: str, shard: re.Pattern[str]) -> list[str]:
    """The one file, or the shards of an index, whose names have to match a pattern."""
    if os.path.lexists(folder / one):
        return [one]
    if not os.path.lexists(folder / index):
        return []
    names = sorted(set(_weight_map(folder, index).values()))
    for name in names:
        if not shard.fullmatch(name) or ".." in name:
            ending = "." + shard.pattern.rpartition(".")[2]
            raise ModelError(f"{folder / index}: the shard {name[:80]!r} is not a plain name that ends in {ending}")
    return names


def _weight_map(folder: Path, index: str) -> dict[str, str]:
    """The names of tensors in an index, each with the name of its file."""
    where = read_json(folder, index, _MAX_VOCABULARY).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(name, str) for name in where.values()):
        raise ModelError(f"{folder / index} has no weight_map of names")
    return where


def tensors_of(folder: Path, name: str) -> dict[str, TensorFacts]:
    """The tensors that a safetensors file declares. Raises ModelError if it is outside, or does not have them."""
    path = folder / name
    try:
        return read_header(real_file(path, folder))
    except (OSError, ValueError) as error:
        raise ModelError(_said(path, error)) from error


def check_sizes(folder: Path, config: dict[str, Any], tensors: dict[str, TensorFacts]) -> None:
    """Raise ModelError if the weights are too few for the sizes in config.json, before the model is built."""
    if not tensors:
        return
    total = sum(math.prod(facts.shape) for facts in tensors.values())
    for key in _LAYERS:
        if isinstance(config.get(key), int) and config[key] > len(tensors):
            raise ModelError(f"{folder}: config.json has {key}={config[key]}, the weights are {len(tensors)} tensors")
    words, width = (
        config.get("vocab_size"),
        next((config[key] for key in ("hidden_size", "n_embd") if key in config), 1),
    )
    if isinstance(words, int) and isinstance(width, int) and words * width > 8 * total:  # 8: of packed 4-bit weights
        raise ModelError(f"{folder}: config.json has vocab_size={words} of width {width}, the weights {total} numbers")


_SECONDS = 2  # of the processor; the wall may be slow
_WALL_SECONDS = 30
_PROBE = Path(__file__).with_name("template_probe.py")
_TEMPLATE_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")  # saving a template makes a file of its name
_READ = {"872be49dbb638044ad01b60388f48d469ff2980e5f0dccdc22ec907db54d0788"}  # SHA-256 of SmolLM2's: no trial


def check_templates(tokenizer: Any, where: str) -> None:
    """Raise ModelError for chat templates that are not text of bounded size that renders within limits."""
    templates = getattr(tokenizer, "chat_template", None) or {}
    named = templates if isinstance(templates, dict) else {"default": templates}
    for name, text in named.items():
        if not isinstance(name, str) or not _TEMPLATE_NAME.fullmatch(name):
            raise ModelError(f"{where}: the chat template {str(name)[:60]!r} needs a name of letters, digits, - and _")
        if not isinstance(text, str):
            raise ModelError(f"{where}: its chat template {name!r} is not text")
        if len(text.encode("utf-8", "replace")) > MAX_TEMPLATE:
            raise ModelError(f"{where}: its chat template {name!r} has more than {MAX_TEMPLATE} bytes")
        if problem := _problem(text):
            raise ModelError(f"{where}: its chat template {name!r} {problem}; it will not be used")


@cache
def _problem(text: str) -> str:
    """The forbidden operation of a template that renders a short conversation; empty if there is none."""
    content = text.encode("utf-8", "replace")
    if hashlib.sha256(content).hexdigest() in _READ:
        return ""
    how: dict[str, Any] = {"timeout": _WALL_SECONDS, "env": {}, "cwd": "/"}
    try:
        done = subprocess.run([sys.executable, "-I", str(_PROBE)], input=content, capture_output=True, **how)
    except subprocess.TimeoutExpired:
        return f"does not end within {_WALL_SECONDS} seconds"
    if done.returncode < 0:  # the limit of time is a signal
        return f"does not end within {_SECONDS} seconds of the processor"
    if done.returncode:
        return "cannot be tried: it ends the program that tries it"
    return done.stdout.decode("utf-8", "replace").strip()
