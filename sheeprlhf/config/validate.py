"""Check a whole configuration before anything heavy starts: every problem at once, as key, value and fix."""

import ast
import math
import netrc
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from sheeprlhf.config.option_checks import (
    conflicts,
    did_you_mean,
    near_path,
    not_installed,
    option_problems,
    unread,
    unread_problems,
)
from sheeprlhf.config.path_checks import (
    adapter_problem,
    data_file_problems,
    dataset_problem,
    model_problem,
    new_folder_problems,
    template_problem,
)
from sheeprlhf.config.registry import OF_A_MIXTURE, choices, datasets_of, options
from sheeprlhf.config.run_lookup import start_problems
from sheeprlhf.structure.data import REASONING_TAGS, DataConfig, LayoutDataConfig, LocalDataConfig, MixDataConfig
from sheeprlhf.structure.evaluation import EvalTaskConfig
from sheeprlhf.structure.model import LORAConfig, ModelConfig
from sheeprlhf.structure.reward import AutoRewardConfig, RewardSourceConfig
from sheeprlhf.structure.rollout import LocalRolloutConfig, OnlineTaskConfig
from sheeprlhf.structure.run import (
    TRACKER_MODULES,
    AdamW8bitConfig,
    ClusterConfig,
    DoctorConfig,
    EvalConfig,
    FabricConfig,
    FetchConfig,
    GenConfig,
    InspectConfig,
    OptimizerConfig,
    RootConfig,
    TrainConfig,
)
from sheeprlhf.structure.task import PRMConfig, SFTConfig, TrainTaskConfig
from sheeprlhf.utils.errors import ConfigError
from sheeprlhf.utils.home import cache_place
from sheeprlhf.utils.memory import cuda_problem, missing_modules

_OF_STREAMS = {"streaming", "shard_size", "keep_shards"}
_COMMIT = re.compile(r"[0-9a-f]{40}")


def validate(config: RootConfig) -> list[str]:
    """Every problem of a typed configuration, one sentence each; empty if it can run."""
    return list(_problems(config))


def _problems(config: RootConfig) -> Iterator[str]:
    found = list(options(config))
    for option in found:
        yield from option_problems(option)
    for group in ("task", "data", "fabric", "optim", "reward", "rollout"):
        own: Any = getattr(config, group, None)  # a saved run is read back by this name (a model has any)
        if own is not None and choices(group).get(own.config_name) is not type(own):
            usual = type(own).config_name
            yield f"{group}.config_name={own.config_name} cannot be changed: leave {group}.config_name={usual}"
    for group, problems in _OF_GROUP.items():
        if getattr(config, group, None) is not None:
            yield from problems(getattr(config, group))
    yield from unread_problems(found, _READ_WITH)
    yield from contradictions(config)
    if isinstance(config, TrainConfig | EvalConfig):
        yield from _fabric_problems(config.fabric, here=not is_plan(config))
    if isinstance(config, DoctorConfig) and config.cluster != ClusterConfig() and not is_plan(config):
        yield unread("cluster.*", "in a plan for this machine", "cluster.memory=<GB of a device>")
    yield from _repo_problems(config)
    if isinstance(config, TrainConfig):
        yield from _train_problems(config)
    elif isinstance(config, EvalConfig):
        from sheeprlhf.config.reward_checks import eval_problems

        yield from eval_problems(config)
    elif isinstance(config, InspectConfig):
        yield from new_folder_problems("output_dir", config.output_dir)
        yield from _rollout_problems(config)
    elif isinstance(config, FetchConfig):
        yield from _cache_problems("cache_dir", config.cache_dir)
    if isinstance(config, TrainConfig | EvalConfig | InspectConfig) and config.data is not None:
        yield from _cache_problems("data.cache_dir", config.data.cache_dir)


def contradictions(config: RootConfig) -> Iterator[str]:
    """Problems of options that exclude each other."""
    yield from conflicts(options(config), (*_CONFLICTS, *(_TRAIN_CONFLICTS if isinstance(config, TrainConfig) else ())))


