"""A reward model with another tokenizer reads text: its scores are those of plain transformers on that text."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast

from sheeprlhf.agent.reward import load_reward_model
from sheeprlhf.cli import run
from sheeprlhf.data.example import Example
from sheeprlhf.data.tokenize import TextExchange
from sheeprlhf.engine.fabric import make_fabric
from sheeprlhf.model.folder.load import load_tokenizer
from sheeprlhf.reward.score import Texts
from sheeprlhf.rollout.rollout import Rollout, check_positions, response_scores
from sheeprlhf.structure.model import AutoModelConfig
from sheeprlhf.structure.rollout import RLOOConfig
from sheeprlhf.structure.run import FabricConfig
from sheeprlhf.utils.errors import ModelError, RewardError
from tests.e2e.test_best_of_n import words as best_of_n_words
from tests.support.models import BOS, EOS, ModelFolder, byte_tokenizer, make_model_folder
from tests.support.runs import figures, train, train_words, write_rows

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
    model = load_reward_model(cfg, reader, longest=64, batching="padded", say=print)
    rollout, texts = rollout_of(PROMPTS, RESPONSES, FINISHED)
    read = rollout.encoded_by(TextExchange(byte_tokenizer(), reader, print), texts)
    assert int(read.rows[0].responses[0][-1]) == 0  # its own end token
    assert int(read.rows[0].responses[1][-1]) != 0  # this one was cut
    fabric = make_fabric(FabricConfig(config_name="cpu", accelerator="cpu"))
    found = response_scores(fabric, RLOOConfig(), model.eval(), read, reader)
    expected = [
        plain_score(judge, PROMPTS[number // 2], text, ended)
        for number, (text, ended) in enumerate(zip(RESPONSES, FINISHED, strict=True))
    ]
    assert found.tolist() == pytest.approx(expected, abs=1e-5)


def test_what_is_longer_than_the_reward_model_reads(judge: Path) -> None:
    cfg = AutoModelConfig(repo_name=str(judge))
    reader = load_tokenizer(cfg)
    model = load_reward_model(cfg, reader, longest=64, batching="padded", say=print)
    rollout, texts = rollout_of(("x" * 80,), ("y" * 20, "y"), (True, True))
    read = rollout.encoded_by(TextExchange(byte_tokenizer(), reader, print), texts)
    with pytest.raises(RewardError, match=r"102 tokens .* 96 positions"):
        check_positions(model, read)


def test_control_tokens_stay_control_tokens_and_strange_ones_are_reported(judge: Path) -> None:
    writer, reader = byte_tokenizer(), load_tokenizer(AutoModelConfig(repo_name=str(judge)))
    writer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|odd|>"]})
    messages: list[str] = []
    for text, strange in (("<|user|>hi", False), ("<|odd|>hi", True), ("<|odd|>ho", True)):
        ids = [BOS, *writer(text, add_special_tokens=False)["input_ids"]]
        response = writer("<|user|>", add_special_tokens=False, split_special_tokens=True)["input_ids"]
        row = Example(0, np.array(ids, np.int32), (np.array([*response, EOS], np.int32),))
        rollout = Rollout((row,), np.zeros((1, 1)), np.ones((1, 1), dtype=bool), {})
        texts = Texts([text], ["<|user|>"], [True], [8], {})
        [read] = rollout.encoded_by(TextExchange(writer, reader, messages.append), texts).rows
        assert reader.decode(read.prompt_ids) == f"<begin>{text}"
        control = reader.convert_tokens_to_ids("<|user|>")
        assert (control in read.prompt_ids) is not strange
        assert control not in read.responses[0]  # the policy wrote it as plain text
    assert len(messages) == 2 and all("<|odd|>" in line for line in messages)


@pytest.mark.parametrize(
    ("task", "kind"), [("online_dpo", "tokenizer"), pytest.param("rloo", "architecture", marks=pytest.mark.nightly)]
)
def test_other_tasks_with_another_tokenizer_or_architecture(
    task: str, kind: str, judge: Path, tmp_path: Path, model_folder: ModelFolder
) -> None:
    """A GPT-2 with the tokens of the policy, a llama, reads ids; the scores are those of plain transformers."""
    folder = judge if kind == "tokenizer" else make_model_folder(tmp_path / "gpt2", "gpt2", seed=5, scores=True)
    data, run_dir = write_rows(tmp_path / "rows.jsonl", 4), tmp_path / "run"
    words = [w for w in train_words(model_folder(), data, run_dir, task=task) if not w.startswith("reward")]
    more = ["task.max_num_steps=1", "task.save_rollouts=1", "task.rollout_size=8", "task.sft_experiment_dir=null"]
    run([*words, *more, "reward=model", f"reward.folder={folder}"])
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    for row in pq.read_table(next((run_dir / "rollouts").iterdir())).to_pylist():
        if kind == "tokenizer":
            expected = plain_score(folder, row["prompt"], row["response"], row["finished"])
        else:
            with torch.no_grad():
                expected = model(input_ids=torch.tensor([row["prompt_ids"] + row["response_ids"]])).logits.item()
        assert row["reward/model"] == row["score"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
def test_the_best_of_n_by_a_reward_model_with_another_tokenizer(
    judge: Path, tmp_path: Path, model_folder: ModelFolder
) -> None:
    data, run_dir = write_rows(tmp_path / "rows.jsonl", 12), tmp_path / "run"
    words = [word for word in best_of_n_words(model_folder(), data, run_dir) if not word.startswith("reward")]
    run([*words, "reward=model", f"reward.folder={judge}"])
    rows = [json.loads(line) for line in (run_dir / "dataset" / "train.jsonl").read_text().splitlines()]
    assert len(rows) > 5
    for row in rows:
        assert row["score"] == pytest.approx(plain_score(judge, row["prompt"], row["response"], True), abs=1e-5)


CHAT = (
    "{{ bos_token }}{% for m in messages %}<|user|>{{ m['role'] }}: {{ m['content'] | trim }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<|user|>assistant: {% endif %}"
)


def with_template(folder: Path, target: Path) -> Path:
    """The same reward model with a chat template."""
    shutil.copytree(folder, target)
    tokenizer = AutoTokenizer.from_pretrained(target)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(target)
    return target


def chat_score(folder: Path, messages: list[dict[str, str]]) -> float:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits.item()


def turns(prompt: str, response: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]


def model_folder_with_head(tmp_path: Path) -> Path:
    """A reward model with the policy's tokenizer."""
    return make_model_folder(tmp_path / "scores", seed=5, scores=True)


