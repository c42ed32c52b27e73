"""Online direct preference optimisation (arXiv 2402.04792): DPO on pairs that the policy itself samples.

A reward ranks the responses to each prompt; the best and the worst one are a pair. Where all scores are equal there is
none. The loss of an optimizer step is the mean over its pairs, of all rows of the step and all devices.
"""

from functools import partial
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from sheeprlhf.data.example import Batch
from sheeprlhf.engine.run import open_run
from sheeprlhf.engine.step import LossOutput
from sheeprlhf.loss import dpo
from sheeprlhf.loss.reward import accuracies
from sheeprlhf.rollout.rollout import Rollout
from sheeprlhf.structure.rollout import OnlineDPOConfig
from sheeprlhf.structure.run import TrainConfig
from sheeprlhf.task.loop import RolloutLoop
from sheeprlhf.task.reference import sum_by_response
from sheeprlhf.utils.lightning import Fabric


def ranked_pairs(rollout: Rollout) -> Rollout | None:
    """Return the best and the worst response of every prompt whose scores differ, best first; None if there is none.

    Of responses with equal scores the first counts. Two that are the same text never have different scores, unless the
    reward is random: then they do not form a pair.
    """
    rows, tokens = [], []
    for number, (row, scores) in enumerate(zip(rollout.rows, rollout.scores, strict=True)):
        pair = (int(scores.argmax()), int(scores.argmin()))
        best, worst = (row.responses[index] for index in pair)
        if np.array_equal(best, worst):  # where all scores are equal, both are the first
            continue
        masks = row.masks()
        by_response = np.split(rollout.tokens["reference"][number], np.cumsum([mask.sum() for mask in masks])[:-1])
        trained = None if row.trained is None else np.concatenate([masks[index] for index in pair])
        rows.append(row._replace(responses=(best, worst), trained=trained))
        tokens.append(np.concatenate([by_response[index] for index in pair]))
    if not rows:
        return None
    shape = (len(rows), 2)
    return Rollout(tuple(rows), np.zeros(shape), np.ones(shape, dtype=bool), {"reference": tuple(tokens)})


def online_dpo_loss(
    policy: nn.Module, content: tuple[Batch, dict[str, Tensor]], *, task: OnlineDPOConfig, temperature: float
) -> LossOutput:
    """Losses of the pairs, and the implicit rewards beta * (policy - reference) behind them."""
    batch, sampled = content
    index_N, num_responses = batch.response_index_N, len(batch.response_lengths)
    sums_S = sum_by_response(policy(batch, temperature=temperature).target_N, index_N, num_responses)
    h_S = sums_S - sum_by_response(sampled["reference"], index_N, num_responses)
    w, r = batch.pairs_P2.unbind(1)  # winner, rejected
    match task.loss_type:
        case "sigmoid":
            losses_P = dpo.sigmoid(h_S[w], h_S[r], task.beta)
        case "hinge":
            losses_P = dpo.hinge(h_S[w], h_S[r], task.beta)
        case "ipo":
            losses_P = dpo.ipo(h_S[w], h_S[r], batch.lengths_S[w], batch.lengths_S[r], task.beta)
        case _:
            raise ValueError(f"loss_type={task.loss_type!r}")
    margins_P = task.beta * (h_S[w] - h_S[r]).detach()
    metrics = {"rewards/margins": margins_P.sum(), "rewards/accuracies": accuracies(margins_P).sum()}
    return LossOutput(losses_P.sum(), metrics)


def train(fabric: Fabric, cfg: TrainConfig, run_dir: Path) -> None:
    """All ranks: sample, learn, validate, save, and leave `final/` in the run directory."""
    task = cfg.task
    assert isinstance(task, OnlineDPOConfig)
    with open_run(fabric, cfg, run_dir) as run:
        loop = RolloutLoop(fabric, run)
        loop.begin()
        batches = loop.batches("reference", num_items=lambda batch: len(batch.row_ids))
        loss_fn = partial(online_dpo_loss, task=task, temperature=cfg.generation.temperature)
        for iteration in loop:
            pairs = ranked_pairs(iteration.rollout)
            iteration.log({"rollout/pairs": 0.0 if pairs is None else len(pairs) / len(iteration.rollout)})
            if pairs is not None:
                for _, micro_batches in iteration.steps(pairs, batches):
                    iteration.update(micro_batches, loss_fn)
        loop.finish()