def _cache_problems(key: str, cache_dir: str | None) -> Iterator[str]:
    place = cache_place(cache_dir, key)
    for problem in new_folder_problems(place.key, place.path):
        yield problem if place.key == key else f"{problem}, or {key}=<folder>"


def _repo_problems(config: RootConfig) -> Iterator[str]:
    model: ModelConfig | None = getattr(config, "model", None)
    of_run = ""
    if isinstance(config, EvalConfig):
        from sheeprlhf.config.model_lookup import needs_base_model

        if not needs_base_model(config):
            return
        if config.experiment_dir is not None:
            of_run = f" (task={config.task.config_name} reads the model that the run was trained from)"
    if model is None:
        return
    reads_weights = isinstance(config, TrainConfig | EvalConfig) and not of_run
    planned = is_plan(config)
    weights = reads_weights and not (model.random_init or planned)
    if problem := model_problem(model.repo_name, weights=weights, tokenizer=not planned):
        yield problem + of_run
    if model.chat_template is not None and (problem := template_problem(model.chat_template)):
        yield problem


def is_plan(config: RootConfig) -> bool:
    """True for a `doctor` of other machines than this one."""
    return isinstance(config, DoctorConfig) and config.plans_other_machines()


def _fabric_problems(fabric: FabricConfig, *, here: bool) -> Iterator[str]:
    try:
        devices = parse_devices(fabric.devices)
    except ValueError:
        devices = None
        yield f"fabric.devices={fabric.devices} cannot be read: give a number, auto, or a list such as '0,1'"
    if fabric.accelerator == "cuda" and here and (problem := cuda_problem(devices)):
        yield problem
    if here and (fabric.accelerator == "cpu" or (fabric.accelerator == "auto" and cuda_problem(devices))):
        if fabric.precision == "16-true":
            yield "fabric.precision=16-true needs a CUDA device: give fabric.precision=bf16-mixed"
        if isinstance(devices, list):
            yield f"fabric.devices={fabric.devices} names CUDA devices: on a CPU, give a number of processes"
    if fabric.precision == "16-mixed":  # its loss scale begins too high on purpose: the first steps are not finite
        yield "fabric.precision=16-mixed is not supported: give fabric.precision=bf16-mixed or 32-true"


def parse_devices(value: str | None) -> int | str | list[int]:
    """`fabric.devices` for Fabric: "2" -> 2, "auto", "0,1" -> [0, 1], None -> 1. Raises ValueError for others."""
    if value is None:
        return 1
    text = value.strip().strip("[]")
    if text.casefold() in ("auto", "-1"):
        return "auto"
    if "," in text or value.strip().startswith("["):
        indices = [int(part) for part in text.split(",") if part.strip()]
        if not indices or min(indices) < 0 or len(set(indices)) < len(indices):
            raise ValueError(value)
        return indices
    if int(text) < 1:
        raise ValueError(value)
    return int(text)


def _generation_problems(generation: GenConfig) -> Iterator[str]:
    if "" in generation.stop_strings:
        yield "generation.stop_strings has an empty text, which ends every response at once: remove it"


def parse_targets(value: Any) -> str | list[str]:
    """`lora_cfg.targets`: "all-linear", or names and patterns as a list, `a,b` or Python's. Raises ValueError."""
    if isinstance(value, str) and is_pattern(value):
        value = [value]
    if isinstance(value, str):
        text = value.strip()
        if text.casefold() == "all-linear":
            return "all-linear"
        if text[:1] in ("(", "["):
            try:
                value = ast.literal_eval(text)
            except (SyntaxError, ValueError):
                value = text.strip("()[]")
        if isinstance(value, str):
            value = [part.strip() for part in value.split(",") if part.strip()]
    if not isinstance(value, list | tuple) or not value:
        raise ValueError(value)
    if not all(isinstance(name, str) and (re.fullmatch(r"[\w.]+", name) or is_pattern(name)) for name in value):
        raise ValueError(value)
    return list(value)


