"""The engine of transformers against a plain forward pass and its distribution; what both engines have in common.

`test_sampler.py` compares the other one, `native`, with a loop.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from transformers import PreTrainedModel

from sheeprlhf.model.folder.load import load_causal_lm
from sheeprlhf.rollout.sampler import Sampled, engine_of
from sheeprlhf.structure.model import ModelConfig
from tests.support.models import EOS, VOCAB, ModelFolder

RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(0, 250, length).astype(np.int32) for length in (5, 1, 9)]
UNIFORMS = RNG.random((3, 4, 7))
EACH = ["native", "hf"]


def load(folder: Path) -> PreTrainedModel:
    cfg = ModelConfig(config_name="auto", repo_name=str(folder), disable_dropout=False)
    model = load_causal_lm(cfg, vocabulary=VOCAB, longest=64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)
    return model


def sample(name: str, model: PreTrainedModel, **given: Any) -> list[Sampled]:
    settings = dict(prompts=PROMPTS, uniforms=UNIFORMS, temperature=0.7, end_ids=[EOS], token_budget=120)
    return engine_of(name)(model, **settings | given)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "minimax"])  # minimax reads padding on the left
def test_log_probabilities_are_those_of_the_training_forward(architecture: str, model_folder: ModelFolder) -> None:
    """Of every token, at the temperature; flags and generators are left as they were."""
    model = load(model_folder(architecture))
    model.train()
    torch.manual_seed(5)
    state, attention = torch.get_rng_state(), model.config._attn_implementation
    messages: list[int] = []
    sampled = sample("hf", model, progress=messages.append)
    assert torch.equal(torch.get_rng_state(), state) and sum(messages) == 12
    assert all(module.training for module in model.modules()) and model.config._attn_implementation == attention
    assert [len(one.responses) for one in sampled] == [4, 4, 4]
    assert len({tuple(ids) for one in sampled for ids in one.responses}) > 10
    model.eval()
    for prompt, one in zip(PROMPTS, sampled, strict=True):
        for ids, logprobs, finished in zip(*one, strict=True):
            assert ids.dtype == np.int32 and logprobs.dtype == np.float32
            assert finished == (ids[-1] == EOS) and EOS not in ids[:-1] and (finished or len(ids) == 7)
            whole = torch.from_numpy(np.concatenate([prompt, ids]).astype(np.int64))[None]
            with torch.no_grad():
                logits_NV = model(whole, use_cache=False).logits[0, len(prompt) - 1 : -1]
            expected = (logits_NV / 0.7).log_softmax(dim=-1)[range(len(ids)), torch.from_numpy(ids).long()]
            assert_allclose(logprobs, expected.numpy(), rtol=0, atol=1e-5)


def test_the_models_own_settings_do_not_leak(model_folder: ModelFolder, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_folder(), folder)
    own = {"do_sample": True, "top_k": 1, "repetition_penalty": 5.0, "suppress_tokens": list(range(90)), "min_p": 0.9}
    expected = sample("hf", load(folder))
    (folder / "generation_config.json").write_text(json.dumps(own | {"max_length": 9, "eos_token_id": 3}))
    model = load(folder)
    settings = model.generation_config
    assert settings.top_k == 1
    found = sample("hf", model)
    assert model.generation_config is settings
    for one, other in zip(found, expected, strict=True):
        assert [ids.tolist() for ids in one.responses] == [ids.tolist() for ids in other.responses]


def test_each_token_comes_as_often_as_it_is_likely(model_folder: ModelFolder) -> None:
    """Pearson's statistic of 4,000 first tokens, in the middle 99.99 % of its distribution; others are far outside."""
    model, num = load(model_folder()).eval(), 4000
    uniforms = np.random.default_rng(1).random((1, num, 1))
    prompt = PROMPTS[2]
    [one] = sample("hf", model, prompts=[prompt], uniforms=uniforms, token_budget=1000)
    counts = np.bincount([int(ids[0]) for ids in one.responses], minlength=VOCAB)
    with torch.no_grad():
        logits = model(torch.from_numpy(prompt.astype(np.int64))[None]).logits[0, -1].double().numpy()

    def deviation(temperature: float) -> float:
        expected = np.exp(logits / temperature) / np.exp(logits / temperature).sum() * num
        often = expected >= 5
        seen, wanted = (np.append(n[often], n[~often].sum()) for n in (counts, expected))
        freedom = len(wanted) - 1
        assert freedom > 20
        return float((((seen - wanted) ** 2 / wanted).sum() - freedom) / np.sqrt(2 * freedom))

    assert abs(deviation(0.7)) < 4 < deviation(1.0)


def test_the_numbers_decide(model_folder: ModelFolder) -> None:
    model = load(model_folder())

    def ids(uniforms: np.ndarray) -> list[list[int]]:
        torch.manual_seed(int(uniforms.sum() * 1000) % 7)
        return [ids.tolist() for one in sample("hf", model, uniforms=uniforms) for ids in one.responses]

    assert ids(UNIFORMS) == ids(UNIFORMS)
    assert ids(UNIFORMS) != ids(UNIFORMS / 2)


@pytest.mark.parametrize("name", EACH)
def test_a_stop_ends_a_response(name: str, model_folder: ModelFolder) -> None:
    """At the first token for which it says so, as EOS does; the others go on."""
    model = load(model_folder())

    def stop(ids: np.ndarray) -> bool:
        return len(ids) >= 2 and int(ids[-1]) % 3 == 0

    sampled = sample(name, model, stop=stop)
    for one in sampled:
        for ids, logprobs, finished in zip(*one, strict=True):
            ends = [number for number in range(1, len(ids) + 1) if ids[number - 1] == EOS or stop(ids[:number])]
            assert finished == bool(ends) and ends in ([], [len(ids)]) and len(logprobs) == len(ids)
    assert len({len(ids) for one in sampled for ids in one.responses}) > 2
    assert sample(name, model, prompts=[], uniforms=UNIFORMS[:0]) == []
    for temperature in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="temperature"):
            sample(name, model, temperature=temperature)


@pytest.mark.parametrize("name", EACH)
def test_logits_that_are_not_finite_are_not_taken_for_responses(
    name: str, model_folder: ModelFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of one prompt in three, whose log-probabilities are not finite."""
    model = load(model_folder("llama"))
    odd = int(PROMPTS[1][0])
    model.get_input_embeddings().register_forward_hook(
        lambda _, given, out: out.masked_fill((given[0] == odd)[..., None], torch.nan)
    )
    sampled = sample(name, model)
    finite = [bool(np.isfinite(np.concatenate(one.logprobs)).all()) for one in sampled]
    assert not finite[1] and any(finite)  # prompts of one batch may share it
    assert all((ids < VOCAB).all() for one in sampled for ids in one.responses)
    assert "Traceback" not in capsys.readouterr().err
