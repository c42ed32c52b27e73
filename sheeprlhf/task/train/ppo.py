"""Proximal policy optimisation of a language model (arXiv 1707.06347, 2203.02155, details of 2403.17031).

Rollout by rollout: the policy answers prompts, a reward scores the answers, the reference prices how far the policy has
gone from it, the critic spreads the score over the tokens, and both learn from that for `task.ppo_epochs` passes. The
loss of an optimizer step is the mean over its response tokens, of all rows of the step and all devices.
"""

from functools import partial
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sheeprlhf.agent.rollout import Rollout, columns
from sheeprlhf.data.example import Batch
from sheeprlhf.engine.optim import build_joint_optimizer
from sheeprlhf.engine.run import open_run
from sheeprlhf.engine.step import LossOutput, update
from sheeprlhf.loss import ppo
from sheeprlhf.loss.advantage import by_position, gae, kl_estimates, next_kl_coeff, token_rewards, whiten
from sheeprlhf.model.load import load_tokenizer
from sheeprlhf.structure.online import PPOConfig
from sheeprlhf.structure.run import TrainConfig
from sheeprlhf.task.batches import Batches
from sheeprlhf.task.finish import finish_run
from sheeprlhf.task.held_out import HeldOut
from sheeprlhf.task.online import check_sampler, load_agents, load_prompts, make_collector
from sheeprlhf.task.turns import turns
from sheeprlhf.utils.lightning import Fabric


def policy_loss(
    policy: nn.Module, content: tuple[Batch, dict[str, Tensor]], *, task: PPOConfig, temperature: float
) -> LossOutput:
    """The clipped losses of the tokens, and how far the policy is from the one that sampled them."""
    batch, sampled = content
    logprobs_N = policy(batch, temperature=temperature).target_N
    told_of = (logprobs_N, sampled["logprobs"], sampled["advantages"])
    losses_N = ppo.policy_losses(*told_of, clip_low=task.clip_coeff, clip_high=task.clip_coeff)
    figures = ppo.ratio_figures(*told_of, task.clip_coeff, task.clip_coeff)
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


def train(fabric: Fabric, cfg: TrainConfig, run_dir: Path) -> None:
    """All ranks: sample, learn, validate, save, and leave `final/` in the run directory.

    Raises:
        SheepError: something that the user can mend; see its message.
    """
    task, temperature = cfg.task, cfg.generation.temperature
    assert isinstance(task, PPOConfig)
    with open_run(fabric, cfg, run_dir) as run:
        tokenizer = load_tokenizer(cfg.model)
        prompts = load_prompts(fabric, run, tokenizer)
        agents = load_agents(run, tokenizer, longest=prompts.longest)
        policy, critic = agents.policy, agents.critic
        assert critic is not None
        actor_lr = cfg.peak_lr() if task.actor_learning_rate is None else task.actor_learning_rate
        critic_lr = actor_lr if task.critic_learning_rate is None else task.critic_learning_rate
        with policy.in_use():
            actor_module = fabric.setup_module(policy)
            own = [weight for weight in policy.parameters() if weight.requires_grad]
        with critic.in_use():
            critic_module = fabric.setup_module(critic)
            its = [weight for weight in critic.parameters() if weight.requires_grad]
        optimizer = build_joint_optimizer(cfg.optim, [(own, actor_lr), (its, critic_lr)])
        optimizer = cast(Optimizer, fabric.setup_optimizers(optimizer))
        collect = make_collector(fabric, run, tokenizer, agents)
        per_token = partial(columns, names=("logprobs", "advantages", "values", "returns"))
        batches = Batches(fabric, task, packed=agents.packed, targets="response", beside=per_token)
        learners = nn.ModuleDict({"actor": policy, "critic": critic})
        torch.manual_seed(cfg.seed + fabric.global_rank)  # weights began alike on all ranks, dropout does not
        state = run.restore(learners, optimizer)
        kl_coeff = float(state.extra.get("kl_coeff") or task.init_kl_coeff)
        validate = None
        if prompts.held_out is not None:
            validate = HeldOut(fabric, run, collect, actor_module, prompts.held_out)

        of_policy = partial(policy_loss, task=task, temperature=temperature)
        of_critic = partial(value_loss, task=task)
        how = {"max_grad_norm": task.gradient_clip_val}
        for turn in turns(run, state, prompts.rows, collect, validate, learners, optimizer):
            rollout = turn.rollout
            if turn.number == 0:
                check_sampler(run, collect, rollout, policy)
            values_N = collect.scores_of(critic, rollout, "values")
            rollout = rollout.with_tokens(values=values_N)
            last_values_S = None
            if task.truncated_value == "bootstrap":
                last_values_S = collect.scores_of(critic, rollout, "values", at_end=True)
                last_values_S[torch.from_numpy(rollout.finished.flatten())] = 0.0
            rollout = with_advantages(rollout, task, kl_coeff, last_values_S)

            for step, micro_batches in turn.passes(rollout, batches):
                with critic.in_use():
                    learnt = update(fabric, critic_module, optimizer, micro_batches, of_critic, **how)
                turn.note({"loss/value": learnt["value"], "critic/grad_norm": learnt["grad_norm"]})
                if step < task.critic_warmup_steps:
                    continue
                with policy.in_use():
                    moved = update(fabric, actor_module, optimizer, micro_batches, of_policy, **how)
                turn.note({"loss/policy": moved.pop("loss")})
                turn.note(moved, "policy/")
                if task.max_kl is not None and moved["approxkl"] > task.max_kl:
                    break

            kl = collect.figures["objective/kl"]
            turn.note(
                {
                    "objective/kl_coeff": kl_coeff,
                    "objective/non_score_reward": -kl_coeff * kl,
                    "objective/rlhf_reward": collect.figures["objective/scores"] - kl_coeff * kl,
                    "val/explained_variance": ppo.explained_variance(values_N, rollout.flat("returns")),
                }
            )
            if task.adaptive_kl_coeff:
                target, num = task.target_kl_coeff, rollout.finished.size
                kl_coeff = next_kl_coeff(kl_coeff, kl, target=target, horizon=task.kl_horizon, num_responses=num)
            turn.carried = {"kl_coeff": kl_coeff}
        next_command = f"python sheeprlhf.py eval task=perplexity experiment_dir={run.dir}"
        finish_run(fabric, run, policy, tokenizer, state, next_command)
