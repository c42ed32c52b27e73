"""`doctor`: whether a training run would work here, or on machines that are described; exit code 0 if so, else 1."""

import dataclasses
import importlib.metadata
import os
import platform
import shutil
import time
import tomllib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from rich.text import Text

import sheeprlhf
from sheeprlhf.apps.arguments import ParsedArgs
from sheeprlhf.apps.terminal import Screen, counted, paragraph, table
from sheeprlhf.config.command_words import command
from sheeprlhf.config.memory_advice import Change, memory_reductions, words
from sheeprlhf.config.path_checks import data_is_here, model_folder
from sheeprlhf.config.registry import datasets_of, replace_options
from sheeprlhf.config.validate import parse_devices
from sheeprlhf.security.redaction import plain_text, redact_command, redact_text
from sheeprlhf.security.version_guard import OPTIONAL, version_problem
from sheeprlhf.structure.data import DataConfig, LayoutDataConfig
from sheeprlhf.structure.reward import uses_judge
from sheeprlhf.structure.rollout import LocalRolloutConfig, VLLMRolloutConfig
from sheeprlhf.structure.run import DoctorConfig, FabricConfig, TrainConfig
from sheeprlhf.utils.errors import ConfigError, ModelError, SheepError
from sheeprlhf.utils.home import cache_root, expand_home, why_offline
from sheeprlhf.utils.memory import available_memory, size_text

if TYPE_CHECKING:
    from sheeprlhf.agent.policy import Policy
    from sheeprlhf.model.memory import MemoryPlan, ModelSize

SHOWN = ("torch", "lightning", "transformers", "datasets", "peft", "hydra-core", "safetensors", "numpy")
_SECONDS = 1.0  # for adding up the sizes of the files in one cache


class Finding(NamedTuple):
    """One line of the report."""

    level: str  # "ok"; "warning": a run works, not at its best; "problem": it would not work
    topic: str  # what was looked at
    text: str  # what was found, and for a problem what to do
    details: tuple[str, ...] = ()  # lines below it


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
    texts = [f"{counted(cores, 'CPU core')}, {counted(torch.get_num_threads(), 'thread')}"]
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
    processes = f"{counted(fabric.world_size, 'process')} on {fabric.device.type}"
    yield Finding("ok", "device", f"{'; '.join(texts)}; fabric={cfg.config_name} starts {processes}")
    if fabric.device.type == "cpu" and torch.cuda.device_count() > 0:
        yield Finding("warning", "device", "the run would not use the CUDA device: give fabric=auto_cuda")


def precision(cfg: FabricConfig, *, on_cuda: bool) -> Finding:
    """Report whether the hardware multiplies in bfloat16, with the advice that follows."""
    import torch

    if on_cuda:
        supported = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        abilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
        supported = any(able for name, able in abilities.items() if name.endswith("bf16"))
    chosen, is_half = f"fabric.precision={cfg.precision}", cfg.precision.startswith("bf16")
    text = "this device has bfloat16 arithmetic"
    if not supported:
        text = "this device has no bfloat16 arithmetic, so 32-true is fastest"
    elif not is_half:
        text += ": fabric.precision=bf16-mixed needs less memory and may be faster"
    return Finding("warning" if is_half and not supported else "ok", "precision", f"{chosen}; {text}")


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
        place = _existing(folder)
        if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
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
    return next(place for place in (path, *path.parents) if place.exists())


def _disk(config: DoctorConfig, size: "ModelSize") -> Finding:
    """Check that the disk has space for the kept checkpoints, the best one, one that is being written, and final/."""
    root_dir, checkpoint, most = config.root_dir, _checkpoint_bytes(config, size), config.task.keep_checkpoints + 2
    free, needed = shutil.disk_usage(_existing(Path(root_dir))).free, most * checkpoint + size.saved
    what = (
        f"{size_text(free)} free in {root_dir}; a run writes up to {size_text(needed)}: {most} checkpoints of "
        f"{size_text(checkpoint)} and final/ of {size_text(size.saved)}"
    )
    if needed > free:
        return Finding("problem", "disk", f"{what}: give root_dir=<folder on another disk> or task.keep_checkpoints=1")
    return Finding("warning" if needed > free / 2 else "ok", "disk", what)


_MAX_EXCESS = 1.1  # of the dry step over the plan
_DEVICE_GB = 80.0
_MAX_SHARE = 0.8  # of what is available: the plan is not that exact
_THRESHOLD = 1 << 20  # bytes; a smaller one costs more time


