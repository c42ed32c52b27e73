"""What options of training refuse before anything loads."""

from pathlib import Path

import pytest

from sheeprlhf.config import validate as rules
from sheeprlhf.config.overrides import catalogue
from sheeprlhf.config.registry import groups
from sheeprlhf.config.validate import validate
from tests.unit.config.test_registry import composed, to_typed

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
}


@pytest.mark.parametrize("words", REFUSED)
def test_it_is_refused_with_the_fix(words: str) -> None:
    problems = validate(to_typed(composed("train", *words.split())))
    assert len(problems) == 1
    assert REFUSED[words] in problems[0]


def test_8bit_moments_need_their_package_and_whole_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["task=sft", "optim=adamw_8bit", "fabric.devices=2", "fabric.strategy=fsdp2"]
    monkeypatch.setattr("sheeprlhf.config.validate.missing_modules", lambda modules: list(modules))
    problems = validate(to_typed(composed("train", *words)))
    assert len(problems) == 2
    assert "sheeprlhf[8bit]" in problems[0] and "fabric.strategy=ddp" in problems[1]
    monkeypatch.setattr("sheeprlhf.config.validate.missing_modules", lambda modules: [])
    assert validate(to_typed(composed("train", *words[:2]))) == []


def test_quantisation_needs_its_package_adapters_and_whole_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["task=sft", "model.quantization=nf4", "model.finetune_mode=LORA"]
    monkeypatch.setattr("sheeprlhf.config.validate.missing_modules", lambda modules: list(modules))
    [problem] = validate(to_typed(composed("train", *words)))
    assert "sheeprlhf[quantization]" in problem
    monkeypatch.setattr("sheeprlhf.config.validate.missing_modules", lambda modules: [])
    assert validate(to_typed(composed("train", *words))) == []
    wrong = ["fabric.devices=2", "fabric.strategy=fsdp2", "fabric.precision=64-true", "model.random_init=true"]
    problems = validate(to_typed(composed("train", *words[:2], *wrong)))
    for fix in ("finetune_mode=LORA", "strategy=ddp", "precision=32-true", "random_init=false"):
        assert any("model.quantization=nf4" in problem and fix in problem for problem in problems), fix


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_a_tracker_that_is_not_installed_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sheeprlhf.config.validate.missing_modules", lambda modules: list(modules))
    [problem] = validate(to_typed(composed("train", "task=sft", f"log=[tensorboard,{name}]")))
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
    assert validate(to_typed(composed("train", *words.split()))) == []


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
