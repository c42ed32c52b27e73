"""Sample responses token by token, with random numbers that the caller gives: the native engine and its decoders.

A decoder turns the prompts into logits, then advances all rows by one token at a time. `PackedDecoder` is for models
with packed attention; `padded_decoders` has those for the others.

Letters: P prompts, K responses of each, B live rows, V vocabulary, N tokens of a response, T packed positions of
prompts, W tokens of the longest prompt, L tokens of the longest row, C hidden width; H query heads, G key heads, E
query heads of a key head, D head width.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pkgutil import resolve_name
from typing import NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from sheeprlhf.data.example import layout_of
from sheeprlhf.model.attention import Variant, kernel_dtype, placeholder_mask
from sheeprlhf.model.folder.architecture import packing_limit
from sheeprlhf.model.lm_head import at_tails, backbone_and_head, last_block_at_tails
from sheeprlhf.utils.lightning import move_data_to_device
from sheeprlhf.utils.memory import phase
from sheeprlhf.utils.modes import eval_mode

HELD = 8  # times the tokens of a forward pass may be in the cache: keys and values are small compared with activations


class Sampled(NamedTuple):
    """Responses sampled after one prompt."""

    responses: tuple[np.ndarray, ...]  # K arrays (R_k,) int32, R_k >= 1, ending in an end token if one came
    # K arrays (R_k,) float32, nats, log-probability of each token at the sampling temperature
    logprobs: tuple[np.ndarray, ...]
    # K bools, whether an end token or a stop string ended it; else it was cut at the most new tokens
    finished: tuple[bool, ...]


@phase("generation")
@torch.no_grad()
def sample_responses(
    model: PreTrainedModel,
    prompts: Sequence[np.ndarray],
    uniforms: np.ndarray,
    *,
    temperature: float,
    end_ids: Sequence[int],
    token_budget: int,
    stop: Callable[[np.ndarray], bool] | None = None,
    progress: Callable[[int], object] = lambda _: None,
    packed: bool = True,
    top_k: int = 0,
    top_p: float = 1.0,
    max_prompts: int | None = None,
    undefined_U: Tensor | None = None,
    limits: Sequence[int] | None = None,
) -> list[Sampled]:
    """Sample K responses after each prompt, from softmax(logits / temperature), or from its likeliest tokens only.

    A sample is a function of the weights, the prompt and its numbers: not of the other prompts, their order, the rank,
    or any random generator. The model's own generation settings are not read.

    Args:
        model: the language model, not wrapped; its training flags are restored.
        prompts: token ids of each prompt, (P_i,), P_i >= 1.
        uniforms: (P, K, most new tokens) float64 in [0, 1): which token is taken at each place.
        temperature: divides the logits; above 0.
        end_ids: tokens each of which ends a response; without any, nothing does.
        token_budget: most tokens of a forward pass over prompts, beyond one prompt's; HELD times as many are held at a
            time.
        stop: called with a response's tokens so far, after each one; True ends it.
        progress: called with the number of responses that have just ended.
        packed: whether the model computes packed rows as it does padded ones; prompts are padded if it does not.
        top_k: as in `draw`, like top_p; with 1 the numbers do not matter.
        top_p: as in `draw`.
        max_prompts: most prompts that are sampled after at a time.
        undefined_U: (U,) int64, ids that are never sampled.
        limits: most new tokens of a response to each prompt, at least 1; None: as many as there are numbers.

    Returns:
        One `Sampled` per prompt, in their order.

    Raises:
        ValueError: the temperature is not above 0.
    """
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be above 0; nothing is sampled at 0")
    lengths = [len(prompt) for prompt in prompts]
    num_responses, num_new = uniforms.shape[1:]
    packed = packed and not packing_limit(model, max(lengths, default=0) + num_new)
    results: dict[int, Sampled] = {}
    with eval_mode(model):
        unpacked = resolve_name("sheeprlhf.rollout.padded_decoders:unpacked_decoder")
        groups = prompt_groups(lengths, num_responses, num_new, token_budget, shared=packed, most=max_prompts)
        undefined_U = None if undefined_U is None else undefined_U.to(model.device)
        draw_next = partial(draw, temperature=temperature, top_k=top_k, top_p=top_p, undefined_U=undefined_U)
        for group in groups:
            group_prompts = [prompts[index] for index in group]
            own = [lengths[index] for index in group]
            decoder: Decoder = PackedDecoder(model, token_budget) if packed else unpacked(model, own, num_new)
            most = np.array([num_new if limits is None else limits[index] for index in group])
            sampled = _sample_group(decoder, group_prompts, uniforms[group], most, draw_next, end_ids, stop, progress)
            results |= zip(group, sampled, strict=True)
    return [results[index] for index in range(len(prompts))]


def engine_of(name: str) -> Callable[..., list[Sampled]]:
    """The function of `generation.engine`: arguments as of `sample_responses` up to `packed`, and `undefined_U`."""
    return sample_responses if name == "native" else resolve_name("sheeprlhf.rollout.engines:transformers_responses")


def prompt_groups(
    lengths: list[int],
    num_responses: int,
    num_new: int,
    token_budget: int,
    *,
    shared: bool,
    most: int | None = None,
) -> Iterator[list[int]]:
    """Prompts of about one length that are sampled together, shortest first; at least one a group, `most` at most.

    With `shared`, a prompt is held once for all of its responses.
    """
    group: list[int] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        held = lengths[index] * (1 if shared else num_responses) + num_responses * num_new
        computed = 0 if shared else (len(group) + 1) * lengths[index]  # packed prompts are computed part by part
        full = computed > token_budget or (len(group) + 1) * held > HELD * token_budget or len(group) == most
        if group and full:
            yield group
            group = []
        group.append(index)
    if group:
        yield group


def _sample_group(
    decoder: "Decoder",
    prompts: Sequence[np.ndarray],
    uniforms_PKN: np.ndarray,
    limits_P: np.ndarray,
    draw_next: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    end_ids: Sequence[int],
    stop: Callable[[np.ndarray], bool] | None,
    progress: Callable[[int], object],
) -> list[Sampled]:
    """Sample after all prompts of a group at once. Row R = P * K holds a prompt's response; the first B are live."""
    num_responses, num_new = uniforms_PKN.shape[1:]
    logits_BV = decoder.prefill(prompts, num_responses, num_new)
    device, num_rows = logits_BV.device, len(logits_BV)
    uniforms_RN = torch.from_numpy(uniforms_PKN.reshape(num_rows, num_new)).to(device)
    logprobs_RN = torch.zeros(num_rows, num_new, dtype=torch.float32, device=device)
    ids_RN = np.zeros((num_rows, num_new), dtype=np.int32)
    lengths_R, finished_R = np.zeros(num_rows, dtype=np.int64), np.zeros(num_rows, dtype=bool)
    live_B, limits_R = np.arange(num_rows), limits_P.repeat(num_responses)
    for step in range(num_new):
        index_B = torch.from_numpy(live_B).to(device)
        next_B, logprobs_RN[index_B, step] = draw_next(logits_BV, uniforms_RN[index_B, step])
        ids_RN[live_B, step] = next_B.cpu().numpy()
        lengths_R[live_B] = step + 1
        finished_R[live_B] = np.isin(ids_RN[live_B, step], end_ids)
        if stop is not None:
            for row in live_B[~finished_R[live_B]]:
                finished_R[row] = stop(ids_RN[row, : step + 1])
        ended_B = finished_R[live_B] | (step + 1 >= limits_R[live_B])
        if ended_B.any():
            progress(int(ended_B.sum()))
            order = compact(ended_B)
            if not len(order):
                break
            decoder.keep(order)
            live_B, next_B = live_B[order], next_B[order]
        logits_BV = decoder.step(next_B)
    logprobs = logprobs_RN.cpu().numpy()
    found = [
        (ids_RN[row, :length], logprobs[row, :length], bool(finished_R[row])) for row, length in enumerate(lengths_R)
    ]
    return sampled_by_prompt(found, num_responses)


