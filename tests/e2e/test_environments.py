"""Runs in an environment: log-probabilities by plain transformers, advantages and returns by hand, resume."""

import json
import re
import shutil
import signal
import string
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sheeprlhf.data.example import Example, collate_packed, collate_padded
from sheeprlhf.model.lm_head import TokenLogprobs
from sheeprlhf.rollout import episodes
from sheeprlhf.structure.rollout import GRPOConfig
from sheeprlhf.task.train.grpo import grpo_loss
from tests.support.environments import Lengths, calls_of_even_texts
from tests.support.jobs import JobServer
from tests.support.models import ModelFolder, byte_tokenizer
from tests.support.plain import response_logprobs
from tests.support.runs import exit_code, figures, rejected, train, train_words
from tests.support.talking import TEMPLATE

WORDS = [
    "rollout.environment=tests.support.environments:Lengths",
    "reward.path=environment",
    "generation.max_new_tokens=64",
    f"generation.stop_strings=[{','.join(string.ascii_letters)}]",  # a random model rarely writes its end token
    "data.max_prompt_length=60",
    "data.max_length=124",
    "task.max_num_steps=8",
    "task.save_rollouts=9",
]
PATCH = "from sheeprlhf.rollout import episodes; from tests.support.environments import calls_of_even_texts; "
PATCH += "episodes.parse_calls = calls_of_even_texts"  # in a job
BETWEEN = re.compile(r"(?:</s>)?\[tool\].{0,2}7\[assistant\]", re.DOTALL)


