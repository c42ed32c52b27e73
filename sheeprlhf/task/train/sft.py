"""Supervised fine-tuning: the model learns to write the response, given the prompt.

The loss of an optimizer step is the sum of its targets' cross-entropies divided by the number of its targets, over
all rows of the step and all devices: how the rows are cut into forward passes never changes it.
"""

import math
from functools import partial
from pathlib import Path

from torch import nn

from sheeprlhf.agent.batches import Batches
from sheeprlhf.data.example import Batch
from sheeprlhf.engine.run import open_run
from sheeprlhf.engine.step import LossOutput, evaluate
from sheeprlhf.loss.sft import cross_entropy
from sheeprlhf.structure.run import TrainConfig
from sheeprlhf.structure.task import SFTConfig
from sheeprlhf.task.initial_policy import load_policy_to_train
from sheeprlhf.task.loop import TrainLoop
from sheeprlhf.task.router import StepRouterLoss, router_loss_in_training, router_loss_of_step
from sheeprlhf.utils.lightning import Fabric


def sft_loss(
    policy: nn.Module, batch: Batch, *, label_smoothing: float = 0.0, router: StepRouterLoss | None = None
) -> LossOutput:
    """Cross-entropy of the batch's targets, summed, and the batch's share of the router's loss, if there is one.

    `nll` is the first without label smoothing, `router_loss` the second.
    """
    logprobs = policy(batch, mean=label_smoothing > 0.0, router=router is not None)
    losses_N = cross_entropy(logprobs.target_N, logprobs.mean_N, label_smoothing)
    total, metrics = losses_N.sum(), {"nll": -logprobs.target_N.detach().sum()}
    if router is not None:
        share = router.share(logprobs.router_logits)
        total, metrics = total + share, metrics | {"router_loss": share.detach()}
    return LossOutput(total, metrics)


def train(fabric: Fabric, cfg: TrainConfig, run_dir: Path) -> None:
    """All ranks: prepare the data, train, validate, save, and leave `final/` in the run directory.

    Raises:
        SheepError: something that the user can mend; see its message.
    """
    task = cfg.task
    assert isinstance(task, SFTConfig)
    with open_run(fabric, cfg, run_dir) as run:
        loop = TrainLoop(fabric, run)
        start = (task.sft_experiment_dir, task.sft_model_name)
        policy, packed = load_policy_to_train(
            cfg.model, *start, loop.tokenizer, longest=loop.longest, batching=task.batching, say=run.say
        )
        router = router_loss_in_training(policy.causal_lm(), run.say)
        module = loop.set_up(policy)
        batches = Batches(fabric, task, packed=packed, targets="response" if task.completion_only_loss else "all")
        loop.begin(partial(batches.of, loop.rows))

        for step in loop:
            loss_fn = partial(sft_loss, label_smoothing=task.label_smoothing)
            if router is not None:
                loss_fn = partial(loss_fn, router=router_loss_of_step(fabric, module, step.batches, router))
            step.update(loss_fn)
            if step.validates:
                result = evaluate(fabric, module, loop.validation_batches(batches), sft_loss)
                step.record(result | {"perplexity": math.exp(min(result["nll"], 700.0))})
                loop.log_samples(policy)
        loop.finish(policy)
