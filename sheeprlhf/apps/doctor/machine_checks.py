"""Checks of the machine by `doctor`, independent of the model: versions, devices, precision, the hub and folders."""

import importlib.metadata
import os
import platform
import shutil
import time
import tomllib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import sheeprlhf
from sheeprlhf.security.version_guard import OPTIONAL, version_problem
from sheeprlhf.structure.fabric import FabricConfig
from sheeprlhf.utils.errors import ConfigError
from sheeprlhf.utils.home import cache_root, expand_home
from sheeprlhf.utils.memory import size_text

SHOWN = ("torch", "lightning", "transformers", "datasets", "peft", "hydra-core", "safetensors", "numpy")
_SECONDS = 1.0  # for adding up the sizes of the files in one cache


class Finding(NamedTuple):
    """One line of the report.

    Attributes:
        level: "ok"; "warning": a run works, not at its best; "problem": it would not work.
        topic: what was looked at.
        text: what was found, and for a problem what to do.
        details: lines below it.
    """

    level: str
    topic: str
    text: str
    details: tuple[str, ...] = ()


def versions() -> Iterator[Finding]:
    """Check that Python and all required packages are within their version bounds."""
    python, requirements = _required()
    shown, problems = [f"python {platform.python_version()}"], []
    if not SpecifierSet(python).contains(platform.python_version(), prereleases=True):
        problems.append(f"python {platform.python_version()} is not {python}: make an environment with one that is")
    for requirement in requirements:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue  # of an extra
        bound = f"'{requirement.name}{requirement.specifier}'"
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            problems.append(f"{requirement.name} is not installed: pip install {bound}")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            problems.append(f"{requirement.name} {version} is outside of its bounds: pip install {bound}")
        if requirement.name in SHOWN:
            shown.append(f"{requirement.name} {version}")
    for problem in problems:
        yield Finding("problem", "versions", problem)
    for name in sorted(OPTIONAL):
        with suppress(importlib.metadata.PackageNotFoundError):
            if problem := version_problem(name, importlib.metadata.version(name)):
                yield Finding("warning", "versions", f"{problem}; until then `demo` does not start")
    if not requirements:
        yield Finding("warning", "versions", "sheeprlhf is not installed, so its bounds are unknown: pip install -e .")
    elif not problems:
        yield Finding("ok", "versions", ", ".join(shown))


def _required() -> tuple[str, list[Requirement]]:
    """The bounds of Python and of packages: those of the installed package, else of the checkout; else none."""
    try:
        metadata = importlib.metadata.metadata("sheeprlhf")
        python, names = metadata["Requires-Python"] or "", importlib.metadata.requires("sheeprlhf") or []
    except importlib.metadata.PackageNotFoundError:
        file = Path(sheeprlhf.__file__).parents[1] / "pyproject.toml"
        project = tomllib.loads(file.read_text(encoding="utf-8"))["project"] if file.is_file() else {}
        python, names = project.get("requires-python", ""), project.get("dependencies", [])
    return python, [Requirement(name) for name in names]


def devices(cfg: FabricConfig) -> Iterator[Finding]:
    """Describe the devices, and check that the choice of `fabric` fits."""
    import torch

    from sheeprlhf.engine.fabric import make_fabric

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    texts = [f"{_count(cores, 'CPU core')}, {_count(torch.get_num_threads(), 'thread')}"]
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        texts.append(f"CUDA {index}: {torch.cuda.get_device_name(index)}, {size_text(free)} of {size_text(total)} free")
    if torch.cuda.device_count() == 0:
        texts.append("no CUDA device")
    try:
        fabric = make_fabric(cfg)
    except ConfigError as error:
        yield Finding("problem", "device", str(error))
        return
    processes = f"{_count(fabric.world_size, 'process')} on {fabric.device.type}"
    yield Finding("ok", "device", f"{'; '.join(texts)}; fabric={cfg.config_name} starts {processes}")
    if fabric.device.type == "cpu" and torch.cuda.device_count() > 0:
        yield Finding("warning", "device", "the run would not use the CUDA device: give fabric=auto_cuda")


