"""What options of training refuse before anything loads."""

import pytest

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
    "task=rm task.early_stopping_direction=lowest": "task.early_stopping_metric",
}


@pytest.mark.parametrize("words", REFUSED)
def test_it_is_refused_with_the_fix(words: str) -> None:
    problems = validate(to_typed(composed("train", *words.split())))
    assert len(problems) == 1
    assert REFUSED[words] in problems[0]


@pytest.mark.parametrize(
    "words",
    [
        "task=sft task.lr_warmup_ratio=0.3 optim.schedule=wsd optim.decay_ratio=0.7",
        "task=dpo task.early_stopping_metric=rewards/accuracies task.early_stopping_patience=1",
        "task=rloo task.early_stopping_metric=scores/length task.early_stopping_direction=lowest data.shuffle=false",
    ],
)
def test_it_is_accepted(words: str) -> None:
    assert validate(to_typed(composed("train", *words.split()))) == []
