"""The rows of text that are being written: their keys and values, and one step of all of them.

Letters: P prompts, B live rows, H heads, T packed positions, L columns of the cache, W of them for prompts, D head width,
C hidden width, V vocabulary.

Prompts end at column W, whatever their length, so that every row writes its next token into the same column. A row that
has ended leaves its place to the last live one: the live rows are always the first B, and nothing else is copied.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from sheeprlhf.model.attention import placeholder_mask
from sheeprlhf.model.load import backbone_and_head
from sheeprlhf.model.trim import last_mlp_at


class PromptLayout(NamedTuple):
    """Prompts laid end to end, each seeing itself alone, as `packed_attention` reads it."""

    segments: tuple[tuple[int, tuple[int, ...]], ...]
    query_starts: Tensor
    key_starts: Tensor
    key_index: None
    max_query: int
    max_key: int


class StaticCache(Cache):
    """Keys and values of a group of rows, in memory that is taken once.

    It takes those of the packed prompts first, then after `share` those of the rows.

    Attributes:
        keys: per layer (1, H, T, D) of the packed prompts, then (rows, H, L, D) of the rows.
        values: the same.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self._num_live = 0  # none yet: it takes the prompts
        self._num_columns = 0

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        """Keep a layer's new keys and values; return those that its queries may see."""
        if self._num_live == 0:
            self.keys[layer_idx], self.values[layer_idx] = key_states, value_states
            return key_states, value_states
        keys_BHLD, values_BHLD = self.keys[layer_idx], self.values[layer_idx]
        rows, column = self._num_live, self._num_columns
        keys_BHLD[:rows, :, column] = key_states[:, :, 0]
        values_BHLD[:rows, :, column] = value_states[:, :, 0]
        return keys_BHLD[:rows, :, : column + 1], values_BHLD[:rows, :, : column + 1]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns that are filled."""
        return self._num_columns

    def share(self, source_BW: Tensor, num_new: int, dtype: torch.dtype | None) -> None:
        """Give every row its prompt's keys and values, and `num_new` columns to write.

        Args:
            source_BW: (B, W) the packed position of each prompt column; any real one where the row has no token.
            num_new: how many tokens a row writes.
            dtype: number format of the cache; None keeps each tensor's.
        """
        self._num_live, self._num_columns = source_BW.shape
        for store in (self.keys, self.values):
            for layer, packed_1HTD in store.items():
                shared_HBWD = packed_1HTD[0][:, source_BW].to(dtype or packed_1HTD.dtype)
                heads, rows, width, size = shared_HBWD.shape
                store[layer] = shared_HBWD.new_empty(rows, heads, width + num_new, size)
                store[layer][:, :, :width] = shared_HBWD.transpose(0, 1)

    def next_column(self) -> None:
        """The step is over."""
        self._num_columns += 1

    def move(self, sources: list[int], targets: list[int], num_live: int) -> None:
        """Put rows in the places of others; the first `num_live` are live from now on."""
        for store in (self.keys, self.values):
            for tensor_BHLD in store.values():
                tensor_BHLD[targets, :, : self._num_columns] = tensor_BHLD[sources, :, : self._num_columns]
        self._num_live = num_live


class PackedRows:
    """Rows of a model with packed attention: prompts are computed once, unpadded; then a static cache.

    Args:
        model: the language model, in eval mode.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._backbone, self._head = backbone_and_head(model)
        self._cache = StaticCache()

    def prefill(self, prompts: Sequence[np.ndarray], num_responses: int, num_new: int) -> Tensor:
        """Compute the prompts. Returns (B, V) logits of each row's first token, `num_responses` rows a prompt."""
        device = next(self._backbone.parameters()).device
        lengths = [len(prompt) for prompt in prompts]
        ends_P = torch.tensor(lengths, device=device).cumsum(0)
        input_ids_1T = torch.from_numpy(np.concatenate(prompts).astype(np.int64))[None].to(device)
        position_ids_1T = torch.cat([torch.arange(length) for length in lengths])[None].to(device)
        with last_mlp_at(self._backbone, ends_P - 1, input_ids_1T.shape[1]):
            hidden_1TC = self._backbone(
                input_ids=input_ids_1T,
                attention_mask=placeholder_mask(input_ids_1T),
                position_ids=position_ids_1T,
                layout=_layout(lengths, device),
                past_key_values=self._cache,
                use_cache=True,
            ).last_hidden_state
        logits_PV = self._head(hidden_1TC[0, ends_P - 1])

        width = max(lengths)
        lengths_B = torch.tensor(lengths, device=device).repeat_interleave(num_responses)
        column_BW = torch.arange(width, device=device) - (width - lengths_B)[:, None]  # negative: no token
        start_B = (ends_P - ends_P.diff(prepend=ends_P.new_zeros(1))).repeat_interleave(num_responses)
        self._cache.share(column_BW.clamp(min=0) + start_B[:, None], num_new, _autocast_dtype(device.type))
        self._positions_B1 = lengths_B[:, None]
        # Added to the scores. A bool one would be made into this by every layer.
        mask_BL = torch.zeros(len(lengths_B), width + num_new, device=device, dtype=self._cache.keys[0].dtype)
        mask_BL[:, :width].masked_fill_(column_BW < 0, float("-inf"))
        self._mask_B11L = mask_BL[:, None, None]
        return logits_PV.repeat_interleave(num_responses, dim=0)

    def step(self, ids_B: Tensor) -> Tensor:
        """Write one token into each live row. Returns (B, V) logits of the next one."""
        columns = self._cache.get_seq_length() + 1
        hidden_B1C = self._backbone(
            input_ids=ids_B[:, None],
            attention_mask=self._mask_B11L[..., :columns],
            position_ids=self._positions_B1,
            past_key_values=self._cache,
            use_cache=True,
        ).last_hidden_state
        self._cache.next_column()
        self._positions_B1 = self._positions_B1 + 1
        return self._head(hidden_B1C[:, 0])

    def keep(self, order: list[int]) -> None:
        """Go on with fewer rows: the i-th is now what the `order[i]`-th was."""
        moves = [(source, target) for target, source in enumerate(order) if source != target]
        self._cache.move([source for source, _ in moves], [target for _, target in moves], len(order))
        self._positions_B1, self._mask_B11L = self._positions_B1[order], self._mask_B11L[order]


