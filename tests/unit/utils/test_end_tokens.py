"""End tokens: which a tokenizer and its model's files name, and that data, samplers, texts and saved folders agree."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, GenerationConfig

from sheeprlhf.agent.policy import load_policy
from sheeprlhf.agent.reward import reward_model_of
from sheeprlhf.data.example import Example
from sheeprlhf.data.read import Row
from sheeprlhf.data.report import notes_on_ends
from sheeprlhf.data.tokenize import RowTokenizer
from sheeprlhf.model.folder.load import load_tokenizer
from sheeprlhf.rollout.engines import StopStrings, generate_ids, generate_responses, stream_ids
from sheeprlhf.rollout.rollout import decode_rollout, to_rollout
from sheeprlhf.rollout.sampler import Sampled, engine_of
from sheeprlhf.structure.data import LocalDataConfig
from sheeprlhf.structure.model import AutoModelConfig
from sheeprlhf.structure.reward import FunctionRewardConfig
from sheeprlhf.structure.run import GenConfig
from sheeprlhf.task.eval.reward import references_of
from sheeprlhf.utils.end_tokens import end_tokens, response_end, set_configured_end_ids
from tests.support.models import BOS, EOS, PAD, ModelFolder, byte_tokenizer
from tests.unit.rollout.test_collect_steps import make_setting, prompts

END = 259  # the tiny models have a row for it
TURNS = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}MARK{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]


def turn_tokenizer(mark: str = "<end>\n", *, special: bool = True) -> Any:
    """A byte tokenizer with one more token, `<end>`, and a template that writes `mark` after every turn."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken("<end>", special=special, normalized=False)], special_tokens=special)
    tokenizer.chat_template = TURNS.replace("MARK", mark)
    return tokenizer


def turn_folder(source: Path, folder: Path, *, special: bool = True, **generation: Any) -> Path:
    shutil.copytree(source, folder)
    turn_tokenizer(special=special).save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


CLOSINGS = [
    ("<end>\n", END),  # Gemma, Phi, ChatML: another token than EOS, and a new line behind it
    ("<end>", END),
    (" \n<end>", END),
    ("</s>", EOS),
    ("<end></s>", END),
    ("\n", None),
    ("", None),
    ("### done\n", None),
    ("{{ raise_exception('no') }}", None),
    ("{{ 1 // 0 }}", None),
    ("{{ m.tools[0].name.first }}", None),
]


@pytest.mark.parametrize(("mark", "closing"), CLOSINGS)
def test_the_template_tells_what_closes_a_turn(mark: str, closing: int | None) -> None:
    found = end_tokens(turn_tokenizer(mark))
    assert found.closing == closing
    assert set(found.ids) == {EOS} | ({closing} if closing is not None else set()) and found.ids[0] == EOS


LISTS: list[tuple[list[dict[str, Any]], set[int], set[int]]] = [
    ([{"eos_token_id": EOS}, {}], {EOS}, set()),
    ([{"eos_token_id": [EOS, END]}, {"eos_token_id": EOS}], {EOS, END}, set()),
    ([{}, {"eos_token_id": END}], {EOS, END}, set()),
    ([{"eos_token_id": None}, {"eos_token_id": [PAD, END]}], {EOS, PAD, END}, set()),
    ([{"text_config": {"eos_token_id": [END]}}], {EOS, END}, set()),
    ([{"eos_token_id": True}, {"eos_token_id": "<end>"}, {"eos_token_id": [-1]}], {EOS}, set()),
    ([{"eos_token_id": [65, END]}], {EOS, END}, {65}),  # a letter: texts contain it
    ([{"eos_token_id": 4000}], {EOS}, {4000}),
]


