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
from sheeprlhf.model.last_mlp import last_mlp_at
from sheeprlhf.model.load import backbone_and_head
from sheeprlhf.model.packing import packing_limit, tolerance
from sheeprlhf.model.padded import logits_at, no_router_logits
from sheeprlhf.model.rotary import outgrows_cache
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
        self._options = no_router_logits(model)

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
        self._select(torch.arange(len(prompts)).repeat_interleave(num_responses))
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
        self._select(torch.from_numpy(order_B))
        self._positions_B1, self._mask_BL = self._positions_B1[order_B], self._mask_BL[order_B]

    def _select(self, order: Tensor) -> None:
        """Go on with these rows of the cache: every kind of layer, recurrent ones too, can be reordered."""
        self._cache.reorder_cache(cast(Any, order.to(self._model.device)))

    def _forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        output = cast(Any, self._model)(
            input_ids=input_ids,
            attention_mask=self._mask_BL[:, : self._columns],
            position_ids=position_ids,
            **self._given,
            use_cache=True,
            logits_to_keep=1,
            **self._options,
        )
        return output.logits[:, -1]


class RecomputedRows:
    """Rows of a model whose cache does not give what the model gives: each token computes its whole row again.

    Rows are padded on the right, as in training, so no layer of a causal model reads the padding.

    Args:
        model: the language model, in eval mode.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model

    def prefill(self, prompts: Sequence[np.ndarray], num_responses: int, num_new: int) -> Tensor:
        """As `PackedRows.prefill`."""
        device, lengths_P = self._model.device, torch.tensor([len(prompt) for prompt in prompts])
        columns = torch.arange(int(lengths_P.max()) + num_new)
        ids_PL = torch.zeros(len(prompts), len(columns), dtype=torch.long)
        ids_PL[columns < lengths_P[:, None]] = torch.from_numpy(np.concatenate(prompts).astype(np.int64))
        self._ids_BL, self._lengths_B = ids_PL.to(device), lengths_P.to(device)
        logits_PV = self._forward()
        self._ids_BL = self._ids_BL.repeat_interleave(num_responses, dim=0)
        self._lengths_B = self._lengths_B.repeat_interleave(num_responses)
        return logits_PV.repeat_interleave(num_responses, dim=0)

    def step(self, ids_B: Tensor) -> Tensor:
        """As `PackedRows.step`."""
        self._ids_BL[torch.arange(len(ids_B), device=ids_B.device), self._lengths_B] = ids_B
        self._lengths_B = self._lengths_B + 1
        return self._forward()

    def keep(self, order_B: np.ndarray) -> None:
        """As `PackedRows.keep`."""
        self._ids_BL, self._lengths_B = self._ids_BL[order_B], self._lengths_B[order_B]

    def _forward(self) -> Tensor:
        width = int(self._lengths_B.max())
        column_BT = torch.arange(width, device=self._lengths_B.device).expand(len(self._lengths_B), -1)
        mask_BT, last_BT = column_BT < self._lengths_B[:, None], column_BT == self._lengths_B[:, None] - 1
        return logits_at(
            self._model,
            last_BT,
            input_ids=self._ids_BL[:, :width],
            attention_mask=mask_BT,
            position_ids=torch.where(mask_BT, column_BT, 0),
        )


@torch.no_grad()
def unpacked_rows(model: PreTrainedModel, lengths: Sequence[int] = (), num_new: int = 0) -> PaddedRows | RecomputedRows:
    """Rows for a model that does not pack: with transformers' cache where that gives what the model gives without.

    Only models with plain attention are known to; others are tried on two short prompts.

    Args:
        model: the language model, in eval mode.
        lengths: of the prompts, in tokens.
        num_new: most new tokens of each.
    """
    if outgrows_cache(model, lengths, num_new):
        return RecomputedRows(model)
    return PaddedRows(model) if not packing_limit(model, 0) or _cache_is_right(model) else RecomputedRows(model)


def _cache_is_right(model: PreTrainedModel) -> bool:
    """True if padding on the left, the cache, and rows that end do not change any log-probability."""
    prompts = [np.arange(length) % 5 + 3 for length in (2, 9)]
    device = model.device

    def logprobs(rows: PaddedRows | RecomputedRows) -> Tensor:
        steps = [rows.prefill(prompts, 2, 4)]
        for ids, order in (([3, 4, 5, 6], [0, 3, 2]), ([7, 3, 4], [2, 1])):
            steps.append(rows.step(torch.tensor(ids, device=device)))
            rows.keep(np.array(order))
        return torch.cat([*steps, rows.step(torch.tensor([5, 6], device=device))]).float().log_softmax(dim=-1)

    expected = logprobs(RecomputedRows(model))
    try:
        apart = (logprobs(PaddedRows(model)) - expected).abs().max()
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, AttributeError, LookupError, RuntimeError):  # its code knows no such cache
        return False
    return bool(apart <= tolerance(next(model.parameters())))


def _cache_name(model: nn.Module) -> str:
    """Name of the cache argument in the model's code: code from before transformers 5.24 has the longer name."""
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