def _memory(config: TrainConfig, size: "ModelSize", available: int | None, device: str) -> Finding:
    """The plan of a step next to the available memory in bytes; processes of the device "cpu" share it."""
    from sheeprlhf.model.memory import NO_HOLES, measure
    from sheeprlhf.task.scale_plan import SHARDED, step_plan

    need = partial(step_plan, size_of=cache(measure), device=device)
    asked = parse_devices(config.fabric.devices)
    processes = asked if device == "cpu" and isinstance(asked, int) else 1
    parts = need(config)
    needed = processes * parts.total()
    text = f"a step of task={config.task.config_name} needs about {size_text(needed)} at its worst moment"
    details = _memory_table(config, size, parts)
    details += [f"and that {processes} times, once in each process"] if processes > 1 else []
    if device == "cuda" and config.fabric.offload == "cpu":
        kept = need(replace_options(config, {"fabric.offload": "none"}))
        details.append(f"and {size_text(sum(getattr(kept, name) for name in SHARDED))} of main memory for each device")
    if available is None:
        return Finding("ok", "memory", f"{text}; how much there is, is not known", tuple(details))
    text += f"; {size_text(available)} of {'GPU' if device == 'cuda' else 'main'} memory are available"
    if needed <= _MAX_SHARE * available:
        return Finding("ok", "memory", text, tuple(details))

    def total(config: TrainConfig) -> int:
        return need(config).total()

    details += _advice(config, _MAX_SHARE * available / processes, total)
    details += _more_ranks(config, _MAX_SHARE * available, total) if processes == 1 else []
    if parts.allocator:
        without = size_text(need(config, holes=False).total())
        details.append(f"{NO_HOLES}={_THRESHOLD} in the environment: {without}, slower")
    return Finding("problem" if needed > available else "warning", "memory", text, tuple(details))


def _more_ranks(config: TrainConfig, available: float, need: Callable[[TrainConfig], int]) -> Iterator[str]:
    """Memory of a process if the weights are sharded, and over how many machines they would fit."""
    sharded: TrainConfig = replace_options(config, {"fabric.strategy": "fsdp2"})
    num_nodes = config.fabric.num_nodes or 1
    if config.fabric.strategy != "fsdp2" and need(sharded) < need(config):
        yield f"with fabric.strategy=fsdp2: {size_text(need(sharded))}"
    for factor in (2**power for power in range(1, 11)):
        more: TrainConfig = replace_options(sharded, {"fabric.num_nodes": num_nodes * factor})
        if config.fabric.num_nodes and need(more) <= available < need(sharded):
            yield f"with fabric.strategy=fsdp2 fabric.num_nodes={num_nodes * factor}: {size_text(need(more))}"
            return


def _memory_table(config: TrainConfig, size: "ModelSize", parts: "MemoryPlan") -> list[str]:
    """One line a part, and their sum."""
    from sheeprlhf.task.scale_plan import SHARDED, ranks_of, rows_of_forward

    rows, row = rows_of_forward(config, size)
    recomputed = ", recomputed except for the inputs of layers" if config.model.gradient_checkpointing else ""
    kind = "pairs" if config.task.data_kind == "preference" else "rows"
    notes = {
        "weights": f"{size.parameters:,} parameters",
        "gradients": "of what trains",
        "optimizer": f"optim={config.optim.config_name}",
        "activations": f"{rows * row:,} tokens: {rows} {kind} of {row}{recomputed}",
        "logits": f"{size.vocabulary:,} numbers a target",
        "allocator": "what freed tensors leave unused in the heap",
        "libraries": "of the process, before there is a model",
        "others": "reference, critic and reward model, as far as the task has them",
        "gathered": "weights and gradients that are whole for a moment",
    }
    if (shards := ranks_of(config.fabric).shards) > 1:
        notes |= {name: f"{notes[name]}, 1/{shards:,} of them" for name in SHARDED}
    lines = [(name, size_text(value), notes[name]) for name, value in parts._asdict().items() if value]
    if config.task.has_fixed_reference() and not getattr(config.data, "streaming", False):
        lines.append(("reference", "0 MB", "no second model: its log-probabilities are kept on the disk"))
    lines.append(("sum", size_text(parts.total()), ""))
    return ["  ".join(line).rstrip() for line in table(lines, right={1})]


