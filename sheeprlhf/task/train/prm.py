"""Process reward modelling: the model learns which steps of a response are right (arXiv 2305.20050, 2312.08935).

The score after the last token of a step is the log-odds that it is right; a step is known from the text up to its end
alone. The loss of an optimizer step is the mean over its steps with a label, of all rows and all devices.
"""

from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from sheeprlhf.agent.batches import Batches, Rows
from sheeprlhf.agent.reward import SEPARATOR, reward_model_of
from sheeprlhf.config.registry import datasets_of
from sheeprlhf.data.example import Batch
from sheeprlhf.data.rows import STEPS
from sheeprlhf.engine.run import open_run
from sheeprlhf.engine.step import LossOutput, evaluate
from sheeprlhf.loss.reward import step_losses
from sheeprlhf.structure.run import TrainConfig
from sheeprlhf.structure.task import PRMConfig
from sheeprlhf.task.loop import TrainLoop
from sheeprlhf.utils.lightning import Fabric


def labels_of(rows: Rows, part: list[int]) -> Tensor:
    """(N,) bool, whether each step of some rows is right."""
    return torch.tensor([label for row in rows.examples(part) for label in (row.columns or {})[STEPS[1]]])


def prm_loss(model: nn.Module, content: tuple[Batch, Tensor]) -> LossOutput:
    """Losses of the steps, how often the more likely label is theirs, and how many are right."""
    batch, labels_N = content
    scores_N = model(batch)
    metrics = {"accuracy": (scores_N > 0) == labels_N, "share_right": labels_N}
    return LossOutput(step_losses(scores_N, labels_N).sum(), {name: of_N.sum() for name, of_N in metrics.items()})


def train(fabric: Fabric, cfg: TrainConfig, run_dir: Path) -> None:
    """All ranks: prepare the data, train, validate, save, and leave `final/` in the run directory."""
    task = cfg.task
    assert isinstance(task, PRMConfig)
    with open_run(fabric, cfg, run_dir) as run:
        loop = TrainLoop(fabric, run)
        policy = loop.load_policy(new_head=True)
        model = reward_model_of(policy, cfg.model, loop.tokenizer)
        [separator] = {getattr(data, "step_separator", None) for data in datasets_of(cfg.data)}
        setattr(model.classifier().config, SEPARATOR, separator)
        module = loop.set_up(model)
        batches = Batches(fabric, task, packed=policy.packed, targets="steps", extras=labels_of)
        loop.begin(lambda rows, _: partial(batches.of, rows))

        def validate() -> None:
            loop.record(evaluate(fabric, module, loop.validation_batches(batches), prm_loss))

        if loop.validates_at_start:
            validate()
        for step in loop:
            step.update(prm_loss)
            if step.validates:
                validate()
        loop.finish(model)