def _count(number: int, name: str) -> str:
    return f"{number} {name}" + ("" if number == 1 else "es" if name.endswith("s") else "s")


def precision(cfg: FabricConfig, *, on_cuda: bool) -> Finding:
    """Report whether the hardware multiplies in bfloat16, with the advice that follows."""
    import torch

    if on_cuda:
        supported = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        abilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
        supported = any(able for name, able in abilities.items() if name.endswith("bf16"))
    chosen = f"fabric.precision={cfg.precision}"
    if not supported:
        text = f"{chosen}; this device has no bfloat16 arithmetic, so 32-true is fastest"
        return Finding("warning" if cfg.precision.startswith("bf16") else "ok", "precision", text)
    if cfg.precision.startswith("bf16"):
        return Finding("ok", "precision", f"{chosen}, which this device has arithmetic for")
    advice = "this device has bfloat16 arithmetic: fabric.precision=bf16-mixed needs less memory and may be faster"
    return Finding("ok", "precision", f"{chosen}; {advice}")


def hub(why_not: str, *, needed: bool) -> Finding:
    """Report the result of `why_offline`."""
    if not why_not:
        return Finding("ok", "hub", "it answers")
    if not needed:
        return Finding("ok", "hub", f"{why_not}; this model and this data do not need it")
    return Finding("warning", "hub", f"{why_not}: only what lies in folders and caches can be used")


def caches(data_cache: str | None) -> Iterator[Finding]:
    """Report the folders of models and prepared data, their sizes, and whether they are writable."""
    from huggingface_hub.constants import HF_HUB_CACHE

    texts, levels = [], {"ok"}
    for name, folder, key in (
        ("of the hub", Path(HF_HUB_CACHE), "HF_HOME"),
        ("of sheeprlhf", cache_root(data_cache), "data.cache_dir"),
    ):
        text = f"{name} {folder}, {_folder_size(folder)}"
        if not _is_writable(folder):
            levels.add("problem" if key == "data.cache_dir" else "warning")
            text += f" (not writable: fix its permissions, or set {key}=<folder>)"
        texts.append(text)
    level = next(level for level in ("problem", "warning", "ok") if level in levels)
    yield Finding(level, "caches", "; ".join(texts))


def _folder_size(folder: Path) -> str:
    """The size of all files below, links not followed; "more than" what was counted when time is up."""
    deadline, total, waiting = time.monotonic() + _SECONDS, 0, [folder]
    while waiting:
        try:
            with os.scandir(waiting.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(Path(entry.path))
                    elif entry.is_file(follow_symlinks=False):
                        total += entry.stat().st_size
        except OSError:  # gone, or not for us to read
            continue
        if time.monotonic() > deadline:
            return f"more than {size_text(total)}"
    return size_text(total) if folder.is_dir() else "not there yet"


def _existing(path: Path) -> Path:
    """The folder itself, or the nearest one above it that is there."""
    path = expand_home(path).absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def _is_writable(path: Path) -> bool:
    """True if files can be made in a folder, which need not exist yet."""
    place = _existing(path)
    return place.is_dir() and os.access(place, os.W_OK | os.X_OK)


def disk(root_dir: str, *, checkpoint: int, kept: int, final: int) -> Finding:
    """Check that the disk has space for the checkpoints of a run.

    Args:
        root_dir: where runs are made.
        checkpoint: bytes of one.
        kept: `task.keep_checkpoints`; the best one and the one that is being written come on top.
        final: bytes of `final/`.
    """
    free, needed = shutil.disk_usage(_existing(Path(root_dir))).free, (kept + 2) * checkpoint + final
    what = (
        f"{size_text(free)} free in {root_dir}; a run writes up to {size_text(needed)}: {kept + 2} checkpoints of "
        f"{size_text(checkpoint)} and final/ of {size_text(final)}"
    )
    if needed > free:
        return Finding("problem", "disk", f"{what}: give root_dir=<folder on another disk> or task.keep_checkpoints=1")
    return Finding("warning" if needed > free / 2 else "ok", "disk", what)
