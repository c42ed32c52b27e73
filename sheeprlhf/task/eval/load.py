"""What an evaluation reads: rows of a split, and the weights of a run or a model as it is."""

import sys
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from sheeprlhf.agent.policy import Policy, load_policy
from sheeprlhf.data.prepare import PreparedData, TokenizedSplit
from sheeprlhf.engine.checkpoint import Say
from sheeprlhf.engine.redact import plain_text, redact_text
from sheeprlhf.structure.run import EvalConfig
from sheeprlhf.task.start import load_of_run
from sheeprlhf.utils.errors import DataError
from sheeprlhf.utils.lightning import Fabric


def evaluated_split(data: PreparedData, name: str) -> TokenizedSplit:
    """The split that `task.data_split` names.

    Raises:
        DataError: it has no rows.
    """
    split = data.splits.get(name)
    if split is None or len(split) == 0:
        there = ", ".join(name for name, rows in data.splits.items() if len(rows))
        raise DataError(f"task.data_split={name}: the dataset has no such rows; it has {there}")
    return split


def load_evaluated_policy(
    cfg: EvalConfig, tokenizer: PreTrainedTokenizerBase, *, longest: int, batching: str, say: Say
) -> tuple[Policy, bool]:
    """The policy that `cfg.experiment_dir` and `cfg.task.model_name` name, or `cfg.model` itself, and if it packs.

    Raises:
        ConfigError: the run has no `final/` yet.
        CheckpointError: it has no such checkpoint.
    """
    model = cfg.model
    assert model is not None  # the command line composes it, from the run if need be
    if cfg.experiment_dir is None:
        return load_policy(model, tokenizer, longest=longest, batching=batching, say=say)
    run_dir, weights = Path(cfg.experiment_dir), cfg.task.model_name
    return load_of_run(model, run_dir, weights, tokenizer, longest=longest, batching=batching, say=say)


def say_on(fabric: Fabric, text: str) -> None:
    """Print a line on rank zero, beside the results on standard output."""
    if fabric.is_global_zero:
        print(redact_text(plain_text(text)), file=sys.stderr)
