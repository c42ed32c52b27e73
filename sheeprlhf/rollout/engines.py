"""Sampling and generation by transformers, and stop strings.

`generation.engine=hf` samples K responses after each prompt from softmax(logits / temperature), as the native engine
does. It seeds torch's generator with the first number of the prompts that it samples at a time.

Letters: P prompts, K responses of each, N most new tokens, B rows, V vocabulary.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from sheeprlhf.config.command_words import shell_word
from sheeprlhf.model.attention import no_router_logits
from sheeprlhf.model.folder.architecture import outgrows_cache
from sheeprlhf.rollout.padded_decoders import PaddedDecoder, unpacked_decoder
from sheeprlhf.rollout.sampler import Sampled, prompt_groups, sampled_by_prompt
from sheeprlhf.structure.run import GenConfig
from sheeprlhf.utils.end_tokens import end_token_ids
from sheeprlhf.utils.errors import ConfigError
from sheeprlhf.utils.memory import phase
from sheeprlhf.utils.modes import eval_mode
from sheeprlhf.utils.vocabulary import ResponseDecoder, undefined_ids

Stop = Callable[[np.ndarray], bool]
_MARGIN = 8  # tokens before the tail: a decoder may drop the first one's space, or begin inside a character


class StopStrings:
    """Called with a response's tokens so far, after each one: True if their text contains one of the strings.

    The text is what `decode` gives without special tokens; `text` has the space too with which a response begins. A
    string that is a special token's own text means that token. The tokens stay as they were sampled, the one that
    completed the string among them; `text` is cut.

    Args:
        strings: none of them empty; without any, nothing ever stops.
        tokenizer: of the tokens.
        as_message: the text is the content of a message, to which the chat template adds a space where it wants one.

    Attributes:
        strings: the strings.
        token_ids: the special tokens among them.

    Raises:
        ConfigError: one of them is more than a special token's text, so that no text has it.
    """

    def __init__(self, strings: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, as_message: bool = False) -> None:
        special = {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        for string, content in product(strings, special.values()):
            if content and content in string and content != string:
                shown = dict.fromkeys(content if one == string else one for one in strings)
                raise ConfigError(
                    f"generation.stop_strings: {string!r} is more than the special token {content!r}, which no text "
                    f"shows: give {content!r} only, {shell_word('generation.stop_strings', list(shown))}"
                )
        self._end_ids = end_token_ids(tokenizer)
        self._tokenizer = tokenizer
        self._response_text = None if as_message else ResponseDecoder(tokenizer)
        self._special = np.array(list(special), dtype=np.int64)
        self.token_ids = frozenset(i for i, content in special.items() if content in strings)
        self.strings = tuple(strings)
        # The newest token completed the string, and each of the others has at least a byte of it. Twice as many are
        # looked at, because some decoders write less than the tokens hold (" ." becomes ".").
        self._tail = 2 * max((len(string.encode()) for string in strings), default=0) + _MARGIN

    def __bool__(self) -> bool:
        """True if there are any."""
        return bool(self.strings)

    def __call__(self, ids: np.ndarray) -> bool:
        """True if a response ends here.

        Args:
            ids: (R,) its tokens so far, R >= 1; without those before the newest one it has not ended.
        """
        if not self.strings or int(ids[-1]) in self.token_ids:
            return bool(self.strings)
        written = ids[~np.isin(ids, self._special)]
        # The end alone is cheap to decode; where it seems to have a string, the whole text decides.
        return self._found(self._decode(written[-self._tail :])) >= 0 and self._found(self._decode(written)) >= 0

    def text(self, ids: np.ndarray) -> str:
        """Decode (R,) tokens without special ones and the end token, up to the first stop string, which is left out."""
        ended = len(ids) > 0 and int(ids[-1]) in self._end_ids  # it need not be a special token
        written = ids[:-1] if ended else ids
        text = self._decode(written)
        whole = text if self._response_text is None else self._response_text(written.tolist())
        space = whole.removesuffix(text) if whole.endswith(text) else ""  # that the decoder drops at a text's start
        end = self._found(text)
        return space + (text if end < 0 else text[:end])

    def _found(self, text: str) -> int:
        """Position of the first of the strings; -1 if there is none."""
        return min((place for string in self.strings if (place := text.find(string)) >= 0), default=-1)

    def _decode(self, ids: np.ndarray) -> str:
        return str(self._tokenizer.decode(ids.tolist(), skip_special_tokens=True))


@phase("generation")
@torch.no_grad()
def transformers_responses(
    model: PreTrainedModel,
    prompts: Sequence[np.ndarray],
    uniforms: np.ndarray,
    *,
    temperature: float,
    end_ids: Sequence[int],
    token_budget: int,
    stop: Stop | None = None,
    progress: Callable[[int], object] = lambda _: None,
    packed: bool = True,
    undefined_U: Tensor | None = None,
) -> list[Sampled]:
    """`sample_responses` by transformers' `generate`; prompts are padded on the left, if the model permits it."""
    num_responses, num_new = uniforms.shape[1:]
    settings, lengths = _settings(num_responses, num_new, temperature, end_ids), [len(one) for one in prompts]
    results: dict[int, Sampled] = {}
    with eval_mode(model), own_settings(model, settings):
        settings.use_cache = may_pad = isinstance(unpacked_decoder(model), PaddedDecoder)
        groups = prompt_groups(lengths, num_responses, num_new, token_budget, shared=False)
        for group in _groups_to_pad(groups, lengths, may_pad):
            recorder = LogprobRecorder(temperature, undefined_U)
            with _seeded(uniforms[group[0]], model.device):
                new_BN = _generate(model, [prompts[index] for index in group], settings, stop, recorder)
            rows = zip(new_BN.cpu().numpy(), recorder.logprobs(new_BN), strict=True)
            ended = [cut_at_end(*row, end_ids, stop) for row in rows]
            results |= zip(group, sampled_by_prompt(ended, num_responses), strict=True)
            progress(len(ended))
    return [results[index] for index in range(len(prompts))]


