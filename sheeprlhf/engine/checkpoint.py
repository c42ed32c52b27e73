"""Checkpoints that survive a kill at any moment and continue bit for bit: safetensors and JSON, no pickle.

`checkpoints/step-<n>/` holds model.safetensors (what trains, and buffers), optimizer.safetensors (named
"<state>/<parameter>"), rng.safetensors ("<rank>/<generator>"), state.json and MANIFEST.json. The newest folder whose
manifest verifies is the one that counts.
"""

import dataclasses
import json
import os
import platform
import re
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from sheeprlhf.engine.manifest import (
    MANIFEST,
    is_ours,
    read_manifest,
    remove_folder,
    verify_manifest,
    write_manifest,
)
from sheeprlhf.engine.parts import create_tensor_file, write_rows, write_together
from sheeprlhf.engine.shard import Part, cut_like, data_rank, is_sharded, part_of
from sheeprlhf.model.adapter import CRITIC
from sheeprlhf.security.json_records import MANIFEST as MANIFEST_SCHEMA
from sheeprlhf.security.json_records import STATE, damaged, load_json
from sheeprlhf.security.model_folder import read_header
from sheeprlhf.utils.errors import CheckpointError, Notify, RecordError, UnsafePathError
from sheeprlhf.utils.lightning import Fabric, RankGroup, gather_objects, is_wrapped
from sheeprlhf.utils.modes import rng_state, set_rng_state
from sheeprlhf.utils.output import create_file, make_folder, safe_path, sweep_scratch
from sheeprlhf.utils.processes import in_thread

T = TypeVar("T")
STATE_FILE = "state.json"
NOT_THE_SAME = "but not bit for bit the same (in float32 and without dropout, losses agree to about 1e-5 a step)"
_8BIT_TABLES = ("qmap1", "qmap2", "absmax1", "absmax2")  # of bitsandbytes: 256 values of a byte; scales of 256 numbers
STEP_FOLDER = re.compile(r"step-(\d{1,12})")


@dataclasses.dataclass
class TrainState:
    """Progress of training: scalars only. The sampler and the schedule are functions of `step`."""

    step: int = 0  # optimizer steps done
    items_seen: int = 0  # items (target tokens, pairs, ...) trained on, all ranks
    best_metric: float | None = None  # best validation result so far; None before the first validation that counts
    best_step: int | None = None  # the step that had it
    extra: dict[str, int | float] = dataclasses.field(default_factory=dict)  # of a task, see `ExtraRecord`
    skipped_steps: int = 0  # optimizer steps that were left out because their loss or gradient was not finite
    stale_validations: int = 0  # validations since the best one

    def to_json(self) -> str:
        """JSON that `read_state` reads back exactly."""
        return json.dumps(dataclasses.asdict(self), indent=1)


def read_state(folder: Path) -> TrainState:
    """The state of a checkpoint. Raises CheckpointError if it is damaged or contradicts manifest or folder."""
    path = folder / STATE_FILE
    try:
        content, manifest = load_json(path, STATE), read_manifest(folder)
    except RecordError as error:
        raise CheckpointError(str(error)) from error
    if missing := [name for name in ("config_hash", "step") if name not in manifest]:
        raise CheckpointError(str(damaged(folder / MANIFEST, MANIFEST_SCHEMA, missing[0], "is missing")))
    if unknown := sorted(content.keys() - {field.name for field in dataclasses.fields(TrainState)}):
        raise CheckpointError(str(damaged(path, STATE, unknown[0], "is unknown")))
    if not content:
        raise CheckpointError(f"{path} is missing")
    state = TrainState(**content)
    if not state.step == manifest["step"] == int(folder.name.removeprefix("step-")):
        raise CheckpointError(f"{folder} holds step {state.step}; a checkpoint folder was renamed or mixed up")
    if (state.best_step is None and state.best_metric is not None) or (state.best_step or 0) > state.step:
        raise CheckpointError(str(damaged(path, STATE, "best_step", f"is {state.best_step} at step {state.step}")))
    moments = [name for name in ("reward_count", "reward_mean", "reward_m2") if name not in state.extra]
    if len(moments) in (1, 2):
        raise CheckpointError(str(damaged(path, STATE, f"extra.{moments[0]}", "is missing")))
    return state


