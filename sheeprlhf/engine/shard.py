"""`fabric.strategy=fsdp2`: weights, gradients and optimizer state are cut into one part per process.

Torch's `fully_shard` changes a module in place: its parameters become parts (`DTensor`), and are whole from a block's
forward to its end, and again in its backward. All ranks take part in each of these, so all have to run the same passes
(`same_number` in training, `equal_passes` without gradients). Code that needs whole weights at another time calls these
functions. Without fsdp2 they do nothing.

With `fabric.tensor_parallel`, groups of processes compute the same rows together (Megatron-LM, arXiv 1909.08053): a
process has some heads of each attention and some columns of each MLP, by the plan of transformers, cut up further over
the processes with the same share. Weights around the blocks are cut up over all processes, which compute with whole
ones. So everything but the inside of attention and MLP, gradients too, is equal within a group.
"""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from fnmatch import fnmatch
from functools import partial
from itertools import chain, repeat
from math import prod
from typing import Any, NamedTuple, TypeVar, cast

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard
from transformers import PreTrainedModel

from sheeprlhf.engine.ranks import JoiningModelParallel, meshes_of
from sheeprlhf.model.folder.architecture import decoder_blocks
from sheeprlhf.model.folder.file_parameters import drop_placeholders
from sheeprlhf.structure.run import FabricConfig
from sheeprlhf.utils.errors import ConfigError, ModelError
from sheeprlhf.utils.lightning import Fabric, ModelParallelStrategy, gather_objects
from sheeprlhf.utils.memory import available_memory, size_text

T = TypeVar("T")
_NORM = "replicated_with_grad_allreduce"  # of each head: a process has the gradient of its own heads
_STYLES: dict[str, type[ParallelStyle]] = {"colwise": ColwiseParallel, "rowwise": RowwiseParallel}


def sharding_strategy(cfg: FabricConfig, num_processes: int, timeout: timedelta) -> ModelParallelStrategy:
    """Fabric's strategy of fsdp2 over all processes, which wait for each other at most for `timeout`.

    In bf16-mixed, the matrices of blocks are gathered in bfloat16. Norms and the weights around the blocks are gathered
    in float32, as autocast reads them without sharding. Parts, gradient sums and optimizer are float32.

    Raises:
        ConfigError: this torch is too old, or an option does not divide the processes.
    """
    if not hasattr(FSDPModule, "reset_iter_state"):
        raise ConfigError(
            "fabric.strategy=fsdp2 needs torch 2.13 or newer: pip install -U torch, or give fabric.strategy=ddp"
        )
    if problem := division_problem(cfg, num_processes):
        raise ConfigError(problem)
    on_cpu = cfg.accelerator == "cpu" or not torch.cuda.is_available()
    how = sharding_options(cfg, on_cpu=on_cpu)
    # The norm of offloaded gradients is a sum over parts on the host.
    backend = "cpu:gloo,cuda:nccl" if cfg.offload == "cpu" and not on_cpu else None
    strategy = JoiningModelParallel(
        partial(_shard_from_files, **how),
        data_parallel_size=num_processes // cfg.tensor_parallel,
        tensor_parallel_size=cfg.tensor_parallel,
        process_group_backend=backend,
        timeout=timeout,
    )
    strategy.replicas, strategy.tensor_parallel = cfg.replicas, cfg.tensor_parallel
    # Weights that are still in their files are on no device, and torch moves the parts itself.
    warnings.filterwarnings("ignore", message=r"The model passed to `Fabric\.setup\(\)` has \d+ parameters on")
    return strategy


def division_problem(cfg: FabricConfig, num_processes: int) -> str | None:
    """Text about groups of processes whose number is no whole one."""
    for options in (["replicas"], ["tensor_parallel"], ["replicas", "tensor_parallel"]):
        if num_processes % prod(getattr(cfg, name) for name in options):
            given = " times ".join(f"fabric.{name}={getattr(cfg, name)}" for name in options)
            return f"{given} does not divide the number of processes, {num_processes}"
    return None


