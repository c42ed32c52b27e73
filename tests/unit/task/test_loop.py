"""The optimizer steps of an iteration of RL: their number, order, learning rates and early end."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from sheeprlhf.agent.policy import Policy
from sheeprlhf.agent.reward import RewardModel
from sheeprlhf.data.sampler import RolloutPlan, StepPlan
from sheeprlhf.engine.checkpoint import TrainState
from sheeprlhf.rollout.rollout import Rollout
from sheeprlhf.structure.rollout import GRPOConfig, OnlineDPOConfig, OnlineTaskConfig
from sheeprlhf.structure.run import AdamWConfig
from sheeprlhf.structure.task import TrainTaskConfig
from sheeprlhf.task import finish
from sheeprlhf.task.eval.rouge import baseline_responses, name_words
from sheeprlhf.task.finish import finish_run, record_validation
from sheeprlhf.task.loop import Iteration
from sheeprlhf.task.models import pack_alike
from sheeprlhf.utils.errors import ModelError, NonFiniteError
from tests.support.batches import random_examples
from tests.support.models import ModelFolder
from tests.support.runs import figures_at, train, write_pairs, write_rows

ROLLOUT = Rollout(tuple(random_examples(4, 2)), np.zeros((4, 2)), np.ones((4, 2), dtype=bool), {})


def make_iteration(task: OnlineTaskConfig, number: int, metrics: list[dict[str, float]]) -> Iteration:
    """The `number`-th iteration of a run on 12 prompts, whose updates have these metrics."""
    answers = iter(metrics)

    def update(module: object, micro_batches: list[int], loss_fn: object) -> dict[str, float]:
        assert (module, len(micro_batches), loss_fn) == ("policy", 2, "loss")
        return dict(next(answers))

    cfg = SimpleNamespace(task=task, seed=3, optim=AdamWConfig(schedule="linear", min_lr_ratio=0.0))
    loop: Any = SimpleNamespace(
        run=SimpleNamespace(cfg=cfg),
        task=task,
        module="policy",
        optimizer=SimpleNamespace(param_groups=[{"peak_lr": 1.0, "lr": 0.0}]),
        state=SimpleNamespace(extra={}),
        update=update,
    )
    prompts = StepPlan(12, task.prompts_per_rollout(), 1, cfg.seed)
    plan = RolloutPlan(prompts, task.prompts_per_step(), task.num_iterations, task.max_num_steps)
    return Iteration(loop, number, plan, ROLLOUT)


@pytest.mark.parametrize("padded", [None, 0, 1, 2])
def test_models_that_read_the_same_batches_are_packed_only_together(padded: int | None) -> None:
    model: Any = torch.nn.Identity()
    models = [Policy(model), RewardModel(model), Policy(model)]
    if padded is not None:
        models[padded].packed = False
    pack_alike([*models, None])
    assert [one.packed for one in models] == [padded is None] * 3


def run(
    iteration: Iteration, rollout: Rollout = ROLLOUT, *, updates: bool = True
) -> tuple[list[int], list[list[int]], list[float]]:
    """Numbers, rows and learning rates of the steps that are taken."""
    batches: Any = SimpleNamespace(of=lambda _, rows: rows.tolist())
    numbers, rows, rates = [], [], []
    for step, micro_batches in iteration.steps(rollout, batches):
        if updates:
            iteration.update(micro_batches, "loss")  # type: ignore[arg-type]
        numbers.append(step)
        rows.append(micro_batches)
        rates.append(iteration._loop.optimizer.param_groups[0]["lr"])
    return numbers, rows, rates


def task_of(kind: type[OnlineTaskConfig] = GRPOConfig, **options: Any) -> OnlineTaskConfig:
    """Rollouts of four prompts, steps of two, three passes: six steps an iteration, eighteen a run."""
    sizes = {"num_generations": 2, "rollout_size": 8, "mini_batch_size": 4, "lr_warmup_steps": 0}
    return kind(**sizes | {"num_iterations": 3} | options)


def test_the_steps_of_an_iteration_cover_the_rollout_once_a_pass() -> None:
    numbers, rows, rates = run(make_iteration(task_of(), 1, [{"loss": 1.0}] * 6))
    assert numbers == [6, 7, 8, 9, 10, 11]
    assert [sorted(rows[i] + rows[i + 1]) for i in (0, 2, 4)] == [[0, 1, 2, 3]] * 3
    order = StepPlan(4, 2, 3, 3 + 1)  # another one in every iteration
    assert rows == [order.rows_of_step(step).tolist() for step in range(6)]
    assert rates == pytest.approx([1 - step / 18 for step in numbers], abs=1e-6)


def test_metrics_are_named_by_what_they_are_of() -> None:
    both = {"loss": 3.0, "policy": 1.0, "value": 2.0, "ratio": 0.9, "rewards/margins": 0.5}
    iteration = make_iteration(task_of(max_num_steps=2), 0, [both, {"loss": 2.0, "ratio": 1.1}])
    run(iteration)
    means = {"loss/policy": 1.5, "loss/value": 2.0, "policy/ratio": 1.0, "train/rewards/margins": 0.5}
    assert iteration.means() == pytest.approx(means, abs=1e-6)


def test_advantages_are_kept_and_other_rows_are_not() -> None:
    """Online DPO trains on pairs, which are not the rows that were sampled."""
    iteration = make_iteration(task_of(), 0, [{"loss": 0.0}] * 6)
    run(iteration)
    assert iteration.rollout is ROLLOUT
    rollout = ROLLOUT.with_advantages(torch.zeros(4, 2))
    iteration = make_iteration(task_of(), 0, [{"loss": 0.0}] * 6)
    run(iteration, rollout)
    assert iteration.rollout is rollout
    with pytest.raises(NonFiniteError):
        run(iteration, ROLLOUT.with_advantages(torch.full((4, 2), torch.nan)))


def test_importance_weights_multiply_the_advantages() -> None:
    num_tokens = sum(ROLLOUT.response_lengths)
    weights = torch.linspace(0.5, 2.0, num_tokens)
    rollout = ROLLOUT.with_advantages(torch.full((4, 2), 3.0)).with_tokens(importance=weights)
    iteration = make_iteration(task_of(), 0, [{"loss": 0.0}] * 6)
    run(iteration, rollout)
    torch.testing.assert_close(iteration.rollout.flat("advantages"), 3.0 * weights, rtol=0, atol=1e-6)
    iteration = make_iteration(task_of(), 0, [{"loss": 0.0}] * 6)
    run(iteration, ROLLOUT.with_tokens(importance=weights))  # of pairs, which have no advantages
    assert iteration.rollout is ROLLOUT


@pytest.mark.parametrize(
    ("kls", "limit", "num_steps"),
    [((0.05, 0.2, 0.0, 0.0, 0.0, 0.0), 0.1, 2), ((0.1,) * 6, 0.1, 6), ((0.3,) * 6, None, 6)],
)
def test_passes_end_after_an_update_beyond_the_limit(
    kls: tuple[float, ...], limit: float | None, num_steps: int
) -> None:
    metrics = [{"loss": 0.0, "approxkl": kl} for kl in kls]
    assert len(run(make_iteration(task_of(early_stop_kl=limit), 0, metrics))[0]) == num_steps


def test_skipped_and_absent_updates_and_tasks_without_the_limit_end_no_pass() -> None:
    skipped = [{"loss": 0.0, "approxkl": 0.05}, {}, {}, {}, {}, {}]
    assert len(run(make_iteration(task_of(early_stop_kl=0.1), 0, skipped))[0]) == 6
    assert len(run(make_iteration(task_of(early_stop_kl=0.1), 0, []), updates=False)[0]) == 6
    assert len(run(make_iteration(task_of(OnlineDPOConfig), 0, [{"loss": 0.0}] * 6))[0]) == 6


def test_the_last_iteration_ends_at_the_last_step() -> None:
    assert run(make_iteration(task_of(max_num_steps=8), 1, [{"loss": 0.0}] * 6))[0] == [6, 7]


def silent_run(folder: Path) -> Any:
    cfg = SimpleNamespace(task=TrainTaskConfig())
    silent = {name: lambda *given: None for name in ("say", "log", "finish_saving")}
    return cast(Any, SimpleNamespace(dir=folder, cfg=cfg, **silent))


def test_the_lowest_validation_loss_is_the_best(tmp_path: Path) -> None:
    """And what is not finite never is, not even if it comes first."""
    for odd, sign in ((float("nan"), 1), (float("-inf"), 1), (float("inf"), -1)):
        state = TrainState()
        for step, loss in enumerate((odd, 3.0, 1.0, 2.0, odd, 1.0), start=1):
            state.step = step
            result = {"loss": loss if loss is odd else sign * loss}
            record_validation(silent_run(tmp_path), state, result, highest=sign < 0)
        assert (state.best_step, state.best_metric) == (3, sign * 1.0)


@pytest.mark.parametrize(
    ("options", "values", "best", "stops"),
    [
        ({"early_stopping_metric": "rewards/accuracies"}, [0.5, 0.7, 0.6, 0.8], (4, 0.8), False),
        ({"early_stopping_metric": "rewards/accuracies"}, [0.5, 0.7, 0.6, 0.7], (2, 0.7), True),
        ({"early_stopping_metric": "kl"}, [0.5, 0.7, float("nan")], (1, 0.5), True),
        ({"early_stopping_metric": "kl", "early_stopping_direction": "highest"}, [0.5, 0.7, 0.6], (2, 0.7), False),
        ({}, [0.5, 0.7, 0.6], (1, 3.0), False),
    ],
)
def test_the_metric_of_early_stopping_selects_the_best_step(
    options: dict[str, str], values: list[float], best: tuple[int, float], stops: bool, tmp_path: Path
) -> None:
    run, state = silent_run(tmp_path), TrainState()
    task = run.cfg.task = TrainTaskConfig(early_stopping_patience=2, **options)
    name = task.early_stopping_metric or "loss"
    for step, value in enumerate([values[0] + 9, *values]):  # step 0 does not count
        state.step = step
        assert not task.stops_early(state.stale_validations)
        record_validation(run, state, {"loss": 3.0, name: 3.0 if name == "loss" else value})
    assert (state.best_step, state.best_metric) == best
    assert task.stops_early(state.stale_validations) is stops


def test_final_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    class Dying:
        def save(self, folder: Path, tokenizer: object) -> None:
            (folder / "config.json").write_text("{}")
            raise Killed

    fabric = SimpleNamespace(is_global_zero=True, barrier=lambda: None, broadcast=lambda value: value)
    with pytest.raises(Killed):
        finish_run(cast(Any, fabric), silent_run(tmp_path), cast(Any, Dying()), cast(Any, None), TrainState())
    assert not (tmp_path / "final").exists()


@pytest.mark.parametrize("task", ["dpo"])
def test_memory_is_reported_as_planned_and_as_it_was(
    task: str, tmp_path: Path, model_folder: ModelFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_pairs(tmp_path / "rows.jsonl", 12)
    train(model_folder(), data, tmp_path / "run", "task.max_num_steps=1", task=task)
    printed = capsys.readouterr().err
    planned = re.search(r"^memory plan: up to (\d+ MB) in a step of the longest rows", printed, re.MULTILINE)
    assert planned is not None
    assert int(planned[1].split()[0]) > 520  # the libraries alone
    assert re.search(
        rf"^peak memory of this process: [\d.]+ [MG]B \(planned: up to {planned[1]}\)$", printed, re.MULTILINE
    )
    assert printed.splitlines()[-1].startswith("next: python sheeprlhf.py eval")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["peak_memory"] > 100e6


def test_a_model_that_cannot_be_measured_is_trained_all_the_same(
    tmp_path: Path,
    model_folder: ModelFolder,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ModelError("it cannot be run on tensors without content")

    monkeypatch.setattr(finish, "step_plan", refuse)
    run_dir = train(model_folder(), write_rows(tmp_path / "rows.jsonl", 12), tmp_path / "run", "task.max_num_steps=1")
    printed = capsys.readouterr().err
    assert "memory plan" not in printed
    assert re.search(r"^peak memory of this process: [\d.]+ [MG]B$", printed, re.MULTILINE)
    assert (run_dir / "final").is_dir()


def test_only_training_smooths_labels(tmp_path: Path, model_folder: ModelFolder) -> None:
    words = ["task.label_smoothing=0.5", "task.max_num_steps=2", "task.eval_interval=1", "task.num_sample_prompts=0"]
    run_dir = train(model_folder(), write_rows(tmp_path / "rows.jsonl", 12), tmp_path / "run", *words)
    values = figures_at(run_dir)
    for step in (1, 2):
        assert_close(values["val/loss", step], values["val/nll", step], rtol=1e-12, atol=0)
        assert abs(values["train/loss", step] - values["train/nll", step]) > 1e-4


METHOD = 'class HTTPServer(Base):\n    async def get_maxSize2(self, file_name=1) -> int:\n        """'


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ('def read_file(path):\n    """', "read file"),
        (METHOD, "HTTP Server get max Size 2"),
        ('class _JSONEncoderV2:\n    """', "JSON Encoder V 2"),
        ('def __init__(self):\n    """', "init"),
        ("define(x); the class of def", ""),
        ("", ""),
    ],
)
def test_the_names_of_a_signature_as_words(prompt: str, expected: str) -> None:
    assert " ".join(name_words(prompt)) == expected


def test_every_baseline_answers_every_prompt() -> None:
    prompts = [METHOD, 'def  run_all():\n    """']
    assert baseline_responses(prompts, ["One two three.", "Four five"]) == {  # 2.5 words on average: 2
        "lead": ["class HTTPServer(Base):", "def run_all():"],
        "copy": prompts,
        "names": ["HTTP Server get max Size 2", "run all"],
    }
