"""The memory plan of a task's step: how large its forward passes are, and what kind of model they need."""

import dataclasses
from collections.abc import Callable

from sheeprlhf.model.memory import MemoryPlan, ModelSize, allocator_share, measure, plan, tokens_of_forward
from sheeprlhf.structure.reward import model_sources
from sheeprlhf.structure.rollout import BestOfNConfig, OnlineTaskConfig, PPOConfig
from sheeprlhf.structure.run import TrainConfig


def step_plan(
    config: TrainConfig, *, device: str, size_of: Callable[..., ModelSize] = measure, holes: bool = True
) -> MemoryPlan:
    """Memory that one process needs for a step on a device, "cpu" or "cuda".

    `size_of` is `measure`, or remembers its results; `holes` counts those that the allocator leaves.

    Raises:
        ModelError: the model cannot be measured.
    """
    model = dataclasses.replace(config.model, gradient_checkpointing=False)  # one measurement does for both
    size = size_of(model, config.fabric.precision, config.task.trains == "reward model")
    rows, row = rows_of_forward(config, size)
    parts = plan(
        size,
        config.optim,
        tokens=rows * row,
        checkpointing=config.model.gradient_checkpointing,
        allocator_share=allocator_share(device, config.model.finetune_mode) if holes else 0.0,
    )
    if isinstance(config.task, BestOfNConfig):  # it only computes forward
        parts = parts._replace(gradients=0, optimizer=0)
    return parts._replace(others=_others(config, size, parts.optimizer))


def _others(config: TrainConfig, size: ModelSize, optimizer: int) -> int:
    """Bytes of reference, reward model, critic and average, each as large as the policy; as adapters they share a base.

    Policy and critic learn one after the other, so there are gradients of one at a time.
    """
    task = config.task
    if not isinstance(task, OnlineTaskConfig):
        return 0
    scored = len(model_sources(config.reward, config.data.rule_reward))
    critic = isinstance(task, PPOConfig) and not task.share_trunk
    average = isinstance(task, PPOConfig) and task.ema_decay is not None
    if config.model.finetune_mode == "LORA":
        return size.trainable * (scored + critic + average) + optimizer * critic
    reference = not isinstance(task, BestOfNConfig)
    return size.weights * (reference + scored + critic + average) + optimizer * critic


def rows_of_forward(config: TrainConfig, size: ModelSize) -> tuple[int, int]:
    """Largest number of rows of a forward pass if all have the maximum length, and that length, in tokens."""
    row = config.task.row_tokens(min(config.data.max_length, size.positions or config.data.max_length))
    return tokens_of_forward(config.task, row) // row, row
