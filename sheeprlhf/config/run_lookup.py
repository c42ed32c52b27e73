"""Find earlier runs, read their saved configuration, and check whether a task can start from them. Imports no torch."""

import os
import shlex
import sys
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import yaml

from sheeprlhf.config.command_words import changed_words, command, option_word
from sheeprlhf.config.option_checks import near_path
from sheeprlhf.config.path_checks import is_template_file, weights_problems
from sheeprlhf.config.registry import choices, config_hash, from_dict, rename_keys, replace_options
from sheeprlhf.security.json_records import LATEST, RUN, load_json
from sheeprlhf.structure.data import DataConfig
from sheeprlhf.structure.model import ModelConfig
from sheeprlhf.structure.option import Config
from sheeprlhf.structure.reward import needs_model
from sheeprlhf.structure.run import EvalConfig, InspectConfig, RootConfig, TrainConfig
from sheeprlhf.structure.task import TrainTaskConfig
from sheeprlhf.utils.errors import ConfigError, RecordError
from sheeprlhf.utils.home import expand_home, known_home
from sheeprlhf.utils.launchers import is_rank_zero

RUN_FILE = "run.json"
REPORT_FILE = "data_report.json"
NEWEST = "newest"  # instead of a directory: the newest finished run of the same model
AUTO = "auto"  # the same if there is one
START = "task.sft_experiment_dir"
REWARD_MODEL = "task.rm_experiment_dir"
TASKS = {START: "sft", REWARD_MODEL: "rm"}  # which task's runs they are
RUN_OPTIONS = (*TASKS, "experiment_dir", "resume_from", "task.against")  # all that name a run, or ask for the newest
_NAMES = {START: "task.sft_model_name", REWARD_MODEL: "task.rm_model_name"}
_OTHER_REWARD = "reward=function reward.path=<name> for a reward without a model"
_TICK = 1e-3  # seconds between the order of two runs
Needy = TrainConfig | EvalConfig  # what may need earlier runs
Startable = TypeVar("Startable", bound=TrainConfig | EvalConfig | InspectConfig)


class FoundRun(NamedTuple):
    """A run directory and the content of its run.json."""

    dir: Path
    info: dict[str, Any]


@lru_cache
def _print_once(text: str, stream: str) -> None:
    """Print a line on rank zero."""
    if is_rank_zero():
        print(text, file=getattr(sys, stream))


def _warn(text: str) -> None:
    _print_once(f"warning: {text}", "stderr")


def root_of(run_dir: Path) -> Path | None:
    """The `root_dir` in which `train` made a run directory; None if the directory was given by the user."""
    info = read_run(run_dir)
    groups = tuple(info.get(name) for name in ("data", "model", "task"))
    return run_dir.parents[4] if run_dir.parts[-5:-2] == groups else None


def find_runs(root_dir: str | Path) -> list[FoundRun]:
    """All runs under `root_dir`, newest first; a run whose run.json is damaged is named and left out."""
    runs = []
    for path in sorted(Path(root_dir).glob(f"*/*/*/*/*/{RUN_FILE}")):
        try:
            runs.append(FoundRun(path.parent, read_run(path.parent)))
        except RecordError as error:
            _warn(f"skipping a run: {error}")
    return sorted((run for run in runs if run.info), key=lambda run: (order_of(run.info), run.dir.name), reverse=True)


def order_of(info: dict[str, Any]) -> float:
    """The number by which runs, pipelines and results are sorted: the newest has the largest."""
    order: float = info.get("order", info.get("started", 0.0))
    return order


def next_order(now: float, orders: Iterable[float]) -> float:
    """The order of what is made `now`: these seconds, or more than all others if the clock has moved backwards."""
    return min(max([now, *(order + _TICK for order in orders)]), LATEST)


def read_run(run_dir: Path) -> dict[str, Any]:
    """The content of run.json; empty if it is missing. Raises RecordError if it is damaged."""
    return load_json(run_dir / RUN_FILE, RUN)


