"""PPO teaches SmolLM2-135M to go on cheerfully; a second lexicon, which training never saw, judges.

    pip install afinn
    python benchmarks/sentiment_gates.py --work FOLDER [--seeds 0 1]

Trains `experiment=ppo_smollm2_sentiment` (VADER scores) on openings that say neither good nor bad, a seed after the
other. Held-out openings are then answered by the trained model and by the one that training started from, several
times each; AFINN judges the answers, the start model's perplexity says how far they are from what it would write, and
best of 4 is what sampling the start model and keeping the answer that VADER likes best gives. Prints a Markdown table.
A run that is there and finished is not run again.
"""

import argparse
import itertools
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from afinn import Afinn
from measure_preference import logprobs
from transformers import PreTrainedTokenizerBase

from sheeprlhf.agent.policy import Policy, load_policy
from sheeprlhf.config.run_lookup import read_run_config, saved_group
from sheeprlhf.data.example import Example
from sheeprlhf.data.prepare import prepare_data
from sheeprlhf.model.folder.load import load_tokenizer
from sheeprlhf.reward.functions import sentiment
from sheeprlhf.rollout.engines import generate_ids
from sheeprlhf.structure.data import DataConfig
from sheeprlhf.structure.model import ModelConfig
from sheeprlhf.structure.run import GenConfig
from sheeprlhf.task.models import load_policy_from_run

ROOT = Path(__file__).parents[1]
SUBJECTS = (
    "The hotel at the corner, The film on television, My new neighbour, The meeting this morning, Our trip to the sea, "
    "The soup of the day, The second chapter, The train to the city, The house over there, My first day at work, "
    "The concert last night, The teacher of the course, The phone in the window, The garden behind the school, "
    "The coat that I ordered, The walk along the river, The dog next door, The letter from the office, "
    "The answer to my question, The table in the kitchen, The road to the village, The talk after lunch, "
    "The shop at the station, The weather in October, The museum by the lake, My brother's car, The book on the desk, "
    "The call from the bank, The bread from the bakery, The flat on the third floor"
).split(", ")
VERBS = (
    "was, seemed, turned out to be, is, has always been, made me feel, was really, looked, must have been, "
    "reminded me of, gave us, will be, was described as, left me with, felt"
).split(", ")
ANSWERS = 4  # to each opening


def main() -> None:
    """Train and judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for openings and runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("words", nargs="*", help="more words for the training command")
    arguments = parser.parse_args()
    work = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    openings = write_openings(work / "openings.jsonl")
    head = ["seed", "", "AFINN", "VADER", "perplexity under the start", "tokens", "training, s"]
    print(f"| {' | '.join(head)} |\n|{' --- |' * len(head)}")
    for seed in arguments.seeds:
        run_dir, clock = work / f"ppo-{seed}", work / f"ppo-{seed}.seconds"
        if not clock.is_file():
            began = time.monotonic()
            command = [sys.executable, str(ROOT / "sheeprlhf.py"), "train", "experiment=ppo_smollm2_sentiment"]
            words = [f"data.train_file={openings}", f"seed={seed}", f"hydra.run.dir={run_dir}", *arguments.words]
            subprocess.run([*command, *words], check=True, stdout=sys.stderr)
            clock.write_text(f"{time.monotonic() - began:.0f}")
        for name, row in judge(run_dir, seed).items():
            seconds = clock.read_text() if name == "PPO" else ""
            print(f"| {seed} | {name} | {' | '.join(row)} | {seconds} |", flush=True)


def write_openings(path: Path) -> str:
    """Every subject with every verb; VADER has to find nothing in any."""
    prompts = [f"{subject} {verb}" for subject, verb in itertools.product(SUBJECTS, VERBS)]
    assert not any(sentiment(prompts, prompts))
    path.write_text("".join(json.dumps({"prompt": text, "response": " there."}) + "\n" for text in prompts))
    return str(path)


def judge(run_dir: Path, seed: int) -> dict[str, list[str]]:
    """Of the start, of its best of 4, and of the run: both lexicons' means, perplexity and length."""
    model, data = saved_group(str(run_dir), "model"), saved_group(str(run_dir), "data")
    assert isinstance(model, ModelConfig) and isinstance(data, DataConfig)
    tokenizer = load_tokenizer(model)
    rows = prepare_data(data, tokenizer, kind="sft", say=lambda _: None, progress=False).splits["test"]
    examples = [example for example in rows.examples(range(len(rows))) for _ in range(ANSWERS)]
    of: dict[str, Any] = {"longest": 64, "batching": "auto", "say": lambda _: None}
    generation = read_run_config(str(run_dir))["generation"]
    settings = GenConfig(
        max_new_tokens=generation["max_new_tokens"], temperature=generation["temperature"], do_sample=True
    )
    start = load_policy(model, tokenizer, **of)
    trained = load_policy_from_run(model, run_dir, "final", tokenizer, **of)
    by_start = answers(start, tokenizer, examples, settings, seed)
    scores = sentiment([], [str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in by_start])
    places = [max(range(at, at + ANSWERS), key=scores.__getitem__) for at in range(0, len(examples), ANSWERS)]
    written = {
        "start": (examples, by_start),
        "start, best of 4": ([examples[at] for at in places], [by_start[at] for at in places]),
        "PPO": (examples, answers(trained, tokenizer, examples, settings, seed)),
    }
    lexicon, result = Afinn(), {}
    for name, (asked, ids) in written.items():
        texts = [str(tokenizer.decode(one, skip_special_tokens=True)) for one in ids]
        tokens = sum(map(len, ids))
        perplexity = math.exp(-logprobs(start, asked, ids).sum() / tokens)
        judged = [lexicon.score(text) for text in texts]
        error = np.std(judged, ddof=1) / math.sqrt(len(judged))
        result[name] = [
            f"**{np.mean(judged):.2f}** ± {error:.2f}",
            f"{np.mean(sentiment([], texts)):.2f}",
            f"{perplexity:.2f}",
            f"{tokens / len(ids):.1f}",
        ]
        for opening, text in list(zip(asked, texts, strict=True))[:12:ANSWERS]:
            print(f"{name}: {tokenizer.decode(opening.prompt_ids)}|{text!r}", file=sys.stderr)
    return result


def answers(
    policy: Policy, tokenizer: PreTrainedTokenizerBase, examples: list[Example], settings: GenConfig, seed: int
) -> list[np.ndarray]:
    """The tokens that a policy samples after each prompt."""
    torch.manual_seed(seed)
    found: list[np.ndarray] = []
    for at in range(0, len(examples), 64):
        prompts = [example.prompt_ids for example in examples[at : at + 64]]
        found += generate_ids(policy.causal_lm(), tokenizer, prompts, settings)
    return found


if __name__ == "__main__":
    main()
