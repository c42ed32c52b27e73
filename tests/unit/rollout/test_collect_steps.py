"""How a rollout is read and scored: against plain transformers, one response at a time."""

import dataclasses
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from sheeprlhf.agent.policy import load_policy, reference_of
from sheeprlhf.agent.reward import reward_model_of
from sheeprlhf.data.example import Example
from sheeprlhf.engine.fabric import make_fabric
from sheeprlhf.model.folder.account import HEAD
from sheeprlhf.model.folder.load import load_tokenizer
from sheeprlhf.rollout.rollout import (
    Rollout,
    RolloutCollector,
    TermModel,
    check_finite,
    distinct_bigrams,
    rollout_metrics,
    sampling_uniforms,
)
from sheeprlhf.structure.data import LocalDataConfig
from sheeprlhf.structure.model import AutoModelConfig
from sheeprlhf.structure.reward import FunctionRewardConfig, ListRewardConfig, ModelRewardConfig
from sheeprlhf.structure.rollout import RLOOConfig
from sheeprlhf.structure.run import AdamWConfig, FabricConfig, GenConfig, TrainConfig
from sheeprlhf.task.finish import check_sampler, sample_table
from sheeprlhf.utils.errors import ModelError, NonFiniteError, RewardError
from tests.support.models import EOS, ModelFolder
from tests.support.plain import response_logprobs

TEMPERATURE = 0.7


class Setting(SimpleNamespace):
    """Everything that makes rollouts of a tiny model."""

    cfg: TrainConfig
    collect: RolloutCollector
    policy: Any
    reward: Any
    folder: Path


def make_setting(folder: Path, reward: Any, generation: GenConfig | None = None, **options: Any) -> Setting:
    model = AutoModelConfig(repo_name=str(folder))
    cfg = TrainConfig(
        task=RLOOConfig(num_generations=2, rollout_size=8, micro_batch_size=2),
        model=model,
        data=LocalDataConfig(train_file="rows.jsonl"),
        fabric=FabricConfig(config_name="cpu", accelerator="cpu"),
        optim=AdamWConfig(),
        reward=reward,
        generation=generation or GenConfig(max_new_tokens=6, temperature=TEMPERATURE),
    )
    tokenizer = load_tokenizer(model)
    policy = load_policy(model, tokenizer, longest=64, batching="auto")
    torch.manual_seed(0)
    scorer = reward_model_of(load_policy(model, tokenizer, longest=64, batching="auto"), model, tokenizer)
    rewards = {"model": TermModel(scorer.eval())}
    collect = RolloutCollector(
        make_fabric(cfg.fabric), cfg, tokenizer, policy, reference_of(policy), rewards, **options
    )
    return Setting(cfg=cfg, collect=collect, policy=policy, reward=scorer, folder=folder)


def prompts() -> list[Example]:
    rng = np.random.default_rng(1)
    return [
        Example(i, rng.integers(0, 250, n).astype(np.int32), (np.array([65, EOS]),)) for i, n in enumerate((5, 1, 9))
    ]


def test_each_token_has_the_log_probability_that_a_plain_forward_gives(model_folder: ModelFolder) -> None:
    setting = make_setting(model_folder(), FunctionRewardConfig(path="tests.support.rewards:spread"))
    rollout = setting.collect(prompts(), 0)
    model = AutoModelForCausalLM.from_pretrained(setting.folder, dtype=torch.float32).eval()
    for row, found, reference in zip(
        rollout.rows, rollout.tokens["logprobs"], rollout.tokens["reference"], strict=True
    ):
        with torch.no_grad():
            parts = [response_logprobs(model, row.prompt_ids, one, temperature=TEMPERATURE) for one in row.responses]
        expected = torch.cat(parts).numpy()
        assert_close(found, expected, rtol=0, atol=1e-5)
        assert_close(reference, expected, rtol=0, atol=1e-5)
    figures = rollout_metrics(rollout)
    assert figures["objective/kl"] == pytest.approx(0.0, abs=1e-5)
    assert figures["rollout/length"] == np.mean(rollout.response_lengths)