def task_of_run(saved: dict[str, Any]) -> type[TrainTaskConfig] | None:
    """Task of a run, from its saved configuration; None if it is unknown."""
    task = saved.get("task")
    cls = choices("task", "train").get(str(task.get("config_name"))) if isinstance(task, dict) else None
    return cls if cls is not None and issubclass(cls, TrainTaskConfig) else None


def kind_of_run(task: type[TrainTaskConfig] | None) -> str:
    """A run of this task in words, for messages."""
    return f"a run of task={task.config_name}, which trains a {task.trains}" if task else "a run of no known task"


def links_of(config: RootConfig) -> dict[str, str]:
    """The earlier runs that a task needs, as they are configured: option and directory, or a word for one."""
    if not isinstance(config, TrainConfig | EvalConfig):
        return {}
    found = {key: getattr(config.task, key.removeprefix("task."), None) for key in TASKS}
    if not scores_by_run(config):
        found.pop(REWARD_MODEL)
    return {key: value for key, value in found.items() if value is not None}


def scores_by_run(config: Needy) -> bool:
    """True if the reward is the model of a run."""
    return (
        hasattr(config.task, "rm_experiment_dir")
        and config.data is not None
        and needs_model(config.reward, config.data.rule_reward)
        and getattr(config.reward, "folder", None) is None
    )


def _begins_without(config: Needy) -> bool:
    """True if training may start from the configured model: a rule can train one that was not fine-tuned."""
    return links_of(config).get(START, "").casefold() == AUTO and not scores_by_run(config)


def resolve_runs(config: RootConfig, given_dir: str | None) -> RootConfig:
    """The configuration with the whole paths of the runs that it needs, also where it said "newest" or "auto".

    A run that is resumed, in `given_dir` (`hydra.run.dir`) if there is one, continues with those that it started from,
    whatever has been trained since.
    """
    if isinstance(config, InspectConfig):
        return _with_options_of_start(config)
    if not isinstance(config, TrainConfig | EvalConfig) or config.model is None:
        return config
    repo_name, adapter = config.model.repo_name, config.model.adapter
    if isinstance(config, TrainConfig) and is_newest(config.resume_from):
        config = _changed(config, {"resume_from": newest_unfinished(config.root_dir, config)})
    if isinstance(config, EvalConfig) and is_newest(getattr(config.task, "against", None)):
        asked = f"task.against={NEWEST}"
        other = newest_finished(config.root_dir, key=asked, trains=("policy",), other_than=config.experiment_dir)
        config = _changed(config, {"task.against": other})
    of_reward = getattr(config.task, "rm_experiment_dir", None)
    if of_reward is not None and is_run_alias(of_reward) and not scores_by_run(config):
        config = _changed(config, {REWARD_MODEL: None})
    start = getattr(config.task, "sft_experiment_dir", None)
    by_default = start is not None and start == getattr(type(config.task)(), "sft_experiment_dir", None)
    if by_default and adapter is not None:
        config = _changed(config, {START: None})  # the adapter is the start
    links = links_of(config)
    words = [key for key, value in links.items() if is_run_alias(value)]
    given = {key: str(expand_home(value).absolute()) for key, value in links.items() if key not in words}
    if given:
        config = _changed(config, given)
    if not words:
        return _with_options_of_start(config)
    for run in _resumable(config, given_dir) if isinstance(config, TrainConfig) else ():
        with suppress(ConfigError):
            before = read_run_config(str(run.dir)).get("task")
            if isinstance(before, dict):
                same = _changed(config, {key: before.get(key.removeprefix("task.")) for key in words})
                same = _with_options_of_start(same)
                if config_hash(same) == run.info.get("config_hash"):
                    return same
    settled: dict[str, str | None] = {}
    for run in _runs(config.root_dir, finished=True):  # a dry run only for dry runs
        for key in words:
            same_task = key not in settled and run.info.get("task") == TASKS[key]
            if same_task and _has_model(run, repo_name, dry_run=config.dry_run):
                settled[key] = str(run.dir.absolute())
    if START not in settled and _begins_without(config):
        settled[START] = None
    return _with_options_of_start(_changed(config, settled) if settled else config)


