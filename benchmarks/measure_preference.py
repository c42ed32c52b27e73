"""What a run of `task=dpo` or `task=kto` on `data=docstrings` has done to the run that it started from.

    python benchmarks/measure_preference.py RUN [RUN ...] [--rows 500] [--temperature 1.0]

Of each run and of its start: the share of sampled summaries of held-out prompts that begin in the imperative, in the
third person, or otherwise; the perplexity of the test split's summaries as their authors wrote them. Between the two:
the KL divergence from the start per response, nats, estimated from the run's own samples (mean of the difference of
summed log-probabilities), and its standard error. One line `RESULT {json}` a run.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sheeprlhf.agent.batches import Batches, longest_row
from sheeprlhf.agent.policy import Policy
from sheeprlhf.config.run_lookup import read_run_config, saved_group
from sheeprlhf.data.example import Example, collate_packed, collate_padded
from sheeprlhf.data.prepare import TokenizedSplit, prepare_data
from sheeprlhf.engine.step import evaluate
from sheeprlhf.model.folder.load import load_tokenizer
from sheeprlhf.reward.inflect import style_of
from sheeprlhf.rollout.engines import generate_ids
from sheeprlhf.structure.data import DataConfig
from sheeprlhf.structure.evaluation import PerplexityConfig
from sheeprlhf.structure.model import ModelConfig
from sheeprlhf.structure.run import GenConfig
from sheeprlhf.task.models import load_initial_policy, load_policy_from_run
from sheeprlhf.task.reference import sum_by_response
from sheeprlhf.task.train.sft import sft_loss
from sheeprlhf.utils.lightning import Fabric

AT_ONCE = 50  # prompts of one call of generate, or responses of one forward pass


def main() -> None:
    """Measure the runs that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--rows", type=int, default=500, help="held-out prompts")
    parser.add_argument("--temperature", type=float, default=1.0)
    arguments = parser.parse_args()
    for run in arguments.runs:
        print("RESULT " + json.dumps(measure(run, arguments.rows, arguments.temperature)), flush=True)


def measure(run: str, num_rows: int, temperature: float) -> dict[str, Any]:
    """The figures of one run and of its start."""
    fabric = Fabric(accelerator="cpu", devices=1)
    fabric.launch()
    model, data = saved_group(run, "model"), saved_group(run, "data")
    assert isinstance(model, ModelConfig) and isinstance(data, DataConfig)
    task = read_run_config(run)["task"]
    tokenizer = load_tokenizer(model)
    rows = prepare_data(data, tokenizer, kind="sft", say=lambda _: None, progress=False).splits["test"]
    of: dict[str, Any] = {"longest": longest_row({"": rows}) + 64, "batching": "auto", "say": lambda _: None}
    start_dir, start_weights = task["sft_experiment_dir"], task["sft_model_name"]
    start = load_initial_policy(model, start_dir, start_weights, tokenizer, **of)
    policy = load_policy_from_run(model, Path(run), "final", tokenizer, **of)
    examples = rows.examples(range(min(num_rows, len(rows))))
    settings = GenConfig(max_new_tokens=48, do_sample=True, temperature=temperature)
    result: dict[str, Any] = {"run": run, "prompts": len(examples), "temperature": temperature}
    for name, one in (("start", start), ("run", policy)):
        torch.manual_seed(0)
        written = [
            ids
            for at in range(0, len(examples), AT_ONCE)
            for ids in generate_ids(
                one.causal_lm(), tokenizer, [e.prompt_ids for e in examples[at : at + AT_ONCE]], settings
            )
        ]
        styles = [style_of(str(tokenizer.decode(ids.tolist(), skip_special_tokens=True)).strip()) for ids in written]
        result |= {
            f"{name}/{style}": styles.count(style) / len(styles) for style in ("imperative", "third_person", "other")
        }
        result[f"{name}/perplexity"] = perplexity(fabric, one, rows)
    apart = logprobs(policy, examples, written) - logprobs(start, examples, written)
    result["kl"] = float(apart.mean())
    result["kl_error"] = float(apart.std(ddof=1) / math.sqrt(len(apart)))
    result["perplexity_ratio"] = result["run/perplexity"] / result["start/perplexity"]
    return result


def perplexity(fabric: Fabric, policy: Policy, rows: TokenizedSplit) -> float:
    """Of the responses of a split."""
    module = fabric.setup_module(policy)
    batches = Batches(fabric, PerplexityConfig(), packed=policy.packed, targets="response").first(
        rows, None, "perplexity"
    )
    return math.exp(evaluate(fabric, module, batches, sft_loss)["nll"])


def logprobs(policy: Policy, examples: list[Example], responses: list[np.ndarray]) -> np.ndarray:
    """(rows,) summed log-probability of each response after its prompt."""
    policy.eval()
    sums = []
    written = [e._replace(responses=(ids,)) for e, ids in zip(examples, responses, strict=True)]
    with torch.no_grad():
        for at in range(0, len(written), AT_ONCE):
            part = written[at : at + AT_ONCE]
            batch = collate_packed(part) if policy.packed else collate_padded(part, pad_id=0)
            sums.append(sum_by_response(policy(batch).target_N, batch.response_index_N, len(part)).numpy())
    return np.concatenate(sums).astype(np.float64)


if __name__ == "__main__":
    main()
