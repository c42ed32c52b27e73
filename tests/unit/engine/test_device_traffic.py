"""Losses on a device that does not exist: misplaced tensors, and waits of the host for the device, show without a GPU.

Tensors of the device have a shape, a number format and no content: an operation on tensors of two devices is an error,
and so is reading a value (`.item()`, `if tensor:`, a boolean index). Copies between the devices are recorded. A build
of torch without CUDA cannot imitate CUDA itself, but a device that torch leaves to others. Padded batches are left out:
in them transformers picks the places that are predicted by a mask, for which the host waits once.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _DummyPrivateUse1Hook,
    _setup_privateuseone_for_python_backend,
)

from sheeprlhf.agent.policy import load_policy
from sheeprlhf.agent.reward import load_reward_model
from sheeprlhf.data.example import Example, collate_packed
from sheeprlhf.engine.step import LossFn
from sheeprlhf.model.load import load_tokenizer
from sheeprlhf.structure.model import ModelConfig
from sheeprlhf.structure.rollout import GRPOConfig, OnlineDPOConfig, PPOConfig, ReinforcePPConfig, RLOOConfig
from sheeprlhf.structure.task import DPOConfig, KTOConfig
from sheeprlhf.task.train.dpo import dpo_loss
from sheeprlhf.task.train.grpo import grpo_loss
from sheeprlhf.task.train.kto import kto_loss
from sheeprlhf.task.train.online_dpo import online_dpo_loss
from sheeprlhf.task.train.ppo import policy_loss, ptx_loss, value_loss
from sheeprlhf.task.train.reinforce_pp import reinforce_pp_loss
from sheeprlhf.task.train.rloo import rloo_loss
from sheeprlhf.task.train.rm import rm_loss
from sheeprlhf.task.train.sft import sft_loss
from tests.support.models import make_model_folder

ONLINE: dict[str, Any] = {"temperature": 1.0}
DEVICE = "absent"
PER_TOKEN = ("logprobs", "reference", "advantages", "values", "returns")


class _Hook(_DummyPrivateUse1Hook):
    def is_available(self) -> bool:
        return False  # torch does not choose the device by itself


class _Module(_DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


@pytest.fixture(scope="module", autouse=True)
def device() -> None:
    if torch._C._get_privateuse1_backend_name() != DEVICE:
        _setup_privateuseone_for_python_backend(rename=DEVICE, hook=_Hook(), backend_module=_Module())


class Copies(TorchDispatchMode):
    """Names of the operations whose inputs and outputs are on different devices."""

    def __init__(self) -> None:
        super().__init__()
        self.between_devices: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        devices = {
            x.device.type for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor) and x.dim()
        }
        if len(devices) > 1:
            self.between_devices.append(str(func))
        return result


def to_device(module: nn.Module) -> None:
    made: dict[torch.Tensor, Any] = {}
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    made.setdefault(tensor, torch.empty_like(tensor, device=DEVICE, requires_grad=tensor.requires_grad))
                    tensors[name] = made[tensor]


def examples(num_responses: int) -> list[Example]:
    rng = np.random.default_rng(0)

    def ids(length: int) -> np.ndarray:
        return rng.integers(3, 250, length).astype(np.int32)

    lengths = ((4, (6, 3)), (5, (7, 2)))
    return [
        Example(row, ids(prompt), tuple(map(ids, responses[:num_responses])))
        for row, (prompt, responses) in enumerate(lengths)
    ]


LOSSES: Mapping[str, tuple[LossFn, str, str]] = {  # the loss; the targets that it needs; what it needs besides a batch
    "sft": (sft_loss, "response", ""),
    "sft, smoothed": (partial(sft_loss, label_smoothing=0.1), "all", ""),
    "rm": (partial(rm_loss, loss_type="last_token"), "last", ""),
    "rm, tokens": (partial(rm_loss, loss_type="per_sample", center=0.01), "scores", ""),
    "dpo": (partial(dpo_loss, task=DPOConfig()), "response", "per response"),
    "dpo, ipo": (partial(dpo_loss, task=DPOConfig(loss_type="ipo")), "response", "per response"),
    "kto": (partial(kto_loss, task=KTOConfig(), kl=0.1), "response", "per response"),
    "ppo": (partial(policy_loss, task=PPOConfig(), **ONLINE), "response", "per token"),
    "ppo, critic": (partial(value_loss, task=PPOConfig()), "scores", "per token"),
    "ppo, ptx": (ptx_loss, "response", ""),
    "grpo": (partial(grpo_loss, task=GRPOConfig(), max_length=8, **ONLINE), "response", "per token"),
    "grpo, gspo": (
        partial(grpo_loss, task=GRPOConfig(loss_type="gspo"), max_length=8, **ONLINE),
        "response",
        "per token",
    ),
    "rloo": (partial(rloo_loss, task=RLOOConfig(), **ONLINE), "response", "per token"),
    "reinforce_pp": (partial(reinforce_pp_loss, task=ReinforcePPConfig(), **ONLINE), "response", "per token"),
    "online_dpo": (partial(online_dpo_loss, task=OnlineDPOConfig(), **ONLINE), "response", "per token"),
}


@pytest.mark.parametrize("name", list(LOSSES))
def test_packed_losses_make_the_host_wait_for_nothing(name: str, tmp_path: Path) -> None:
    loss_fn, targets, needed = LOSSES[name]
    scores = targets in ("last", "scores")
    cfg = ModelConfig(config_name="auto", repo_name=str(make_model_folder(tmp_path, "llama", scores=scores)))
    load = load_reward_model if scores else load_policy
    module = load(cfg, load_tokenizer(cfg), longest=64, batching="packed")[0]
    batch = collate_packed(examples(1 if needed == "per token" and name != "online_dpo" else 2), targets=targets)
    content: Any = batch
    if needed == "per response":
        content = (batch, torch.zeros(len(batch.response_lengths)))
    elif needed:
        content = (batch, {key: torch.zeros(len(batch.target_ids_N)) for key in PER_TOKEN})
    with FakeTensorMode(allow_non_fake_inputs=True):
        to_device(module)
        content = tree_map_only(torch.Tensor, partial(torch.empty_like, device=DEVICE), content)
        with Copies() as copies:
            output = loss_fn(module, content)
            output.total.backward()
    assert {value.device.type for value in (output.total, *output.metrics.values())} == {DEVICE}
    assert copies.between_devices == []
