"""One job: choose its directory, start its processes, seed them, call its task. Imports torch only when it must."""

import os
import random
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from typing import NamedTuple

from sheeprlhf.apps.arguments import ParsedArgs
from sheeprlhf.config.command_words import option_word
from sheeprlhf.config.compose import Job
from sheeprlhf.config.processes import with_launched_processes
from sheeprlhf.config.registry import config_hash, datasets_of
from sheeprlhf.config.run_lookup import is_run_alias
from sheeprlhf.config.validate import parse_devices
from sheeprlhf.engine.rundir import (
    CONFIG_FILE,
    RunLock,
    check_existing_run,
    choose_run_dir,
    discard_unused,
    is_finished,
)
from sheeprlhf.model.locate import locate, locate_adapter
from sheeprlhf.security.redaction import plain_text, redact_text
from sheeprlhf.security.version_guard import check_versions
from sheeprlhf.structure.model import ModelConfig
from sheeprlhf.structure.reward import JudgeOptionsConfig, uses_judge
from sheeprlhf.structure.rollout import VLLMRolloutConfig
from sheeprlhf.structure.run import CommandConfig, EvalConfig, InspectConfig, PipelineConfig, TrainConfig
from sheeprlhf.utils.errors import ConfigError, MissingRanksError, OutOfMemory, SheepError, UnsafePathError
from sheeprlhf.utils.home import silence_libraries
from sheeprlhf.utils.launchers import (
    OUTPUT_FILE,
    OWN_LAUNCHER,
    check_alone,
    is_rank_zero,
    launched,
    local_rank,
    stale_note,
)
from sheeprlhf.utils.memory import phase, set_malloc
from sheeprlhf.utils.output import disk_full, write_file
from sheeprlhf.utils.processes import die_with_parent


def resolve_run_aliases(job: Job, overrides: list[str]) -> list[str]:
    """Replace `newest` and `auto` in the overrides by the runs that were found, so that every process has the same."""
    if not isinstance(job.config, TrainConfig | EvalConfig):
        return overrides
    for key, asked in job.runs.items():
        said = next((word.partition("=")[2] for word in overrides if word.startswith(f"{key}=")), asked)
        found = getattr(job.config.task if key.startswith("task.") else job.config, key.removeprefix("task."), None)
        if not isinstance(said, str) or not is_run_alias(said) or found == said:  # equal: another meaning of the word
            continue
        if is_rank_zero() and found is not None:
            print(f"{key}={said}: {found}")
        overrides = [word for word in overrides if not word.startswith(f"{key}=")] + [option_word(key, found)]
    return overrides


class Finished(NamedTuple):
    """A job that has ended."""

    code: int  # its exit code
    output: Path | None = None  # run directory or result file; None on other ranks and of other commands


def launch(verb: str, args: ParsedArgs, job: Job, *, in_sweep: bool = False) -> Finished:
    """Run a job to its end here and in processes by Fabric; a job of a sweep on several devices in a new process."""
    config = job.config
    args = args._replace(words=resolve_run_aliases(job, args.words))
    words = [verb, *args.flags(), *args.words]
    check_versions()
    if local_rank() > 0:  # before torch is imported, which takes seconds
        launcher = os.environ.get(OWN_LAUNCHER)
        die_with_parent(None if launcher is None else int(launcher))
    if isinstance(config, PipelineConfig):
        check_alone("pipeline")
    given = not isinstance(config, TrainConfig | EvalConfig) or config.fabric.devices is not None
    config = with_launched_processes(config, alone=in_sweep)
    note = stale_note(given)
    if note is not None and is_rank_zero():
        print(note, file=sys.stderr)
    found = launched()
    if found is not None and not found.sure and isinstance(config, TrainConfig | EvalConfig):
        print(f"{found.setting}: waiting for the other tasks, which srun before the command starts", file=sys.stderr)
    if isinstance(config, CommandConfig):
        silence_libraries()
        if isinstance(config, InspectConfig):
            check_inputs_exist(config)
        return Finished(resolve_name(config.entry_point)(config, args))
    if in_sweep and _needs_processes(config):
        from sheeprlhf.utils.processes import children

        with tempfile.TemporaryDirectory() as folder, children() as started:
            output = Path(folder, "output")
            if isinstance(config, TrainConfig):
                words.append(option_word("run_name", config.run_name))
            if job.given_dir is not None:
                words.append(option_word("hydra.run.dir", os.path.abspath(job.given_dir)))
            code = started.run(words, output)
            found_output = Path(output.read_text()) if output.exists() else None
        return Finished(code if started.stopped_by is None else 128 + started.stopped_by, found_output)
    arguments, sys.argv = sys.argv, [sys.argv[0], *words]  # what Fabric starts the other ranks with
    try:
        finished = Finished(0, _launch_here(config, job.given_dir))
    finally:
        sys.argv = arguments
    if finished.output is not None and (name := os.environ.get(OUTPUT_FILE)):
        write_file(Path(name).parent, Path(name).name, str(finished.output).encode())
    return finished


