"""Log-probabilities of the reference model, computed once and kept with the data: no second model stays in memory.

The reference is the policy before its first step, so the policy itself computes them. With `data.streaming` a copy of
it, or the policy without its adapters, computes those of later shards.
"""

import hashlib
import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load, save
from torch import Tensor, nn

from sheeprlhf.agent.batches import Batches, BatchOptions
from sheeprlhf.agent.policy import Policy, SharedReference, reference_of
from sheeprlhf.data.example import Batch
from sheeprlhf.data.prepare import PreparedData
from sheeprlhf.data.store import TokenizedSplit
from sheeprlhf.engine.checkpoint import unwrapped
from sheeprlhf.engine.shard import equal_passes, place, sum_of_rows
from sheeprlhf.engine.step import MicroBatch
from sheeprlhf.model.folder.file_parameters import weights_digest
from sheeprlhf.model.locate import locate_adapter
from sheeprlhf.security.model_folder import ADAPTER_CONFIG, ADAPTERS
from sheeprlhf.security.pickled_weights import adapter_folder
from sheeprlhf.structure.run import TrainConfig
from sheeprlhf.utils.lightning import Fabric
from sheeprlhf.utils.modes import eval_mode, isolated_rng
from sheeprlhf.utils.output import real_file, write_file

if TYPE_CHECKING:
    from sheeprlhf.task.loop import TrainLoop


def set_up_with_reference(loop: "TrainLoop", policy: Policy) -> nn.Module:
    """All ranks: set the loop up; return the module that computes the reference's log-probabilities before each shard.

    With `data.streaming`, the policy as it is now is kept for later shards; else it is its own reference.
    """
    if loop.stream is None:
        return loop.set_up(policy)
    reference = reference_of(policy, new_adapter=loop.run.cfg.model.adapter is None)
    loop.set_up(policy)
    if isinstance(reference, Policy):  # else it is on the policy's base
        place(loop.fabric, reference)
    return reference


def reference_key(policy: Policy, cfg: TrainConfig) -> str:
    """A text that differs for references with other log-probabilities; called before adapters are added."""
    settings = policy.causal_lm().config.to_dict()
    settings = {key: value for key, value in settings.items() if key not in ("_name_or_path", "transformers_version")}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    if cfg.model.adapter is not None and cfg.model.finetune_mode == "LORA":
        folder = adapter_folder(locate_adapter(cfg.model.adapter), lambda _: None)
        for name in (ADAPTER_CONFIG, ADAPTERS):
            digest.update(real_file(folder / name, folder).read_bytes())
    rounded = "-fsdp2" if cfg.fabric.strategy == "fsdp2" and cfg.fabric.precision == "bf16-mixed" else ""
    return f"{weights_digest(policy)}-{digest.hexdigest()}-{cfg.fabric.precision}{rounded}-{policy.packed}"


def sum_by_response(values_N: Tensor, response_index_N: Tensor, num_responses: int) -> Tensor:
    """(S,) float32 sums of the values of each response's tokens."""
    return values_N.new_zeros(num_responses).index_add(0, response_index_N, values_N)


def response_sums(logprobs_N: Tensor, batch: Batch, tail_weight: float = 1.0) -> Tensor:
    """(S,) float32 log-probabilities of the responses, in which tokens behind the shortest one of their row count less.

    (LD-DPO, arXiv 2409.06411, where `tail_weight` is called alpha; 1 is the sum of all tokens.)
    """
    index_N, lengths_S = batch.response_index_N, batch.lengths_S
    if tail_weight != 1.0:
        shorter_P = lengths_S[batch.pairs_P2].amin(dim=1).repeat_interleave(2)
        shortest_S = lengths_S.scatter_reduce(0, batch.pairs_P2.flatten(), shorter_P, "amin")
        place_N = torch.arange(len(index_N), device=index_N.device) - (lengths_S.cumsum(0) - lengths_S)[index_N]
        logprobs_N = torch.where(place_N < shortest_S[index_N], logprobs_N, tail_weight * logprobs_N)
    return sum_by_response(logprobs_N, index_N, len(lengths_S))


