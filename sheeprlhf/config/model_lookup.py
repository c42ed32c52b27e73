"""Lookup of a model by one word: a run, a folder, or a name of `list models`; checks all that files tell."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from sheeprlhf.config.command_words import shell_word
from sheeprlhf.config.option_checks import near_path
from sheeprlhf.config.path_checks import model_problem, template_problem, weights_problems
from sheeprlhf.config.registry import choices
from sheeprlhf.config.run_lookup import (
    REPORT_FILE,
    is_newest,
    is_same_model,
    kind_of_run,
    newest_finished,
    read_run_config,
    saved_group,
    task_of_run,
)
from sheeprlhf.security.json_records import DATA_REPORT, load_json
from sheeprlhf.security.model_folder import merge_advice, read_json
from sheeprlhf.structure.data import DataConfig
from sheeprlhf.structure.evaluation import FrontierConfig
from sheeprlhf.structure.model import AutoModelConfig, ModelConfig
from sheeprlhf.structure.reward import MODEL, term_folder
from sheeprlhf.structure.rollout import OnlineTaskConfig
from sheeprlhf.structure.run import EvalConfig, TrainConfig
from sheeprlhf.structure.task import PRMConfig, RMConfig, TrainTaskConfig
from sheeprlhf.utils.chat_templates import FLAG
from sheeprlhf.utils.errors import ConfigError, ModelError
from sheeprlhf.utils.home import expand_home
from sheeprlhf.utils.output import is_scratch

POLICY, REWARD_MODEL = "policy", "reward model"  # what a task can train
WEIGHTS = "--weights"
_INSTEAD = {
    POLICY: "give one that writes text, of task=sft, dpo, ppo, ...; `demo <run> --reward <this run>` shows its scores",
    REWARD_MODEL: "give a run of task=rm",
}
_MAX_STARTS = 8  # a run that starts from a run that ...


class Trained(NamedTuple):
    """A model that its files allow to load."""

    word: str  # as it was given
    trains: str  # POLICY or REWARD_MODEL
    model: ModelConfig  # of the run or the folder
    data: DataConfig | None = None  # what the run was trained on; None for a folder
    run_dir: Path | None = None  # the run; None for a folder
    weights: str = "final"  # of the run: "final", "best", "last" or "step-<n>"
    task: str = ""  # of the run
    chat_template: str | None = None  # chosen instead of the model's own
    template_args: dict[str, Any] | None = None  # given instead of those of the run's data

    def is_whole(self) -> bool:
        """True if the weights need no base model: a folder, or a run's `final/` without adapters."""
        return self.run_dir is None or _is_whole(self.run_dir, self.weights)

    def templated(self) -> bool:
        """True if the model was trained on rows written by its chat template; assumed for a folder."""
        report = {} if self.run_dir is None else load_json(self.run_dir / REPORT_FILE, DATA_REPORT)
        parts = report.get("splits", {}).values()
        return not parts or any(part.get("templated_rows", 1) for part in parts)

    def with_tokenizer(self) -> ModelConfig:
        """A model whose files hold the tokenizer: the run's own, if it wrote one."""
        model = self.model if self.run_dir is None else with_own_tokenizer(self.model, self.run_dir)
        return model if self.chat_template is None else dataclasses.replace(model, chat_template=self.chat_template)


def with_own_tokenizer(model: ModelConfig, run_dir: Path) -> ModelConfig:
    """The model of a run, with the files of its `final/` where these hold the tokenizer, its chat template included."""
    final = run_dir / "final"
    if not all((final / name).is_file() for name in ("config.json", "tokenizer.json")):
        return model
    return dataclasses.replace(model, repo_name=str(final), chat_template=None)


def _is_whole(run_dir: Path, weights: str) -> bool:
    return weights == "final" and not (run_dir / "final" / "adapter_config.json").is_file()


def needs_base_model(config: EvalConfig) -> bool:
    """True if an evaluation reads the run's initial model, besides the run's own files."""
    if config.experiment_dir is None or config.model is None:
        return True
    run_dir, weights = Path(config.experiment_dir), config.task.model_name
    try:
        saved = read_run_config(config.experiment_dir)
    except ConfigError:  # reported by `validate`
        return True
    model = saved.get("model")
    if not isinstance(model, dict) or not is_same_model(model.get("repo_name"), config.model.repo_name):
        return True
    own = with_own_tokenizer(config.model, run_dir) is not config.model
    if not own or not _is_whole(run_dir, weights) or isinstance(config.task, FrontierConfig):
        return True
    trained, task = task_of_run(saved), saved.get("task")
    options = task if isinstance(task, dict) else {}
    if not config.task.reads_start or config.model.random_init or (trained and trained.trains == REWARD_MODEL):
        return False
    start, name = options.get("sft_experiment_dir"), str(options.get("sft_model_name", "final"))
    return not isinstance(start, str) or not _is_whole(Path(start), name)