def _launch_here(config: TrainConfig | EvalConfig, given_dir: str | None) -> Path | None:
    """Run a training or an evaluation in this process; returns its output as in `Finished`."""
    if is_rank_zero() and isinstance(config, TrainConfig):
        _warn_about_restarts(resumes=config.resume or config.resume_from is not None)
    run_dir = None
    if is_rank_zero():
        check_inputs_exist(config)
        if isinstance(config, TrainConfig):
            check_existing_run(config, config_hash(config), given_dir)
        _check_weights(config)
    if isinstance(config, TrainConfig) and is_rank_zero():
        chosen = choose_run_dir(config, config_hash(config), given=given_dir)
        print(chosen.note)
        run_dir = chosen.dir.absolute()
        launcher = launched() is not None or "LOCAL_RANK" in os.environ or (config.fabric.num_nodes or 1) > 1
        is_awaited = launcher and _needs_processes(config)  # by processes that this one did not start
        if is_finished(run_dir) and not is_awaited:
            return run_dir
    try:
        with phase("the rest of the run"):
            result = _run_task(config, run_dir)
    except OutOfMemory as error:
        from sheeprlhf.config.memory_advice import advice

        place = None if run_dir is None else str(run_dir)
        raise OutOfMemory(error.phase, error.facts, *advice(config, error.phase, place)) from error
    except Exception as error:
        full = disk_full(error, run_dir) if run_dir is not None and isinstance(error, OSError) else None
        if full is not None:
            raise full from error
        if isinstance(error, ConfigError | MissingRanksError) and _take_back(config, run_dir):
            error.add_note("nothing was begun: the run directory is taken back")
        if run_dir is not None and not isinstance(error, SheepError):
            with suppress(OSError, UnsafePathError):  # the disk may be the error
                path = write_file(run_dir, "error.log", redact_text(traceback.format_exc()).encode(errors="replace"))
                error.add_note(f"its traceback is in {path}")
        raise
    return run_dir or result


def check_inputs_exist(config: TrainConfig | EvalConfig | InspectConfig) -> None:
    """Rank zero, before torch is imported: find model, adapter, data, servers. Raises SheepError with all problems."""
    silence_libraries()
    errors: list[SheepError] = []
    for check in _input_checks(config):
        try:
            check()
        except SheepError as error:
            errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise ConfigError(*(line for error in errors for line in str(error).splitlines()))


def _input_checks(config: TrainConfig | EvalConfig | InspectConfig) -> Iterator[Callable[[], object]]:
    """Checks, in their order, that each raise an error for one thing that the job reads and that is not to be had."""
    loads_weights, reads_model = not isinstance(config, InspectConfig), True
    if isinstance(config, EvalConfig):
        from sheeprlhf.config.model_lookup import needs_base_model

        loads_weights, reads_model = config.experiment_dir is None, needs_base_model(config)
    if config.model is not None and reads_model:
        yield partial(_find_model, config.model)
        if config.model.adapter is not None and loads_weights:
            yield partial(locate_adapter, config.model.adapter)
    if config.data is not None:
        from sheeprlhf.data import source

        yield from (partial(source.locate, data) for data in datasets_of(config.data))
    if isinstance(config, TrainConfig | EvalConfig) and uses_judge(config.reward):
        yield partial(_find_judge, config.reward)
    if isinstance(config, TrainConfig) and isinstance(config.rollout, VLLMRolloutConfig):
        from sheeprlhf.rollout.vllm_api import check_servers

        yield partial(check_servers, config)


