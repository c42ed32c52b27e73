"""`pipeline`: what is checked, run, skipped, resumed and told; the stages themselves only pretend to run."""

import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from sheeprlhf.apps.pipeline import differences, figures_of, write_results
from sheeprlhf.config.pipeline import Stage
from tests.support.pipelines import SMALL, Pretended, folders, pipeline, write_recipe


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def pretended(monkeypatch):
    return Pretended(monkeypatch)


@pytest.fixture
def unchecked(monkeypatch):
    """For what comes after the check of the stages, which takes seconds."""
    monkeypatch.setattr("sheeprlhf.apps.pipeline.check_stages", lambda stages, flags: None)


@pytest.fixture
def small(tmp_path):
    return [write_recipe(tmp_path / "own"), "experiment=small"]


def test_every_stage_is_checked_before_the_first_begins(small, pretended, capsys, tmp_path):
    assert pipeline(*small, "model=oppt", "rm.optim.lr=-1", "dpo.task.betta=1", "text.task=rougge", "task.epoch=3") == 2
    printed = capsys.readouterr().err
    assert "model=oppt" in printed
    assert "rm: optim.lr=-1" in printed
    assert "task.betta" in printed
    assert "task.epochs" in printed
    assert "task=rougge" in printed
    assert "is not a directory" not in printed  # the runs that will be made
    assert pretended.commands == []
    assert not (tmp_path / "logs").exists()


def test_a_chain_that_does_not_fit_is_refused(small, pretended, capsys):
    assert pipeline(*small, "rm.model=gpt2") == 2
    assert "rm: task.sft_experiment_dir=" in capsys.readouterr().err
    assert pretended.commands == []


def test_stages_run_in_order_each_in_its_folder(small, pretended, unchecked, capsys, tmp_path):
    assert pipeline(*small, "rm.task.epochs=3", "seed=7") == 0
    [folder] = folders(tmp_path / "logs" / "pipelines")
    sft, rm, _, text = pretended.commands
    start = [f"--config-dir={tmp_path}/own", "model=tiny", "task.max_num_steps=9"]
    assert sft == ["train", *start, "task=sft", "task.epochs=2", "seed=7", f"hydra.run.dir={folder}/sft"]
    assert rm[4:] == [
        *("task=rm", f"task.sft_experiment_dir={folder}/sft", "seed=7", "task.epochs=3", f"hydra.run.dir={folder}/rm")
    ]
    assert text == ["eval", start[0], "-m", "task=perplexity", f"experiment_dir={folder}/sft,{folder}/dpo", "seed=7"]
    printed = capsys.readouterr().out.splitlines()
    assert f"[2/4] rm: python sheeprlhf.py {' '.join(rm)}" in printed
    assert sum(" finished after 0 s" in line for line in printed) == 4
    state = json.loads((folder / "pipeline.json").read_text())
    assert [record["status"] for record in state["stages"].values()] == ["finished"] * 4
    assert state["stages"]["rm"]["command"] == rm[:-1]
    assert pretended.reports == [[str(folder), f"--to={folder}/report.html"]]
    assert folder.stat().st_mode & 0o777 == 0o700


def test_a_failing_stage_ends_it_and_the_command_goes_on_there(small, pretended, unchecked, capsys, tmp_path):
    pretended.codes = {"task=dpo": 3}
    assert pipeline(*small, "seed=5", "resume=true", "dpo.task.beta=0.3") == 3
    [folder] = folders(tmp_path / "logs" / "pipelines")
    printed = capsys.readouterr().out
    assert "[3/4] dpo: failed with exit code 3 after 0 s" in printed
    again = f"pipeline --config-dir={tmp_path}/own experiment=small seed=5 dpo.task.beta=0.3 resume_from={folder}"
    assert f": python sheeprlhf.py {again}\n" in printed
    assert pretended.stages() == ["sft", "rm", "dpo"]
    pretended.codes = {}
    assert pipeline(*again.split()[1:]) == 0
    assert "resume=true" in pretended.commands[0]  # the run of the stage goes on as well
    assert pretended.stages() == ["dpo", "perplexity"]
    assert "[1/4] sft: finished before" in capsys.readouterr().out
    assert (
        pipeline(*small, "seed=5", "dpo.task.beta=0.3", "resume=true") == 0
    )  # the newest of this recipe: nothing is left to do
    assert pretended.stages() == []
    assert len(folders(tmp_path / "logs" / "pipelines")) == 1


