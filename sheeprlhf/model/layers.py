"""Layers of a loaded model that are replaced by faster or exact ones with the same weights.

- Rotary embeddings whose frequencies depend on the length of a row ("longrope": Phi-3). Rows up to the length of the
  original pretraining have one set of frequencies, longer ones another. transformers chooses by the longest row of a
  batch; here each row has those that it has alone. Packed rows that share a prompt, and rows that grow past that length
  on a cache of keys, cannot have them. "dynamic" embeddings change beyond `max_position_embeddings`
  tokens, which no row may have.
- RMS norm (Zhang and Sennrich, 2019) in one pass over memory.
- The last block's MLP, computed only at the positions where the language head runs.

Letters: B rows, T positions, C hidden width, R positions where the head runs.
"""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_KIND = "longrope"


def use_frequencies_of_rows(model: nn.Module) -> None:
    """Give each row of a batch its own frequencies, in every module of the model that chooses by the longest."""
    for module in model.modules():
        if any(True for _ in _switch_lengths(module)):
            module.__class__ = _by_row(type(module))  # type: ignore[arg-type]


def switch_length(model: nn.Module) -> int | None:
    """Tokens beyond which a row has other frequencies; None for a model whose frequencies are the same for all rows."""
    return min((length for module in model.modules() for length in _switch_lengths(module)), default=None)


def outgrows_cache(model: nn.Module, lengths: Iterable[int], num_new: int) -> bool:
    """True if a growing row would get other frequencies than those with which its cached keys were computed.

    Args:
        model: a language model.
        lengths: of the prompts, in tokens.
        num_new: most new tokens of each.
    """
    switch = switch_length(model)
    return switch is not None and any(length <= switch < length + num_new for length in lengths)


def _switch_lengths(module: nn.Module) -> Iterator[int]:
    """Of one module; of several kinds of layers, each with a length of its own."""
    kinds, config = getattr(module, "rope_type", None), getattr(module, "config", None)
    parameters = getattr(config, "rope_parameters", None)
    if kinds == _KIND and isinstance(parameters, dict):
        yield int(parameters["original_max_position_embeddings"])
    elif isinstance(kinds, dict) and isinstance(parameters, dict):
        for layer_type, kind in kinds.items():
            if kind == _KIND:
                yield int(parameters[layer_type]["original_max_position_embeddings"])


@cache
def _by_row(original: type[nn.Module]) -> type[nn.Module]:
    """A class of rotary embeddings that computes short and long rows of a batch apart."""

    class ByRow(original):  # type: ignore[valid-type, misc]
        def forward(self, x: Tensor, position_ids: Tensor, *more: Any, **named: Any) -> tuple[Tensor, Tensor]:
            if len(position_ids) == 1 or position_ids.device.type == "meta":
                return super().forward(x, position_ids, *more, **named)
            is_long_B = position_ids.amax(dim=-1) + 1 > min(_switch_lengths(self))
            found: list[Tensor] = []
            for rows_B in (is_long_B, ~is_long_B):
                if not rows_B.any():
                    continue
                part = super().forward(x, position_ids[rows_B], *more, **named)
                found = found or [one.new_empty(*position_ids.shape, one.shape[-1]) for one in part]
                for whole_BTC, one in zip(found, part, strict=True):
                    whole_BTC[rows_B] = one
            return found[0], found[1]

    ByRow.__name__ = original.__name__
    return ByRow


_CHUNK = 1 << 18  # numbers that are worked on at a time