def _with_options_of_start(config: Startable) -> Startable:
    """Take chat template, its variables and added tokens from the run that is trained further, unless given."""
    start = getattr(config.task, "sft_experiment_dir", None)
    if isinstance(config, EvalConfig) or start is None or is_run_alias(start):
        return config
    try:
        model, data = saved_group(start, "model"), saved_group(start, "data")
    except ConfigError:  # reported by `start_problems`
        return config
    assert isinstance(model, ModelConfig) and isinstance(data, DataConfig)
    change: dict[str, Any] = {
        f"model.{name}": getattr(model, name)
        for name in ("chat_template", "resize_embeddings", "extra_vocabulary")
        if getattr(model, name) and not getattr(config.model, name)
    }
    theirs, given = data.template_args, config.data.template_args
    if theirs and given is None:
        change["data.template_args"] = theirs
        _print_once(f"data.template_args={theirs}: of {start}", "stdout")
    elif theirs and given != theirs:
        _warn(f"data.template_args={given}, and {start}, which training starts from, has {theirs}")
    return _changed(config, change) if change else config


def is_newest(word: Any) -> bool:
    """True if the value asks for the newest run instead of naming one."""
    return isinstance(word, str) and word.casefold() == NEWEST


def newest_finished(root_dir: str, *, key: str, trains: Collection[str], other_than: str | None = None) -> str:
    """The newest finished run but `other_than` that trained one of these; a dry run only if all are.

    Raises ConfigError if there is none.
    """
    skipped, dry_run = None if other_than is None else Path(other_than).resolve(), None
    for run in _runs(root_dir, finished=True):
        task = choices("task", "train").get(str(run.info.get("task")))
        if getattr(task, "trains", None) in trains and run.dir.resolve() != skipped:
            if not _is_dry_run(run):
                return str(run.dir.absolute())
            dry_run = dry_run or str(run.dir.absolute())
    if dry_run is not None:
        return dry_run
    raise ConfigError(
        f"{key}: {Path(root_dir).absolute()} has no finished run that trained a {' or a '.join(trains)}: `list runs` "
        "shows the runs that there are; give the directory of one"
    )


def evaluated_run(experiment_dir: str, root_dir: str, task: str) -> str:
    """The run that `experiment_dir` of an evaluation names, or the newest. Raises ConfigError if there is none."""
    if not is_newest(experiment_dir):
        return str(known_home("experiment_dir", experiment_dir))
    trains = getattr(choices("task", "eval").get(task), "evaluates", ("policy",))
    return newest_finished(root_dir, key=f"experiment_dir={experiment_dir}", trains=trains)


def newest_unfinished(root_dir: str, config: TrainConfig | None = None) -> str:
    """The newest unfinished run, with a configuration: of its task and model. Raises ConfigError if there is none."""
    for run in _runs(root_dir, finished=False):
        same_task = config is None or run.info.get("task") == config.task.config_name
        if same_task and (config is None or _has_model(run, config.model.repo_name)):
            return str(run.dir.absolute())
    of = "" if config is None else f" of task={config.task.config_name} with model.repo_name={config.model.repo_name}"
    place = Path(root_dir).absolute()
    raise ConfigError(f"resume_from={NEWEST}: {place} has no unfinished run{of}; `list runs` shows all")


def is_run_alias(start: str) -> bool:
    """True if the value is an alias of a run instead of a directory."""
    return start.casefold() in (NEWEST, AUTO)


def _changed(config: Startable, change: dict[str, Any]) -> Startable:
    new: Startable = replace_options(config, change)
    new.lock()
    return new