def test_a_stopped_stage_tells_the_command_and_its_signal(small, unchecked, monkeypatch, capsys):
    def stopped(children, words, **_):
        children.forward_signal(15)
        return 0  # it had just finished

    monkeypatch.setattr("sheeprlhf.utils.processes.Children.run", stopped)
    assert pipeline(*small) == 143
    assert "sheeprlhf.py" in capsys.readouterr().out


def test_a_killed_pipeline_keeps_the_seconds_of_its_stage(small, unchecked, monkeypatch, tmp_path):
    """Kill -9 leaves no time to write them: they are written while the stage runs, and added to those after it."""
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now, time=time.time, strftime=time.strftime)
    monkeypatch.setattr("sheeprlhf.apps.pipeline.time", clock)

    def killed(children, words, while_it_runs):
        clock.now += 50.0
        while_it_runs()
        raise KeyboardInterrupt

    monkeypatch.setattr("sheeprlhf.utils.processes.Children.run", killed)
    assert pipeline(*small) == 130
    assert pipeline(*small, "resume=true") == 130
    [folder] = folders(tmp_path / "logs" / "pipelines")
    assert json.loads((folder / "pipeline.json").read_text())["stages"]["sft"]["seconds"] == 100.0


def test_another_recipe_is_refused_with_the_difference(small, pretended, unchecked, capsys, tmp_path):
    pretended.codes = {"task=rm": 1}
    assert pipeline(*small) == 1
    [folder] = folders(tmp_path / "logs" / "pipelines")
    pretended.stages()
    for resume in ("resume=true", f"resume_from={folder}"):
        assert pipeline(*small, resume, "rm.task.epochs=4", "dpo.task.max_num_steps=8") == 2
        printed = capsys.readouterr().err
        assert "task.epochs" in printed
        assert "task.max_num_steps" in printed
    assert pretended.stages() == []
    pretended.codes = {}
    # how it is cut and where it runs may change, as for a run
    assert pipeline(*small, "resume=true", "task.token_budget=512", "fabric=auto") == 0
    assert pretended.stages() == ["rm", "dpo", "perplexity"]


def test_stages_can_be_left_out_and_made_later(small, pretended, unchecked, capsys, tmp_path):
    assert pipeline(*small, "skip=[sft]") == 2
    assert "skip=[sft" in capsys.readouterr().err
    assert pipeline(*small, "skip=[rm,dpo]") == 0
    [*_, text] = pretended.commands
    assert text[4].endswith("/sft")
    assert pretended.stages() == ["sft", "perplexity"]
    folder = folders(tmp_path / "logs" / "pipelines")[-1]
    assert pipeline(*small, f"resume_from={folder}") == 0
    assert pretended.stages() == ["rm", "dpo", "perplexity"]  # the evaluation again: it had not seen dpo
    assert pipeline(*small, f"resume_from={folder}", "skip=[sft]") == 0  # it is finished: others may need it
    assert pretended.stages() == []


def test_two_pipelines_do_not_share_a_folder(small, unchecked, monkeypatch, capsys, tmp_path):
    inner = []

    def nested(children, words, **_):
        inner.append(pipeline(*small, f"resume_from={folders(tmp_path / 'logs' / 'pipelines')[0]}"))
        return 1

    monkeypatch.setattr("sheeprlhf.utils.processes.Children.run", nested)
    assert pipeline(*small) == 1
    assert inner == [2]
    assert "in use" in capsys.readouterr().err


def test_a_recipe_that_is_a_strangers_cannot_add_words(pretended, capsys, tmp_path):
    content = SMALL + "words: [sft.model.library_cfg.trust_remote_code=true]\n"
    assert pipeline(write_recipe(tmp_path / "own", content), "experiment=small") == 2
    assert "words" in capsys.readouterr().err
    assert pretended.commands == []


