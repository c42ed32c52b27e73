"""Layout of a packed row: which tokens attend to which, made with the batch and read by packed attention."""

from typing import NamedTuple

from torch import Tensor


class Layout(NamedTuple):
    """The attention pattern of a packed row: which tokens attend to which.

    A packed row is segments laid end to end, each `[prompt | response 1 | ... | response K]`. A prompt token sees the
    prompt up to itself; a token of response k sees the whole prompt and response k up to itself.
    """

    segments: tuple[tuple[int, tuple[int, ...]], ...]  # per segment its prompt length and the lengths of its responses
    # (S+1,) int32, cumulative lengths of the S attention sequences: prompt with response 1, then each further
    # response alone, in packed order
    query_starts: Tensor
    # (S+1,) int32, cumulative lengths of their keys: the same, each further response led by its prompt
    key_starts: Tensor
    # (M,) int64, packed position of each key; None if every segment has one response (keys == queries)
    key_index: Tensor | None
    max_query: int  # longest attention sequence, in queries
    max_key: int  # longest attention sequence, in keys
