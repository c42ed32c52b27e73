"""Models that cannot pack are padded without being told to, with either head, and give what transformers gives."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from sheeprlhf.agent.policy import Policy, load_policy
from sheeprlhf.agent.reward import RewardModel, load_reward_model
from sheeprlhf.data.example import Example, collate_packed, collate_padded
from sheeprlhf.model.folder.architecture import packing_limit
from sheeprlhf.model.folder.load import load_tokenizer
from sheeprlhf.model.folder.weights import check_weights
from sheeprlhf.rollout.engines import generate_ids, stream_ids
from sheeprlhf.rollout.padded_decoders import PaddedDecoder, RecomputedDecoder, unpacked_decoder
from sheeprlhf.rollout.sampler import engine_of, sample_responses
from sheeprlhf.structure.model import ModelConfig
from sheeprlhf.structure.run import GenConfig
from sheeprlhf.utils.errors import ModelError
from tests.support.models import ARCHITECTURES, EOS, EXPERTS, FAMILIES, UNPACKED, ModelFolder, make_model_folder
from tests.support.plain import response_logprobs

SCORED = (
    "gemma3_text",
    "qwen3_5_text",
    "gpt_neo",
    "bloom",
    "phi3 (longrope)",
)  # those that transformers has with a score head


def examples() -> list[Example]:
    """Rows of very different lengths, the longest beyond all windows, each with two responses."""
    rng = np.random.default_rng(0)
    sizes = [(3, 5, 2), (20, 1, 18), (1, 30, 4), (9, 9, 9)]
    return [
        Example(row, *((ids := [rng.integers(0, 250, size).astype(np.int32) for size in of_row])[0], tuple(ids[1:])))
        for row, of_row in enumerate(sizes)
    ]


def policy_of(folder: Path, say: Callable[[str], None] = print, **options: Any) -> Policy:
    cfg = ModelConfig(config_name="auto", repo_name=str(folder))
    return load_policy(cfg, load_tokenizer(cfg), **{"longest": 64, "batching": "auto"} | options, say=say)


def reward_of(folder: Path, say: Callable[[str], None] = print, **options: Any) -> RewardModel:
    cfg = ModelConfig(config_name="auto", repo_name=str(folder))
    return load_reward_model(cfg, load_tokenizer(cfg), **{"longest": 64, "batching": "auto"} | options, say=say)


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *FAMILIES, *UNPACKED])
def test_log_probabilities_equal_those_of_rows_alone(architecture: str, model_folder: ModelFolder) -> None:
    """Packed where the model can be; also of batches that are padded with a token of the texts."""
    lines: list[str] = []
    policy = policy_of(model_folder(architecture), lines.append)
    packed = policy.packed
    assert packed == (architecture not in (*UNPACKED, "falcon")) and len(lines) == (not packed)
    assert packed or lines[0].startswith("batches are padded")
    rows = examples()
    with torch.no_grad():
        batches = [collate_padded(rows, pad_id=EOS)]
        batches += [collate_packed(rows)] if packed else []
        found = [policy.eval()(batch).target_N for batch in batches]
        plain = AutoModelForCausalLM.from_pretrained(
            model_folder(architecture), dtype=torch.float32, attn_implementation="eager"
        ).eval()
        expected = [response_logprobs(plain, row.prompt_ids, response) for row in rows for response in row.responses]
    for target_N in found:
        assert_close(target_N, torch.cat(expected), rtol=0, atol=1e-5)
    if not packed:
        with pytest.raises(ModelError, match=r"task\.batching=packed: .*task\.batching=padded"):
            policy_of(model_folder(architecture), batching="packed")


@pytest.mark.parametrize("attention", ["eager", "sdpa", pytest.param("flex_attention", marks=pytest.mark.nightly)])
def test_attention_by_choice_is_padded(attention: str, model_folder: ModelFolder) -> None:
    cfg = ModelConfig(config_name="auto", repo_name=str(model_folder()), attn_implementation=attention)
    lines: list[str] = []
    options: dict[str, Any] = {"longest": 64, "batching": "auto", "say": lines.append}
    policy = load_policy(cfg, load_tokenizer(cfg), **options)
    assert policy.causal_lm().config._attn_implementation == attention
    assert not policy.packed and f"model.attn_implementation={attention}" in lines[0]
    plain = AutoModelForCausalLM.from_pretrained(model_folder(), dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        found = policy.eval()(collate_padded(examples(), pad_id=0)).target_N
        expected = [
            response_logprobs(plain, row.prompt_ids, response) for row in examples() for response in row.responses
        ]
    assert_close(found, torch.cat(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize("architecture", SCORED)
def test_scores_equal_those_of_rows_alone(architecture: str, tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path / "model", architecture, scores=True)
    lines: list[str] = []
    reward = reward_of(folder, lines.append)
    packed = reward.packed
    assert packed == (architecture not in UNPACKED) and len(lines) == (not packed)
    rows = examples()
    plain = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    texts = [[*row.prompt_ids.tolist(), *response.tolist()] for row in rows for response in row.responses]
    with torch.no_grad():
        batch = collate_packed(rows, targets="last") if packed else collate_padded(rows, pad_id=0, targets="last")
        scores_N = reward.eval()(batch)
        expected_N = torch.stack([plain(input_ids=torch.tensor([ids])).logits[0, 0] for ids in texts])
    assert_close(scores_N, expected_N, rtol=0, atol=1e-5)
    if not packed:
        with pytest.raises(ModelError, match=r"task\.batching=packed: .*task\.batching=padded"):
            reward_of(folder, batching="packed")


@pytest.mark.parametrize(
    ("changes", "longest"),
    [
        ({"layer_types": ["chunked_attention", "full_attention"], "attention_chunk_size": 16}, 16),
        ({"layer_types": ["full_attention", "full_attention"], "sliding_window": 16}, None),
        ({"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 16}, 16),
        ({"sliding_window_size": 16}, 16),
        ({"sliding_windows": [64, 16]}, 16),
        ({"layer_types": ["full_attention", "indexed_attention"]}, 0),
        ({"layer_types": ["linear_attention", "full_attention"]}, 0),
        ({}, None),
    ],
)
def test_which_configurations_limit_packed_rows(
    changes: dict[str, Any], longest: int | None, model_folder: ModelFolder
) -> None:
    """`longest` is the length from which on rows are cut; None: none, 0: all."""
    policy = policy_of(model_folder("llama"))
    model = policy.causal_lm()
    for key, value in changes.items():
        setattr(model.config, key, value)
    for length in (16, 17):
        assert bool(packing_limit(model, length)) == (longest is not None and length > longest)


def test_dynamic_rotary_embeddings_are_the_same_for_all_rows_that_a_model_reads(tmp_path: Path) -> None:
    """They change beyond `max_position_embeddings` tokens, and such rows are rejected: packed rows are exact."""
    rope = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0}
    folder = make_model_folder(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text()) | {"rope_parameters": rope, "max_position_embeddings": 40}
    (folder / "config.json").write_text(json.dumps(config))
    policy = policy_of(folder, longest=40)
    rows = [row for row in examples() if sum(map(len, (row.prompt_ids, *row.responses))) <= 40]
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = [response_logprobs(plain, row.prompt_ids, response) for row in rows for response in row.responses]
        found = [policy.eval()(batch).target_N for batch in (collate_packed(rows), collate_padded(rows, pad_id=0))]
    assert policy.packed and len(rows) == 4
    for target_N in found:
        assert_close(target_N, torch.cat(expected), rtol=0, atol=1e-5)
    with pytest.raises(ModelError, match=r"data\.max_length=40"):
        policy_of(folder, longest=41)


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *UNPACKED, *EXPERTS, "gemma2", "gemma3n_text", "gpt_oss"])
def test_what_is_written_is_that_of_an_argmax_loop(architecture: str, model_folder: ModelFolder) -> None:
    """By every way to write; prompts of different lengths, responses beyond all windows."""
    folder = model_folder(architecture)
    policy = policy_of(folder)
    model, tokenizer = policy.causal_lm().eval(), load_tokenizer(ModelConfig(config_name="auto", repo_name=str(folder)))
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in (*model.parameters(), *plain.parameters()):
            parameter.mul_(2.0)  # else falcon writes the same after every prompt
    prompts = [row.prompt_ids for row in examples()]
    expected = [_greedy(plain, prompt, 12) for prompt in prompts]
    assert len(set(map(tuple, expected))) > 1  # the model tells prompts apart
    sampled = sample_responses(
        model,
        prompts,
        np.zeros((len(prompts), 2, 12)),
        temperature=1.0,
        end_ids=[],
        token_budget=1000,
        packed=policy.packed,
        top_k=1,
    )
    for one, ids in zip(sampled, expected, strict=True):
        assert [response.tolist() for response in one.responses] == [ids, ids]
    options = GenConfig(max_new_tokens=12, do_sample=False)
    assert list(stream_ids(model, prompts[1], options, end_ids=[], seed=0)) == expected[1]
    written = generate_ids(model, tokenizer, prompts, options)
    ends = [ids[: ids.index(EOS) + 1] if EOS in ids else ids for ids in expected]
    assert [ids.tolist() for ids in written] == ends


def _greedy(model: Any, prompt: np.ndarray, count: int) -> list[int]:
    """An argmax loop without a cache."""
    ids = prompt.tolist()
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_a_cache_that_is_wrong_is_not_used(model_folder: ModelFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def rows(architecture: str) -> Any:
        return unpacked_decoder(policy_of(model_folder(architecture)).causal_lm().eval())

    assert isinstance(rows("qwen3_5_text"), PaddedDecoder)
    assert isinstance(rows("llama"), PaddedDecoder)
    monkeypatch.setattr(PaddedDecoder, "_select", lambda *_: None)
    assert isinstance(rows("qwen3_5_text"), RecomputedDecoder)


@pytest.mark.parametrize("architecture", ["qwen3_5_text", "gemma3_text", "mixtral"])
def test_log_probabilities_of_the_engine_of_transformers(architecture: str, model_folder: ModelFolder) -> None:
    policy = policy_of(model_folder(architecture))
    prompts = [row.prompt_ids for row in examples()]
    uniforms = np.random.default_rng(0).random((len(prompts), 2, 10))
    sampled = engine_of("hf")(policy.causal_lm(), prompts, uniforms, temperature=1.0, end_ids=[], token_budget=1000)
    rows = [Example(0, prompt, one.responses) for prompt, one in zip(prompts, sampled, strict=True)]
    with torch.no_grad():
        trained_N = policy.eval()(collate_padded(rows, pad_id=0)).target_N
    assert_close(
        torch.from_numpy(np.concatenate([np.concatenate(one.logprobs) for one in sampled])),
        trained_N,
        rtol=0,
        atol=1e-4,
    )


def test_an_architecture_without_score_heads_is_rejected_before_data_is_prepared(model_folder: ModelFolder) -> None:
    cfg = ModelConfig(config_name="auto", repo_name=str(model_folder("mamba")))
    with pytest.raises(ModelError, match=r"mamba.*reward model"):
        check_weights(cfg, new_head=True)
    assert check_weights(cfg) == ""