def is_pattern(text: str) -> bool:
    """True for a regular expression of module names, which no name is; one that may take long to match is none."""
    if not re.search(r"[\\*+?|^$]", text) or len(text) > 200 or len(re.findall(r"[*+{]", text)) > 3:
        return False
    try:
        re.compile(text)
    except re.error:
        return False
    return re.search(r"\)[*+{]", text) is None  # a repeated group


_UNSAFE_INITS = {
    **dict.fromkeys(
        ("pissa", "olora"),
        "changes the weights of the base model, so that neither the reference nor a saved adapter fits the model",
    ),
    **dict.fromkeys(("eva", "corda", "lora_ga"), "needs data before training"),
    "loftq": "needs a quantised model",
    "mica": "freezes one of the two matrices",
}
_INITS = ("default", "gaussian", "orthogonal")


def _lora_problems(lora: LORAConfig) -> Iterator[str]:
    try:
        parse_targets(lora.targets)
    except ValueError:
        yield (
            f"model.lora_cfg.targets={lora.targets} cannot be read: give all-linear, "
            "names such as model.lora_cfg.targets=[q_proj,v_proj], or a regular expression of at most 200 characters "
            "with at most three repetitions and no repeated group"
        )
    reason = next((why for name, why in _UNSAFE_INITS.items() if lora.init.casefold().startswith(name)), None)
    if reason:
        yield f"model.lora_cfg.init={lora.init} {reason}: give {', '.join(_INITS)}"
    elif lora.init not in _INITS:
        yield f"model.lora_cfg.init={lora.init} is not a choice: it may be {', '.join(_INITS)}"
    if lora.init == "orthogonal" and lora.rank % 2:
        yield f"model.lora_cfg.init=orthogonal needs an even rank: give model.lora_cfg.rank={lora.rank + 1}"
    if any(layer < 0 for layer in lora.layers_to_transform):
        yield f"model.lora_cfg.layers_to_transform={lora.layers_to_transform}: layers are counted from 0"
    if unnamed := [name for name in lora.modules_to_save if not re.fullmatch(r"[\w.]+", name)]:
        yield f"model.lora_cfg.modules_to_save: {unnamed[0]!r} is not the name of a module: give for example [lm_head]"


def _model_problems(model: ModelConfig) -> Iterator[str]:
    lora = model.lora_cfg
    if lora is not None:
        yield from _lora_problems(lora)
    if model.quantization is not None and missing_modules(["bitsandbytes"]):
        yield not_installed(f"model.quantization={model.quantization}", ["bitsandbytes"], "quantization")
    if model.adapter is not None and (problem := adapter_problem(model.adapter)):
        yield problem
    yield from _new_token_problems(model)
    library = model.library_cfg
    if library.trust_remote_code and not _COMMIT.fullmatch(library.revision or ""):
        yield (
            "model.library_cfg.trust_remote_code=true runs Python code of the model's authors on this machine: "
            "pin what you have read with model.library_cfg.revision=<40-digit commit>"
        )


def _new_token_problems(model: ModelConfig) -> Iterator[str]:
    wrong = [text for text in model.extra_vocabulary if not text.strip() or text != text.strip() or len(text) > 100]
    if wrong:
        yield f"model.extra_vocabulary has {wrong[0][:40]!r}: give at most 100 characters, without spaces at the ends"
    if len(set(model.extra_vocabulary)) < len(model.extra_vocabulary):
        yield "model.extra_vocabulary has a text twice: give each once"


def _data_problems(data: DataConfig) -> Iterator[str]:
    if data.max_prompt_length >= data.max_length:
        yield (
            f"data.max_prompt_length={data.max_prompt_length} leaves no room for a response in "
            f"data.max_length={data.max_length}: give data.max_prompt_length={max(1, data.max_length * 3 // 4)}"
        )
    if data.validation_split + data.test_split >= 1:
        shares = f"data.validation_split={data.validation_split} and data.test_split={data.test_split}"
        yield f"{shares} leave no row to train on: their sum must be below 1"
    if data.template_args is not None:
        from sheeprlhf.utils.rendering import template_arg_problems

        yield from template_arg_problems(data.template_args)
    tags = data.reasoning_tags
    if len(tags) != 2 or not all(tags) or tags[0] == tags[1]:
        yield f"data.reasoning_tags={tags} must be two different texts: give for example {list(REASONING_TAGS)}"
    yield from _dataset_problems(data)
    if isinstance(data, MixDataConfig):
        yield from mix_problems(data)