def _find_model(model: ModelConfig) -> None:
    """Locate a model, and print what has to be known of its place and of its code."""
    found = locate(model)
    if found.note:
        print(plain_text(redact_text(found.note)), file=sys.stderr)
    if found.no_hub:
        os.environ["HF_HUB_OFFLINE"] = "1"  # so that no process determines it again
    if model.library_cfg.trust_remote_code:
        name = plain_text(str(model.repo_name))
        print(f"Python code of {name} at {model.library_cfg.revision} will run on this machine.")


def _find_judge(reward: JudgeOptionsConfig) -> None:
    from sheeprlhf.reward.judge import check_server, receiver_notice

    check_server(reward)
    print(plain_text(redact_text(receiver_notice(reward))), file=sys.stderr)


def _check_weights(config: TrainConfig | EvalConfig) -> None:
    """Rank zero only: account for the weights of every model, before a directory is made and data is prepared."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    resolve_name(config.weights_check)(config, lambda text: print(plain_text(redact_text(text)), file=sys.stderr))


def _warn_about_restarts(*, resumes: bool) -> None:
    """Rank zero only: say what torchrun's restarts of killed ranks need."""
    if os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") == "0":
        return
    if os.environ.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE") != "1":
        advice = "set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its own environment"
        print(f"torchrun restarts killed ranks, which can fail or hang: {advice}", file=sys.stderr)
    if not resumes:
        print("torchrun restarts killed ranks, and they would not continue: give resume=true too", file=sys.stderr)


def _needs_processes(config: TrainConfig | EvalConfig) -> bool:
    devices = parse_devices(config.fabric.devices)
    single = devices == 1 or (isinstance(devices, list) and len(devices) == 1)
    return (config.fabric.num_nodes or 1) > 1 or not single


def _take_back(config: TrainConfig | EvalConfig, run_dir: Path | None) -> bool:
    """Remove the directory of a run whose ranks never came together; False if there is none, or there was a run."""
    if run_dir is None or not isinstance(config, TrainConfig):
        return False
    with suppress(OSError, SheepError), RunLock(run_dir):
        return not (run_dir / CONFIG_FILE).exists() and discard_unused(run_dir, Path(config.root_dir))
    return False


def _run_task(config: TrainConfig | EvalConfig, run_dir: Path | None) -> Path | None:
    """All ranks: one process becomes all of them here. Returns the result file of an evaluation, on rank zero."""
    silence_libraries()
    set_malloc(sharded=config.fabric.strategy == "fsdp2")
    import torch
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.hydra_config import HydraConfig
    from transformers.utils import logging as transformers_logging

    from sheeprlhf.engine.fabric import make_fabric
    from sheeprlhf.engine.ranks import missing_ranks_named
    from sheeprlhf.engine.run import check_shared

    transformers_logging.disable_progress_bar()

    GlobalHydra.instance().clear()  # Fabric would take its command for the other ranks from Hydra, without the verb
    HydraConfig.instance().cfg = None
    if launched() is None and "LOCAL_RANK" not in os.environ and _needs_processes(config):
        os.environ[OWN_LAUNCHER] = str(os.getpid())
    fabric, result = make_fabric(config.fabric), None
    with missing_ranks_named(fabric):
        fabric.launch()
        folder = fabric.broadcast(None if run_dir is None else str(run_dir))
        if isinstance(config, TrainConfig) and (folder is None or fabric.is_global_zero != (run_dir is not None)):
            raise ConfigError(
                f"rank {fabric.global_rank} of {fabric.world_size} has no run directory: the environment's variables "
                "of ranks contradict each other; start the processes by torchrun, srun or mpirun"
            )
        if not fabric.broadcast(run_dir is not None and is_finished(run_dir)):
            if isinstance(config, TrainConfig):
                check_shared(fabric, Path(str(folder)), fabric.print)
            _seed(config, on_cuda=fabric.device.type == "cuda")
            task = resolve_name(config.task.entry_point)
            if isinstance(config, TrainConfig):
                task(fabric, config, Path(str(folder)))
            else:
                result = task(fabric, config)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return result


def _seed(config: TrainConfig | EvalConfig, *, on_cuda: bool) -> None:
    """All ranks alike: what has to differ between ranks is drawn from generators that know their rank."""
    import numpy as np
    import torch

    random.seed(config.seed)
    np.random.seed(config.seed % 2**32)
    torch.manual_seed(config.seed)
    if on_cuda:
        torch.set_float32_matmul_precision("high")
    if isinstance(config, TrainConfig) and config.torch_deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
