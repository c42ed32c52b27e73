"""Critic and reward model as adapters of the policy's own base: several models in the memory of one."""

from contextlib import AbstractContextManager
from typing import cast

from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from sheeprlhf.agent.policy import hidden_at_head
from sheeprlhf.data.example import Batch
from sheeprlhf.model.load import backbone_and_head
from sheeprlhf.model.lora import adapter_in_use
from sheeprlhf.model.scalar import head_scores


class SharedScore(nn.Module):
    """A score head on one adapter of a model that others use too. Call it inside `in_use()`.

    Args:
        model: the model with all its adapters.
        adapter: the name of this one's.
        head: (C -> 1) its own.
        offset: what is subtracted from the head's score.
    """

    def __init__(self, model: PeftModel, adapter: str, head: nn.Linear, offset: float = 0.0) -> None:
        super().__init__()
        self.model, self.adapter, self.head, self.offset = model, adapter, head, offset

    def in_use(self) -> AbstractContextManager[None]:
        """Inside, the model computes with this adapter, and it and the head alone can get gradients."""
        return adapter_in_use(self.model, self.adapter)

    def forward(self, batch: Batch) -> Tensor:
        """As `RewardModel.forward`: (N,) float32 scores at the targets of a batch."""
        backbone, _ = backbone_and_head(cast(PreTrainedModel, self.model.get_base_model()))
        return head_scores(hidden_at_head(backbone, batch), self.head)[batch.logit_index_N] - self.offset