@pytest.mark.parametrize(("configs", "ends", "ignored"), LISTS)
def test_the_files_of_a_model_list_more(configs: list[dict[str, Any]], ends: set[int], ignored: set[int]) -> None:
    tokenizer = turn_tokenizer("\n")
    set_configured_end_ids(tokenizer, configs)
    found = end_tokens(tokenizer)
    assert set(found.ids) == ends and set(found.ignored) == ignored
    assert [str(number) in note for number, note in zip(found.ignored, notes_on_ends(tokenizer), strict=True)] == [
        True
    ] * len(ignored)


def row_of(tokenizer: Any, row: dict[str, Any]) -> tuple[str, str]:
    cfg = LocalDataConfig(minimum_response_length=1)
    [made] = RowTokenizer(cfg, tokenizer, "sft")([Row(0, "line 1", row)])
    assert made.dropped is None and made.num_eos == 1
    return tuple(tokenizer.decode(ids) for ids in np.split(made.tokens, [made.sizes[0]]))


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize(
    ("mark", "learned"), [("<end>\n", "ho<end>"), ("</s>\n", "ho</s>"), ("\n", "ho\n</s>"), ("<end>\n</s>", "ho<end>")]
)
def test_a_response_ends_in_what_the_template_writes(mark: str, learned: str, special: bool) -> None:
    tokenizer = turn_tokenizer(mark, special=special)
    prompt = tokenizer.apply_chat_template(TALK[:1], tokenize=False, add_generation_prompt=True)
    assert row_of(tokenizer, {"messages": TALK}) == (prompt, learned)
    assert row_of(tokenizer, {"prompt": "hi", "response": "ho"}) == ("<s>hi", "ho</s>")


def test_texts_and_counts_are_without_the_end_token() -> None:
    """Whichever it is, and where it is no special token too; a response that was cut keeps its last token."""
    tokenizer = turn_tokenizer(special=False)
    letters = [65, 66, 67]
    responses = tuple(np.array([*letters, *end], dtype=np.int32) for end in ([END], [EOS], []))
    row = Example(0, np.array([BOS, 70], dtype=np.int32), (responses[0],))
    sampled = Sampled(responses, tuple(np.zeros(len(ids), np.float32) for ids in responses), (True, True, False))
    texts = decode_rollout(to_rollout([row], [sampled]), [row], tokenizer, StopStrings((), tokenizer))
    text = tokenizer.decode(letters)
    assert texts.responses == [text] * 3 and texts.num_tokens == [3, 3, 3]
    assert texts.columns["reference"] == [text] * 3
    assert references_of([row], tokenizer).texts.finished == [True]


@pytest.mark.parametrize("name", ["native", "hf"])
def test_engines_end_at_the_first_of_the_set(name: str, model_folder: ModelFolder) -> None:
    """What is sampled is what is sampled without end tokens, up to the first one; native alone, which draws alike."""
    cfg = AutoModelConfig(repo_name=str(model_folder()))
    policy = load_policy(cfg, load_tokenizer(cfg), longest=64, batching="auto")
    uniforms = np.random.default_rng(0).random((2, 3, 8))
    prompts = [np.array([BOS, 70], dtype=np.int32), np.array([BOS, 71, 72], dtype=np.int32)]
    options: dict[str, Any] = dict(prompts=prompts, uniforms=uniforms, temperature=1.0, token_budget=10**4)
    free = [ids for one in engine_of(name)(policy.causal_lm(), end_ids=[], **options) for ids in one.responses]
    ends = [int(free[0][2]), int(free[1][4]), int(free[4][0])]
    found = engine_of(name)(policy.causal_lm(), end_ids=ends, **options)
    cut = 0
    for ids, finished in zip(
        (ids for one in found for ids in one.responses), (flag for one in found for flag in one.finished), strict=True
    ):
        inside = np.isin(ids, ends)
        assert not inside[:-1].any() and finished == inside[-1] and (finished or len(ids) == 8)
        cut += len(ids) < 8
    assert cut
    if name == "native":
        for ids, whole in zip((ids for one in found for ids in one.responses), free, strict=True):
            places = np.flatnonzero(np.isin(whole, ends))
            assert ids.tolist() == whole[: places[0] + 1 if len(places) else None].tolist()


