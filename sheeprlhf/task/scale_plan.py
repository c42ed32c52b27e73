"""The plan of an optimizer step: memory, and over many devices traffic and time, and a dry run that checks both.

Memory is that of its largest forward passes and of the models that the task needs.

With P parameters of which Q train, B parameters in the blocks of the decoder, s ranks that share one copy of the
weights, r such groups and m forward and backward passes of a rank, a rank receives or sends in a step

    gather       m (P + B) (s - 1) / s numbers: a block's weights before its forward and again before its backward pass,
                 the weights around the blocks once
    reduce       Q (s - 1) / s numbers: gradients, after the last pass
    all-reduce   2 (Q / s) (r - 1) / r numbers: gradients between the groups; without fsdp2, s = 1

and computes 2 P operations a token forward, 2 P for the gradients of activations, 2 Q for those of weights, and 2 P
where gradient checkpointing repeats the forward pass; attention scores are left out. Of t tensor-parallel ranks, each
gathers, reduces and computes with 1 / t of the weights in the blocks, among s / t ranks, and with all of those that a
group does not cut up (norms, one matrix of each adapter); the activations that they add up are left out. Only the
policy's optimizer step is counted: no sampling, no scores, no validation, no checkpoint.
"""

import dataclasses
import math
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from sheeprlhf.config.model_lookup import is_on_base_of, reads_chat, reward_model_source, whole_model
from sheeprlhf.config.processes import num_processes, rows_of_pass, rows_of_rank
from sheeprlhf.engine.optim import build_optimizer
from sheeprlhf.engine.ranks import make_mesh
from sheeprlhf.engine.shard import shard_module, sharding_options, uncut_weights
from sheeprlhf.model.attention import most_kept_keys
from sheeprlhf.model.memory import (
    MIXED,
    MemoryPlan,
    ModelSize,
    allocator_share,
    build_on_meta,
    measure,
    plan,
)
from sheeprlhf.structure.model import AutoModelConfig
from sheeprlhf.structure.reward import model_sources
from sheeprlhf.structure.rollout import BestOfNConfig, DistillConfig, OnlineTaskConfig, PPOConfig, VLLMRolloutConfig
from sheeprlhf.structure.run import ClusterConfig, DoctorConfig, FabricConfig, TrainConfig
from sheeprlhf.structure.task import DPOConfig, ILQLConfig
from sheeprlhf.utils.errors import SheepError
from sheeprlhf.utils.processes import interrupts_wait

SHARDED = ("weights", "gradients", "optimizer", "others")  # parts of the plan that fsdp2 cuts up
_TOKENS = 8  # of the dry run: traffic and state do not depend on them
_KINDS = {"_allgather_base_": "gather", "_reduce_scatter_base_": "reduce", "allreduce_": "all_reduce"}


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
    others = _others(config, size, parts.optimizer, size_of)
    if config.task.async_checkpoints and device == "cpu":  # the copy that is written
        others += size.trainable + parts.optimizer
    if isinstance(config.task, DistillConfig):
        teacher = AutoModelConfig(repo_name=config.task.teacher)
        others += size_of(teacher, config.fabric.precision, False).weights
    return _sharded(parts._replace(others=others), config, size, device)


def _with_q_heads(size: ModelSize, num_heads: int) -> ModelSize:
    """The size with heads of Q and their targets (as the language head, in float32) and V, for each token too."""
    heads, width = num_heads * size.head, size.head // size.vocabulary
    others = (num_heads + 1) * width + 1
    return size._replace(
        parameters=size.parameters + heads,
        weights=size.weights + 4 * (2 * heads + others),
        trainable=size.trainable + 4 * (heads + others),
        trainable_tensors=size.trainable_tensors + num_heads + 3,
        trainable_numbers=size.trainable_numbers + heads + others,
        per_token=size.per_token + 4 * width * num_heads,
        checkpointed=size.checkpointed + 4 * width * num_heads,
    )