class RMSNorm(nn.Module):
    """weight * x / sqrt(mean(x**2) + eps), computed in float32.

    Under autocast a float32 input gives what the linear layers behind it would cast it to: they share one copy.

    Args:
        weight: (C,) gains; the parameter itself, not a copy.
        eps: added to the mean square.
    """

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight = weight
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        """Normalise the last dimension."""
        if hidden.device.type != "cpu":
            return self.forward_fused(hidden)
        output_TC = _RMSNorm.apply(hidden.flatten(0, -2), self.weight, self.eps, self._dtype(hidden))
        return output_TC.view_as(hidden)

    def forward_fused(self, hidden: Tensor) -> Tensor:
        """By torch's own function, which is one kernel on a GPU."""
        output = F.rms_norm(_wide(hidden), self.weight.shape, _wide(self.weight), self.eps)
        return output.to(self._dtype(hidden))

    def _dtype(self, hidden: Tensor) -> torch.dtype:
        device = hidden.device.type
        autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        if autocast and hidden.dtype == torch.float32:
            return torch.get_autocast_dtype(device)
        return torch.promote_types(hidden.dtype, self.weight.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TC: Tensor, weight_C: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        output_TC = torch.empty_like(x_TC, dtype=dtype)
        scale_T1 = torch.empty_like(_wide(x_TC[:, :1]))
        for x, scale, output in _chunks(x_TC, scale_T1, output_TC):
            torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=scale.dtype, out=scale)
            scale.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
            torch.mul(x * scale, weight_C, out=output)
        ctx.save_for_backward(x_TC, weight_C, scale_T1)
        return output_TC

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        x_TC, weight_C, scale_T1 = ctx.saved_tensors
        grad_x_TC = torch.empty_like(x_TC)
        grad_weight_C = torch.zeros_like(_wide(weight_C)) if ctx.needs_input_grad[1] else None
        for x, scale, grad, grad_x in _chunks(x_TC, scale_T1, grads[0], grad_x_TC):
            normed, grad = x * scale, _wide(grad)
            if grad_weight_C is not None:
                grad_weight_C += (grad * normed).sum(dim=0)
            grad = grad * weight_C
            mean = (grad * normed).mean(dim=-1, keepdim=True)
            torch.mul(grad.addcmul_(normed, mean, value=-1), scale, out=grad_x)
        return grad_x_TC, None if grad_weight_C is None else grad_weight_C.to(weight_C.dtype), None, None


def _chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Some rows of each tensor at a time."""
    size = max(1, _CHUNK // tensors[0].shape[-1])
    return zip(*(tensor.split(size) for tensor in tensors), strict=True)


def _wide(x: Tensor) -> Tensor:
    """In float32; float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def replace_rms_norms(model: nn.Module) -> None:
    """Put `RMSNorm` in the place of every norm of `model` that computes the same; its parameter stays the same object.

    Some models' RMS norms are defined otherwise (Gemma's gain is 1 + weight): those are found out and left alone.
    """
    for parent in list(model.modules()):
        children: dict[str, Any] = dict(parent.named_children())
        for name, norm in children.items():
            if type(norm).__name__.endswith("RMSNorm") and hasattr(norm, "variance_epsilon"):
                ours = RMSNorm(norm.weight, norm.variance_epsilon)
                if torch.allclose(_output(ours), _output(norm), rtol=1e-5, atol=1e-6):
                    setattr(parent, name, ours)


@torch.no_grad()
def _output(norm: nn.Module) -> Tensor:
    """Output of a norm for fixed inputs and gains: a model made on "meta" has no weights to compare."""
    probe: Any = copy.deepcopy(norm).to_empty(device="cpu").float()
    numbers = torch.linspace(-2, 2, probe.weight.numel(), device="cpu")
    probe.weight.copy_(numbers.flip(0))
    return probe(numbers[None])


@contextmanager
def sparse_last_mlp(backbone: nn.Module, positions_R: Tensor, num_positions: int) -> Iterator[None]:
    """Compute the last block's MLP only at these positions; its outputs elsewhere are zero.

    Nothing changes for a model whose last MLP is not found, and under gradient checkpointing, which computes the block
    again after this has ended.

    Args:
        backbone: the model without its head.
        positions_R: (R,) places of the packed row.
        num_positions: T, its length.
    """
    mlp = _last_mlp(backbone)
    if mlp is None or getattr(backbone, "is_activation_checkpointing", False):
        yield
        return

    def pick(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden_1TC, *others = inputs
        return hidden_1TC.index_select(1, positions_R), *others

    def spread(_: nn.Module, inputs: tuple[Any, ...], output_1RC: Tensor) -> Tensor:
        return output_1RC.new_zeros(1, num_positions, output_1RC.shape[-1]).index_copy(1, positions_R, output_1RC)

    hooks = [mlp.register_forward_pre_hook(pick), mlp.register_forward_hook(spread)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _last_mlp(backbone: nn.Module) -> nn.Module | None:
    """The dense MLP of the last block; None for other kinds (experts, a block that holds its layers itself)."""
    blocks = getattr(backbone, "layers", None) or getattr(backbone, "h", None)
    mlp = getattr(blocks[-1], "mlp", None) if isinstance(blocks, nn.ModuleList) else None
    return mlp if type(mlp).__name__.endswith("MLP") and not hasattr(mlp, "experts") else None
