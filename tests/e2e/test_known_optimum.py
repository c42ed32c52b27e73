"""Tasks whose best score is known: every RL algorithm comes to 95 % of it on a random model, in seconds."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from string import ascii_lowercase, ascii_uppercase

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from sheeprlhf import evaluate
from tests.support.models import make_model_folder
from tests.support.runs import figures, train, write_rows

ModelFolder = Callable[..., Path]
FOUR = "generation.max_new_tokens=4"
SHORT = {"bandit": "generation.max_new_tokens=1", "letters": FOUR}
OF_TASK = {
    "ppo": ["task.num_iterations=2", "task.critic_learning_rate=1e-2", "task.init_kl_coeff=0"],
    "grpo": ["task.num_generations=8", "task.init_kl_coeff=0"],
    "rloo": ["task.num_generations=4", "task.init_kl_coeff=0"],
    "grpo task.loss_type=gspo": ["task.num_generations=8", "task.init_kl_coeff=0"],
    "grpo task.loss_type=cispo": ["task.num_generations=8", "task.init_kl_coeff=0"],
    "reinforce_pp": ["task.num_generations=4", "task.init_kl_coeff=0"],
    "online_dpo": ["task.num_generations=8", "task.beta=0.1"],
}
DAPO = "grpo task.loss_type=dapo task.clip_high=0.28 task.max_resamples=2"
OPTIONS = {  # reward and command of each
    "rewards of tokens": ("letter_tokens", "ppo task.kl_estimator=k3 task.init_kl_coeff=1e-3"),
    "rewards of tokens, no critic": ("letter_tokens", "reinforce_pp task.init_kl_coeff=1e-3"),
    "dynamic sampling": ("letters", DAPO),
    "clipped advantages": ("letters", "grpo task.max_advantage=1"),
    "two-sided clipping": ("letters", "grpo task.max_ratio=2 task.num_iterations=2"),
    "entropy": ("letters", "grpo task.entropy_coeff=1e-3"),
    "k2": ("letters", "grpo task.kl_estimator=k2 task.init_kl_coeff=1e-3"),
    "dr_grpo": ("letters", "grpo task.loss_type=dr_grpo task.scale_rewards=false"),
    "group baseline": ("letters", "reinforce_pp task.group_baseline=true"),
}


@pytest.mark.nightly
def test_a_teacher_is_approached(tmp_path: Path, model_folder: ModelFolder) -> None:
    """The divergence from another random model, nats a response, falls to a small part of what it was."""
    words = [f"task.teacher={model_folder('gpt2')}", "generation.max_new_tokens=2", "optim.lr=5e-3"]
    words += ["task.rollout_size=64", "task.mini_batch_size=64", "task.micro_batch_size=64", "task.max_num_steps=60"]
    words += ["task.epochs=200", "task.eval_interval=60", "task.save_interval=60", "task.max_eval_batches=null"]
    rows = write_rows(tmp_path / "rows.jsonl")
    found = figures(train(model_folder(), rows, tmp_path / "run", *words, task="distill"))
    print(found["objective/kl"][:2], found["objective/kl"][-2:], found["val/kl"])
    assert set(found["objective/scores"]) == {0.0}
    assert np.mean(found["objective/kl"][-20:]) < 0.4 * np.mean(found["objective/kl"][:5])


@pytest.mark.slow
def test_offline_rl_finds_the_best_response_of_bad_data(tmp_path: Path, model_folder: ModelFolder) -> None:
    """Four responses, equally frequent: the log-odds of ILQL are their rewards."""
    rewards = {"a": 0.0, "b": 1.0, "c": 3.0, "d": 2.0}
    lines = [{"prompt": "Q", "response": letter, "label": reward} for letter, reward in rewards.items()]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ["task.mini_batch_size=4", "task.micro_batch_size=4", "task.max_num_steps=150", "task.epochs=150"]
    words += ["task.eval_interval=150", "task.save_interval=150", "optim.lr=5e-3", "optim.schedule=constant"]
    words += ["task.lr_warmup_steps=0", "task.gamma=1", "task.cql_coeff=0", "task.target_update_rate=0.5"]
    run = train(model_folder(), rows, tmp_path / "run", *words, "task.advantage_coeff=1", task="ilql")
    model = AutoModelForCausalLM.from_pretrained(run / "final")
    tokenizer = AutoTokenizer.from_pretrained(run / "final")
    ids = {letter: tokenizer(letter, add_special_tokens=False).input_ids[0] for letter in rewards}
    with torch.no_grad():
        logits = model(**tokenizer("Q", return_tensors="pt")).logits[0, -1]
    found = logits[list(ids.values())].softmax(0)
    assert_close(found, torch.tensor(list(rewards.values())).softmax(0), rtol=0, atol=0.05)


IN_CI = {("ppo", "letters")}


@pytest.mark.parametrize(
    ("task", "reward"),
    [
        pytest.param(task, reward, marks=pytest.mark.slow if (task, reward) in IN_CI else pytest.mark.nightly)
        for task in OF_TASK
        for reward in SHORT
    ],
)
def test_it_is_found(task: str, reward: str, tmp_path: Path, model_folder: ModelFolder) -> None:
    name, *loss_type = task.split()
    words = [f"reward.path=tests.support.rewards:{reward}", SHORT[reward], *OF_TASK[task], *loss_type]
    check_found(name, words, tmp_path, model_folder)


@pytest.mark.nightly
@pytest.mark.parametrize("name", OPTIONS)
def test_it_is_found_with_options(name: str, tmp_path: Path, model_folder: ModelFolder) -> None:
    reward, command = OPTIONS[name]
    task, *options = command.split()
    words = [f"reward.path=tests.support.rewards:{reward}", FOUR, *OF_TASK[task], *options]
    check_found(task, words, tmp_path, model_folder)


@pytest.mark.nightly
def test_the_overlong_penalty_shortens_responses(tmp_path: Path, model_folder: ModelFolder) -> None:
    """Small letters are worth 1 at every length; with the penalty, only in responses of two tokens at most."""
    words = ["reward.path=tests.support.rewards:letters", "generation.max_new_tokens=8", *OF_TASK["grpo"]]
    without = metrics_of("grpo", words, tmp_path / "without", model_folder)
    found = metrics_of("grpo", [*words, "reward.overlong_buffer=6"], tmp_path / "with", model_folder)
    assert min(without["rollout/length"]) > 6
    assert found["objective/scores"][0] < 0 < 0.9 < np.mean(found["objective/scores"][-5:])
    assert np.mean(found["rollout/length"][-5:]) < 4
    assert found["val/scores"][-1] >= 0.95


@pytest.mark.nightly
def test_truncated_responses_do_not_teach(tmp_path: Path, model_folder: ModelFolder) -> None:
    """Small letters pay in responses that end, capitals in those that are cut, which are most of them at the start."""
    words = ["reward.path=tests.support.rewards:small_or_capital", "generation.max_new_tokens=8", *OF_TASK["grpo"]]
    words += [f"generation.stop_strings={[str(digit) for digit in range(10)]}"]
    without = metrics_of("grpo", words, tmp_path / "without", model_folder)
    found = metrics_of("grpo", [*words, "task.mask_truncated=true"], tmp_path / "with", model_folder)
    assert found["rollout/finished"][0] == without["rollout/finished"][0] < 0.5
    assert without["rollout/finished"][-1] < 0.1 and found["rollout/finished"][-1] > 0.9
    assert found["val/scores"][-1] >= 0.95


def last_token_scorer(folder: Path, scores: dict[str, float]) -> Path:
    """Save a reward model whose score is that of a response's last token, 0 for other tokens."""
    make_model_folder(folder, scores=True)
    model, tokenizer = (auto.from_pretrained(folder) for auto in (AutoModelForSequenceClassification, AutoTokenizer))
    embeddings, largest = model.get_input_embeddings().weight, 10.0
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.norm.weight.fill_(1.0)
        embeddings.zero_()
        embeddings[:, 1] = 1.0
        for character, score in scores.items():
            [token] = tokenizer(character, add_special_tokens=False).input_ids
            embeddings[token, 0] = score / largest
            embeddings[token, 1] = math.sqrt(1 - (score / largest) ** 2)
        model.score.weight.zero_()
        model.score.weight[0, 0] = largest / math.sqrt(embeddings.shape[1])  # the norm multiplies by this root
    model.save_pretrained(folder)
    return folder


