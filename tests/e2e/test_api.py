"""The public Python API: jobs with results and exceptions, parts of custom loops, the examples, a Jupyter kernel."""

import importlib
import json
import math
import os
import pkgutil
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import sheeprlhf
from sheeprlhf import (
    collate,
    evaluate,
    launch,
    load_policy,
    load_reward_model,
    load_tokenizer,
    losses,
    prepare_data,
    sample,
    train,
)
from sheeprlhf.apps.pipeline import Children
from sheeprlhf.engine.rundir import is_finished
from sheeprlhf.utils.errors import ConfigError, DataError, Interrupted, SheepError
from tests.support.models import ModelFolder
from tests.support.plain import response_logprobs
from tests.support.runs import train_words, write_pairs, write_rows

ROOT = Path(__file__).parents[2]


def words(folder: Path, model: Path, *extra: str) -> list[str]:
    """Options of a run of two steps."""
    data = write_rows(folder / "rows.jsonl")
    start = train_words(model, data, folder)[1:-1]
    return [*start, f"root_dir={folder / 'runs'}", "task.max_num_steps=2", *extra]


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = "import sys, sheeprlhf; dir(sheeprlhf); print({'torch', 'hydra', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "set()\n"
    assert set(sheeprlhf.__all__) <= set(dir(sheeprlhf))
    with pytest.raises(AttributeError):
        sheeprlhf.nonsense  # noqa: B018


def test_jobs_follow_each_other_in_one_process(
    tmp_path: Path, model_folder: ModelFolder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (dict(os.environ), list(sys.argv), [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)])
    options = words(tmp_path, model_folder())
    first = train(options)
    assert [step for step, _ in first.metrics["train/loss"]] == [1, 2]
    capsys.readouterr()
    with pytest.raises(ConfigError) as caught:
        train([*options, "optim.lr=-1", "task.epochss=3"])
    assert len(caught.value.problems) == 2
    (tmp_path / "bad.jsonl").write_text("{]\n")
    with pytest.raises(DataError):
        train([*options, f"data.train_file={tmp_path / 'bad.jsonl'}"])
    assert "bad.jsonl" not in capsys.readouterr().err
    second = train(options)
    assert second.directory != first.directory
    assert second.metrics["train/loss"] == first.metrics["train/loss"]
    assert (dict(os.environ), sys.argv, [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]) == before
    result = evaluate({"task": "perplexity", "experiment_dir": str(second.directory), "task.num_samples": 8})
    assert result["rows"] == 8
    assert result["weights"] == "final"
    policy, tokenizer = load_policy(str(second.directory)), load_tokenizer(str(second.directory))
    rows = prepare_data(str(tmp_path / "rows.jsonl"), tokenizer, max_length=120, max_prompt_length=70)
    batch = collate(rows.splits["train"].examples(range(4)), policy)
    assert policy(batch).target_N.shape == batch.target_ids_N.shape
    with pytest.raises(ConfigError, match="finetune_mode"):
        load_policy(str(second.directory), finetune_mode="LORA")
    monkeypatch.setenv("HOME", str(second.directory.parent))
    assert_close(load_policy(f"~/{second.directory.name}").state_dict(), policy.state_dict(), rtol=0, atol=0)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "logs").mkdir()
    (tmp_path / "runs").rename(tmp_path / "logs" / "runs")
    assert_close(load_policy("newest").state_dict(), policy.state_dict(), rtol=0, atol=0)


def test_a_run_of_another_kind_is_not_loaded(tmp_path: Path, model_folder: ModelFolder) -> None:
    """The layers of a reward model would make a policy, without a word."""
    options = train_words(model_folder(), write_pairs(tmp_path / "pairs.jsonl"), tmp_path / "run", task="rm")[1:]
    run = str(train([*options, "task.max_num_steps=1"]).directory)
    assert load_reward_model(run) and load_tokenizer(run)
    with pytest.raises(ConfigError, match="reward model"):
        load_policy(run)