def test_a_reward_model_scores_the_last_token(model_folder: ModelFolder) -> None:
    setting = make_setting(model_folder(), ModelRewardConfig(folder="a/folder"))
    rollout = setting.collect(prompts(), 0)
    plain = setting.reward.classifier()
    backbone = getattr(plain, plain.base_model_prefix)
    for row, scores in zip(rollout.rows, rollout.scores, strict=True):
        for response, score in zip(row.responses, scores, strict=True):
            ids = torch.tensor([[*row.prompt_ids.tolist(), *response.tolist()]])
            with torch.no_grad():
                expected = float(getattr(plain, HEAD)(backbone(ids).last_hidden_state[0, -1]))
            assert score == pytest.approx(expected, abs=1e-5)


def test_models_and_functions_add_up(model_folder: ModelFolder) -> None:
    terms = {
        "model": ModelRewardConfig(folder="a/folder"),
        "function": FunctionRewardConfig(path="tests.support.rewards:spread"),
        "both": ListRewardConfig(terms=["2*model", "-0.5*tests.support.rewards:spread"], folder="a/folder"),
    }
    scores = {name: make_setting(model_folder(), reward).collect(prompts(), 0).scores for name, reward in terms.items()}
    assert_close(scores["both"], 2 * scores["model"] - 0.5 * scores["function"], rtol=0, atol=1e-6)


def test_a_reward_that_fails_names_the_prompt(model_folder: ModelFolder) -> None:
    setting = make_setting(model_folder(), FunctionRewardConfig(path="tests.support.rewards:raises"))
    with pytest.raises(RewardError, match="no such thing"):
        setting.collect(prompts(), 0)


def test_samples_depend_only_on_seed_and_number(model_folder: ModelFolder) -> None:
    assert not np.array_equal(sampling_uniforms(1, 0, (2, 3, 4)), sampling_uniforms(1, 1, (2, 3, 4)))
    assert not np.array_equal(sampling_uniforms(1, 0, (2, 3, 4)), sampling_uniforms(2, 0, (2, 3, 4)))
    setting = make_setting(model_folder(), FunctionRewardConfig(path="tests.support.rewards:spread"))
    first = setting.collect(prompts(), 7)
    torch.manual_seed(123)
    setting.collect(prompts(), 8)
    again = setting.collect(prompts(), 7)
    for one, other in zip(first.rows, again.rows, strict=True):
        assert [r.tolist() for r in one.responses] == [r.tolist() for r in other.responses]


def test_a_validation_leaves_no_trace_in_the_running_moments(model_folder: ModelFolder) -> None:
    reward = FunctionRewardConfig(path="tests.support.rewards:spread", normalize=True)
    setting = make_setting(model_folder(), reward)
    setting.collect(prompts(), 0)
    before = setting.collect.state()
    assert before["reward_count"] == 6
    shown = setting.collect(prompts(), 1, group=1, validates=True)
    assert setting.collect.state() == before
    assert shown.finished.shape == (3, 1)
    setting.collect.restore({"kl_coeff": 0.1})
    assert setting.collect.state() == before


def test_the_check_finds_a_reference_that_is_another_model(model_folder: ModelFolder) -> None:
    setting = make_setting(model_folder(), FunctionRewardConfig(path="tests.support.rewards:spread"))
    said: list[str] = []
    run: Any = SimpleNamespace(cfg=setting.cfg, say=said.append)
    rollout = setting.collect(prompts(), 0)
    check_sampler(run, setting.collect, rollout)

    def shifted(name: str, by: float) -> Rollout:
        return rollout.with_tokens(**{name: rollout.flat(name) + by})

    half: Any = SimpleNamespace(cfg=dataclasses.replace(setting.cfg, fabric=FabricConfig(precision="bf16-mixed")))
    messages = {"sampled": "what was sampled", "logprobs": "what was sampled", "reference": "the reference's"}
    for name, message in messages.items():
        for by, job in ((1e-3, run), (0.15 if name == "sampled" else 0.03, half)):
            with pytest.raises(ModelError, match=message):
                check_sampler(job, setting.collect, shifted(name, by))
    check_sampler(half, setting.collect, shifted("sampled", 0.05))  # in bf16 a cache rounds otherwise than a whole pass
    assert said == []


