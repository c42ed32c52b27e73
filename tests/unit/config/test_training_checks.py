"""What the options of training refuse and accept before anything loads."""

from pathlib import Path

import pytest

from sheeprlhf.config import validate as rules
from sheeprlhf.config.compose import Source, check
from sheeprlhf.config.option_lookup import catalogue
from sheeprlhf.config.registry import groups
from sheeprlhf.config.run_lookup import REWARD_MODEL, START, links_of, resolve_runs
from sheeprlhf.config.validate import validate
from sheeprlhf.structure.rollout import PPOConfig
from tests.unit.config.test_registry import composed, to_typed


def problems_of(*words: str) -> list[str]:
    return check(Source("train"), list(words))


REFUSED = {
    "task=sft task.lr_warmup_steps=3 task.lr_warmup_ratio=0.1": "task.lr_warmup_ratio=0.1",
    "task=sft task.lr_warmup_ratio=1.5": "task.lr_warmup_ratio=1.5",
    "task=sft optim.decay_ratio=0.2": "optim.schedule=wsd",
    "task=sft optim.schedule=wsd optim.decay_ratio=0.8 task.lr_warmup_ratio=0.3": "optim.decay_ratio=0.8",
    "task=sft task.early_stopping_metric=val/lose": "task.early_stopping_metric=loss",
    "task=dpo task.early_stopping_metric=perplexity": "rewards/accuracies",
    "task=grpo task.early_stopping_metric=loss": "objective",
    "task=rm task.early_stopping_patience=2": "task.early_stopping_metric",
    "task=dpo model.neftune_alpha=5": "task=dpo",
    "task=sft model.neftune_alpha=0": "model.neftune_alpha",
    "task=rm data.reasoning=mask": "data.reasoning=remove",
    "task=sft data=hub data.dataset_name=a/b data.streaming=true": "task.max_num_steps",
    "task=dpo data=hub data.dataset_name=a/b data.streaming=true": "task.max_num_steps",
    "task=best_of_n data=hub data.dataset_name=a/b data.streaming=true reward=function "
    "reward.path=tests.support.rewards:letters": "task=best_of_n",
    "task=sft data=hub data.dataset_name=a/b data.shard_size=0": "data.shard_size",
    "task=sft data.reasoning_tags=[a,b]": "data.reasoning=mask",
    "task=sft data.reasoning=mask data.reasoning_tags=[a,a]": "data.reasoning_tags",
    "task=sft data=hub data.dataset_name=a/b data.streaming=true task.max_num_steps=9 task.epochs=2": "task.epochs=2",
    "task=sft data=hub data.dataset_name=a/b data.keep_shards=1": "data.keep_shards",
    "task=sft data.reasoning=mask task.completion_only_loss=false": "task.completion_only_loss=false",
    "task=sft data.reasoning=drop": "remove",
    "task=sft data.train_on=weight": "weights",
    "task=sft log=[tensorbord]": "log=[tensorboard]",
    "task=sft log=[tensorboard,tensorboard]": "more than once",
    "task=sft log_project=mine": "log_project=mine",
    "task=rm task.early_stopping_direction=lowest": "task.early_stopping_metric",
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
    "task=ppo task.ema_decay=0.99 fabric.precision=bf16-true": "fabric.precision=bf16-mixed",
    "task=ilql fabric.precision=bf16-true": "fabric.precision=bf16-mixed",
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
    "task=best_of_n optim.lr=0.1": "optim.lr=0.1 is not read by task=best_of_n",
    "task=best_of_n optim=sgd": "optim=sgd is not read",
    "task=best_of_n task.epochs=2": "task.epochs=2 is not read",
    "task=best_of_n task.num_generations=3": "task.rollout_size=255",
    "task=best_of_n reward.normalize=true": "give reward.normalize=false",
    "task=best_of_n generation.top_k=3": "generation.top_k",
}
TWICE = (  # two options do not fit
    "task=grpo rollout=vllm rollout.urls=[http://a] rollout.sync=nccl rollout.sync_dir=/x",
    "task=ppo task.num_generations=3",
)


