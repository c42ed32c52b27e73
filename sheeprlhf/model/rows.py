"""The rows of text that are being written: from their prompts to logits, then token by token.

Letters: P prompts, B live rows (responses of them), T packed positions of prompts, W tokens of the longest prompt,
L tokens of the longest row, C hidden width, V vocabulary.
"""

import inspect
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from sheeprlhf.model.attention import kernel_dtype, placeholder_mask
from sheeprlhf.model.cache import SharedCache
from sheeprlhf.model.load import backbone_and_head
from sheeprlhf.model.trim import last_mlp_at
from sheeprlhf.utils.layout import Layout


class PackedRows:
    """Rows of a model with packed attention: prompts are computed once, unpadded; then a static cache.

    Args:
        model: the language model, in eval mode.
        token_budget: most tokens of prompts in a forward pass, beyond one prompt's.
    """

    def __init__(self, model: PreTrainedModel, token_budget: int) -> None:
        self._backbone, self._head = backbone_and_head(model)
        self._cache, self._token_budget = SharedCache(), token_budget
        self._given = {_cache_name(self._backbone): self._cache}

    def prefill(self, prompts: Sequence[np.ndarray], num_responses: int, num_new: int) -> Tensor:
        """Compute the prompts. Returns (B, V) logits of each row's first token, `num_responses` rows a prompt."""
        device = next(self._backbone.parameters()).device
        lengths = [len(prompt) for prompt in prompts]
        hidden_PC = torch.cat([self._last_hidden(part, device) for part in _parts(prompts, self._token_budget)])
        self._cache.share(lengths, num_responses, num_new - 1, kernel_dtype(device.type, hidden_PC.dtype))
        self._positions_B1 = torch.tensor(lengths, device=device).repeat_interleave(num_responses)[:, None]
        return self._head(hidden_PC).repeat_interleave(num_responses, dim=0)

    def _last_hidden(self, prompts: Sequence[np.ndarray], device: torch.device) -> Tensor:
        """(P, C) hidden states of the last tokens of some prompts, whose keys and values go to the cache."""
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
                **self._given,
                use_cache=True,
            ).last_hidden_state
        return hidden_1TC[0, ends_P - 1]

    def step(self, ids_B: Tensor) -> Tensor:
        """Write one token into each live row. Returns (B, V) logits of the next one."""
        hidden_B1C = self._backbone(
            input_ids=ids_B[:, None],
            attention_mask=placeholder_mask(ids_B),
            position_ids=self._positions_B1,
            layout=self._cache,
            **self._given,
            use_cache=True,
        ).last_hidden_state
        self._cache.next_token()
        self._positions_B1 = self._positions_B1 + 1
        return self._head(hidden_B1C[:, 0])

    def keep(self, order_B: np.ndarray) -> None:
        """Go on with fewer rows: the i-th is now what the `order_B[i]`-th was."""
        self._cache.keep(order_B)
        self._positions_B1 = self._positions_B1[order_B]


class PaddedRows:
    """Rows of any other model: prompts padded on the left, and transformers' own cache and masks.

    Args:
        model: the language model, in eval mode.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._cache = DynamicCache(config=model.config)
        self._given = {_cache_name(model): self._cache}

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

    def keep(self, order_B: np.ndarray) -> None:
        """As `PackedRows.keep`."""
        self._cache.batch_select_indices(torch.from_numpy(order_B).to(self._mask_BL.device))
        self._positions_B1, self._mask_BL = self._positions_B1[order_B], self._mask_BL[order_B]

    def _forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        output = cast(Any, self._model)(
            input_ids=input_ids,
            attention_mask=self._mask_BL[:, : self._columns],
            position_ids=position_ids,
            **self._given,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1]


def _cache_name(model: nn.Module) -> str:
    """How the model's code calls the cache: code from before transformers 5.24 has the longer name."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def _parts(prompts: Sequence[np.ndarray], token_budget: int) -> list[list[np.ndarray]]:
    """Prompts that are computed together, in their order, at least one each time."""
    parts: list[list[np.ndarray]] = [[]]
    for prompt in prompts:
        if parts[-1] and sum(map(len, parts[-1])) + len(prompt) > token_budget:
            parts.append([])
        parts[-1].append(prompt)
    return parts


def _layout(lengths: list[int], device: torch.device) -> Layout:
    """Of prompts laid end to end."""
    starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
    segments = tuple((length, (0,)) for length in lengths)
    return Layout(segments, starts, starts, None, max(lengths), max(lengths))
