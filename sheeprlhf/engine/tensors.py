"""The tensors of a checkpoint: which they are, by name, and how they are put back."""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.optim import Optimizer

from sheeprlhf.engine.shard import cut_like
from sheeprlhf.security.safetensors_header import read_header
from sheeprlhf.utils.errors import CheckpointError
from sheeprlhf.utils.lightning import is_wrapped


def unwrapped(module: nn.Module) -> nn.Module:
    """The module as it was before torch.compile, Fabric and DDP wrapped it, so that names stay the same."""
    while True:
        is_wrapper = is_wrapped(module) or isinstance(module, nn.parallel.DistributedDataParallel)
        name = "_orig_mod" if hasattr(module, "_orig_mod") else "module" if is_wrapper else None
        if name is None:
            return module
        module = getattr(module, name)


def saved_tensors(module: nn.Module) -> dict[str, Tensor]:
    """By name: trainable parameters (shared ones once) and persistent buffers: all that training can change."""
    module = unwrapped(module)
    tensors: dict[str, Tensor] = {name: p for name, p in module.named_parameters() if p.requires_grad}
    persistent = module.state_dict().keys()
    return tensors | {name: buffer for name, buffer in module.named_buffers() if name in persistent}


def not_finite(tensors: dict[str, Tensor]) -> str | None:
    """The name of a tensor with a number that is not finite; None if there is none."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
            return name
    return None


def optimizer_tensors(module: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as "<state>/<parameter>", for example "exp_avg/head.weight"."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in unwrapped(module).named_parameters()}
    return {
        f"{key}/{names[parameter]}": value
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
        if value is not None
    }


def load_tensors(path: Path, targets: dict[str, Tensor]) -> None:
    """Copy a file's tensors into `targets`: the same names, shapes and number formats, or nothing is copied.

    Raises:
        CheckpointError: naming the first tensor that differs.
    """
    copy_tensors(path, read_tensors(path), targets)


def copy_tensors(path: Path, tensors: dict[str, Tensor], targets: dict[str, Tensor]) -> None:
    """`load_tensors` of what was read; `path` is for messages."""
    for name in sorted(tensors.keys() ^ targets.keys()):
        raise CheckpointError(f"{path}: tensor {name} is {'unknown to this model' if name in tensors else 'missing'}")
    for name, target in targets.items():
        found, expected = (tensors[name].dtype, tensors[name].shape), (target.dtype, target.shape)
        if found != expected:
            raise CheckpointError(f"{path}: tensor {name} is {_kind(*found)}, this model has {_kind(*expected)}")
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(cut_like(tensors[name], target))


def load_optimizer(path: Path, module: nn.Module, optimizer: Optimizer) -> None:
    """Restore what `optimizer_tensors` gave; learning rates and other settings stay as they are.

    Raises:
        CheckpointError: a tensor is of a parameter that the optimizer lacks, or has another shape.
    """
    parameters = dict(unwrapped(module).named_parameters())
    positions = {p: i for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    state: dict[int, dict[str, Tensor]] = {}
    for full_name, tensor in read_tensors(path).items():
        key, _, name = full_name.partition("/")
        parameter = parameters.get(name)
        if parameter is None or parameter not in positions:
            raise CheckpointError(f"{path}: {full_name} is of a parameter that this run does not train")
        if tensor.ndim and tensor.shape != parameter.shape:
            raise CheckpointError(f"{path}: {full_name} has shape {tuple(tensor.shape)}, not {tuple(parameter.shape)}")
        kept = cut_like(tensor, parameter) if tensor.ndim else tensor
        state.setdefault(positions[parameter], {})[key] = kept.clone()  # not the file's memory
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; their memory may be the file's own."""
    try:
        read_header(path)  # its limits are narrower than the library's
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.offset_keys()}
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _kind(dtype: torch.dtype, shape: torch.Size) -> str:
    return f"{str(dtype).removeprefix('torch.')} {tuple(shape)}"
