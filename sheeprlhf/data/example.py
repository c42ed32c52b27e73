"""The typed data that training passes around: text example, tokenised example, batch.

Letters of tensor names: B rows, T positions of a row, R positions where a head runs, N targets (tokens that those
positions have to predict, or to score), S responses, P pairs of responses.
A *segment* is one prompt with K >= 1 responses; the prompt is stored and computed once. A row that is a prompt alone
(K = 0) becomes a segment when its responses are sampled.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from sheeprlhf.utils.layout import Layout


class PreferenceExample(NamedTuple):
    """One row as text. `response` is what supervised fine-tuning learns; the pair is what preference tasks learn.

    Attributes:
        prompt: what is answered.
        response: an answer to learn.
        chosen: the better answer of a pair.
        rejected: the worse one.
        ranked: instead of a pair, two or more answers, best first.
        margin: how much better the chosen answer is, in units of a reward model's score.
        label: whether `response` is desirable, as the row's column has it; only tasks of unpaired data look at it.
        unused: names of the parts of the row that nothing reads.
        untrained: answers of earlier turns, which are part of the prompt.
    """

    prompt: str
    response: str | None = None
    chosen: str | None = None
    rejected: str | None = None
    ranked: tuple[str, ...] | None = None
    margin: float = 0.0
    label: Any = None
    unused: tuple[str, ...] = ()
    untrained: int = 0


class Example(NamedTuple):
    """One row as token ids.

    Attributes:
        row_id: the row's number in its split's source, for error messages.
        prompt_ids: (P,) int32, P >= 1, begins with BOS where the tokenizer has one.
        responses: K arrays (R_k,) int32, R_k >= 1, best first, each ending in an end token unless it was cut; K = 0
            for a prompt alone.
        margin: how far apart the scores of two neighbours should be at least.
        desirable: False for a response of unpaired data that is to become less likely.
        columns: columns of the row's file that reward functions get; None if they get none.
    """

    row_id: int
    prompt_ids: np.ndarray
    responses: tuple[np.ndarray, ...]
    margin: float = 0.0
    desirable: bool = True
    columns: Mapping[str, Any] | None = None

    def num_tokens(self) -> int:
        """Tokens computed for this row when the prompt is shared."""
        return len(self.prompt_ids) + sum(len(r) for r in self.responses)


class Batch(NamedTuple):
    """Rows of one forward pass, packed (B=1, `layout`) or padded (`attention_mask_BT`). Targets have the same order.

    Targets are ordered by row, then response, then position. With `targets="all"` a row's prompt tokens (from its
    second on) precede its response tokens. With "scores" and "last" a head reads the targets themselves instead of
    predicting them from the place before.

    Attributes:
        input_ids_BT: (B, T) int64.
        position_ids_BT: (B, T) int64; response k's positions go on from the prompt's.
        attention_mask_BT: (B, T) bool, True = a real token; None when packed.
        layout: who sees whom in a packed row; None when padded.
        head_positions_R: (R,) int64, ascending places in the flattened (B*T,) rows where the head runs.
        logit_index_N: (N,) int64, which of the R head outputs is target n's.
        target_ids_N: (N,) int64.
        response_index_N: (N,) int64, which response target n belongs to, counted over the whole batch.
        response_lengths: tokens of each of the S responses, on the host.
        pairs_P2: (P, 2) int64, the (better, worse) responses of all pairs of a row, which has its responses best first.
        pair_weights_P: (P,) float32, 1 / number of pairs of the row.
        margins_P: (P,) float32, how far apart the scores of the two should be at least.
        desirable_S: (S,) bool, False for a response of unpaired data that is to become less likely.
        row_ids: the rows' numbers, for error messages.
    """

    input_ids_BT: Tensor
    position_ids_BT: Tensor
    attention_mask_BT: Tensor | None
    layout: Layout | None
    head_positions_R: Tensor
    logit_index_N: Tensor
    target_ids_N: Tensor
    response_index_N: Tensor
    response_lengths: tuple[int, ...]
    pairs_P2: Tensor
    pair_weights_P: Tensor
    margins_P: Tensor
    desirable_S: Tensor
    row_ids: tuple[int, ...]
