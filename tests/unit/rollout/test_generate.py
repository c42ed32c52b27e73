"""Generation and streaming against each other, where they end, and what they must leave alone.

`tests/unit/agent/test_batching.py` compares both with an argmax loop.
"""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from sheeprlhf.model.folder.load import load_causal_lm, load_tokenizer
from sheeprlhf.rollout import engines
from sheeprlhf.rollout.engines import generate_ids, generate_responses, stream_ids
from sheeprlhf.structure.model import AutoModelConfig, ModelConfig
from sheeprlhf.structure.run import GenConfig
from tests.support.models import EOS, VOCAB, ModelFolder, byte_tokenizer

PROMPTS = [np.frombuffer(text, dtype=np.uint8).astype(np.int32) for text in (b"a", b"some longer words", b"Hi there")]
GREEDY = GenConfig(max_new_tokens=12)


def load(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    cfg = ModelConfig(config_name="auto", repo_name=str(folder))
    return load_causal_lm(cfg, vocabulary=VOCAB, longest=64), load_tokenizer(cfg)


def test_the_models_own_settings_neither_leak_nor_change(model_folder: ModelFolder) -> None:
    model, tokenizer = load(model_folder())
    sampled = GenConfig(max_new_tokens=12, do_sample=True)

    def both() -> list[list[str]]:
        torch.manual_seed(0)
        return [generate_responses(model, tokenizer, PROMPTS, cfg) for cfg in (GREEDY, sampled)]

    expected = both()
    own = GenerationConfig(
        do_sample=True,
        temperature=0.1,
        top_k=2,
        top_p=0.5,
        max_length=20,
        min_length=5,
        forced_eos_token_id=EOS,
        forced_bos_token_id=1,
        repetition_penalty=9.0,
        no_repeat_ngram_size=1,
        suppress_tokens=list(range(2, 100)),
        begin_suppress_tokens=list(range(100, 256)),
        eos_token_id=3,
        pad_token_id=7,
        num_return_sequences=2,
    )
    before = own.to_dict()
    model.generation_config = own
    assert both() == expected
    assert model.generation_config is own and own.to_dict() == before


@pytest.mark.parametrize("fails", [False, True])
def test_training_flags_and_settings_are_restored(
    fails: bool, model_folder: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = load(model_folder("gpt2"))
    model.train()
    model.transformer.h[1].eval()  # a mixed state
    before = {name: module.training for name, module in model.named_modules()}
    own = model.generation_config
    during: list[bool] = []

    def watch(*_: object) -> None:
        during.extend(module.training for module in model.modules())
        if fails:
            raise RuntimeError("broken")

    model.register_forward_pre_hook(watch)
    if fails:
        with pytest.raises(RuntimeError, match="broken"):
            generate_responses(model, tokenizer, PROMPTS, GREEDY)
    else:
        generate_responses(model, tokenizer, PROMPTS, GREEDY)
    assert during and not any(during)
    assert {name: module.training for name, module in model.named_modules()} == before
    assert model.generation_config is own


def test_it_stops_at_eos(model_folder: ModelFolder) -> None:
    """A head that says "a" until the text has 4 tokens and EOS from then on; the shorter prompt writes longer."""
    model, tokenizer = load(model_folder("phi"))
    steps: list[int] = []

    def say(module: torch.nn.Module, args: object, kwargs: dict, output: object) -> object:
        position = kwargs["position_ids"][:, -1]  # of the newest token
        steps.append(int(position.max()))
        chosen = torch.where(position >= 3, EOS, ord("a") - 33)  # the byte alphabet begins with "!"
        output.logits = torch.nn.functional.one_hot(chosen, VOCAB)[:, None].float()
        return output

    model.register_forward_hook(say, with_kwargs=True)
    responses = generate_responses(model, tokenizer, [np.array([1]), np.array([1, 2, 3])], GREEDY)
    assert responses == ["aaa", "a"]
    assert len(steps) == 4  # of GREEDY's 12


def test_sampling_draws_only_from_torch(model_folder: ModelFolder) -> None:
    model, tokenizer = load(model_folder())
    cfg = GenConfig(max_new_tokens=12, do_sample=True, temperature=1.5)
    random.seed(0)
    np.random.seed(0)
    python, numpy = random.getstate(), np.random.get_state()[1].tolist()
    texts = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        texts.append(generate_responses(model, tokenizer, PROMPTS, cfg))
    assert texts[0] == texts[1] != texts[2]
    assert random.getstate() == python and np.random.get_state()[1].tolist() == numpy
    torch.manual_seed(1)
    state = torch.get_rng_state()
    generate_responses(model, tokenizer, PROMPTS, GREEDY)
    assert torch.equal(torch.get_rng_state(), state)
    narrow = GenConfig(max_new_tokens=12, do_sample=True, top_k=1)
    assert generate_responses(model, tokenizer, PROMPTS, narrow) == generate_responses(
        model, tokenizer, PROMPTS, GREEDY
    )


def test_an_end_token_is_kept_on_request(model_folder: ModelFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = load(model_folder("llama"))
    written = tokenizer("hi", add_special_tokens=False).input_ids
    rows = [np.array([*written, EOS]), np.array(written)]
    monkeypatch.setattr(engines, "generate_ids", lambda *arguments: rows)
    assert generate_responses(model, tokenizer, PROMPTS[:2], GREEDY) == ["hi", "hi"]
    kept = [f"hi{tokenizer.decode([EOS])}", "hi"]
    assert generate_responses(model, tokenizer, PROMPTS[:2], GREEDY, with_end_token=True) == kept


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


@pytest.mark.parametrize(
    "architecture", ["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gpt2", "falcon"))]
)
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