def _advice(config: TrainConfig, available: float, need: Callable[[TrainConfig], int]) -> list[str]:
    """Memory after each single change, and the changes that together fit into `available` bytes."""
    singles = [(words(one), size_text(need(replace_options(config, one)))) for one in memory_reductions(config)]
    lines = ["what would be needed with"]
    lines += ["  " + "  ".join(line) for line in table(singles, right={1})] if singles else []
    together: Change = {}
    while need(config) > available and (changes := memory_reductions(config)):
        config, together = replace_options(config, changes[0]), together | changes[0]
    if need(config) > available:
        return [*lines, "all of them together are not enough: take a smaller model, or a machine with more memory"]
    return [*lines, f"{size_text(need(config))} would fit: {words(together)}"]


def _step(config: DoctorConfig, size: "ModelSize") -> Finding:
    """Traffic and time of an optimizer step on several devices, computed from `cluster`."""
    from sheeprlhf.task.scale_plan import passes_of_rank, ranks_of, step_time, traffic

    cluster, task, ranks = config.cluster, config.task, ranks_of(config.fabric)
    rows, passes = passes_of_rank(config, size)
    moved, spent = traffic(config, size, passes=passes), step_time(config, size, cluster)
    groups = ranks.total // ranks.tensor
    times = sorted((spent.communication, spent.computation))
    text = (
        f"an optimizer step of {groups} x {spent.tokens:,} tokens takes {times[1]:.2g} s if computation hides "
        f"communication, {sum(times):.2g} s if it does not; a device moves {size_text(moved.total())}"
    )
    notes = {"gather": f"weights, {passes} x forward and backward", "reduce": "gradients", "all_reduce": "gradients"}
    lines = [(name, size_text(value), notes[name]) for name, value in moved._asdict().items() if value]
    speed = f"cluster.tflops={cluster.tflops:g} cluster.mfu={cluster.mfu:g}"
    lines += [
        ("communication", f"{spent.communication:.2g} s", f"assumed: cluster.bandwidth={cluster.bandwidth:g}"),
        ("computation", f"{spent.computation:.2g} s", f"assumed: {speed}"),
        ("checkpoint", size_text(_checkpoint_bytes(config, size)), f"final/: {size_text(size.saved)}"),
    ]
    details = ["  ".join(line).rstrip() for line in table(lines, right={1})]
    if rows * groups > task.mini_batch_size // getattr(task, "num_generations", 1):
        advice = f"give a multiple of {groups * getattr(task, 'num_generations', 1):,}"
        details.append(f"task.mini_batch_size={task.mini_batch_size} leaves some devices with less work: {advice}")
    if ranks.tensor > 1:
        details.append("not counted: activations that are summed over the ranks of fabric.tensor_parallel")
    if spent.communication > spent.computation:
        details.append(
            "communication takes longer than computation: raise task.mini_batch_size, or use fewer devices"
            + (f"; {passes} passes gather the weights {passes} times: raise task.token_budget" if passes > 1 else "")
        )
    return Finding("ok" if len(details) == len(lines) else "warning", "step", text, tuple(details))


def _dry_step(config: DoctorConfig, size: "ModelSize") -> Finding:
    """A step of one rank on tensors without content, compared with the plan."""
    from sheeprlhf.task.scale_plan import dry_step, ranks_of, traffic

    try:
        seen = dry_step(config)
    except ImportError as error:
        return Finding("warning", "sharding", f"the plan is not checked: torch has no fake process group ({error})")
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        return Finding("warning", "sharding", f"the plan is not checked: {str(error).splitlines()[0]}")
    ranks, planned = ranks_of(config.fabric), traffic(config, size, passes=1).total()
    share = size.parameters / ranks.shards
    text = (
        f"a step on tensors without content, over a process group of {ranks.total:,} ranks that moves nothing: a rank "
        f"holds {seen.parameters:,} parameters (1/{ranks.shards:,} are {share:,.0f}) and {seen.state:,} numbers of the "
        f"optimizer, and moves {size_text(seen.traffic.total())} "
        f"(planned: {size_text(planned)}) in {sum(seen.collectives.values())} collectives; {seen.seconds:.0f} s"
    )
    problems = [f"{name} is not sharded" for name in seen.unsharded[:4]]
    if seen.parameters > _MAX_EXCESS * share:
        problems.append("a rank holds more than its share: there are more ranks than rows of the weights")
    if not planned / _MAX_EXCESS <= seen.traffic.total() <= planned * _MAX_EXCESS:
        problems.append("the traffic is not that of the plan")
    return Finding("warning" if problems else "ok", "sharding", text, tuple(problems))


