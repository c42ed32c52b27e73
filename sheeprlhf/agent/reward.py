"""The reward model: a score after each token that a batch asks for.

Letters: N tokens that are scored.
"""

from pathlib import Path

from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sheeprlhf.agent.policy import Policy, hidden_at_head
from sheeprlhf.data.example import Batch
from sheeprlhf.model.lora import add_lora, save_lora
from sheeprlhf.model.scalar import HEAD, head_scores, padding_token, scalar_model
from sheeprlhf.structure.model import ModelConfig

OFFSET = "reward_offset"  # in config.json: subtracted from the head's score


class RewardModel(nn.Module):
    """A language model with a score head, whole or with adapters.

    Args:
        model: a classification model with one label, or a PEFT model around it.
    """

    def __init__(self, model: PreTrainedModel | PeftModel) -> None:
        super().__init__()
        self.model = model

    def classifier(self) -> PreTrainedModel:
        """The Hugging Face model; with adapters, the one that they sit in."""
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    def forward(self, batch: Batch) -> Tensor:
        """(N,) float32 scores at the targets of a batch made with `targets="scores"` or "last"."""
        model = self.classifier()
        hidden_RC = hidden_at_head(getattr(model, model.base_model_prefix), batch)
        return head_scores(hidden_RC, getattr(model, HEAD))[batch.logit_index_N]

    def save(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        """Write what `AutoModelForSequenceClassification` loads, or PEFT on it: model or adapters, and the tokenizer."""
        tokenizer.pad_token = padding_token(tokenizer)
        if isinstance(self.model, PeftModel):
            save_lora(self.model, folder)
            self.classifier().config.save_pretrained(folder)
        else:
            self.model.save_pretrained(str(folder))
        tokenizer.save_pretrained(folder)


def reward_model_of(policy: Policy, cfg: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> RewardModel:
    """The language model with a new score head instead of its own, and adapters if asked.

    Args:
        policy: the whole language model; its backbone is used, not copied.
        cfg: says what trains.
        tokenizer: the model's.

    Raises:
        ModelError: the model cannot have a score head.
    """
    model = scalar_model(policy.causal_lm(), tokenizer)
    if cfg.freeze_transformer:
        model.requires_grad_(False)
        getattr(model, HEAD).requires_grad_(True)
    if cfg.finetune_mode == "LORA" and cfg.lora_cfg is not None:
        return RewardModel(add_lora(model, cfg.lora_cfg, head=HEAD))
    return RewardModel(model)
