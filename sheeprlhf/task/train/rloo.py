"""REINFORCE leave-one-out (arXiv 2402.14740): a whole response is one action.

Its reward is its score less the KL divergence from the reference, its baseline the mean reward of the other responses
to the same prompt. No critic. Further passes over a rollout weigh a response by its probability ratio, clipped.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from sheeprlhf.data.example import Batch
from sheeprlhf.engine.run import open_run
from sheeprlhf.engine.step import LossOutput
from sheeprlhf.loss.advantage import by_position, leave_one_out, moments
from sheeprlhf.loss.ppo import ratio_metrics, sequence_policy_losses
from sheeprlhf.structure.rollout import RLOOConfig
from sheeprlhf.structure.run import TrainConfig
from sheeprlhf.task.loop import RolloutLoop
from sheeprlhf.task.reference import sum_by_response
from sheeprlhf.utils.lightning import Fabric


def rloo_loss(
    policy: nn.Module, content: tuple[Batch, dict[str, Tensor]], *, task: RLOOConfig, temperature: float
) -> LossOutput:
    """Losses of whole responses; of each token `content` has "logprobs" and the "advantages" of its response."""
    batch, sampled = content
    index_N, num_responses = batch.response_index_N, len(batch.response_lengths)
    output = policy(batch, temperature=temperature, entropy=task.entropy_coeff > 0)
    sums_S = sum_by_response(output.target_N, index_N, num_responses)
    old_S = sum_by_response(sampled["logprobs"], index_N, num_responses)
    advantages_S = sum_by_response(sampled["advantages"], index_N, num_responses) / batch.lengths_S
    losses_S = sequence_policy_losses(sums_S, old_S, advantages_S, clip=task.clip_coeff)
    metrics = ratio_metrics(sums_S, old_S, advantages_S, task.clip_coeff, task.clip_coeff)
    if output.entropy_N is not None:
        entropy_S = sum_by_response(output.entropy_N, index_N, num_responses) / batch.lengths_S
        losses_S = losses_S - task.entropy_coeff * entropy_S
        metrics["entropy"] = entropy_S.detach()
    return LossOutput(losses_S.sum(), {name: values_S.sum() for name, values_S in metrics.items()})


def leave_one_out_advantages(
    logprobs_N: Tensor, reference_N: Tensor, scores_PG: np.ndarray, lengths: Sequence[int], *, kl_coeff: float
) -> tuple[Tensor, Tensor]:
    """(P, G) rewards, score less KL, and their differences from the mean of the prompt's other responses.

    The log-probabilities are of the sampled tokens, in nats; `kl_coeff` is in reward units per nat.
    """
    kl_ST, _ = by_position(logprobs_N - reference_N, lengths)
    rewards_PG = torch.from_numpy(scores_PG) - kl_coeff * kl_ST.double().sum(dim=1).view(scores_PG.shape)
    return rewards_PG, leave_one_out(rewards_PG)


def train(fabric: Fabric, cfg: TrainConfig, run_dir: Path) -> None:
    """All ranks: sample, learn, validate, save, and leave `final/` in the run directory."""
    task = cfg.task
    assert isinstance(task, RLOOConfig)
    with open_run(fabric, cfg, run_dir) as run:
        loop = RolloutLoop(fabric, run)
        loop.begin()
        batches = loop.batches("logprobs", "advantages", num_items=lambda batch: len(batch.response_lengths))
        loss_fn = partial(rloo_loss, task=task, temperature=cfg.generation.temperature)

        for iteration in loop:
            rollout, kl_coeff = iteration.rollout, task.init_kl_coeff
            logprobs = rollout.flat("logprobs"), rollout.flat("reference")
            lengths = rollout.response_lengths
            rewards_PG, advantages_PG = leave_one_out_advantages(*logprobs, rollout.scores, lengths, kl_coeff=kl_coeff)
            if task.normalize_advantages:
                mean, variance = moments(advantages_PG)
                advantages_PG = (advantages_PG - mean) * torch.rsqrt(variance + 1e-8)
            iteration.log({"objective/rlhf_reward": float(rewards_PG.mean())})
            for _, micro_batches in iteration.steps(rollout.with_advantages(advantages_PG), batches):
                iteration.update(micro_batches, loss_fn)
        loop.finish()
