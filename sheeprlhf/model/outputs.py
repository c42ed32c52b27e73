"""Logits or scores of a model on a few rows, and whether two models compute the same.

Letters: T positions, V vocabulary.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sheeprlhf.utils.errors import ModelError
from sheeprlhf.utils.modes import eval_mode

_NUM_ROWS, _ROW_TOKENS = 4, 24


def probe_rows(model: PreTrainedModel) -> list[list[int]]:
    """Token ids of a few rows spread over the vocabulary, the same on every call, for a model without data at hand."""
    vocabulary: int = cast(Tensor, model.get_input_embeddings().weight).shape[0]
    length = min(_ROW_TOKENS, int(getattr(model.config, "max_position_embeddings", None) or _ROW_TOKENS))
    return [
        [(3 + 7919 * row + 104_729 * position) % vocabulary for position in range(length)] for row in range(_NUM_ROWS)
    ]


@torch.no_grad()
def compute_outputs(model: PreTrainedModel, rows: Sequence[Sequence[int]]) -> list[Tensor]:
    """Float32 outputs of each row in eval mode: (T, V) of a language model, (1,) of a reward model."""
    with eval_mode(model):
        return [model(input_ids=torch.tensor([ids], device=model.device)).logits[0].float() for ids in rows]


def max_difference(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """The largest absolute difference between the outputs of two models on the same rows."""
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))


def max_output(outputs: Sequence[Tensor]) -> float:
    """The largest absolute output."""
    return max(float(row.abs().max()) for row in outputs)


def check_difference(difference: float, outputs: Sequence[Tensor], share: float, what: str) -> None:
    """Compare a difference of outputs with what rounding explains.

    Args:
        difference: between the outputs of two models.
        outputs: of one of them.
        share: of 1 + the largest output, the most that is accepted.
        what: begins the message.

    Raises:
        ModelError: the difference is larger, or not a number.
    """
    limit = share * (1 + max_output(outputs))
    if not difference <= limit:
        raise ModelError(
            f"{what}: its outputs differ by {difference:.3g}, and {limit:.3g} is the most that rounding explains"
        )
