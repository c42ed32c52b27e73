"""RMS norms that keep less for the backward pass than those of transformers, which they replace in a loaded model.

Letters: T positions, C hidden width.
"""

import copy
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sheeprlhf.model.lm_head import at_least_float32

_CHUNK = 1 << 18  # numbers that are worked on at a time


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
        return _RMSNorm.apply(hidden, self.weight, self.eps, self._dtype(hidden))

    def forward_fused(self, hidden: Tensor) -> Tensor:
        """By torch's own function, which is one kernel on a GPU."""
        output = F.rms_norm(at_least_float32(hidden), self.weight.shape, at_least_float32(self.weight), self.eps)
        return output.to(self._dtype(hidden))

    def _dtype(self, hidden: Tensor) -> torch.dtype:
        device = hidden.device.type
        autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        if autocast and hidden.dtype == torch.float32:
            return torch.get_autocast_dtype(device)
        return torch.promote_types(hidden.dtype, self.weight.dtype)


class _RMSNorm(torch.autograd.Function):
    """Its output is no view: a change in place of a view would drop a hook of FSDP."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight_C: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        x_TC, output = hidden.flatten(0, -2), hidden.new_empty(hidden.shape, dtype=dtype)
        scale_T1 = torch.empty_like(at_least_float32(x_TC[:, :1]))
        for x, scale, normed in _chunks(x_TC, scale_T1, output.flatten(0, -2)):
            torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=scale.dtype, out=scale)
            scale.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
            torch.mul(x * scale, weight_C, out=normed)
        ctx.save_for_backward(x_TC, weight_C, scale_T1)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        x_TC, weight_C, scale_T1 = ctx.saved_tensors
        grad_x = grads[0].new_empty(grads[0].shape, dtype=x_TC.dtype)
        grad_weight_C = torch.zeros_like(at_least_float32(weight_C)) if ctx.needs_input_grad[1] else None
        parts = _chunks(x_TC, scale_T1, grads[0].flatten(0, -2), grad_x.flatten(0, -2))
        for x, scale, grad, grad_of_x in parts:
            normed, grad = x * scale, at_least_float32(grad)
            if grad_weight_C is not None:
                grad_weight_C += (grad * normed).sum(dim=0)
            grad = grad * weight_C
            mean = (grad * normed).mean(dim=-1, keepdim=True)
            torch.mul(grad.addcmul_(normed, mean, value=-1), scale, out=grad_of_x)
        return grad_x, None if grad_weight_C is None else grad_weight_C.to(weight_C.dtype), None, None


def _chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Some rows of each tensor at a time."""
    size = max(1, _CHUNK // tensors[0].shape[-1])
    return zip(*(tensor.split(size) for tensor in tensors), strict=True)
