"""Scores against plain transformers, which has to load what we save."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from sheeprlhf.agent.policy import load_policy
from sheeprlhf.agent.reward import RewardModel, load_reward_model, read_score_options, reward_model_of
from sheeprlhf.data.example import collate_packed, collate_padded
from sheeprlhf.model.attention import PACKED, register
from sheeprlhf.model.folder.load import load_tokenizer, scalar_model
from sheeprlhf.structure.model import ModelConfig
from sheeprlhf.utils.end_tokens import padding_token
from sheeprlhf.utils.errors import ModelError
from tests.support.batches import random_examples
from tests.support.models import ModelFolder, byte_tokenizer

ARCHITECTURES = ("llama", "opt", "gpt2", "phi", "gpt_neox", "qwen3", "mistral", "falcon")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_plain_transformers_gives_the_same_scores(architecture: str, model_folder: ModelFolder, tmp_path: Path) -> None:
    folder = model_folder(architecture)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    register()
    causal = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa").eval()
    if causal._can_set_attn_implementation():
        causal.set_attn_implementation(PACKED)
    reward = RewardModel(scalar_model(causal, tokenizer)).eval()
    examples = random_examples(4, 2)
    packed = architecture != "falcon"
    batch = collate_packed(examples, targets="last") if packed else collate_padded(examples, pad_id=0, targets="last")
    with torch.no_grad():
        ours = reward(batch)
    reward.model.save_pretrained(tmp_path)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=1).eval()
    pad = plain.config.pad_token_id
    assert pad != tokenizer.eos_token_id
    assert tokenizer.convert_ids_to_tokens(pad) == padding_token(tokenizer)
    rows = [torch.tensor([*e.prompt_ids, *response]) for e in examples for response in e.responses]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    with torch.no_grad():
        theirs = plain(input_ids=ids, attention_mask=mask).logits[:, 0]
    assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_a_reward_model_of_half_precision_keeps_its_head_in_float32(model_folder: ModelFolder, tmp_path: Path) -> None:
    """As in its training: the scores are those of the float32 head on hidden states in bfloat16."""
    cfg = ModelConfig(config_name="auto", repo_name=str(model_folder()), dtype="bfloat16")
    tokenizer = load_tokenizer(cfg)
    trained = reward_model_of(load_policy(cfg, tokenizer, longest=64, batching="packed"), cfg, tokenizer)
    trained.classifier().score.weight.data = trained.classifier().score.weight.data.bfloat16().float()
    trained.save(tmp_path, tokenizer)
    cfg.repo_name = str(tmp_path)
    loaded = load_reward_model(cfg, tokenizer, longest=64, batching="packed")
    batch = collate_packed(random_examples(4, 2), targets="last")
    with torch.no_grad():
        scores, expected = loaded.eval()(batch), trained.eval()(batch)
        assert scores.dtype == torch.float32
        assert_close(scores, expected, rtol=0, atol=1e-6)
        rounded = loaded.bfloat16()(batch)  # as with fabric.precision=bf16-true
    assert rounded.dtype == torch.float32
    assert_close(rounded, expected, rtol=0.02, atol=0.02)


def test_a_new_head_forgets_the_offset_and_the_steps_of_the_one_before(model_folder: ModelFolder) -> None:
    """A reward model may train on from the layers of another one."""
    cfg = ModelConfig(config_name="auto", repo_name=str(model_folder()))
    tokenizer = load_tokenizer(cfg)
    policy = load_policy(cfg, tokenizer, longest=64, batching="packed")
    policy.causal_lm().config.reward_offset = 2.5
    policy.causal_lm().config.step_separator = "\n"
    model = reward_model_of(policy, cfg, tokenizer)
    assert (model.offset, model.step_separator) == (0.0, None)


def test_padding_is_a_token_without_another_role() -> None:
    tokenizer = byte_tokenizer()
    assert padding_token(tokenizer) == "<pad>"
    tokenizer.pad_token = tokenizer.eos_token
    assert padding_token(tokenizer) == "<pad>"  # special in the vocabulary, though no role names it
    bare = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer().backend_tokenizer, eos_token="<pad>")
    assert padding_token(bare) == "<s>"
    bare.bos_token, bare.unk_token = "<s>", "</s>"
    assert padding_token(bare) == "\u00ff"  # a byte that no UTF-8 text has
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0, "</s>": 1})), eos_token="</s>")
    with pytest.raises(ModelError, match="pad_token"):
        padding_token(words)


@pytest.mark.parametrize("odd", ['"x"', "true", "null", "1e400", "9" * 400, "9" * 4000, "[1]", "NaN"])
def test_an_offset_that_cannot_be_is_refused(odd: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(f'{{"reward_offset": {odd}}}')
    with pytest.raises(ModelError, match="reward_offset"):
        read_score_options(tmp_path)
    (tmp_path / "config.json").write_text('{"reward_offset": -2}')
    assert read_score_options(tmp_path) == (-2.0, None)