def sampled_by_prompt(rows: Sequence[tuple[np.ndarray, np.ndarray, bool]], num_responses: int) -> list[Sampled]:
    """Return the responses of each prompt from those of all prompts: ids, log-probabilities, whether it finished."""
    starts = range(0, len(rows), num_responses)
    return [Sampled(*zip(*rows[start : start + num_responses], strict=True)) for start in starts]


def draw(
    logits_BV: Tensor,
    uniform_B: Tensor,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    undefined_U: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Take a token of softmax(logits / temperature) by the inverse of its distribution function, in token-id order.

    Args:
        logits_BV: (B, V) logits.
        uniform_B: (B,) float64 in [0, 1): token i is taken where the sum of the probabilities up to i first exceeds it.
        temperature: above 0.
        top_k: only the k likeliest tokens can be taken; 0: all.
        top_p: only the fewest likeliest tokens that have this probability together can be taken.
        undefined_U: (U,) ids that cannot be taken.

    Returns:
        (B,) token ids, and (B,) float32 log-probabilities in nats. A token of probability 0 is never taken.
    """
    scaled_BV = logits_BV.float() / temperature
    if undefined_U is not None:
        scaled_BV = scaled_BV.index_fill(-1, undefined_U, -torch.inf)
    logprobs_BV = scaled_BV.log_softmax(dim=-1)
    if top_k or top_p < 1.0:
        logprobs_BV = _likeliest(logprobs_BV, top_k, top_p).log_softmax(dim=-1)
    cumulative_BV = logprobs_BV.exp().cumsum(dim=-1, dtype=torch.float64)
    # The last sum is 1 except for rounding; a product with less than 1 is below it, so that some sum exceeds it.
    limit_B1 = uniform_B[:, None] * cumulative_BV[:, -1:]
    ids_B1 = torch.searchsorted(cumulative_BV, limit_B1, right=True)
    ids_B1 = ids_B1.clamp(max=logits_BV.shape[1] - 1)  # past the end where a logit is NaN, as logprobs are
    return ids_B1[:, 0], logprobs_BV.gather(1, ids_B1)[:, 0]


def _likeliest(logprobs_BV: Tensor, top_k: int, top_p: float) -> Tensor:
    """(B, V) log-probabilities, minus infinity for the tokens that are not among the likeliest (see `draw`)."""
    likeliest_BK, ids_BK = logprobs_BV.topk(min(top_k or logprobs_BV.shape[-1], logprobs_BV.shape[-1]))
    before_BK = likeliest_BK.softmax(dim=-1).cumsum(dim=-1).roll(1, dims=-1)
    before_BK[:, 0] = 0.0
    likeliest_BK = likeliest_BK.masked_fill(before_BK >= top_p, -torch.inf)
    return torch.full_like(logprobs_BV, -torch.inf).scatter(1, ids_BK, likeliest_BK)


class SharedCache:
    """Keys and values that `packed_attention` gets, and its attention to them.

    It stores those of packed prompts first, in one forward pass or several; after `share`, those of one token of every
    live response at a time. They come from the attention, not from the model's calls of a cache: some models cache
    something else that they compute keys and values of (the latents of DeepSeek).
    """

    def __init__(self) -> None:
        self._parts: dict[int, list[list[Tensor]]] = {}  # before `share`: a layer's keys and values, (1, G, T, D)
        self._prompts: dict[int, list[Tensor]] = {}  # a layer's keys and values: (P, G, W, D)
        self._responses: dict[int, list[Tensor]] = {}  # a layer's keys and values: (rows, G, N, D)
        self._num_responses = 0  # K; 0 before `share`
        self._num_columns = 0  # tokens that each live response has in the cache

    @property
    def max_key(self) -> int:
        """Tokens that the longest row sees, the one that is being written included."""
        return self._mask_P11W.shape[-1] + self._num_columns + 1

    def store(self, layer: int, key_1GTD: Tensor, value_1GTD: Tensor) -> None:
        """Store the keys and values of packed prompts."""
        self._parts.setdefault(layer, []).append([key_1GTD, value_1GTD])

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

    def attend(
        self,
        layer: int,
        query_BH1D: Tensor,
        key_BG1D: Tensor,
        value_BG1D: Tensor,
        scaling: float | None,
        variant: Variant,
    ) -> Tensor:
        """Attention of the newest token of each live response: to its prompt, and to the response up to itself.

        Args:
            layer: number of the layer.
            query_BH1D: queries.
            key_BG1D: keys of the newest tokens, which are stored, like the values.
            value_BG1D: values.
            scaling: factor of the scores; None is D ** -0.5.
            variant: of the layer's attention.

        Returns:
            (B, 1, H, D), in the query's number format.
        """
        for stored_RGND, new_BG1D in zip(self._responses[layer], (key_BG1D, value_BG1D), strict=True):
            stored_RGND[: len(new_BG1D), :, self._num_columns] = new_BG1D[:, :, 0]
        keys_PGWD, values_PGWD = self._prompts[layer]
        rows, columns = len(query_BH1D), self._num_columns + 1
        keys_BGND, values_BGND = (x[:rows, :, :columns] for x in self._responses[layer])
        scale = query_BH1D.shape[-1] ** -0.5 if scaling is None else scaling
        query_BGED = (query_BH1D * scale).to(keys_PGWD.dtype).unflatten(1, (keys_PGWD.shape[1], -1))[:, :, :, 0]

        scores_PGMW, scores_BGEN = self._by_prompt(query_BGED) @ keys_PGWD.mT, query_BGED @ keys_BGND.mT
        if variant.is_plain:
            scores_BGEW = self._by_response(scores_PGMW + self._mask_P11W)
            weights = torch.cat([scores_BGEW, scores_BGEN], dim=-1).softmax(dim=-1, dtype=torch.float32)
        else:
            weights = self._weights(torch.cat([self._by_response(scores_PGMW), scores_BGEN], dim=-1), variant)
        weights = weights.to(values_PGWD.dtype)
        weights_BGEW, weights_BGEN = weights.split([keys_PGWD.shape[2], columns], dim=-1)
        output_BGED = self._by_response(self._by_prompt(weights_BGEW) @ values_PGWD) + weights_BGEN @ values_BGND
        return output_BGED.flatten(1, 2)[:, None].to(query_BH1D.dtype)

    def _weights(self, scores_BGEM: Tensor, variant: Variant) -> Tensor:
        """(B, G, E, M) weights of a prompt's keys, followed by those of the response."""
        prompts_B = self._slot_index_B // self._num_responses
        columns, mask_BW = self._num_columns + 1, self._mask_P11W[prompts_B, 0, 0]
        mask_BM = F.pad(mask_BW, (0, columns))
        if variant.window is not None:
            lengths_B1 = (mask_BW == 0).sum(dim=-1, keepdim=True)
            of_prompt_W, of_response_N = (torch.arange(n, device=mask_BM.device) for n in (mask_BW.shape[-1], columns))
            positions_BM = torch.cat([of_prompt_W.expand_as(mask_BW), lengths_B1 + of_response_N], dim=-1)
            mask_BM = mask_BM.masked_fill(positions_BM <= positions_BM[:, -1:] - variant.window, -math.inf)
        return variant.softmax(scores_BGEM.flatten(1, 2)[:, :, None], mask_BM[:, None, None]).view_as(scores_BGEM)

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
        """(P, G, K * E, X): the responses' rows next to each other; zero where a response has ended."""
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


class Decoder(Protocol):
    """Logits of the rows of a group, one token after the other; the first rows are live."""

    def prefill(self, prompts: Sequence[np.ndarray], num_responses: int, num_new: int) -> Tensor:
        """Compute the prompts. Returns (B, V) logits of each row's first token, `num_responses` rows a prompt."""

    def step(self, ids_B: Tensor) -> Tensor:
        """Write one token into each live row. Returns (B, V) logits of the next one."""

    def keep(self, order_B: np.ndarray) -> None:
        """Go on with fewer rows: the i-th is now what the `order_B[i]`-th was."""


class PackedDecoder:
    """Rows of a model with packed attention: prompts are computed once, unpadded; then a static cache.

    A forward pass has at most `token_budget` tokens of prompts, or one prompt.
    """

    def __init__(self, model: PreTrainedModel, token_budget: int) -> None:
        self._backbone, self._head = backbone_and_head(model)
        self._cache, self._token_budget = SharedCache(), token_budget

    def prefill(self, prompts: Sequence[np.ndarray], num_responses: int, num_new: int) -> Tensor:
        """As `Decoder.prefill`."""
        device = next(self._backbone.parameters()).device
        lengths = [len(prompt) for prompt in prompts]
        hidden_PC = torch.cat([self._last_hidden(part, device) for part in _parts(prompts, self._token_budget)])
        self._cache.share(lengths, num_responses, num_new - 1, kernel_dtype(device.type, hidden_PC.dtype))
        self._positions_B1 = torch.tensor(lengths, device=device).repeat_interleave(num_responses)[:, None]
        return self._head(hidden_PC).repeat_interleave(num_responses, dim=0)

    def _last_hidden(self, prompts: Sequence[np.ndarray], device: torch.device) -> Tensor:
        """(P, C) hidden states of the last tokens of some prompts, whose keys and values go to the cache."""
        lengths = [len(prompt) for prompt in prompts]
        input_ids_1T = torch.from_numpy(np.concatenate(prompts).astype(np.int64))[None].to(device)
        position_ids_1T = torch.cat([torch.arange(length) for length in lengths])[None].to(device)
        layout = move_data_to_device(layout_of([(length, (0,)) for length in lengths]), device)
        with last_block_at_tails(self._backbone, layout):
            hidden_1TC = self._backbone(
                input_ids=input_ids_1T,
                attention_mask=placeholder_mask(input_ids_1T),
                position_ids=position_ids_1T,
                layout=layout,
                store_keys=self._cache.store,
                use_cache=False,
            ).last_hidden_state
        return at_tails(hidden_1TC, layout)[0]

    def step(self, ids_B: Tensor) -> Tensor:
        """As `Decoder.step`."""
        hidden_B1C = self._backbone(
            input_ids=ids_B[:, None],
            attention_mask=placeholder_mask(ids_B),
            position_ids=self._positions_B1,
            layout=self._cache,
            use_cache=False,
        ).last_hidden_state
        self._cache.next_token()
        self._positions_B1 = self._positions_B1 + 1
        return self._head(hidden_B1C[:, 0])

    def keep(self, order_B: np.ndarray) -> None:
        """As `Decoder.keep`."""
        self._cache.keep(order_B)
        self._positions_B1 = self._positions_B1[order_B]


def _parts(prompts: Sequence[np.ndarray], token_budget: int) -> list[list[np.ndarray]]:
    """Divide prompts into parts that are computed together, in their order, at least one in each."""
    parts: list[list[np.ndarray]] = [[]]
    for prompt in prompts:
        if parts[-1] and sum(map(len, parts[-1])) + len(prompt) > token_budget:
            parts.append([])
        parts[-1].append(prompt)
    return parts
