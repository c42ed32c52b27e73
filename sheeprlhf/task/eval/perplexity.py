"""Perplexity: exp of the mean negative log-likelihood of a token, over all tokens of a split.

The mean is over tokens, not over rows or batches, so batch size, batching and number of devices do not change it.
Bits per character compare models of different tokenizers: the bits of all response tokens, EOS included, divided by the
characters of the responses' texts.
"""

import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sheeprlhf.agent.batches import Batches, longest_row
from sheeprlhf.agent.policy import Policy
from sheeprlhf.data.prepare import TokenizedSplit
from sheeprlhf.engine.shard import equal_passes, place
from sheeprlhf.structure.evaluation import PerplexityConfig
from sheeprlhf.structure.run import EvalConfig
from sheeprlhf.task.eval.load import Evaluation
from sheeprlhf.task.eval.result import draw_histogram, resampled, save_result
from sheeprlhf.utils.lightning import Fabric, gather_objects
from sheeprlhf.utils.memory import phase
from sheeprlhf.utils.modes import eval_mode
from sheeprlhf.utils.vocabulary import ResponseDecoder

_HIGHEST = 700.0  # nats, whose exp is a number


def evaluate(fabric: Fabric, cfg: EvalConfig) -> Path | None:
    """All ranks: print the perplexity and save it as JSON."""
    task = cfg.task
    assert isinstance(task, PerplexityConfig)
    job = Evaluation(fabric, cfg)
    split = job.split(job.prepare("sft"))
    policy = job.load_policy(longest_row({"": split}))
    place(fabric, policy)  # onto the device, in the precision asked for
    num_rows = min(len(split), task.num_samples or len(split))
    nll_R, tokens_R = nll_of_rows(fabric, policy, task, split, num_rows)
    nll = float(nll_R.sum() / tokens_R.sum())
    sums_N2 = resampled(np.column_stack([nll_R, tokens_R]), seed=cfg.seed)
    ends = np.percentile(sums_N2[:, 0] / sums_N2[:, 1], [2.5, 97.5]).tolist()
    numbers: dict[str, Any] = {
        "perplexity": math.exp(min(nll, _HIGHEST)),
        "perplexity_interval": [math.exp(min(end, _HIGHEST)) for end in ends],
        "nll": nll,
        "tokens": int(tokens_R.sum()),
        "rows": num_rows,
    }
    if task.completion_only_loss and fabric.is_global_zero:
        ids = [example.responses[0][example.masks()[0]].tolist() for example in split.examples(range(num_rows))]
        numbers["characters"] = sum(map(len, map(ResponseDecoder(job.tokenizer), ids)))
        bits = float(nll_R.sum()) / math.log(2)
        numbers["bits_per_character"] = bits / max(1, numbers["characters"])
    draw = partial(draw_histogram, {"rows": nll_R / tokens_R}, "negative log-likelihood, nats a token")
    return save_result(fabric, cfg, f"perplexity-{task.data_split}", numbers, draw=draw)


def nll_of_rows(
    fabric: Fabric, policy: Policy, task: PerplexityConfig, split: TokenizedSplit, num_rows: int
) -> tuple[np.ndarray, np.ndarray]:
    """All ranks: (R,) float64, nats: the negative log-likelihood of each of the first rows; and (R,) its tokens."""
    targets = "response" if task.completion_only_loss else "all"
    batches = Batches(fabric, task, packed=policy.packed, targets=targets)
    mine: list[tuple[int, float, int]] = []
    with phase("evaluation"), eval_mode(policy), torch.no_grad(), fabric.autocast():
        parts = batches.numbered(split, np.arange(num_rows), "evaluating")
        for (part, micro), counted in equal_passes(fabric, policy, parts):
            batch = fabric.to_device(micro.batch)
            row_N = batch.response_index_N.cpu().numpy()  # a row has one response
            logprobs_N = policy(batch).target_N.double().cpu().numpy()
            sums, counts = np.bincount(row_N, -logprobs_N, len(part)), np.bincount(row_N, minlength=len(part))
            if counted:
                mine += zip(part, sums.tolist(), counts.tolist(), strict=True)
    found = sorted({row for rank in gather_objects(fabric, mine) for row in rank})
    return np.array([nll for _, nll, _ in found]), np.array([count for _, _, count in found])
