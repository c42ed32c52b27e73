"""The frozen reference of a policy that moves: a copy of its weights, or the policy with its adapters off."""

import copy

from peft import PeftModel
from torch import nn

from sheeprlhf.agent.policy import Policy
from sheeprlhf.data.example import Batch
from sheeprlhf.model.lm_head import TokenLogprobs
from sheeprlhf.model.lora import adapters_off


class AdaptersOff(nn.Module):
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


def reference_of(policy: Policy) -> Policy | AdaptersOff:
    """The policy as it is now, for later, when it has moved; before training and before a checkpoint is restored."""
    if isinstance(policy.model, PeftModel):
        return AdaptersOff(policy)
    reference = copy.deepcopy(policy).eval()
    reference.requires_grad_(False)
    return reference
