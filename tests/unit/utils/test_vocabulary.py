"""Ids that no token has: never sampled by anybody, and of probability 0 where samples are learned from."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from sheeprlhf.agent.policy import Policy, load_policy, reference_of
from sheeprlhf.agent.reward import load_reward_model, reward_model_of
from sheeprlhf.data.example import Example, collate_packed, collate_padded
from sheeprlhf.model.folder.embedding_rows import check_vocabulary
from sheeprlhf.model.folder.load import load_tokenizer
from sheeprlhf.model.lm_head import head_logprobs
from sheeprlhf.rollout.engines import generate_ids, stream_ids
from sheeprlhf.rollout.sampler import engine_of, sample_responses
from sheeprlhf.structure.model import AutoModelConfig
from sheeprlhf.structure.run import GenConfig
from sheeprlhf.utils.errors import ModelError
from sheeprlhf.utils.vocabulary import defined_ids, num_rows_needed, undefined_ids
from tests.support.models import VOCAB, ModelFolder, byte_tokenizer
from tests.support.plain import response_logprobs

PROMPTS = [np.array([257, 70], dtype=np.int32), np.array([257, 71, 72], dtype=np.int32)]
PADDED = 300  # rows of a model that has more than its tokenizer


def holey_tokenizer() -> Any:
    """A byte tokenizer without the letters z and {, and with a token at 270."""
    vocabulary = {token: number for token, number in byte_tokenizer().get_vocab().items() if token not in "z{"}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary | {"far": 270}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens(["<pad>", "<s>", "</s>"])
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


@pytest.fixture(scope="module")
def padded(model_folder: ModelFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose rows without a token are far likelier than all others."""
    folder = tmp_path_factory.mktemp("padded") / "model"
    shutil.copytree(model_folder(), folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.resize_token_embeddings(PADDED, mean_resizing=False)
    head = nn.Linear(model.config.hidden_size, PADDED, bias=False)
    model.config.tie_word_embeddings = False
    model.lm_head = head
    with torch.no_grad():
        head.weight.copy_(model.get_input_embeddings().weight)
        head.weight[259:] *= 20
    model.save_pretrained(folder)
    return folder


def policy_of(folder: Path) -> Policy:
    cfg = AutoModelConfig(repo_name=str(folder))
    policy = load_policy(cfg, load_tokenizer(cfg), longest=64, batching="auto")
    return policy.eval()


def test_ids_without_a_token_are_found() -> None:
    tokenizer = byte_tokenizer()
    assert defined_ids(tokenizer).tolist() == list(range(259)) and num_rows_needed(tokenizer) == 259
    assert undefined_ids(tokenizer, 259) is None
    assert undefined_ids(tokenizer, 262).tolist() == [259, 260, 261]
    holes = holey_tokenizer()
    ids = [byte_tokenizer().convert_tokens_to_ids(letter) for letter in "z{"]
    assert num_rows_needed(holes) == 271 and len(holes) < 271
    assert undefined_ids(holes, 272).tolist() == [*sorted(ids), *range(259, 270), 271]


@pytest.mark.parametrize("name", ["native", "hf"])
def test_engines_never_sample_them(name: str, padded: Path) -> None:
    """And the log-probabilities are of the defined ids alone, as the policy computes them."""
    policy = policy_of(padded)
    uniforms = np.random.default_rng(0).random((2, 4, 6))
    options: dict[str, Any] = dict(prompts=PROMPTS, uniforms=uniforms, temperature=0.7, token_budget=200, end_ids=[258])
    plain = engine_of(name)(policy.causal_lm(), **options)
    assert any((ids > 258).any() for one in plain for ids in one.responses)
    policy.exclude_undefined(byte_tokenizer())
    found = engine_of(name)(policy.causal_lm(), undefined_U=policy.undefined_U, **options)
    hooks = policy.causal_lm()._forward_hooks
    assert not hooks
    for prompt, one in zip(PROMPTS, found, strict=True):
        for ids, logprobs in zip(one.responses, one.logprobs, strict=True):
            assert ids.max() <= 258
            with torch.no_grad():
                expected = response_logprobs(policy.causal_lm(), prompt, ids, temperature=0.7, num_ids=259)
            assert_allclose(logprobs, expected.numpy(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("given", [{"top_k": 1}, {"top_k": 3}, {"top_p": 0.5}])
def test_likeliest_tokens_are_of_the_defined_ones(given: dict[str, Any], padded: Path) -> None:
    policy = policy_of(padded)
    policy.exclude_undefined(byte_tokenizer())
    uniforms = np.random.default_rng(0).random((2, 4, 6))
    options: dict[str, Any] = dict(
        temperature=1.0, token_budget=200, end_ids=[], undefined_U=policy.undefined_U, **given
    )
    found = sample_responses(policy.causal_lm(), PROMPTS, uniforms, **options)
    assert max(ids.max() for one in found for ids in one.responses) <= 258


@pytest.mark.parametrize("cfg", [GenConfig(), GenConfig(do_sample=True), GenConfig(num_beams=2)])
def test_generate_and_stream_never_write_them(cfg: GenConfig, padded: Path) -> None:
    model, cfg = policy_of(padded).causal_lm(), dataclasses.replace(cfg, max_new_tokens=5)
    undefined = torch.from_numpy(undefined_ids(byte_tokenizer(), PADDED))
    torch.manual_seed(3)
    written = generate_ids(model, byte_tokenizer(), PROMPTS[:1], cfg)
    assert max(ids.max() for ids in written) <= 258
    if cfg.num_beams == 1:
        assert list(stream_ids(model, PROMPTS[0], cfg, end_ids=[258], seed=3, undefined_U=undefined)) == list(
            written[0]
        )
    assert max(stream_ids(model, PROMPTS[0], cfg, end_ids=[258], seed=3)) > 258


@pytest.mark.parametrize("collate", [collate_packed, lambda rows: collate_padded(rows, pad_id=0)])
def test_the_policy_learns_from_the_distribution_that_is_sampled(collate: Callable[..., Any], padded: Path) -> None:
    """Log-probabilities, entropies and gradients against plain torch on the defined columns; the reference too."""
    policy = policy_of(padded)
    row = Example(0, PROMPTS[0], (np.array([65, 66, 258], dtype=np.int32),))
    whole = torch.tensor([[*PROMPTS[0], 65, 66, 258]])
    unmasked = policy(collate([row])).target_N
    policy.exclude_undefined(byte_tokenizer())
    reference = reference_of(policy)
    found = policy(collate([row]), temperature=0.7).target_N
    with torch.no_grad():
        entropy = policy(collate([row]), entropy=True, temperature=0.7).entropy_N
    logits = policy.causal_lm()(whole).logits[0, 1:-1]
    rows = (logits[:, :259] / 0.7).log_softmax(-1)
    expected = rows[torch.arange(3), whole[0, 2:]]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(reference(collate([row]), temperature=0.7).target_N, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(entropy, -(rows.exp() * rows).sum(-1), rtol=0, atol=1e-5)
    assert (unmasked < logits.log_softmax(-1).max(-1).values - 1).all()
    head = policy.causal_lm().lm_head.weight
    [ours] = torch.autograd.grad(found.sum(), head)
    [theirs] = torch.autograd.grad(expected.sum(), head)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert not ours[259:].any()


def test_chunks_exclude_them_too() -> None:
    torch.manual_seed(0)
    hidden, head = torch.randn(6, 4, requires_grad=True), nn.Linear(4, 10, bias=False)
    index, targets, undefined = torch.tensor([0, 2, 3, 5]), torch.tensor([1, 4, 0, 6]), torch.tensor([2, 8, 9])
    options: dict[str, Any] = dict(mean=False, undefined_U=undefined)
    found = head_logprobs(hidden, head, index, targets, max_logits=20, **options).target_N
    logits = head(hidden).index_select(1, torch.tensor([0, 1, 3, 4, 5, 6, 7]))
    expected = logits.log_softmax(-1)[index, torch.tensor([1, 3, 0, 5])]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    for ours, theirs in zip(
        torch.autograd.grad(found.sum(), [hidden, head.weight]),
        torch.autograd.grad(expected.sum(), [hidden, head.weight]),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_a_model_without_a_row_for_the_largest_id_is_refused(model_folder: ModelFolder, tmp_path: Path) -> None:
    """A hole makes the largest id larger than the number of tokens; policy and reward model alike."""
    shutil.copytree(model_folder(), tmp_path / "model")
    holey_tokenizer().save_pretrained(tmp_path / "model")
    cfg = AutoModelConfig(repo_name=str(tmp_path / "model"))
    tokenizer = load_tokenizer(cfg)
    assert len(tokenizer) <= VOCAB < num_rows_needed(tokenizer)
    with pytest.raises(ModelError, match="270"):
        load_policy(cfg, tokenizer, longest=64, batching="auto")
    plain = AutoModelConfig(repo_name=str(model_folder()))
    policy = load_policy(plain, load_tokenizer(plain), longest=64, batching="auto")
    reward_model_of(policy, plain, load_tokenizer(plain)).save(tmp_path / "reward", load_tokenizer(plain))
    check_vocabulary(AutoModelConfig(repo_name=str(tmp_path / "reward")), num_rows_needed(load_tokenizer(plain)))
    holey_tokenizer().save_pretrained(tmp_path / "reward")
    cfg = AutoModelConfig(repo_name=str(tmp_path / "reward"))
    with pytest.raises(ModelError, match="270"):
        check_vocabulary(cfg, num_rows_needed(load_tokenizer(cfg)))
    with pytest.raises(ModelError, match="270"):
        load_reward_model(cfg, tokenizer, longest=64, batching="auto")
