"""From names to config dataclasses, and to a typed, read-only configuration; old option names stay accepted.

OmegaConf is imported by the functions that convert: help and the lookup of names need the dataclasses alone.
"""

import dataclasses
import functools
import hashlib
import json
import re
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import sheeprlhf
from sheeprlhf.structure.data import DataConfig, MixDataConfig
from sheeprlhf.structure.evaluation import EvalTaskConfig, FrontierConfig
from sheeprlhf.structure.model import ModelConfig
from sheeprlhf.structure.option import Config
from sheeprlhf.structure.reward import AutoRewardConfig, NoRewardConfig, RewardSourceConfig
from sheeprlhf.structure.rollout import DistillConfig, LocalRolloutConfig, OnlineTaskConfig, RolloutSourceConfig
from sheeprlhf.structure.run import (
    CommandConfig,
    DoctorConfig,
    EvalConfig,
    FabricConfig,
    FetchConfig,
    InspectConfig,
    OptimizerConfig,
    PipelineConfig,
    RootConfig,
    TrainConfig,
)
from sheeprlhf.structure.task import TrainTaskConfig
from sheeprlhf.utils.errors import ConfigError
from sheeprlhf.utils.launchers import is_rank_zero

if TYPE_CHECKING:
    from omegaconf import DictConfig

ROOTS: dict[str, type[TrainConfig] | type[EvalConfig] | type[CommandConfig]] = {
    "train": TrainConfig,
    "eval": EvalConfig,
    "inspect": InspectConfig,
    "doctor": DoctorConfig,
    "fetch": FetchConfig,
    "pipeline": PipelineConfig,
}
BASES: dict[str, tuple[type[Config], ...]] = {
    "task": (TrainTaskConfig, EvalTaskConfig),
    "model": (ModelConfig,),
    "data": (DataConfig,),
    "fabric": (FabricConfig,),
    "optim": (OptimizerConfig,),
    "reward": (RewardSourceConfig,),
    "rollout": (RolloutSourceConfig,),
}
_OF_VERB: dict[tuple[str, str], tuple[type[Config], ...]] = {  # choices of a group that a verb does not take all
    **{("task", verb): (EvalTaskConfig if verb == "eval" else TrainTaskConfig,) for verb in ROOTS},
    **{("rollout", verb): (LocalRolloutConfig,) for verb in ("eval", "inspect")},
}
DRY_RUN_STEPS = 2
DRY_RUN_ROWS = 64

# What names, places or speeds up a run without changing its result (another number of processes only rounds sums
# differently; a checkpoint announces it). Everything else tells two runs apart.
PERFORMANCE_ONLY_OPTIONS = ("task.token_budget", "task.micro_batch_size", "model.gradient_checkpointing")
NOT_IN_HASH = frozenset(
    {
        *("resume", "resume_from", "debug", "root_dir", "output_dir", "experiment", "log", "log_project"),
        *("data.cache_dir", "data.num_proc", "task.num_workers", "task.num_sample_prompts"),
        *("task.pin_memory", "task.save_rollouts", "task.async_checkpoints", "reward.num_workers", "reward.timeout"),
        *("task.save_interval", "task.keep_checkpoints"),
        "task.max_skipped_steps",  # which without it end the run
        *PERFORMANCE_ONLY_OPTIONS,
        *("fabric.config_name", "fabric.accelerator", "fabric.devices", "fabric.num_nodes", "fabric.strategy"),
        *("fabric.timeout", "fabric.tensor_parallel", "fabric.replicas", "fabric.offload"),
        *("rollout.urls", "rollout.sync", "rollout.sync_dir", "rollout.timeout", "rollout.tolerance"),
    }
)
_HASHED_DEFAULTS = frozenset(  # once told runs apart: hashes hold their defaults, so that older runs continue
    {"fabric.replicas", "fabric.offload", "task.save_interval", "task.keep_checkpoints"}
)


class Option(NamedTuple):
    """One leaf of a configuration: its dotted key, annotated type, value and documentation."""

    key: str
    type: Any
    value: Any
    metadata: typing.Mapping[str, Any]
    default: Any = None


