"""A number that is not finite ends the run before it reaches a weight or a checkpoint, or the step is left out.

`KINDS` are the rows of the table in docs/reliability.md; `pytest -m "slow or nightly" tests/faults/test_nonfinite.py`.
"""

import csv
import functools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import tests.support.rewards as rewards
from sheeprlhf.agent import policy as policy_module
from sheeprlhf.agent import reward as reward_module
from sheeprlhf.engine.manifest import verify_manifest
from sheeprlhf.rollout import sampler as sample_module
from sheeprlhf.rollout.rollout import RolloutCollector
from sheeprlhf.task.train import dpo, ppo, rm, sft
from tests.faults.test_resume import without_time
from tests.support.jobs import JobServer
from tests.support.models import ModelFolder
from tests.support.runs import WRITERS, digests, killed, result_of, train, train_words, write_rows

Spoil = Callable[[Tensor], Tensor]  # makes what it is given non-finite
SAVES = ["task.save_interval=2", "task.keep_checkpoints=99"]
BAD = 40  # the row whose numbers are spoilt
NAN, INF = float("nan"), float("inf")


def hurt(total: Tensor) -> Tensor:
    """The same number, whose gradient is NaN: that of sqrt at 0, times 0."""
    return total + torch.sqrt((total - total.detach()) ** 2)


def in_loss(module: Any, name: str, sights: int = 2) -> Callable[[Any, Spoil], None]:
    """The sum of a task's loss over a micro-batch with the bad row, from its `sights`-th forward pass with gradient."""

    def install(patch: Any, spoil: Spoil) -> None:
        original, seen = getattr(module, name), []

        def broken(model: Any, content: Any, **options: Any) -> Any:
            output = original(model, content, **options)
            batch = content[0] if type(content) is tuple else content
            if BAD not in batch.row_ids or not torch.is_grad_enabled():
                return output
            seen.append(BAD)
            return output._replace(total=spoil(output.total)) if len(seen) >= sights else output

        patch.setattr(module, name, broken)

    return install


def in_logits(module: Any, sights: int = 2) -> Callable[[Any, Spoil], None]:
    """One hidden state under the head, and so all logits (or the score) of one place; else as `in_loss`."""

    def install(patch: Any, spoil: Spoil) -> None:
        original, seen = module.hidden_at_head, []

        def broken(backbone: Any, batch: Any) -> Tensor:
            hidden_RC = original(backbone, batch)
            if BAD not in batch.row_ids or not torch.is_grad_enabled():
                return hidden_RC
            seen.append(BAD)
            return torch.cat([spoil(hidden_RC[:1]), hidden_RC[1:]]) if len(seen) >= sights else hidden_RC

        patch.setattr(module, "hidden_at_head", broken)

    return install


def at_call(
    place: Any, name: str, counts: Callable[..., bool], number: int, where: int
) -> Callable[[Any, Spoil], None]:
    """One number of what a function returns (the first of what it returns, if several), at one of its calls."""

    def install(patch: Any, spoil: Spoil) -> None:
        original, calls = getattr(place, name), []

        @functools.wraps(original)
        def broken(*arguments: Any, **options: Any) -> Any:
            found = original(*arguments, **options)
            counts_here = counts(*arguments, **options)
            calls.extend([1] * counts_here)
            if not counts_here or len(calls) != number:
                return found
            first = found[0] if isinstance(found, tuple) else torch.as_tensor(found)
            flat = first.clone().flatten()
            flat[where : where + 1] = spoil(flat[where : where + 1])
            spoilt = flat.view_as(first)
            return (spoilt, *found[1:]) if isinstance(found, tuple) else spoilt

        patch.setattr(place, name, broken)

    return install


