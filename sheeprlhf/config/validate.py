"""Validation of a configuration before any slow work: reports all problems together, with key, value and fix."""

import ast
import re
from collections.abc import Callable, Iterator
from typing import Any

from sheeprlhf.config.data_checks import column_problems
from sheeprlhf.config.eval_checks import eval_problems
from sheeprlhf.config.model_lookup import needs_base_model
from sheeprlhf.config.option_checks import option_problems
from sheeprlhf.config.path_checks import data_file_problems, model_problem, new_folder_problems, template_problem
from sheeprlhf.config.registry import choices, options
from sheeprlhf.config.reward_checks import reward_problems
from sheeprlhf.config.task_checks import task_problems, train_problems
from sheeprlhf.config.template_args import template_arg_problems
from sheeprlhf.structure.data import DataConfig, LocalDataConfig
from sheeprlhf.structure.fabric import FabricConfig
from sheeprlhf.structure.generation import GenConfig
from sheeprlhf.structure.model import ModelConfig
from sheeprlhf.structure.optim import OptimizerConfig, SGDConfig
from sheeprlhf.structure.run import EvalConfig, FetchConfig, InspectConfig, RootConfig, TrainConfig
from sheeprlhf.utils.hardware import cuda_problem
from sheeprlhf.utils.home import cache_place

_COMMIT = re.compile(r"[0-9a-f]{40}")


def validate(config: RootConfig) -> list[str]:
    """Every problem of a typed configuration, one sentence each; empty if it can run."""
    return list(_problems(config))


def _problems(config: RootConfig) -> Iterator[str]:
    for option in options(config):
        yield from option_problems(option)
    for group in ("task", "data", "fabric", "optim", "reward"):
        yield from _name_problems(group, getattr(config, group, None))
    for group, problems in _OF_GROUP.items():
        if getattr(config, group, None) is not None:
            yield from problems(getattr(config, group))
    yield from _repo_problems(config)
    if isinstance(config, TrainConfig):
        yield from train_problems(config)
    elif isinstance(config, EvalConfig):
        yield from eval_problems(config)
    elif isinstance(config, InspectConfig):
        yield from new_folder_problems("output_dir", config.output_dir)
    elif isinstance(config, FetchConfig):
        yield from _cache_problems("cache_dir", config.cache_dir)
    if isinstance(config, TrainConfig | EvalConfig | InspectConfig) and config.data is not None:
        yield from _cache_problems("data.cache_dir", config.data.cache_dir)


def _cache_problems(key: str, cache_dir: str | None) -> Iterator[str]:
    place = cache_place(cache_dir, key)
    for problem in new_folder_problems(place.key, place.path):
        yield problem if place.key == key else f"{problem}, or {key}=<folder>"


def _repo_problems(config: RootConfig) -> Iterator[str]:
    model: ModelConfig | None = getattr(config, "model", None)
    if model is not None:
        if isinstance(config, EvalConfig) and not needs_base_model(config):
            return
        from_run = isinstance(config, EvalConfig) and config.experiment_dir is not None
        reads_weights = isinstance(config, TrainConfig | EvalConfig) and not from_run
        problem = model_problem(model.repo_name, weights=reads_weights and not model.random_init)
        if problem and isinstance(config, EvalConfig) and from_run:
            problem += f" (task={config.task.config_name} reads the model that the run was trained from)"
        if problem:
            yield problem
        if model.chat_template is not None:
            problem = template_problem(model.chat_template)
            if problem:
                yield problem


def _name_problems(group: str, config: Any) -> Iterator[str]:
    """A saved run is read back by this name, so only the class's own will do (a model has one schema: any name)."""
    if config is not None and choices(group).get(config.config_name) is not type(config):
        own = type(config).config_name
        yield f"{group}.config_name={config.config_name} cannot be changed: leave {group}.config_name={own}"


def _fabric_problems(fabric: FabricConfig) -> Iterator[str]:
    try:
        devices = parse_devices(fabric.devices)
    except ValueError:
        devices = None
        yield f"fabric.devices={fabric.devices} cannot be read: give a number, auto, or a list such as '0,1'"
    if fabric.accelerator == "cuda":
        problem = cuda_problem(devices)
        if problem:
            yield problem
    if fabric.accelerator == "cpu" or (fabric.accelerator == "auto" and cuda_problem(devices)):
        if fabric.precision == "16-true":
            yield "fabric.precision=16-true needs a CUDA device: give fabric.precision=bf16-mixed"
        if isinstance(devices, list):
            yield f"fabric.devices={fabric.devices} names devices, which a CPU has not: give a number of processes"
    if fabric.precision == "16-mixed":  # its loss scale begins too high on purpose: the first steps are not finite
        yield "fabric.precision=16-mixed is not supported: give fabric.precision=bf16-mixed or 32-true"


