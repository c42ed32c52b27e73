"""Keys and values of rows that are being written: a prompt's once, for all of its responses, and each response's own.

Letters: P prompts, K responses of each, B live responses, G key heads, E query heads of a key head, H = G * E, T packed
positions of the prompts, W columns of the longest prompt, N columns of a response, D head width.

The memory is taken once. A response that has ended leaves its place to the last live one, and so does a prompt all of
whose responses have ended: the live ones are always the first, and nothing else is copied.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache


class SharedCache(Cache):
    """KV cache that transformers' models fill during generation; also computes the attention, for `packed_attention`.

    It takes the keys and values of packed prompts first, in one forward pass or several; after `share`, one token of
    every live response at a time.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self._parts: dict[int, list[list[Tensor]]] = {}  # before `share`: a layer's keys and values, (1, G, T, D)
        self._prompts: dict[int, list[Tensor]] = {}  # a layer's keys and values: (P, G, W, D)
        self._responses: dict[int, list[Tensor]] = {}  # a layer's keys and values: (rows, G, N, D)
        self._num_responses = 0  # K; 0 before `share`
        self._num_columns = 0  # tokens that each live response has in the cache

    @property
    def max_key(self) -> int:
        """Tokens that the longest row sees, the one that is being written included."""
        return self._mask_P11W.shape[-1] + self._num_columns + 1

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens of the longest row; transformers asks, and gets its positions from us."""
        return self.max_key - 1 if self._num_responses else 0

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        """Keep what a layer has computed, and return it."""
        new = [key_states, value_states]
        if self._num_responses == 0:
            self._parts.setdefault(layer_idx, []).append(new)
            return new
        for stored_RGND, new_BG1D in zip(self._responses[layer_idx], new, strict=True):
            stored_RGND[: len(new_BG1D), :, self._num_columns] = new_BG1D[:, :, 0]
        return new

    def share(self, lengths: list[int], num_responses: int, num_new: int, dtype: torch.dtype) -> None:
        """Cut the packed prompts apart and make room for what their responses add.

        Args:
            lengths: tokens of each prompt.
            num_responses: responses of each, K.
            num_new: most tokens that a response adds, N.
            dtype: number format that attention computes in.
        """
        lengths_P = torch.tensor(lengths)
        column_PW = torch.arange(max(lengths)).expand(len(lengths), -1)
        empty_PW = column_PW >= lengths_P[:, None]
        # An empty column gets another token's numbers, which are finite; the mask takes it out.
        source_PW = torch.where(empty_PW, 0, column_PW + (lengths_P.cumsum(0) - lengths_P)[:, None])
        rows = len(lengths) * num_responses
        for layer, parts in self._parts.items():
            packed = [torch.cat(of_parts, dim=2) for of_parts in zip(*parts, strict=True)]
            source = source_PW.to(packed[0].device)
            shared = [x[0].to(dtype)[:, source].transpose(0, 1).contiguous() for x in packed]
            self._prompts[layer] = shared
            self._responses[layer] = [x.new_empty(rows, x.shape[1], num_new, x.shape[3]) for x in shared]
            parts.clear()
        self._mask_P11W = torch.where(empty_PW, -torch.inf, 0.0)[:, None, None].to(source.device, dtype)
        self._num_responses = num_responses
        self._place(np.arange(rows))

    def attend(self, layer: int, query_BH1D: Tensor, scaling: float | None) -> Tensor:
        """Attention of the newest token of each live response: to its prompt, and to the response up to itself.

        Args:
            layer: number of the layer.
            query_BH1D: queries.
            scaling: factor of the scores; None is D ** -0.5.

        Returns:
            (B, 1, H, D), in the query's number format.
        """
        keys_PGWD, values_PGWD = self._prompts[layer]
        rows, columns = len(query_BH1D), self._num_columns + 1
        keys_BGND, values_BGND = (x[:rows, :, :columns] for x in self._responses[layer])
        scale = query_BH1D.shape[-1] ** -0.5 if scaling is None else scaling
        query_BGED = (query_BH1D * scale).to(keys_PGWD.dtype).unflatten(1, (keys_PGWD.shape[1], -1))[:, :, :, 0]

        scores_BGEW = self._by_response(self._by_prompt(query_BGED) @ keys_PGWD.mT + self._mask_P11W)
        scores = torch.cat([scores_BGEW, query_BGED @ keys_BGND.mT], dim=-1)
        weights = scores.softmax(dim=-1, dtype=torch.float32).to(values_PGWD.dtype)
        weights_BGEW, weights_BGEN = weights.split([keys_PGWD.shape[2], columns], dim=-1)
        output_BGED = self._by_response(self._by_prompt(weights_BGEW) @ values_PGWD) + weights_BGEN @ values_BGND
        return output_BGED.flatten(1, 2)[:, None].to(query_BH1D.dtype)

    def next_token(self) -> None:
        """Every layer has taken a token of each live response."""
        self._num_columns += 1

    def keep(self, order_B: np.ndarray) -> None:
        """Go on with fewer responses: the i-th is now what the `order_B[i]`-th was."""
        self._move(self._responses, order_B, self._num_columns)
        slots_B = self._slots_B[order_B]
        prompts_B, numbers_B = np.divmod(slots_B, self._num_responses)
        ended_P = np.bincount(prompts_B, minlength=len(self._mask_P11W)) == 0
        if ended_P.any():
            order_P = compact(ended_P)
            self._move(self._prompts, order_P, self._mask_P11W.shape[-1])
            self._prompts = {layer: [x[: len(order_P)] for x in pair] for layer, pair in self._prompts.items()}
            self._mask_P11W = self._mask_P11W[torch.from_numpy(order_P)]
            place_P = np.zeros(len(ended_P), dtype=np.int64)
            place_P[order_P] = np.arange(len(order_P))
            slots_B = place_P[prompts_B] * self._num_responses + numbers_B
        self._place(slots_B)

    def _place(self, slots_B: np.ndarray) -> None:
        """Say of each live response which prompt it follows: its slot is prompt * K + a number below K of its own."""
        self._slots_B = slots_B
        self._slot_index_B = torch.from_numpy(slots_B).to(self._mask_P11W.device)

    def _move(self, store: dict[int, list[Tensor]], order: np.ndarray, columns: int) -> None:
        """Copy those rows that change their place."""
        [targets] = np.nonzero(order != np.arange(len(order)))
        if len(targets):
            for tensor in (x for pair in store.values() for x in pair):
                tensor[targets, :, :columns] = tensor[order[targets], :, :columns]

    def _by_prompt(self, x_BGEX: Tensor) -> Tensor:
        """(P, G, K * E, X): the responses' rows beside each other; zero where a response has ended."""
        prompts, responses = len(self._mask_P11W), self._num_responses
        x_SGEX = x_BGEX.new_zeros(prompts * responses, *x_BGEX.shape[1:]).index_copy_(0, self._slot_index_B, x_BGEX)
        return x_SGEX.unflatten(0, (prompts, responses)).transpose(1, 2).flatten(2, 3)

    def _by_response(self, x_PGMX: Tensor) -> Tensor:
        """(B, G, E, X): the inverse of `_by_prompt`."""
        x_PGKEX = x_PGMX.unflatten(2, (self._num_responses, -1))
        return x_PGKEX.transpose(1, 2).flatten(0, 1).index_select(0, self._slot_index_B)


def compact(ended: np.ndarray) -> np.ndarray:
    """New order of the rows: the last live rows take the places of those that ended, all others stay."""
    [live] = np.nonzero(~ended)
    order = np.arange(len(live))
    order[ended[: len(live)]] = live[live >= len(live)]
    return order
