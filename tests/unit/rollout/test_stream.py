"""A streamed response has the tokens that `generate` writes with the same seed."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from sheeprlhf.model.folder.load import load_causal_lm
from sheeprlhf.rollout.engines import generate_ids, stream_ids
from sheeprlhf.structure.model import AutoModelConfig
from sheeprlhf.structure.run import GenConfig
from tests.support.models import EOS, VOCAB, byte_tokenizer

PROMPT = np.frombuffer(b"a prompt", dtype=np.uint8).astype(np.int32)
WAYS = {
    "greedy": {"do_sample": False},
    "plain": {"do_sample": True},
    "cold": {"do_sample": True, "temperature": 0.3},
    "top-k": {"do_sample": True, "top_k": 5, "temperature": 2.0},
    "top-p": {"do_sample": True, "top_p": 0.6},
    "both": {"do_sample": True, "top_k": 20, "top_p": 0.8, "temperature": 0.8},
}


def loaded(folder):
    return load_causal_lm(AutoModelConfig(repo_name=str(folder)), vocabulary=VOCAB, longest=1).eval()


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "falcon"])
@pytest.mark.parametrize("way", WAYS)
def test_it_writes_what_generate_writes(architecture, way, model_folder):
    folder = model_folder(architecture)
    cfg = GenConfig(max_new_tokens=12, **WAYS[way])
    undefined = torch.arange(EOS + 1, VOCAB)  # rows of the model that the tokenizer has no tokens for
    streamed = list(stream_ids(loaded(folder), PROMPT, cfg, end_ids=[EOS], seed=7, undefined_U=undefined))
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    torch.manual_seed(7)
    [expected] = generate_ids(plain, byte_tokenizer(), [PROMPT], cfg)
    assert streamed == expected.tolist()


def test_eos_ends_it_and_is_the_last_token(model_folder):
    model, cfg = loaded(model_folder("llama")), GenConfig(max_new_tokens=12, do_sample=True)
    free = list(stream_ids(model, PROMPT, cfg, end_ids=[], seed=3))
    assert len(free) == 12
    for token in {free[0], free[6], free[11]}:
        end = free.index(token) + 1
        assert list(stream_ids(model, PROMPT, cfg, end_ids=[token], seed=3)) == free[:end]


def test_it_uses_no_random_numbers_of_others(model_folder):
    model, cfg = loaded(model_folder("llama")), GenConfig(max_new_tokens=6, do_sample=True)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    stream = stream_ids(model, PROMPT, cfg, end_ids=[], seed=1)
    found = []
    for token in stream:
        found.append(token)
        torch.rand(3)
        assert torch.is_grad_enabled()
    torch.set_rng_state(before)
    assert found == list(stream_ids(model, PROMPT, cfg, end_ids=[], seed=1))
    assert torch.equal(torch.get_rng_state(), before)
