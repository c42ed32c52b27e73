"""The one place that decides whether a model's batches are packed or padded, for models with either head."""

from collections.abc import Callable
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sheeprlhf.data.collate import collate_packed, collate_padded
from sheeprlhf.data.example import Batch, Example
from sheeprlhf.model.lm_head import TokenLogprobs
from sheeprlhf.model.packing import packing_limit, tolerance
from sheeprlhf.utils.errors import ModelError
from sheeprlhf.utils.lightning import move_data_to_device
from sheeprlhf.utils.modes import eval_mode


def choose_packed(
    scored: nn.Module,
    model: PreTrainedModel,
    *,
    longest: int,
    batching: str,
    say: Callable[[str], None] = lambda _: None,
) -> bool:
    """Decide whether batches are packed: packed and padded numbers have to be equal.

    Args:
        scored: a `Policy` or a `RewardModel`.
        model: the Hugging Face model in it.
        longest: tokens of the longest sequence that it will see.
        batching: "packed", "padded", or "auto": packed if `packing_problem` finds none.
        say: prints a line for the user: why batches are padded although `batching` is auto.

    Raises:
        ModelError: batching=packed and the model cannot do it.
    """
    if batching == "padded":
        return False
    problem = packing_problem(scored, model, longest)
    check_batching(batching, problem)
    if problem:
        say(f"batches are padded, not packed: {problem}")
    return not problem


def check_batching(batching: str, problem: str) -> None:
    """Raises ModelError if packed batches are asked for and there is a problem with them."""
    if problem and batching == "packed":
        raise ModelError(f"task.batching=packed: {problem}; set task.batching=padded")


def packing_problem(scored: nn.Module, model: PreTrainedModel, longest: int) -> str:
    """The reason that this model cannot compute packed batches of up to `longest` tokens; empty if it can.

    Arguments as of `choose_packed`.
    """
    problem = packing_limit(model, longest)
    if problem:
        return problem
    try:
        difference = packing_difference(scored)
    except (TypeError, ValueError, LookupError) as error:  # the model refuses an argument that packed batches need
        return str(error)
    if difference <= packing_tolerance(scored):
        return ""
    return f"packed and padded results of {type(model).__name__} differ by {difference:.2g}"


def packing_tolerance(scored: nn.Module) -> float:
    """Tolerance between packed and padded results, nats or units of the score, in the weights' number format."""
    return tolerance(next(scored.parameters()))


def packing_difference(scored: nn.Module) -> float:
    """Difference between packed and padded results of two short examples, nats or units of the score.

    Raises:
        TypeError, ValueError, LookupError: the model's code refuses what packed batches need.
    """
    ids = np.arange(12, dtype=np.int32) % 5 + 3
    examples = [Example(0, ids[:4], (ids[4:9],)), Example(1, ids[1:3], (ids[2:12],))]
    device = next(scored.parameters()).device

    def result(batch: Batch) -> Tensor:
        output: TokenLogprobs | Tensor = scored(cast(Batch, move_data_to_device(batch, device)))
        return output if isinstance(output, Tensor) else output.target_N

    with eval_mode(scored), torch.no_grad():
        packed = result(collate_packed(examples))
        padded = result(collate_padded(examples, pad_id=0))
    return float((packed - padded).abs().max())
