"""Proximal policy optimisation of a language model (arXiv 1707.06347, 2203.02155, details of 2403.17031).

In each iteration the policy answers prompts and a reward scores the responses. The KL divergence from the reference is
subtracted, the critic's values turn the rewards into advantages, and both are trained for `task.num_iterations` passes.
The loss of an optimizer step is the mean over its response tokens, of all rows of the step and all devices.
"""

import math
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sheeprlhf.agent.policy import EMA, Policy
from sheeprlhf.agent.reward import AdapterValueModel, RewardModel
from sheeprlhf.data.example import Batch
from sheeprlhf.data.sampler import StepPlan
from sheeprlhf.engine.optim import build_optimizer
from sheeprlhf.engine.run import open_run
from sheeprlhf.engine.step import LossOutput, add_gradients
from sheeprlhf.loss import ppo
from sheeprlhf.loss.advantage import by_position, gae, kl_estimates, next_kl_coeff, token_rewards, whiten
from sheeprlhf.rollout.rollout import Rollout
from sheeprlhf.structure.rollout import PPOConfig
from sheeprlhf.structure.run import TrainConfig
from sheeprlhf.task.loop import RolloutLoop
from sheeprlhf.utils.lightning import Fabric, _FabricModule


def policy_loss(
    policy: nn.Module, content: tuple[Batch, dict[str, Tensor]], *, task: PPOConfig, temperature: float
) -> LossOutput:
    """Clipped losses of the tokens; plus the losses of the values if the policy's trunk is the critic, too."""
    batch, sampled = content
    output = policy(batch, temperature=temperature, entropy=task.entropy_coeff > 0)
    ratio_args = (output.target_N, sampled["logprobs"], sampled["advantages"])
    losses_N = ppo.policy_losses(*ratio_args, clip_low=task.clip_coeff, clip_high=task.clip_coeff)
    metrics = ppo.ratio_metrics(*ratio_args, task.clip_coeff, task.clip_coeff) | {"policy": losses_N.detach()}
    if output.entropy_N is not None:
        losses_N = losses_N - task.entropy_coeff * output.entropy_N
        metrics["entropy"] = output.entropy_N.detach()
    if output.value_N is not None:
        errors_N = ppo.value_losses(output.value_N, sampled["values"], sampled["returns"], clip=task.value_clip_coeff)
        losses_N = losses_N + task.vf_coeff * errors_N
        metrics["value"] = errors_N.detach()
    return LossOutput(losses_N.sum(), {name: values_N.sum() for name, values_N in metrics.items()})


def value_loss(critic: nn.Module, content: tuple[Batch, dict[str, Tensor]], *, task: PPOConfig) -> LossOutput:
    """Clipped squared errors of the critic at the places before the tokens."""
    batch, sampled = content
    values_N = critic(batch)
    losses_N = ppo.value_losses(values_N, sampled["values"], sampled["returns"], clip=task.value_clip_coeff)
    return LossOutput(task.vf_coeff * losses_N.sum(), {"value": losses_N.detach().sum()})


def with_advantages(rollout: Rollout, task: PPOConfig, kl_coeff: float, last_values_S: Tensor | None) -> Rollout:
    """Return the rollout with the advantage and the return of each token, from "logprobs", "reference" and "values".

    `last_values_S` is the critic's value after the last token of responses that were cut; None: nothing follows.
    """
    lengths = rollout.response_lengths
    kl_N = kl_estimates(rollout.flat("logprobs"), rollout.flat("reference"), task.kl_estimator)
    kl_ST, mask_ST = by_position(kl_N, lengths)
    values_ST, _ = by_position(rollout.flat("values"), lengths)
    scores_S = torch.from_numpy(rollout.scores).float().flatten()
    rewards_ST = token_rewards(scores_S, kl_ST, mask_ST, kl_coeff, rollout.given_rewards())
    if task.normalize_rewards:
        rewards_ST = whiten(rewards_ST, mask_ST, shift_mean=False)
    discounts = {"gamma": task.gae_gamma, "lam": task.gae_lambda}
    advantages_ST, returns_ST = gae(rewards_ST, values_ST, mask_ST, last_values_S=last_values_S, **discounts)
    if task.normalize_advantages:
        advantages_ST = whiten(advantages_ST, mask_ST)
    return rollout.with_tokens(advantages=advantages_ST[mask_ST], returns=returns_ST[mask_ST])


def ptx_loss(policy: nn.Module, batch: Batch) -> LossOutput:
    """Negative log-likelihood of the dataset's own responses (arXiv 2203.02155, eq. 2)."""
    output = policy(batch)
    total = -output.target_N.sum()
    if output.value_N is not None:
        total = total + 0.0 * output.value_N.sum()  # all weights take part, or ranks would wait for its gradient
    return LossOutput(total, {})


