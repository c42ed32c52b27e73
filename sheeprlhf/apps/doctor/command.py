"""`doctor`: would this training run work on this machine, and how much memory would it take?

Exit code 0 if nothing stands in its way, 1 if something does. A configuration that cannot work anywhere is refused
before, with exit code 2, like that of every command.
"""

import dataclasses
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from rich.text import Text

from sheeprlhf.apps.arguments import ParsedArgs
from sheeprlhf.apps.doctor.machine_checks import Finding, caches, devices, disk, hub, precision, versions
from sheeprlhf.apps.terminal import Screen, paragraph
from sheeprlhf.config.path_checks import data_is_here, model_folder
from sheeprlhf.config.shell import command
from sheeprlhf.security.redaction import plain_text, redact_command, redact_text
from sheeprlhf.structure.data import DataConfig
from sheeprlhf.structure.reward import uses_judge
from sheeprlhf.structure.run import DoctorConfig
from sheeprlhf.utils.errors import ModelError, SheepError
from sheeprlhf.utils.hardware import available_memory
from sheeprlhf.utils.hub import why_offline
from sheeprlhf.utils.memory import size_text

if TYPE_CHECKING:
    from sheeprlhf.model.memory import ModelSize

_STYLES = {"ok": "good", "warning": "odd", "problem": "bad"}
_WIDTH = 20  # of level and topic


def run(config: DoctorConfig, args: ParsedArgs) -> int:
    """Print what was found, the memory that a step needs, and the next command.

    Returns:
        0 if a run would work, 1 if something would stop it.
    """
    screen = Screen()
    num_problems = 0
    with ThreadPoolExecutor(1) as pool:  # the hub may take seconds not to answer, and so may the imports
        for finding in _findings(config, pool.submit(why_offline)):
            num_problems += finding.level == "problem"
            text = paragraph(redact_text(plain_text(finding.text)), indent=_WIDTH)[_WIDTH:]
            screen.print(
                Text.assemble((f"{finding.level:<8} ", _STYLES[finding.level]), (f"{finding.topic:<10} ", "name"), text)
            )
            for line in finding.details:
                screen.print(paragraph(line, indent=_WIDTH))
    screen.print()
    if num_problems:
        count = "one problem" if num_problems == 1 else f"{num_problems} problems"
        screen.print(f"{count} would stop this run; fix and run again\nnext: {_command('doctor', config, args)}")
        return 1
    screen.print(f"this run would work\nnext: {_command('train', config, args)}")
    return 0


def _command(verb: str, config: DoctorConfig, args: ParsedArgs) -> str:
    """The same configuration for another command."""
    named = any(word.startswith(("task=", "experiment=")) for word in args.overrides)
    task = [] if named else [f"task={config.task.config_name}"]
    return plain_text(command([verb, *task, *redact_command(args.overrides), *args.config_dir()]))


def _findings(config: DoctorConfig, offline: Future[str]) -> Iterator[Finding]:
    room = available_memory()
    of_versions = list(versions())
    yield from of_versions
    if any("is not installed:" in finding.text for finding in of_versions):
        return
    import torch
    from transformers.utils import logging as transformers_logging

    from sheeprlhf.apps.doctor.memory_plan import memory_finding
    from sheeprlhf.model.memory import measure

    transformers_logging.disable_progress_bar()
    on_cuda = config.fabric.accelerator != "cpu" and torch.cuda.is_available()
    yield from devices(config.fabric)
    yield precision(config.fabric, on_cuda=on_cuda)
    all_here = model_folder(str(config.model.repo_name)) is not None and data_is_here(config.data)
    yield hub(offline.result(), needed=not all_here)
    yield from caches(config.data.cache_dir)
    yield _data(config.data, offline.result())
    of_weights = list(_weights(config))
    yield from of_weights
    reported = {finding.text for finding in of_weights}
    try:
        size = measure(config.model, config.fabric.precision, config.task.trains == "reward model")
    except SheepError as error:
        of_model = list(_model(config, None, room))
        yield from (finding for finding in of_model if finding.text not in reported)
        why = "the model is not to be had" if of_model[-1].level == "problem" else str(error).splitlines()[0]
        yield Finding("warning", "memory", f"not planned: {why}")
        return
    for finding in (*_model(config, size, room), *_reward_model(config, size), *_options(config)):
        if finding.text not in reported:
            reported.add(finding.text)
            yield finding
    yield _disk(config, size)
    if on_cuda:
        room = torch.cuda.mem_get_info()[0]
    yield memory_finding(config, size, room, "cuda" if on_cuda else "cpu")


def _data(data: DataConfig, offline: str) -> Finding:
    """Check that the rows are available; a dataset of the hub is not downloaded for it."""
    from sheeprlhf.data import source

    if not offline and not data_is_here(data):
        return Finding("ok", "data", f"{data.dataset_name} is on the hub; the first run downloads it")
    try:
        files = source.locate(data)
    except SheepError as error:
        return Finding("problem", "data", str(error))
    return Finding("ok", "data", f"data={data.config_name}: {', '.join(files)}")


