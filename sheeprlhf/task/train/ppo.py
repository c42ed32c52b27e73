"""Proximal policy optimisation of a language model (arXiv 1707.06347, 2203.02155, details of 2403.17031).

Rollout by rollout: the policy answers prompts, a reward scores the answers, the reference prices how far the policy has
gone from it, the critic spreads the score over the tokens, and both learn from that for `task.ppo_epochs` passes. The
loss of an optimizer step is the mean over its response tokens, of all rows of the step and all devices.
"""

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sheeprlhf.agent.batches import Batches
from sheeprlhf.agent.ema import Average
from sheeprlhf.agent.policy import Policy
from sheeprlhf.agent.reward import RewardModel
from sheeprlhf.agent.shared import SharedScore
from sheeprlhf.data.example import Batch
from sheeprlhf.data.sampler import StepPlan
from sheeprlhf.engine.optim import build_joint_optimizer
from sheeprlhf.engine.run import open_run
from sheeprlhf.engine.step import LossOutput, add_gradients, update
from sheeprlhf.loss import ppo
from sheeprlhf.loss.advantage import by_position, gae, kl_estimates, next_kl_coeff, token_rewards, whiten
from sheeprlhf.rollout.rollout import Rollout, columns
from sheeprlhf.structure.rollout import PPOConfig
from sheeprlhf.structure.run import TrainConfig
from sheeprlhf.task.finish import finish_run
from sheeprlhf.task.online import begin, load_parts
from sheeprlhf.utils.lightning import Fabric, _FabricModule


def policy_loss(
    policy: nn.Module, content: tuple[Batch, dict[str, Tensor]], *, task: PPOConfig, temperature: float
) -> LossOutput:
    """The clipped losses of the tokens, and how far the policy is from the one that sampled them.

    Where the policy's trunk is the critic too, the losses of its values are added.
    """
    batch, sampled = content
    found = policy(batch, temperature=temperature)
    told_of = (found.target_N, sampled["logprobs"], sampled["advantages"])
    losses_N = ppo.policy_losses(*told_of, clip_low=task.clip_coeff, clip_high=task.clip_coeff)
    figures = ppo.ratio_figures(*told_of, task.clip_coeff, task.clip_coeff) | {"policy": losses_N.detach()}
    if found.value_N is not None:
        errors_N = ppo.value_losses(found.value_N, sampled["values"], sampled["returns"], clip=task.value_clip_coeff)
        losses_N = losses_N + task.vf_coeff * errors_N
        figures["value"] = errors_N.detach()
    return LossOutput(losses_N.sum(), {name: values_N.sum() for name, values_N in figures.items()})


def value_loss(critic: nn.Module, content: tuple[Batch, dict[str, Tensor]], *, task: PPOConfig) -> LossOutput:
    """The clipped squared errors of the critic at the places before the tokens."""
    batch, sampled = content
    values_N = critic(batch)
    losses_N = ppo.value_losses(values_N, sampled["values"], sampled["returns"], clip=task.value_clip_coeff)
    return LossOutput(task.vf_coeff * losses_N.sum(), {"value": losses_N.detach().sum()})


def with_advantages(rollout: Rollout, task: PPOConfig, kl_coeff: float, last_values_S: Tensor | None) -> Rollout:
    """The rollout with the advantage and the return of each token.

    Args:
        rollout: with "logprobs", "reference" and "values".
        task: how rewards are shaped.
        kl_coeff: price of a nat of KL.
        last_values_S: (S,) the critic's value after the last token of responses that were cut; None: nothing follows.
    """
    lengths = rollout.response_lengths
    kl_N = kl_estimates(rollout.flat("logprobs"), rollout.flat("reference"), task.kl_estimator)
    kl_ST, mask_ST = by_position(kl_N, lengths)
    values_ST, _ = by_position(rollout.flat("values"), lengths)
    scores_S = torch.from_numpy(rollout.scores).float().flatten()
    rewards_ST = token_rewards(scores_S, kl_ST, mask_ST, kl_coeff)
    if task.normalize_rewards:
        rewards_ST = whiten(rewards_ST, mask_ST, shift_mean=False)
    discounts = {"gamma": task.gae_gamma, "lam": task.gae_lambda}
    advantages_ST, returns_ST = gae(rewards_ST, values_ST, mask_ST, last_values_S=last_values_S, **discounts)
    if task.normalize_advantages:
        advantages_ST = whiten(advantages_ST, mask_ST)
    return rollout.with_tokens(advantages=advantages_ST[mask_ST], returns=returns_ST[mask_ST])


def ptx_loss(policy: nn.Module, batch: Batch) -> LossOutput:
    """The negative log-likelihood of the dataset's own responses (arXiv 2203.02155, eq. 2)."""
    found = policy(batch)
    total = -found.target_N.sum()
    if found.value_N is not None:
        total = total + 0.0 * found.value_N.sum()  # every weight has a part, or ranks would wait for its gradient
    return LossOutput(total, {})