def _resumable(config: TrainConfig, given_dir: str | None) -> list[FoundRun]:
    """The runs that this one may continue with."""
    if (folder := config.resume_from or (given_dir if config.resume else None)) is not None:
        return [FoundRun(Path(folder), read_run(Path(folder)))]
    return find_runs(config.root_dir) if config.resume else []


def _runs(root_dir: str, *, finished: bool) -> Iterator[FoundRun]:
    """The runs, newest first, that have finished and have their weights, or those that have not finished."""
    for run in find_runs(root_dir):
        if finished == (run.info.get("status") == "finished") and (not finished or (run.dir / "final").is_dir()):
            yield run


def _has_model(run: FoundRun, repo_name: str | None, *, dry_run: bool = True) -> bool:
    """True if a run was trained from this model and, unless `dry_run`, is not a dry run."""
    with suppress(ConfigError):
        saved = read_run_config(str(run.dir))
        model = saved.get("model")
        same = isinstance(model, dict) and is_same_model(model.get("repo_name"), repo_name)
        return same and (dry_run or not saved.get("dry_run"))
    return False


def _is_dry_run(run: FoundRun) -> bool:
    with suppress(ConfigError):
        return bool(read_run_config(str(run.dir)).get("dry_run"))
    return False


def is_same_model(first: Any, second: Any) -> bool:
    """True if two values of `model.repo_name` are the same hub id or the same folder."""
    if first == second:
        return True
    if not isinstance(first, str) or not isinstance(second, str):
        return False
    one, other = expand_home(first), expand_home(second)
    return one.is_dir() and other.is_dir() and one.samefile(other)


def start_problems(config: Needy) -> Iterator[str]:
    """Problems of the runs that a task starts from or is scored by."""
    if config.model is None or config.data is None:
        return  # reported already
    links = links_of(config)
    missing = {key: value for key, value in links.items() if is_run_alias(value)}
    if missing and not _begins_without(config):
        yield _missing(config, missing, config.model, config.data)
    if REWARD_MODEL not in links and scores_by_run(config):
        yield f"{REWARD_MODEL} is null and the reward is a model: give a run of task=rm, or {_OTHER_REWARD}"
    for key, value in links.items():
        if key not in missing:
            yield from _link_problems(config, key, value, config.model)


def _missing(config: Needy, words: dict[str, str], model: ModelConfig, data: DataConfig) -> str:
    """There are no such runs: what to train first."""
    options = [*model_options(model), f"data={data.config_name}", *changed_words("data", data)]
    first = " and ".join(f"`{command(['train', f'task={TASKS[key]}', *options])}`" for key in words)
    asked = ", ".join(f"{key}={value}" for key, value in words.items())
    tasks = " and of ".join(f"task={TASKS[key]}" for key in words)
    instead = f", or {_OTHER_REWARD}" if REWARD_MODEL in words else ""
    return (
        f"{asked}: {config.root_dir} has no finished run of {tasks} with model.repo_name={model.repo_name}: "
        f"first {first}, or give a run directory{instead}"
    )


def _link_problems(config: Needy, key: str, run_dir: str, model: ModelConfig) -> Iterator[str]:
    """Problems of one earlier run: missing, of another kind or model, or without the weights."""
    try:
        saved = read_run_config(run_dir, key=key)
        theirs = saved_group(run_dir, "model", key=key)
    except ConfigError as error:
        yield from error.problems
        return
    task, wanted = task_of_run(saved), "reward model" if key == REWARD_MODEL else "policy"
    if task is None or task.trains != wanted:
        yield f"{key}={run_dir} is {kind_of_run(task)}: give a run of task={TASKS[key]}; `list runs` shows them"
        return
    assert isinstance(theirs, ModelConfig)
    if key == START and not is_same_model(theirs.repo_name, model.repo_name):
        yield (
            f"{key}={run_dir} was trained from model.repo_name={theirs.repo_name}, and this run has "
            f"{model.repo_name}: give {shlex.join(model_options(theirs))}, or another run"
        )
    given, added = list(model.extra_vocabulary), list(theirs.extra_vocabulary)
    if key == START and given and given != added:
        yield f"model.extra_vocabulary={given} is not that of {key}={run_dir}, {added}: leave the option out"
    name_key = _NAMES[key]
    name = str(getattr(config.task, name_key.removeprefix("task."), "final"))
    yield from weights_problems(run_dir, name, key=key, name_key=name_key)
    if key == START and model.random_init:
        yield f"model.random_init=true and {key}={run_dir} are two beginnings: give one of them"