_STYLES = {"ok": "good", "warning": "odd", "problem": "bad"}
_WIDTH = 20  # of level and topic


def run(config: DoctorConfig, args: ParsedArgs) -> int:
    """Print what was found, the memory of a step, and the next command; return 0 if a run would work, else 1."""
    screen = Screen()
    num_problems = 0
    with ThreadPoolExecutor(1) as pool:  # the hub may take seconds not to answer, and so may the imports
        for finding in _findings(config, pool.submit(why_offline)):
            num_problems += finding.level == "problem"
            text = paragraph(redact_text(plain_text(finding.text)), indent=_WIDTH)[_WIDTH:]
            head = (f"{finding.level:<8} ", _STYLES[finding.level]), (f"{finding.topic:<10} ", "name")
            screen.print(Text.assemble(*head, text))
            for line in finding.details:
                screen.print(paragraph(line, indent=_WIDTH))
    screen.print()
    if num_problems:
        count = "one problem" if num_problems == 1 else f"{num_problems} problems"
        screen.print(f"{count} would stop this run; fix and run again\nnext: {_command('doctor', config, args)}")
        return 1
    result = "this run would fit" if config.plans_other_machines() else "this run would work"
    screen.print(f"{result}\nnext: {_command('train', config, args)}")
    return 0


def _command(verb: str, config: DoctorConfig, args: ParsedArgs) -> str:
    """A command with the same configuration, without the options of only `doctor` for another one."""
    named = any(word.startswith(("task=", "experiment=")) for word in args.words)
    task = [] if named else [f"task={config.task.config_name}"]
    own = () if verb == "doctor" else ("cluster.", "dry_step=")
    overrides = [word for word in args.words if not word.lstrip("+").startswith(own)]
    return plain_text(command([verb, *task, *redact_command(overrides), *args.config_dir()]))


def _findings(config: DoctorConfig, offline: Future[str]) -> Iterator[Finding]:
    available = available_memory()
    of_versions = list(versions())
    yield from of_versions
    if any("is not installed:" in finding.text for finding in of_versions):
        return
    import torch
    from transformers.utils import logging as transformers_logging

    from sheeprlhf.model.memory import measure

    transformers_logging.disable_progress_bar()
    if config.plans_other_machines():
        yield from _plan(config, offline.result())
        return
    on_cuda = config.fabric.accelerator != "cpu" and torch.cuda.is_available()
    yield from devices(config.fabric)
    yield precision(config.fabric, on_cuda=on_cuda)
    all_here = model_folder(str(config.model.repo_name)) is not None and data_is_here(config.data)
    yield hub(offline.result(), needed=not all_here)
    yield from caches(config.data.cache_dir)
    yield from _checked("data", _data(config.data, offline.result()))
    of_weights = list(_checked("weights", _weights(config)))
    yield from of_weights
    reported = {finding.text for finding in of_weights}
    try:
        size = measure(config.model, config.fabric.precision, config.task.trains == "reward model")
    except SheepError as error:
        of_model = list(_model(config, None, available))
        yield from (finding for finding in of_model if finding.text not in reported)
        why = "the model is not to be had" if of_model[-1].level == "problem" else str(error).splitlines()[0]
        yield Finding("warning", "memory", f"not planned: {why}")
        return
    for finding in (*_model(config, size, available), *_reward_model(config, size), *_options(config)):
        if finding.text not in reported:
            reported.add(finding.text)
            yield finding
    yield _disk(config, size)
    if on_cuda:
        available = torch.cuda.mem_get_info()[0]
    yield _memory(config, size, available, "cuda" if on_cuda else "cpu")
    if config.fabric.strategy == "fsdp2" and config.dry_step:
        yield _dry_step(config, size)


