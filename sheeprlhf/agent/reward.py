"""The reward model: from a batch to a score after each of the tokens that it asks for."""

from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from sheeprlhf.data.example import Batch
from sheeprlhf.model.attention import placeholder_mask
from sheeprlhf.model.load import hidden_states
from sheeprlhf.model.scalar import HEAD, head_scores
from sheeprlhf.model.trim import last_mlp_at


class RewardModel(nn.Module):
    """A model with a score head, whole or with adapters.

    Args:
        model: a classification model with one label, or a PEFT model around it.
    """

    def __init__(self, model: PreTrainedModel | PeftModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> Tensor:
        """(N,) float32 scores of a batch made with `targets="scores"` or `"last"`."""
        model = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        backbone = getattr(model, model.base_model_prefix)
        if batch.layout is None:
            hidden_BTC = hidden_states(
                backbone,
                input_ids=batch.input_ids_BT,
                attention_mask=batch.attention_mask_BT,
                position_ids=batch.position_ids_BT,
            )
        else:
            with last_mlp_at(backbone, batch.head_positions_R, batch.input_ids_BT.shape[1]):
                hidden_BTC = hidden_states(
                    backbone,
                    input_ids=batch.input_ids_BT,
                    attention_mask=placeholder_mask(batch.input_ids_BT),
                    position_ids=batch.position_ids_BT,
                    layout=batch.layout,
                )
        hidden_RC = hidden_BTC.flatten(0, 1).index_select(0, batch.head_positions_R)
        return head_scores(hidden_RC, getattr(model, HEAD))[batch.logit_index_N]