def model_options(model: ModelConfig) -> list[str]:
    """The words that choose a model."""
    usual = getattr(choices("model").get(model.config_name), "repo_name", None)
    named = [] if model.repo_name == usual else [option_word("model.repo_name", model.repo_name)]
    return [f"model={model.config_name}", *named]


MAX_BYTES = 1_000_000


class _PlainLoader(yaml.SafeLoader):
    """Refuses aliases, with which a small file can describe a huge tree."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.events.AliasEvent):
            raise yaml.YAMLError("it holds an alias (*name)")
        return super().compose_node(parent, index)


def run_above(path: Path) -> Path | None:
    """The run directory that a path is inside of, if there is one."""
    return next((folder for folder in path.absolute().parents if os.path.isfile(folder / RUN_FILE)), None)


def read_run_config(experiment_dir: str, *, key: str = "experiment_dir") -> dict[str, Any]:
    """The saved configuration of a run that `key` names. Raises ConfigError if it is not plain YAML, or large."""
    path = Path(experiment_dir) / "config.yaml"
    if not path.is_file():
        what = "is not a directory" if not path.parent.is_dir() else "is not a run directory: it has no config.yaml"
        near = run_above(path.parent) if path.parent.is_dir() else near_path(experiment_dir)
        did = f"did you mean {key}={near}? `list runs` shows all" if near else "`list runs` shows which there are"
        raise ConfigError(f"{key}={experiment_dir} {what}: {did}")
    if path.stat().st_size > MAX_BYTES:
        raise ConfigError(f"{path} is larger than {MAX_BYTES} bytes: not a configuration of ours")
    try:
        saved = yaml.load(path.read_text(encoding="utf-8"), Loader=_PlainLoader)
    except (yaml.YAMLError, OSError, RecursionError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{path} cannot be read ({reason}): give another {key}") from error
    if not isinstance(saved, dict):
        raise ConfigError(f"{path} is not a configuration of ours: it holds no keys")
    if problems := rename_keys(saved):
        raise ConfigError(*(f"{path}: {problem}" for problem in problems))
    return saved


def saved_group(experiment_dir: str, group: str, *, key: str = "experiment_dir") -> Config:
    """The run's `model`, `data` or `task`, typed, without `trust_remote_code`. Raises ConfigError for a bad file."""
    saved = read_run_config(experiment_dir, key=key).get(group)
    if not isinstance(saved, dict):
        raise ConfigError(f"{Path(experiment_dir) / 'config.yaml'} has no {group}: give {group}=<choice>")
    chosen, left = saved.get("chat_template"), Path(experiment_dir) / "final" / "chat_template.jinja"
    if isinstance(chosen, str) and is_template_file(chosen) and not Path(chosen).is_file() and left.is_file():
        saved["chat_template"] = str(left)  # the user's file has moved
    if isinstance(saved.get("library_cfg"), dict):
        saved["library_cfg"]["trust_remote_code"] = False
    try:
        return from_dict(group, saved)
    except ConfigError as error:
        path = Path(experiment_dir) / "config.yaml"
        raise ConfigError(*(f"{path}: {problem}; give {group}=<choice>" for problem in error.problems)) from error