@torch.no_grad()
def sums_of_step(
    fabric: Fabric, module: nn.Module, micro_batches: list[MicroBatch], tail_weight: float
) -> list[Tensor]:
    """All ranks: `response_sums` of the present weights for each of this rank's micro-batches, (batch, ...) each."""
    sums: list[Tensor] = []
    with isolated_rng(), eval_mode(module):
        for micro, counts in equal_passes(fabric, module, micro_batches):
            batch = fabric.to_device(micro.batch[0])
            found_S = response_sums(module(batch).target_N, batch, tail_weight).cpu()
            sums += [found_S] if counts else []
    return sums


def reference_logprobs(
    fabric: Fabric,
    module: nn.Module,
    batches: Batches,
    data: PreparedData,
    split: str,
    key: str,
    read: np.ndarray,
    tail_weight: float = 1.0,
) -> np.ndarray:
    """All ranks: the `response_sums` of every response of the rows that are read, before the first step.

    The results are stored in the data's folder; `key` identifies the weights and the computation, `read` is ascending.

    Returns:
        (rows, K) float32 nats, 0 where a row has fewer responses, NaN in rows that are not read.
    """
    rows = data.splits[split]
    some = b"" if len(read) == len(rows) else read.astype(np.int64).tobytes()
    key += "" if tail_weight == 1.0 else f"-tail{tail_weight}"
    name = hashlib.sha256(key.encode() + some).hexdigest()[:16]
    path = data.folder / f"reference-{split}-{name}.safetensors"
    sums = np.zeros((len(rows), rows.sizes.shape[1] - 1), dtype=np.float32)
    stored = fabric.broadcast(_read(path, sums.shape, read) if fabric.is_global_zero else None)
    if stored is not None:
        return stored
    module = unwrapped(module)  # Fabric's wrapper would round its results to half precision
    whole = module.policy if isinstance(module, SharedReference) else module
    passes = equal_passes(fabric, whole, batches.numbered(rows, read, f"reference, {split}"))
    with isolated_rng(), eval_mode(whole), torch.no_grad(), fabric.autocast():
        for (part, micro), counts in passes:
            batch = fabric.to_device(micro.batch)
            sums_S = response_sums(module(batch).target_N, batch, tail_weight)
            if counts:
                sums[part] = _by_row(sums_S.float().cpu().numpy(), rows, part)
    sums = sum_of_rows(fabric, torch.from_numpy(sums)).numpy()  # every rank had other rows, and zeros in these
    sums[np.setdiff1d(np.arange(len(rows)), read)] = np.nan
    if fabric.is_global_zero:
        write_file(data.folder, path.name, save({"logprobs": sums}))
    fabric.barrier()
    return sums


def batches_with_reference(
    fabric: Fabric,
    task: BatchOptions,
    module: nn.Module,
    data: PreparedData,
    split: str,
    read: np.ndarray,
    *,
    key: str | None,
    packed: bool,
    tail_weight: float = 1.0,
) -> Batches:
    """All ranks: batches with the reference's log-probabilities (zeros without a key); see `reference_logprobs`."""
    cut = partial(Batches, fabric, task, packed=packed, targets="response")
    sums = None if key is None else reference_logprobs(fabric, module, cut(), data, split, key, read, tail_weight)
    return cut(num_items=lambda batch: len(batch.row_ids), extras=partial(reference_logprobs_of, sums))


def reference_logprobs_of(reference: np.ndarray | None, rows: TokenizedSplit, part: list[int]) -> Tensor:
    """(S,) the reference log-probabilities of some rows' responses, as a batch has them; zeros without a reference."""
    there = rows.sizes[part][:, 1:] >= 0
    return torch.zeros(int(there.sum())) if reference is None else torch.from_numpy(reference[part][there])


def _by_row(values_S: np.ndarray, rows: TokenizedSplit, part: list[int]) -> np.ndarray:
    """(rows, K) from one number for each response."""
    there = rows.sizes[part][:, 1:] >= 0
    matrix = np.zeros(there.shape, dtype=np.float32)
    matrix[there] = values_S
    return matrix


def _read(path: Path, shape: tuple[int, ...], read: np.ndarray) -> np.ndarray | None:
    """Read the stored log-probabilities; None if there are none, or if they are damaged."""
    try:
        sums = load(path.read_bytes())["logprobs"]
    except (OSError, KeyError, SafetensorError):
        return None
    whole = sums.shape == shape and sums.dtype == np.float32 and bool(np.isfinite(sums[read]).all())
    return sums if whole else None