def parse_devices(value: str | None) -> int | str | list[int]:
    """`fabric.devices` as Fabric takes it: "2" -> 2, "auto" -> "auto", "0,1" or "[0,1]" -> [0, 1], None -> 1.

    Raises:
        ValueError: it is none of these.
    """
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
    if generation.num_beams > 1 and generation.do_sample:
        yield (
            f"generation.num_beams={generation.num_beams} searches and generation.do_sample=true samples: "
            "give generation.num_beams=1 or generation.do_sample=false"
        )
    if "" in generation.stop_strings:
        yield "generation.stop_strings has an empty text, which ends every response at once: remove it"


def parse_targets(value: Any) -> str | list[str]:
    """`lora_cfg.targets` as PEFT takes it: "all-linear", or a list of module names.

    A list may also be written as `a,b` or as Python's `"('a','b')"`.

    Raises:
        ValueError: it is none of these, or empty.
    """
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
    if not all(isinstance(name, str) and re.fullmatch(r"[\w.]+", name) for name in value):
        raise ValueError(value)
    return list(value)


def _model_problems(model: ModelConfig) -> Iterator[str]:
    lora = model.lora_cfg
    if lora is not None:
        try:
            parse_targets(lora.targets)
        except ValueError:
            yield (
                f"model.lora_cfg.targets={lora.targets} cannot be read: give all-linear, "
                "or names such as model.lora_cfg.targets=[q_proj,v_proj]"
            )
    if model.finetune_mode == "LORA":
        if lora is None:
            yield "model.finetune_mode=LORA needs model.lora_cfg: remove model.lora_cfg=null or give finetune_mode=ALL"
        if model.freeze_transformer:
            yield "model.freeze_transformer=true leaves no layer for adapters: give model.finetune_mode=ALL"
        if model.random_init:
            yield "model.random_init=true has nothing for adapters to adapt: give model.finetune_mode=ALL"
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
        yield (
            f"model.extra_vocabulary has {wrong[0][:40]!r}: give texts of at most 100 characters, without spaces at "
            "their ends"
        )
    if len(set(model.extra_vocabulary)) < len(model.extra_vocabulary):
        yield "model.extra_vocabulary has a text twice: give each once"
    if model.extra_vocabulary and not model.resize_embeddings:
        yield "model.extra_vocabulary needs rows in the model: give model.resize_embeddings=true"
    if model.resize_embeddings and model.freeze_transformer:
        yield (
            "model.freeze_transformer=true leaves the rows of new tokens untrained: give "
            "model.freeze_transformer=false, or model.resize_embeddings=false"
        )


def _data_problems(data: DataConfig) -> Iterator[str]:
    if data.max_prompt_length >= data.max_length:
        yield (
            f"data.max_prompt_length={data.max_prompt_length} leaves no room for a response in "
            f"data.max_length={data.max_length}: give data.max_prompt_length={max(1, data.max_length * 3 // 4)}"
        )
    if data.validation_split + data.test_split >= 1:
        yield (
            f"data.validation_split={data.validation_split} and data.test_split={data.test_split} leave no row to "
            "train on: their sum must be below 1"
        )
    yield from template_arg_problems(data.template_args)
    if isinstance(data, LocalDataConfig):
        for key in ("train_file", "validation_file", "test_file"):
            path = getattr(data, key)
            if path is not None:
                yield from data_file_problems(f"data.{key}", path)
        yield from column_problems(data)


def _optim_problems(optim: OptimizerConfig) -> Iterator[str]:
    if isinstance(optim, SGDConfig) and optim.nesterov and optim.momentum == 0:
        yield "optim.nesterov=true needs momentum: give optim.momentum=0.9 or optim.nesterov=false"
    betas = getattr(optim, "betas", (0.0, 0.0))
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        yield f"optim.betas={list(betas)} must be two numbers in [0, 1): give for example optim.betas=[0.9,0.999]"


_OF_GROUP: dict[str, Callable[[Any], Iterator[str]]] = {
    "task": task_problems,
    "fabric": _fabric_problems,
    "generation": _generation_problems,
    "model": _model_problems,
    "data": _data_problems,
    "optim": _optim_problems,
    "reward": reward_problems,
}
