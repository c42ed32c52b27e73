"""Pure tensor functions: one per published loss."""

from sheeprlhf.loss import advantage, dpo, ppo, reward, sft

__all__ = ["advantage", "dpo", "ppo", "reward", "sft"]
