"""Other versions of a policy that trains: its frozen reference, and the average over its last steps."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel
from torch import Tensor, nn

from sheeprlhf.agent.policy import Policy
from sheeprlhf.data.example import Batch
from sheeprlhf.engine.tensors import saved_tensors
from sheeprlhf.model.lm_head import TokenLogprobs
from sheeprlhf.model.lora import adapters_off


class BaseModelReference(nn.Module):
    """Reference of a policy with adapters: the base model without them; holds no weights of its own.

    Args:
        policy: a policy with adapters.
    """

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self._policy = (policy,)  # hidden from torch: its weights are not this module's

    def forward(self, batch: Batch, temperature: float = 1.0) -> TokenLogprobs:
        """As `Policy.forward`; also after an error the adapters are on again."""
        [policy] = self._policy
        assert isinstance(policy.model, PeftModel)
        with adapters_off(policy.model):
            return policy(batch, temperature=temperature)


def reference_of(policy: Policy) -> Policy | BaseModelReference:
    """The policy as it is now, for later, when it has moved; before training and before a checkpoint is restored."""
    if isinstance(policy.model, PeftModel):
        return BaseModelReference(policy)
    reference = copy.deepcopy(policy).eval()
    reference.requires_grad_(False)
    return reference


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
