"""Heads on the hidden states: log-probabilities of tokens at chosen positions, or one score at each.

A model with a score head is transformers' own `AutoModelForSequenceClassification` with one label, so plain
transformers loads what is saved.

The last block is computed only where the head runs (`last_block_at_tails`).

Letters: C hidden width, R head rows (positions where the head runs), N targets, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple, TypedDict, Unpack, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from sheeprlhf.model.attention import KeysStored, TailQueries

MAX_LOGITS = 1 << 26  # logits kept for one backward pass; more is recomputed in chunks of this size
_CPU_CHUNK, _CHUNK = 1 << 18, 1 << 25  # logits that are worked on at a time in float32: 1 MB stays in a core's cache


def backbone_and_head(model: PreTrainedModel) -> tuple[nn.Module, nn.Module]:
    """The part of a causal language model that makes hidden states, and its language head."""
    backbone, head = model.base_model, model.get_output_embeddings()
    if backbone is model:  # Llama4ForCausalLM has no attribute of the name that its class states
        backbone = model.get_decoder()
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
    softcap = getattr(config, "final_logit_softcapping", None)
    return backbone, head if scale == 1 and softcap is None else _AdjustedHead(head, scale, softcap)


class _AdjustedHead(nn.Module):
    """A language head whose logits are scaled (Granite, Cohere) or soft-capped (Gemma 2) afterwards."""

    def __init__(self, head: nn.Module, scale: float, softcap: float | None) -> None:
        super().__init__()
        self.head, self.scale, self.softcap = head, scale, softcap

    @property
    def weight(self) -> Tensor:
        """(V, C) of the head."""
        return cast(Tensor, self.head.weight)

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits of hidden states."""
        logits: Tensor = self.head(hidden) * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def at_least_float32(x: Tensor) -> Tensor:
    """In float32; float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class TokenLogprobs(NamedTuple):
    """Log-probabilities of the N targets of a batch, float32 or float64, in nats; None for what was not asked for."""

    target_N: Tensor  # of the target token itself
    mean_N: Tensor | None  # averaged over the vocabulary (label smoothing)
    entropy_N: Tensor | None = None  # of the distribution that predicts the target
    value_N: Tensor | None = None  # what a value head on the same trunk says before the target
    log_sum_squares_N: Tensor | None = None  # log of the sum of the squared probabilities, without gradient
    router_logits: tuple[Tensor, ...] | None = None  # of each layer with experts, (tokens, experts)


class LogprobOptions(TypedDict, total=False):
    """Options of `logprobs_from_logits`."""

    mean: bool  # add `mean_N`
    entropy: bool  # add `entropy_N`
    log_sum_squares: bool  # add `log_sum_squares_N`
    temperature: float  # divides the logits
    undefined_U: Tensor | None  # ids that have probability 0; not together with `mean`


class _GatherLogprobs(torch.autograd.Function):
    """log_softmax at chosen entries, keeping one (R, V) buffer, the logits: their gradient is written over them.

    Both passes go over the rows in chunks that a CPU's cache holds, and compute in float32 (or float64).
    """

    @staticmethod
    def forward(
        ctx: Any, logits_RV: Tensor, index_N: Tensor, target_ids_N: Tensor, mean: bool, entropy: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        sums, means, entropies = [], [], []
        for part in logits_RV.split(_chunk_rows(logits_RV)):
            wide = at_least_float32(part)
            sums.append(wide.logsumexp(dim=-1))
            means += [wide.mean(dim=-1)] if mean else []
            entropies += [_entropy((wide - sums[-1][:, None]).exp())] if entropy else []
        logsumexp_R, entropy_R = torch.cat(sums), torch.cat(entropies) if entropy else None
        ctx.save_for_backward(logits_RV, logsumexp_R, index_N, target_ids_N, entropy_R)
        target_N = at_least_float32(logits_RV[index_N, target_ids_N]) - logsumexp_R[index_N]
        mean_N = (torch.cat(means) - logsumexp_R)[index_N] if mean else None
        return target_N, mean_N, None if entropy_R is None else entropy_R[index_N]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor, None, None, None, None]:
        logits_RV, logsumexp_R, index_N, target_ids_N, entropy_R = ctx.saved_tensors
        grad_target_N, grad_mean_N, grad_entropy_N = grads
        assert grad_target_N is not None
        total_N = grad_target_N if grad_mean_N is None else grad_target_N + grad_mean_N
        total_R = torch.zeros_like(logsumexp_R).index_add_(0, index_N, total_N)
        start = 0
        for part in logits_RV.split(_chunk_rows(logits_RV)):
            rows = slice(start, start + len(part))
            # In place: the buffer is this function's own and has no reader after this point.
            p = at_least_float32(part).sub_(logsumexp_R[rows, None]).exp_()
            slope = None
            if grad_entropy_N is not None:  # dH / dlogits = -p log p - p H
                of_row = torch.zeros_like(logsumexp_R).index_add_(0, index_N, grad_entropy_N)[rows, None]
                slope = (torch.special.entr(p) - p * entropy_R[rows, None]).mul_(of_row)
            grad = p.mul_(-total_R[rows, None])
            inside_N = (index_N >= start) & (index_N < start + len(part))
            row_N = torch.where(inside_N, index_N - start, 0)
            if grad_mean_N is not None:
                mean_r = grad.new_zeros(len(part)).index_add_(0, row_N, grad_mean_N * inside_N)
                grad.add_(mean_r[:, None] / grad.shape[-1])
            grad.index_put_((row_N, target_ids_N), grad_target_N * inside_N, accumulate=True)
            part.copy_(grad if slope is None else grad.add_(slope))
            start += len(part)
        return logits_RV, None, None, None, None


def _entropy(probabilities_RV: Tensor) -> Tensor:
    """(R,) entropies, nats."""
    return torch.special.entr(probabilities_RV).sum(dim=-1)


def _chunk_rows(logits_RV: Tensor) -> int:
    """Rows that are worked on at a time."""
    return max(1, (_CPU_CHUNK if logits_RV.device.type == "cpu" else _CHUNK) // logits_RV.shape[-1])


def logprobs_from_logits(
    logits_RV: Tensor,
    index_N: Tensor,
    target_ids_N: Tensor,
    *,
    mean: bool = False,
    entropy: bool = False,
    log_sum_squares: bool = False,
    temperature: float = 1.0,
    undefined_U: Tensor | None = None,
) -> TokenLogprobs:
    """Log-probabilities of targets, in float32 (of float64 logits in float64); options as of `LogprobOptions`.

    `logits_RV` are consumed: they are divided by the temperature in place, and the backward pass writes their gradient
    over them. Row `index_N` of them predicts target n; rows may repeat.
    """
    if undefined_U is not None:
        logits_RV = logits_RV.index_fill_(-1, undefined_U.to(logits_RV.device), -torch.inf)
    if temperature != 1.0:
        logits_RV = logits_RV.div_(temperature)
    squares_N = None
    if log_sum_squares:
        parts = [at_least_float32(part) for part in logits_RV.detach().split(_chunk_rows(logits_RV))]
        squares_N = torch.cat([(2 * part).logsumexp(-1) - 2 * part.logsumexp(-1) for part in parts])[index_N]
    if not logits_RV.requires_grad:  # no gradient: nothing to save
        logprobs_RV = at_least_float32(logits_RV).log_softmax(dim=-1)
        mean_N, entropy_N = logprobs_RV.mean(dim=-1)[index_N] if mean else None, None
        if entropy:
            parts = logprobs_RV.split(_chunk_rows(logprobs_RV))
            entropy_N = torch.cat([_entropy(part.exp()) for part in parts])[index_N]
        return TokenLogprobs(logprobs_RV[index_N, target_ids_N], mean_N, entropy_N, log_sum_squares_N=squares_N)
    target_N, mean_N, entropy_N = _GatherLogprobs.apply(logits_RV, index_N, target_ids_N, mean, entropy)
    return TokenLogprobs(target_N, mean_N, entropy_N, log_sum_squares_N=squares_N)


def head_logprobs(
    hidden_RC: Tensor,
    head: nn.Module,
    index_N: Tensor,
    target_ids_N: Tensor,
    *,
    max_logits: int = MAX_LOGITS,
    **options: Unpack[LogprobOptions],
) -> TokenLogprobs:
    """`logprobs_from_logits` of `head(hidden)`; beyond `max_logits` entries, chunk by chunk with recomputation."""

    def run(hidden: Tensor, index: Tensor, targets: Tensor) -> TokenLogprobs:
        return logprobs_from_logits(head(hidden), index, targets, **options)

    rows, vocabulary = hidden_RC.shape[0], cast(Tensor, head.weight).shape[0]
    if rows * vocabulary <= max_logits:
        return run(hidden_RC, index_N, target_ids_N)
    size = max(1, max_logits // vocabulary)
    parts = []
    # By targets, whose number the host knows; few of them share a row of the head.
    for hidden_NC, targets_N in zip(hidden_RC[index_N].split(size), target_ids_N.split(size), strict=True):
        inputs = (hidden_NC, torch.arange(len(targets_N), device=targets_N.device), targets_N)
        parts.append(checkpoint(run, *inputs, use_reentrant=False) if torch.is_grad_enabled() else run(*inputs))
    joined: list[Any] = [None if pieces[0] is None else torch.cat(pieces) for pieces in zip(*parts, strict=True)]
    return TokenLogprobs(*joined)


def head_scores(hidden_RC: Tensor, head: nn.Module) -> Tensor:
    """(R,) float32 scores of hidden states, computed in the head's own number format, also under autocast."""
    with torch.autocast(hidden_RC.device.type, enabled=False):
        return head(hidden_RC.to(next(head.parameters()).dtype)).squeeze(-1).float()


