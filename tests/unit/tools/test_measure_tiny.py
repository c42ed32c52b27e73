"""The gates of the embedded model: what a word is, what is run for a seed, what the figures are, and the card."""

import csv
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tools import build_tiny, measure_tiny
from tools.english import unknown_words, words_of
from tools.measure_tiny import Sampled, Seed, gates, measure

WARM = Sampled(1.0, 0.96, 0.97, 9000, ["sometric", "gle"])
COOL = Sampled(0.7, 0.98, 0.99, 8000, ["gle"])
SEED = Seed(1.4, 30.0, 23.0, 21.7, [WARM, COOL], 0.972, 0.986)


def as_json(seed: Seed) -> dict[str, Any]:
    return seed._asdict() | {"sampled": [at._asdict() for at in seed.sampled]}


def warmer(known: float) -> Seed:
    return SEED._replace(sampled=[WARM._replace(known=known), COOL])


def test_words_by_hand() -> None:
    english = frozenset({"return", "the", "of", "don't", "size", "frame"})
    found = words_of("Return max_len2 of the x's DataFrame; don't.")
    assert " ".join(found) == "return max len of the x's dataframe don't"
    assert unknown_words("Return the frame's sizze. Don't!", "def f():", english) == ["sizze"]
    assert unknown_words("Return dataframe, data, HTTP of readers.", "def read_HTTPData(DataFrame)", english) == [
        "readers"
    ]


def test_a_gate_is_of_the_mean_over_the_seeds() -> None:
    def passed(*seeds: Seed) -> list[bool]:
        return [gate.passed for gate in gates(list(seeds))]

    assert passed(SEED, SEED) == [True, True, True, True]
    assert passed(SEED, SEED._replace(bits_per_character=1.61)) == [False, True, True, True]  # mean 1.505
    assert passed(SEED, SEED._replace(bits_per_character=1.59)) == [True, True, True, True]
    assert passed(warmer(0.9499)) == [True, False, True, True]
    assert passed(SEED._replace(sampled=[WARM, COOL._replace(known=0.9499)])) == [True, True, False, True]
    assert passed(SEED._replace(rouge_l=21.7)) == [True, True, True, False]  # above, not equal
    assert gates([]) == []