def _dataset_problems(data: DataConfig) -> Iterator[str]:
    """Problems of the files and columns of one dataset."""
    if isinstance(data, LocalDataConfig):
        for key in ("train_file", "validation_file", "test_file"):
            if (path := getattr(data, key)) is not None:
                yield from data_file_problems(f"data.{key}", path)
    elif not isinstance(data, MixDataConfig) and (problem := dataset_problem(data.dataset_name)):
        yield problem
    if isinstance(data, LayoutDataConfig):
        yield from column_problems(data)


def mix_problems(data: MixDataConfig) -> Iterator[str]:
    """Problems of the datasets of a mixture."""
    example = "'data.mix=[{train_file: a.jsonl, weight: 3}, {dataset_name: owner/name, weight: 1}]'"
    if not isinstance(data.mix, list | tuple) or not data.mix or not all(isinstance(given, dict) for given in data.mix):
        yield f"data.mix={data.mix} is not a list of datasets: give for example {example}"
        return
    for number, given in enumerate(data.mix, 1):
        yield from (f"data.mix, dataset {number}: {problem}" for problem in _part_problems(data, given))
    if 0 < sum("weight" in given for given in data.mix) < len(data.mix):
        yield "data.mix has datasets with and without weight: give each a weight, or none"


def _part_problems(data: MixDataConfig, given: dict[str, Any]) -> Iterator[str]:
    """Problems of one dataset of a mixture; `given` has its options."""
    name = given.get("data", "local" if "train_file" in given else "hub")
    cls = choices("data").get(str(name))
    if cls is None or cls is MixDataConfig:
        others = ", ".join(name for name, of in choices("data").items() if of is not MixDataConfig)
        yield f"data={name} is not a dataset: give one of {others}"
        return
    if not {"train_file", "dataset_name", "data"} & set(given):
        yield "it has no rows: give train_file, dataset_name or data"
        return
    shared = {option.key for option in options(DataConfig())} - set(OF_A_MIXTURE[1:])
    own = {"data", "weight", *(option.key for option in options(cls()))} - shared - _OF_STREAMS
    unknown = sorted(str(key) for key in given if key not in own)
    for key in unknown:
        fix = did_you_mean(key, own, f"give data.{key} for all" if key in shared else "remove it")
        yield f"{key} is not an option of one dataset: {fix}"
    weight = given.get("weight", 1)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
        yield f"weight={weight} must be a positive number"
    if unknown:
        return
    try:
        [part] = datasets_of(replace(data, mix=(given,)))
    except ConfigError as error:
        yield str(error)
        return
    for option in options(part, "data."):
        if option.key.partition(".")[2] not in shared:
            yield from option_problems(option)
    yield from _dataset_problems(part)


def _optim_problems(optim: OptimizerConfig) -> Iterator[str]:
    if isinstance(optim, AdamW8bitConfig) and missing_modules(["bitsandbytes"]):
        yield not_installed("optim=adamw_8bit", ["bitsandbytes"], "8bit")
    betas = getattr(optim, "betas", (0.0, 0.0))
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        yield f"optim.betas={list(betas)} must be two numbers in [0, 1): give for example optim.betas=[0.9,0.999]"


def _task_problems(task: TrainTaskConfig | EvalTaskConfig) -> Iterator[str]:
    key = "task.early_stopping_metric"
    metric = task.early_stopping_metric if isinstance(task, TrainTaskConfig) else None
    if not isinstance(task, TrainTaskConfig) or metric is None or key.partition(".")[2] in task.unread:
        return
    if metric not in task.val_metrics and not (metric.startswith("scores/") and isinstance(task, OnlineTaskConfig)):
        did = did_you_mean(metric.removeprefix("val/"), task.val_metrics, "it", key=f"{key}=")
        advice = f"{did} may be {', '.join(task.val_metrics)}"
        yield f"{key}={metric} is not measured by task={task.config_name}: {advice}"


