"""The average of a policy over its last optimizer steps (InstructGPT, arXiv 2203.02155, appendix C)."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sheeprlhf.agent.policy import Policy
from sheeprlhf.engine.tensors import saved_tensors


class EMA(nn.Module):
    """Exponential moving average of the trained weights: average <- decay * average + (1 - decay) * weight.

    It starts as a copy of the policy. Its weights have the policy's names, so that a checkpoint's load into a policy.

    Args:
        policy: only its trained weights are held a second time. Made inside `policy.in_use()`.
        decay: between 0 and 1.
    """

    def __init__(self, policy: Policy, decay: float) -> None:
        super().__init__()
        self._decay = decay
        self._averages: list[Tensor] = []
        self._weights: list[Tensor] = []  # a list: these weights are not this module's
        for name, tensor in saved_tensors(policy.model).items():
            *path, leaf = f"model.{name}".split(".")
            module: nn.Module = self
            for part in path:
                if not hasattr(module, part):
                    module.add_module(part, nn.Module())
                module = getattr(module, part)
            module.register_buffer(leaf, tensor.detach().clone())
            if tensor.is_floating_point():
                self._averages.append(getattr(module, leaf))
                self._weights.append(tensor)

    @torch.no_grad()
    def update(self) -> None:
        """Add the weights after an optimizer step."""
        torch._foreach_lerp_(self._averages, self._weights, 1.0 - self._decay)

    @contextmanager
    def swap_in(self) -> Iterator[None]:
        """Give the policy the averaged weights within the block."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for average, weight in zip(self._averages, self._weights, strict=True):
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)
