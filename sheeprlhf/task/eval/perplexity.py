"""Perplexity: exp of the mean negative log-likelihood of a token, over all tokens of a split.

The mean is over tokens, not over rows or batches, so batch size, batching and number of devices do not change it.
Bits per character compare models of different tokenizers: the bits of all response tokens, EOS included, divided by the
characters of the responses' texts.
"""

import math
from functools import partial

from sheeprlhf.data.prepare import prepare_data
from sheeprlhf.engine.step import evaluate as evaluate_loss
from sheeprlhf.model.load import load_tokenizer
from sheeprlhf.structure.run import EvalConfig
from sheeprlhf.structure.task import PerplexityConfig
from sheeprlhf.task.batches import Batches, longest_row
from sheeprlhf.task.eval.load import evaluated_split, load_evaluated_policy, say_on
from sheeprlhf.task.eval.result import save_result
from sheeprlhf.task.train.sft import sft_loss
from sheeprlhf.utils.lightning import Fabric


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
    split = evaluated_split(data, task.data_split)
    policy, packed = load_evaluated_policy(
        cfg, tokenizer, longest=longest_row({"": split}), batching=task.batching, say=say
    )
    module = fabric.setup_module(policy)
    targets = "response" if task.use_masked_targets else "all"
    batches = Batches(fabric, task, packed=packed, targets=targets).first(split, task.num_samples, "evaluating")
    result = evaluate_loss(fabric, module, batches, sft_loss)
    num_rows = min(len(split), task.num_samples or len(split))
    numbers = {
        "perplexity": math.exp(min(result["nll"], 700.0)),
        "nll": result["nll"],
        "tokens": int(result["items"]),
        "rows": num_rows,
    }
    if task.use_masked_targets and fabric.is_global_zero:
        ids = [example.responses[0].tolist() for example in split.examples(range(num_rows))]
        numbers["characters"] = sum(len(tokenizer.decode(response, skip_special_tokens=True)) for response in ids)
        bits = result["nll"] * result["items"] / math.log(2)
        numbers["bits_per_character"] = bits / max(1, numbers["characters"])
    save_result(fabric, cfg, f"perplexity-{task.data_split}", numbers)