def _weights(config: DoctorConfig) -> Iterator[Finding]:
    """Check by their headers that the local files have every parameter; nothing is downloaded or loaded."""
    from sheeprlhf.model.locate import locate
    from sheeprlhf.task.weight_checks import check_needed, models_of

    notes: list[str] = []
    try:
        for needed in models_of(config):
            try:
                here = locate(needed.model).local_only
            except SheepError:
                if needed.is_reward_folder:
                    raise
                continue  # the topic "model" tells
            if not here:
                continue  # on the hub
            note = check_needed(needed, notes.append)
            given = "reward.folder" if needed.is_reward_folder else "model.repo_name"
            notes += [f"{given}={needed.model.repo_name}: {note}"] if note else []
    except SheepError as error:
        yield Finding("problem", "weights", str(error))
    for note in notes:
        yield Finding("warning", "weights", note)


def _options(config: DoctorConfig) -> Iterator[Finding]:
    """Check that the model's architecture and tokenizer allow the options of the task, as a run does first."""
    from sheeprlhf.model.locate import locate
    from sheeprlhf.reward.judge import check_server
    from sheeprlhf.task.weight_checks import check_options

    try:
        if locate(config.model).local_only:
            check_options(config)
    except SheepError as error:
        yield Finding("problem", "options", str(error))
    if uses_judge(config.reward):
        try:
            check_server(config.reward)
            yield Finding("ok", "judge", f"{config.reward.url} answers")
        except SheepError as error:
            yield Finding("problem", "judge", str(error))


def _model(config: DoctorConfig, size: "ModelSize | None", room: int | None) -> Iterator[Finding]:
    """Check that the model can be loaded, and whether its batches can be packed."""
    from sheeprlhf.agent.batches import packing_difference, packing_problem, packing_tolerance
    from sheeprlhf.agent.policy import load_policy
    from sheeprlhf.model.load import load_tokenizer
    from sheeprlhf.model.locate import locate

    model, task, longest = config.model, config.task, config.data.max_length
    name = f"model={model.config_name} ({model.repo_name})"
    if size is not None:
        name += f": {size.parameters / 1e6:,.1f}M parameters, {size.trainable / size.weights:.1%} of them train"
        if size.positions is not None and longest > size.positions:
            yield Finding(
                "warning",
                "model",
                f"data.max_length={longest} is more than its {size.positions} positions, and a row that long stops "
                f"the run: give data.max_length={size.positions}",
            )
            longest = size.positions
        if room is not None and size.weights > room:
            yield Finding("problem", "model", f"{name}: its weights of {size_text(size.weights)} exceed the memory")
            return
    local_only = True
    try:
        local_only = locate(model).local_only
        here = dataclasses.replace(model.library_cfg, local_files_only=True)
        model = dataclasses.replace(model, library_cfg=here)  # nothing is downloaded
        new_head, tokenizer = task.trains == "reward model", load_tokenizer(model)
        policy, _ = load_policy(model, tokenizer, longest=longest, batching="padded", new_head=new_head)
    except SheepError as error:
        if isinstance(error, ModelError) and not local_only:
            yield Finding("ok", "model", f"{name}; it is on the hub: the first run, or `fetch`, downloads it")
        else:
            yield Finding("problem", "model", str(error))
        return
    yield Finding("ok", "model", f"{name}; it is here and loads")
    problem = packing_problem(policy, policy.causal_lm(), longest)
    if problem and task.batching == "packed":
        yield Finding("problem", "attention", f"task.batching=packed: {problem}; set task.batching=padded")
    elif problem or task.batching == "padded":
        yield Finding("ok", "attention", f"{problem or 'task.batching=padded'}: batches are padded")
    else:
        found, most = packing_difference(policy), packing_tolerance(policy)
        what = f"packed and padded log-probabilities differ by {found:.1e} nats, at most {most:g}"
        yield Finding("ok", "attention", f"{what}: batches are packed")


def _reward_model(config: DoctorConfig, size: "ModelSize") -> Iterator[Finding]:
    """Check whether the batches of the reward model of an RL task can be packed, by the rule for policies."""
    from sheeprlhf.model.locate import locate
    from sheeprlhf.structure.reward import needs_model
    from sheeprlhf.structure.rollout import OnlineTaskConfig
    from sheeprlhf.task.models import load_reward_tokenizer, load_separate_reward_model, reward_model_source

    if not isinstance(config.task, OnlineTaskConfig) or not needs_model(config.reward, config.data.rule_reward):
        return
    lines: list[str] = []
    longest = min(config.data.max_length, size.positions or config.data.max_length)
    try:
        model = reward_model_source(config)[2]
        if not locate(model).local_only:
            return  # on the hub
        _, packed = load_separate_reward_model(config, load_reward_tokenizer(config), longest=longest, say=lines.append)
    except SheepError as error:
        yield Finding("problem", "reward", str(error))
        return
    padded = [line for line in lines if line.startswith("batches are padded")]
    text = "its batches are packed" if packed else (padded or ["its batches are padded: task.batching=padded"])[0]
    yield Finding("ok", "reward", f"{lines[0]} loads; {text}")


def _disk(config: DoctorConfig, size: "ModelSize") -> Finding:
    from sheeprlhf.model.memory import optimizer_bytes

    checkpoint = size.trainable + optimizer_bytes(config.optim, size)
    return disk(config.root_dir, checkpoint=checkpoint, kept=config.task.keep_checkpoints, final=size.saved)