@contextmanager
def last_block_at_tails(backbone: nn.Module, layout: Any) -> Iterator[None]:
    """Compute the last block of a packed row at its tails only; the backbone returns the tails' hidden states.

    The tails need the keys and values of all tokens, and nothing else of the other tokens. The order of norms,
    projections and sums is known to the model's code alone, so that code runs twice:

    1. with all tokens up to the keys and values, without queries;
    2. with the tails to the end, without keys and values, which are those of the first pass.

    GPT-2 and others expect as many positions as they were given: they get zeros for the other tokens.

    Nothing changes where the tails are nearly the whole row, for a model whose last block is of another kind or has
    several hidden states of a token, and under gradient checkpointing, which computes the block again after this has
    ended.
    """
    block, few = _last_block(backbone), 8 * len(layout.tail_index) <= 7 * layout.num_tokens
    if block is None or not few or getattr(backbone, "is_activation_checkpointing", False):
        yield
        return
    own_forward, fills_row = block.forward, hasattr(backbone, "h")

    def forward(*args: Any, **kwargs: Any) -> Any:
        if args[0].dim() != 3:  # several hidden states of each token, the first dimension (Gemma 3n)
            return own_forward(*args, **kwargs)
        kwargs["layout"] = TailQueries(layout)
        with _zeros_from(block, "q_proj"), suppress(KeysStored):
            own_forward(*args, **kwargs)
        args, kwargs = at_tails((args, kwargs), layout)
        with _zeros_from(block, "k_proj", "v_proj"):
            output = own_forward(*args, **kwargs)
        if not fills_row:
            return output
        row = output.new_zeros(1, layout.num_tokens, output.shape[-1])
        return row.index_copy(1, layout.tail_index, output)

    block.forward = forward
    try:
        yield
    finally:
        del block.forward