Values = Mapping[str, Mapping[str, Tensor | Part]]  # numbers of a checkpoint's tensors, by file and name


class BackgroundSaver:
    """Writes checkpoints of one run in a thread, one after the other, from copies on the host. Used by all ranks."""

    def __init__(self, fabric: Fabric) -> None:
        """All ranks."""
        self._ranks = RankGroup(fabric)
        self._copies: dict[tuple[str, str], Tensor] = {}  # their memory is used again
        self._pending: Future[None] | None = None

    def wait(self) -> None:
        """All ranks: wait for the save that is being written, if there is one; raises its error, on all ranks."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def start(self, files: Mapping[str, Mapping[str, Tensor]], save: Callable[[RankGroup, Values], None]) -> None:
        """All ranks, when none is pending: call `save` in a thread with copies of the tensors that this rank writes."""
        values: dict[str, dict[str, Part]] = {}
        for file, tensors in files.items():
            values[file] = {}
            for name, tensor in tensors.items():
                whole = Part((), tensor.detach(), self._ranks.is_global_zero)
                part = part_of(tensor) if isinstance(tensor, DTensor) else whole
                assert part is not None  # `can_save_in_background`
                if part.owns:
                    values[file][name] = part._replace(local=self._copy((file, name), part.local))
        self._pending = in_thread(partial(save, self._ranks, values))

    def _copy(self, key: tuple[str, str], tensor: Tensor) -> Tensor:
        kept = self._copies.get(key)
        if kept is None or kept.shape != tensor.shape or kept.dtype != tensor.dtype:
            kept = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._copies[key] = kept
        return kept.copy_(tensor)


def can_save_in_background(fabric: Fabric, run_dir: Path, module: nn.Module) -> bool:
    """All ranks: True if each can write what it holds: it sees the run directory, and no tensor is cut otherwise."""
    if not is_sharded(module):
        return True
    sharded = [tensor for tensor in saved_tensors(module).values() if isinstance(tensor, DTensor)]
    return all(gather_objects(fabric, run_dir.is_dir() and None not in map(part_of, sharded)))


def save_checkpoint(
    fabric: Fabric,
    run_dir: Path,
    state: TrainState,
    module: nn.Module,
    optimizer: Optimizer,
    *,
    config_hash: str,
    keep: int,
    say: Notify = print,
    background: BackgroundSaver | None = None,
) -> Path:
    """All ranks write `checkpoints/step-<state.step>/`: sharded tensors each its part, rank zero the rest.

    Rank zero removes old ones.

    Kept are the newest `keep`, the best (`state.best_step`), and every folder that this program did not write, or that
    has a damaged manifest; the latter are named through `say`. Where this step is saved already and intact, nothing is
    written: the same step of the same run has the same bytes. With `background`, this returns when the one before is
    written and the tensors are copied; the rest is done in a thread, and its errors are raised by the next `wait`.

    Raises:
        CheckpointError: on all ranks, when it could not be written, or a weight is not finite; earlier checkpoints are
            untouched.
    """
    if background is not None:
        background.wait()
    rngs = gather_objects(fabric, rng_state())
    files = {
        "model.safetensors": saved_tensors(module),
        "optimizer.safetensors": optimizer_tensors(module, optimizer),
        "rng.safetensors": {f"{rank}/{name}": t for rank, rng in enumerate(rngs) for name, t in rng.items()},
    }
    checkpoint = _Checkpoint(
        target=run_dir / "checkpoints" / f"step-{state.step}",
        state=dataclasses.replace(state, extra=dict(state.extra)),
        files=files,
        facts={"config_hash": config_hash, "step": state.step, **numerics_info(fabric, module)},
    )

    def save(ranks: Fabric | RankGroup, values: Values) -> None:
        _save(ranks, checkpoint, values, keep=keep, say=say)

    if background is None:
        save(fabric, files)
    else:
        background.start(files, save)
    return checkpoint.target


class _Checkpoint(NamedTuple):
    """A checkpoint that is written."""

    target: Path
    state: TrainState
    files: dict[str, dict[str, Tensor]]  # its tensors by file and name
    facts: dict[str, Any]  # for the manifest


def _save(ranks: Fabric | RankGroup, checkpoint: _Checkpoint, values: Values, *, keep: int, say: Notify) -> None:
    """All ranks: check and write a checkpoint, with these values of its tensors or of this rank's parts of them."""
    target, files = checkpoint.target, checkpoint.files
    weights = {name for name, tensor in files["model.safetensors"].items() if isinstance(tensor, nn.Parameter)}
    checked = {name: value for name, value in values["model.safetensors"].items() if name in weights}
    bad = not_finite({**checked, **values["optimizer.safetensors"]})
    name = next(filter(None, gather_objects(ranks, bad)), None)

    def prepare() -> bool:
        """Make room for the folder; True if it is there already."""
        if name is not None:
            raise CheckpointError(f"{name} is not finite: {target} is not written; lower optim.lr")
        make_folder(target.parent.parent, "checkpoints")
        safe_path(target.parent.parent, f"checkpoints/{target.name}")
        return _is_saved(target, checkpoint.facts["config_hash"], say)

    if not _on_rank_zero(ranks, target, prepare):
        _write(ranks, checkpoint, values)
    _on_rank_zero(ranks, target, partial(_prune, target.parent, checkpoint.state, keep, say))


