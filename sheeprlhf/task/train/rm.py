"""Reward modelling: the model learns to give the better response the higher score.

The loss of an optimizer step is the mean over its prompts, of all rows of the step and all devices; a prompt's loss is
the mean over the pairs of its responses (InstructGPT, arXiv 2203.02155, eq. 1), or that of their ranking. The score of
a response is that after its last token.
"""

import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sheeprlhf.agent.batches import Batches, MappedRows
from sheeprlhf.agent.reward import OFFSET, reward_model_of
from sheeprlhf.data.example import Batch, Example
from sheeprlhf.engine.run import open_run
from sheeprlhf.engine.step import LossOutput, add_gradients, evaluate
from sheeprlhf.loss.reward import accuracies, by_response, centering, last_scores, plackett_luce, reward_loss
from sheeprlhf.structure.run import TrainConfig
from sheeprlhf.structure.task import RMConfig
from sheeprlhf.task.loop import TrainLoop
from sheeprlhf.utils.lightning import Fabric


def rm_loss(model: nn.Module, batch: Batch, *, loss_type: str, center: float = 0.0) -> LossOutput:
    """Losses of the pairs or of the ranking of each prompt, and how often and how far the better response is ahead."""
    scores_N, weights_P = model(batch), batch.pair_weights_P
    lengths_S, longest = batch.lengths_S, max(batch.response_lengths)
    if loss_type in RMConfig.of_last_tokens:
        lengths_S, longest = torch.ones_like(lengths_S), 1
    scores = by_response(scores_N, batch.target_ids_N, batch.response_index_N, lengths_S, longest=longest)
    chosen_P, rejected_P = last_scores(scores)[batch.pairs_P2].unbind(1)
    if loss_type == "plackett_luce":
        total = plackett_luce(last_scores(scores), batch.pairs_P2).sum()
    else:
        total = (reward_loss(scores, batch.pairs_P2, loss_type, batch.margins_P) * weights_P).sum()
    if center:
        total = total + center * (centering(chosen_P, rejected_P) * weights_P).sum()
    metrics_P = {
        "rewards/chosen": chosen_P,
        "rewards/rejected": rejected_P,
        "rewards/margins": chosen_P - rejected_P,
        "rewards/accuracies": accuracies(chosen_P - rejected_P),
    }
    return LossOutput(total, {k: (v.detach() * weights_P).sum() for k, v in metrics_P.items()})


def likelihood_loss(model: nn.Module, batch: Batch) -> LossOutput:
    """Negative log-likelihoods of the tokens of a batch by the language head (MOSS-RLHF, arXiv 2307.04964, eq. 4)."""
    return LossOutput(-model(batch, logprobs=True).sum(), {})


def preferred_only(row: Example) -> Example:
    """The row with its best response only."""
    return row._replace(responses=row.responses[:1], trained=None)


def chosen_scores(model: nn.Module, batch: Batch) -> LossOutput:
    """The scores of the better responses of all pairs, summed."""
    return LossOutput(model(batch)[batch.pairs_P2[:, 0]].double().sum(), {})


def train(fabric: Fabric, cfg: TrainConfig, run_dir: Path) -> None:
    """All ranks: prepare the data, train, validate, save, and leave `final/` in the run directory."""
    task = cfg.task
    assert isinstance(task, RMConfig)
    with open_run(fabric, cfg, run_dir) as run:
        loop = TrainLoop(fabric, run)
        policy = loop.load_policy(new_head=not task.likelihood_coeff)
        model = reward_model_of(policy, cfg.model, loop.tokenizer)
        if task.likelihood_coeff:
            model.keep_language_head(policy.causal_lm())
        module = loop.set_up(model)
        targets = "last" if task.loss_type in RMConfig.of_last_tokens else "scores"
        texts = Batches(fabric, task, packed=model.packed, targets="response")
        batches = Batches(
            fabric, task, packed=model.packed, targets=targets, num_items=lambda batch: len(batch.row_ids)
        )
        loop.begin(lambda rows, _: partial(batches.of, rows))

        loss_fn = partial(rm_loss, loss_type=task.loss_type, center=task.center_rewards_coefficient)

        def validate() -> None:
            loop.record(evaluate(fabric, module, loop.validation_batches(batches), loss_fn))

        if loop.validates_at_start:
            validate()
        for step in loop:
            likelihood, micro_batches = dict[str, float](), step.batches
            if task.likelihood_coeff:
                preferred = texts.of(MappedRows(loop.rows, preferred_only), loop.plan.rows_of_step(loop.state.step))
                how: dict[str, Any] = {"weight": task.likelihood_coeff, "skip": run.skip_step}
                likelihood["nll"] = add_gradients(fabric, module, preferred, likelihood_loss, **how)["loss"]
                micro_batches = step.batches if math.isfinite(likelihood["nll"]) else []  # leaves the step out
            step.metrics = step.update(loss_fn, micro_batches) | likelihood
            if step.validates:
                validate()
        if task.normalize_on == "demonstrations":
            pairs = Batches(
                fabric, task, packed=model.packed, targets="last", num_items=lambda batch: len(batch.pairs_P2)
            )
            rows = loop.plan.rows_until(loop.state.step)
            micro_batches = (micro for _, micro in pairs.numbered(loop.rows, rows, "normalising"))
            model.offset = evaluate(fabric, module, micro_batches, chosen_scores)["loss"]
            run.say(f"preferred responses that were trained on score {model.offset:.4f}: {OFFSET} in config.json")
        loop.finish(model)