def in_sampler(patch: Any, spoil: Spoil) -> None:
    """All logits from which one token of a response is drawn."""
    original, calls = sample_module.draw, []

    def broken(logits_BV: Tensor, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
        calls.append(1)
        if len(calls) == 20:
            logits_BV = torch.cat([spoil(logits_BV[:1]), logits_BV[1:]])
        return original(logits_BV, *arguments, **options)

    patch.setattr(sample_module, "draw", broken)


def nothing(patch: Any, spoil: Spoil) -> None:
    """The options are bad enough."""


class Kind(NamedTuple):
    """What is not finite, where, and what the message says of it.

    Attributes:
        task: whose run it is.
        install: puts the fault in.
        spoil: what it does to a number.
        says: a pattern; a group has the numbers of rows.
        most: so many rows are named at most.
        words: more options.
    """

    task: str
    install: Callable[[Any, Spoil], None]
    spoil: Spoil
    says: str
    most: int = 3
    words: tuple[str, ...] = ()


OF_STEP = r"no weight was changed\. Look at these rows of the training split \(rank 0: rows \[([\d, ]+)\]\)"
OF_ROLLOUT = r" after \d+ of 12 prompts .* rows of the training split \(\[([\d, ]+)\]\)"
BLOWN_UP = ("optim=sgd", "optim.lr=1e20", "task.max_grad_norm=null", "task.save_interval=1", "task.lr_warmup_steps=0")
KINDS = {
    "sft: loss NaN": Kind("sft", in_loss(sft, "sft_loss"), lambda x: x * NAN, f"loss is nan .*{OF_STEP}"),
    "sft: loss infinite": Kind("sft", in_loss(sft, "sft_loss"), lambda x: x + INF, f"loss is inf .*{OF_STEP}"),
    "sft: gradient NaN": Kind("sft", in_loss(sft, "sft_loss"), hurt, f"gradient norm nan.*{OF_STEP}", 6),
    "sft: logits of one token NaN": Kind("sft", in_logits(policy_module), lambda x: x * NAN, OF_STEP),
    "sft: learning rate 1e20": Kind("sft", nothing, lambda x: x, OF_STEP, 6, BLOWN_UP),
    "rm: score infinite": Kind("rm", in_logits(reward_module), lambda x: x + INF, OF_STEP),
    "rm: gradient NaN": Kind("rm", in_loss(rm, "rm_loss"), hurt, f"gradient norm nan.*{OF_STEP}", 6),
    "dpo: logits of one token NaN": Kind("dpo", in_logits(policy_module), lambda x: x * NAN, OF_STEP),
    "dpo: loss infinite": Kind("dpo", in_loss(dpo, "dpo_loss"), lambda x: x + INF, f"loss is inf .*{OF_STEP}"),
    "ppo: reward NaN": Kind(
        "ppo",
        at_call(rewards, "letters", lambda *, prompts, responses: len(prompts) == 24, 3, 4),
        lambda x: x * NAN,
        r"nan.* (5) of 24",
    ),
    "ppo: value NaN": Kind(
        "ppo",
        at_call(RolloutCollector, "values_of", lambda *_, **__: True, 3, 7),
        lambda x: x * NAN,
        f"values{OF_ROLLOUT}",
        1,
    ),
    "ppo: advantage infinite": Kind(
        "ppo", at_call(ppo, "gae", lambda *_, **__: True, 3, 0), lambda x: x + INF, f"advantages{OF_ROLLOUT}", 12
    ),
    "ppo: logits of the sampler NaN": Kind("ppo", in_sampler, lambda x: x * NAN, f"sampled{OF_ROLLOUT}", 1),
    "ppo: gradient NaN": Kind(
        "ppo", in_loss(ppo, "policy_loss", 1), hurt, f"gradient norm nan.*{OF_STEP}", 6, ("task.num_iterations=1",)
    ),
}
IN_EVERY_RUN = ("sft: loss NaN", "sft: learning rate 1e20")
IN_CI = ("sft: gradient NaN", "ppo: reward NaN", "ppo: value NaN")
SKIPPED = {  # and the fault for a run that has seen the bad row before
    "sft: loss NaN": in_loss(sft, "sft_loss", 1),
    "rm: gradient NaN": in_loss(rm, "rm_loss", 1),
    "dpo: logits of one token NaN": in_logits(policy_module, 1),
    "ppo: gradient NaN": in_loss(ppo, "policy_loss", 1),
}


def marks_of(name: str) -> tuple[pytest.MarkDecorator, ...]:
    if name in IN_EVERY_RUN:
        return ()
    return (pytest.mark.slow if name in IN_CI else pytest.mark.nightly,)


def rows_named(kind: Kind, message: str) -> list[int]:
    found = re.search(kind.says, message, flags=re.DOTALL)
    assert found, message
    return [int(row) for row in found[1].split(", ")]


@pytest.mark.parametrize("name", [pytest.param(name, marks=marks_of(name)) for name in KINDS])
def test_a_kind_ends_the_run(
    name: str,
    tmp_path: Path,
    model_folder: ModelFolder,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kind, run_dir, then = KINDS[name], tmp_path / "run", []

    def spoil(number: Tensor) -> Tensor:
        then.append(digests(run_dir / "checkpoints"))
        return kind.spoil(number)

    kind.install(monkeypatch, spoil)
    data = WRITERS[kind.task](tmp_path / "rows.jsonl")
    with pytest.raises(SystemExit) as stopped:
        train(model_folder(), data, run_dir, *SAVES, *kind.words, task=kind.task)
    assert stopped.value.code == 1
    message = capsys.readouterr().err
    rows = rows_named(kind, message)
    assert 0 < len(rows) <= kind.most and set(rows) <= set(range(48))
    assert BAD in rows or kind.task == "ppo" or kind.words
    assert "Traceback" not in message and not (run_dir / "error.log").exists()
    assert then == [digests(run_dir / "checkpoints")] or kind.install is nothing  # as they were at that moment
    checkpoints = list((run_dir / "checkpoints").iterdir())
    assert checkpoints
    for checkpoint in checkpoints:
        verify_manifest(checkpoint)
        assert all(tensor.isfinite().all() for tensor in load_file(checkpoint / "model.safetensors").values())
    assert not (run_dir / "final").exists()
    assert json.loads((run_dir / "run.json").read_text())["status"] == "running"


def skipped_of(run_dir: Path) -> dict[int, float]:
    """By step, how many steps had been left out."""
    with (run_dir / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["tag"] == "train/skipped_steps"]
    assert len({row["step"] for row in rows}) == len(rows)
    return {int(row["step"]): float(row["value"]) for row in rows}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name[:3] == "sft" else pytest.mark.nightly) for name in SKIPPED],
)
def test_a_step_is_left_out_and_a_resumed_run_leaves_out_the_same(
    name: str,
    tmp_path: Path,
    model_folder: ModelFolder,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The bad row is in one step of each of three epochs, and is good the first time; resumed between the other two."""
    kind = KINDS[name]
    data, model = WRITERS[kind.task](tmp_path / "rows.jsonl"), model_folder()
    words = [*SAVES, *kind.words, "task.max_skipped_steps=9"]
    with monkeypatch.context() as patch:
        kind.install(patch, kind.spoil)
        whole = train(model, data, tmp_path / "whole", *words, task=kind.task)
    printed = capsys.readouterr().err
    last = json.loads((whole / "checkpoints" / "step-24" / "state.json").read_text())["skipped_steps"]
    assert last == printed.count("left out a step") >= 1 and f"{last} of at most 9: the step's loss is" in printed
    if kind.task == "ppo":  # the means of a turn are of the steps that were taken
        assert ",nan," not in (whole / "metrics.csv").read_text()
    counted = skipped_of(whole)
    assert list(counted.values()) == sorted(counted.values()) and counted[24] == last
    assert all(t.isfinite().all() for t in load_file(whole / "checkpoints" / "step-24" / "model.safetensors").values())
    saved = {
        step: json.loads((whole / "checkpoints" / f"step-{step}" / "state.json").read_text())["skipped_steps"]
        for step in (int(path.name[5:]) for path in (whole / "checkpoints").iterdir())
    }
    begin = max(step for step in saved if saved[step] < last)
    resumed = killed(shutil.copytree(whole, tmp_path / "resumed"), begin)
    SKIPPED[name](monkeypatch, kind.spoil)
    train(model, data, resumed, *words, "resume=true", task=kind.task)
    assert result_of(resumed) == result_of(whole)
    assert without_time(resumed / "metrics.csv") == without_time(whole / "metrics.csv")
    state = "checkpoints/step-24/state.json"
    assert (resumed / state).read_bytes() == (whole / state).read_bytes()


def test_no_more_steps_are_left_out_than_allowed(
    tmp_path: Path, model_folder: ModelFolder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And it may be allowed afterwards: the option is no other configuration."""
    data, model, kind = write_rows(tmp_path / "rows.jsonl"), model_folder(), KINDS["sft: loss NaN"]
    words = [*SAVES, "task.epochs=2", "task.num_sample_prompts=0"]
    in_loss(sft, "sft_loss", 1)(monkeypatch, kind.spoil)  # in both epochs
    with pytest.raises(SystemExit) as stopped:
        train(model, data, tmp_path / "run", *words, "task.max_skipped_steps=1")
    assert stopped.value.code == 1
    printed = capsys.readouterr().err
    assert printed.count("1 of at most 1") == 1 and re.search(kind.says, printed.rpartition("left out")[2])
    train(model, data, tmp_path / "run", *words, "task.max_skipped_steps=2", "resume=true")
    assert "2 of at most 2" in capsys.readouterr().err


PATCH = """
import os
from tests.faults.test_nonfinite import KINDS
class patch:
    setattr = staticmethod(setattr)
kind = KINDS[NAME]
if RANK is None or int(os.environ.get("LOCAL_RANK", "0")) == RANK:
    kind.install(patch, kind.spoil)
"""
ON_ONE_RANK = (  # a row is one rank's: the fault is installed on both; another kind is of one rank's doing
    ("sft: loss NaN", None),
    ("sft: gradient NaN", None),
    ("rm: score infinite", None),
    ("dpo: logits of one token NaN", None),
    ("ppo: reward NaN", 0),
    ("ppo: gradient NaN", None),
)


@pytest.mark.parametrize(
    ("name", "rank"),
    [
        pytest.param(*case, marks=pytest.mark.nightly)  # tests/distributed/test_update.py tests it without a run
        for case in ON_ONE_RANK
    ],
)
def test_one_process_stops_both(
    name: str, rank: int | None, server: JobServer, tmp_path: Path, model_folder: ModelFolder
) -> None:
    kind = KINDS[name]
    data = WRITERS[kind.task](tmp_path / "rows.jsonl")
    words = train_words(model_folder(), data, tmp_path / "run", *SAVES, *kind.words, task=kind.task)
    patch = PATCH.replace("NAME", repr(name)).replace("RANK", repr(rank))
    job = server.start_ranks(words, tmp_path / "log", 2, patch)
    codes = [process.wait(240) for process in job.ranks]
    text = job.texts()
    assert codes == [1, 1], text
    assert "Traceback" not in text
    if kind.task != "ppo" and "gradient" not in name:
        assert re.search(rf"rank [01]: rows \[.*\b{BAD}\b", job.text())
        assert len(re.findall(r"rank [01]: rows", job.text())) == 1  # that rank's rows alone, said once by each
    else:
        assert len(re.findall(r"not finite, for response|its gradient norm nan", job.text())) == 1
    for checkpoint in (tmp_path / "run" / "checkpoints").iterdir():
        verify_manifest(checkpoint)
