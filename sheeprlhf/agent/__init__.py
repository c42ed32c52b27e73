"""Policy, reward model, critic and reference: models and their forward passes."""
