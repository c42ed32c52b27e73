"""Stop strings against the definition: the whole text decoded after every token; and what is left of a text."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sheeprlhf.model.load import load_causal_lm, load_tokenizer
from sheeprlhf.rollout.engines import StopStrings, generate_responses
from sheeprlhf.structure.generation import GenConfig
from sheeprlhf.structure.model import ModelConfig, TinyConfig
from sheeprlhf.structure.reward import FunctionRewardConfig
from sheeprlhf.task.finish import sample_table
from sheeprlhf.utils.errors import ConfigError
from tests.support.models import EOS, PAD, VOCAB, byte_tokenizer
from tests.support.runs import figures, train, write_rows
from tests.unit.rollout.test_collect_steps import make_setting, prompts

ModelFolder = Callable[..., Path]
TEXT = 'Return the list. Für ☃ "END"\n\n    def end(self):\n"""Zwei €. END of all..\n\n\n'
STRINGS = ["\n\n", ".", " END", "END", "☃", "€. E", '"""', "the list", "r the", " ", "no such thing"]


def sentencepiece() -> PreTrainedTokenizerFast:
    """As llama's first: pieces begin with a space that the decoder drops at the start; bytes for what has no piece."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += [*"▁abcdefghijklmnoprstuvwxyzERND.():", "▁END", "▁the", "▁list", "▁of", "END"]
    tokenizer = Tokenizer(models.Unigram([(piece, -float(i > 2)) for i, piece in enumerate(pieces)], 0, True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


TOKENIZERS: dict[str, Callable[[], Any]] = {
    "bytes": byte_tokenizer,
    "embedded": lambda: load_tokenizer(TinyConfig()),
    "sentencepiece": sentencepiece,
}


def ends_by_definition(tokenizer: Any, ids: np.ndarray, strings: list[str]) -> int:
    """The number of tokens at which the text first has one of the strings; 0 if it never has."""
    for number in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:number].tolist(), skip_special_tokens=True)
        if any(string in text for string in strings):
            return number
    return 0


@pytest.mark.parametrize("name", TOKENIZERS)
def test_it_ends_where_the_whole_text_first_has_a_string(name: str) -> None:
    """Real texts, and random tokens: characters in parts, special tokens in between, pieces that begin with a space."""
    tokenizer = TOKENIZERS[name]()
    rng = random.Random(0)
    special = [i for i, token in tokenizer.added_tokens_decoder.items() if token.special]
    texts = [tokenizer(TEXT, add_special_tokens=False)["input_ids"]]
    for _ in range(8):
        texts.append([rng.randrange(len(tokenizer)) for _ in range(40)])
        mixed = list(texts[0])
        for _ in range(12):
            mixed.insert(rng.randrange(len(mixed)), rng.choice(special))
        texts.append(mixed)
    parts = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in ("E", "N", "D.")]
    texts.append([i for part in parts for i in (*part, *special[:1] * 40)])
    ended = 0
    for ids in (np.array(text, dtype=np.int32) for text in texts):
        for strings in ([string] for string in STRINGS):
            stop = StopStrings(strings, tokenizer)
            found = next((number for number in range(1, len(ids) + 1) if stop(ids[:number])), 0)
            assert found == ends_by_definition(tokenizer, ids, strings), (name, strings)
            ended += found > 0
    assert ended > 20


def test_only_the_end_is_decoded_until_it_has_a_string(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_tokenizer()
    ids = np.array(tokenizer("a" * 500 + "END", add_special_tokens=False)["input_ids"], dtype=np.int32)
    stop = StopStrings(["END"], tokenizer)
    lengths: list[int] = []
    plain = StopStrings._decode
    monkeypatch.setattr(StopStrings, "_decode", lambda self, ids: lengths.append(len(ids)) or plain(self, ids))
    assert [stop(ids[:number]) for number in (500, 501, 502, 503)] == [False, False, False, True]
    assert max(lengths[:3]) < 20 and lengths[-1] == 503


LEFT = [([], "a END b"), (["END"], "a "), (["b", " E"], "a"), (["c"], "a END b")]


@pytest.mark.parametrize(("strings", "left"), LEFT)
def test_the_text_before_the_first_string_is_left(strings: list[str], left: str) -> None:
    tokenizer = byte_tokenizer()
    ids = np.array([*tokenizer("a END b", add_special_tokens=False)["input_ids"], EOS], dtype=np.int32)
    assert StopStrings(strings, tokenizer).text(ids) == left


def test_a_special_token_may_be_one() -> None:
    tokenizer = byte_tokenizer()
    stop = StopStrings(["<pad>"], tokenizer)
    assert [stop(np.array(ids)) for ids in ([65], [65, PAD], [65, EOS])] == [False, True, False]
    assert stop.text(np.array([65, PAD])) == tokenizer.decode([65])
    with pytest.raises(ConfigError, match=r"<pad>.*stop_strings=\["):
        StopStrings(["<pad>\n"], tokenizer)
    assert not StopStrings([], tokenizer) and not StopStrings([], tokenizer)(np.array([PAD]))


@pytest.mark.parametrize("beams", [1, 2])
def test_shown_texts_end_there_too(beams: int, model_folder: ModelFolder) -> None:
    """Each is what is written without stop strings, up to the first of them; nothing is computed beyond the last."""
    cfg = ModelConfig(config_name="auto", repo_name=str(model_folder()))
    model, tokenizer = load_causal_lm(cfg, vocabulary=VOCAB, longest=64), load_tokenizer(cfg)
    prompts = [np.frombuffer(text, dtype=np.uint8).astype(np.int32) for text in (b"a", b"some longer words", b"Hi")]
    plain = generate_responses(model, tokenizer, prompts, GenConfig(max_new_tokens=12, num_beams=beams))
    strings = [text[len(text) // 2] for text in plain]
    steps: list[int] = []
    model.register_forward_hook(lambda *_: steps.append(1))
    cfg_of_stop = GenConfig(max_new_tokens=12, num_beams=beams, stop_strings=strings)
    found = generate_responses(model, tokenizer, prompts, cfg_of_stop)
    if beams == 1:
        assert len(steps) < 12
        assert found == [min((text.split(string)[0] for string in strings), key=len) for text in plain]
    assert not any(string in text for string in strings for text in found)


def test_tokens_stay_and_the_text_is_cut(model_folder: ModelFolder) -> None:
    """The same responses as without, up to the token that completes a string; and the penalty on cut ones."""
    reward = FunctionRewardConfig(path="length", target_length=1, length_unit="characters", missing_eos_penalty=7.0)
    plain_setting = make_setting(model_folder(), reward)
    plain = plain_setting.collect(prompts(), 0)
    decode = plain_setting.collect._tokenizer.decode
    texts_of = [decode(ids.tolist()) for row in plain.rows for ids in row.responses]
    string = next(c for c in "".join(texts_of) if 0 < sum(c in text[:-1] for text in texts_of) < len(texts_of) - 1)
    setting = make_setting(model_folder(), reward, GenConfig(max_new_tokens=6, temperature=0.7, stop_strings=[string]))
    stopped = setting.collect(prompts(), 0)
    assert min(map(len, (ids for row in stopped.rows for ids in row.responses))) < 6 and not stopped.finished.all()
    texts, scores = iter(setting.collect.texts.responses), iter(stopped.scores.reshape(-1))
    for row, other, finished_K in zip(stopped.rows, plain.rows, stopped.finished, strict=True):
        for ids, whole, finished in zip(row.responses, other.responses, finished_K, strict=True):
            ends = [n for n in range(1, len(whole) + 1) if string in decode(whole[:n].tolist()) or whole[n - 1] == EOS]
            assert ids.tolist() == whole[: ends[0] if ends else None].tolist()
            text = decode(ids.tolist(), skip_special_tokens=True).split(string)[0]
            assert next(texts) == text
            assert finished == bool(ends)
            score = min(len(text), 1) / max(len(text), 1)
            assert next(scores) == pytest.approx(score - (0.0 if ends else 7.0))
    assert stopped.tokens["logprobs"][0].shape == (sum(map(len, stopped.rows[0].responses)),)
    np.testing.assert_allclose(stopped.tokens["reference"][0], stopped.tokens["logprobs"][0], atol=1e-5)
    shown = sample_table(setting.collect(prompts(), 0, group=1, validates=True), setting.collect.texts, 3)
    assert string not in "".join(part.split("\n", 1)[1].split("[reference]")[0] for part in shown.split("[model]")[1:])


def test_as_a_user_gives_them(tmp_path: Path, model_folder: ModelFolder) -> None:
    """Every character of one byte ends a response: all are finished at once, and nothing of them is shown."""
    data = write_rows(tmp_path / "rows.jsonl")
    strings = ",".join(f'"{letter}"' for letter in "abcdefghijklmnopqrstuvwxyz") + ',"\n","\ufffd"'
    words = [f"generation.stop_strings=[{strings}]", "task.max_num_steps=8", "generation.max_new_tokens=40"]
    run_dir = train(model_folder(), data, tmp_path / "run", *words, task="grpo")
    [table] = [path.read_text() for path in (run_dir / "samples").glob("step-8.txt")]
    written = table.split("[model]")[1].split("[reference]")[0].partition("\n")[2]
    assert not any(letter in written for letter in "abcdefghijklmnopqrstuvwxyz")
    found = figures(run_dir)
    assert found["rollout/finished"] == [1.0, 1.0]
    assert found["objective/scores"] == [0.0, 0.0]  # the share of small letters in what was left