def find_trained(
    word: str,  # a run directory, "newest", a folder in the hub's layout, or a name such as "tiny"
    weights: str | None = None,  # which of a run's; None is its final ones
    *,
    wanted: str | None = POLICY,  # POLICY or REWARD_MODEL; None takes either
    chat_template: str | None = None,  # instead of the model's own, as `model.chat_template` takes it
    template_args: str | None = None,  # text, instead of those of the run's data
) -> Trained:
    """The model that a word names. Raises ConfigError with all problems if it names none that fits."""
    problem = None if chat_template is None else template_problem(chat_template, key=FLAG)
    if problem:
        raise ConfigError(problem)
    variables = None
    if template_args is not None:
        from sheeprlhf.utils.rendering import read_template_args

        variables = read_template_args(template_args)
    if is_newest(word):
        kinds = (POLICY, REWARD_MODEL) if wanted is None else (wanted,)
        word = newest_finished(TrainConfig.root_dir, key=word, trains=kinds)
    return _find(word, weights, wanted)._replace(chat_template=chat_template, template_args=variables)


def _find(word: str, weights: str | None, wanted: str | None) -> Trained:
    folder = expand_home(word)
    if is_scratch(folder.absolute()):
        raise ConfigError(f"{word} is what a killed command has left, or one that works now: give what it was to write")
    if (folder / "config.yaml").is_file():
        return _of_run(word, folder, weights or "final", wanted, _MAX_STARTS)
    named = choices("model").get(word)
    if weights is not None:
        raise ConfigError(f"{WEIGHTS} {weights}: {word} is not a run, so it has no other weights: leave the flag out")
    if folder.is_dir():
        return _of_folder(word, folder, wanted)
    if named is not None and isinstance(named.__dict__.get("repo_name"), str) and wanted != REWARD_MODEL:
        model = named()
        assert isinstance(model, ModelConfig)
        return Trained(word, POLICY, model)
    near = near_path(word)
    did = f"did you mean {near}?" if near else "`list runs` shows the runs, `list models` the models that have a name"
    raise ConfigError(f"{word} is neither a run nor a model's folder: {did}")


def _of_folder(word: str, folder: Path, wanted: str | None) -> Trained:
    if (folder / "adapter_config.json").is_file():
        if not (folder.parent / "config.yaml").is_file():
            raise ConfigError(f"{word}: {merge_advice(folder)}")
        raise ConfigError(f"{word}: this folder has adapters only: give its run, {folder.parent}")
    if not (folder / "config.json").is_file():
        below = sorted(path.parent for path in folder.glob("*/config.yaml"))
        did = f"did you mean {below[-1]}?" if below else "give a run (it has config.yaml) or a model (config.json)"
        raise ConfigError(f"{word} is neither a run nor a model's folder: {did}")
    if problem := model_problem(word, weights=True, key=""):
        raise ConfigError(problem)
    classifies = "SequenceClassification" in str(read_json(folder, "config.json").get("architectures"))
    trains = REWARD_MODEL if classifies else POLICY
    if wanted not in (None, trains):
        raise ConfigError(f"{word} is a {trains}: {_INSTEAD[wanted or trains]}")
    return Trained(word, trains, AutoModelConfig(repo_name=str(folder)))


def _of_run(word: str, run_dir: Path, weights: str, wanted: str | None, starts: int) -> Trained:
    place = str(run_dir)  # `word` with its home directory
    task = task_of_run(read_run_config(place, key="run"))
    if task is None or task.trains not in ((POLICY, REWARD_MODEL) if wanted is None else (wanted,)):
        raise ConfigError(f"{word} is {kind_of_run(task)}: {_INSTEAD[wanted or POLICY]}")
    problems = list(weights_problems(place, weights, key="run", name_key=WEIGHTS))
    found = {}
    for group in ("model", "data", "task"):
        try:
            found[group] = saved_group(place, group, key="run")
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(*problems)
    model, data, of_task = found["model"], found["data"], found["task"]
    assert isinstance(model, ModelConfig) and isinstance(data, DataConfig) and isinstance(of_task, TrainTaskConfig)
    trained = Trained(word, task.trains, model, data, run_dir.absolute(), weights, task.config_name)
    problems = [] if trained.is_whole() else list(_base_problems(trained, of_task, starts))
    if problems:
        raise ConfigError(*problems)
    return trained


