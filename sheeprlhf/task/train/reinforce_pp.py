"""REINFORCE++ (arXiv 2501.03262): PPO's clipped loss without a critic.

The advantage of a token is the sum of the rewards from it on, score at the last token and KL at every token, whitened
over all tokens of the rollout. With `task.group_baseline` the score is less the mean of its prompt's scores, and the KL
is part of the loss (k2).
"""

from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from sheeprlhf.data.example import Batch
from sheeprlhf.engine.run import open_run
from sheeprlhf.engine.step import LossOutput
from sheeprlhf.loss.advantage import by_position, gae, group_advantages, kl_estimates, token_rewards, whiten
from sheeprlhf.loss.ppo import policy_losses, ratio_metrics
from sheeprlhf.rollout.rollout import Rollout
from sheeprlhf.structure.rollout import ReinforcePPConfig
from sheeprlhf.structure.run import TrainConfig
from sheeprlhf.task.loop import RolloutLoop
from sheeprlhf.utils.lightning import Fabric


def reinforce_pp_loss(
    policy: nn.Module, content: tuple[Batch, dict[str, Tensor]], *, task: ReinforcePPConfig, temperature: float
) -> LossOutput:
    """Clipped losses of the tokens; of each, `content` has "logprobs", "reference" and "advantages"."""
    batch, sampled = content
    output = policy(batch, temperature=temperature, entropy=task.entropy_coeff > 0)
    logprobs_N = output.target_N
    ratio_args = (logprobs_N, sampled["logprobs"], sampled["advantages"])
    losses_N = policy_losses(*ratio_args, clip_low=task.clip_coeff, clip_high=task.clip_coeff)
    metrics = ratio_metrics(*ratio_args, task.clip_coeff, task.clip_coeff)
    if task.group_baseline:
        kl_N = kl_estimates(logprobs_N, sampled["reference"], "k2")
        losses_N = losses_N + task.init_kl_coeff * kl_N
        metrics["kl"] = kl_N.detach()
    if output.entropy_N is not None:
        losses_N = losses_N - task.entropy_coeff * output.entropy_N
        metrics["entropy"] = output.entropy_N.detach()
    return LossOutput(losses_N.sum(), {name: values_N.sum() for name, values_N in metrics.items()})


def with_advantages(rollout: Rollout, task: ReinforcePPConfig) -> Rollout:
    """Return the rollout with the advantage of each token, from scores, "logprobs" and "reference"."""
    kl_coeff, scores_PG = task.init_kl_coeff, torch.from_numpy(rollout.scores)
    if task.group_baseline:
        kl_coeff, scores_PG = 0.0, group_advantages(scores_PG, scale=False)
    kl_N = kl_estimates(rollout.flat("logprobs"), rollout.flat("reference"), "k1")
    kl_ST, mask_ST = by_position(kl_N, rollout.response_lengths)
    rewards_ST = token_rewards(scores_PG.float().flatten(), kl_ST, mask_ST, kl_coeff, rollout.given_rewards())
    returns_ST, _ = gae(rewards_ST, torch.zeros_like(rewards_ST), mask_ST, gamma=task.gamma, lam=1.0)
    return rollout.with_tokens(advantages=whiten(returns_ST, mask_ST)[mask_ST])


def train(fabric: Fabric, cfg: TrainConfig, run_dir: Path) -> None:
    """All ranks: sample, learn, validate, save, and leave `final/` in the run directory."""
    task = cfg.task
    assert isinstance(task, ReinforcePPConfig)
    with open_run(fabric, cfg, run_dir) as run:
        loop = RolloutLoop(fabric, run)
        loop.begin()
        batches = loop.batches("logprobs", "reference", "advantages")
        loss_fn = partial(reinforce_pp_loss, task=task, temperature=cfg.generation.temperature)

        for iteration in loop:
            rollout = with_advantages(iteration.rollout, task)
            for _, micro_batches in iteration.steps(rollout, batches):
                iteration.update(micro_batches, loss_fn)
        loop.finish()
