"""Group relative policy optimisation (arXiv 2402.03300), with DAPO's (2503.14476) and Dr. GRPO's (2503.20783) changes.

No critic: the advantage of a response is its score less the mean score of the responses to its prompt, and the same for
all of its tokens. The KL divergence from the reference is part of the loss (k3), not of the reward.
"""

from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from sheeprlhf.data.example import Batch
from sheeprlhf.engine.run import open_run
from sheeprlhf.engine.step import LossOutput
from sheeprlhf.loss.advantage import group_advantages, kl_estimates
from sheeprlhf.loss.ppo import policy_losses, ratio_metrics, token_weights
from sheeprlhf.structure.rollout import GRPOConfig
from sheeprlhf.structure.run import TrainConfig
from sheeprlhf.task.loop import RolloutLoop
from sheeprlhf.utils.lightning import Fabric

AVERAGES = {"grpo": "sequence", "dapo": "token", "dr_grpo": "constant"}  # of the losses of tokens


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
    clip = (task.clip_coeff, task.clip_coeff if task.clip_high is None else task.clip_high)
    ratio_args = (logprobs_N, sampled["logprobs"], sampled["advantages"])
    losses_N = policy_losses(*ratio_args, clip_low=clip[0], clip_high=clip[1])
    kl_N = kl_estimates(logprobs_N, sampled["reference"], "k3")
    weights_N = token_weights(batch.response_lengths, AVERAGES[task.loss_type], max_length=max_length)
    weights_N = weights_N.to(losses_N.device)
    metrics = ratio_metrics(*ratio_args, *clip) | {"kl": kl_N.detach()}
    total = (weights_N * (losses_N + task.init_kl_coeff * kl_N)).sum()
    return LossOutput(total, {name: (weights_N * values_N).sum() for name, values_N in metrics.items()})


def train(fabric: Fabric, cfg: TrainConfig, run_dir: Path) -> None:
    """All ranks: sample, learn, validate, save, and leave `final/` in the run directory."""
    task = cfg.task
    assert isinstance(task, GRPOConfig)
    with open_run(fabric, cfg, run_dir) as run:
        loop = RolloutLoop(fabric, run)
        loop.begin()
        num_items = None if task.loss_type == "dapo" else lambda batch: len(batch.response_lengths)
        batches = loop.batches("logprobs", "reference", "advantages", num_items=num_items)
        max_length = cfg.generation.max_new_tokens
        loss_fn = partial(grpo_loss, task=task, temperature=cfg.generation.temperature, max_length=max_length)

        for iteration in loop:
            scores_PG = torch.from_numpy(iteration.rollout.scores)
            advantages_PG = group_advantages(scores_PG, scale=task.scale_rewards)
            iteration.log({"frac_reward_zero_std": float((advantages_PG == 0).all(dim=1).float().mean())})
            rollout = iteration.rollout.with_advantages(advantages_PG)
            for _, micro_batches in iteration.steps(rollout, batches):
                iteration.update(micro_batches, loss_fn)
        loop.finish()