def _train_problems(config: TrainConfig) -> Iterator[str]:
    """Problems of a training: contradictory options, runs and folders."""
    name, starts_elsewhere = config.task.config_name, hasattr(config.task, "sft_experiment_dir")
    if isinstance(config.task, SFTConfig):  # without a run to start from, it trains the head only
        starts_elsewhere = config.task.sft_experiment_dir is not None
    if config.model.freeze_transformer and starts_elsewhere and config.task.trains != "reward model":
        yield unread("model.freeze_transformer=true", f"by task={name}", "model.finetune_mode=LORA")
    if config.data.reasoning == "mask" and config.task.trains == "reward model":
        yield unread("data.reasoning=mask", f"by task={name}, which scores whole responses", "data.reasoning=remove")
    if config.model.neftune_alpha is not None and not isinstance(config.task, SFTConfig):
        yield unread(f"model.neftune_alpha={config.model.neftune_alpha:g}", f"by task={name}")
    optim, warmup = config.optim, config.task.lr_warmup_ratio
    if optim.schedule == "wsd" and warmup + optim.decay_ratio > 1:
        both = f"task.lr_warmup_ratio={warmup:g} and optim.decay_ratio={optim.decay_ratio:g}"
        yield f"{both} are more than the whole run: their sum must be at most 1"
    yield from _step_problems(config)
    yield from start_problems(config)
    if config.task.trains == "reward model":
        yield from unread_options(config, "generation.stop_strings")
    if isinstance(config.task, OnlineTaskConfig):
        from sheeprlhf.config.reward_checks import online_problems

        yield from online_problems(config, config.task)
    else:
        yield from unread_options(config, "generation.engine", "reward")
        yield from _rollout_problems(config)
    if config.resume_from is not None and not Path(config.resume_from).is_dir():
        near = near_path(config.resume_from)
        did = f"did you mean resume_from={near}?" if near else "give that of an earlier run;"
        yield f"resume_from={config.resume_from} is not a directory: {did} `list runs` shows them"
    if not re.fullmatch(r"[^/\\\0]+", config.run_name) or config.run_name in (".", ".."):
        yield f"run_name={config.run_name} cannot name a directory: give a name without slashes"
    yield from new_folder_problems("root_dir", config.root_dir)
    yield from _log_problems(config)


def _step_problems(config: TrainConfig) -> Iterator[str]:
    """Problems of rows whose responses have steps, and of options that only these have."""
    data, task = config.data, config.task.config_name
    if isinstance(data, MixDataConfig) and any(mix_problems(data)):
        return
    found: list[str | None] = [getattr(of, "step_separator", None) for of in datasets_of(data)]
    separators = {one for one in found if one is not None}
    if not isinstance(config.task, PRMConfig):
        given = separators - {LayoutDataConfig.step_separator}
        yield from (unread(f"data.step_separator={one!r}", f"by task={task}", "task=prm") for one in sorted(given))
        return
    if None in found:
        yield f"data={data.config_name} has no steps with labels, which task=prm learns: give data=local or hub"
    elif len(separators) > 1:
        yield f"data.mix: the datasets have several values of step_separator ({sorted(separators)}): give all the same"
    elif not 0 < len(*separators) <= 100:
        yield "data.step_separator must be a text of 1 to 100 characters: give for example one line break, '\\n'"


def _rollout_problems(config: TrainConfig | InspectConfig) -> Iterator[str]:
    if config.rollout != LocalRolloutConfig():
        from sheeprlhf.config.reward_checks import environment_problems

        yield from environment_problems(config)