def _plan(config: DoctorConfig, offline: str) -> Iterator[Finding]:
    """The plan for other machines; of this one only the model's config.json is read."""
    from sheeprlhf.engine.shard import division_problem, tensor_plan
    from sheeprlhf.model.memory import build_on_meta, measure
    from sheeprlhf.task.scale_plan import ranks_of

    fabric, model, ranks = config.fabric, config.model, ranks_of(config.fabric)
    text = f"{counted(fabric.num_nodes or 1, 'machine')}, {counted(ranks.total, 'process')}, strategy {fabric.strategy}"
    yield Finding("ok", "device", f"{text}; this machine is not checked, nor are the weights and the data")
    if problem := division_problem(fabric, ranks.total):
        yield Finding("problem", "device", problem)
        return
    yield hub(offline, needed=model_folder(str(model.repo_name)) is None)
    try:
        size = measure(model, fabric.precision, scores := config.task.trains == "reward model")
        if ranks.tensor > 1:
            tensor_plan(build_on_meta(model, scores=scores)[1], ranks.tensor)
    except SheepError as error:
        yield Finding("problem", "model", str(error))
        return
    yield Finding("ok", "model", _model_text(config, size))
    yield _memory(config, size, round(1e9 * (config.cluster.memory or _DEVICE_GB)), "cuda")
    if ranks.total > 1:
        yield _step(config, size)
    if fabric.strategy == "fsdp2" and config.dry_step:
        yield _dry_step(config, size)


def _checked(topic: str, findings: Iterator[Finding]) -> Iterator[Finding]:
    """The findings of a check, and a problem if it raises SheepError."""
    try:
        yield from findings
    except SheepError as error:
        yield Finding("problem", topic, str(error))


def _data(data: DataConfig, offline: str) -> Iterator[Finding]:
    """Check that the rows are available; a dataset of the hub is not downloaded for it."""
    from sheeprlhf.data import source

    if not offline and not data_is_here(data):
        names = ", ".join(str(of.dataset_name) for of in datasets_of(data) if not data_is_here(of))
        yield Finding("ok", "data", f"{names} is on the hub; the first run downloads it")
        return
    files = {split: None for of in datasets_of(data) for split in source.locate(of)}
    shards = ""
    if isinstance(data, LayoutDataConfig) and data.streaming:
        shards = f", {len(source.shards_of(data, source.locate(data)))} shards, prepared one by one during training"
    yield Finding("ok", "data", f"data={data.config_name}: {', '.join(files)}{shards}")


def _weights(config: DoctorConfig) -> Iterator[Finding]:
    """Check by their headers that the local files have every parameter; nothing is downloaded or loaded."""
    from sheeprlhf.config.model_lookup import folder_option
    from sheeprlhf.model.locate import locate
    from sheeprlhf.task.weight_checks import check_needed, models_of

    for needed in models_of(config):
        try:
            here = locate(needed.model).local_only
        except SheepError:
            if needed.reward_term is not None:
                raise
            continue  # the topic "model" tells
        notes: list[str] = []
        note = check_needed(needed, notes.append) if here else None  # else it is on the hub
        given = "model.repo_name" if needed.reward_term is None else folder_option(needed.reward_term).rstrip("=: ")
        notes += [f"{given}={needed.model.repo_name}: {note}"] if note else []
        yield from (Finding("warning", "weights", note) for note in notes)


def _options(config: DoctorConfig) -> Iterator[Finding]:
    """Check that the model's architecture and tokenizer allow the options of the task, as a run does first."""
    from sheeprlhf.model.locate import locate
    from sheeprlhf.reward.judge import check_server
    from sheeprlhf.task.weight_checks import check_options

    def options() -> None:
        if locate(config.model).local_only:
            check_options(config)

    checks: list[tuple[str, Callable[[], object], str]] = [("options", options, "")]  # topic, check, result
    if uses_judge(reward := config.reward):
        checks.append(("judge", partial(check_server, reward), f"{reward.url} answers"))
    if isinstance(rollout := config.rollout, LocalRolloutConfig) and rollout.environment is not None:
        from sheeprlhf.model.folder.load import load_tokenizer
        from sheeprlhf.rollout.episodes import EpisodeSampler

        def tools() -> None:
            if locate(config.model).local_only:
                EpisodeSampler(load_tokenizer(config.model), rollout, lambda _: None)

        checks.append(("tools", tools, f"rollout.environment={rollout.environment}"))
    if isinstance(config.rollout, VLLMRolloutConfig):
        from sheeprlhf.rollout.vllm_api import check_servers

        answer = f"{', '.join(config.rollout.urls)}: servers of vLLM answer"
        checks.append(("rollout", partial(check_servers, config), answer))
    for topic, check, result in checks:
        try:
            check()
            yield from [Finding("ok", topic, result)] if result else []
        except SheepError as error:
            yield Finding("problem", topic, str(error))