def _others(config: TrainConfig, size: ModelSize, optimizer: int, size_of: Callable[..., ModelSize]) -> int:
    """Bytes of reference, reward models, critic and average.

    All but reward models are as large as the policy, or with adapters share its base. Tasks with a fixed dataset have
    a reference model with `data.streaming` only. A teacher is counted elsewhere.

    Policy and critic learn one after the other, so there are gradients of one at a time.
    """
    task = config.task
    if not isinstance(task, OnlineTaskConfig):
        is_lora = config.model.finetune_mode == "LORA"
        moves = isinstance(task, DPOConfig) and task.ref_sync_interval is not None  # a copy of what trains
        kept = getattr(config.data, "streaming", False) and task.has_fixed_reference() and not is_lora
        return moves * (size.trainable if is_lora else size.weights) + kept * size.weights
    sources = model_sources(config.reward, config.data.rule_reward)
    scored = sum(_reward_model_bytes(config, term, size, size_of) for term in sources)
    critic = isinstance(task, PPOConfig) and not task.share_trunk
    average = isinstance(task, PPOConfig) and task.ema_decay is not None
    if config.model.finetune_mode == "LORA":
        return scored + size.trainable * (critic + average) + optimizer * critic
    reference = not isinstance(task, BestOfNConfig | DistillConfig)
    return scored + size.weights * (reference + critic + average) + optimizer * critic


def _reward_model_bytes(config: TrainConfig, term: str, size: ModelSize, size_of: Callable[..., ModelSize]) -> int:
    """Bytes of the reward model of a term: of adapters if it shares the policy's base, else of a whole model.

    A model that cannot be measured is as large as the policy.
    """
    task = config.task
    assert isinstance(task, OnlineTaskConfig)
    try:
        run_dir, _, model = reward_model_source(config, term)
        if run_dir is not None:
            is_lora = config.model.finetune_mode == "LORA"
            if is_lora and not reads_chat(config) and is_on_base_of(config, model, run_dir):
                return size.trainable
            model = whole_model(model, Path(run_dir), task.rm_model_name) or model
        return size_of(model, config.fabric.precision, True).weights
    except SheepError:
        return size.weights


class Ranks(NamedTuple):
    """Shares of the weights that the processes of a run hold."""

    total: int  # all processes
    shards: int  # processes that hold one copy of the weights together; 1 without fsdp2
    tensor: int  # processes that compute the same rows
    gather_bytes: int  # of a gathered number of a block
    reduce_bytes: int  # of a number of a reduced gradient, and of a gathered number around the blocks


def ranks_of(fabric: FabricConfig) -> Ranks:
    """The processes that a configuration asks for; `fabric.devices=auto` counts as one on each machine."""
    total = num_processes(fabric)
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
    rows = rows_of_rank(config)
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
    casts = min(size.fixed, 2 * (size.parameters - size.outside)) if config.fabric.precision == "bf16-mixed" else 0
    return parts._replace(
        **held,
        activations=parts.activations - casts,
        gathered=(whole - size.outside) * ranks.gather_bytes + (size.outside + gradients) * ranks.reduce_bytes,
    )


def rows_of_forward(config: TrainConfig, size: ModelSize) -> tuple[int, int]:
    """Largest number of rows of a forward pass if all have the maximum length, and that length, in tokens."""
    row = config.task.row_tokens(min(config.data.max_length, size.positions or config.data.max_length))
    return rows_of_pass(config, row), row


class Traffic(NamedTuple):
    """Bytes that a rank receives or sends in an optimizer step."""

    gather: int
    reduce: int
    all_reduce: int

    def total(self) -> int:
        """All of them together."""
        return sum(self)


class StepTime(NamedTuple):
    """Seconds of a step without waiting: `communication` and `computation` overlap in part, or not at all."""

    tokens: int  # of one rank
    communication: float
    computation: float


def traffic(config: TrainConfig, size: ModelSize, *, passes: int) -> Traffic:
    """The traffic of a rank in a step of `passes` forward and backward passes."""
    ranks, train = ranks_of(config.fabric), size.trainable_numbers
    more = more_trained = 0  # numbers of the blocks that are computed with by every rank of a group, but for the first
    if ranks.tensor > 1:
        module = build_on_meta(config.model, scores=config.task.trains == "reward model")[1]
        for weight in uncut_weights(module, ranks.tensor):
            more += (ranks.tensor - 1) * weight.numel()
            more_trained += (ranks.tensor - 1) * weight.numel() * weight.requires_grad
    if isinstance(config.task, BestOfNConfig):
        train = more_trained = 0
    s, r = ranks.shards, ranks.total // ranks.shards
    of_blocks = (s / ranks.tensor - 1) / s  # of a number in the blocks, what a rank receives of the others
    blocks = size.parameters - size.outside
    around, trained = train - min(train, blocks), min(train, blocks) + more_trained
    gathered_blocks = passes * 2 * (blocks + more) * of_blocks
    return Traffic(
        gather=round(passes * size.outside * (s - 1) / s * ranks.reduce_bytes + gathered_blocks * ranks.gather_bytes),
        reduce=round((around * (s - 1) / s + trained * of_blocks) * ranks.reduce_bytes),
        all_reduce=round(2 * (around + trained) / s * (r - 1) / r * ranks.reduce_bytes),
    )


