"""The memory plan of a task's step: how large its forward passes are, and what kind of model they need."""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

from sheeprlhf.config.validate import parse_devices
from sheeprlhf.model.attention import most_kept_keys
from sheeprlhf.model.memory import MemoryPlan, ModelSize, allocator_share, measure, plan, tokens_of_forward
from sheeprlhf.structure.model import AutoModelConfig
from sheeprlhf.structure.reward import model_sources
from sheeprlhf.structure.rollout import BestOfNConfig, DistillConfig, OnlineTaskConfig, PPOConfig, VLLMRolloutConfig
from sheeprlhf.structure.run import FabricConfig, TrainConfig
from sheeprlhf.structure.task import DPOConfig, ILQLConfig

SHARDED = ("weights", "gradients", "optimizer", "others")  # parts of the plan that fsdp2 cuts up


def step_plan(
    config: TrainConfig, *, device: str, size_of: Callable[..., ModelSize] = measure, holes: bool = True
) -> MemoryPlan:
    """Memory of a process for a step on "cpu" or "cuda", with the allocator's `holes`. Raises ModelError."""
    model = dataclasses.replace(config.model, gradient_checkpointing=False)  # one measurement does for both
    size = size_of(model, config.fabric.precision, config.task.trains == "reward model")
    if isinstance(config.task, ILQLConfig):
        size = _with_q_heads(size, config.task.num_q_heads)
    rows, row = rows_of_forward(config, size)
    longest = min(config.data.max_length, size.positions or config.data.max_length)
    parts = plan(
        size,
        config.optim,
        tokens=rows * row,
        checkpointing=config.model.gradient_checkpointing,
        allocator_share=allocator_share(device, config.model.finetune_mode) if holes else 0.0,
        keys=most_kept_keys(longest) if device == "cpu" and config.task.batching != "padded" else 0,
    )
    if isinstance(config.task, BestOfNConfig):  # it only computes forward
        parts = parts._replace(gradients=0, optimizer=0)
    others = _others(config, size, parts.optimizer)
    if config.task.async_checkpoints and device == "cpu":  # the copy that is written
        others += size.trainable + parts.optimizer
    if isinstance(config.task, DistillConfig):
        teacher = AutoModelConfig(repo_name=config.task.teacher)
        others += size_of(teacher, config.fabric.precision, False).weights
    return _sharded(parts._replace(others=others), config, size, device)


def _with_q_heads(size: ModelSize, num_heads: int) -> ModelSize:
    """The size with heads of Q and their targets (as the language head, in float32) and V, for each token too."""
    heads, width = num_heads * size.head, size.head // size.vocabulary
    return size._replace(
        parameters=size.parameters + heads,
        weights=size.weights + 4 * (2 * heads + width + 1),
        trainable=size.trainable + 4 * (heads + width + 1),
        trainable_tensors=size.trainable_tensors + num_heads + 2,
        trainable_numbers=size.trainable_numbers + heads + width + 1,
        per_token=size.per_token + 4 * width * num_heads,
        checkpointed=size.checkpointed + 4 * width * num_heads,
    )


def _others(config: TrainConfig, size: ModelSize, optimizer: int) -> int:
    """Bytes of reference, reward model, critic and average, each as large as the policy; as adapters they share a base.

    Tasks with a fixed dataset have a reference model with `data.streaming` only. A teacher is counted elsewhere.

    Policy and critic learn one after the other, so there are gradients of one at a time.
    """
    task = config.task
    if not isinstance(task, OnlineTaskConfig):
        is_lora = config.model.finetune_mode == "LORA"
        moves = isinstance(task, DPOConfig) and task.ref_sync_interval is not None  # a copy of what trains
        kept = getattr(config.data, "streaming", False) and task.has_fixed_reference() and not is_lora
        return moves * (size.trainable if is_lora else size.weights) + kept * size.weights
    scored = len(model_sources(config.reward, config.data.rule_reward))
    critic = isinstance(task, PPOConfig) and not task.share_trunk
    average = isinstance(task, PPOConfig) and task.ema_decay is not None
    if config.model.finetune_mode == "LORA":
        return size.trainable * (scored + critic + average) + optimizer * critic
    reference = not isinstance(task, BestOfNConfig | DistillConfig)
    return size.weights * (reference + scored + critic + average) + optimizer * critic


