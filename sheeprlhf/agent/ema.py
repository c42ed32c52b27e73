"""The average of a policy over its last optimizer steps (InstructGPT, arXiv 2203.02155, appendix C)."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sheeprlhf.agent.policy import Policy
from sheeprlhf.engine.tensors import saved_tensors


class Average(nn.Module):
    """An exponential moving average of what trains of a policy: average <- decay * average + (1 - decay) * weight.

    It begins as the policy. Its weights have the policy's names, so that a checkpoint's load into a policy.

    Args:
        policy: its model trains; what does not is not held a second time. Made inside `policy.in_use()`.
        decay: between 0 and 1.
    """

    def __init__(self, policy: Policy, decay: float) -> None:
        super().__init__()
        self._decay = decay
        self._mine: list[Tensor] = []
        self._theirs: list[Tensor] = []  # a list: these weights are not this module's
        for name, tensor in saved_tensors(policy.model).items():
            *path, leaf = f"model.{name}".split(".")
            module: nn.Module = self
            for part in path:
                if not hasattr(module, part):
                    module.add_module(part, nn.Module())
                module = getattr(module, part)
            module.register_buffer(leaf, tensor.detach().clone())
            if tensor.is_floating_point():
                self._mine.append(getattr(module, leaf))
                self._theirs.append(tensor)

    @torch.no_grad()
    def follow(self) -> None:
        """After an optimizer step."""
        torch._foreach_lerp_(self._mine, self._theirs, 1.0 - self._decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the policy has the average's weights."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for mine, theirs in zip(self._mine, self._theirs, strict=True):
            kept = theirs.clone()
            theirs.copy_(mine)
            mine.copy_(kept)