def _base_problems(trained: Trained, task: TrainTaskConfig, starts: int) -> Iterator[str]:
    """Problems of the base weights that a run's adapters or checkpoints need."""
    start = getattr(task, "sft_experiment_dir", None)
    needs = f"{trained.word}: its {trained.weights} weights need those that it was trained from"
    if start is None:
        if problem := model_problem(trained.model.repo_name, weights=True):
            yield f"{needs}, {trained.model.repo_name}: {problem}"
    elif not starts:
        yield f"{needs}, and those are of too many runs, one from the other: {start}"
    elif not (Path(start) / "config.yaml").is_file():
        yield f"{needs}, and {start} is not there any more: put that run back, or give another"
    else:
        try:
            _of_run(start, Path(start), getattr(task, "sft_model_name", "final"), POLICY, starts - 1)
        except ConfigError as error:
            yield from (f"{needs}: {problem}" for problem in error.problems)


def reads_chat(cfg: TrainConfig | EvalConfig) -> bool:
    """True if reward models read prompt and response in their own chat template."""
    return getattr(cfg.reward, "template", "plain") == "chat"


def reward_model_source(cfg: TrainConfig | EvalConfig, term: str) -> tuple[str | None, str | None, ModelConfig]:
    """Return the run or the folder that the reward model of a term is in, and its model's configuration."""
    folder, run_dir = term_folder(term), getattr(cfg.task, "rm_experiment_dir", None)
    folder = getattr(cfg.reward, "folder", None) if folder is None else folder
    if folder is not None:
        return None, folder, AutoModelConfig(repo_name=folder, disable_dropout=True)
    assert run_dir is not None  # the command line asks for one
    saved = saved_group(run_dir, "model")
    assert isinstance(saved, ModelConfig)
    return run_dir, None, saved


@contextmanager
def reward_folder_errors(term: str) -> Iterator[None]:
    """Let the errors of a block name the option of a term's folder instead of `model.repo_name`."""
    try:
        yield
    except ModelError as error:
        raise ModelError(str(error).replace("model.repo_name=", folder_option(term))) from error


def folder_option(term: str) -> str:
    """The option that names the folder of a term's reward model, up to the folder."""
    return "reward.folder=" if term == MODEL else "reward.terms: model:"


def is_on_base_of(cfg: TrainConfig, model: ModelConfig, rm_dir: str) -> bool:
    """Return whether a run's reward model is adapters on the very weights that the policy of `cfg` starts from."""
    task, theirs = cfg.task, saved_group(rm_dir, "task")
    assert isinstance(task, OnlineTaskConfig)
    return (
        model.finetune_mode == "LORA"
        and task.rm_model_name == "final"
        and (Path(rm_dir) / "final" / "adapter_config.json").is_file()
        and isinstance(theirs, RMConfig | PRMConfig)
        and initial_run(theirs) == initial_run(task)
        and is_same_model(model.repo_name, cfg.model.repo_name)
        and model.quantization == cfg.model.quantization
    )


def initial_run(task: object) -> tuple[str | None, str]:
    """Return the run that a task starts from, if it starts from one, and which of its weights."""
    return getattr(task, "sft_experiment_dir", None), getattr(task, "sft_model_name", "final")


def whole_model(cfg: ModelConfig, run_dir: Path | None, weights: str) -> ModelConfig | None:
    """The model that `cfg` or a run's `final/` holds whole; None for adapters, or for weights of a checkpoint.

    Raises ConfigError if the run has no `final/` yet.
    """
    if run_dir is None:
        return cfg
    final = run_dir / "final"
    if weights != "final" or (final / "adapter_config.json").is_file():
        return None
    if not final.is_dir():
        raise ConfigError(
            f"{run_dir}: this run has no final/ yet; finish it with {shell_word('resume_from', str(run_dir))}"
        )
    whole = dataclasses.replace(cfg, repo_name=str(final), finetune_mode="ALL", random_init=False, quantization=None)
    whole.adapter = None
    whole.chat_template = None  # the tokenizer in the folder has it
    return whole
