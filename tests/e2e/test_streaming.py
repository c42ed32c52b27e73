"""Training on shards that are prepared one by one: the run of all rows, and a resumed run the uninterrupted one."""

import re
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
from safetensors.torch import load_file
from torch.testing import assert_close

from sheeprlhf.data.prepare import Stream
from tests.support.jobs import JobServer
from tests.support.models import ModelFolder
from tests.support.runs import WRITERS, digests, figures, killed, rejected, result_of, train, train_words

LORA = ["model.finetune_mode=LORA", "model.lora_cfg.rank=4"]


class Case(NamedTuple):
    """A task, more words of its command, its last step, and the checkpoints after which it is resumed."""

    task: str
    words: list[str]
    last: int
    cuts: tuple[int, ...]


# Steps of 6 rows: files of 2, 2 and 3 steps; 11 steps end in the second pass. RL: rollouts of 12 prompts, 4 steps each.
ROWS = (12, 10, 14)
CASES = {
    "sft": Case("sft", [], 11, (4, 5)),  # the last step of a file, and one inside of the next
    "rm": Case("rm", [], 11, (5,)),
    "dpo": Case("dpo", [], 11, (5,)),
    "dpo, lora": Case("dpo", [*LORA, "model.lora_cfg.dropout=0.1"], 11, (5,)),
    "kto": Case("kto", [], 11, (5,)),
    "grpo": Case("grpo", ["task.save_rollouts=3"], 21, (8, 12)),
    "ppo": Case("ppo", ["task.share_trunk=true", "task.ptx_coeff=0.5", "task.ptx_batch_size=3"], 21, (12,)),
    "online_dpo": Case("online_dpo", [], 21, (8,)),
}


def words_of(tmp_path: Path, case: Case, rows: tuple[int, ...]) -> list[str]:
    (tmp_path / "rows").mkdir()
    for number, count in enumerate(rows):
        WRITERS[case.task](tmp_path / "rows" / f"{number}.jsonl", count, seed=number)
    words = [f"data.train_file={tmp_path / 'rows'}", f"data.cache_dir={tmp_path / 'cache'}", "task.epochs=1"]
    return [*words, *case.words, f"task.max_num_steps={case.last}", "task.save_interval=1", "task.keep_checkpoints=30"]


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """No further process prepares the next shard: `prepare` does it."""
    monkeypatch.setattr(Stream, "prepare_ahead", lambda self, number: None)


@pytest.mark.parametrize(
    "name", [name if name == "sft" else pytest.param(name, marks=pytest.mark.nightly) for name in CASES]
)
def test_a_resumed_stream_is_the_uninterrupted_one(
    name: str, tmp_path: Path, model_folder: ModelFolder, capsys: pytest.CaptureFixture[str], in_this_process: None
) -> None:
    case = CASES[name]
    words = [*words_of(tmp_path, case, ROWS), "data.streaming=true"]
    held_out = WRITERS[case.task](tmp_path / "val.jsonl", 6, seed=9)
    whole = train(model_folder(), held_out, tmp_path / "whole", *words, task=case.task)
    if name == "sft":
        assert figures(whole)["train/epoch"] == pytest.approx(
            [*(k / 6 for k in range(1, 5)), 7 / 9, 8 / 9, 1, *(1 + k / 6 for k in range(1, 5))]
        )
    folders = [path for path in (tmp_path / "cache" / "data").iterdir() if not path.name.startswith(".")]
    assert len(folders) == 2  # the first and the newest
    expected = result_of(whole, case.last)
    for step in case.cuts:
        shutil.rmtree(tmp_path / "cache")
        cut = killed(shutil.copytree(whole, tmp_path / f"cut-{step}"), step)
        train(model_folder(), held_out, cut, *words, "resume=true", task=case.task)
        assert result_of(cut, case.last) == expected
        losses = "train/loss" if "train/loss" in figures(whole) else "loss/policy"
        assert figures(cut)[losses] == figures(whole)[losses]
        assert digests(cut / "rollouts") == digests(whole / "rollouts")
    if name == "sft":
        changed = tmp_path / "rows" / "1.jsonl"  # of the same size
        changed.write_text(changed.read_text().replace("a", "b"))
        line = train_words(model_folder(), held_out, killed(cut, 3), *words, "resume=true")
        assert "shard 2 " in rejected(line, capsys)