def _log_problems(config: TrainConfig) -> Iterator[str]:
    """Problems of experiment trackers: unknown, not installed, or without a login that they would ask for."""
    known = ("tensorboard", *TRACKER_MODULES)
    for name in config.log:
        if name not in known:
            did = did_you_mean(name, known, "it", key="log=[", end="]")
            yield f"log=[{name}] is unknown: {did} may have {', '.join(known)}"
        elif config.log.count(name) > 1:
            yield f"log has {name} more than once: give it once"
            return
        elif missing := missing_modules(TRACKER_MODULES.get(name, ())):
            yield not_installed(f"log=[{name}]", missing, name)
        elif name == "wandb" and not _has_wandb_login():
            yield "log=[wandb] has no API key: run `wandb login`, or set WANDB_API_KEY, or WANDB_MODE=offline"
    if config.log_project is not None and not set(config.log) & set(TRACKER_MODULES):
        where = f"by log=[{','.join(config.log)}]"
        yield unread(f"log_project={config.log_project}", where, "for example log=[tensorboard,wandb]")


def _has_wandb_login() -> bool:
    """Return True if wandb would not ask for a key: offline, or with one in the environment or in netrc."""
    environment = os.environ
    if environment.get("WANDB_MODE", "online").casefold() not in ("online", "run", "shared"):
        return True
    if environment.get("WANDB_API_KEY") or environment.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(environment.get("WANDB_BASE_URL") or "https://api.wandb.ai").netloc
    try:
        return netrc.netrc(environment.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def unread_options(config: TrainConfig | EvalConfig, *keys: str) -> Iterator[str]:
    """Those of `keys` (the engine, stop strings, the reward) that are set, though the task does not read them."""
    given = {
        "generation.engine": config.generation.engine if config.generation.engine != GenConfig.engine else None,
        "generation.stop_strings": list(config.generation.stop_strings),
        "reward": config.reward.config_name if config.reward != AutoRewardConfig() else None,
    }
    for key in keys:
        if given[key]:
            yield unread(f"{key}={given[key]}", f"by task={config.task.config_name}")


MAPPED = (  # data.rows.COLUMNS and STEPS
    *("prompt", "response", "chosen", "rejected", "responses", "margin", "messages", "label"),
    *("completions", "labels"),
)
EXTRAS = ("system", "tools")  # data.rows.CONVERSATION_EXTRAS


def column_problems(data: LayoutDataConfig) -> Iterator[str]:
    """Problems of `data.columns` and `data.ignore_columns`."""
    ignored = set(data.ignore_columns)
    users: dict[str, str] = {}
    if not isinstance(data.columns, dict | None):
        yield f"data.columns={data.columns} is not a mapping: give for example 'data.columns={{prompt: question}}'"
    for name, value in data.columns.items() if isinstance(data.columns, dict) else ():
        columns = [value] if isinstance(value, str) else value
        if name not in (*MAPPED, *EXTRAS):
            names = ", ".join((*MAPPED, *EXTRAS))
            yield f"data.columns.{name} is not a column that is read: give one or more of {names}"
            continue
        if not isinstance(columns, list) or not columns or not all(isinstance(c, str) and c for c in columns):
            yield f"data.columns.{name}={value} must be the name of a column, or a list of names to join"
            continue
        if len(columns) > 1 and name not in MAPPED[:4]:
            yield f"data.columns.{name}={value}: only texts are joined; give the name of one column"
        for column in columns:
            if column in ignored:
                yield f"data.columns.{name} names {column}, which data.ignore_columns leaves out: remove one of the two"
            if column in users:
                yield f"data.columns names {column} twice, in {users[column]} and {name}: give each column one use"
            users[column] = name
    if any(not name for name in data.ignore_columns):
        yield "data.ignore_columns has an empty name: remove it"


def _reward_problems(reward: RewardSourceConfig) -> Iterator[str]:
    if reward != AutoRewardConfig():
        from sheeprlhf.config.reward_checks import reward_problems

        yield from reward_problems(reward)


_OF_GROUP: dict[str, Callable[[Any], Iterator[str]]] = {
    "task": _task_problems,
    "generation": _generation_problems,
    "model": _model_problems,
    "data": _data_problems,
    "optim": _optim_problems,
    "reward": _reward_problems,
}

_READ_WITH = {  # options, separated by spaces, and the conditions without which nothing reads them
    "model.frozen_layers": "model.freeze_transformer=false",
    "model.extra_vocabulary": "model.resize_embeddings=true",
    "data.reasoning_tags": "data.reasoning=mask|remove",
    "fabric.replicas fabric.tensor_parallel fabric.offload": "fabric.strategy=fsdp2",
    "optim.decay_ratio": "optim.schedule=wsd",
    "reward.short_penalty": "reward.min_response_length",
    "reward.uncertainty_coeff": "reward.combine=uncertainty",
    "rollout.max_turns rollout.step_timeout rollout.num_processes rollout.max_result_length": "rollout.environment",
    "rollout.sync_dir": "rollout.sync!=nccl",
    "task.epochs": "data.streaming=false",
    "task.early_stopping_patience task.early_stopping_direction": "task.early_stopping_metric",
    "task.label_smoothing": "task.loss_type=sigmoid|robust|exo|aot|aot_unpaired",
    "task.simpo_gamma": "task.loss_type=simpo",
    "task.discopop_tau": "task.loss_type=discopop",
    "task.f_divergence": "task.loss_type=sigmoid|sigmoid_norm|robust|exo|hinge|discopop",  # losses of d = h_w - h_l
    "task.f_alpha": "task.f_divergence=alpha",
    "task.ld_alpha": "task.loss_type!=ipo|sigmoid_norm|simpo|orpo",
    "task.use_weighting": "task.loss_type!=aot|aot_unpaired",
    "task.ref_sync_interval": "task.loss_type!=simpo|orpo task.reference_free=false",
    "task.ref_mixup_alpha": "task.ref_sync_interval",
    "task.critic_warmup_steps": "task.share_trunk=false",
    "task.ptx_batch_size": "task.ptx_coeff",
}
_LORA, _FSDP, _DDP = "model.finetune_mode=LORA", "fabric.strategy=fsdp2", "fabric.strategy=ddp"
_VLLM, _ALL = "rollout.config_name=vllm", "model.finetune_mode=ALL"
_MIXED = "fabric.precision=bf16-mixed"
_CONFLICTS = (  # two conditions that exclude each other, the reason where it is not plain, and the fix
    (_LORA, "model.lora_cfg=null", "", f"remove model.lora_cfg=null or give {_ALL}"),
    (_LORA, "model.freeze_transformer", "it leaves no layer for adapters", f"give {_ALL}"),
    (_LORA, "model.frozen_layers", "", "give model.lora_cfg.layers_to_transform=<numbers of layers>"),
    (_LORA, "model.random_init", "adapters need trained weights", f"give {_ALL}"),
    (f"{_LORA} model.resize_embeddings", "model.adapter", "it lacks the new rows", f"remove one, or give {_ALL}"),
    ("model.random_init", "model.adapter", "it fits other weights", "remove one of them"),
    ("model.random_init", "model.quantization", "it needs weights of files", "give model.random_init=false"),
    ("model.resize_embeddings", "model.frozen_layers", "new rows would not train", "give model.frozen_layers=0"),
    ("model.resize_embeddings", "model.freeze_transformer", "new rows would not train", "give one of the two"),
    ("model.quantization", "fabric.precision=64-true", "", "give fabric.precision=32-true"),
    (_FSDP, "model.quantization", "shards lose the scales of the weights", f"give {_DDP}"),
    (_FSDP, "optim.config_name=adamw_8bit", "", f"give optim=adamw, or {_DDP}"),
    (f"{_FSDP} {_LORA}", "model.resize_embeddings", "", f"give {_DDP}, or {_ALL}"),
    (f"{_FSDP} {_LORA}", "model.lora_cfg.use_dora", "not tested", f"give {_DDP}"),
    (f"{_FSDP} {_LORA}", "model.lora_cfg.modules_to_save", "not tested", f"give {_DDP}"),
    (_FSDP, "fabric.precision=64-true", "", "give fabric.precision=32-true"),
    ("generation.do_sample", "generation.num_beams!=1", "one samples, one searches", "give generation.num_beams=1"),
    ("task.config_name=best_of_n|reward|frontier", "reward.normalize", "scores change", "give reward.normalize=false"),
    ("task.data_split=reward", "data.reward_model_split=0", "it is empty", "give another split"),
    ("rollout.environment", "generation.num_beams!=1", "", "remove one of them"),
    ("reward.step_score=each", "reward.normalize", "it is of whole responses", "remove one of them"),
    ("reward.step_score=each", "reward.clip!=null", "it is of whole responses", "remove one of them"),
    ("reward.step_score=each", "reward.combine!=sum", "there is no single score", "give reward.combine=sum"),
    ("reward.min_response_length", "reward.short_penalty=0", "it costs nothing", "give reward.short_penalty=1"),
    (_VLLM, "model.quantization", "", "remove it"),
    (_VLLM, "generation.engine!=native", "", "remove it"),
    (f"{_VLLM} {_LORA}", "model.resize_embeddings", "", f"give {_ALL}"),
    (f"{_VLLM} {_LORA}", "model.lora_cfg.use_dora", "", "give model.lora_cfg.use_dora=false"),
    (f"{_VLLM} {_LORA}", "model.lora_cfg.modules_to_save", "", "give model.lora_cfg.modules_to_save=[]"),
    ("rollout.sync=nccl", "fabric.accelerator!=cuda", "", "give rollout.sync=folder or fabric=auto_cuda"),
    ("rollout.max_staleness", "task.max_resamples", "it takes the newest weights", "give rollout.max_staleness=0"),
    ("task.group_baseline", "task.num_generations=1", "it compares", "give for example task.num_generations=4"),
    ("task.pin_memory", "fabric.accelerator=cpu", "a CPU copies nothing", "remove task.pin_memory"),
    ("task.ema_decay", "model.dtype!=float32", "rounding loses it", f"give model.dtype=float32 {_MIXED}"),
    ("task.ema_decay", "fabric.precision=bf16-true|16-true", "rounding loses it", f"give {_MIXED}"),
    ("task.config_name=ilql", "fabric.precision=bf16-true|16-true", "rounding loses its targets", f"give {_MIXED}"),
    ("optim.nesterov", "optim.momentum=0", "", "give for example optim.momentum=0.9"),
    ("task.max_ratio", "task.loss_type=cispo", "it has task.clip_high", "remove task.max_ratio"),
    ("task.loss_type=exo", "task.label_smoothing=0", "", "give for example task.label_smoothing=0.001"),
    ("task.lr_warmup_steps", "task.lr_warmup_ratio", "both give the warm-up", "remove one of them"),
)
_TRAIN_CONFLICTS = (
    ("task.config_name=ilql", _LORA, "", f"give {_ALL}"),
    ("model.quantization", "model.finetune_mode=ALL", "they cannot be trained", "give model.finetune_mode=LORA"),
    ("model.adapter", "task.sft_experiment_dir", "these are two starts", "give one of them"),
    ("data.reasoning=mask", "task.completion_only_loss=false", "that learns all tokens", "give one of the two"),
    ("data.streaming", "task.max_num_steps=null", "the number of rows is unknown", "give task.max_num_steps"),
    ("rollout.environment", "generation.engine!=native", "", "give generation.engine=native"),
    ("data.streaming", "task.config_name=best_of_n", "it reads each prompt once", "remove data.streaming"),
    ("data.streaming", "reward.template=chat", "it needs all rows before training", "give reward.template=plain"),
    ("data.reasoning!=train", "task.config_name=prm", "", "remove data.reasoning"),
    (
        "data.reward_model_split=1",
        "task.config_name=sft",
        "no row is left",
        "give for example data.reward_model_split=0.5",
    ),
    ("resume", "resume_from", "these are two runs", "give one of them"),
)
