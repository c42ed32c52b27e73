"""Group relative policy optimisation (arXiv 2402.03300), and the changes of DAPO, Dr. GRPO, GSPO and CISPO.

No critic: the advantage of a response is its score less the mean score of the responses to its prompt, and the same for
all of its tokens. The KL divergence from the reference is part of the loss, not of the reward.
"""

from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from sheeprlhf.data.example import Batch
from sheeprlhf.engine.run import open_run
from sheeprlhf.engine.step import LossOutput
from sheeprlhf.loss.advantage import group_advantages, kl_estimates
from sheeprlhf.loss.ppo import cispo_losses, policy_losses, ratio_metrics, token_weights, with_mean_ratio
from sheeprlhf.structure.rollout import GRPOConfig
from sheeprlhf.structure.run import TrainConfig
from sheeprlhf.task.loop import RolloutLoop
from sheeprlhf.utils.lightning import Fabric

# of the losses of tokens
AVERAGES = {"grpo": "sequence", "gspo": "sequence", "dapo": "token", "cispo": "token", "dr_grpo": "constant"}


def grpo_loss(
    policy: nn.Module,
    content: tuple[Batch, dict[str, Tensor]],
    *,
    task: GRPOConfig,
    temperature: float,
    max_length: int,
) -> LossOutput:
    """Clipped losses of the tokens and their KL, weighted as `task.loss_type` says; dr_grpo reads `max_length`.

    `content` is a batch, and of each of its tokens "logprobs", "reference" and "advantages".
    """
    batch, sampled = content
    logprobs_N = policy(batch, temperature=temperature).target_N
    low, high = task.clip_coeff, task.clip_coeff if task.clip_high is None else task.clip_high
    old_N, advantages_N = sampled["logprobs"], sampled["advantages"]
    of_response = (batch.response_index_N, batch.lengths_S)
    of_ratio_N = with_mean_ratio(logprobs_N, old_N, *of_response) if task.loss_type == "gspo" else logprobs_N
    if task.loss_type == "cispo":
        losses_N = cispo_losses(logprobs_N, old_N, advantages_N, clip_high=high)
    else:
        losses_N = policy_losses(
            of_ratio_N, old_N, advantages_N, clip_low=low, clip_high=high, max_ratio=task.max_ratio
        )
    kl_N = kl_estimates(logprobs_N, sampled["reference"], task.kl_estimator)
    weights_N = token_weights(*of_response, AVERAGES[task.loss_type], max_length=max_length)
    metrics = ratio_metrics(of_ratio_N, old_N, advantages_N, low, high) | {"kl": kl_N.detach()}
    total = (weights_N * (losses_N + task.init_kl_coeff * kl_N)).sum()
    return LossOutput(total, {name: (weights_N * values_N).sum() for name, values_N in metrics.items()})


def train(fabric: Fabric, cfg: TrainConfig, run_dir: Path) -> None:
    """All ranks: sample, learn, validate, save, and leave `final/` in the run directory."""
    task = cfg.task
    assert isinstance(task, GRPOConfig)
    with open_run(fabric, cfg, run_dir) as run:
        loop = RolloutLoop(fabric, run)
        loop.begin()
        num_items = None if AVERAGES[task.loss_type] == "token" else lambda batch: len(batch.response_lengths)
        batches = loop.batches("logprobs", "reference", "advantages", num_items=num_items)
        max_length = cfg.generation.max_new_tokens
        loss_fn = partial(grpo_loss, task=task, temperature=cfg.generation.temperature, max_length=max_length)

        for iteration in loop:
            scores_PG = torch.from_numpy(iteration.rollout.scores)
            advantages_PG = group_advantages(scores_PG, scale=task.scale_rewards)
            iteration.log({"frac_reward_zero_std": float((advantages_PG == 0).all(dim=1).float().mean())})
            if task.mask_truncated:
                advantages_PG = torch.where(torch.from_numpy(iteration.rollout.finished), advantages_PG, 0.0)
            if task.max_advantage is not None:
                advantages_PG = advantages_PG.clamp(-task.max_advantage, task.max_advantage)
            rollout = iteration.rollout.with_advantages(advantages_PG)
            for _, micro_batches in iteration.steps(rollout, batches):
                iteration.update(micro_batches, loss_fn)
        loop.finish()
