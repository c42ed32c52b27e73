"""Log-probabilities of the reference model, computed once and kept beside the data: no second model stays in memory.

The reference is the policy before its first step, so the policy itself computes them.
"""

import hashlib
from pathlib import Path

import numpy as np
import torch
from lightning.fabric import Fabric
from torch import Tensor, nn

from sheeprlhf.data.prepare import PreparedData, TokenizedSplit
from sheeprlhf.engine.rng import isolated_rng
from sheeprlhf.engine.step import eval_mode
from sheeprlhf.task.batches import Batches


def weights_digest(module: nn.Module) -> str:
    """SHA-256 of all weights, by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()


def sum_by_response(values_N: Tensor, response_index_N: Tensor, num_responses: int) -> Tensor:
    """(S,) float32 sums of the values of each response's tokens."""
    return values_N.new_zeros(num_responses).index_add(0, response_index_N, values_N)


def reference_logprobs(
    fabric: Fabric, module: nn.Module, batches: Batches, data: PreparedData, split: str, key: str
) -> np.ndarray:
    """All ranks: the summed log-probability of every response of a split, before training.

    Args:
        fabric: where it runs.
        module: the policy, set up, before its first step.
        batches: cuts the rows.
        data: the split's rows; what is computed is kept in its folder.
        split: name of the split.
        key: tells these weights and this way to compute from others.

    Returns:
        (rows, K) float32 nats, 0 where a row has fewer responses.
    """
    rows = data.splits[split]
    path = data.folder / f"reference-{split}-{key[:16]}.npy"
    if fabric.broadcast(path.is_file()):
        return np.load(path, mmap_mode="r", allow_pickle=False)
    sums = np.zeros((len(rows), rows.sizes.shape[1] - 1), dtype=np.float32)
    with isolated_rng(), eval_mode(module), torch.no_grad():
        for part, micro in batches.numbered(rows, None, f"reference, {split}"):
            batch = fabric.to_device(micro.batch)
            logprobs_N = module(batch).target_N
            sums_S = sum_by_response(logprobs_N, batch.response_index_N, len(batch.response_lengths))
            sums[part] = _by_row(sums_S.float().cpu().numpy(), rows, part)
    if fabric.world_size > 1:  # every rank had other rows, and zeros in these
        total = fabric.all_reduce(torch.from_numpy(sums), reduce_op="sum")
        assert isinstance(total, Tensor)
        sums = total.numpy()
    if fabric.is_global_zero:
        _write(path, sums)
    fabric.barrier()
    return sums


def of_rows(reference: np.ndarray, rows: TokenizedSplit, part: list[int]) -> Tensor:
    """(S,) the reference log-probabilities of some rows' responses, as a batch has them."""
    return torch.from_numpy(reference[part][rows.sizes[part][:, 1:] >= 0])


def _by_row(values_S: np.ndarray, rows: TokenizedSplit, part: list[int]) -> np.ndarray:
    """(rows, K) from one number for each response."""
    there = rows.sizes[part][:, 1:] >= 0
    matrix = np.zeros(there.shape, dtype=np.float32)
    matrix[there] = values_S
    return matrix


def _write(path: Path, sums: np.ndarray) -> None:
    """A file that appears whole."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        np.save(file, sums, allow_pickle=False)
    temporary.replace(path)