def configs_directory() -> Path:
    """The repository's `configs/`, else the copy inside the installed package; never the working directory's."""
    package = Path(sheeprlhf.__file__).resolve().parent
    checkout = package.parent / "configs"
    return checkout if (checkout / "train.yaml").is_file() else package / "configs"


def choices(group: str, verb: str = "") -> dict[str, type[Config]]:
    """The dataclasses of a group by `config_name`: every subclass that is defined, so a new one needs no list."""
    bases = _OF_VERB.get((group, verb), BASES[group])
    found: dict[str, type[Config]] = {}
    waiting = list(bases)
    while waiting:
        cls = waiting.pop(0)
        name = getattr(cls, "config_name", "???")
        if name != "???":
            found[name] = cls
        waiting.extend(cls.__subclasses__())
    return found


def groups(verb: str) -> list[str]:
    """The groups that a verb composes, in the order of its dataclass."""
    return [field.name for field in dataclasses.fields(ROOTS[verb]) if field.name in BASES]


def options(node: Config, prefix: str = "") -> Iterator[Option]:
    """Every leaf of a configuration, in the order of the dataclasses."""
    cls: Any = type(node)
    hints = type_hints(cls)
    for field in dataclasses.fields(cls):
        if field.name in getattr(cls, "unread", ()):
            continue
        key = f"{prefix}{field.name}"
        value = getattr(node, field.name)
        if isinstance(value, Config):
            yield from options(value, f"{key}.")
        else:
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            yield Option(key, hints[field.name], value, _metadata(cls, field.name), default)


@functools.cache
def type_hints(cls: Any) -> typing.Mapping[str, Any]:
    """The types of a dataclass's options by name; empty for other types."""
    return typing.get_type_hints(cls) if dataclasses.is_dataclass(cls) else {}


def _metadata(cls: type, name: str) -> typing.Mapping[str, Any]:
    """The field's own documentation, else its parents': a short subclass may redefine a default only."""
    for parent in cls.__mro__:
        field = getattr(parent, "__dataclass_fields__", {}).get(name)
        if isinstance(field, dataclasses.Field) and field.metadata:
            return field.metadata
    return {}


def typed_with_missing(config: "DictConfig") -> Config:
    """The composed configuration as dataclasses in which options may be missing ("???"), to look through them."""
    from omegaconf import OmegaConf

    typed: Config = cast(Any, OmegaConf.get_type(config))()
    for name in map(str, config):
        value: Any = "???" if OmegaConf.is_missing(config, name) else config[name]
        if OmegaConf.is_config(value):
            is_group = dataclasses.is_dataclass(OmegaConf.get_type(value))
            value = typed_with_missing(value) if is_group else OmegaConf.to_container(value)
        setattr(typed, name, value)
    return typed


