"""Rows for experiment=prm_docstrings: several docstrings each, of which those in the imperative are right.

python examples/docstring_steps.py steps.jsonl
"""

import json
import random
import sys

from sheeprlhf import load_tokenizer, prepare_data

STEPS = 3


def main(path, count=2000):
    """Write the rows: the better response of a pair of the embedded data is a right step, the other one a wrong one."""
    tokenizer, rng = load_tokenizer("tiny"), random.Random(0)
    pairs = prepare_data("docstrings", tokenizer, kind="preference", num_samples=count * STEPS).splits["reward"]
    texts = [
        [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in row.responses]
        for row in pairs.examples(range(len(pairs)))
    ]
    with open(path, "w") as file:
        for number in range(0, len(texts) - STEPS + 1, STEPS):
            labels = [rng.random() < 0.5 for _ in range(STEPS)]
            steps = [pair[not label] for pair, label in zip(texts[number : number + STEPS], labels, strict=True)]
            row = {"prompt": "Docstrings:\n", "completions": steps, "labels": labels}
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