def set_up(
    fabric: Fabric, cfg: TrainConfig, policy: Policy, critic: RewardModel | AdapterValueModel
) -> tuple[_FabricModule, _FabricModule | None, Optimizer]:
    """All ranks: wrap policy and critic, make one optimizer for both; the critic is None if it is the policy itself."""
    task = cfg.task
    assert isinstance(task, PPOConfig)
    actor_lr = cfg.peak_lr() if task.actor_learning_rate is None else task.actor_learning_rate
    critic_lr = actor_lr if task.critic_learning_rate is None else task.critic_learning_rate
    critic_module = None
    with policy.in_use():
        actor_module = fabric.setup_module(policy)
        policy_weights = [weight for weight in policy.model.parameters() if weight.requires_grad]
    if policy.value_head is not None:
        critic_weights = list(policy.value_head.parameters())
    else:
        with critic.in_use():
            critic_module = fabric.setup_module(critic)
            critic_weights = [weight for weight in critic.parameters() if weight.requires_grad]
    optimizer = fabric.setup_optimizers(
        build_optimizer(cfg.optim, (policy_weights, actor_lr), (critic_weights, critic_lr))
    )
    return actor_module, critic_module, cast(Optimizer, optimizer)


def train(fabric: Fabric, cfg: TrainConfig, run_dir: Path) -> None:
    """All ranks: sample, learn, validate, save, and leave `final/` in the run directory."""
    task = cfg.task
    assert isinstance(task, PPOConfig)
    with open_run(fabric, cfg, run_dir) as run:
        loop = RolloutLoop(fabric, run)
        policy, critic, ema = loop.models.policy, loop.models.critic, None
        assert critic is not None
        actor_module, critic_module, optimizer = set_up(fabric, cfg, policy, critic)
        learners = nn.ModuleDict({"actor": policy, "critic": critic})
        if task.ema_decay is not None:
            with policy.in_use():
                ema = learners["average"] = EMA(policy, task.ema_decay)
        loop.begin((actor_module, optimizer), learners, nullcontext if ema is None else ema.swap_in)
        batches, ptx_batches = loop.batches("logprobs", "advantages", "values", "returns"), loop.batches()
        order: dict[str, Any] = {"epochs": 1, "seed": cfg.seed, "shuffle": cfg.data.shuffle}
        policy_fn = partial(policy_loss, task=task, temperature=cfg.generation.temperature)
        critic_fn = partial(value_loss, task=task)

        for iteration in loop:
            rollout, kl_coeff = iteration.rollout, iteration.extra_state.get("kl_coeff", task.init_kl_coeff)
            values_N = loop.collect.values_of(critic, rollout)
            rollout = rollout.with_tokens(values=values_N)
            last_values_S = None
            if task.bootstrap_truncated:
                last_values_S = loop.collect.values_of(critic, rollout, at_end=True)
                last_values_S[torch.from_numpy(rollout.finished.flatten())] = 0.0
            rollout = with_advantages(rollout, task, kl_coeff, last_values_S)

            for step, micro_batches in iteration.steps(rollout, batches):
                if critic_module is not None:
                    with critic.in_use():
                        metrics = loop.update(critic_module, micro_batches, critic_fn)
                    if metrics:
                        iteration.log({"loss/value": metrics["value"], "critic/grad_norm": metrics["grad_norm"]})
                if step < task.critic_warmup_steps:
                    continue
                with policy.in_use():
                    if task.ptx_coeff:
                        ptx_plan = StepPlan(len(loop.rows), task.ptx_batch_size, **order)
                        texts = ptx_batches.of(loop.rows, ptx_plan.rows_of_step(step))
                        how: dict[str, Any] = {"weight": task.ptx_coeff, "skip": run.skip_step}
                        ptx = add_gradients(fabric, actor_module, texts, ptx_loss, **how)["loss"]
                        iteration.log({"loss/ptx": ptx})
                        micro_batches = micro_batches if math.isfinite(ptx) else []  # leaves the step out
                    metrics = iteration.update(micro_batches, policy_fn)
                if metrics and ema is not None:
                    ema.update()

            kl, score = iteration.metrics["objective/kl"], iteration.metrics["objective/scores"]
            iteration.log(
                {
                    "objective/kl_coeff": kl_coeff,
                    "objective/non_score_reward": -kl_coeff * kl,
                    "objective/rlhf_reward": score - kl_coeff * kl,
                    "critic/explained_variance": ppo.explained_variance(values_N, rollout.flat("returns")),
                }
            )
            if task.adaptive_kl_coeff:
                target, num_responses = task.target_kl, rollout.finished.size
                iteration.extra_state["kl_coeff"] = next_kl_coeff(
                    kl_coeff, kl, target=target, horizon=task.kl_horizon, num_responses=num_responses
                )
        loop.finish()