def to_typed(config: "DictConfig") -> RootConfig:
    """The composed configuration as read-only dataclasses, dry run applied. Raises ConfigError for wrong values."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        typed = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise ConfigError(str(error).splitlines()[0]) from error
    assert isinstance(typed, RootConfig)
    _normalise(typed)
    if isinstance(typed, TrainConfig) and isinstance(typed.task, DistillConfig) and typed.reward == AutoRewardConfig():
        typed.reward = NoRewardConfig()
    if isinstance(typed, TrainConfig | EvalConfig) and typed.dry_run:
        typed = apply_dry_run(typed)
    typed.lock()
    return typed


def _normalise(config: Config) -> None:
    """Choices in their first spelling; lists become tuples, which cannot be changed."""
    for field in dataclasses.fields(cast(Any, config)):
        value = getattr(config, field.name)
        if isinstance(value, Config):
            _normalise(value)
        elif isinstance(value, list):
            setattr(config, field.name, tuple(value))
        elif isinstance(value, str):
            spellings = _metadata(type(config), field.name).get("choices", ())
            same = [s for s in spellings if s.casefold() == value.casefold()]
            setattr(config, field.name, same[0] if same else value)


def apply_dry_run(config: TrainConfig | EvalConfig) -> TrainConfig | EvalConfig:
    """A copy that does little of everything: two optimizer steps (or mini-batches), short texts, the same model."""
    replace = dataclasses.replace
    data = config.data
    if data is not None:
        data = replace(data, num_samples=min(data.num_samples or DRY_RUN_ROWS, DRY_RUN_ROWS))
    generation = replace(config.generation, max_new_tokens=min(config.generation.max_new_tokens, 8))
    reward = replace(config.reward, overlong_buffer=min(config.reward.overlong_buffer, generation.max_new_tokens))
    if isinstance(config, EvalConfig):
        rows = DRY_RUN_STEPS * config.task.mini_batch_size
        few: dict[str, Any] = {"num_samples": min(config.task.num_samples or rows, rows)}
        if isinstance(config.task, FrontierConfig):
            few["best_of"] = min(config.task.best_of, 4)
        return replace(config, data=data, generation=generation, reward=reward, task=replace(config.task, **few))
    task = config.task
    little = {
        "max_num_steps": DRY_RUN_STEPS,
        "epochs": max(task.epochs, DRY_RUN_STEPS),  # the few rows may make one step per epoch
        "lr_warmup_steps": min(task.lr_warmup_steps, 1),
        "log_interval": 1,
        "eval_interval": 1,
        "save_interval": 1,
        "max_eval_batches": 2,
    }
    if isinstance(task, OnlineTaskConfig):
        group = task.num_generations
        size = max(1, min(task.rollout_size, 16) // group) * group
        of_step = max(1, min(task.mini_batch_size, size) // group) * group
        little |= {"rollout_size": size, "mini_batch_size": of_step, "num_iterations": 1}
    unread = {*task.unread, "epochs"} if getattr(data, "streaming", False) else task.unread
    task = replace(task, **{name: value for name, value in little.items() if name not in unread})
    return replace(config, data=data or config.data, generation=generation, task=task, reward=reward)


def replace_options(config: Any, change: dict[str, Any]) -> Any:
    """A copy of the configuration with the change made."""
    for key, value in change.items():
        first, _, rest = key.partition(".")
        new = replace_options(getattr(config, first), {rest: value}) if rest else value
        config = dataclasses.replace(config, **{first: new})
    return config


def leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the options of a nested configuration by their dotted keys."""
    for name, value in tree.items():
        yield from leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else [(f"{prefix}{name}", value)]


def config_to_dict(config: Config) -> dict[str, Any]:
    """Plain dicts, lists and scalars, as saved in `config.yaml`."""
    return {f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(cast(Any, config))}


def _plain(value: Any) -> Any:
    if isinstance(value, Config):
        return config_to_dict(value)
    return list(value) if isinstance(value, tuple) else value


def config_hash(config: Config) -> str:
    """SHA-256 of all that changes the result of a run, by old names of options, so that older runs continue."""
    all_options = list(options(config))
    kept = dict(original(o.key, _plain(o.value)) for o in all_options if o.key not in NOT_IN_HASH)
    kept |= dict(original(o.key, _plain(o.default)) for o in all_options if o.key in _HASHED_DEFAULTS)
    if kept.get("rollout.config_name") == "local":
        del kept["rollout.config_name"]
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def from_dict(kind: str, saved: dict[str, Any]) -> Config:
    """Rebuild one group's configuration (`kind` is "model", "data", ...) from a saved `config.yaml`.

    The class is looked up by `config_name`; a model that came from a YAML file has every model's options. Values are
    checked against the dataclass and nothing in them is ever interpolated.

    Raises:
        ConfigError: the name or a key is unknown, or a value has the wrong type.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    name = saved.get("config_name")
    cls = choices(kind).get(str(name), ModelConfig if kind == "model" else None)
    if cls is None:
        raise ConfigError(f"{kind}.config_name={name!r} is unknown; choose {', '.join(choices(kind))}")
    if "${" in json.dumps(saved, default=str):
        raise ConfigError(f"{kind}: the saved configuration holds an interpolation '${{...}}'; write the value instead")
    try:
        typed = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(cls), saved))
    except OmegaConfBaseException as error:
        key = f"{kind}.{error.full_key}" if error.full_key else kind
        raise ConfigError(f"{key}: {str(error).splitlines()[0]}") from error
    assert isinstance(typed, Config)
    _normalise(typed)
    typed.lock()
    return typed


OF_A_MIXTURE = ("config_name", "dataset_name", "revision", "num_samples")  # options that its datasets do not share


def datasets_of(data: DataConfig) -> list[DataConfig]:
    """The datasets of a mixture with the shared options, or the dataset. Raises ConfigError for a wrong option."""
    if not isinstance(data, MixDataConfig):
        return [data]
    shared = {name: value for name, value in config_to_dict(data).items() if name not in (*OF_A_MIXTURE, "mix")}
    shared = {name: value for name, value in shared.items() if name in DataConfig.__dataclass_fields__}
    found = []
    for given in data.mix:
        own = {name: value for name, value in given.items() if name not in ("data", "weight")}
        limits = [limit for limit in (data.num_samples, own.get("num_samples")) if limit is not None]
        own |= {"num_samples": min(limits)} if limits else {}
        name = given.get("data", "local" if "train_file" in given else "hub")
        typed = from_dict("data", {**shared, **own, "config_name": name})
        assert isinstance(typed, DataConfig)
        found.append(typed)
    return found


def unwrap_optional(hint: Any) -> tuple[Any, bool]:
    """`Optional[int]` -> (int, True); `int` -> (int, False)."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        inner = [arg for arg in typing.get_args(hint) if arg is not type(None)]
        return inner[0], True
    return hint, hint is Any


