"""How a task's rows and its kind of model enter the memory plan."""

from collections.abc import Callable
from pathlib import Path

from sheeprlhf.model.memory import measure
from sheeprlhf.structure.data import LocalDataConfig
from sheeprlhf.structure.fabric import FabricConfig
from sheeprlhf.structure.model import AutoModelConfig
from sheeprlhf.structure.optim import AdamWConfig
from sheeprlhf.structure.reward import FunctionRewardConfig, ModelRewardConfig
from sheeprlhf.structure.rollout import GRPOConfig, PPOConfig
from sheeprlhf.structure.run import TrainConfig
from sheeprlhf.structure.task import DPOConfig, RMConfig, SFTConfig
from sheeprlhf.task.memory_plan import rows_of_forward, step_plan


def test_a_pair_is_one_row_of_both_responses(model_folder: Callable[..., Path]) -> None:
    model = AutoModelConfig(repo_name=str(model_folder()))
    data = LocalDataConfig(train_file="rows.jsonl", max_length=100)
    plans = {}
    for task in (SFTConfig(), RMConfig(), DPOConfig()):
        cfg = TrainConfig(task=task, model=model, data=data, fabric=FabricConfig(), optim=AdamWConfig())
        plans[task.config_name] = step_plan(cfg, device="cuda"), rows_of_forward(cfg, measure(model, "32-true"))
    assert [rows for _, rows in plans.values()] == [(20, 100), (10, 200), (10, 200)]
    sft, rm, dpo = (parts for parts, _ in plans.values())
    assert dpo == sft  # no second model, and as many tokens
    assert rm.logits == 0 < dpo.logits
    assert rm.activations == dpo.activations


def test_the_models_of_ppo_are_counted(model_folder: Callable[..., Path]) -> None:
    """All weights: reference, reward model and critic besides the policy. With adapters: only more adapters."""
    data = LocalDataConfig(train_file="rows.jsonl", max_length=100)
    for mode in ("ALL", "LORA"):
        model = AutoModelConfig(repo_name=str(model_folder()), finetune_mode=mode)
        size = measure(model, "32-true")
        for task, others in ((SFTConfig(), 0), (GRPOConfig(), 1), (PPOConfig(), 2)):
            for reward in (FunctionRewardConfig(), ModelRewardConfig()):
                cfg = TrainConfig(
                    task=task, model=model, data=data, fabric=FabricConfig(), optim=AdamWConfig(), reward=reward
                )
                parts = step_plan(cfg, device="cuda")
                scored = isinstance(reward, ModelRewardConfig) and others > 0
                moments = parts.optimizer if others == 2 else 0
                one = size.weights if mode == "ALL" else size.trainable
                models = others + scored if mode == "ALL" else max(0, others - 1) + scored
                assert parts.others == models * one + moments
                assert parts.total() == sum(parts)