class Ranks(NamedTuple):
    """Shares of the weights that the processes of a run hold."""

    total: int  # all processes
    shards: int  # processes that hold one copy of the weights together; 1 without fsdp2
    tensor: int  # processes that compute the same rows
    gather_bytes: int  # of a gathered number
    reduce_bytes: int  # of a number of a reduced gradient


def ranks_of(fabric: FabricConfig) -> Ranks:
    """The processes that a configuration asks for; `fabric.devices=auto` counts as one on each machine."""
    devices = parse_devices(fabric.devices)
    per_node = len(devices) if isinstance(devices, list) else devices if isinstance(devices, int) else 1
    total = (fabric.num_nodes or 1) * per_node
    half, mixed = fabric.precision.endswith("16-true"), fabric.precision == "bf16-mixed"
    sharded = fabric.strategy == "fsdp2"
    return Ranks(
        total=total,
        shards=total // fabric.replicas if sharded else 1,
        tensor=fabric.tensor_parallel,
        gather_bytes=2 if half or mixed else 4,
        reduce_bytes=2 if half else 4,
    )


def computed(numbers: int, size: ModelSize, ranks: Ranks) -> int:
    """Of so many weights, those around the blocks first, the number that a rank computes with."""
    return numbers - max(0, numbers - size.outside) * (ranks.tensor - 1) // ranks.tensor


def passes_of_rank(config: TrainConfig, size: ModelSize) -> tuple[int, int]:
    """Rows of a rank in an optimizer step, at most, and the forward and backward passes that they take."""
    step, ranks = config.task.mini_batch_size // getattr(config.task, "num_generations", 1), ranks_of(config.fabric)
    rows = math.ceil(step * ranks.tensor / ranks.total)
    return rows, math.ceil(rows / rows_of_forward(config, size)[0])


def _sharded(parts: MemoryPlan, config: TrainConfig, size: ModelSize, device: str) -> MemoryPlan:
    """The plan of one of several processes that share one copy of the weights.

    Whole at the worst moment: the weights around the blocks, those of two blocks, the second being fetched ahead, and
    the gradients of one; with several passes in a step the gradients of all, which are reduced after the last pass.
    The built-in sampler gathers all weights. Gathered weights are in the format of the computation already. With tensor
    parallelism, a process gathers its share of the blocks only; activations are counted as if it computed them all.
    """
    ranks, trains = ranks_of(config.fabric), size.trainable_numbers if parts.gradients else 0
    if ranks.shards == 1:
        return parts
    samples = isinstance(config.task, OnlineTaskConfig) and not isinstance(config.rollout, VLLMRolloutConfig)
    whole = computed(size.parameters if samples else size.outside + 2 * size.block, size, ranks)
    several = passes_of_rank(config, size)[1] > 1
    gradients = computed(trains, size, ranks) if several else min(size.block, trains) // ranks.tensor
    held = {name: -(-getattr(parts, name) // ranks.shards) for name in SHARDED}
    if isinstance(config.task, ILQLConfig):  # the target heads are whole on every rank
        held["weights"] += 4 * config.task.num_q_heads * size.head * (ranks.shards - 1) // ranks.shards
    if config.fabric.offload == "cpu" and device == "cuda":
        held = dict.fromkeys(SHARDED, 0)
    casts = min(size.fixed, 2 * size.parameters) if config.fabric.precision == "bf16-mixed" else 0
    return parts._replace(
        **held,
        activations=parts.activations - casts,
        gathered=whole * ranks.gather_bytes + gradients * ranks.reduce_bytes,
    )


def rows_of_forward(config: TrainConfig, size: ModelSize) -> tuple[int, int]:
    """Largest number of rows of a forward pass if all have the maximum length, and that length, in tokens."""
    row = config.task.row_tokens(min(config.data.max_length, size.positions or config.data.max_length))
    return tokens_of_forward(config.task, row) // row, row
