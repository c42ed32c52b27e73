"""Process reward models: labels of steps from rows to targets, the loss, and the scores of responses."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification

from sheeprlhf.agent.reward import RewardModel
from sheeprlhf.data.example import Example, collate_packed, collate_padded
from sheeprlhf.data.read import Row
from sheeprlhf.data.tokenize import RowTokenizer, StepFinder, TokenRow
from sheeprlhf.engine.fabric import make_fabric
from sheeprlhf.model.attention import PACKED, register
from sheeprlhf.model.folder.load import load_tokenizer
from sheeprlhf.rollout.rollout import Rollout, response_scores
from sheeprlhf.structure.data import LocalDataConfig
from sheeprlhf.structure.model import AutoModelConfig
from sheeprlhf.structure.rollout import PPOConfig
from sheeprlhf.structure.run import FabricConfig
from sheeprlhf.task.eval.preference import step_figures
from sheeprlhf.task.train.prm import prm_loss
from tests.support.models import BOS, EOS, ModelFolder, byte_tokenizer, make_model_folder
from tests.support.runs import exit_code, figures, train, train_words, write_steps

STEPS, LABELS = ["a+b", "c", "de"], [True, False, True]
BYTES = byte_tokenizer()


def ids(text: str, *, end: bool = True) -> list[int]:
    """Tokens of single bytes."""
    return [*BYTES(text, add_special_tokens=False)["input_ids"], *([EOS] if end else [])]


PROMPT = [BOS, *ids("Q:", end=False)]


def token_row(folder: Path, steps: list[str], labels: list[object], **options: object) -> TokenRow:
    cfg = LocalDataConfig(**{"train_file": "x", "minimum_response_length": 1, **options})  # type: ignore[arg-type]
    tokenize = RowTokenizer(cfg, load_tokenizer(AutoModelConfig(repo_name=str(folder))), "stepwise")
    row = Row(0, "row 0", {"prompt": "Q:", "completions": steps, "labels": labels})
    return tokenize([row])[0]


def test_labels_are_at_the_ends_of_the_steps(model_folder: ModelFolder) -> None:
    """Bytes as tokens: the label of a step is at its separator, that of the last step at the end token."""
    row = token_row(model_folder(), STEPS, LABELS)
    assert row.tokens.tolist() == [*PROMPT, *ids("a+b\nc\nde")]
    assert row.trained is not None
    assert np.flatnonzero(row.trained).tolist() == [3, 5, 8]
    assert json.loads(row.columns) == {"labels": LABELS}
    other = token_row(model_folder(), ["a+b", "c"], [1, "false"], step_separator=" ki ")
    assert other.trained is not None and np.flatnonzero(other.trained).tolist() == [6, 8]
    assert json.loads(other.columns) == {"labels": [True, False]}


def test_steps_that_are_cut_or_cannot_be_told_apart(model_folder: ModelFolder) -> None:
    row = token_row(model_folder(), STEPS, LABELS, max_length=10)  # 3 of the prompt, "a+b\nc\nd"
    assert row.trained is not None and np.flatnonzero(row.trained).tolist() == [3, 5]
    assert json.loads(row.columns) == {"labels": LABELS[:2]}
    assert token_row(model_folder(), STEPS, LABELS, max_length=5).dropped == "no_room_for_response"
    assert token_row(model_folder(), ["a\nb", "c"], [1, 0]).dropped == "steps_without_border"


@pytest.mark.parametrize(
    ("text", "ends"),
    [("a\nb\n", [1, 3]), ("\n\na\n\n\nb", [5, 6]), ("ab", [1]), ("a\n \nb", [3, 4]), ("\n", [0])],
)
def test_steps_of_a_sampled_text(text: str, ends: list[int]) -> None:
    find = StepFinder(BYTES, "\n")
    assert np.flatnonzero(find(PROMPT, ids(text, end=False))).tolist() == ends
    with_end = np.flatnonzero(find(PROMPT, ids(text))).tolist()
    assert with_end == [*ends[:-1], len(text)]


def plain_scores(folder: Path, prompt: list[int], response: list[int]) -> torch.Tensor:
    """Scores after each token of a response by transformers alone."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        hidden = model.base_model(torch.tensor([[*prompt, *response]])).last_hidden_state[0, len(prompt) :]
        return model.score(hidden)[:, 0]


@pytest.fixture(scope="module")
def scorer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("prm") / "scores", seed=5, scores=True)