def sharding_options(cfg: FabricConfig, *, on_cpu: bool) -> dict[str, Any]:
    """The arguments of `shard_module` for the options of `fabric`."""
    how: dict[str, Any] = {}
    if cfg.precision == "bf16-mixed":
        how["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    if cfg.offload == "cpu":
        how["offload_policy"] = CPUOffloadPolicy(pin_memory=not on_cpu)
    return how


def _shard_from_files(module: nn.Module, mesh: Any, **how: Any) -> nn.Module:
    """Shard a module; each rank reads its rows of weights that are still in their files."""
    sources = drop_placeholders(module)
    shard_module(module, mesh, **how)
    if not sources:
        return module
    device = "cpu" if "offload_policy" in how else mesh.device_type
    module._apply(lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name not in sources or not isinstance(parameter, DTensor):
                continue
            part = part_of(parameter)
            if part is None:
                parameter.copy_(cut_like(sources[name].read().to(parameter.dtype), parameter))
            elif part.local.numel():
                part.local.copy_(sources[name].read(part.place))
    return module


def shard_module(module: nn.Module, mesh: Any, **how: Any) -> nn.Module:
    """Every block for itself, and what is around them together: weights are whole one block at a time.

    With tensor parallelism, layers of the blocks are cut up over the groups first. Norms of heads are sharded for
    themselves, since a process has the gradient of its own heads only. Heads that give a score compute in float32. A
    module around sharded weights of another one (an adapter's score head) shards its own layers only.
    """
    of_data, of_all, _ = meshes_of(mesh)
    is_around, of_groups = is_sharded(module), mesh["tensor_parallel"]
    in_float32 = {name: policy for name, policy in how.items() if name != "mp_policy"}
    for name, part in module.named_modules():
        if isinstance(part, nn.Linear) and part.out_features == 1 and ".lora_A." not in name and not is_sharded(part):
            fully_shard(part, mesh=of_all, **in_float32)
    if is_around:
        return module
    if of_groups.size() > 1:
        backbone, plan = tensor_plan(module, of_groups.size())
        for part, style in [(part, style) for pattern, style in plan.items() for part in _matching(backbone, pattern)]:
            if style in _STYLES:
                for layer in _layers_of(part, style):
                    parallelize_module(layer, of_groups, _STYLES[style](), src_data_rank=None)
                continue
            fully_shard(part, mesh=of_all, **in_float32)
            cast(FSDPModule, part).set_gradient_divide_factor(of_data.size())  # the sum within a group
            cast(FSDPModule, part).set_force_sum_reduction_for_comms(True)  # gloo has no other
    blocks = decoder_blocks(module)
    parts = [part for block in blocks for part in block.modules()]
    norms = [part for part in parts if type(part).__name__.endswith("Norm") and not is_sharded(part)]
    if norms and "mp_policy" in how:
        fully_shard(norms, mesh=of_data, **in_float32)
    for block in blocks:
        fully_shard(block, mesh=of_data, **how)
    fully_shard(module, mesh=of_all, **in_float32)
    for name in getattr(module, "forward_methods", ()):
        register_fsdp_forward_method(module, name)
    return module


def _layers_of(part: nn.Module, style: str) -> list[nn.Module]:
    """The linear layers that a style of a plan cuts up: of one with adapters, the matrices on the same side too.

    The others compute with equal inputs, and get equal gradients, on all processes of a group.
    """
    if not isinstance(part, LoraLayer):
        return [part]
    return [part.get_base_layer(), *(part.lora_A if style == "rowwise" else part.lora_B).values()]


def uncut_weights(module: nn.Module, size: int) -> list[nn.Parameter]:
    """Weights of the blocks that a group of `size` processes does not cut up: of norms, one matrix of each adapter.

    Raises ModelError as `tensor_plan`.
    """
    backbone, plan = tensor_plan(module, size)
    parts = [(part, style) for pattern, style in plan.items() for part in _matching(backbone, pattern)]
    layers = [layer for part, style in parts if style in _STYLES for layer in _layers_of(part, style)]
    cut = {weight for layer in layers for weight in layer.parameters()}
    return [weight for block in decoder_blocks(module) for weight in block.parameters() if weight not in cut]


def tensor_plan(module: nn.Module, size: int) -> tuple[nn.Module, dict[str, str]]:
    """The backbone of a model, and transformers' plan for the layers of its blocks that `size` processes share.

    The plan has a style for each pattern of names.

    Raises:
        ModelError: there is none, or it is not supported; or `size` does not divide the heads.
    """
    backbone = next(part for part in module.modules() if isinstance(part, PreTrainedModel)).base_model
    config, given = cast(Any, backbone.config).get_text_config(), f"fabric.tensor_parallel={size}"
    plan: dict[str, str] = getattr(config, "base_model_tp_plan", None) or {}
    plan = {pattern: style for pattern, style in plan.items() if pattern.startswith("layers.")}
    cut = {layer for pattern in plan for part in _matching(backbone, pattern) for layer in part.modules()}
    beside = [  # layers between those that are cut up, which would read a part
        name
        for parent in {pattern.rpartition(".")[0] for pattern in plan}
        for layer in _matching(backbone, parent)
        for name, part in layer.named_modules()
        if part not in cut and next(part.parameters(recurse=False), None) is not None
    ]
    others = sorted({*plan.values()} - {*_STYLES, _NORM} | {*beside}) or ([] if plan else ["no layer"])
    if others:
        raise ModelError(
            f"{given} is not supported for model_type={config.model_type}: transformers' plan for it has "
            f"{', '.join(others)}; give fabric.tensor_parallel=1, or a model as llama, mistral, qwen2 or qwen3"
        )
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        if (value := getattr(config, name, None) or 0) % size:
            raise ModelError(f"{given} does not divide the model's {name}={value}: give a divisor of it")
    return backbone, plan


def _matching(backbone: nn.Module, pattern: str) -> list[nn.Module]:
    """Modules by a pattern of names."""
    return [part for name, part in backbone.named_modules() if fnmatch(name, pattern)]


def place(fabric: Fabric, module: nn.Module) -> None:
    """All ranks: a module that is only read goes onto the device, in the precision asked for; fsdp2 shards it.

    It is not wrapped for several processes: it would get buckets for gradients, and frozen adapters are refused.
    """
    drop_placeholders(module)
    to_device(fabric, fabric.strategy.precision.convert_module(module))


def to_device(fabric: Fabric, module: nn.Module) -> None:
    """All ranks: `place` in the precision that the module has."""
    if isinstance(fabric.strategy, ModelParallelStrategy):
        fabric.strategy.setup_module(module)
    else:
        module.to(fabric.device)


class DataRank(NamedTuple):
    """A process among those that compute other rows.

    Attributes:
        rank: the number of its tensor-parallel group, which computes the same rows.
        size: how many groups there are.
        first: the first process of a group is a multiple of this number.
    """

    rank: int
    size: int
    first: int


def data_rank(fabric: Fabric) -> DataRank:
    """This process; without tensor parallelism each is a group."""
    first = getattr(fabric.strategy, "tensor_parallel", 1)
    return DataRank(fabric.global_rank // first, fabric.world_size // first, first)


def sum_of_rows(fabric: Fabric, values: Tensor) -> Tensor:
    """All ranks: add up what the ranks have computed of other rows."""
    data = data_rank(fabric)
    if data.size == 1:
        return values
    mesh = None if data.first == 1 else meshes_of(cast(ModelParallelStrategy, fabric.strategy).device_mesh).rows
    group = None if mesh is None else mesh.get_group()
    return cast(Tensor, fabric.all_reduce(values, group=group, reduce_op="sum"))


def is_sharded(module: nn.Module) -> bool:
    """True if the weights of a module are sharded."""
    return any(isinstance(part, FSDPModule) for part in module.modules())


def _roots(module: nn.Module) -> list[FSDPModule]:
    """The sharded modules that are in no other sharded module: passes begin there."""
    if isinstance(module, FSDPModule):
        state = module._get_fsdp_state()
        state._lazy_init()  # else the first block that runs alone would count as the root
        return [module] if state._is_root else []  # else a root that came before has it
    return [root for child in module.children() for root in _roots(child)]


@contextmanager
def gathered(fabric: Fabric, module: nn.Module) -> Iterator[None]:
    """All ranks: inside, each has all weights, and may run other forward passes than the rest; no backward pass.

    Raises:
        ConfigError: they do not fit beside what a device holds.
    """
    roots = _roots(module)
    if roots:
        _check_room(fabric, module)
    parts = [(root, part) for root in roots for part in cast(nn.Module, root).modules() if isinstance(part, FSDPModule)]
    for _, part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        with fabric.autocast() if roots else nullcontext():  # blocks are bfloat16 beside float32 norms and embeddings
            yield
    finally:
        for root, part in parts:
            part.set_reshard_after_forward(part is not root, recurse=False)  # the outermost one is needed next
        _forget_passes(roots)


def _check_room(fabric: Fabric, module: nn.Module) -> None:
    """All ranks: compare the whole weights with the free memory of the device, or of a CPU's share of the machine."""
    shards = [part for part in module.modules() if isinstance(part, FSDPModule)]
    dtypes = {  # of gathered blocks
        weight: dtype
        for part in shards
        if (dtype := part._get_fsdp_state()._mp_policy.param_dtype)
        for weight in cast(nn.Module, part).parameters()
    }
    needed = sum(
        weight.numel() // _share_of_blocks(weight) * dtypes.get(weight, weight.dtype).itemsize
        for weight in module.parameters()
        if isinstance(weight, DTensor)
    )
    if fabric.device.type == "cuda":
        unused = torch.cuda.memory_reserved(fabric.device) - torch.cuda.memory_allocated(fabric.device)
        room = torch.cuda.mem_get_info(fabric.device)[0] + unused
    else:
        free = available_memory()  # None where nothing tells it
        room = needed if free is None else free // cast(ModelParallelStrategy, fabric.strategy).num_processes
    needed_of, room_of = zip(*gather_objects(fabric, (needed, room)), strict=True)
    short = [rank for rank in range(fabric.world_size) if needed_of[rank] > room_of[rank]]
    if short:
        rank = short[0]
        raise ConfigError(
            f"fabric.strategy=fsdp2: sampling needs the whole policy on each device, {size_text(needed_of[rank])}, "
            f"and rank {rank} has {size_text(room_of[rank])} free: give rollout=vllm, or a smaller model; training "
            "that only shows samples needs none with task.num_sample_prompts=0"
        )


def _share_of_blocks(weight: DTensor) -> int:
    """Processes that share this weight in forward passes, by tensor parallelism."""
    is_cut = (weight.device_mesh.mesh_dim_names or ("",))[-1] == "tensor_parallel"
    return weight.device_mesh.size(-1) if is_cut and not weight.placements[-1].is_replicate() else 1


def _forget_passes(roots: list[FSDPModule]) -> None:
    """Weights are parts again; passes without a backward would make ranks fetch weights in other orders."""
    for root in roots:
        root.reset_iter_state()


def of_ranks(fabric: Fabric, *numbers: int) -> list[list[int]]:
    """All ranks: the numbers of every rank that computes other rows, a list for each."""
    data = data_rank(fabric)
    if data.size == 1:
        return [[number] for number in numbers]
    counts = torch.zeros(len(numbers), data.size, dtype=torch.int64, device=fabric.device)
    counts[:, data.rank] = torch.tensor(numbers)
    return sum_of_rows(fabric, counts).tolist()


def equal_passes(fabric: Fabric, module: nn.Module, items: Iterable[T]) -> Iterator[tuple[T, bool]]:
    """All ranks: what this rank's forward passes without gradients compute, each with True.

    With sharded weights, a rank that has no more gets an earlier item, or one of another rank, with False, until all
    ranks have had the same number.
    """
    roots = _roots(module)
    if not roots:
        yield from ((item, True) for item in items)
        return
    latest: list[T] = []
    try:
        for number, item in enumerate(chain(((one,) for one in items), repeat(()))):
            [there] = of_ranks(fabric, len(item))
            if not any(there):
                return
            latest = list(item) or latest
            if number == 0 and 0 in there:
                given = broadcast_from_first(fabric, latest, there)
                latest = latest or given
            yield latest[0], bool(item)
    finally:
        _forget_passes(roots)


def same_number(fabric: Fabric, passes: Sequence[T], num_of_rank: Sequence[int]) -> list[T]:
    """All ranks: this rank's passes, the last repeated until all ranks have the same number.

    Args:
        fabric: where it runs.
        passes: what this rank has to compute.
        num_of_rank: how many every rank has; one has some.
    """
    last = list(passes[-1:])
    if 0 in num_of_rank:
        last = broadcast_from_first(fabric, last, num_of_rank)
    return [*passes, *last * (max(num_of_rank) - len(passes))]


def broadcast_from_first(fabric: Fabric, item: T, num_of_rank: Sequence[int]) -> T:
    """All ranks: the item of the first rank that has a number above zero, of those that compute other rows."""
    first = next(rank for rank, number in enumerate(num_of_rank) if number)
    return fabric.broadcast(item, src=first * data_rank(fabric).first)


def whole(tensor: Tensor) -> Tensor:
    """All ranks: the tensor that this is a part of, on every rank; a whole one as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class Part(NamedTuple):
    """The part of a tensor that a rank holds: its place in the whole, its numbers, and whether this rank writes them.

    Of ranks with the same part, the first one writes it.
    """

    place: tuple[slice, ...]
    local: Tensor
    owns: bool


def part_of(tensor: DTensor) -> Part | None:
    """This rank's part of a tensor; None if it is no run of rows, nor of columns of such rows."""
    mesh, owns = tensor.device_mesh, True
    local, own = tensor.to_local().detach(), cast(list[int], mesh.get_coordinate())
    starts, sizes = [0] * tensor.ndim, list(tensor.shape)
    cut: set[int] = set()
    for dim in reversed(range(mesh.ndim)):  # the last was cut first
        placement, rank, size = tensor.placements[dim], own[dim], mesh.size(dim)
        if placement.is_replicate():
            owns = owns and rank == 0
            continue
        axis = getattr(placement, "dim", 2)
        if axis not in (0, 1)[: tensor.ndim] or type(placement) is not (_StridedShard if axis in cut else Shard):
            return None
        most = -(-sizes[axis] // size)
        start = min(rank * most, sizes[axis])
        starts[axis], sizes[axis] = starts[axis] + start, min(most, sizes[axis] - start)
        cut.add(axis)
    return Part(tuple(slice(a, a + n) for a, n in zip(starts, sizes, strict=True)), local, owns)


def cut_like(tensor: Tensor, target: Tensor) -> Tensor:
    """A whole tensor that every rank has, cut as the target is; as it is for a whole target.

    Of a tensor in the memory of a file, only this rank's part is read.
    """
    if not isinstance(target, DTensor):
        return tensor
    part = part_of(target)
    if part is None:
        on_device = tensor.to(target.device)
        return distribute_tensor(on_device, target.device_mesh, target.placements, src_data_rank=None)
    own = tensor[part.place].to(part.local.device)
    mesh, placements, stride = target.device_mesh, target.placements, target.stride()
    return DTensor.from_local(own, mesh, placements, run_check=False, shape=target.shape, stride=stride)


def assemble(fabric: Fabric, module: nn.Module, *, adapters: bool = False) -> None:
    """All ranks, after the last step: rank zero's module gets whole weights on the host, to be written; no more passes.

    Weights that several modules share stay shared. With `adapters`, only those of adapters become whole, and what
    trains with them.
    """
    made: dict[Tensor, nn.Parameter] = {}
    for path, part in module.named_modules():
        for name, parameter in part.named_parameters(recurse=False):
            is_base = not (parameter.requires_grad or ".lora_" in path or ".modules_to_save." in path)
            if not isinstance(parameter, DTensor) or (adapters and is_base):
                continue
            if parameter not in made:
                full = whole(parameter.detach())
                kept = full.cpu() if fabric.is_global_zero else torch.empty(0)
                made[parameter] = nn.Parameter(kept, requires_grad=parameter.requires_grad)
            setattr(part, name, made[parameter])
