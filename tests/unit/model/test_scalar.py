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

from sheeprlhf.agent.reward import RewardModel, read_score_options
from sheeprlhf.data.example import collate_packed, collate_padded
from sheeprlhf.model.attention import PACKED, register
from sheeprlhf.model.folder.load import scalar_model
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