@pytest.mark.parametrize(
    ("now", "said"),
    [
        ({"a": ["train", "x=1"], "b": ["eval"]}, []),
        ({"a": ["train", "x=2"], "b": ["eval", "-m"]}, ["a: x was 1 and is 2", "b: -m was not given and is given"]),
        ({"a": ["train", "x=1", "fabric=cpu", "task.token_budget=9", "resume=true"], "b": ["eval"]}, []),
        ({"b": ["eval"], "a": ["train", "x=1"]}, ["the order was a, b and is b, a"]),
        ({"a": ["train", "x=1"], "c": ["eval"]}, ["stage b is gone", "stage c is new"]),
        ({"a": ["eval", "x=1"], "b": ["eval"]}, ["a: train was given and is not given", "a: eval was not given"]),
    ],
)
def test_the_differences_of_recipes(now, said):
    found = list(differences({"a": ["train", "x=1"], "b": ["eval"]}, now))
    assert len(found) == len(said)
    assert all(text.startswith(part) for part, text in zip(said, found, strict=True))


def write_eval(run_dir: Path, name: str, **record) -> None:
    (run_dir / "eval").mkdir(parents=True, exist_ok=True)
    usual = {"split": "test", "weights": "final"}
    (run_dir / "eval" / f"{name}.json").write_text(json.dumps(usual | record))


def test_the_table_is_what_the_evaluations_found(tmp_path):
    for name, share, score in (("sft", 0.448, -1.5), ("ppo", 0.9652, 4.321)):
        write_eval(tmp_path / name, "reward-imperative-test-final", task="reward", score=share, kl=2.0, win_rate=0.1)
        write_eval(tmp_path / name, "reward-model-test-final", task="reward", score=score, win_rate=0.71, kl=2.345)
        write_eval(tmp_path / name, "perplexity-test-final", task="perplexity", perplexity=19.216, tokens=4)
        write_eval(tmp_path / name, "rouge-test-final", task="rouge", rougeL=25.21, rows=9)
    write_eval(tmp_path / "rm", "preference-test-final", task="preference", accuracy=0.9912, pairs=1250)
    write_eval(tmp_path / "sft", "perplexity-test-best", task="perplexity", perplexity=1.0, weights="best")
    write_eval(tmp_path / "sft", "perplexity-train-final", task="perplexity", perplexity=1.0, split="train")
    write_eval(tmp_path / "rm", "odd-test-final", task="perplexity", perplexity=float("nan"))
    (tmp_path / "rm" / "eval" / "broken.json").write_text("{")
    stages = [Stage(name, "train", (), ()) for name in ("sft", "rm", "ppo", "dpo")] + [Stage("text", "eval", (), ())]
    state = {"stages": {name: {"seconds": 61.04} for name in ("sft", "rm", "ppo", "text")}}
    write_results(tmp_path, stages, state)
    assert (tmp_path / "results.md").read_text().splitlines() == [
        "| stage | imperative | reward | win rate | KL, nats | ROUGE-L | perplexity | pairs right | of pairs | s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        "| sft | 44.8% | -1.5 | 71.0% | 2.35 | 25.2 | 19.22 |  |  | 61 |",
        "| rm |  |  |  |  |  |  | 99.12% | 1,250 | 61 |",
        "| ppo | 96.5% | 4.32 | 71.0% | 2.35 | 25.2 | 19.22 |  |  | 61 |",
        "| text |  |  |  |  |  |  |  |  | 61 |",
    ]
    lines = (tmp_path / "results.csv").read_text().splitlines()
    assert lines[0] == "stage,imperative,reward,win_rate,kl,rouge_l,perplexity,pairs_right,pairs,seconds"
    assert lines[3] == "ppo,0.9652,4.321,0.71,2.345,25.21,19.216,,,61.0"
    records = json.loads((tmp_path / "results.json").read_text())
    assert records[1] == {"stage": "rm", "pairs_right": 0.9912, "pairs": 1250.0, "seconds": 61.0}
    assert figures_of(tmp_path / "nothing") == {}