def _model_text(config: DoctorConfig, size: "ModelSize | None") -> str:
    name = f"model={config.model.config_name} ({config.model.repo_name})"
    if size is None:
        return name
    return f"{name}: {size.parameters / 1e6:,.1f}M parameters, {size.trainable / size.weights:.1%} of them train"


def _model(config: DoctorConfig, size: "ModelSize | None", available: int | None) -> Iterator[Finding]:
    """Check that the model can be loaded, and whether its batches can be packed."""
    from sheeprlhf.agent.policy import load_policy
    from sheeprlhf.model.folder.load import load_tokenizer
    from sheeprlhf.model.locate import locate

    model, task, longest = config.model, config.task, config.data.max_length
    name = _model_text(config, size)
    if size is not None:
        if size.positions is not None and longest > size.positions:
            yield Finding(
                "warning",
                "model",
                f"data.max_length={longest} is more than its {size.positions} positions, and a row that long stops "
                f"the run: give data.max_length={size.positions}",
            )
            longest = size.positions
        if available is not None and size.weights > available:
            yield Finding("problem", "model", f"{name}: its weights of {size_text(size.weights)} exceed the memory")
            return
    local_only = True
    try:
        local_only = locate(model).local_only
        here = dataclasses.replace(model.library_cfg, local_files_only=True)
        model = dataclasses.replace(model, library_cfg=here)  # nothing is downloaded
        new_head, tokenizer = task.trains == "reward model", load_tokenizer(model)
        policy = load_policy(model, tokenizer, longest=longest, batching="padded", new_head=new_head)
    except SheepError as error:
        if isinstance(error, ModelError) and not local_only:
            yield Finding("ok", "model", f"{name}; it is on the hub: the first run, or `fetch`, downloads it")
        else:
            yield Finding("problem", "model", str(error))
        return
    yield Finding("ok", "model", f"{name}; it is here and loads")
    yield _attention(policy, task.batching, longest)


def _attention(policy: "Policy", batching: str, longest: int) -> Finding:
    """Report whether batches of rows of up to `longest` tokens are packed."""
    from sheeprlhf.agent.batches import packing_difference, packing_problem, packing_tolerance

    problem = packing_problem(policy, policy.causal_lm(), longest)
    if problem and batching == "packed":
        return Finding("problem", "attention", f"task.batching=packed: {problem}; set task.batching=padded")
    if problem or batching == "padded":
        return Finding("ok", "attention", f"{problem or 'task.batching=padded'}: batches are padded")
    found, most = packing_difference(policy), packing_tolerance(policy)
    what = f"packed and padded log-probabilities differ by {found:.1e} nats, at most {most:g}"
    return Finding("ok", "attention", f"{what}: batches are packed")


def _reward_model(config: DoctorConfig, size: "ModelSize") -> Iterator[Finding]:
    """Check whether the batches of the reward model of an RL task can be packed, by the rule for policies."""
    from sheeprlhf.config.model_lookup import reward_model_source
    from sheeprlhf.model.locate import locate
    from sheeprlhf.structure.reward import model_sources
    from sheeprlhf.structure.rollout import OnlineTaskConfig
    from sheeprlhf.task.models import load_reward_tokenizer, load_separate_reward_model

    if not isinstance(config.task, OnlineTaskConfig):
        return
    longest = min(config.data.max_length, size.positions or config.data.max_length)
    for term in model_sources(config.reward, config.data.rule_reward):
        lines: list[str] = []
        try:
            model = reward_model_source(config, term)[2]
            if not locate(model).local_only:
                continue  # on the hub
            tokenizer = load_reward_tokenizer(config, term)
            reward = load_separate_reward_model(config, tokenizer, term, longest=longest, say=lines.append)
        except SheepError as error:
            yield Finding("problem", "reward", str(error))
            continue
        padded = [line for line in lines if line.startswith("batches are padded")]
        text = (
            "its batches are packed"
            if reward.packed
            else (padded or ["its batches are padded: task.batching=padded"])[0]
        )
        yield Finding("ok", "reward", f"{lines[0]} loads; {text}")


def _checkpoint_bytes(config: DoctorConfig, size: "ModelSize") -> int:
    from sheeprlhf.model.memory import optimizer_bytes

    return size.trainable + optimizer_bytes(config.optim, size)