RENAMED = {
    "task.gradient_clip_val": "task.max_grad_norm",
    "task.eval_iters": "task.max_eval_batches",
    "task.use_masked_targets": "task.completion_only_loss",
    "task.ppo_epochs": "task.num_iterations",
    "task.target_kl_coeff": "task.target_kl",
    "task.max_kl": "task.early_stop_kl",
    "task.truncated_value": "task.bootstrap_truncated",
    "reward.repetition_penalty": "reward.ngram_repetition_penalty",
    "reward.overlong_cache": "reward.overlong_buffer",
}
_DEPRECATED = {"task.max_kl", "task.truncated_value", "reward.repetition_penalty", "reward.overlong_cache"}
_TRUNCATED = {"terminal": "false", "bootstrap": "true"}  # values of task.truncated_value
_OLD_NAMES = {new: old for old, new in RENAMED.items()}


def current_word(word: str) -> str:
    """Return `key=value` of a command line with the current name of its option."""
    key, equals, value = word.partition("=")
    old = key.lstrip("+~")
    if old not in RENAMED:
        return word
    _deprecate(old)
    if old == "task.truncated_value":
        value = re.sub("terminal|bootstrap", lambda match: _TRUNCATED[match[0].lower()], value, flags=re.IGNORECASE)
    return f"{key.removesuffix(old)}{RENAMED[old]}{equals}{value}"


def original(key: str, value: Any) -> tuple[str, Any]:
    """Return an option and its value as they were before it was renamed, for hashes of configurations."""
    if key == "task.bootstrap_truncated":
        value = "bootstrap" if value else "terminal"
    return _OLD_NAMES.get(key, key), value


def twice_given(keys: list[str]) -> Iterator[str]:
    """Yield one problem for each option that is given by its old and its current name."""
    for old in sorted(RENAMED.keys() & set(keys)):
        if RENAMED[old] in keys:
            yield f"{old} is the old name of {RENAMED[old]}, and both are given: remove {old}"


def rename_keys(tree: dict[str, Any], group: str = "", *, deprecate: bool = False) -> list[str]:
    """Replace old names in place, with a warning if `deprecate`; return a problem for each option with both names."""
    if not group:
        parts = [(name, tree[name]) for name in ("task", "reward") if isinstance(tree.get(name), dict)]
        return [problem for name, part in parts for problem in rename_keys(part, name, deprecate=deprecate)]
    problems = list(twice_given([f"{group}.{key}" for key in tree]))
    for key in [key for key in tree if f"{group}.{key}" in RENAMED]:
        old, value = f"{group}.{key}", tree.pop(key)
        if deprecate:
            _deprecate(old)
        if old == "task.truncated_value":
            value = str(value).lower() == "bootstrap"
        tree[RENAMED[old].rpartition(".")[2]] = value
    return problems


@functools.cache
def _deprecate(old: str) -> None:
    """Rank zero says that a name will go, once; names of the 2023 code stay."""
    if old in _DEPRECATED and is_rank_zero():
        print(f"warning: {old} is deprecated: write {RENAMED[old]}", file=sys.stderr)