@pytest.mark.parametrize(("name", "step"), [("sft", 2), pytest.param("grpo", 4, marks=pytest.mark.nightly)])
def test_a_run_saves_its_state_before_it_ends_at_a_shard_that_cannot_be_read(
    name: str,
    step: int,
    tmp_path: Path,
    model_folder: ModelFolder,
    capsys: pytest.CaptureFixture[str],
    in_this_process: None,
) -> None:
    """There is no other checkpoint than that of the failure; the state goes on to the end of the whole run."""
    case = CASES[name]
    words = [*words_of(tmp_path, case, ROWS), "data.streaming=true", "task.save_interval=99"]
    held_out = WRITERS[case.task](tmp_path / "val.jsonl", 6, seed=9)
    whole = train(model_folder(), held_out, tmp_path / "whole", *words, task=case.task)
    shutil.rmtree(tmp_path / "cache")
    second = tmp_path / "rows" / "1.jsonl"
    content = second.read_text()
    second.write_text(content.replace("{", "[", 1))
    rejected(train_words(model_folder(), held_out, tmp_path / "run", *words, task=case.task), capsys)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [f"step-{step}"]
    second.write_text(content)
    run = train(model_folder(), held_out, tmp_path / "run", *words, "resume=true", task=case.task)
    assert digests(run / "final") == digests(whole / "final")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name == "dpo" else pytest.mark.nightly)
        for name in CASES
        if name != "kto"
    ],
)
def test_a_stream_in_the_order_of_the_files_is_the_run_of_all_rows(
    name: str, tmp_path: Path, model_folder: ModelFolder, in_this_process: None
) -> None:
    """Each file ends with a step or a rollout. The reference of later shards is the policy before its first step."""
    case = CASES[name]._replace(last=12 if CASES[name].last == 21 else 6)
    words = [*words_of(tmp_path, case, (12, 12, 12)), "data.shuffle=false"]
    words += ["task.normalize_on=none"] if name == "rm" else []  # its offset is of the last shard
    words += ["task.ptx_coeff=0"] if name == "ppo" else []  # its rows are drawn from the shard
    held_out = WRITERS[case.task](tmp_path / "val.jsonl", 6, seed=9)
    streamed, whole = tmp_path / "streamed", tmp_path / "whole"
    train(model_folder(), held_out, streamed, *words, "data.streaming=true", task=case.task)
    train(model_folder(), held_out, whole, *words, task=case.task)
    assert result_of(streamed, case.last) == result_of(whole, case.last)


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["sft", "dpo", "grpo"])
def test_a_process_killed_inside_the_second_shard_is_resumed(
    name: str, server: JobServer, tmp_path: Path, model_folder: ModelFolder
) -> None:
    """One file in parts; a real process, its child that prepares ahead included, ends by `kill -9`."""
    case = CASES[name]
    data, held_out = (WRITERS[case.task](tmp_path / f"{part}.jsonl", 48, seed=9) for part in ("train", "val"))
    size = data.stat().st_size / 3.5 / 2**20  # four shards
    words = [
        *case.words,
        f"data.train_file={data}",
        "data.streaming=true",
        f"data.shard_size={size:.9f}",
        "task.epochs=1",
    ]
    words += ["task.max_num_steps=14", "task.save_interval=1", "task.keep_checkpoints=30"]

    def start(run_dir: Path, *more: str) -> list[str]:
        cache = f"data.cache_dir={run_dir}-cache"
        return train_words(model_folder(), held_out, run_dir, *words, cache, *more, task=case.task)

    job = server.start(start(tmp_path / "whole"), tmp_path / "whole.log")
    assert job.wait(600) == 0, job.text()
    killed = tmp_path / "killed"
    job = server.start(start(killed), tmp_path / "killed.log")
    job.wait_for("shard 2 of 4", 600)
    before = len(list((killed / "checkpoints").glob("step-?")))
    while len(list((killed / "checkpoints").glob("step-?"))) <= before and job.poll() is None:
        pass
    job.kill()
    assert job.wait() == -9, job.text()
    job = server.start(start(killed, "resume=true"), tmp_path / "resumed.log")
    assert job.wait(600) == 0, job.text()
    assert re.findall(r"shard (\d) of 4", job.text())[0] == "2"
    assert result_of(killed, 14) == result_of(tmp_path / "whole", 14)


@pytest.mark.nightly
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("name", ["sft", "dpo", "kto", "grpo"])
def test_two_processes_stream_as_one(
    name: str, strategy: str, server: JobServer, tmp_path: Path, model_folder: ModelFolder, in_this_process: None
) -> None:
    case = CASES[name]
    words = [*words_of(tmp_path, case, ROWS), "data.streaming=true"]
    held_out = WRITERS[case.task](tmp_path / "val.jsonl", 6, seed=9)
    sharded = f"fabric.strategy={strategy}"
    two = train_words(model_folder(), held_out, tmp_path / "two", *words, sharded, task=case.task)
    job = server.start_ranks(two, tmp_path / "log", 2)
    train(model_folder(), held_out, tmp_path / "one", *words, f"data.cache_dir={tmp_path / 'other'}", task=case.task)
    assert job.wait(600) == 0, job.text()
    weights = [load_file(tmp_path / run_dir / "final" / "model.safetensors") for run_dir in ("one", "two")]
    assert_close(*weights, rtol=0, atol=1e-5)