@pytest.mark.parametrize("words", REFUSED)
def test_it_is_refused_with_the_fix(words: str, tmp_path: Path) -> None:
    problems = problems_of(*words.split(), f"root_dir='{tmp_path}'")
    assert len(problems) == (2 if words in TWICE else 1), problems
    assert REFUSED[words] in problems[0]


def test_8bit_moments_need_their_package_and_whole_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["task=sft", "optim=adamw_8bit", "fabric.devices=2", "fabric.strategy=fsdp2"]
    monkeypatch.setattr("sheeprlhf.config.validate.missing_modules", lambda modules: list(modules))
    problems = problems_of(*words)
    assert len(problems) == 2
    assert "sheeprlhf[8bit]" in problems[0] and "fabric.strategy=ddp" in problems[1]
    monkeypatch.setattr("sheeprlhf.config.validate.missing_modules", lambda modules: [])
    assert problems_of(*words[:2]) == []


def test_quantisation_needs_its_package_adapters_and_whole_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["task=sft", "model.quantization=nf4", "model.finetune_mode=LORA"]
    monkeypatch.setattr("sheeprlhf.config.validate.missing_modules", lambda modules: list(modules))
    [problem] = problems_of(*words)
    assert "sheeprlhf[quantization]" in problem
    monkeypatch.setattr("sheeprlhf.config.validate.missing_modules", lambda modules: [])
    assert problems_of(*words) == []
    wrong = ["fabric.devices=2", "fabric.strategy=fsdp2", "fabric.precision=64-true", "model.random_init=true"]
    problems = problems_of(*words[:2], *wrong)
    for fix in ("finetune_mode=LORA", "strategy=ddp", "precision=32-true", "random_init=false"):
        assert any("model.quantization=nf4" in problem and fix in problem for problem in problems), fix


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_a_tracker_that_is_not_installed_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sheeprlhf.config.validate.missing_modules", lambda modules: list(modules))
    [problem] = problems_of("task=sft", f"log=[tensorboard,{name}]")
    assert f"sheeprlhf[{name}]" in problem


def test_wandb_needs_a_login_or_its_offline_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sheeprlhf.config.validate.missing_modules", lambda modules: [])
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    config = to_typed(composed("train", "task=sft", "log=[wandb]", "log_project=mine"))
    [problem] = validate(config)
    assert "WANDB_MODE=offline" in problem
    for name, value in (("WANDB_MODE", "offline"), ("WANDB_API_KEY", "x" * 40)):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert validate(config) == []
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password secret\n")
    (tmp_path / "netrc").chmod(0o600)
    assert validate(config) == []
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert len(validate(config)) == 1


@pytest.mark.parametrize(
    "words",
    [
        "task=sft task.lr_warmup_ratio=0.3 optim.schedule=wsd optim.decay_ratio=0.7",
        "task=dpo task.early_stopping_metric=rewards/accuracies task.early_stopping_patience=1",
        "task=rloo task.early_stopping_metric=scores/length task.early_stopping_direction=lowest data.shuffle=false",
        "task=sft data=hub data.dataset_name=a/b data.streaming=true dry_run=true",
    ],
)
def test_it_is_accepted(words: str) -> None:
    assert problems_of(*words.split()) == []


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
    words = ["task=reward", "model=tiny", "data=docstrings", "reward.overlong_buffer=40", "dry_run=true"]
    assert validate(to_typed(composed("eval", *words, f"output_dir='{tmp_path}'"))) == []


def test_each_rule_names_options_that_exist() -> None:
    """A rule of a mistyped option would never apply."""
    known: dict[str, set[str]] = {f"{group}.config_name": set() for group in groups("train")} | {
        "model.lora_cfg": set()
    }
    for entry in catalogue():
        known.setdefault(entry.option.key, set()).update(entry.option.metadata.get("choices", ()))
    pairs = [rule[:2] for rule in (*rules._CONFLICTS, *rules._TRAIN_CONFLICTS)]
    for condition in " ".join(map(" ".join, [*rules._READ_WITH.items(), *pairs])).split():
        name, _, values = condition.partition("=")
        choices = known[name.rstrip("!")]
        assert not choices or not values or set(values.split("|")) <= choices | {"null"}, condition