def _on_rank_zero(ranks: Fabric | RankGroup, target: Path, call: Callable[[], T]) -> T:
    """All ranks: the result of a call on rank zero. Raises CheckpointError on all ranks if it cannot write `target`."""
    result, problem = None, None
    if ranks.is_global_zero:
        try:
            result = call()
        except (CheckpointError, UnsafePathError) as error:
            problem = str(error)
        except OSError as error:
            problem = f"cannot write {target}: {error}"
    result, problem = ranks.broadcast((result, problem))
    if problem is not None:
        raise CheckpointError(problem)
    return cast(T, result)


def numerics_info(fabric: Fabric, module: nn.Module) -> dict[str, Any]:
    """Facts that decide the order in which sums are added: results with other facts differ in their last bits."""
    return {
        "world_size": fabric.world_size,
        "tensor_parallel": data_rank(fabric).first,
        "torch_threads": torch.get_num_threads(),
        "sharded": is_sharded(module),
        "device": fabric.device.type,
    }


def _is_saved(target: Path, config_hash: str, say: Notify) -> bool:
    """Rank zero only: True if the step is saved and intact; a damaged folder makes room."""
    if not target.exists():
        return False
    try:
        manifest, _ = verify_manifest(target), read_state(target)
        if manifest["config_hash"] == config_hash:
            return True
    except (CheckpointError, OSError):  # damaged: a resumed run has reached its step again
        if not remove_folder(target):
            _set_aside(target, say)
    return False


def _write(ranks: Fabric | RankGroup, checkpoint: _Checkpoint, values: Values) -> None:
    """All ranks: each writes its parts of sharded tensors; rank zero the rest."""
    files = checkpoint.files
    versions = {"python": platform.python_version(), "torch": torch.__version__, "lightning": version("lightning")}
    sharded = [name for name, tensors in files.items() if any(isinstance(t, DTensor) for t in tensors.values())]

    def create(folder: Path) -> None:
        for name, tensors in files.items():
            if name in sharded:
                create_tensor_file(folder, name, tensors)
            else:
                whole = {key: value.local if isinstance(value, Part) else value for key, value in values[name].items()}
                save_file({key: tensor.detach().contiguous() for key, tensor in whole.items()}, folder / name)

    def fill(folder: Path, seen: bool) -> None:
        if sharded and not seen and isinstance(ranks, RankGroup):  # no collectives of the tensors in a thread
            raise OSError("not all ranks see the folder: give task.async_checkpoints=false")
        for name in sharded:
            write_rows(ranks, folder / name, files[name], values[name], seen=seen)

    def finish(folder: Path) -> None:
        create_file(folder, STATE_FILE, checkpoint.state.to_json().encode())
        write_manifest(folder, checkpoint.facts | versions)

    num_bytes = sum(t.nbytes for tensors in files.values() for t in tensors.values())
    write_together(ranks, checkpoint.target, create, fill, finish, num_bytes=num_bytes)


