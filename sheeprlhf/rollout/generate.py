"""Generate responses with Hugging Face's `generate`, from settings that are ours alone."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from sheeprlhf.model.padded import no_router_logits
from sheeprlhf.model.rotary import outgrows_cache
from sheeprlhf.rollout.stop import StopStrings
from sheeprlhf.structure.generation import GenConfig
from sheeprlhf.utils.end_tokens import end_token_ids
from sheeprlhf.utils.memory import phase
from sheeprlhf.utils.modes import eval_mode
from sheeprlhf.utils.vocabulary import undefined_ids


def generation_config(cfg: GenConfig, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """A complete GenerationConfig, so that nothing is taken from the model's own defaults."""
    end_ids = end_token_ids(tokenizer)
    sampling = {"temperature": cfg.temperature, "top_p": cfg.top_p, "top_k": cfg.top_k} if cfg.do_sample else {}
    return GenerationConfig(
        max_new_tokens=cfg.max_new_tokens,
        num_beams=cfg.num_beams,
        do_sample=cfg.do_sample,
        eos_token_id=list(end_ids),
        pad_token_id=end_ids[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        use_cache=True,
        **sampling,
    )


def generate_responses(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[np.ndarray], cfg: GenConfig
) -> list[str]:
    """The text that the model writes after each prompt, up to a stop string; arguments as in `generate_ids`."""
    stop = StopStrings(cfg.stop_strings, tokenizer)
    return [stop.text(row) for row in generate_ids(model, tokenizer, prompts, cfg, stop)]


@phase("generation")
@torch.no_grad()
def generate_ids(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[np.ndarray],
    cfg: GenConfig,
    stop: StopStrings | None = None,
) -> list[np.ndarray]:
    """The tokens that the model writes after each prompt, up to and including an end token, or `cfg.max_new_tokens`.

    Where a stop string ended one, special tokens may follow until the others have ended.

    Args:
        model: the language model, not wrapped; its training flags are restored.
        tokenizer: its tokenizer.
        prompts: token ids of each prompt, (P_i,).
        cfg: how to sample; the random numbers are torch's, the caller isolates them.
        stop: the stop strings of `cfg`, if it has any.
    """
    settings = generation_config(cfg, tokenizer)
    undefined = undefined_ids(tokenizer, model.get_output_embeddings().weight.shape[0])
    settings.use_cache = not outgrows_cache(model, map(len, prompts), cfg.max_new_tokens)
    settings.suppress_tokens = None if undefined is None else undefined.tolist()
    input_ids, attention_mask = left_padded(prompts, settings.pad_token_id)
    width = input_ids.shape[1]
    with eval_mode(model), own_settings(model, settings):
        output = cast(Any, model).generate(
            input_ids=input_ids.to(model.device),
            attention_mask=attention_mask.to(model.device),
            generation_config=settings,
            synced_gpus=False,  # one rank may generate alone, under fsdp2 too: all weights are on each then
            stopping_criteria=StoppingCriteriaList([Stops(stop, width)] if stop else []),
            **no_router_logits(model),
        )
    return [_to_end(row, settings.eos_token_id) for row in output[:, width:].cpu().numpy()]


def without_undefined(logits: Tensor, undefined_U: Tensor | None) -> Tensor:
    """(..., V) logits in which the ids of `undefined_U` have probability 0; a copy if there are any."""
    return logits if undefined_U is None else logits.index_fill(-1, undefined_U.to(logits.device), -torch.inf)


def left_padded(prompts: Sequence[np.ndarray], pad_id: int) -> tuple[Tensor, Tensor]:
    """(P, W) prompts, which end in the last column, from where generation goes on, and the mask of what is theirs."""
    width = max(len(prompt) for prompt in prompts)
    input_ids = torch.full((len(prompts), width), int(pad_id))
    attention_mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, width - len(prompt) :] = torch.tensor(prompt.tolist())
        attention_mask[row, width - len(prompt) :] = 1
    return input_ids, attention_mask


@contextmanager
def own_settings(model: PreTrainedModel, settings: GenerationConfig) -> Iterator[None]:
    """Inside, the model's own generation settings are ours: transformers takes from them what ours leave open."""
    own_defaults, model.generation_config = model.generation_config, settings
    try:
        yield
    finally:
        model.generation_config = own_defaults


class Stops(StoppingCriteria):
    """Stop strings as transformers asks for them, of rows whose prompts end before column `width`."""

    def __init__(self, stop: Callable[[np.ndarray], bool], width: int) -> None:
        self._stop, self._width = stop, width

    def __call__(self, input_ids: Tensor, scores: object, **kwargs: object) -> Tensor:
        """(rows,) whether each row ends with its newest token."""
        ended = [self._stop(row) for row in input_ids[:, self._width :].cpu().numpy()]
        return torch.tensor(ended, device=input_ids.device)


def _to_end(ids: np.ndarray, end_ids: Sequence[int]) -> np.ndarray:
    """The tokens up to the first end token, which stays."""
    found = np.flatnonzero(np.isin(ids, end_ids))
    return ids[: found[0] + 1] if len(found) else ids
