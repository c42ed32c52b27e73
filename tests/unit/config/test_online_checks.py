"""What an online task refuses before anything loads, and what other tasks refuse of its options."""

from pathlib import Path

import pytest

from sheeprlhf.config.run_lookup import REWARD_MODEL, START, links_of, resolve_runs
from sheeprlhf.config.validate import validate
from sheeprlhf.structure.rollout import PPOConfig
from tests.unit.config.test_registry import composed, to_typed

REFUSED = {
    "task=ppo generation.stop_strings=['']": "generation.stop_strings has an empty text",
    "task=sft generation.engine=hf": "is not read by task=sft",
    "task=grpo reward.short_penalty=2": "reward.short_penalty=2 is not read with reward.min_response_length=0",
    "task=grpo reward.short_penalty=0": "reward.short_penalty=0",
    "task=grpo reward.short_penalty=0 reward.min_response_length=2": "reward.short_penalty=1",
    "task=grpo rollout.max_turns=3": "rollout.environment",
    "task=grpo rollout=vllm rollout.urls=[http://a] rollout.sync=nccl rollout.sync_dir=/x": "folder or adapter",
    "task=ppo task.num_generations=3": "task.rollout_size=63",
    "task=grpo generation.top_k=5": "generation.top_k",
    "task=grpo reward.overlong_buffer=65": "generation.max_new_tokens=64",
    "task=ppo task.share_trunk=true task.critic_warmup_steps=4": "task.share_trunk=false",
    "task=ppo task.ema_decay=0.99 model.dtype=bfloat16": "model.dtype=float32",
    "task=ppo model.disable_dropout=false": "model.disable_dropout=true",
    "task=ppo reward=function task.rm_experiment_dir=/some/run": "is not read by reward=function",
    "task=rloo reward=model": "train task=rm",
    "task=ppo task.sft_experiment_dir=newest": "train task=sft",
    "task=ppo model.freeze_transformer=true": "model.freeze_transformer=true is not read",
    "task=sft model.lora_cfg.init=pissa_niter_4": "changes the weights of the base model",
    "task=sft model.lora_cfg.init=eva": "needs data",
    "task=sft model.lora_cfg.init=xavier": "gaussian",
    "task=sft model.lora_cfg.init=orthogonal model.lora_cfg.rank=3": "model.lora_cfg.rank=4",
    "task=sft model.lora_cfg.targets='(a+)+b'": "regular expression",
    "task=sft model.lora_cfg.targets='q_proj|('": "regular expression",
    "task=sft model.lora_cfg.layers_to_transform=[-1]": "counted from 0",
    "task=sft model.lora_cfg.modules_to_save=['a*']": "model.lora_cfg.modules_to_save",
    "task=sft model.finetune_mode=LORA model.lora_cfg.use_dora=true fabric.strategy=fsdp2": "fabric.strategy=ddp",
    "task=sft model.attn_implementation=eagr": "model.attn_implementation=eager",
    "task=sft model.save_dtype=int8": "model.save_dtype",
}


@pytest.mark.parametrize("words", REFUSED)
def test_it_is_refused_with_the_fix(words: str, tmp_path: Path) -> None:
    config = resolve_runs(to_typed(composed("train", f"root_dir='{tmp_path}'", *words.split())), None)
    problems = validate(config)
    assert any(REFUSED[words] in problem for problem in problems), problems


def test_alone_it_needs_no_earlier_run(tmp_path: Path) -> None:
    """`train task=ppo` on the embedded model and data: scored by a rule, from the model as it is."""
    config = resolve_runs(to_typed(composed("train", f"root_dir='{tmp_path}'", "task=ppo")), None)
    assert validate(config) == []
    assert links_of(config) == {}
    assert isinstance(config.task, PPOConfig)
    assert config.task.rm_experiment_dir is None


def test_the_cards_command_names_both_runs_to_train_first(tmp_path: Path) -> None:
    words = ["task=ppo", "model=opt", "data=summarization", f"root_dir='{tmp_path}'"]
    config = resolve_runs(to_typed(composed("train", *words)), None)
    assert set(links_of(config)) == {START, REWARD_MODEL}
    [problem] = [problem for problem in validate(config) if "task.rm_experiment_dir" in problem]
    for part in ("train task=sft model=opt data=summarization", "train task=rm model=opt", "reward=function"):
        assert part in problem


def test_a_dry_run_is_two_steps(tmp_path: Path) -> None:
    for task in ("ppo", "grpo", "rloo", "online_dpo"):
        config = resolve_runs(
            to_typed(composed("train", f"task={task}", "dry_run=true", "reward.overlong_buffer=40")), None
        )
        assert validate(config) == []
        assert config.task.rollout_size % config.task.num_generations == 0
        assert config.task.max_num_steps == 2