@pytest.fixture
def setting(tmp_path: Path, model_folder: ModelFolder, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A model with a chat template and a file of rows, and `calls_of_even_texts`."""
    model = Path(shutil.copytree(model_folder(), tmp_path / "model"))
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(model)
    rows = [{"prompt": [{"role": "user", "content": f"{i} and {'x' * (i % 5)}"}], "answer": "7"} for i in range(24)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(episodes, "parse_calls", calls_of_even_texts)
    return model, tmp_path / "rows.jsonl"


def saved(run_dir: Path) -> list[dict[str, Any]]:
    return [row for path in sorted((run_dir / "rollouts").iterdir()) for row in pq.read_table(path).to_pylist()]


def check_rows(rows: list[dict[str, Any]], model: Path) -> None:
    """Tokens, log-probabilities and scores of the first rollout, each response by itself."""
    plain, tokenizer = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval(), byte_tokenizer()
    num_results = 0
    for row in rows:
        trained = np.array(row["trained"])
        with torch.no_grad():
            logprobs = response_logprobs(plain, row["prompt_ids"], row["response_ids"], num_ids=len(tokenizer))
        for name in ("sampled", "logprobs", "reference"):
            torch.testing.assert_close(torch.tensor(row[name]), logprobs[trained], rtol=0, atol=1e-5)
        borders = np.flatnonzero(np.diff(trained)) + 1
        parts = np.split(np.array(row["response_ids"]), borders)
        assert trained[0] and all(BETWEEN.fullmatch(tokenizer.decode(part)) for part in parts[1::2])
        num_results += len(parts) // 2
        if row["finished"]:
            last = parts[-1][:-1] if parts[-1][-1] == tokenizer.eos_token_id else parts[-1]
            answer = tokenizer.decode(last, skip_special_tokens=True)
            expected = 0.1 * (len(parts) // 2) + Lengths().finish(answer)
            assert row["score"] == pytest.approx(expected, abs=1e-9)
        assert all(len(row[name]) == trained.sum() for name in row if name in ("advantages", "values", "returns"))
    assert num_results > len(rows) / 2 and 0 < sum(row["finished"] for row in rows) < len(rows)


@pytest.mark.slow
def test_grpo_learns_from_sampled_tokens_and_resumes_after_a_kill(
    setting: tuple[Path, Path], tmp_path: Path, server: JobServer
) -> None:
    run_dir = train(*setting, tmp_path / "whole", *WORDS, task="grpo")
    whole = saved(run_dir)
    rows = whole[:24]
    check_rows(rows, setting[0])
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        difference = first["score"] - second["score"]
        expected = difference / 2 / (abs(difference) / np.sqrt(2) + 1e-4)
        assert first["advantages"] == pytest.approx([expected] * sum(first["trained"]), abs=1e-3)
    metrics = figures(run_dir)
    assert metrics["env/reward"][0] == pytest.approx(metrics["objective/scores"][0]) and metrics["env/turns"][0] > 1
    assert metrics["env/failed"] == [0.0, 0.0] and len(metrics["val/scores"]) > 0
    resumed = tmp_path / "killed"
    words = train_words(*setting, resumed, *WORDS, "resume=true", task="grpo")
    job = server.start(words, tmp_path / "killed.log", PATCH)
    while not (resumed / "checkpoints" / "step-4").is_dir():
        assert job.poll() is None, job.text()
        time.sleep(0.005)
    job.kill()
    assert job.wait() == -signal.SIGKILL
    job = server.start(words, tmp_path / "resumed.log", PATCH)
    assert job.wait() == 0 and "after step 4" in job.text(), job.text()
    assert "rollout.environment=" in job.text().partition("next:")[2]  # of the command that evaluates it
    assert saved(resumed) == whole
    weights = [(folder / "final" / "model.safetensors").read_bytes() for folder in (run_dir, resumed)]
    assert weights[0] == weights[1]


@pytest.mark.nightly
@pytest.mark.parametrize("task", ["ppo", "rloo", "reinforce_pp", "online_dpo", "distill"])
def test_other_tasks_skip_the_tokens_of_the_environment(task: str, setting: tuple[Path, Path], tmp_path: Path) -> None:
    words = [*WORDS, "task.max_num_steps=4", "optim.lr=0"]
    words += [f"task.teacher={setting[0]}", "reward=function"] if task == "distill" else []
    words += ["task.init_kl_coeff=0.5"] if task in ("ppo", "rloo", "reinforce_pp") else []
    rows = saved(train(*setting, tmp_path / "run", *words, task=task))
    check_rows(rows, setting[0])
    if task == "online_dpo":  # nothing was learned: the same scores as the run's rollouts, and no divergence
        words = ["task=frontier", f"experiment_dir={tmp_path / 'run'}", *WORDS[:2], "reward=function", "task.best_of=2"]
        assert exit_code(["eval", *words, *WORDS[2:4], "rollout.max_turns=4"]) == 0
        [path] = (tmp_path / "run" / "eval").glob("frontier*.json")
        points = json.loads(path.read_text())["points"]
        assert points[-1]["kl"] == pytest.approx(0.0, abs=1e-4) and points[-1]["score"] > 0.1
    if task == "rloo":
        for first, second in zip(rows[::2], rows[1::2], strict=True):
            difference = first["score"] - second["score"]
            assert first["advantages"] == pytest.approx([difference] * sum(first["trained"]), abs=1e-4)
    if task == "ppo":
        for row in rows:  # KL is 0: the score alone is the reward, at the last sampled token
            advantage = 0.0
            values = [*row["values"], 0.0]
            for t in reversed(range(len(row["values"]))):
                reward = row["score"] if t == len(row["values"]) - 1 else 0.0
                advantage = reward + values[t + 1] - values[t] + 0.95 * advantage
                assert row["returns"][t] == pytest.approx(advantage + values[t], abs=1e-4)


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("task", "options"),
    [
        ("grpo", ["fabric.strategy=ddp"]),
        ("grpo", ["fabric.strategy=fsdp2", "fabric.tensor_parallel=2"]),
        ("ppo", ["fabric.strategy=fsdp2"]),
    ],
)
def test_two_processes_train_as_one(
    task: str, options: list[str], setting: tuple[Path, Path], server: JobServer, tmp_path: Path
) -> None:
    both = (*setting, tmp_path / "two"), (*setting, tmp_path / "one")
    words = train_words(*both[0], *WORDS, *options, f"data.cache_dir={tmp_path / 'cache'}", task=task)
    job = server.start_ranks(words, tmp_path / "log", 2, PATCH)
    one, two = train(*both[1], *WORDS, task=task), tmp_path / "two"
    assert job.wait(600) == 0, job.texts()
    for ours, expected in zip(saved(two), saved(one), strict=True):
        for name, value in expected.items():
            if np.asarray(value).dtype.kind == "f":
                np.testing.assert_allclose(ours[name], value, rtol=1e-5, atol=1e-5, err_msg=name)
            else:
                assert ours[name] == value, name
    weights = [load_file(run_dir / "final" / "model.safetensors") for run_dir in (two, one)]
    torch.testing.assert_close(*weights, rtol=0, atol=1e-5)


def test_evaluations_report_the_rewards_of_episodes(setting: tuple[Path, Path], tmp_path: Path) -> None:
    """The rewards of the transcripts are computed again from their texts."""
    files = [f"data.{split}_file={setting[1]}" for split in ("train", "test")]
    common = ["model=auto", f"model.repo_name={setting[0]}", "data=local", *files, *WORDS[:1], *WORDS[2:6]]
    for task, *words in (("generate", "generation.do_sample=true"), ("reward", *WORDS[1:2], "reward=function")):
        assert exit_code(["eval", f"task={task}", f"output_dir={tmp_path / 'eval'}", *common, *words]) == 0
    sampled, scored = (json.loads(path.read_text()) for path in sorted((tmp_path / "eval").glob("*.json")))
    [path] = (tmp_path / "eval").glob("generate*.jsonl")
    rewards = []
    for row in map(json.loads, path.read_text().splitlines()):
        *calls, last = BETWEEN.split(row["response"])
        rewards.append(row["episode_reward"])
        if row["finished"]:  # else the result of the last call may have had no room
            assert rewards[-1] == pytest.approx(0.1 * len(calls) + Lengths().finish(last), abs=1e-9)
    assert max(rewards) > 0.1 and sampled["env/reward"] == pytest.approx(np.mean(rewards))
    assert scored["score"] == scored["env/reward"] == sampled["env/reward"] and scored["env/turns"] > 1


class Plain(torch.nn.Module):
    """Policy whose log-probabilities are of a plain forward pass of each response."""

    def __init__(self, model: Any, examples: list[Example]) -> None:
        super().__init__()
        self.model, self.examples = model, examples

    def forward(self, batch: Any, temperature: float, entropy: bool = False) -> TokenLogprobs:
        found = []
        for example in self.examples:
            for response, mask in zip(example.responses, example.masks(), strict=True):
                logprobs = response_logprobs(self.model, example.prompt_ids, response, temperature=temperature)
                found.append(logprobs[torch.from_numpy(mask)])
        return TokenLogprobs(torch.cat(found), None)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
@pytest.mark.parametrize("collate", [collate_packed, partial(collate_padded, pad_id=0)], ids=["packed", "padded"])
def test_grpo_loss_of_sampled_tokens(loss_type: str, collate: Any, model_folder: ModelFolder) -> None:
    """Loss and gradient with the tokens of an environment left out, by a loop over plain forward passes."""
    rng = np.random.default_rng(0)
    lengths, masks = (9, 6), [np.array([1, 1, 0, 0, 0, 1, 1, 0, 1], bool), np.array([1, 0, 0, 1, 1, 1], bool)]
    responses = tuple(rng.integers(0, 250, n).astype(np.int32) for n in lengths)
    examples = [Example(0, rng.integers(0, 250, 5).astype(np.int32), responses, trained=np.concatenate(masks))]
    model = AutoModelForCausalLM.from_pretrained(model_folder(), dtype=torch.float32)
    batch = collate(examples)
    assert batch.response_lengths == (5, 4) and batch.target_ids_N.tolist() == [
        int(one) for response, mask in zip(responses, masks, strict=True) for one in response[mask]
    ]
    given = {name: torch.from_numpy(rng.normal(-2, 0.3, 9).astype(np.float32)) for name in ("logprobs", "reference")}
    given["advantages"] = torch.tensor([0.7] * 5 + [-0.7] * 4)
    policy = Plain(model, examples)
    found = grpo_loss(policy, (batch, given), task=GRPOConfig(loss_type=loss_type), temperature=0.7, max_length=9)
    logprobs_N = policy(batch, temperature=0.7).target_N
    terms = []
    for t in range(9):
        ratio, a = (logprobs_N[t] - given["logprobs"][t]).exp(), given["advantages"][t]
        u = given["reference"][t] - logprobs_N[t]
        terms.append(torch.maximum(-a * ratio, -a * ratio.clamp(0.8, 1.2)) + 0.04 * (u.exp() - 1 - u))
    total = sum(terms[:5]) / 5 + sum(terms[5:]) / 4 if loss_type == "grpo" else sum(terms)
    torch.testing.assert_close(found.total, total, rtol=1e-5, atol=1e-5)
    weights = list(model.parameters())
    for one, other in zip(torch.autograd.grad(found.total, weights), torch.autograd.grad(total, weights), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_inspect_shows_an_episode_and_doctor_constructs_the_class(
    setting: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.undo()  # calls are read as they are written
    monkeypatch.setenv("SHEEPRLHF_CACHE", str(tmp_path / "cache"))
    words = ["task=grpo", "model=auto", f"model.repo_name={setting[0]}", "data=local", f"data.train_file={setting[1]}"]
    inspect = ["inspect", *words, "rollout.environment=calculator", f"output_dir={tmp_path}", "num_examples=0"]
    assert exit_code(inspect) == 0
    shown = capsys.readouterr().out
    assert '{"name": "calculator"' in shown and "reward 0" in shown and "format of calls hermes" in shown
    [_, answer] = [one for one in shown.splitlines() if one.startswith("+ ") and "</s>" in one.replace("\u00a6", "")]
    assert "tool" not in answer
    named = "rollout.environment=tests.support.environments:NeedsMore"
    assert exit_code(["doctor", *words, named, "reward=function", "reward.path=environment"]) == 1
    assert f"problem  tools      {named}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["rollout.environment=calculatr"], ["rollout.environment=calculatr", "calculator"]),
        (["rollout.environment=tests.support.environments:Missing"], ["rollout.environment", "Missing"]),
        (["rollout.environment=calculator", "generation.engine=hf"], ["generation.engine=hf"]),
        (["rollout.max_turns=3", "rollout.step_timeout=2"], ["rollout.max_turns=3", "rollout.step_timeout=2"]),
        (["reward.path=environment"], ["episode_reward", "rollout.environment"]),
        (["rollout.environment=calculator"], ["model.chat_template"]),
    ],
)
def test_options_are_checked_before_a_model_loads(
    words: list[str],
    named: list[str],
    tmp_path: Path,
    model_folder: ModelFolder,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sheeprlhf.task.models.load_rl_models", None)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "answer": "7"}\n' * 8)
    error = rejected(
        train_words(model_folder(), tmp_path / "rows.jsonl", tmp_path / "run", *words, task="grpo"), capsys
    )
    assert all(one in error for one in named), error


def test_a_task_without_rollouts_and_a_file_are_rejected(
    tmp_path: Path, model_folder: ModelFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "answer": "7"}\n' * 8)
    words = ["rollout.environment=calculator"]
    line = train_words(model_folder(), tmp_path / "rows.jsonl", tmp_path / "run", *words)
    assert "task=sft" in rejected(line, capsys)
    (tmp_path / "experiment").mkdir()
    recipe = "# @package _global_\nrollout:\n  environment: tests.support.environments:Lengths\n"
    (tmp_path / "experiment" / "mine.yaml").write_text(recipe)
    line = train_words(model_folder(), tmp_path / "rows.jsonl", tmp_path / "run", task="grpo")
    assert "rollout.environment" in rejected([*line, f"--config-dir={tmp_path}", "experiment=mine"], capsys)
    line = ["eval", "model=tiny", "data=docstrings", *words]
    assert "task=rouge" in rejected([*line, "task=rouge"], capsys)
    assert "generation.num_beams=2" in rejected([*line, "task=generate", "generation.num_beams=2"], capsys)
    assert "rollout=vllm" in rejected(["eval", "model=tiny", "data=docstrings", "task=reward", "rollout=vllm"], capsys)