def _last_block(backbone: nn.Module) -> nn.Module | None:
    """The last block, if it has a dense MLP; None for other kinds (experts, a block that holds its layers itself)."""
    blocks = getattr(backbone, "layers", None) or getattr(backbone, "h", None)
    block = blocks[-1] if isinstance(blocks, nn.ModuleList) else None
    mlp = getattr(block, "mlp", None)
    return block if type(mlp).__name__.endswith("MLP") and not hasattr(mlp, "experts") else None


@contextmanager
def _zeros_from(block: nn.Module, *names: str) -> Iterator[None]:
    """Let the linear layers of these names return zeros, which nobody reads, unless others have hooks on them."""
    linear = [m for name, m in block.named_modules() if name.rpartition(".")[2] in names and hasattr(m, "out_features")]
    linear = [m for m in linear if not m._forward_hooks and not m._forward_pre_hooks]
    for module in linear:
        module.forward = lambda x, size=module.out_features: x.new_zeros(()).expand(*x.shape[:-1], size)
    try:
        yield
    finally:
        for module in linear:
            del module.forward


def at_tails(value: Any, layout: Any) -> Any:
    """The part of a block's arguments that belongs to the tails: of tensors (1, T, ...), also in tuples and dicts."""
    if isinstance(value, Tensor) and value.shape[:2] == (1, layout.num_tokens):
        return value.index_select(1, layout.tail_index)
    if isinstance(value, dict):
        return {name: at_tails(one, layout) for name, one in value.items()}
    if type(value) in (tuple, list):
        return tuple(at_tails(one, layout) for one in value)
    return value
