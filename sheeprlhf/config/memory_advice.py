"""Advice on options that reduce memory, with their next values. Pure functions of the configuration."""

from collections.abc import Iterator
from typing import Any

from sheeprlhf.config.command_words import option_word, shell_word
from sheeprlhf.config.processes import rows_of_pass
from sheeprlhf.config.registry import NOT_IN_HASH, replace_options
from sheeprlhf.config.validate import contradictions
from sheeprlhf.structure.run import EvalConfig, TrainConfig
from sheeprlhf.structure.task import TrainTaskConfig
from sheeprlhf.utils.memory import missing_modules

Change = dict[str, Any]
"""Options by their full name and the values to give them, all together."""


def memory_reductions(config: TrainConfig | EvalConfig, phase: str = "forward pass") -> list[Change]:
    """Changes that reduce the memory of `phase` (see `utils.memory`); the mildest first, empty if none is left."""
    if phase == "generation":
        changes = list(_smaller_generation(config))
    elif isinstance(config, EvalConfig):
        changes = list(_smaller_evaluation(config))
    else:
        of_rows = [] if phase in ("loading the model", "optimizer step") else list(_smaller_forward(config))
        changes = of_rows + list(_smaller_model(config, phase))
    return [change for change in changes if not any(contradictions(replace_options(config, change)))]


def words(change: Change) -> str:
    """A change as it is typed."""
    return " ".join(option_word(key, value) for key, value in change.items())


def advice(config: TrainConfig | EvalConfig, phase: str, place: str | None) -> Iterator[str]:
    """Advice after memory ran out in `phase`, one sentence each; the run in `place`, if there is one, can continue."""
    changes = memory_reductions(config, phase)
    if place is None:
        if changes:
            yield f"give {_alternatives(changes)}"
    else:
        kept = [change for change in changes if change.keys() <= NOT_IN_HASH]
        others = [change for change in changes if change not in kept]
        again = "resume=true" if isinstance(config, TrainConfig) and config.resume else shell_word("resume_from", place)
        then = f" and {_alternatives(kept)}" if kept else " when there is more memory"
        yield f"repeat the command with {again}{then}: the run continues from its last checkpoint, if it has one"
        if others:
            yield f"or start anew with {_alternatives(others)}"
    if not changes:
        yield "no option is left that would need less: take a smaller model, or a machine with more memory"


def _alternatives(changes: list[Change]) -> str:
    return ("one of " if len(changes) > 1 else "") + ", ".join(words(change) for change in changes)


def _smaller_forward(config: TrainConfig) -> Iterator[Change]:
    task, data = config.task, config.data
    row = task.row_tokens(data.max_length)
    rows = rows_of_pass(config, row)
    if rows > 1:
        yield _fewer_rows(task, rows // 2, row)
    if not config.model.gradient_checkpointing:
        yield {"model.gradient_checkpointing": True}
    if config.fabric.precision in ("32-true", "64-true"):
        yield {"fabric.precision": "bf16-mixed"}
    if rows == 1 and data.max_length >= 64:
        shorter = data.max_length // 2
        yield {"data.max_length": shorter, "data.max_prompt_length": min(data.max_prompt_length, shorter * 3 // 4)}


def _fewer_rows(task: TrainTaskConfig, rows: int, row: int) -> Change:
    """Limit the rows of a forward pass, of `row` tokens each, by the option that limits them more now."""
    group = getattr(task, "num_generations", 1)
    if task.micro_batch_size // group * row <= task.token_budget:
        return {"task.micro_batch_size": rows * group}
    halved = task.token_budget // 2  # may have no effect: mini_batch_size and the number of processes limit rows too
    return {"task.token_budget": halved if halved // row <= rows else rows * row}


def _smaller_model(config: TrainConfig, phase: str) -> Iterator[Change]:
    model = config.model
    if model.finetune_mode == "ALL" and model.lora_cfg is not None:
        if not model.random_init and not model.freeze_transformer:
            adapters: Change = {"model.finetune_mode": "LORA"}
            halved = phase == "loading the model" and model.dtype == "float32"
            yield adapters | {"model.dtype": "bfloat16"} if halved else adapters
    elif model.finetune_mode == "LORA" and model.lora_cfg is not None:
        if model.dtype == "float32":
            yield {"model.dtype": "bfloat16"}  # the frozen weights; adapters stay float32
        elif model.quantization is None and config.fabric.strategy != "fsdp2" and not missing_modules(["bitsandbytes"]):
            yield {"model.quantization": "nf4"}
        if phase == "optimizer step" and model.lora_cfg.rank > 1:
            yield {"model.lora_cfg.rank": model.lora_cfg.rank // 2}


def _smaller_generation(config: TrainConfig | EvalConfig) -> Iterator[Change]:
    generation = config.generation
    if generation.num_beams > 1:
        yield {"generation.num_beams": generation.num_beams // 2}
    if generation.max_new_tokens > 1:
        most = generation.max_new_tokens // 2
        penalised = {"reward.overlong_buffer": most} if config.reward.overlong_buffer > most else {}
        yield {"generation.max_new_tokens": most} | penalised
    if isinstance(config, EvalConfig):
        yield from _smaller_evaluation(config)
    elif (shown := getattr(config.task, "num_sample_prompts", 0)) > 0:
        yield {"task.num_sample_prompts": shown // 2}


def _smaller_evaluation(config: EvalConfig) -> Iterator[Change]:
    task = config.task
    row = config.data.max_length if config.data is not None else 1
    if task.token_budget // 2 >= row:
        yield {"task.token_budget": task.token_budget // 2}
    if task.mini_batch_size > 1:
        yield {"task.mini_batch_size": task.mini_batch_size // 2}
    if config.fabric.precision in ("32-true", "64-true"):
        yield {"fabric.precision": "bf16-mixed"}
