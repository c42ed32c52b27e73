"""Tokenised rows, and batches of them: the tensors of one forward pass, packed end to end or padded.

Letters of tensor names: B rows, T positions of a row, R positions where a head runs, N targets (tokens that those
positions have to predict, or to score), S responses, P pairs of responses.
A *segment* is one prompt with K >= 1 responses; the prompt is stored and computed once. A row that is a prompt alone
(K = 0) becomes a segment when its responses are sampled.

Both collate functions give the same targets in the same order, so a loss does not see which one made its batch.
Everything is computed from lengths; no token id is ever compared with the pad id, so pad and EOS may be the same token.
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate, combinations
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sheeprlhf.utils.errors import DataError


class Example(NamedTuple):
    """One row as token ids."""

    row_id: int  # the row's number in its split's source, for error messages
    prompt_ids: np.ndarray  # (P,) int32, P >= 1, begins with BOS where the tokenizer has one
    # K arrays (R_k,) int32, R_k >= 1, best first, each ending in an end token unless it was cut; K = 0 for a prompt
    # alone
    responses: tuple[np.ndarray, ...]
    margin: float = 0.0  # how far apart the scores of two neighbours should be at least
    desirable: bool = True  # false for a response of unpaired data that is to become less likely
    columns: Mapping[str, Any] | None = None  # columns of the row's file for reward functions; None without
    trained: np.ndarray | None = None  # (R_1 + ... + R_K,) bool, tokens that count in a loss; None: all

    def num_tokens(self) -> int:
        """Tokens computed for this row when the prompt is shared."""
        return len(self.prompt_ids) + sum(len(r) for r in self.responses)

    def masks(self) -> list[np.ndarray]:
        """(R_k,) bool for each response: the tokens that count in a loss over tokens."""
        if self.trained is None:
            return [np.ones(len(r), dtype=bool) for r in self.responses]
        return np.split(self.trained, np.cumsum([len(r) for r in self.responses])[:-1])


class Layout(NamedTuple):
    """The attention pattern of a packed row: which tokens attend to which.

    A packed row is segments laid end to end, each `[prompt | response 1 | ... | response K]`. A prompt token sees the
    prompt up to itself; a token of response k sees the whole prompt and response k up to itself.
    """

    segments: tuple[tuple[int, tuple[int, ...]], ...]  # per segment its prompt length and the lengths of its responses
    # (S+1,) int32, cumulative lengths of the S attention sequences: prompt with response 1, then each further
    # response alone, in packed order
    query_starts: Tensor
    key_starts: Tensor  # (S+1,) int32, cumulative lengths of their keys: each further response led by its prompt
    key_index: Tensor | None  # (M,) int64, packed position of each key; None with one response everywhere
    max_query: int  # longest attention sequence, in queries
    max_key: int  # longest attention sequence, in keys
    # tokens of each attention sequence, from the first one that a head reads to its end, which the last block computes
    tails: tuple[int, ...]
    tail_starts: Tensor  # (S+1,) int32, their cumulative lengths
    tail_index: Tensor  # their packed positions, int64, ascending

    @property
    def num_tokens(self) -> int:
        """Tokens of the packed row, T."""
        return sum(prompt + sum(responses) for prompt, responses in self.segments)


class Batch(NamedTuple):
    """Rows of one forward pass, packed (B=1, `layout`) or padded (`attention_mask_BT`). Targets have the same order.

    Targets are ordered by row, then response, then position. With `targets="all"` a row's prompt tokens (from its
    second on) precede its response tokens. With "scores", "last" and "steps" a head reads the targets themselves
    instead of predicting them from the place before.
    """

    input_ids_BT: Tensor  # (B, T) int64
    position_ids_BT: Tensor  # (B, T) int64; response k's positions continue from the prompt's
    attention_mask_BT: Tensor | None  # (B, T) bool, True = a real token; None when packed
    layout: Layout | None  # who sees whom in a packed row; None when padded
    head_positions_R: Tensor  # (R,) int64, ascending places in the flattened (B*T,) rows where the head runs
    logit_index_N: Tensor  # (N,) int64, which of the R head outputs is target n's
    target_ids_N: Tensor  # (N,) int64
    response_index_N: Tensor  # (N,) int64, which response target n belongs to, counted over the whole batch
    response_lengths: tuple[int, ...]  # tokens of each of the S responses that count, on the host
    lengths_S: Tensor  # (S,) int64, the same on the device
    pairs_P2: Tensor  # (P, 2) int64, the (better, worse) responses of all pairs of a row, best first
    pair_weights_P: Tensor  # (P,) float32, 1 / number of pairs of the row
    margins_P: Tensor  # (P,) float32, how far apart the scores of the two should be at least
    desirable_S: Tensor  # (S,) bool, False for a response of unpaired data that is to become less likely
    row_ids: tuple[int, ...]  # the rows' numbers, for error messages


TARGETS = ("response", "all", "scores", "last", "steps")
SCORED = TARGETS[2:]  # a head reads these targets


def collate_packed(examples: Sequence[Example], *, targets: str = "response") -> Batch:
    """Lay rows end to end, each `[prompt | response 1 | ... | response K]`, in one row of T tokens.

    Args:
        examples: the rows, at least one.
        targets: "response": the response's tokens are predicted, as far as `Example.trained` says; "all": all tokens
            of the row (from the second on); "scores": a score is read at each of the response's tokens; "last": at the
            last one only; "steps": at those of `Example.trained`.

    Raises DataError if a response is empty.
    """
    ids, positions, prompt_at, response_at = [], [], [], []
    start = 0
    for example in examples:
        num_prompt = len(example.prompt_ids)
        ids.append(example.prompt_ids)
        positions.append(np.arange(num_prompt))
        response_start = start + num_prompt
        for response in example.responses:
            ids.append(response)
            positions.append(np.arange(num_prompt, num_prompt + len(response)))
            prompt_at.append(start)
            response_at.append(response_start)
            response_start += len(response)
        start = response_start
    return _batch(
        examples,
        input_ids=np.concatenate(ids)[None],
        position_ids=np.concatenate(positions)[None],
        attention_mask=None,
        prompt_at=prompt_at,
        response_at=response_at,
        targets=targets,
    )


def collate_padded(examples: Sequence[Example], *, pad_id: int, targets: str = "response") -> Batch:
    """Give every response a row of its own, led by its prompt and padded on the right to the longest.

    Args:
        examples: the rows, at least one; K responses become K rows.
        pad_id: any id of the vocabulary; the mask, made from lengths, hides it.
        targets: as in `collate_packed`; a prompt's own targets are in its first row only.

    Raises DataError if a response is empty.
    """
    rows = [(example.prompt_ids, response) for example in examples for response in example.responses]
    lengths = np.array([len(prompt) + len(response) for prompt, response in rows])
    columns = np.arange(lengths.max())
    mask = columns < lengths[:, None]
    input_ids = np.full(mask.shape, pad_id, dtype=np.int64)
    input_ids[mask] = np.concatenate([part for row in rows for part in row])
    prompt_at = (np.arange(len(rows)) * len(columns)).tolist()
    return _batch(
        examples,
        input_ids=input_ids,
        position_ids=np.where(mask, columns, 0),
        attention_mask=mask,
        prompt_at=prompt_at,
        response_at=[at + len(prompt) for at, (prompt, _) in zip(prompt_at, rows, strict=True)],
        targets=targets,
    )


def _batch(
    examples: Sequence[Example],
    *,
    input_ids: np.ndarray,
    position_ids: np.ndarray,
    attention_mask: np.ndarray | None,
    prompt_at: list[int],
    response_at: list[int],
    targets: str,
) -> Batch:
    """Build the tensors; prompt_at and response_at are places of each response in the flattened (B*T,) ids."""
    if targets not in TARGETS:
        raise ValueError(f"targets={targets!r} is none of {', '.join(TARGETS)}")
    sources: list[np.ndarray] = []
    target_ids: list[np.ndarray] = []
    owners: list[int] = []  # the response that each piece of `target_ids` belongs to
    lengths: list[int] = []
    index = 0
    for example in examples:
        num_prompt = len(example.prompt_ids)
        if targets == "all":
            sources.append(prompt_at[index] + np.arange(num_prompt - 1))
            target_ids.append(example.prompt_ids[1:])
            owners.append(index)
        for response, trained in zip(example.responses, example.masks(), strict=True):
            if not len(response):  # its place would shift the targets of the rows behind it
                raise DataError(f"row {example.row_id} has no token to train on: its response is empty; drop the row")
            source = response_at[index] + np.arange(len(response))
            if targets not in SCORED:  # a token is predicted at the place before it
                source = np.array([prompt_at[index] + num_prompt - 1, *source[:-1]])
            masked = targets in ("response", "steps")
            which = trained if masked else slice(-1, None) if targets == "last" else slice(None)
            sources.append(source[which])
            target_ids.append(response[which])
            lengths.append(int(trained.sum()) if masked else len(response))
            owners.append(index)
            index += 1
    pairs, weights, margins = _pairs(examples)
    source_N = np.concatenate(sources)
    head_positions_R, logit_index_N = np.unique(source_N, return_inverse=True)
    segments = [(len(example.prompt_ids), tuple(map(len, example.responses))) for example in examples]
    return Batch(
        input_ids_BT=_int64(input_ids),
        position_ids_BT=_int64(position_ids),
        attention_mask_BT=None if attention_mask is None else torch.from_numpy(attention_mask),
        layout=layout_of(segments, head_positions_R) if attention_mask is None else None,
        head_positions_R=_int64(head_positions_R),
        logit_index_N=_int64(logit_index_N),
        target_ids_N=_int64(np.concatenate(target_ids)),
        response_index_N=_int64(np.repeat(owners, [len(piece) for piece in target_ids])),
        response_lengths=tuple(lengths),
        lengths_S=torch.tensor(lengths, dtype=torch.long),
        pairs_P2=_int64(pairs),
        pair_weights_P=torch.tensor(weights),
        margins_P=torch.tensor(margins),
        desirable_S=torch.tensor([example.desirable for example in examples for _ in example.responses]),
        row_ids=tuple(example.row_id for example in examples),
    )


def _pairs(examples: Sequence[Example]) -> tuple[np.ndarray, list[float], list[float]]:
    """Pairs (better, worse) of each row's responses, 1 / pairs of the row, margins (times their distance in rank)."""
    pairs: list[tuple[int, int]] = []
    weights: list[float] = []
    margins: list[float] = []
    first = 0
    for example in examples:
        size = len(example.responses)
        of_row = list(combinations(range(first, first + size), 2))
        pairs += of_row
        weights += [1.0 / len(of_row) for _ in of_row]
        margins += [example.margin * (worse - better) for better, worse in of_row]
        first += size
    return np.array(pairs, dtype=np.int64).reshape(-1, 2), weights, margins


