"""Stop strings in a rollout: which tokens stay, what a reward reads, and what counts as finished."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sheeprlhf.structure.generation import GenConfig
from sheeprlhf.structure.reward import FunctionRewardConfig
from sheeprlhf.task.loop import sample_table
from tests.support.models import EOS
from tests.support.runs import figures, train, write_rows
from tests.unit.rollout.test_collect_steps import make_setting, prompts

ModelFolder = Callable[..., Path]


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