class PaddedRows:
    """Rows of any other model: prompts padded on the left, and transformers' own cache and masks.

    Args:
        model: the language model, in eval mode.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._cache = DynamicCache(config=model.config)

    def prefill(self, prompts: Sequence[np.ndarray], num_responses: int, num_new: int) -> Tensor:
        """As `PackedRows.prefill`."""
        device = self._model.device
        lengths_P = torch.tensor([len(prompt) for prompt in prompts])
        width = int(lengths_P.max())
        column_PW = torch.arange(width) - (width - lengths_P)[:, None]
        input_ids_PW = torch.zeros_like(column_PW)
        input_ids_PW[column_PW >= 0] = torch.from_numpy(np.concatenate(prompts).astype(np.int64))
        mask_PL = torch.cat([column_PW >= 0, torch.ones(len(prompts), num_new, dtype=torch.bool)], dim=1).long()
        self._mask_BL, self._columns = mask_PL.to(device), width
        logits_PV = self._forward(input_ids_PW.to(device), column_PW.clamp(min=0).to(device))
        self._cache.batch_repeat_interleave(num_responses)
        self._mask_BL = self._mask_BL.repeat_interleave(num_responses, dim=0)
        self._positions_B1 = lengths_P.to(device).repeat_interleave(num_responses)[:, None]
        return logits_PV.repeat_interleave(num_responses, dim=0)

    def step(self, ids_B: Tensor) -> Tensor:
        """As `PackedRows.step`."""
        self._columns += 1
        logits_BV = self._forward(ids_B[:, None], self._positions_B1)
        self._positions_B1 = self._positions_B1 + 1
        return logits_BV

    def keep(self, order: list[int]) -> None:
        """As `PackedRows.keep`."""
        self._cache.batch_select_indices(torch.tensor(order, device=self._mask_BL.device))
        self._positions_B1, self._mask_BL = self._positions_B1[order], self._mask_BL[order]

    def _forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        output = cast(Any, self._model)(
            input_ids=input_ids,
            attention_mask=self._mask_BL[:, : self._columns],
            position_ids=position_ids,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1]


def _layout(lengths: list[int], device: torch.device) -> PromptLayout:
    starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
    segments = tuple((length, (0,)) for length in lengths)
    return PromptLayout(segments, starts, starts, None, max(lengths), max(lengths))


def _autocast_dtype(device: str) -> torch.dtype | None:
    """What autocast makes of the inputs of attention; None where it is off."""
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return None