def test_a_newer_run_of_the_same_configuration_is_not_returned(
    tmp_path: Path, model_folder: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_task, copies = launch._run_task, []

    def run_beside_another(config: Any, directory: Path) -> None:
        run_task(config, directory)
        info = json.loads((directory / "run.json").read_text())
        copies.append(shutil.copytree(directory, directory.parent / "newer"))
        (copies[0] / "run.json").write_text(json.dumps(info | {"order": info["order"] + 60}))

    monkeypatch.setattr(launch, "_run_task", run_beside_another)
    arguments = list(sys.argv)
    run = train(words(tmp_path, model_folder(), "task.max_num_steps=1"))
    assert is_finished(copies[0])
    assert (run.directory.name, run.directory.parent) == ("default", copies[0].parent)
    assert sys.argv == arguments


def test_a_training_runs_in_another_thread_than_the_main_one(tmp_path: Path, model_folder: ModelFolder) -> None:
    found = []
    options = words(tmp_path, model_folder(), "task.max_num_steps=1")
    thread = threading.Thread(target=lambda: found.append(train(options)))
    thread.start()
    thread.join()
    assert len(found[0].metrics["train/loss"]) == 1


@pytest.mark.nightly
def test_a_job_on_several_devices_has_processes_of_its_own(tmp_path: Path, model_folder: ModelFolder) -> None:
    options = words(tmp_path, model_folder(), "fabric.devices=2")
    run = train(options)
    assert [step for step, _ in run.metrics["train/loss"]] == [1, 2]


def test_a_job_whose_processes_fail_is_an_error(
    tmp_path: Path, model_folder: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`test_two_processes.py` tests the exit code of the processes."""
    monkeypatch.setattr(Children, "run", lambda self, words, output=None: 2)
    with pytest.raises(SheepError, match="exit code 2"):
        train(words(tmp_path, model_folder(), "fabric.devices=2"))


def test_samples_depend_on_the_seed_and_match_the_policy(model_folder: ModelFolder) -> None:
    model = str(model_folder())
    policy, tokenizer = load_policy(model), load_tokenizer(model)
    options = {"num_responses": 3, "max_new_tokens": 6, "seed": 1}
    samples = sample(policy, tokenizer, ["hello", "the quick fox"], **options)
    batch = collate(samples.examples, policy)
    with torch.no_grad():
        assert_close(policy.eval()(batch).target_N, samples.logprobs_N, rtol=1e-5, atol=1e-5)
    assert [len(texts) for texts in samples.texts] == [3, 3]
    assert sample(policy, tokenizer, ["hello", "the quick fox"], **options).texts == samples.texts
    assert sample(policy, tokenizer, ["hello", "the quick fox"], **options | {"seed": 2}).texts != samples.texts


def test_an_unknown_kind_of_rows_is_an_error_with_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match="did you mean preference"):
        prepare_data(kind="preferences")


def test_a_pair_in_a_custom_loop_has_the_loss_of_plain_transformers(tmp_path: Path, model_folder: ModelFolder) -> None:
    """Of a policy and a reference with other weights; computed response by response."""
    folders = model_folder(), model_folder("gpt2")
    tokenizer = load_tokenizer(str(folders[0]))
    data = prepare_data(str(write_pairs(tmp_path / "pairs.jsonl")), tokenizer, kind="preference")
    [example] = data.splits["train"].examples([0])
    found, expected = [], []
    for folder in folders:
        policy, plain = load_policy(str(folder)), AutoModelForCausalLM.from_pretrained(folder).eval()
        batch = collate([example], policy)
        with torch.no_grad():
            found.append(torch.zeros(2).index_add(0, batch.response_index_N, policy.eval()(batch).target_N))
            for response in example.responses:
                logprobs_N = response_logprobs(plain, example.prompt_ids, response, num_ids=len(tokenizer))
                expected.append(float(logprobs_N.sum()))
    assert_close(torch.stack(found).flatten(), torch.tensor(expected), rtol=1e-5, atol=1e-5)
    margin = (expected[0] - expected[2]) - (expected[1] - expected[3])
    [chosen, rejected] = batch.pairs_P2[0].tolist()
    h_S = found[0] - found[1]
    loss_P = losses.dpo.sigmoid(h_S[[chosen]], h_S[[rejected]], 0.1)
    assert_close(loss_P, torch.tensor([math.log1p(math.exp(-0.1 * margin))]), rtol=1e-5, atol=1e-5)


def test_a_reward_model_scores_as_in_plain_transformers(tmp_path: Path, model_folder: ModelFolder) -> None:
    folder, tokenizer = tmp_path / "rm", load_tokenizer(str(model_folder()))
    plain = AutoModelForSequenceClassification.from_pretrained(model_folder(), num_labels=1, pad_token_id=0)
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    reward = load_reward_model(str(folder))
    data = prepare_data(str(write_rows(tmp_path / "rows.jsonl")), tokenizer)
    examples = data.splits["train"].examples([0, 1])
    with torch.no_grad():
        scores = reward(collate(examples, reward, targets="last"))
        for score, example in zip(scores, examples, strict=True):
            ids = torch.tensor([[*example.prompt_ids, *example.responses[0]]])
            assert_close(score, plain.model(ids).last_hidden_state[0, -1] @ plain.score.weight[0], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dpo_loop", "grpo_loop"])
def test_an_example_learns_in_less_than_forty_lines(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    assert len((ROOT / "examples" / f"{name}.py").read_text().splitlines()) < 40
    history = importlib.import_module(name).main(steps=4)
    if name == "dpo_loop":  # the loss of two equal policies, then less
        assert_close(history[0], 0.6931472, rtol=1e-5, atol=1e-5)
        assert history[-1] < history[0]
    else:
        assert history[-1] > history[0]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, model_folder: ModelFolder) -> tuple[list[str], Any]:
    """Options of a run of two steps, and the run."""
    options = words(tmp_path_factory.mktemp("undisturbed"), model_folder())
    return options, train(options)


@pytest.mark.parametrize(
    ("place", "newest", "saved"),  # the newest checkpoint; None: there is none
    [
        ("api.jobs.compose_job", None, False),
        ("launch.check_inputs_exist", None, False),
        ("task.loop.load_initial_policy", None, False),
        ("engine.run.open_trackers", 1, True),
        ("task.loop.update", 1, True),
        ("task.loop.finish_run", 2, True),
        ("api.jobs._read_metrics", 2, False),
    ],
)
def test_one_interrupt_raises_interrupted_wherever_it_comes(
    place: str, newest: int | None, saved: bool, undisturbed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, expected = undisturbed
    module, _, name = place.rpartition(".")
    owner = pkgutil.resolve_name(f"sheeprlhf.{module}")
    call = getattr(owner, name)

    def interrupting(*args: Any, **kwargs: Any) -> Any:
        monkeypatch.setattr(owner, name, call)
        signal.raise_signal(signal.SIGINT)
        return call(*args, **kwargs)

    monkeypatch.setattr(owner, name, interrupting)
    before = signal.getsignal(signal.SIGINT)
    options = [*options, f"hydra.run.dir={tmp_path / 'run'}"]
    with pytest.raises(Interrupted) as caught:
        train(options)
    assert (caught.value.exit_code, caught.value.saved) == (130, saved)
    assert signal.getsignal(signal.SIGINT) is before
    assert [path.name for path in tmp_path.glob("run/checkpoints/*")] == ([f"step-{newest}"] if newest else [])
    if newest is not None:
        assert train([*options, "resume=true"]).metrics["train/loss"] == expected.metrics["train/loss"]


@pytest.mark.parametrize("hidden", [LookupError, None])
def test_an_interrupt_that_a_library_hides_raises_interrupted(
    hidden: type[Exception] | None, tmp_path: Path, model_folder: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def locate(*_: Any) -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            if hidden is not None:
                raise hidden from None

    monkeypatch.setattr(launch, "_check_weights", locate)
    with pytest.raises(Interrupted):
        train(words(tmp_path, model_folder()))


def test_a_second_interrupt_raises_keyboard_interrupt(
    tmp_path: Path, model_folder: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def twice(*_: Any, **__: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("sheeprlhf.task.loop.update", twice)
    with pytest.raises(KeyboardInterrupt):
        train(words(tmp_path, model_folder()))


@pytest.mark.slow
def test_a_notebook_trains_reports_errors_and_survives_an_interrupt(tmp_path: Path, model_folder: ModelFolder) -> None:
    pytest.importorskip("ipykernel")
    manager = pytest.importorskip("jupyter_client.manager")
    options = words(tmp_path, model_folder())
    kernel, client = manager.start_new_kernel(kernel_name="python3", cwd=str(ROOT))

    def cell(code: str, *, interrupt_at: str = "") -> tuple[str, str]:
        """Everything that a cell prints, and the name of its error."""
        texts: list[str] = []

        def output(message: dict) -> None:
            texts.append(message["content"].get("text", ""))
            if interrupt_at and interrupt_at in texts[-1]:
                kernel.interrupt_kernel()

        reply = client.execute_interactive(code, timeout=240, output_hook=output)
        return "".join(texts), reply["content"].get("ename", "")

    try:
        assert cell(f"from sheeprlhf import train, evaluate\noptions = {options!r}\nrun = train(options)")[1] == ""
        assert cell("train([*options, 'optim.lr=abc'])") == ("", "ConfigError")
        printed, error = cell("assert train(options).metrics['train/loss'] == run.metrics['train/loss']")
        assert error == ""
        assert "\r" not in printed
        long = "[*options, 'task.max_num_steps=null', 'task.epochs=500', 'resume=true']"
        assert cell(f"train({long})", interrupt_at="starting at step 0")[1] == "Interrupted"
        assert cell("print(train(options).directory)")[1] == ""
    finally:
        client.stop_channels()
        kernel.shutdown_kernel(now=True)