def test_targets_packed_and_padded_against_transformers(scorer: Path) -> None:
    """The loss of two rows is the mean over their labelled steps; edits behind a step do not change its score."""
    register()
    rows = [token_row(scorer, STEPS, LABELS), token_row(scorer, ["x", "yz"], [False, True])]
    prompt, responses = PROMPT, [ids("a+b\nc\nde"), ids("x\nyz")]
    examples = [
        Example(i, np.array(prompt, np.int32), (np.array(response, np.int32),), trained=row.trained)
        for i, (row, response) in enumerate(zip(rows, responses, strict=True))
    ]
    expected = torch.cat(
        [plain_scores(scorer, prompt, r)[torch.from_numpy(row.trained)] for r, row in zip(responses, rows, strict=True)]
    )
    labels = torch.tensor([*LABELS, False, True])
    plain = torch.nn.functional.binary_cross_entropy_with_logits(expected, labels.float(), reduction="sum")
    model = AutoModelForSequenceClassification.from_pretrained(scorer, dtype=torch.float32)
    for batch in (collate_packed(examples, targets="steps"), collate_padded(examples, pad_id=0, targets="steps")):
        model.set_attn_implementation(PACKED if batch.layout else "sdpa")
        reward = RewardModel(model)
        assert batch.response_lengths == (3, 2)
        with torch.no_grad():
            assert_close(reward(batch), expected, rtol=0, atol=1e-5)
            output = prm_loss(reward, (batch, labels))
        assert_close(output.total, plain, rtol=0, atol=1e-5)
        assert float(output.metrics["share_right"]) == 3
        assert float(output.metrics["accuracy"]) == int(((expected > 0) == labels).sum())
    edited = plain_scores(scorer, prompt, ids("a+b\nc\nWXYZ"))
    assert_close(edited[[3, 5]], expected[:2], rtol=0, atol=1e-5)


def test_scores_of_a_rollout(scorer: Path) -> None:
    """Of sampled responses the lowest step, or every step at its last token, as transformers scores them."""
    prompt, responses = PROMPT, [ids("a\nb\n"), ids("cde", end=False)]
    row = Example(0, np.array(prompt, np.int32), tuple(np.array(r, np.int32) for r in responses))
    rollout = Rollout((row,), np.zeros((1, 2)), np.array([[True, False]]), {})
    model = RewardModel(AutoModelForSequenceClassification.from_pretrained(scorer, dtype=torch.float32).eval())
    model.packed, model.classifier().config.step_separator = False, "\n"
    good = [plain_scores(scorer, prompt, response).sigmoid() for response in responses]
    fabric = make_fabric(FabricConfig(config_name="cpu", accelerator="cpu"))
    of = (fabric, PPOConfig(), model, rollout, load_tokenizer(AutoModelConfig(repo_name=str(scorer))))
    lowest = torch.stack([good[0][[1, 4]].min(), good[1][2]])
    assert_close(response_scores(*of), lowest.double(), rtol=0, atol=1e-6)
    each = torch.tensor([0, good[0][1], 0, 0, good[0][4], 0, 0, good[1][2]])
    assert_close(response_scores(*of, step_score="each"), each, rtol=0, atol=1e-6)


def test_figures_of_steps_by_hand() -> None:
    """Steps 1, 1 | 1, 0, 1 | 0 of which the model calls 1, 0 | 1, 0, 0 | 0 right."""
    scores = np.array([1.0, -1.0, 2.0, -0.5, -3.0, -1.0])
    numbers = step_figures(scores, [[True, True], [True, False, True], [False]], seed=0)
    losses = np.log1p(np.exp([-1.0, 1.0, -2.0, -0.5, 3.0, -1.0]))
    assert numbers["loss"] == pytest.approx(losses.mean(), abs=1e-12)
    assert numbers["accuracy"] == pytest.approx(4 / 6)
    assert numbers["accuracy_of_right_steps"] == pytest.approx(2 / 4)
    assert numbers["accuracy_of_wrong_steps"] == 1.0
    assert numbers["first_wrong"] == pytest.approx(2 / 3)
    assert (numbers["steps"], numbers["rows"]) == (6, 3)


@pytest.mark.slow
def test_wrong_steps_are_found_and_rewarded(tmp_path: Path, model_folder: ModelFolder) -> None:
    """A rule of the words of a step is learned; PPO gets the probabilities at the ends of steps, RLOO the lowest."""
    data = write_steps(tmp_path / "rows.jsonl", 120)
    words = ["task.mini_batch_size=16", "task.micro_batch_size=16", "optim.lr=1e-2", "task.max_num_steps=90"]
    words += ["task.epochs=20", "task.eval_interval=90", "task.save_interval=90", "task.max_eval_batches=null"]
    run = train(model_folder(), data, tmp_path / "prm", *words, task="prm")
    found = figures(run)
    print(found["val/accuracy"], found["val/loss"])
    assert found["val/accuracy"][-1] > max(0.9, found["train/share_right"][0])
    assert exit_code(f"eval task=steps experiment_dir={run}") == 0
    [result] = (run / "eval").glob("steps-*.json")
    assert json.loads(result.read_text())["accuracy"] == pytest.approx(found["val/accuracy"][-1], abs=1e-6)
    for task, how in {"ppo": "each", "rloo": "min"}.items():
        words = [word for word in train_words(model_folder(), data, tmp_path / task, task=task) if "reward" not in word]
        words += ["reward=model", f"reward.step_score={how}", f"task.rm_experiment_dir={run}", "task.save_rollouts=1"]
        assert exit_code([*words, "task.max_num_steps=4", "task.sft_experiment_dir=null"]) == 0
        rows = pq.read_table(next((tmp_path / task / "rollouts").iterdir())).to_pylist()
        assert len({row["score"] for row in rows}) > 1
        for row in rows if task == "ppo" else ():
            assert row["score"] == pytest.approx(sum(row["rewards"]), abs=1e-5) and row["rewards"][-1] > 0