class Commands:
    """Stands for the command line: notes the words and writes what the command would."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    def __call__(self, words: list[str]) -> None:
        self.asked.append(words)
        options = dict(word.split("=", 1) for word in words if "=" in word)
        if words[0] == "train":
            Path(options["hydra.run.dir"]).mkdir(parents=True)
            Path(options["hydra.run.dir"], "run.json").write_text('{"started": 1.0, "status": "finished"}')
            return
        folder = Path(options.get("output_dir") or f"{options['experiment_dir']}/eval")
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{options['task']}-test-{'final' if 'experiment_dir' in options else 'tiny'}"
        record: dict[str, Any] = {
            "rows": 2,
            "tokens": 9,
            "characters": 30,
            "bits_per_character": 1.2,
            "perplexity": 9.0,
        }
        record |= {"rougeL": 30.0, "mean_low_high": {"names": {"rougeL": [20.0, 19.0, 21.0]}}}
        (folder / f"{name}.json").write_text(json.dumps(record))
        rows = [
            {"prompt": "def f():", "response": "Return the sizzze.", "reference": "Return the size."},
            {"prompt": "def dask():", "response": "Return dask", "reference": "Use numpy."},
        ]
        if options["task"] == "rouge":
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_what_is_run_and_that_finished_parts_are_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = Commands()
    monkeypatch.setattr(measure_tiny, "run", commands)
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"weights")
    figures = measure(str(model), [0, 7], tmp_path / "work", ["task.epochs=2"])
    kinds = [(words[0], words[1]) for words in commands.asked]
    of_seed = [("train", "task=sft"), *[("eval", "task=perplexity")], *[("eval", "task=rouge")] * 3]
    assert kinds == [("eval", "task=perplexity"), *of_seed, *of_seed]
    train, warm, cool = commands.asked[6], commands.asked[9], commands.asked[10]
    for word in ("data.num_samples=null", "data.reward_model_split=0", "task.epochs=2", "seed=7", "resume=true"):
        assert word in train
    assert {"generation.do_sample=true", "seed=7", "generation.temperature=1.0"} <= set(warm)
    assert {"generation.do_sample=true", "seed=7", "generation.temperature=0.7"} <= set(cool)
    assert figures["weights_sha256"] == hashlib.sha256(b"weights").hexdigest()
    assert figures["bits_per_character"] == 1.2 and len(figures["after_sft"]) == 2
    seed = figures["after_sft"][1]
    assert [at["known"] for at in seed["sampled"]] == [pytest.approx(4 / 5)] * 2
    assert [at["with_jargon"] for at in seed["sampled"]] == [pytest.approx(4 / 5)] * 2
    assert [(at["words"], at["unknown"]) for at in seed["sampled"]] == [(5, ["sizzze"])] * 2
    assert seed["authors_known"] == pytest.approx(4 / 5)  # not numpy
    assert seed["authors_with_jargon"] == 1.0
    assert (seed["rouge_l"], seed["names_rouge_l"]) == (30.0, 20.0)
    assert [gate["passed"] for gate in figures["gates"]] == [True, False, False, True]

    commands.asked.clear()
    assert measure(str(model), [0, 7], tmp_path / "work", ["task.epochs=2"]) == figures
    assert commands.asked == []
    (model / "model.safetensors").write_bytes(b"other weights")
    measure(str(model), [0], tmp_path / "work", ["task.epochs=2"])
    measure(str(model), [0], tmp_path / "work", [])
    assert len(commands.asked) == 12  # nothing of other weights or options is taken


def finished_run(folder: Path) -> Path:
    for name in ("final", "samples", "checkpoints/step-40"):
        (folder / name).mkdir(parents=True)
    save_file({"weight": torch.ones(3, 4)}, folder / "final" / "model.safetensors")
    (folder / "config.yaml").write_text(
        "task: {mini_batch_size: 64, lr_warmup_steps: 60}\noptim: {lr: 0.002}\n"
        "fabric: {precision: 32-true, accelerator: cpu}\n"
    )
    (folder / "data_report.json").write_text('{"splits": {"train": {"kept": 128652, "trained_tokens": 4453784}}}')
    with (folder / "metrics.csv").open("w", newline="") as file:
        rows = csv.DictWriter(file, ("step", "tag", "value"))
        rows.writeheader()
        rows.writerows({"step": step, "tag": "train/loss", "value": 7 - step / 20} for step in (20, 40))
        rows.writerow({"step": 40, "tag": "val/perplexity", "value": 34.83})
    (folder / "checkpoints" / "step-40" / "state.json").write_text('{"items_seen": 3751292}')
    (folder / "samples" / "step-40.txt").write_text("step 40\n[prompt]\ndef {f}():\n")
    return folder


def test_the_card_has_the_figures_of_these_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, model = finished_run(tmp_path / "run"), tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    words = ["build_tiny", "--run", str(run), "--output", str(model)]
    monkeypatch.setattr(sys, "argv", words)
    build_tiny.main()
    assert not (model / "README.md").exists()

    digest = hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()
    measured = tmp_path / "measured.json"
    figures = {"weights_sha256": digest, "sft_options": ["task.epochs=2"], "seeds": [0, 1], "rows": 1250, "tokens": 1}
    figures |= {"characters": 70722, "bits_per_character": 1.4555, "perplexity": 42.95}
    figures |= {"after_sft": [as_json(SEED), as_json(warmer(0.91))]}
    figures |= {"gates": [gate._asdict() for gate in gates([SEED, warmer(0.91)])]}
    monkeypatch.setattr(sys, "argv", [*words, "--measured", str(measured)])
    for wrong in ({"seeds": []}, {"weights_sha256": "0"}):
        measured.write_text(json.dumps(figures | wrong))
        with pytest.raises(SystemExit):
            build_tiny.main()
    measured.write_text(json.dumps(figures))
    build_tiny.main()
    card = (model / "README.md").read_text()
    for part in (
        "of 12 parameters",
        "| bits per character of those summaries | 1.456 |",
        "data.reward_model_split=0 task.epochs=2`",
        "1,250 summaries of the test split (70,722 characters)",
        "| known words after SFT, sampled at 1.0 | at least 95% | 93.50% | not met |",
        "| known words after SFT, sampled at 0.7 | at least 95% | 98.00% | met |",
        "| ROUGE-L after SFT | above the names' 21.70 | 23.00 | met |",
        "| 1 | 1.400 | 30.00 | 23.00 | 91.00%, 97.00%; 98.00%, 99.00% |",
        "own words 97.2%",
        "98.6% of the authors' words; the model's commonest others at temperature 1: sometric, gle.",
        "| 40 | 5.000 |",
        "def {f}():",
    ):
        assert part in card, part