def test_scores_in_the_chat_template(judge: Path, tmp_path: Path) -> None:
    """A response with the text of a control token is scored as that text, without the token."""
    folder = with_template(judge, tmp_path / "chat")
    cfg = AutoModelConfig(repo_name=str(folder))
    reader = load_tokenizer(cfg)
    model = load_reward_model(cfg, reader, longest=96, batching="padded", say=print)
    texts_of_turns = (*RESPONSES[:3], " at <end> at")
    rollout, texts = rollout_of(PROMPTS, texts_of_turns, FINISHED)
    read = rollout.encoded_by(TextExchange(byte_tokenizer(), reader, print, chat=True), texts)
    fabric = make_fabric(FabricConfig(config_name="cpu", accelerator="cpu"))
    found = response_scores(fabric, RLOOConfig(), model.eval(), read, reader).tolist()
    assert found[:2] == pytest.approx([chat_score(folder, turns(PROMPTS[0], text)) for text in RESPONSES[:2]], abs=1e-5)
    ids = [*read.rows[1].prompt_ids, *read.rows[1].responses[1]]
    assert ids.count(0) == 2  # the ends of the two turns, id 0
    assert reader.decode(ids).endswith(" at <end> at<end>\n")
    with pytest.raises(ModelError, match=r"reward\.template=plain"):
        TextExchange(byte_tokenizer(), load_tokenizer(AutoModelConfig(repo_name=str(judge))), print, chat=True)


