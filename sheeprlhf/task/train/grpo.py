"""Group relative policy optimisation (arXiv 2402.03300), with DAPO's (2503.14476) and Dr. GRPO's (2503.20783) changes.

No critic: a response is worth what its score is above those of the other responses to its prompt, and every token of it
the same. The KL divergence from the reference is part of the loss (k3), not of the reward.
"""

from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from sheeprlhf.agent.batches import Batches
from sheeprlhf.data.example import Batch
from sheeprlhf.engine.optim import build_optimizer
from sheeprlhf.engine.run import open_run
from sheeprlhf.engine.step import LossOutput, update
from sheeprlhf.loss.advantage import group_advantages, kl_estimates
from sheeprlhf.loss.ppo import policy_losses, ratio_figures, token_weights
from sheeprlhf.rollout.rollout import columns
from sheeprlhf.structure.rollout import GRPOConfig
from sheeprlhf.structure.run import TrainConfig
from sheeprlhf.task.finish import finish_run
from sheeprlhf.task.online import begin, load_parts
from sheeprlhf.utils.lightning import Fabric

AVERAGES = {"grpo": "sequence", "dapo": "token", "dr_grpo": "constant"}  # how the losses of tokens are added up


def grpo_loss(
    policy: nn.Module,
    content: tuple[Batch, dict[str, Tensor]],
    *,
    task: GRPOConfig,
    temperature: float,
    max_length: int,
) -> LossOutput:
    """The clipped losses of the tokens and their KL, weighted as `task.loss_type` says.

    Args:
        policy: what trains.
        content: a batch, and of each of its tokens "logprobs", "reference" and "advantages".
        task: the options.
        temperature: of the sampling.
        max_length: the most tokens that a response may have (dr_grpo).
    """
    batch, sampled = content
    logprobs_N = policy(batch, temperature=temperature).target_N
    clip = (task.clip_coeff, task.clip_coeff if task.clip_high is None else task.clip_high)
    of_tokens = (logprobs_N, sampled["logprobs"], sampled["advantages"])
    losses_N = policy_losses(*of_tokens, clip_low=clip[0], clip_high=clip[1])
    kl_N = kl_estimates(logprobs_N, sampled["reference"], "k3")
    weights_N = token_weights(batch.response_lengths, AVERAGES[task.loss_type], max_length=max_length)
    weights_N = weights_N.to(losses_N.device)
    told = ratio_figures(*of_tokens, *clip) | {"kl": kl_N.detach()}
    total = (weights_N * (losses_N + task.init_kl_coeff * kl_N)).sum()
    return LossOutput(total, {name: (weights_N * values_N).sum() for name, values_N in told.items()})


def train(fabric: Fabric, cfg: TrainConfig, run_dir: Path) -> None:
    """All ranks: sample, learn, validate, save, and leave `final/` in the run directory.

    Raises:
        SheepError: something that the user can mend; see its message.
    """
    task = cfg.task
    assert isinstance(task, GRPOConfig)
    with open_run(fabric, cfg, run_dir) as run:
        parts = load_parts(fabric, run)
        policy, packed = parts.agents.policy, parts.agents.packed
        optimizer = build_optimizer(cfg.optim, policy, cfg.peak_lr())
        module, optimizer = fabric.setup(policy, optimizer)
        loop = begin(fabric, run, parts, module, optimizer)
        per_token = partial(columns, names=("logprobs", "reference", "advantages"))
        cut = partial(Batches, fabric, task, packed=packed, targets="response", beside=per_token)
        batches = cut() if task.loss_type == "dapo" else cut(num_items=lambda batch: len(batch.response_lengths))
        longest = cfg.generation.max_new_tokens
        loss_fn = partial(grpo_loss, task=task, temperature=cfg.generation.temperature, max_length=longest)
        take_step = partial(update, max_grad_norm=task.gradient_clip_val, skip=run.skip_step)
        for turn in loop:
            rollout = turn.rollout
            advantages_PG = group_advantages(torch.from_numpy(rollout.scores), scale=task.scale_rewards)
            lengths_S = torch.tensor(rollout.response_lengths)
            rollout = rollout.with_tokens(advantages=advantages_PG.flatten().repeat_interleave(lengths_S))
            turn.note({"rollout/equal_scores": float((advantages_PG == 0).all(dim=1).float().mean())})
            for _, micro_batches in turn.passes(rollout, batches):
                moved = take_step(fabric, module, optimizer, micro_batches, loss_fn)
                if not moved["items"]:  # left out
                    continue
                turn.note({"loss/policy": moved.pop("loss")})
                turn.note(moved, "policy/")
                if task.max_kl is not None and moved["approxkl"] > task.max_kl:
                    break
        finish_run(fabric, run, policy, parts.tokenizer, loop.state)
