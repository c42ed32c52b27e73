"""Weights to the workers of a rollout server by NCCL, as vLLM's weight transfer (backend nccl) receives them.

The trainer is rank 0 of a group with the workers of one server. The id of the group goes to the server by HTTP, and
torch has the calls of NCCL, so vLLM is not imported. Tested against a server without GPUs that follows the protocol;
not run on GPUs.
"""

import base64
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.cuda import nccl

RANK_OF_WORKERS = 1  # of the first worker; the trainer is before them


class WeightTransfer:
    """A group of the trainer and the workers of a server. `join` and `send` block until the workers take part.

    Args:
        num_workers: processes of the server.
        device: of the trainer's rank zero.

    Attributes:
        init_info: for the server's route /init_weight_transfer_engine.
    """

    def __init__(self, num_workers: int, device: torch.device) -> None:
        self._unique_id, self._world_size, self._device = nccl.unique_id(), num_workers + 1, device
        self.init_info = {
            "nccl_unique_id_b64": base64.b64encode(self._unique_id).decode(),
            "rank_offset": RANK_OF_WORKERS,
            "world_size": self._world_size,
            "packed": False,  # one broadcast for each tensor
        }

    def join(self) -> None:
        """Form the group; vLLM then sums one number over it."""
        with torch.cuda.device(self._device):
            self._comm = nccl.init_rank(self._world_size, self._unique_id, 0)
            nccl.all_reduce([torch.zeros(1, device=self._device)], comms=[self._comm])

    def send(self, tensors: Mapping[str, Tensor]) -> None:
        """Send tensors in the order of `update_info`."""
        with torch.cuda.device(self._device):
            for tensor in tensors.values():
                nccl.broadcast([tensor.to(self._device).contiguous()], comms=[self._comm])
            torch.cuda.synchronize()


def update_info(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return what the server's route /update_weights has to know of tensors before they are sent."""
    return {
        "names": list(tensors),
        "dtype_names": [str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()],
        "shapes": [list(tensor.shape) for tensor in tensors.values()],
    }