def test_a_critic_that_cannot_be_packed_learns_of_padded_batches(tmp_path: Path, model_folder: ModelFolder) -> None:
    """It begins as a falcon that reads chat; the policy, which could be packed, shares its batches."""
    scores = make_model_folder(tmp_path / "scores", "falcon", scores=True)
    reward = ["reward=model", f"reward.folder={with_template(scores, tmp_path / 'chat')}", "reward.template=chat"]
    more = [
        "task.init_critic_with_reward=true",
        "task.max_num_steps=2",
        "task.rollout_size=8",
        "task.mini_batch_size=8",
    ]
    rows, found = write_rows(tmp_path / "rows.jsonl", 8), []
    for batching in ("auto", "padded"):
        batched = [*more, f"task.batching={batching}"]
        run_dir = train(model_folder(), rows, tmp_path / batching, *reward, *batched, task="ppo")
        found.append(figures(run_dir)["loss/value"])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


@pytest.mark.parametrize("kind", ["text", pytest.param("messages", marks=pytest.mark.nightly)])
def test_a_sum_of_two_reward_models_in_their_templates(
    kind: str, judge: Path, tmp_path: Path, model_folder: ModelFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    """PPO, whose critic then begins as the policy; each term is that of plain transformers on the conversation."""
    data, first = tmp_path / "rows.jsonl", with_template(judge, tmp_path / "first")
    second = with_template(model_folder_with_head(tmp_path), tmp_path / "second")
    prompts = [f"{number} at" for number in range(4)]
    rows = [turns(prompt, " yes") for prompt in prompts]
    as_text = [{"prompt": prompt, "response": " yes"} for prompt in prompts]
    lines = as_text if kind == "text" else [{"messages": row} for row in rows]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = [w for w in train_words(model_folder(), data, tmp_path / "run", task="ppo") if not w.startswith("reward")]
    template = tmp_path / "policy.jinja"
    template.write_text("{% for m in messages %}[{{ m['content'] }}]{% endfor %}")
    more = [f"model.chat_template={template}"] if kind == "messages" else []
    more += ["task.rollout_size=8", "task.mini_batch_size=8", "task.max_num_steps=1", "task.save_rollouts=1"]
    terms = ["model", f"0.5*model:{second}"]
    reward = ["reward=list", f"reward.terms=[{','.join(terms)}]", f"reward.folder={first}", "reward.template=chat"]
    run([*words, *more, *reward, "task.sft_experiment_dir=null"])
    assert "several reward models" in capsys.readouterr().err
    found = pq.read_table(next((tmp_path / "run" / "rollouts").iterdir())).to_pylist()
    assert len(found) == 8
    num_compared = 0
    for row in found:
        if any(control in row["response"] for control in ("<end>", "<|user|>")):
            continue
        dialogue = turns(prompts[row["row_id"]], row["response"])
        if kind == "messages":  # the prompt with the generation prompt, and the response behind it
            dialogue[1]["content"] = row["response"] or "-"
        scores = [chat_score(folder, dialogue) for folder in (first, second)]
        stripped = row["response"].strip() == row["response"] and bool(row["response"])
        if kind == "text" or stripped:
            num_compared += 1
            assert [row["reward/model"], row[f"reward/model:{second}"]] == pytest.approx(scores, abs=1e-5)
        assert row["score"] == pytest.approx(row["reward/model"] + 0.5 * row[f"reward/model:{second}"], abs=1e-6)
    assert num_compared > 2
    if kind == "text":
        run(["eval", "task=reward", f"experiment_dir={tmp_path / 'run'}", *reward, "generation.max_new_tokens=4"])
        [file] = (tmp_path / "run" / "eval").glob("reward-list-*.jsonl")
        for line in file.read_text().splitlines():
            row = json.loads(line)
            one, two = (chat_score(folder, turns(row["prompt"], row["against"])) for folder in (first, second))
            assert row["against_score"] == pytest.approx(one + 0.5 * two, abs=1e-5)