def layout_of(segments: Sequence[tuple[int, tuple[int, ...]]], head_positions_R: np.ndarray | None = None) -> Layout:
    """The attention sequences of a packed row: prompt with response 1, then each further response with its prompt.

    `segments` are the lengths of prompts, each with those of its responses. A head reads `head_positions_R`, by default
    the last token of each sequence; a tail has one token at least.
    """
    queries: list[int] = []
    keys: list[int] = []
    key_pieces: list[np.ndarray] = []
    start = 0
    for num_prompt, responses in segments:
        prompt = np.arange(start, start + num_prompt)
        start += num_prompt
        for number, num_response in enumerate(responses):
            queries.append(num_response + (num_prompt if number == 0 else 0))
            keys.append(num_prompt + num_response)
            key_pieces += [prompt, np.arange(start, start + num_response)]
            start += num_response
    ends = np.cumsum(queries)
    heads = ends - 1 if head_positions_R is None else head_positions_R
    tail_starts = np.minimum(np.append(heads, ends[-1])[np.searchsorted(heads, ends - queries)], ends - 1)
    tails = tuple((ends - tail_starts).tolist())
    shared = any(len(responses) > 1 for _, responses in segments)
    return Layout(
        segments=tuple(segments),
        query_starts=_starts(queries),
        key_starts=_starts(keys),
        key_index=_int64(np.concatenate(key_pieces)) if shared else None,
        max_query=max(queries),
        max_key=max(keys),
        tails=tails,
        tail_starts=_starts(tails),
        tail_index=_int64(np.concatenate([np.arange(*span) for span in zip(tail_starts, ends, strict=True)])),
    )


def _starts(lengths: Sequence[int]) -> Tensor:
    """(S+1,) int32 cumulative lengths."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def _int64(values: np.ndarray) -> Tensor:
    """A tensor of token ids or places."""
    return torch.from_numpy(values.astype(np.int64))
