"""Checks of an untrusted folder of a model or of adapters, before a library opens any of its files.

Its files are plain ones inside it, of bounded size; weights are safetensors that say what they are, or
pytorch_model.bin (of adapters, adapter_model.bin), which `model.pickled` converts without running code; its JSON asks
for no code, no other place and no file by name. Nothing else in the folder is ever opened. Imports no torch.
"""

import json
import math
import os
import re
import shlex
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from sheeprlhf.security import record_schemas
from sheeprlhf.security.files import read_small, real_file
from sheeprlhf.security.json_records import load_json
from sheeprlhf.security.safetensors_header import TensorFacts, read_header
from sheeprlhf.utils.errors import ModelError, RecordError
from sheeprlhf.utils.home import PICKLED, PICKLED_INDEX

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
_TOKENIZER_CLASS = re.compile(r"[A-Za-z0-9]{0,60}Tokenizer(?:Fast)?|TokenizersBackend")
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_WIDTHS = ("vocab_size", "hidden_size", "n_embd", "d_model", "intermediate_size", "ffn_dim", "max_position_embeddings")


def merge_advice(folder: Path) -> str:
    """Return the command that merges a folder of adapters into its base model, and the folder it writes."""
    config: dict[str, Any] = {}
    with suppress(RecordError):  # told when the folder is loaded
        config = load_json(folder / ADAPTER_CONFIG, record_schemas.ADAPTER_CONFIG)
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
    """The folder of a model: itself, or a hub id's in the hub's cache, where its small files are brought first.

    Args:
        source: a folder or a hub id.
        revision: of the hub id.
        local_only: the hub is not to be asked.

    Raises:
        OSError: it is in no cache, or the hub refuses.
    """
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
    """The folder of a hub id's adapters in the hub's cache, where its files are brought first.

    Raises:
        OSError: it is in no cache, or the hub refuses.
    """
    from huggingface_hub import snapshot_download

    names = [ADAPTER_CONFIG, ADAPTERS, PICKLED_ADAPTERS]
    return Path(snapshot_download(source, local_files_only=local_only, allow_patterns=names))


def download_weights(source: str, folder: Path) -> None:
    """Bring the weights of a hub's model into its folder in the hub's cache, safetensors if it has some.

    Args:
        source: the hub id.
        folder: of `folder_of`, which has the indices of shards already.

    Raises:
        OSError: the hub refuses or does not answer.
        ModelError: an index is not what it has to be.
    """
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
    """Refuse a model's folder that a library should not be given; its weights are not looked at.

    Args:
        folder: has a config.json.

    Raises:
        ModelError: naming the file and what is odd about it.
    """
    _check_files(folder)
    if (folder / ADAPTER_CONFIG).exists():  # transformers would load the model that it names
        if not (folder / "config.json").exists():
            raise ModelError(f"{folder}: {merge_advice(folder)}")
        raise ModelError(f"{folder} has a model and adapters in one folder: give a folder that has the model only")


def check_tokenizer(folder: Path) -> None:
    """Refuse a folder whose tokenizer is not plain data, or whose files a library should not be given.

    Raises:
        ModelError: naming the file and what is odd about it.
    """
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
        _real(folder, path, _LIMITS[path.suffix])
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


def _real(folder: Path, path: Path, limit: int) -> Path:
    try:
        real = real_file(path, folder)
        if real.stat().st_size > limit:
            raise OSError(f"{path} has more than {limit} bytes")
    except OSError as error:
        raise ModelError(_said(path, error)) from error
    return real


def _said(path: Path, error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return f"{path} is missing"
    text = str(error)
    return text if text.startswith(str(path)) else f"{path}: {text}"


def read_json(folder: Path, name: str, limit: int = _MAX_CONFIG) -> dict[str, Any]:
    """The object in a JSON file of a folder.

    Raises:
        ModelError: it is missing, leads out of the folder, is too large or too deep, or is not an object of JSON.
    """
    path = folder / name
    try:
        content = json.loads(read_small(_real(folder, path, limit), limit))
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
    """The tensors that a model's safetensors declare, by name, in one file or in shards; empty if there are none.

    Raises:
        ModelError: a file is not what it has to be; a shard's name is a path; the index and the shards disagree.
    """
    tensors: dict[str, TensorFacts] = {}
    for name in safetensors_files(folder):
        tensors |= tensors_of(folder, name)
    if not os.path.lexists(folder / WEIGHTS) and os.path.lexists(folder / INDEX):
        for name in sorted(_weight_map(folder, INDEX).keys() - tensors.keys()):
            raise ModelError(f"{folder / INDEX} names the tensor {name[:80]!r}, which no shard has")
    return tensors


def safetensors_files(folder: Path) -> list[str]:
    """Names of the safetensors files that a model's weights are in; empty if there are none.

    Raises:
        ModelError: the index is not what it has to be.
    """
    return _weights_files(folder, WEIGHTS, INDEX, _SHARD)


def pickled_files(folder: Path) -> list[str]:
    """Names of the pickled files that a model's weights are in, if it has no safetensors; empty if there are none.

    Raises:
        ModelError: an index is not what it has to be.
    """
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
            raise ModelError(
                f"{folder / index} names the shard {name[:80]!r}, which is not a plain name that ends in {ending}"
            )
    return names


def _weight_map(folder: Path, index: str) -> dict[str, str]:
    """The names of tensors in an index, each with the name of its file."""
    where = read_json(folder, index, _MAX_VOCABULARY).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(name, str) for name in where.values()):
        raise ModelError(f"{folder / index} has no weight_map of names")
    return where


def plain_file(folder: Path, name: str) -> Path:
    """The file that a name of a folder is or leads to, plain and not empty.

    Raises:
        ModelError: it is missing, leads out of the folder, is not a plain file or has no content.
    """
    path = folder / name
    try:
        real = real_file(path, folder)
        if real.stat().st_size == 0:
            raise OSError(f"{path} is empty")
    except OSError as error:
        raise ModelError(_said(path, error)) from error
    return real


def tensors_of(folder: Path, name: str) -> dict[str, TensorFacts]:
    """The tensors that one safetensors file of a folder declares.

    Raises:
        ModelError: it is missing or leads out of the folder, or is not what it declares.
    """
    path = folder / name
    try:
        return read_header(real_file(path, folder))
    except (OSError, ValueError) as error:
        raise ModelError(_said(path, error)) from error


def check_sizes(folder: Path, config: dict[str, Any], tensors: dict[str, TensorFacts]) -> None:
    """Reject a configuration that the tensors of the weights cannot fill, before the model is built.

    Raises:
        ModelError: naming the entry of config.json and the size of the weights.
    """
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
