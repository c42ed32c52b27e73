"""Pickled weights, `pytorch_model.bin` (one file or shards) or PEFT's `adapter_model.bin`, as safetensors in our cache.

The files may be a stranger's. `torch.load(weights_only=True)` builds tensors and plain containers, and rejects every
other name in a pickle; it never runs code of the file. A conversion that somebody else has made, such as a pull request
of the hub's bot, is never used.
"""

import hashlib
import json
import os
import re
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sheeprlhf.security.model_folder import (
    ADAPTER_CONFIG,
    ADAPTERS,
    INDEX,
    PICKLED_ADAPTERS,
    PICKLED_INDEX,
    SMALL_FILES,
    TENSOR_NAME,
    WEIGHTS,
    check_sizes,
    pickled_files,
    plain_file,
    read_json,
    weights_of,
)
from sheeprlhf.utils.errors import ModelError, Notify
from sheeprlhf.utils.home import cache_root
from sheeprlhf.utils.memory import size_text
from sheeprlhf.utils.output import create_file, has_marker, locked, writing_errors, written_folder

if TYPE_CHECKING:
    from torch import Tensor

_FORMAT = 1  # of the converted folders
_MAX_PICKLE = 64 << 20  # bytes of the pickle in a zip file; the tensors' bytes are separate entries
_MAX_ENTRIES = 1_000_000
_MAX_GROWTH = 4  # times the size of a file: tensors that share memory are written once for each name
_MAX_TENSORS = 200_000
_FOLDER_NAME = re.compile(r"[^\w.-]+", re.ASCII)
_GLOBAL = re.compile(r"GLOBAL ([\w.]{1,100})")


def converted_folder(folder: Path, name: str, say: Notify, cache_dir: str | None = None) -> Path:
    """The folder in our cache with the model as safetensors, made if missing. Raises ModelError."""

    def fill(files: list[Path], target: Path) -> None:
        for pattern in SMALL_FILES:
            for path in folder.glob(pattern):
                if path.name != PICKLED_INDEX and path.is_file():
                    create_file(target, path.name, path.read_bytes())
        _convert(files, target, WEIGHTS)
        check_sizes(folder, read_json(target, "config.json"), weights_of(target))

    return _converted(folder, pickled_files(folder), fill, name, say, cache_dir)


def adapter_folder(folder: Path, say: Notify) -> Path:
    """The folder with PEFT's adapters as safetensors: itself, or a conversion in our cache. Raises ModelError."""
    if os.path.lexists(folder / ADAPTERS) or not os.path.lexists(folder / PICKLED_ADAPTERS):
        return folder
    config = plain_file(folder, ADAPTER_CONFIG)

    def fill(files: list[Path], target: Path) -> None:
        create_file(target, config.name, config.read_bytes())
        _convert(files, target, ADAPTERS)

    return _converted(folder, [PICKLED_ADAPTERS], fill, str(folder), say, None)


def _converted(
    folder: Path,
    names: list[str],
    fill: Callable[[list[Path], Path], None],
    name: str,
    say: Notify,
    cache_dir: str | None,
) -> Path:
    """The folder in our cache that `fill` writes from the pickled files of these names."""
    files = [plain_file(folder, file) for file in names]
    states = [os.stat(file) for file in files]
    pairs = zip(files, states, strict=True)
    known_by = [(_FORMAT, str(file), state.st_size, state.st_ctime_ns) for file, state in pairs]
    digest = hashlib.sha256(repr(known_by).encode()).hexdigest()[:16]
    short = _FOLDER_NAME.sub("-", name.strip("/").replace("/", "--"))[-80:].lstrip("-.")
    target = cache_root(cache_dir) / "converted" / f"{short}-{digest}"
    advice = "free space, or give another place with the environment variable SHEEPRLHF_CACHE"
    with writing_errors(f"{name}: its pickled weights cannot be converted in {target}", advice), locked(target, say):
        if target.exists() and not has_marker(target):
            raise ModelError(f"{target} was not made by this program and blocks a conversion: move it")
        if not target.exists():
            num_bytes = sum(state.st_size for state in states)
            how = f"they are read without running code and converted once to safetensors in {target}"
            say(f"{name}: its weights are pickled ({len(files)} .bin, {size_text(num_bytes)}); {how}")
            with written_folder(target) as temporary:
                fill(files, temporary)
    return target