def _groups_to_pad(groups: Iterable[list[int]], lengths: Sequence[int], may_pad: bool) -> Iterator[list[int]]:
    """Cut groups of prompts so that those of a group may be padded to one length: as they are, or of equal length."""
    for group in groups:
        of_length: dict[int, list[int]] = {}
        for index in group:
            of_length.setdefault(0 if may_pad else lengths[index], []).append(index)
        yield from of_length.values()


def _generate(
    model: PreTrainedModel,
    prompts: Sequence[np.ndarray],
    settings: GenerationConfig,
    stop: Stop | None,
    *processors: LogitsProcessor,
) -> Tensor:
    """(B, N) tokens that `generate` writes after prompts, which are padded on the left."""
    input_ids, attention_mask = left_padded(prompts, settings.pad_token_id)
    width = input_ids.shape[1]
    output = cast(Any, model).generate(
        input_ids=input_ids.to(model.device),
        attention_mask=attention_mask.to(model.device),
        generation_config=settings,
        synced_gpus=False,  # one rank may generate alone, under fsdp2 too: all weights are on each then
        logits_processor=LogitsProcessorList(processors),
        stopping_criteria=StoppingCriteriaList([] if stop is None else [Stops(stop, width)]),
        **no_router_logits(model),
    )
    return output[:, width:]


class LogprobRecorder(LogitsProcessor):
    """Records the log-probability of every sampled token from the logits of its step.

    It changes nothing but logits of undefined ids, and those that are not finite, from which torch would refuse to
    draw: their recorded log-probabilities are not finite either, which the caller checks.
    """

    def __init__(self, temperature: float, undefined_U: Tensor | None = None) -> None:
        self._temperature, self._undefined_U = temperature, undefined_U
        self._newest_BV: Tensor | None = None
        self._taken: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The (B, V) scores as they are; the newest column of `input_ids` came from those before."""
        self._note(input_ids[:, -1])
        scores = without_undefined(scores, self._undefined_U)
        self._newest_BV = (scores.float() / self._temperature).log_softmax(dim=-1)
        return without_undefined(torch.nan_to_num(scores), self._undefined_U)

    def logprobs(self, new_BN: Tensor) -> np.ndarray:
        """(B, N) float32, nats, of all new tokens."""
        self._note(new_BN[:, -1])
        return torch.stack(self._taken, dim=1).cpu().numpy()

    def _note(self, taken_B: Tensor) -> None:
        if self._newest_BV is not None:
            self._taken.append(self._newest_BV.gather(1, taken_B[:, None])[:, 0])


def _settings(num_responses: int, num_new: int, temperature: float, end_ids: Sequence[int]) -> GenerationConfig:
    """Make complete settings of plain sampling: no default of transformers or of the model is used."""
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be above 0; nothing is sampled at 0")
    return GenerationConfig(
        max_new_tokens=num_new,
        num_return_sequences=num_responses,
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        eos_token_id=list(end_ids) or None,
        pad_token_id=next(iter(end_ids), 0),
        use_cache=True,
    )


def first_seed(uniforms_KN: np.ndarray) -> int:
    """32 bits of the first number."""
    return int(uniforms_KN[0, 0] * 2**32)


@contextmanager
def _seeded(uniforms_KN: np.ndarray, device: torch.device) -> Iterator[None]:
    """Seed torch's generators with the first number within the block; restore them afterwards."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(first_seed(uniforms_KN))
        yield


