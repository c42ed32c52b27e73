"""One response, token by token, as it is written.

Letters: V vocabulary.
"""

from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from sheeprlhf.rollout.decoders import unpacked_rows
from sheeprlhf.rollout.generate import without_undefined
from sheeprlhf.structure.generation import GenConfig


@torch.no_grad()
def stream_ids(
    model: PreTrainedModel,
    prompt_ids: np.ndarray,
    cfg: GenConfig,
    *,
    end_ids: Sequence[int],
    seed: int,
    undefined_U: Tensor | None = None,
) -> Iterator[int]:
    """The tokens that `generate` would write after this prompt, each as soon as it is chosen; an end token is the last.

    Args:
        model: the language model, not wrapped, in eval mode.
        prompt_ids: (P,), P >= 1.
        cfg: how to sample; one beam.
        end_ids: each ends the response; without any, `cfg.max_new_tokens` alone does.
        seed: of random numbers of its own, so that nothing that runs beside changes the response.
        undefined_U: (U,) int64, ids that are never written.
    """
    rng = torch.Generator(model.device).manual_seed(seed)
    warp = LogitsProcessorList()
    if cfg.do_sample:  # in the order of `generate`
        warp.append(TemperatureLogitsWarper(cfg.temperature))
        if cfg.top_k:
            warp.append(TopKLogitsWarper(cfg.top_k))
        if cfg.top_p < 1:
            warp.append(TopPLogitsWarper(cfg.top_p))
    none: Any = torch.empty(1, 0, dtype=torch.long, device=model.device)  # these do not look at the tokens so far
    rows = unpacked_rows(model, [len(prompt_ids)], cfg.max_new_tokens)
    logits_1V = rows.prefill([prompt_ids], 1, cfg.max_new_tokens)
    for left in reversed(range(cfg.max_new_tokens)):
        scores_1V = warp(none, cast(Any, without_undefined(logits_1V.float(), undefined_U)))
        if cfg.do_sample:
            token_1 = torch.multinomial(scores_1V.softmax(-1), 1, generator=rng)[:, 0]
        else:
            token_1 = scores_1V.argmax(-1)
        yield int(token_1)
        if int(token_1) in end_ids:
            return
        if left:
            logits_1V = rows.step(token_1)
