"""Decoders of models without packed attention: with transformers' cache, or without any.

Letters: P prompts, B live rows, V vocabulary, L tokens of the longest row, T tokens.
"""

import inspect
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from sheeprlhf.model.attention import logits_at, no_router_logits, tolerance
from sheeprlhf.model.folder.architecture import outgrows_cache, packing_limit
from sheeprlhf.rollout.sampler import Decoder


def cache_name(model: nn.Module) -> str:
    """Name of the cache argument in the model's code: code from before transformers 5.24 has the longer name."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


class PaddedDecoder:
    """Rows of any other model: prompts padded on the left, and transformers' own cache and masks."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._cache = DynamicCache(config=model.config)
        self._given = {cache_name(model): self._cache}
        self._options = no_router_logits(model)

    def prefill(self, prompts: Sequence[np.ndarray], num_responses: int, num_new: int) -> Tensor:
        """As `Decoder.prefill`."""
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
        """As `Decoder.step`."""
        self._columns += 1
        logits_BV = self._forward(ids_B[:, None], self._positions_B1)
        self._positions_B1 = self._positions_B1 + 1
        return logits_BV

    def keep(self, order_B: np.ndarray) -> None:
        """As `Decoder.keep`."""
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


class RecomputedDecoder:
    """Rows of a model whose cache changes its outputs: each token computes its whole row again.

    Rows are padded on the right, as in training, so no layer of a causal model reads the padding.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model

    def prefill(self, prompts: Sequence[np.ndarray], num_responses: int, num_new: int) -> Tensor:
        """As `Decoder.prefill`."""
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
        """As `Decoder.step`."""
        self._ids_BL[torch.arange(len(ids_B), device=ids_B.device), self._lengths_B] = ids_B
        self._lengths_B = self._lengths_B + 1
        return self._forward()

    def keep(self, order_B: np.ndarray) -> None:
        """As `Decoder.keep`."""
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
def unpacked_decoder(model: PreTrainedModel, lengths: Sequence[int] = (), num_new: int = 0) -> Decoder:
    """Return a decoder for a model without packed rows: with transformers' cache if that does not change its outputs.

    Models with plain attention are known not to; others are tried on two short prompts. `lengths` are the prompts'.
    """
    if outgrows_cache(model, lengths, num_new):
        return RecomputedDecoder(model)
    return PaddedDecoder(model) if not packing_limit(model, 0) or _cache_is_right(model) else RecomputedDecoder(model)


def _cache_is_right(model: PreTrainedModel) -> bool:
    """True if padding on the left, the cache, and rows that end do not change any log-probability."""
    prompts = [np.arange(length) % 5 + 3 for length in (2, 9)]
    device = model.device

    def logprobs(rows: Decoder) -> Tensor:
        steps = [rows.prefill(prompts, 2, 4)]
        for ids, order in (([3, 4, 5, 6], [0, 3, 2]), ([7, 3, 4], [2, 1])):
            steps.append(rows.step(torch.tensor(ids, device=device)))
            rows.keep(np.array(order))
        return torch.cat([*steps, rows.step(torch.tensor([5, 6], device=device))]).float().log_softmax(dim=-1)

    expected = logprobs(RecomputedDecoder(model))
    try:
        apart = (logprobs(PaddedDecoder(model)) - expected).abs().max()
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, AttributeError, LookupError, RuntimeError):  # its code does not support such a cache
        return False
    return bool(apart <= tolerance(next(model.parameters())))
