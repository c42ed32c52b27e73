"""Perplexity: exp of the mean negative log-likelihood of a token, over all tokens of a split.

The mean is over tokens, not over rows or batches, so batch size, batching and number of devices do not change it.
"""

import math
from functools import partial

from lightning.fabric import Fabric

from sheeprlhf.data.prepare import prepare_data
from sheeprlhf.engine.step import evaluate as evaluate_loss
from sheeprlhf.model.load import load_tokenizer
from sheeprlhf.structure.run import EvalConfig
from sheeprlhf.structure.task import PerplexityConfig
from sheeprlhf.task.batches import Batches, longest_row
from sheeprlhf.task.eval.load import load_evaluated_policy, say_on
from sheeprlhf.task.eval.result import save_result
from sheeprlhf.task.train.sft import sft_loss
from sheeprlhf.utils.errors import DataError


def evaluate(fabric: Fabric, cfg: EvalConfig) -> None:
    """All ranks: print the perplexity and save it as JSON.

    Raises:
        SheepError: something that the user can mend; see its message.
    """
    task = cfg.task
    assert isinstance(task, PerplexityConfig) and cfg.model is not None and cfg.data is not None
    say = partial(say_on, fabric)
    tokenizer = load_tokenizer(cfg.model)
    data = prepare_data(cfg.data, tokenizer, kind="sft", say=say, progress=fabric.is_global_zero)
    split = data.splits.get(task.data_split)
    if split is None or len(split) == 0:
        there = ", ".join(name for name, rows in data.splits.items() if len(rows))
        raise DataError(f"task.data_split={task.data_split}: the dataset has no such rows; it has {there}")
    policy, packed = load_evaluated_policy(cfg, tokenizer, longest=longest_row({"": split}), say=say)
    module = fabric.setup_module(policy)
    targets = "response" if task.use_masked_targets else "all"
    batches = Batches(fabric, task, packed=packed, targets=targets).first(split, task.num_samples, "evaluating")
    result = evaluate_loss(fabric, module, batches, sft_loss)
    numbers = {
        "perplexity": math.exp(min(result["nll"], 700.0)),
        "nll": result["nll"],
        "tokens": int(result["items"]),
        "rows": min(len(split), task.num_samples or len(split)),
    }
    save_result(fabric, cfg, f"perplexity-{task.data_split}", numbers)