def _set_aside(folder: Path, say: Notify) -> None:
    """Rename a folder that is not ours to delete."""
    number = 1
    while os.path.lexists(aside := folder.with_name(f"{folder.name}.kept-{number}")):
        number += 1
    os.rename(folder, aside)
    say(f"{folder} is damaged, or not of this program: it is not deleted, and is called {aside.name} now")


def _prune(checkpoints: Path, state: TrainState, keep: int, say: Notify) -> None:
    """Remove all but the newest `keep` up to this step, and the best. Later steps are damaged leftovers: they go."""
    steps = []
    for step in saved_steps(checkpoints):
        if is_ours(folder := checkpoints / f"step-{step}"):
            steps.append(step)
        else:
            say(f"{folder} has a damaged manifest, or files that this program did not write: it is never deleted")
    kept = {state.best_step, *[step for step in steps if step <= state.step][:keep]}
    for step in steps:
        if step not in kept:
            remove_folder(checkpoints / f"step-{step}")


def saved_steps(checkpoints: Path) -> list[int]:
    """Steps that have a folder, newest first."""
    names = [path.name for path in checkpoints.iterdir()] if checkpoints.is_dir() else []
    return sorted((int(match[1]) for name in names if (match := STEP_FOLDER.fullmatch(name))), reverse=True)


def latest_checkpoint(run_dir: Path, say: Notify) -> Path | None:
    """One process: the newest checkpoint whose files all verify; damaged ones are named through `say`."""
    for step in saved_steps(run_dir / "checkpoints"):
        folder = run_dir / "checkpoints" / f"step-{step}"
        try:
            verify_manifest(folder)
            read_state(folder)
        except (CheckpointError, OSError) as error:
            say(f"skipping a damaged checkpoint: {error}")
        else:
            return folder
    return None


def restore_latest(
    fabric: Fabric, run_dir: Path, module: nn.Module, optimizer: Optimizer, *, config_hash: str, say: Notify
) -> TrainState | None:
    """All ranks: load the newest good checkpoint and clear away what killed processes left; None if there is none."""
    path = None
    if fabric.is_global_zero:
        sweep_scratch(run_dir)
        sweep_scratch(safe_path(run_dir, "checkpoints"))
        path = latest_checkpoint(run_dir, say)
    path = fabric.broadcast(path)
    if path is None:
        return None
    return load_checkpoint(fabric, path, module, optimizer, config_hash=config_hash, say=say)


def load_checkpoint(
    fabric: Fabric, path: Path, module: nn.Module, optimizer: Optimizer, *, config_hash: str, say: Notify
) -> TrainState:
    """All ranks: restore weights, optimizer, generators from a verified checkpoint. Raises CheckpointError."""
    manifest, state = read_manifest(path), read_state(path)
    if manifest["config_hash"] != config_hash:
        raise CheckpointError(f"{path} belongs to another configuration; resume with the options in its config.yaml")
    for name, value in numerics_info(fabric, module).items():
        if manifest.get(name, value) != value:
            say(f"{name} was {manifest[name]} and is {value} now: the run continues, {NOT_THE_SAME}")
    weights = path / "model.safetensors"
    copy_tensors(weights, read_tensors(weights), saved_tensors(module))
    load_optimizer(path / "optimizer.safetensors", module, optimizer)
    data = data_rank(fabric)
    prefix = f"{data.rank * data.first}/"  # equal within a tensor-parallel group
    rng = {k.removeprefix(prefix): t for k, t in read_tensors(path / "rng.safetensors").items() if k.startswith(prefix)}
    if rng:  # a rank more than before keeps the state that its seed gave it
        set_rng_state(rng)
    return state


def find_checkpoint(run_dir: Path, name: str, say: Notify) -> Path:
    """One process: the folder of "last", "best" or "step-<n>". Raises CheckpointError if there is none."""
    folder = latest_checkpoint(run_dir, say) if name in ("last", "best") else run_dir / "checkpoints" / name
    if folder is not None and name == "best":
        best_step = read_state(folder).best_step
        folder = folder if best_step is None else folder.with_name(f"step-{best_step}")
    if folder is None or not STEP_FOLDER.fullmatch(folder.name) or not folder.is_dir():
        there = ", ".join(f"step-{step}" for step in saved_steps(run_dir / "checkpoints")) or "none"
        raise CheckpointError(f"{run_dir} has no checkpoint '{name}'; there: {there}")
    return folder


