"""What is advised when memory is short: options that exist, values that need less, and an end."""

from dataclasses import replace

import pytest

from sheeprlhf.config.memory_advice import advice, memory_reductions, words
from sheeprlhf.config.registry import replace_options
from sheeprlhf.config.validate import validate
from sheeprlhf.structure.data import LocalDataConfig
from sheeprlhf.structure.model import ModelConfig, TinyConfig
from sheeprlhf.structure.reward import AutoRewardConfig
from sheeprlhf.structure.rollout import GRPOConfig, LocalRolloutConfig, PPOConfig
from sheeprlhf.structure.run import AdamWConfig, FabricConfig, GenConfig, TrainConfig
from sheeprlhf.structure.task import ILQLConfig, SFTConfig


def config(model: ModelConfig | None = None, **task: int) -> TrainConfig:
    return TrainConfig(
        task=SFTConfig(**task),
        model=model or TinyConfig(),
        data=LocalDataConfig(train_file=__file__.replace(".py", ".jsonl"), max_length=100, max_prompt_length=90),
        fabric=FabricConfig(),
        optim=AdamWConfig(),
        reward=AutoRewardConfig(),
        rollout=LocalRolloutConfig(),
    )


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        ({"token_budget": 2048}, {"task.token_budget": 1024}),
        ({"token_budget": 201}, {"task.token_budget": 100}),  # one row is the least
        ({"micro_batch_size": 3}, {"task.micro_batch_size": 1}),  # the budget would take 20 rows
        ({"mini_batch_size": 4}, {"task.token_budget": 200}),  # half of the budget would take all 4 rows
    ],
)
def test_the_option_that_limits_a_forward_pass_is_halved(task: dict[str, int], expected: dict[str, int]) -> None:
    assert memory_reductions(config(**task))[0] == expected


def test_the_rows_of_a_pass_are_those_of_one_process() -> None:
    """Of eight rows on four processes, each has two; on eight processes one, so that only shorter rows help."""
    several = replace(config(mini_batch_size=8), fabric=FabricConfig(devices="4"))
    assert memory_reductions(several)[0] == {"task.token_budget": 100}
    single = replace(several, fabric=FabricConfig(devices="4", num_nodes=2))
    assert not any("task." in words(change) for change in memory_reductions(single))
    assert {"data.max_length": 50, "data.max_prompt_length": 37} in memory_reductions(single)


def test_a_single_row_gets_shorter() -> None:
    changes = memory_reductions(config(token_budget=50))
    assert not any("task." in words(change) for change in changes)
    assert {"data.max_length": 50, "data.max_prompt_length": 37} in changes  # a prompt leaves room for a response


def test_following_the_advice_comes_to_an_end_and_stays_valid() -> None:
    now, seen = config(), []
    while changes := memory_reductions(now):
        now = replace_options(now, changes[0])
        seen.append(words(changes[0]))
        assert [problem for problem in validate(now) if "data.train_file" not in problem] == []
    assert {"model.gradient_checkpointing=true", "fabric.precision=bf16-mixed", "model.finetune_mode=LORA"} <= {*seen}
    assert (now.task.token_budget, now.data.max_length) == (64, 50)
    last = list(advice(now, "forward pass", None))
    assert len(last) == 1 and "=" not in last[0]  # no option is left


def test_each_phase_has_its_own_options() -> None:
    assert memory_reductions(config(), "loading the model") == [
        {"model.finetune_mode": "LORA", "model.dtype": "bfloat16"}
    ]
    assert memory_reductions(config(), "optimizer step") == [{"model.finetune_mode": "LORA"}]
    adapters = config(TinyConfig(finetune_mode="LORA"))
    assert {"model.lora_cfg.rank": 8} in memory_reductions(adapters, "optimizer step")
    beams = replace(config(), generation=GenConfig(num_beams=4, max_new_tokens=9))
    assert memory_reductions(beams, "generation")[:2] == [{"generation.num_beams": 2}, {"generation.max_new_tokens": 4}]


def test_no_advice_contradicts_another_option() -> None:
    frozen = config(TinyConfig(frozen_layers=2))
    ilql = replace(config(), task=ILQLConfig())
    average = replace(config(TinyConfig(finetune_mode="LORA")), task=PPOConfig(ema_decay=0.9))
    for given, rejected in ((frozen, "finetune_mode"), (ilql, "finetune_mode"), (average, "model.dtype")):
        for phase in ("loading the model", "forward pass", "optimizer step"):
            assert not any(rejected in words(change) for change in memory_reductions(given, phase)), rejected
    online = replace(config(), task=GRPOConfig(), reward=AutoRewardConfig(overlong_buffer=20))
    online = replace(online, generation=GenConfig(max_new_tokens=30))
    assert {"generation.max_new_tokens": 15, "reward.overlong_buffer": 15} in memory_reductions(online, "generation")


def test_a_run_goes_on_or_starts_anew() -> None:
    first, second = advice(config(), "backward pass", "logs/run")
    assert "resume_from=logs/run " in first and "task.token_budget=1024, model.gradient_checkpointing=true" in first
    assert "fabric.precision=bf16-mixed, model.finetune_mode=LORA" in second and "resume" not in second
    resumed, _ = advice(replace(config(), resume=True), "backward pass", "logs/run")
    assert "resume=true " in resumed and "resume_from" not in resumed
    (only,) = advice(config(), "backward pass", None)
    assert "task.token_budget=1024" in only and "resume" not in only