def set_up(
    fabric: Fabric, cfg: TrainConfig, policy: Policy, critic: RewardModel | SharedScore
) -> tuple[_FabricModule, _FabricModule | None, Optimizer]:
    """All ranks: the policy and the critic wrapped, and one optimizer; no critic if it is the policy itself."""
    task = cfg.task
    assert isinstance(task, PPOConfig)
    actor_lr = cfg.peak_lr() if task.actor_learning_rate is None else task.actor_learning_rate
    critic_lr = actor_lr if task.critic_learning_rate is None else task.critic_learning_rate
    critic_module = None
    with policy.in_use():
        actor_module = fabric.setup_module(policy)
        own = [weight for weight in policy.model.parameters() if weight.requires_grad]
    if policy.value_head is not None:
        its = list(policy.value_head.parameters())
    else:
        with critic.in_use():
            critic_module = fabric.setup_module(critic)
            its = [weight for weight in critic.parameters() if weight.requires_grad]
    optimizer = fabric.setup_optimizers(build_joint_optimizer(cfg.optim, [(own, actor_lr), (its, critic_lr)]))
    return actor_module, critic_module, cast(Optimizer, optimizer)


def train(fabric: Fabric, cfg: TrainConfig, run_dir: Path) -> None:
    """All ranks: sample, learn, validate, save, and leave `final/` in the run directory.

    Raises:
        SheepError: something that the user can mend; see its message.
    """
    task, temperature = cfg.task, cfg.generation.temperature
    assert isinstance(task, PPOConfig)
    with open_run(fabric, cfg, run_dir) as run:
        parts = load_parts(fabric, run)
        policy, critic = parts.agents.policy, parts.agents.critic
        assert critic is not None
        actor_module, critic_module, optimizer = set_up(fabric, cfg, policy, critic)
        learners = nn.ModuleDict({"actor": policy, "critic": critic})
        average = None
        if task.ema_decay is not None:
            with policy.in_use():
                average = learners["average"] = Average(policy, task.ema_decay)
        as_shown = nullcontext if average is None else average.in_place
        loop = begin(fabric, run, parts, actor_module, optimizer, learners, as_shown)
        per_token = partial(columns, names=("logprobs", "advantages", "values", "returns"))
        cut = partial(Batches, fabric, task, packed=parts.agents.packed, targets="response")
        batches, texts = cut(beside=per_token), cut()
        text_plan = StepPlan(len(parts.rows), task.ptx_batch_size, epochs=1, seed=cfg.seed)

        of_policy = partial(policy_loss, task=task, temperature=temperature)
        of_critic = partial(value_loss, task=task)
        take_step = partial(update, max_grad_norm=task.gradient_clip_val, skip=run.skip_step)
        for turn in loop:
            rollout, kl_coeff = turn.rollout, turn.carried.get("kl_coeff", task.init_kl_coeff)
            values_N = loop.collect.scores_of(critic, rollout, "values")
            rollout = rollout.with_tokens(values=values_N)
            last_values_S = None
            if task.truncated_value == "bootstrap":
                last_values_S = loop.collect.scores_of(critic, rollout, "values", at_end=True)
                last_values_S[torch.from_numpy(rollout.finished.flatten())] = 0.0
            rollout = with_advantages(rollout, task, kl_coeff, last_values_S)

            for step, micro_batches in turn.passes(rollout, batches):
                if critic_module is not None:
                    with critic.in_use():
                        learnt = take_step(fabric, critic_module, optimizer, micro_batches, of_critic)
                    if learnt["items"]:  # else it was left out
                        turn.note({"loss/value": learnt["value"], "critic/grad_norm": learnt["grad_norm"]})
                if step < task.critic_warmup_steps:
                    continue
                with policy.in_use():
                    if task.ptx_coeff:
                        of_step = texts.of(parts.rows, text_plan.rows_of_step(step))
                        beside = add_gradients(fabric, actor_module, of_step, ptx_loss, weight=task.ptx_coeff)
                        turn.note({"loss/ptx": beside["loss"]})
                    moved = take_step(fabric, actor_module, optimizer, micro_batches, of_policy)
                if not moved["items"]:  # left out: the weights are what they were
                    continue
                if average is not None:
                    average.follow()
                moved.pop("loss")  # the sum of these two
                turn.note({f"loss/{name}": moved.pop(name) for name in ("policy", "value") if name in moved})
                turn.note(moved, "policy/")
                if task.max_kl is not None and moved["approxkl"] > task.max_kl:
                    break

            kl = turn.figures["objective/kl"]
            turn.note(
                {
                    "objective/kl_coeff": kl_coeff,
                    "objective/non_score_reward": -kl_coeff * kl,
                    "objective/rlhf_reward": turn.figures["objective/scores"] - kl_coeff * kl,
                    "critic/explained_variance": ppo.explained_variance(values_N, rollout.flat("returns")),
                }
            )
            if task.adaptive_kl_coeff:
                target, num = task.target_kl_coeff, rollout.finished.size
                how_slowly = {"horizon": task.kl_horizon, "num_responses": num}
                turn.carried["kl_coeff"] = next_kl_coeff(kl_coeff, kl, target=target, **how_slowly)
        with as_shown():
            finish_run(fabric, run, policy, parts.tokenizer, loop.state)