def test_generate_and_stream_end_there_too(model_folder: ModelFolder, tmp_path: Path) -> None:
    cfg = AutoModelConfig(repo_name=str(model_folder()))
    tokenizer = turn_tokenizer()
    model = load_policy(cfg, load_tokenizer(cfg), longest=64, batching="auto").causal_lm().eval()
    prompt, options = np.array([BOS, 70], dtype=np.int32), GenConfig(max_new_tokens=8)
    free = list(stream_ids(model, prompt, options, end_ids=[], seed=0))
    with certain_at(model, 4, END):
        [ids] = generate_ids(model, tokenizer, [prompt], options)
    with certain_at(model, 4, END):
        texts = generate_responses(model, tokenizer, [prompt], options)
    with certain_at(model, 4, END):
        streamed = list(stream_ids(model, prompt, options, end_ids=end_tokens(tokenizer).ids, seed=0))
    assert ids.tolist() == streamed == [*free[:3], END] and texts == [tokenizer.decode(free[:3])]


@contextmanager
def certain_at(model: Any, count: int, token: int) -> Iterator[None]:
    """Inside, the head makes a token certain at its `count`-th call."""
    calls: list[int] = []

    def push(_: Any, __: Any, logits: Any) -> Any:
        calls.append(1)
        if len(calls) == count:
            logits[..., token] = 1e4
        return logits

    hook = model.get_output_embeddings().register_forward_hook(push)
    try:
        yield
    finally:
        hook.remove()


def test_a_rollout_is_finished_by_the_templates_token(model_folder: ModelFolder, tmp_path: Path) -> None:
    setting = make_setting(
        turn_folder(model_folder(), tmp_path / "model"), FunctionRewardConfig(path="length", target_length=1)
    )
    with certain_at(setting.policy.causal_lm(), 3, END):
        rollout = setting.collect(prompts(), 0)
    assert rollout.finished.all() and rollout.texts.num_tokens == [2] * 6
    assert {int(ids[-1]) for row in rollout.rows for ids in row.responses} == {END}


def test_saved_folders_list_all_of_them(model_folder: ModelFolder, tmp_path: Path) -> None:
    """A policy in its generation settings, in the order that was there; a reward model in its configuration."""
    folder = turn_folder(model_folder(), tmp_path / "model", eos_token_id=[END, EOS], do_sample=True)
    plain = turn_folder(model_folder(), tmp_path / "plain")
    for source, listed in ((folder, [END, EOS]), (plain, [EOS, END])):
        cfg = AutoModelConfig(repo_name=str(source))
        tokenizer = load_tokenizer(cfg)
        assert set(end_tokens(tokenizer).ids) == {EOS, END}
        policy = load_policy(cfg, tokenizer, longest=64, batching="auto")
        policy.save(tmp_path / f"{source.name}-saved", tokenizer)
        assert GenerationConfig.from_pretrained(tmp_path / f"{source.name}-saved").eos_token_id == listed
        assert AutoModelForCausalLM.from_pretrained(tmp_path / f"{source.name}-saved").config.vocab_size == 260
    reward = reward_model_of(policy, cfg, tokenizer)
    reward.save(tmp_path / "reward", tokenizer)
    saved = json.loads((tmp_path / "reward" / "config.json").read_text())
    assert saved["eos_token_id"] == [EOS, END]
    assert saved["pad_token_id"] not in (EOS, END)


def test_the_end_of_a_response_to_a_prompt() -> None:
    tokenizer = turn_tokenizer()
    templated = tokenizer.apply_chat_template(TALK[:1], tokenize=True, add_generation_prompt=True)["input_ids"]
    assert response_end(tokenizer, templated) == END
    assert response_end(tokenizer, tokenizer("hi")["input_ids"]) == EOS