def cut_at_end(
    ids: np.ndarray, logprobs: np.ndarray, end_ids: Sequence[int], stop: Stop | None
) -> tuple[np.ndarray, np.ndarray, bool]:
    """Return a response up to where an end token or `stop` ended it, its log-probabilities, and whether one did."""
    ids, logprobs = ids.astype(np.int32), logprobs.astype(np.float32)
    for number in range(1, len(ids) + 1):
        if ids[number - 1] in end_ids or (stop is not None and stop(ids[:number])):
            return ids[:number], logprobs[:number], True
    return ids, logprobs, False


def generation_config(cfg: GenConfig, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """Make a complete GenerationConfig: no default of the model is used."""
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
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[np.ndarray],
    cfg: GenConfig,
    *,
    with_end_token: bool = False,
) -> list[str]:
    """The text that the model generates after each prompt, up to a stop string; arguments as in `generate_ids`.

    `with_end_token` keeps the end token of a text that has one; with stop strings none does.
    """
    stop = StopStrings(cfg.stop_strings, tokenizer)
    rows = generate_ids(model, tokenizer, prompts, cfg, stop)
    end_ids = end_token_ids(tokenizer) if with_end_token and not stop else ()
    ends = [tokenizer.decode([int(row[-1])]) if len(row) and int(row[-1]) in end_ids else "" for row in rows]
    return [f"{stop.text(row)}{end}" for row, end in zip(rows, ends, strict=True)]


@phase("generation")
@torch.no_grad()
def generate_ids(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[np.ndarray],
    cfg: GenConfig,
    stop: StopStrings | None = None,
) -> list[np.ndarray]:
    """Generate tokens after each prompt (P_i,), up to and including an end token, or `cfg.max_new_tokens`.

    Where one of the stop strings ended one, special tokens may follow until the others have ended. The random numbers
    are torch's; the caller isolates them. Prompts of different lengths are generated after together, unless padding or
    a cache would change the model's outputs.
    """
    settings = generation_config(cfg, tokenizer)
    undefined = undefined_ids(tokenizer, model.get_output_embeddings().weight.shape[0])
    settings.suppress_tokens = None if undefined is None else undefined.tolist()
    results: dict[int, np.ndarray] = {}
    lengths = [len(prompt) for prompt in prompts]
    with eval_mode(model), own_settings(model, settings):
        may_pad = isinstance(unpacked_decoder(model), PaddedDecoder)
        settings.use_cache = may_pad and not outgrows_cache(model, lengths, cfg.max_new_tokens)
        for group in _groups_to_pad([list(range(len(prompts)))], lengths, may_pad):
            new_BN = _generate(model, [prompts[index] for index in group], settings, stop or None)
            rows = [_to_end(row, settings.eos_token_id) for row in new_BN.cpu().numpy()]
            results |= zip(group, rows, strict=True)
    return [results[index] for index in range(len(prompts))]


def without_undefined(logits: Tensor, undefined_U: Tensor | None) -> Tensor:
    """(..., V) logits in which the ids of `undefined_U` have probability 0; a copy if there are any."""
    return logits if undefined_U is None else logits.index_fill(-1, undefined_U.to(logits.device), -torch.inf)


def left_padded(prompts: Sequence[np.ndarray], pad_id: int) -> tuple[Tensor, Tensor]:
    """(P, W) prompts, which end in the last column, from where generation continues, and the mask of what is theirs."""
    width = max(len(prompt) for prompt in prompts)
    input_ids = torch.full((len(prompts), width), int(pad_id))
    attention_mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, width - len(prompt) :] = torch.tensor(prompt.tolist())
        attention_mask[row, width - len(prompt) :] = 1
    return input_ids, attention_mask


@contextmanager
def own_settings(model: PreTrainedModel, settings: GenerationConfig) -> Iterator[None]:
    """Replace the model's own generation settings within the block: transformers reads unset values from them."""
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
    """Return the tokens up to and including the first end token."""
    ends = np.flatnonzero(np.isin(ids, end_ids))
    return ids[: ends[0] + 1] if len(ends) else ids


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
    """Yield the tokens that `generate` would write after this prompt, each as soon as it is chosen, up to an end token.

    Args:
        model: the language model, not wrapped, in eval mode.
        prompt_ids: (P,), P >= 1.
        cfg: one beam.
        end_ids: each ends the response.
        seed: of random numbers of its own, so that concurrent work does not change the response.
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
    decoder = unpacked_decoder(model, [len(prompt_ids)], cfg.max_new_tokens)
    logits_1V = decoder.prefill([prompt_ids], 1, cfg.max_new_tokens)
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
            logits_1V = decoder.step(token_1)