@pytest.mark.nightly
def test_an_uncertainty_penalty_avoids_the_errors_of_single_reward_models(
    tmp_path: Path, model_folder: ModelFolder
) -> None:
    """Three reward models give small letters 1, and each of them other capitals 6 by mistake."""
    small = dict.fromkeys(ascii_lowercase, 1.0)
    wrong = [ascii_uppercase[first : first + 8] for first in (0, 8, 16)]
    folders = [last_token_scorer(tmp_path / own, small | dict.fromkeys(own, 6.0)) for own in wrong]
    terms = f"reward.terms=[{','.join(f'model:{folder}' for folder in folders)}]"
    options = ["reward=list", terms, "generation.max_new_tokens=1", *OF_TASK["grpo"]]
    right = ["reward=function", "reward.path=tests.support.rewards:letters", "generation.max_new_tokens=1"]
    shares = {}
    for combine in ("sum", "uncertainty", "min"):
        metrics_of("grpo", [*options, f"reward.combine={combine}"], tmp_path / combine, model_folder)
        run_dir = tmp_path / combine / "run"
        shares[combine] = evaluate(["task=reward", f"experiment_dir={run_dir}", "task.against=none", *right])["score"]
    print(shares)
    assert shares["sum"] < 0.05
    assert shares["uncertainty"] >= 0.95
    assert shares["min"] >= 0.95


def check_found(task: str, options: list[str], tmp_path: Path, model_folder: ModelFolder) -> None:
    """Train: scores are below 0.6 in the first rollout, and at least 0.95 in the last validation."""
    found = metrics_of(task, options, tmp_path, model_folder)
    assert found["objective/scores"][0] < 0.6
    assert found["val/scores"][-1] >= 0.95


def metrics_of(task: str, options: list[str], tmp_path: Path, model_folder: ModelFolder) -> dict[str, list[float]]:
    """Train 160 optimizer steps; the metrics."""
    words = [
        "task.rollout_size=64",
        "task.mini_batch_size=32",
        "task.micro_batch_size=64",
        "task.max_num_steps=160",
        "task.epochs=200",
        "task.eval_interval=160",
        "task.save_interval=160",
        "task.max_eval_batches=null",
        "optim.lr=5e-3",
        "optim.schedule=constant",
        *options,
    ]
    tmp_path.mkdir(exist_ok=True)
    rows = write_rows(tmp_path / "rows.jsonl")
    found = figures(train(model_folder(), rows, tmp_path / "run", *words, task=task))
    for name in ("objective/scores", "rollout/length", "rollout/finished"):
        print(name, found[name][:3], found[name][-3:])
    print("val/scores", found["val/scores"])
    return found
