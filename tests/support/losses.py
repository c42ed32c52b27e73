"""Every loss function with a batch that it can read, for checks of devices."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from sheeprlhf.agent.policy import load_policy
from sheeprlhf.agent.reward import load_reward_model, reward_model_of
from sheeprlhf.data.example import Example, collate_packed
from sheeprlhf.engine.step import LossFn
from sheeprlhf.model.folder.load import load_tokenizer
from sheeprlhf.structure.model import ModelConfig
from sheeprlhf.structure.rollout import (
    DistillConfig,
    GRPOConfig,
    OnlineDPOConfig,
    PPOConfig,
    ReinforcePPConfig,
    RLOOConfig,
)
from sheeprlhf.structure.task import DPOConfig, ILQLConfig, KTOConfig
from sheeprlhf.task.train.distill import distill_loss
from sheeprlhf.task.train.dpo import dpo_loss
from sheeprlhf.task.train.grpo import grpo_loss
from sheeprlhf.task.train.ilql import ILQLModel, ilql_loss
from sheeprlhf.task.train.kto import kto_loss
from sheeprlhf.task.train.online_dpo import online_dpo_loss
from sheeprlhf.task.train.ppo import policy_loss, ptx_loss, value_loss
from sheeprlhf.task.train.prm import prm_loss
from sheeprlhf.task.train.reinforce_pp import reinforce_pp_loss
from sheeprlhf.task.train.rloo import rloo_loss
from sheeprlhf.task.train.rm import likelihood_loss, rm_loss
from sheeprlhf.task.train.sft import sft_loss
from tests.support.models import make_model_folder

ONLINE: dict[str, Any] = {"temperature": 1.0}
PER_TOKEN = ("logprobs", "reference", "advantages", "values", "returns")


LOSSES: Mapping[str, tuple[LossFn, str, str]] = {  # the loss; the targets that it needs; what it needs besides a batch
    "sft": (sft_loss, "response", ""),
    "sft, smoothed": (partial(sft_loss, label_smoothing=0.1), "all", ""),
    "rm": (partial(rm_loss, loss_type="last_token"), "last", ""),
    "rm, tokens": (partial(rm_loss, loss_type="per_sample", center=0.01), "scores", ""),
    "dpo": (partial(dpo_loss, task=DPOConfig()), "response", "per response"),
    "dpo, ipo": (partial(dpo_loss, task=DPOConfig(loss_type="ipo")), "response", "per response"),
    "dpo, weights": (partial(dpo_loss, task=DPOConfig(ld_alpha=0.5, use_weighting=True)), "response", "per response"),
    "rm, rankings": (partial(rm_loss, loss_type="plackett_luce", center=0.01), "last", ""),
    "rm, likelihood": (likelihood_loss, "response", ""),
    "prm": (prm_loss, "steps", "label per step"),
    "ilql": (partial(ilql_loss, task=ILQLConfig()), "response", "per response"),
    "kto": (partial(kto_loss, task=KTOConfig(), kl=0.1), "response", "per response"),
    "ppo": (partial(policy_loss, task=PPOConfig(), **ONLINE), "response", "per token"),
    "ppo, critic": (partial(value_loss, task=PPOConfig()), "scores", "per token"),
    "ppo, ptx": (ptx_loss, "response", ""),
    "grpo": (partial(grpo_loss, task=GRPOConfig(), max_length=8, **ONLINE), "response", "per token"),
    "grpo, entropy": (
        partial(grpo_loss, task=GRPOConfig(entropy_coeff=0.1), max_length=8, **ONLINE),
        "response",
        "per token",
    ),
    "distill": (partial(distill_loss, task=DistillConfig(), **ONLINE), "response", "per token"),
    "grpo, gspo": (
        partial(grpo_loss, task=GRPOConfig(loss_type="gspo"), max_length=8, **ONLINE),
        "response",
        "per token",
    ),
    "grpo, cispo": (
        partial(grpo_loss, task=GRPOConfig(loss_type="cispo", max_ratio=4.0), max_length=8, **ONLINE),
        "response",
        "per token",
    ),
    "rloo": (partial(rloo_loss, task=RLOOConfig(), **ONLINE), "response", "per token"),
    "reinforce_pp": (partial(reinforce_pp_loss, task=ReinforcePPConfig(), **ONLINE), "response", "per token"),
    "online_dpo": (partial(online_dpo_loss, task=OnlineDPOConfig(), **ONLINE), "response", "per token"),
}


class LossCase(NamedTuple):
    """A loss function, the module that it reads, and its second argument."""

    loss_fn: LossFn
    module: nn.Module
    content: Any


def loss_case(name: str, folder: Path) -> LossCase:
    """A packed batch of two rows, and a tiny Llama or reward model, which the first case saves in the folder."""
    loss_fn, targets, needed = LOSSES[name]
    scores = targets in ("last", "scores", "steps")
    saved = folder / ("reward" if scores else "policy")
    if not saved.is_dir():
        make_model_folder(saved, "llama", scores=scores)
    cfg = ModelConfig(config_name="auto", repo_name=str(saved))
    load = load_reward_model if scores else load_policy
    module: Any = load(cfg, load_tokenizer(cfg), longest=64, batching="packed")
    rng = torch.Generator().manual_seed(0)
    if name == "ilql":
        torch.manual_seed(0)  # of the new heads
        module = ILQLModel(module)
    if name == "rm, likelihood":
        policy, module = module, reward_model_of(module, cfg, load_tokenizer(cfg))
        module.keep_language_head(policy.causal_lm())
    single = needed in ("per token", "label per step") and name != "online_dpo"
    batch = collate_packed(_examples(1 if single else 2), targets=targets)
    content: Any = batch
    if needed == "per response":
        content = (batch, -20.0 - torch.rand(len(batch.response_lengths), generator=rng))
    elif needed == "label per step":
        content = (batch, torch.arange(len(batch.target_ids_N)) % 2 == 0)
    elif needed:
        content = (batch, {key: -5.0 - torch.rand(len(batch.target_ids_N), generator=rng) for key in PER_TOKEN})
    return LossCase(loss_fn, module, content)


def _examples(num_responses: int) -> list[Example]:
    rng = np.random.default_rng(0)

    def ids(length: int) -> np.ndarray:
        return rng.integers(3, 250, length).astype(np.int32)

    lengths = ((4, (6, 3)), (5, (7, 2)))
    return [
        Example(row, ids(prompt), tuple(map(ids, responses[:num_responses])))
        for row, (prompt, responses) in enumerate(lengths)
    ]
