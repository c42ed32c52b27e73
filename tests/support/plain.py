"""Log-probabilities by transformers alone, which many tests compare with."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def response_logprobs(
    model: Any, prompt: Iterable[int], response: Iterable[int], *, temperature: float = 1.0, num_ids: int | None = None
) -> Tensor:
    """(N,) log-probabilities of a response's tokens behind its prompt: one row without cache or padding.

    Args:
        model: of transformers or PEFT.
        prompt: token ids.
        response: token ids.
        temperature: of the distribution.
        num_ids: ids that have a token, the first ones; the others have no probability. None: all.
    """
    before, ids = [int(token) for token in prompt], [int(token) for token in response]
    logits_TV = model(input_ids=torch.tensor([before + ids]), use_cache=False).logits[0]
    logprobs_NV = (logits_TV[len(before) - 1 : -1, :num_ids].float() / temperature).log_softmax(-1)
    return logprobs_NV[torch.arange(len(ids)), ids]
