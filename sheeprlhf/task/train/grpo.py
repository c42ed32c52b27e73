"""Group relative policy optimisation (arXiv 2402.03300), and the changes of DAPO, Dr. GRPO, GSPO and CISPO.

No critic: the advantage of a response is its score less the mean score of the responses to its prompt, and the same for
all of its tokens. The KL divergence from the reference is part of the loss, not of the reward.
"""

from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from sheeprlhf.data.example import Batch
from sheeprlhf.engine.run import open_run
from sheeprlhf.engine.step import LossOutput
from sheeprlhf.loss.advantage import group_advantages, kl_estimates
from sheeprlhf.loss.ppo import cispo_losses, policy_losses, ratio_metrics, token_weights, with_mean_ratio
from sheeprlhf.rollout.rollout import Rollout
from sheeprlhf.structure.rollout import GRPOConfig
from sheeprlhf.structure.run import TrainConfig
from sheeprlhf.task.loop import Iteration, RolloutLoop
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
    output = policy(batch, temperature=temperature, entropy=task.entropy_coeff > 0)
    logprobs_N = output.target_N
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
    losses_N = losses_N + task.init_kl_coeff * kl_N
    if output.entropy_N is not None:
        losses_N = losses_N - task.entropy_coeff * output.entropy_N
        metrics["entropy"] = output.entropy_N.detach()
    total = (weights_N * losses_N).sum()
    return LossOutput(total, {name: (weights_N * values_N).sum() for name, values_N in metrics.items()})


def resample_equal_groups(loop: RolloutLoop, iteration: Iteration, task: GRPOConfig) -> Rollout:
    """All ranks: the rollout, in which prompts whose responses score alike are replaced by others, drawn at random.

    (DAPO, arXiv 2503.14476, section 3.2.) The scores of the reward are compared, without penalties, which make all
    scores differ. The prompts are a function of the seed, the rollout's number and the round, like the samples.
    """
    rollout, num_replaced = iteration.rollout, 0
    for number in range(1, task.max_resamples + 1):
        raw_PG = np.array(rollout.raw.total).reshape(rollout.scores.shape)
        [equal] = np.nonzero(raw_PG.max(axis=1) == raw_PG.min(axis=1))
        if not len(equal):
            break
        rng = np.random.default_rng([loop.run.cfg.seed, iteration.number, number, len(equal)])
        prompts = rng.choice(len(loop.rows), size=len(equal), replace=False)
        other = loop.collect(loop.rows.examples(prompts.tolist()), iteration.number + (number << 32))
        rollout, num_replaced = rollout.with_rows(equal.tolist(), other), num_replaced + len(equal)
    iteration.log({"rollout/resampled": num_replaced / len(rollout)})
    return rollout


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
            rollout = resample_equal_groups(loop, iteration, task) if task.max_resamples else iteration.rollout
            scores_PG = torch.from_numpy(rollout.scores)
            advantages_PG = group_advantages(scores_PG, scale=task.scale_rewards)
            iteration.log({"frac_reward_zero_std": float((advantages_PG == 0).all(dim=1).float().mean())})
            if task.mask_truncated:
                advantages_PG = torch.where(torch.from_numpy(rollout.finished), advantages_PG, 0.0)
            if task.max_advantage is not None:
                advantages_PG = advantages_PG.clamp(-task.max_advantage, task.max_advantage)
            for _, micro_batches in iteration.steps(rollout.with_advantages(advantages_PG), batches):
                iteration.update(micro_batches, loss_fn)
        loop.finish()