def _convert(files: list[Path], target: Path, one: str) -> None:
    """Write each pickled file as one of safetensors: `one`, or shards with an index if there are several."""
    from safetensors.torch import save_file

    where: dict[str, str] = {}
    written = 0
    for number, file in enumerate(files, 1):
        name = one if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        tensors = read_pickled(file)
        written += sum(tensor.nbytes for tensor in tensors.values())
        if twice := sorted(where.keys() & tensors.keys()):
            raise ModelError(f"{file}: its tensor {twice[0]} is in another file too")
        where |= dict.fromkeys(tensors, name)
        # A copy of each: tied tensors share memory, which safetensors does not store.
        save_file({key: tensor.clone() for key, tensor in tensors.items()}, target / name, metadata={"format": "pt"})
        del tensors
    if len(files) > 1:
        index = {"metadata": {"total_size": written}, "weight_map": where}
        create_file(target, INDEX, json.dumps(index).encode())


def read_pickled(file: Path) -> dict[str, "Tensor"]:
    """The tensors of one pickled file; no code of the file is run. Raises ModelError if it holds anything else."""
    import torch

    is_zip = zipfile.is_zipfile(file)
    try:
        if is_zip:
            _check_zip(file)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip)
    except ModelError:
        raise
    except Exception as error:  # a damaged file may raise anything; torch's own text advises to run the code in it
        reason = f"it is not a file of weights, or damaged ({type(error).__name__})"
        if (asked := _GLOBAL.search(str(error))) is not None:
            reason = (
                f"it asks for {asked[1]}, which is not a tensor: code from a file is never run. Convert it to "
                "model.safetensors where you trust it, or choose another model"
            )
        raise ModelError(f"{file}: {reason}") from error
    return _checked(file, content)


def _check_zip(file: Path) -> None:
    """Reject what would grow when it is unpacked."""
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
    packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
    total = sum(entry.file_size for entry in entries)
    pickles = sum(entry.file_size for entry in entries if entry.filename.endswith(".pkl"))
    if packed or len(entries) > _MAX_ENTRIES or total > file.stat().st_size or pickles > _MAX_PICKLE:
        raise ModelError(f"{file}: it is not a file that torch.save has written: its parts are compressed or too large")


def _checked(file: Path, content: Any) -> dict[str, "Tensor"]:
    """The content as named tensors that are no larger than the memory behind them."""
    import torch
    from torch import Tensor, nn

    if not isinstance(content, dict) or not content:
        raise ModelError(f"{file}: it holds no named tensors: a state_dict of a model is read, nothing else")
    if len(content) > _MAX_TENSORS:
        raise ModelError(f"{file}: it has {len(content)} entries, more than {_MAX_TENSORS}")
    for name, tensor in content.items():
        if not isinstance(name, str) or not TENSOR_NAME.fullmatch(name):
            raise ModelError(f"{file}: a tensor is named {str(name)[:80]!r}")
        if type(tensor) not in (Tensor, nn.Parameter):
            entry = f"its entry {name[:80]} is not a tensor but {type(tensor).__name__}"
            raise ModelError(f"{file}: {entry}: only a state_dict of a model is read")
        plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
        if not plain or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ModelError(f"{file}: its tensor {name[:80]} is not stored as plain numbers")
    if sum(tensor.nbytes for tensor in content.values()) > _MAX_GROWTH * file.stat().st_size:
        raise ModelError(f"{file}: its tensors have more than {_MAX_GROWTH} times the bytes of the file")
    return {name: tensor.detach().contiguous() for name, tensor in content.items()}
