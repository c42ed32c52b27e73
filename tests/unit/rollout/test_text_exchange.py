"""A reward model with another tokenizer reads text: its scores are those of plain transformers on that text."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast

from sheeprlhf.agent.reward import load_reward_model
from sheeprlhf.cli import run
from sheeprlhf.data.example import Example
from sheeprlhf.engine.fabric import make_fabric
from sheeprlhf.model.load import load_tokenizer
from sheeprlhf.reward.call import Texts
from sheeprlhf.rollout.rollout import Rollout, TextExchange, predict_scores
from sheeprlhf.structure.fabric import FabricConfig
from sheeprlhf.structure.model import AutoModelConfig
from sheeprlhf.structure.rollout import RLOOConfig
from sheeprlhf.utils.errors import RewardError
from tests.support.models import BOS, EOS, byte_tokenizer
from tests.support.runs import train_words, write_rows

ModelFolder = Callable[..., Path]
PROMPTS = ("what is it?", "a b\n")
RESPONSES = ("it's a cat", "\u00e9\u00e9", "", "no")
FINISHED = (True, False, True, True)


def other_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes in another order, a token for "at", other special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=True)
    vocab = {c: i for i, c in enumerate(["<end>", "<begin>", "[PAD]", *alphabet, "at", "<|user|>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("a", "t")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>", "<begin>", "[PAD]", "<|user|>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<begin> $A", special_tokens=[("<begin>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", bos_token="<begin>", eos_token="<end>", model_max_length=96
    )


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, tokenizer = tmp_path_factory.mktemp("judge"), other_tokenizer()
    torch.manual_seed(1)
    options = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    options |= {"vocab_size": len(tokenizer), "num_labels": 1, "max_position_embeddings": 96, "initializer_range": 0.3}
    config = AutoConfig.for_model("llama", pad_token_id=2, bos_token_id=1, eos_token_id=0, **options)
    AutoModelForSequenceClassification.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def rollout_of(
    prompts: tuple[str, ...], responses: tuple[str, ...], finished: tuple[bool, ...]
) -> tuple[Rollout, Texts]:
    """What a policy with one token a byte has written, two responses to each prompt."""
    policy = byte_tokenizer()

    def ids(text: str) -> list[int]:
        return policy(text, add_special_tokens=False)["input_ids"]

    rows = tuple(
        Example(
            number,
            np.array([BOS, *ids(prompt)], np.int32),
            tuple(np.array([*ids(text), EOS], np.int32) for text in responses[2 * number : 2 * number + 2]),
        )
        for number, prompt in enumerate(prompts)
    )
    ended = np.array(finished).reshape(-1, 2)
    texts = Texts([p for p in prompts for _ in (0, 1)], list(responses), list(finished), [1] * len(responses), {})
    return Rollout(rows, np.zeros(ended.shape), ended, {}), texts


def plain_score(folder: Path, prompt: str, response: str, finished: bool) -> float:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    ids = tokenizer(prompt)["input_ids"] + tokenizer(response, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        return model(input_ids=torch.tensor([[*ids, 0] if finished else ids])).logits.item()


def test_scores_are_those_of_the_text(judge: Path) -> None:
    cfg = AutoModelConfig(repo_name=str(judge))
    reader = load_tokenizer(cfg)
    model, _ = load_reward_model(cfg, reader, longest=64, batching="padded", say=print)
    rollout, texts = rollout_of(PROMPTS, RESPONSES, FINISHED)
    read = TextExchange(byte_tokenizer(), reader, print)(rollout, texts)
    assert int(read.rows[0].responses[0][-1]) == 0  # its own end token
    assert int(read.rows[0].responses[1][-1]) != 0  # this one was cut
    fabric = make_fabric(FabricConfig(config_name="cpu", accelerator="cpu"))
    found = predict_scores(fabric, RLOOConfig(), model.eval(), read, packed=False)
    expected = [
        plain_score(judge, PROMPTS[number // 2], text, ended)
        for number, (text, ended) in enumerate(zip(RESPONSES, FINISHED, strict=True))
    ]
    assert found.tolist() == pytest.approx(expected, abs=1e-5)


def test_what_is_longer_than_the_reward_model_reads(judge: Path) -> None:
    cfg = AutoModelConfig(repo_name=str(judge))
    reader = load_tokenizer(cfg)
    model, _ = load_reward_model(cfg, reader, longest=64, batching="padded", say=print)
    rollout, texts = rollout_of(("x" * 80,), ("y" * 20, "y"), (True, True))
    read = TextExchange(byte_tokenizer(), reader, print)(rollout, texts)
    fabric = make_fabric(FabricConfig(config_name="cpu", accelerator="cpu"))
    with pytest.raises(RewardError, match="102 tokens of the reward model, which has 96 positions"):
        predict_scores(fabric, RLOOConfig(), model, read, packed=False)


def test_control_tokens_stay_control_tokens_and_strange_ones_are_told(judge: Path) -> None:
    writer, reader = byte_tokenizer(), load_tokenizer(AutoModelConfig(repo_name=str(judge)))
    writer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|odd|>"]})
    told: list[str] = []
    for text, strange in (("<|user|>hi", False), ("<|odd|>hi", True), ("<|odd|>ho", True)):
        ids = [BOS, *writer(text, add_special_tokens=False)["input_ids"]]
        response = writer("<|user|>", add_special_tokens=False, split_special_tokens=True)["input_ids"]
        row = Example(0, np.array(ids, np.int32), (np.array([*response, EOS], np.int32),))
        rollout = Rollout((row,), np.zeros((1, 1)), np.ones((1, 1), dtype=bool), {})
        texts = Texts([text], ["<|user|>"], [True], [8], {})
        [read] = TextExchange(writer, reader, told.append)(rollout, texts).rows
        assert reader.decode(read.prompt_ids) == f"<begin>{text}"
        control = reader.convert_tokens_to_ids("<|user|>")
        assert (control in read.prompt_ids) is not strange
        assert control not in read.responses[0]  # the policy wrote it as plain text
    assert len(told) == 2 and all("<|odd|>" in line for line in told)


def test_a_run_and_its_evaluation(
    judge: Path, tmp_path: Path, model_folder: ModelFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    data, run_dir = write_rows(tmp_path / "rows.jsonl", 12), tmp_path / "run"
    words = [w for w in train_words(model_folder(), data, run_dir, task="grpo") if not w.startswith("reward")]
    reward = ["reward=model", f"reward.folder={judge}"]
    run([*words, *reward, "task.max_num_steps=1", "task.sft_experiment_dir=null"])
    assert "critic" not in capsys.readouterr().err
    run(["eval", "task=reward", f"experiment_dir={run_dir}", *reward, "generation.max_new_tokens=4"])
    [file] = (run_dir / "eval").glob("reward-*.jsonl")
    for line in file.read_text().splitlines()[:4]:
        row = json.loads(line)
        against = plain_score(judge, row["prompt"], row["against"], True)
        assert row["against_score"] == pytest.approx(against, abs=1e-5)