def load_weights(path: Path, module: nn.Module, part: str = "") -> None:
    """Verify a checkpoint and copy its weights into a module, which may be frozen.

    Args:
        path: the checkpoint.
        module: has those weights, and no others that were trained.
        part: of a checkpoint of several modules, which one's weights ("actor."); those of the others are left out, and
            so is the critic's adapter, which is stored with the policy's if both share one base.

    Raises:
        CheckpointError: damaged; or a tensor is unknown to the module, missing, or of another shape or number format.
    """
    verify_manifest(path)
    module = unwrapped(module)
    everything = dict(module.named_parameters()) | dict(module.named_buffers())
    tensors = read_tensors(path / "model.safetensors")
    if part:
        own = [name for name in tensors if name.startswith(part) and f".{CRITIC}." not in f"{name}."]
        tensors = {name.removeprefix(part): tensors[name] for name in own}
    names = tensors.keys() | saved_tensors(module).keys()
    copy_tensors(path / "model.safetensors", tensors, {name: everything[name] for name in names if name in everything})


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


def not_finite(tensors: Mapping[str, Tensor | Part]) -> str | None:
    """The name of a tensor with a number that is not finite in this rank's part; None if there is none."""
    for name, value in tensors.items():
        tensor = value.local if isinstance(value, Part) else value.to_local() if isinstance(value, DTensor) else value
        if tensor.is_floating_point() and tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
            return name
    return None


def optimizer_tensors(module: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as "<state>/<parameter>"; bitsandbytes counts by an int and shares "qmap1", "qmap2"."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in unwrapped(module).named_parameters()}
    return {
        f"{key}/{names[parameter]}": value.clone() if key in _8BIT_TABLES else torch.as_tensor(value)
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
        if value is not None
    }


def copy_tensors(path: Path, tensors: dict[str, Tensor], targets: dict[str, Tensor]) -> None:
    """Copy a file's tensors into `targets`, all or, if one differs (CheckpointError), none."""
    for name in sorted(tensors.keys() ^ targets.keys()):
        raise CheckpointError(f"{path}: tensor {name} is {'unknown to this model' if name in tensors else 'missing'}")
    for name, target in targets.items():
        found, expected = (tensors[name].dtype, tensors[name].shape), (target.dtype, target.shape)
        if found != expected:
            raise CheckpointError(f"{path}: tensor {name} is {_kind(*found)}, this model has {_kind(*expected)}")
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(cut_like(tensors[name], target))


def _state_shape(key: str, parameter: Tensor) -> torch.Size:
    """The shape of a state of a parameter: its own, except for the tables and scales of 8-bit moments."""
    if key not in _8BIT_TABLES:
        return parameter.shape
    return torch.Size([256 if key.startswith("qmap") else -(-parameter.numel() // 256)])


def load_optimizer(path: Path, module: nn.Module, optimizer: Optimizer) -> None:
    """Restore tensors of `optimizer_tensors`, not settings. Raises CheckpointError if one does not fit."""
    parameters = dict(unwrapped(module).named_parameters())
    positions = {p: i for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    state: dict[int, dict[str, Any]] = {}
    for full_name, tensor in read_tensors(path).items():
        key, _, name = full_name.partition("/")
        parameter = parameters.get(name)
        if parameter is None or parameter not in positions:
            raise CheckpointError(f"{path}: {full_name} is of a parameter that this run does not train")
        shape = _state_shape(key, parameter)
        if tensor.ndim and tensor.shape != shape:
            raise CheckpointError(f"{path}: {full_name} has shape {tuple(tensor.shape)}, not {tuple(shape)}")
        if key in _8BIT_TABLES and tensor.dtype != torch.float32:  # it is read by native code
            raise CheckpointError(f"{path}: {full_name} is {_kind(tensor.dtype, tensor.shape)}, not float32")
        kept = cut_like(tensor, parameter) if tensor.ndim and shape == parameter.shape else tensor
        is_count = not tensor.ndim and not tensor.is_floating_point()
        state.setdefault(positions[parameter], {})[key] = tensor.item() if is_count else kept.clone()  # not the file's
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