def step_time(config: TrainConfig, size: ModelSize, cluster: ClusterConfig) -> StepTime:
    """The time of a step of the longest rows."""
    rows, passes = passes_of_rank(config, size)
    ranks = ranks_of(config.fabric)
    parameters, trains = (computed(n, size, ranks) for n in (size.parameters, size.trainable_numbers))
    tokens = rows * rows_of_forward(config, size)[1]
    if isinstance(config.task, BestOfNConfig):
        operations = 2 * parameters
    else:
        repeated = config.model.gradient_checkpointing
        operations = (4 + 2 * repeated) * parameters + 2 * trains
    return StepTime(
        tokens=tokens,
        communication=traffic(config, size, passes=passes).total() / (cluster.bandwidth * 1e9),
        computation=operations * tokens / (cluster.tflops * 1e12 * cluster.mfu),
    )


class DryStep(NamedTuple):
    """Observations of `dry_step`, on its rank."""

    parameters: int  # numbers that the rank holds
    unsharded: list[str]  # names of parameters that every rank holds as a whole
    state: int  # numbers of the optimizer's state
    traffic: Traffic  # bytes that went through the process group
    collectives: dict[str, int]  # how many there were, by their name
    seconds: float  # of this processor


def dry_step(config: DoctorConfig) -> DryStep:
    """Run a sharded step as rank zero of torch's group for tests, without tensor content. Raises ImportError."""
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache  # private, like the next
    from torch.testing._internal.distributed.fake_pg import FakeStore

    start, ranks = time.process_time(), ranks_of(config.fabric)
    module = build_on_meta(config.model, scores=config.task.trains == "reward model")[1]
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks.total)
    try:
        mesh = make_mesh("cpu", ranks.total, ranks.total // ranks.shards, ranks.tensor)
        # On the meta device, as in a run: each weight is cut into as many tensors as there are ranks, and making those
        # in the fake mode took most of the time.
        shard_module(module, mesh, **sharding_options(config.fabric, on_cpu=True))
        with interrupts_wait(), FakeTensorMode(allow_non_fake_inputs=True):  # cut short, it would end the process
            return _dry_step(config, module, ranks, start)
    finally:
        torch.distributed.destroy_process_group()
        _clear_sharding_prop_cache()  # it has rank zero's mesh, which a forked process of another rank would take


def _dry_step(config: DoctorConfig, module: nn.Module, ranks: Ranks, start: float) -> DryStep:
    module._apply(lambda tensor: torch.empty_like(tensor, device="cpu"))
    optimizer = build_optimizer(config.optim, (module.parameters(), config.peak_lr()))
    ids = torch.zeros(1, _TOKENS, dtype=torch.long)
    mixed = MIXED.get(config.fabric.precision)
    recorder = _Collectives(ranks)
    with recorder, nullcontext() if mixed is None else torch.autocast("cpu", mixed):
        output = module(input_ids=ids, use_cache=False)
        output.logits.float().sum().backward()
    optimizer.step()
    parameters = dict(module.named_parameters())
    state = [value for values in optimizer.state.values() for value in values.values() if torch.is_tensor(value)]
    return DryStep(
        parameters=sum(_local(parameter).numel() for parameter in parameters.values()),
        unsharded=[name for name, parameter in parameters.items() if not isinstance(parameter, DTensor)],
        state=sum(_local(value).numel() for value in state),
        traffic=Traffic(*(recorder.bytes[name] for name in Traffic._fields)),
        collectives=dict(recorder.counts),
        seconds=time.process_time() - start,
    )


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class _Collectives(TorchDispatchMode):
    """Counts the collectives of a rank, and the bytes that they move."""

    def __init__(self, ranks: Ranks) -> None:
        super().__init__()
        self._ranks = ranks
        self.counts: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operation."""
        kind = _KINDS.get(func.__name__.partition(".")[0]) if func.namespace == "c10d" else None
        if kind is not None:
            received, sent = args[:2]  # of an all-reduce: the tensors, and the group
            self.counts[kind] += 1
            if kind == "all_reduce":
                replicas = self._ranks.total // self._ranks.shards
                self.bytes[kind] += sum(2 * tensor.nbytes * (replicas - 1) // replicas for tensor in received)
            else:
                self.bytes[kind] += abs(received.nbytes - sent.nbytes)
        return func(*args, **(kwargs or {}))
