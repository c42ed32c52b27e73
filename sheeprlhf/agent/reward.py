"""The reward model: a score after each token that a batch asks for.

Letters: N tokens that are scored.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sheeprlhf.agent.policy import hidden_at_head, load_policy
from sheeprlhf.data.example import Batch
from sheeprlhf.model.lora import add_lora, save_lora
from sheeprlhf.model.scalar import HEAD, head_scores, padding_token, scalar_model
from sheeprlhf.structure.model import ModelConfig
from sheeprlhf.utils.memory import phase

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


@phase("loading the model")
def load_reward_model(
    cfg: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    longest: int,
    batching: str,
    say: Callable[[str], None] = lambda _: None,
) -> tuple[RewardModel, bool]:
    """The language model of `cfg` with a new score head, and adapters if asked, and whether its batches are packed.

    Raises:
        ModelError: as `load_policy` does, or the model cannot have a score head.
    """
    whole = dataclasses.replace(cfg, finetune_mode="ALL", freeze_transformer=False)
    policy, packed = load_policy(whole, tokenizer, longest=longest, batching=batching, say=say)
    model = scalar_model(policy.causal_lm(), tokenizer)
    if cfg.freeze_transformer:
        model.requires_grad_(False)
        getattr(model, HEAD).requires_grad_(True)
    if cfg.finetune_mode == "LORA" and cfg.lora_cfg is not None:
        return RewardModel(add_lora(model, cfg.lora_cfg, head=HEAD)), packed
    return RewardModel(model), packed
