"""Tasks whose best score is known: every RL algorithm comes to 95 % of it on a random model, in seconds."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.runs import figures, train, write_rows

ModelFolder = Callable[..., Path]
SHORT = {"bandit": "generation.max_new_tokens=1", "letters": "generation.max_new_tokens=4"}
OF_TASK = {
    "ppo": ["task.num_iterations=2", "task.critic_learning_rate=1e-2", "task.init_kl_coeff=0"],
    "grpo": ["task.num_generations=8", "task.init_kl_coeff=0"],
    "rloo": ["task.num_generations=4", "task.init_kl_coeff=0"],
    "grpo task.loss_type=gspo": ["task.num_generations=8", "task.init_kl_coeff=0"],
    "grpo task.loss_type=cispo": ["task.num_generations=8", "task.init_kl_coeff=0"],
    "reinforce_pp": ["task.num_generations=4", "task.init_kl_coeff=0"],
    "online_dpo": ["task.num_generations=8", "task.beta=0.1"],
}


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
    words = [
        f"reward.path=tests.support.rewards:{reward}",
        SHORT[reward],
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
        *OF_TASK[task],
    ]
    name, *loss_type = task.split()
    rows = write_rows(tmp_path / "rows.jsonl")
    found = figures(train(model_folder(), rows, tmp_path / "run", *words, *loss_type, task=name))
    print(found["objective/scores"][:3], found["objective/scores"][-3:], found["val/scores"])
    assert found["objective/scores"][0] < 0.6
    assert found["val/scores"][-1] >= 0.95
