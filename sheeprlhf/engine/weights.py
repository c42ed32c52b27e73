"""The weights of one of a run's checkpoints, for an evaluation."""

from pathlib import Path

from torch import nn

from sheeprlhf.engine.checkpoint import STEP_FOLDER, Say, latest_checkpoint, read_state, saved_steps
from sheeprlhf.engine.manifest import verify_manifest
from sheeprlhf.engine.tensors import copy_tensors, read_tensors, saved_tensors, unwrapped
from sheeprlhf.model.lora import CRITIC
from sheeprlhf.utils.errors import CheckpointError


def find_checkpoint(run_dir: Path, name: str, say: Say) -> Path:
    """One process: the folder of "last", "best" or "step-<n>".

    Raises:
        CheckpointError: there is none of that name.
    """
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
            so is the critic's adapter, which stands among the policy's where both have one base.

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
