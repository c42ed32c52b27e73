"""On-policy distillation: the policy answers prompts, and each of its tokens is rewarded by a teacher (2306.13649).

The loss of an optimizer step is the reverse KL divergence KL(policy, teacher), an estimate from the sampled tokens: the
advantage of a token is log p_teacher - log p_policy, with a discount of 0, so that no later token counts. Its gradient
is that of the divergence in each state that the policy visits. The teacher is in the place of the reference: its
log-probabilities are the "reference" of a rollout, and `objective/kl` is the divergence from it.
"""

from functools import partial
from pathlib import Path

from torch import Tensor, nn

from sheeprlhf.data.example import Batch
from sheeprlhf.engine.run import open_run
from sheeprlhf.engine.step import LossOutput
from sheeprlhf.loss.ppo import policy_losses, ratio_metrics
from sheeprlhf.rollout.rollout import Rollout
from sheeprlhf.structure.rollout import DistillConfig
from sheeprlhf.structure.run import TrainConfig
from sheeprlhf.task.loop import RolloutLoop
from sheeprlhf.utils.lightning import Fabric


def with_advantages(rollout: Rollout) -> Rollout:
    """Return the rollout with log p_teacher - log p_policy of each token, nats, when it was sampled."""
    return rollout.with_tokens(advantages=rollout.flat("reference") - rollout.flat("logprobs"))


def distill_loss(
    policy: nn.Module, content: tuple[Batch, dict[str, Tensor]], *, task: DistillConfig, temperature: float
) -> LossOutput:
    """Clipped losses of the tokens; of each, `content` has "logprobs" and "advantages"."""
    batch, sampled = content
    output = policy(batch, temperature=temperature, entropy=task.entropy_coeff > 0)
    ratio_args = (output.target_N, sampled["logprobs"], sampled["advantages"])
    losses_N = policy_losses(*ratio_args, clip_low=task.clip_coeff, clip_high=task.clip_coeff)
    metrics = ratio_metrics(*ratio_args, task.clip_coeff, task.clip_coeff) | {"kl": -sampled["advantages"]}
    if output.entropy_N is not None:
        losses_N = losses_N - task.entropy_coeff * output.entropy_N
        metrics["entropy"] = output.entropy_N.detach()
    return LossOutput(losses_N.sum(), {name: values_N.sum() for name, values_N in metrics.items()})


def train(fabric: Fabric, cfg: TrainConfig, run_dir: Path) -> None:
    """All ranks: sample, learn, validate, save, and leave `final/` in the run directory."""
    task = cfg.task
    assert isinstance(task, DistillConfig)
    with open_run(fabric, cfg, run_dir) as run:
        loop = RolloutLoop(fabric, run)
        loop.begin()
        batches = loop.batches("logprobs", "advantages")
        loss_fn = partial(distill_loss, task=task, temperature=cfg.generation.temperature)
        for iteration in loop:
            for _, micro_batches in iteration.steps(with_advantages(iteration.rollout), batches):
                iteration.update(micro_batches, loss_fn)
        loop.finish()