def test_references_are_given_where_every_row_of_the_run_has_one(model_folder: ModelFolder) -> None:
    """Of some rows or of none: the reward is never given them in one rollout and not in the next."""
    setting = make_setting(model_folder(), FunctionRewardConfig(path="tests.support.rewards:spread"))
    answered = prompts()
    alone = [row._replace(responses=()) for row in answered]
    rollouts = [setting.collect(rows, 0) for rows in (answered, alone, [*alone[:1], *answered[1:]])]
    assert [rollout.texts.columns for rollout in rollouts] == [{"reference": ["b"] * 6}, {}, {}]
    tokens = [rollout.flat("logprobs") for rollout in rollouts]
    assert all(found.equal(tokens[0]) for found in tokens)  # what is sampled does not depend on it
    rollout = make_setting(setting.folder, setting.cfg.reward, columns=()).collect(answered, 0)
    assert rollout.texts.columns == {}
    assert "[reference]" not in sample_table(rollout, 2)


def test_what_people_read(model_folder: ModelFolder) -> None:
    setting = make_setting(model_folder(), FunctionRewardConfig(path="tests.support.rewards:spread"))
    rollout = setting.collect(prompts(), 0, group=1, validates=True)
    table = sample_table(rollout, 2)
    assert table.count("[prompt]") == 2
    assert f"score {rollout.scores[0, 0]:.3f}, KL 0.00" in table.replace("-0.00", "0.00")
    assert table.count("[reference]\nb") == 2
    assert distinct_bigrams(["a b c", "a b"]) == 2 / 3
    assert distinct_bigrams(["", "one"]) == 0.0


def test_what_is_not_finite_is_refused_where_it_began() -> None:
    """Of several kinds that one of which the fewest rows are bad: whitening spreads a single number over all."""
    rows = tuple(Example(30 + i, np.arange(2), (np.arange(3), np.arange(1))) for i in range(3))
    rollout = Rollout(rows, np.ones((3, 2)), np.ones((3, 2), dtype=bool), {})
    values, advantages = torch.ones(12), torch.full((12,), torch.nan)
    check_finite(rollout.with_tokens(values=values))
    values[7] = torch.inf  # the last token of the second row's second response
    with pytest.raises(NonFiniteError, match=r"^values .*1 of 3 .*training.*\(\[31\]\)"):
        check_finite(rollout.with_tokens(advantages=advantages, values=values))
    scores = np.array([[0.0, 1.0], [0.0, 1.0], [np.nan, 1.0]])
    bad = dataclasses.replace(rollout.with_tokens(advantages=advantages), scores=scores)
    with pytest.raises(NonFiniteError, match=r"^scores .*1 of 3 .*validation.*\(\[32\]\)"):
        check_finite(bad, "validation")


@pytest.mark.parametrize(("num_rows", "num_shown"), [(20, 20), (21, 20)])
def test_at_most_twenty_rows_are_named(num_rows: int, num_shown: int) -> None:
    rows = tuple(Example(100 + i, np.arange(2), (np.arange(1),)) for i in range(num_rows))
    bad = Rollout(rows, np.full((num_rows, 1), np.nan), np.ones((num_rows, 1), dtype=bool), {})
    with pytest.raises(NonFiniteError) as caught:
        check_finite(bad)
    assert len(re.findall(r"\b1\d\d\b", str(caught.value))) == num_shown
    assert ("and 1 more" in str(caught.value)) == (num_rows > num_shown)
    assert "and 0 more" not in str(caught.value)
